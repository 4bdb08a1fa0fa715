"""The molecule: structures and their files, matching and morphs, normal modes, screw motions.

Modules, each importing only from those before it:

- `residues`: nodes of the elastic network, scattering, which node an atom moves with
- `sources`: atoms from an embedded example, a file, a PDB id or ProDy
- `writing`: atoms to PDB text and mmCIF
- `network`: the elastic network of a set of nodes, and its softest motions
- `domains`: where a chain is cut into parts that are stiffer than it
- `structure`: `Structure`, a molecule as bodies that move
- `beads`: the few Gaussians a residue that a molecule is drawn with
- `superposition`: superposition of two conformations, and a morph between them
- `pairing`: which body and which residue of one structure is which of another
- `matching`: two structures cut down to what they share
- `modes`: normal modes of every body
- `screws`: the change between two conformations as axis, angle, shift and bending
- `storage`: structures and modes as arrays and JSON
"""

from .beads import Beads, atom_beads, compare_beads, move_beads, residue_beads
from .matching import Match, match_structures
from .modes import Modes, compute_modes, find_chain
from .screws import Screw, change_sentence, describe_change, screw_motion
from .sources import quiet_prody
from .storage import pack_modes, pack_structure, unpack_modes, unpack_structure
from .structure import BONDED_DISTANCE, Structure, load_structure
from .superposition import morph, rigid_fit, superpose, with_reference_bonds
from .writing import chain_names, fits_pdb_text, write_structure

__all__ = [
    "BONDED_DISTANCE",
    "Beads",
    "Match",
    "Modes",
    "Screw",
    "Structure",
    "atom_beads",
    "chain_names",
    "change_sentence",
    "compare_beads",
    "compute_modes",
    "describe_change",
    "find_chain",
    "fits_pdb_text",
    "load_structure",
    "match_structures",
    "morph",
    "move_beads",
    "pack_modes",
    "pack_structure",
    "quiet_prody",
    "residue_beads",
    "rigid_fit",
    "screw_motion",
    "superpose",
    "unpack_modes",
    "unpack_structure",
    "with_reference_bonds",
    "write_structure",
]
