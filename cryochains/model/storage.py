"""A model as tensors and JSON, so that a saved result opens without anything else."""

import torch
from torch import Tensor

from ..molecule import pack_modes, pack_structure, unpack_modes, unpack_structure
from .model import Model


def pack_model(model: Model) -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON-able description of `model`: all that `unpack_model` needs."""
    structure_arrays, structure_meta = pack_structure(model.structure)
    tensors = {f"structure/{name}": array for name, array in structure_arrays.items()}
    meta = {
        "structure": structure_meta,
        "modes": None,
        "rotation": model.dynamics.rotation,
        "translation": model.dynamics.translation,
        "sigma": model.sigma,
        "box_size": model.box_size,
        "pixel_size": model.pixel_size,
    }
    if model.modes is not None:
        mode_arrays, meta["modes"] = pack_modes(model.modes)
        tensors |= {f"modes/{name}": array for name, array in mode_arrays.items()}
    return {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, meta


def unpack_model(tensors: dict[str, Tensor], meta: dict) -> Model:
    """The model that `pack_model` described.

    Raises
    ------
    ValueError
        When the description is damaged.
    """
    structure = unpack_structure(_arrays(tensors, "structure/"), meta["structure"])
    modes = None
    if meta["modes"] is not None:
        modes = unpack_modes(_arrays(tensors, "modes/"), meta["modes"])
    return Model(
        structure,
        modes=modes,
        rotation=meta["rotation"],
        translation=meta["translation"],
        sigma=meta["sigma"],
        box_size=meta["box_size"],
        pixel_size=meta["pixel_size"],
    )


def _arrays(tensors: dict[str, Tensor], prefix: str) -> dict:
    return {
        name.removeprefix(prefix): tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
