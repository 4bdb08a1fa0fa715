"""Conformations as files of atoms, for other programs: PDB, mmCIF, DCD and ChimeraX scripts."""

import os
import re
from pathlib import Path

import numpy as np
import prody
import torch

from .._arguments import Latents, checked
from .._files import atomic_path
from ..model import Model
from ..molecule import (
    Structure,
    chain_names,
    fits_pdb_text,
    quiet_prody,
    with_reference_bonds,
    write_structure,
)
from .colors import CHAIN_COLORS

# Å: no molecule is as large, and single precision still tells atoms apart.
_FARTHEST = 1e5
# ChimeraX ends a quoted file name at a quote before a space, and knows no escapes within: the
# ensemble's name has what can always be quoted instead.
_CHIMERAX_NAME_CHARACTERS = str.maketrans({'"': "'", "\n": " ", "\r": " ", "\t": " "})


@torch.no_grad()
@checked
def decode_ensemble(model: Model, latents: Latents) -> prody.Ensemble:
    """ProDy ensemble of every atom at (m, p) `latents`; side chains and ligands move along.

    Bonds of the backbone are as long as in the reference: see `molecule.with_reference_bonds`.

    Raises
    ------
    ValueError
        For another number of latents than the model has, no conformation, or latents that are not
        finite. Whether they are of this model, and not of one with as many, is not known.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> decode_ensemble(model, torch.zeros(3, 12)).numConfs()
    3
    """
    latents = torch.as_tensor(latents)
    expected = ("m", model.n_latents)
    if latents.ndim != 2 or latents.shape[1] != model.n_latents or not len(latents):
        raise ValueError(
            f"expected latents ({expected[0]}, {expected[1]}) of {model!r}, one row a "
            f"conformation, got {tuple(latents.shape)}; try motions.traverse()"
        )
    if not torch.isfinite(latents).all():
        raise ValueError("expected finite latents, got NaN or Inf; try leaving those out")
    dynamics = model.dynamics.all_atoms()
    ensemble = prody.Ensemble(model.structure.name)
    ensemble.setAtoms(dynamics.structure.atoms)
    ensemble.setCoords(dynamics.structure.coords)
    coords = dynamics.decode(latents).double().cpu().numpy()
    if not np.isfinite(coords).all() or np.abs(coords).max() > _FARTHEST:
        raise ValueError(
            f"expected latents of conformations within {_FARTHEST:g} Å, got some of up to "
            f"{float(latents.abs().max()):g}; try motions.traverse()"
        )
    ensemble.addCoordset(with_reference_bonds(dynamics.structure, coords))
    return ensemble


@checked
def save_conformations(path: str | os.PathLike, model: Model, latents: Latents) -> Path:
    """Write the conformations at (m, p) `latents`, all atoms, in the format of the suffix.

    Parameters
    ----------
    path : path
        - .pdb or .cif: the conformations as models.
        - .dcd: as frames. A DCD holds no names: open it on a file of the same atoms, which
          ``model.structure.save`` writes.
        - .cxc: a ChimeraX script and, beside it, the file that it opens: of x.cxc x-models.pdb, or
          x-models.cif for what PDB text cannot hold. In an empty session it shows the chains in
          the colours of this library's figures and a slider along the conformations. The two files
          find each other wherever their folder is moved.
    model : Model
    latents : (m, p) tensor

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        For another suffix, a folder that cannot be written, latents that `decode_ensemble` refuses,
        or a molecule that the format cannot hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".pdb", ".cif", ".dcd", ".cxc"):
        raise ValueError(
            f"expected a path that ends in .pdb, .cif, .dcd or .cxc, got {path.name}; "
            f"try {path.name.split('.')[0] or 'motion'}.pdb"
        )
    ensemble = decode_ensemble(model, latents)
    if suffix == ".dcd":
        with atomic_path(path) as part, quiet_prody():
            prody.writeDCD(str(part), ensemble)
    elif suffix == ".cxc":
        _write_chimerax(path, model.structure, ensemble)
    else:
        write_structure(_models(model.structure, ensemble), model.structure.name, path)
    return path


def _models(structure: Structure, ensemble: prody.Ensemble) -> prody.AtomGroup:
    """The atoms, with the conformations as coordinate sets."""
    models = structure.atoms.copy()
    models.setCoords(ensemble.getCoordsets())
    return models


def _write_chimerax(path: Path, structure: Structure, ensemble: prody.Ensemble) -> None:
    """The script at `path`, and the ensemble beside it."""
    models = _models(structure, ensemble)
    in_pdb = fits_pdb_text(models)
    # mmCIF keeps the chains' own ids.
    ids = structure.atoms.getChids().tolist()
    name_in_file = chain_names(structure.atoms) if in_pdb else {chid: chid for chid in ids}
    odd = [name for name in name_in_file.values() if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)]
    if odd:
        raise ValueError(
            "expected chain ids of letters and digits, which ChimeraX can be told to colour, got "
            f"{odd[0]!r}; try a file name that ends in .cif"
        )
    # A name of its own: a file that happens to be called as the script is left as it is.
    name = f"{path.stem}-models{'.pdb' if in_pdb else '.cif'}".translate(_CHIMERAX_NAME_CHARACTERS)
    write_structure(models, structure.name, path.with_name(name))
    lines = [
        f'open "{name}" coordset true',
        "set bgColor white",
        "hide atoms",
        "cartoon",
        "show ligand",
        *_color_commands(structure, name_in_file),
        "view",
        "coordset slider #1",
    ]
    with atomic_path(path) as part:
        part.write_text("\n".join([*lines, ""]))


def _color_commands(structure: Structure, name_in_file: dict[str, str]) -> list[str]:
    """A ChimeraX command for each chain of each body, that gives it the body's colour."""
    chids = structure.atoms.getChids()
    resnums = structure.atoms.getResnums()
    commands = []
    for body in range(structure.n_chains):
        color = CHAIN_COLORS[body % len(CHAIN_COLORS)]
        own = structure.atom_chain == body
        for chid in dict.fromkeys(chids[own]):
            atoms = f"#1/{name_in_file[chid]}"
            if np.isin(chid, chids[~own]):
                # A chain that several bodies share is coloured by residues.
                numbers = dict.fromkeys(resnums[own & (chids == chid)].tolist())
                atoms += ":" + ",".join(map(str, numbers))
            commands.append(f"color {atoms} {color}")
    return commands
