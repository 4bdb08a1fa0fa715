"""Encoder, dynamics and imaging as one: only the encoder learns, everything else is the experiment."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains.imaging import Imaging, random_rotations
from cryochains.matching import morph
from cryochains.model import CryoChains
from cryochains.modes import compute_modes
from cryochains.particles import ParticleStack
from cryochains.simulation import simulate_particles

BOX, PIXEL = 32, 5.0


def make(structure, **settings):
    settings = {"box_size": BOX, "pixel_size": PIXEL, "modes": 2, "width": 0.05} | settings
    return CryoChains(structure, **settings)


@pytest.fixture(scope="module")
def particles(closed):
    # Without noise: what is measured from them is exact.
    return simulate_particles(
        closed, 60, conformations=closed.coords[None], box_size=BOX, pixel_size=PIXEL, snr_db=np.inf, shift_std=2.0,
        progress=False,
    )  # fmt: skip


def scaled(particles, factor, offset=0.0) -> ParticleStack:
    return ParticleStack(
        factor * particles.read_images() + offset, particles.rotations, particles.shifts,
        pixel_size=particles.pixel_size, ctf=particles.ctf,
    )  # fmt: skip


def test_only_the_encoder_has_parameters(closed):
    model = make(closed)
    names = [name for name, _ in model.named_parameters()]
    assert names and all(name.startswith("encoder.") for name in names)
    assert set(model.state_dict()) == {*names, "contrast"}


def test_untrained_it_draws_the_reference(closed):
    model = make(closed)
    rotations = random_rotations(3, 0)
    shifts = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-3.0, 5.0]])
    images = torch.randn(3, BOX, BOX, generator=torch.Generator().manual_seed(0))
    microscope = Imaging(closed.weights, BOX, PIXEL, closed.origin)
    coords = torch.from_numpy(closed.coords).float().expand(3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images, rotations, shifts), microscope(coords, rotations, shifts), rtol=0, atol=1e-5
        )


def test_forward_is_encode_then_render(closed):
    model = make(closed, width=0.1)
    with torch.no_grad():
        for heads in model.encoder.heads:
            for head in heads.values():
                head[-1].bias.normal_(generator=torch.Generator().manual_seed(1))
        model.contrast.fill_(2.0)
        images, rotations = torch.randn(2, BOX, BOX), random_rotations(2, 0)
        latents = model.encode(images)
        assert latents.abs().max() > 0.1
        plain = model.imaging(model.decode(latents), rotations)
        torch.testing.assert_close(model.render(latents, rotations), 2 * plain)
        torch.testing.assert_close(model(images, rotations), 2 * plain)


def test_the_loss_of_an_image_reaches_the_encoder(closed, particles):
    model = make(closed)
    batch = next(particles.batches(4))
    (model(batch.images, *batch.pose) - 1.1 * batch.images).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    last = model.encoder.heads[0]["translation"][-1]
    assert last.weight.grad.abs().max() > 0


def test_modes_are_a_number_or_modes_or_none(closed):
    assert make(closed, modes=3).dynamics.n_latents == 18
    assert make(closed, modes=compute_modes(closed, (1, 2))).dynamics.n_latents == 15
    assert make(closed, modes=(1, 2)).dynamics.n_latents == make(closed, modes=[2, 1]).dynamics.n_latents == 15
    assert make(closed, modes=np.int64(3)).dynamics.n_latents == 18
    assert make(closed, modes=None).dynamics.n_latents == make(closed, modes=0).dynamics.n_latents == 12
    assert make(closed, modes=3, rotation=False, translation=False).dynamics.n_latents == 6
    with pytest.raises(ValueError, match="expected a number of modes for each of 2 chains, got -1"):
        make(closed, modes=-1)
    with pytest.raises(ValueError, match="expected at least one of modes, rotation and translation"):
        make(closed, modes=None, rotation=False, translation=False)


def test_for_particles_takes_their_size(closed, particles):
    model = CryoChains.for_particles(closed, particles, modes=None, width=0.05, sigma=6.0)
    assert (model.imaging.box_size, model.imaging.pixel_size, model.imaging.sigma) == (BOX, PIXEL, 6.0)
    assert model.structure is closed and model.device.type == "cpu"


def test_seed_decides_the_weights_and_nothing_else(closed):
    def weights(seed):
        return torch.cat([p.flatten() for p in make(closed, seed=seed).parameters()])

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights(0)
    assert torch.equal(torch.rand(3), expected), "the caller's random state is left alone"
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_molecule_larger_than_the_box(closed):
    with pytest.raises(ValueError, match="expected a molecule that fits the box of 32 px × 2 Å"):
        make(closed, pixel_size=2.0)


@pytest.mark.parametrize("factor", [1.0, 0.02, 350.0])
def test_contrast_is_measured(closed, particles, factor):
    model = make(closed, modes=None)
    # A constant background is no brightness of the molecule.
    assert model.estimate_contrast(scaled(particles, factor, 3 * factor)) == pytest.approx(factor, rel=1e-3)
    assert float(model.contrast) == pytest.approx(factor, rel=1e-3)


def test_motion_does_not_dim_the_images(pair):
    closed, opened = pair
    moving = simulate_particles(
        closed, 200, conformations=morph(closed, opened, 10), box_size=48, snr_db=0.0, seed=0, progress=False
    )
    model = CryoChains.for_particles(closed, moving, modes=None, width=0.05)
    assert model.estimate_contrast(moving) == pytest.approx(1.0, abs=0.06)


def test_contrast_from_some_of_the_particles(closed, particles):
    model = make(closed, modes=None)
    assert model.estimate_contrast(particles, n=10) == pytest.approx(1.0, rel=1e-3)
    assert model.estimate_contrast(particles[:1]) == pytest.approx(1.0, rel=1e-3)


def test_protein_dark_images_are_noticed(closed, particles):
    model = make(closed, modes=None)
    with pytest.raises(ValueError, match=r"expected protein-bright images.*invert=True"):
        model.estimate_contrast(scaled(particles, -1.0))
    assert float(model.contrast) == 1.0


def test_images_that_are_not_numbers(closed, particles):
    images = particles.read_images()
    images[3, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="(?i)nan"):
        make(closed, modes=None).estimate_contrast(replace(scaled(particles, 1.0), images=images))
