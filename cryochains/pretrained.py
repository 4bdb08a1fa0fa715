"""Models trained before: an encoder, and the population of the particles it was trained on.

A file holds no coordinates. It names the entries its structure comes from and a hash of their content, and is
refused for any other structure. Beside each stands a model card: data, training, scores, limits.
"""

from pathlib import Path

from .files import load_tensors, save_tensors
from .matching import match_structures
from .model import CryoChains
from .population import Population
from .structure import Structure, load_structure

FOLDER = Path(__file__).parent / "data"
KIND = "pretrained model"


def save_pretrained(path, model: CryoChains, population: Population, entries: tuple[str, str]) -> None:
    """Write encoder and population as one safetensors file.

    `entries` are two that `load_structure` knows: the structure of the model is the first, cut down to what it shares
    with the second.
    """
    if population.structure_hash != model.structure.content_hash:
        raise ValueError(f"expected the population of {model.structure!r}, got another molecule's")
    tensors = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    tensors |= {"mean": population.mean, "covariance": population.covariance}
    dynamics, imaging, encoder = model.dynamics, model.imaging, model.encoder
    modes = None if dynamics.modes is None else [len(values) for values in dynamics.modes.eigenvalues]
    settings = {
        "box_size": imaging.box_size, "pixel_size": imaging.pixel_size, "sigma": imaging.sigma, "modes": modes,
        "rotation": dynamics.rotation, "translation": dynamics.translation, "width": encoder.width,
        "pool": encoder.pool,
    }  # fmt: skip
    meta = {"entries": entries, "content_hash": model.structure.content_hash, "settings": settings}
    shared = {"noise_std": population.noise_std, "contrast": population.contrast}
    save_tensors(path, tensors, {"kind": KIND, **meta, **shared})


def load_pretrained(name: str, structure: Structure | None = None) -> tuple[CryoChains, Population]:
    """A model whose encoder is trained, and the population its refinement learned.

    Parameters
    ----------
    name : str
        "glua3", or the path of a file that `save_pretrained` wrote.
    structure : Structure, optional
        The reference it was trained around; by default it is loaded by the entries' names.

    Returns
    -------
    model : CryoChains
    population : Population
        Start `refine` with it: ``refine(model, particles, population)``. Its noise is that of its own particles.

    Raises
    ------
    ValueError
        For an unknown name, or a structure that is not the one of the file.

    Examples
    --------
    >>> model, population = load_pretrained("glua3")
    >>> model.imaging.box_size, len(population.mean) == model.dynamics.n_latents
    (64, True)
    """
    known = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    path = FOLDER / f"{name}.safetensors" if name in known else Path(name)
    if not path.is_file():
        raise ValueError(f"expected a pretrained model of {', '.join(known)}, or a file of one, got {str(name)!r}")
    tensors, meta = load_tensors(path, KIND)
    if structure is None:
        structure = match_structures(*(load_structure(entry) for entry in meta["entries"])).a
    if structure.content_hash != meta["content_hash"]:
        raise ValueError(
            f"expected {meta['entries'][0]} as matched with {meta['entries'][1]}, which this model was trained around, "
            f"got {structure!r} with other atoms or coordinates; try structure=None"
        )
    model = CryoChains(structure, **meta["settings"])
    weights = {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")}
    model.encoder.load_state_dict(weights)
    model.contrast.fill_(meta["contrast"])
    population = Population(
        tensors["mean"], tensors["covariance"], meta["noise_std"], meta["contrast"], meta["content_hash"]
    )
    return model, population
