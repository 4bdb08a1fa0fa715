"""Density of each residue: the reference's own where nothing was learned, and errors."""

import numpy as np
import pytest
import torch

from cryochains import Model, refine, simulate_particles
from cryochains.analysis import density_table
from cryochains.inference import Result


def test_a_table_has_every_residue_at_occupancy_one(closed):
    particles = simulate_particles(
        closed, 12, conformations=closed.coords[None], box_size=32, progress=False
    )
    model = Model(closed, particles, modes=None)
    result = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    table = density_table(result)
    assert len(table) == closed.n_nodes
    occupancy = table.filter(like="occupancy").to_numpy(dtype=float)
    np.testing.assert_allclose(occupancy, 1.0, atol=1e-6)


def test_latents_that_nobody_refined_are_refused(closed):
    model = Model(closed, modes=None, box_size=32, pixel_size=5.0)
    with pytest.raises(ValueError, match="expected"):
        density_table(Result(model, torch.zeros(3, 12)))
