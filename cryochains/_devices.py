"""Where tensors are computed."""

import torch

from ._processes import local_rank


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The `device` that is asked for; by default a CUDA GPU where there is one, else the CPU.

    Not Apple's MPS, which has no float64: the refinement's sums need it.

    Raises
    ------
    ValueError
        For what is no device, or a GPU that is not there.
    """
    available = torch.cuda.is_available()
    if device is None:
        if not available:
            return torch.device("cpu")
        # Of several processes of a computer each takes the next GPU.
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected a device such as 'cpu' or 'cuda', got {device!r}; try device=None, which "
            "takes a GPU where there is one"
        ) from error
    if chosen.type == "cuda" and not available:
        raise ValueError(f"expected a device that is there, got {device!r}; try device='cpu'")
    return chosen
