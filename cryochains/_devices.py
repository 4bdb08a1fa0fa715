"""Where tensors are computed."""

import torch

from ._processes import local_rank


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The `device` that is asked for; by default a CUDA GPU where there is one, else the CPU.

    Not Apple's MPS, which has no float64: the refinement's sums need it.

    Raises
    ------
    ValueError
        For what is no device, one that is not there, or one without float64.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Of several processes of a computer each takes the next GPU.
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    chosen = present_device(device)
    try:
        # Some kinds of devices hold no numbers, or none in double precision.
        torch.zeros(1, dtype=torch.float64, device=chosen).cpu()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected a device that computes in float64, got {str(device)!r}; try device='cpu'"
        ) from error
    return chosen


def present_device(device: str | torch.device) -> torch.device:
    """The device of this name, which is there.

    Raises
    ------
    ValueError
        For what is no device, or one that is not there.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a device such as 'cpu' or 'cuda', got {device!r}; try device=None, which "
            "takes a GPU where there is one"
        ) from error
    try:
        torch.zeros(0, device=chosen)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"expected a device that is there, got {str(device)!r}; try device='cpu'"
        ) from error
    return chosen
