"""Where tensors are computed."""

import torch


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The `device` that is asked for; by default a CUDA GPU where there is one, else the CPU.

    Not Apple's MPS, which has no float64: the refinement's sums need it.
    """
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
