"""The linearised likelihood, against forward-mode derivatives of the image; the brightness."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import jacfwd

import cryochains.inference.likelihood
import cryochains.model.microscope
from cryochains.images import (
    CTF,
    ParticleStack,
    filter_images,
    gaussian_transfer,
    pixel_grid,
    project,
    random_rotations,
)
from cryochains.inference import measure_contrast, normal_equations, position_variance
from cryochains.inference.likelihood import MAX_ATOM_SIGMA, frequency_band, map_blocks
from cryochains.model import Model, simulate_particles
from cryochains.molecule import load_structure, morph

BOX, PIXEL, N = 36, 4.0, 3
# Of the images over the model's.
CONTRAST = 1.7
BODIES = {"A": "chain A and resnum 20 to 45", "B": "chain B and resnum 60 to 80"}


@pytest.fixture(scope="module")
def model():
    # Atoms wide enough that nothing is left at the Nyquist frequency, where an image and its
    # transform differ.
    structure = load_structure("glua3-closed", bodies=BODIES)
    return Model(structure, box_size=BOX, pixel_size=PIXEL, sigma=6.5, modes=(3, 2))


@pytest.fixture(scope="module")
def latents(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, model.dynamics.n_latents, generator=generator, dtype=torch.float64)


def make_pose(shifts=True, ctf=True):
    one = torch.ones(N, dtype=torch.float64)
    angle = torch.tensor([0.3, 1.1, -0.5], dtype=torch.float64)
    optics = CTF(1.6e4 * one, 1.5e4 * one, angle, 0 * one, 300 * one, 2.7 * one, 0.1 * one)
    return (
        random_rotations(N, 1).double(),
        torch.tensor([[2.0, -3.0], [0.0, 1.0], [5.0, 4.0]], dtype=torch.float64)
        if shifts
        else None,
        optics.evaluate(BOX, PIXEL).double() if ctf else None,
    )


def plain_project(coords, weights, box_size, pixel_size, sigma):
    """The projection as one formula, which every kind of derivative passes through."""
    grid = pixel_grid(box_size, pixel_size, coords)
    gx, gy = (
        torch.exp(-((grid - coords[..., axis].unsqueeze(-1)) ** 2) / (2 * sigma**2))
        for axis in (0, 1)
    )
    return torch.einsum("n,bny,bnx->byx", weights.to(coords.dtype), gy, gx) / (
        2 * math.pi * sigma**2
    )


def seen(images, blur):
    """What is compared: blurred, without each image's mean."""
    images = filter_images(images, gaussian_transfer(BOX, PIXEL, blur).double()) if blur else images
    return images - images.mean(dim=(-2, -1), keepdim=True)


def data(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return 1e-2 * torch.randn(N, BOX, BOX, generator=generator, dtype=torch.float64)


def render(model, latents, pose):
    """Images as bright as the particles."""
    return CONTRAST * model.render(latents, *pose)


def linearise(model, images, pose, latents, **settings):
    return normal_equations(model, images, pose, latents, **{"contrast": CONTRAST} | settings)


def independent_pixels(model, blur=0.0) -> float:
    return frequency_band(model.microscope, blur).n_pixels


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("ctf", [True, False])
@pytest.mark.parametrize("blur", [0.0, 6.0])
def test_normal_equations_are_those_of_forward_mode_derivatives(
    model, latents, monkeypatch, shifts, ctf, blur
):
    pose = make_pose(shifts, ctf)
    images = render(model, latents, pose).detach() + data()
    equations = linearise(model, images, pose, latents, blur=blur)

    monkeypatch.setattr(cryochains.model.microscope, "project", plain_project)
    for row in range(N):
        of_row = [None if part is None else part[row : row + 1] for part in pose]

        def image(z, of_row=of_row):
            return seen(render(model, z[None], of_row)[0], blur).flatten()

        j = jacfwd(image)(latents[row]).detach()
        f, y = image(latents[row]).detach(), seen(images[row], blur).flatten()
        expected = {
            "hessian": j.T @ j,
            "gradient": j.T @ (y - f),
            "residual": (y - f) @ (y - f),
            "overlap": y @ f,
            "power": f @ f,
        }
        for name, value in expected.items():
            difference = (getattr(equations, name)[row] - value).abs().max()
            assert difference / value.abs().max() < 2e-5, (name, float(difference))


def test_float32_is_close_to_float64(model, latents):
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    exact = linearise(model, images, pose, latents)
    single_pose = tuple(part.float() for part in pose)
    single = linearise(model, images.float(), single_pose, latents.float())
    for name in ("hessian", "gradient", "residual", "overlap", "power"):
        value, expected = getattr(single, name), getattr(exact, name)
        assert value.dtype == torch.float32
        assert (value - expected).abs().max() / expected.abs().max() < 1e-4, name


def test_gradient_is_that_of_the_squared_error(model, latents):
    """Half of ‖y − f‖², by finite differences: its derivative is −g."""
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    equations = linearise(model, images, pose, latents)
    step = 1e-4
    for k in (0, 4, 9, latents.shape[1] - 1):
        ahead, behind = latents.clone(), latents.clone()
        ahead[:, k] += step
        behind[:, k] -= step
        difference = (
            linearise(model, images, pose, ahead).residual
            - linearise(model, images, pose, behind).residual
        )
        torch.testing.assert_close(
            equations.gradient[:, k], -difference / (4 * step), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("blur", [0.0, 5.0])
def test_without_images_only_the_information_is_left(model, latents, blur):
    pose = make_pose()
    without = linearise(model, None, pose, latents, blur=blur)
    with_images = linearise(model, data(), pose, latents, blur=blur)
    assert without.gradient.abs().max() == 0 and without.residual.abs().max() == 0
    torch.testing.assert_close(without.overlap, without.power)
    torch.testing.assert_close(without.hessian, with_images.hessian)


def test_only_shifts_along_the_line_of_sight_are_hidden(model, latents):
    pose = make_pose()
    hessian = linearise(model, None, pose, latents).hessian
    torch.testing.assert_close(hessian, hessian.mT)
    values = torch.linalg.eigvalsh(hessian)
    assert (values[:, :2] < 1e-9 * values[:, -1:]).all(), "one for each chain"
    assert (values[:, 2:] > 1e-4 * values[:, -1:]).all()
    for layout in model.dynamics.chains:
        hidden = torch.zeros_like(latents)
        hidden[:, layout.translation] = pose[0][:, 2]
        assert (hessian @ hidden.unsqueeze(-1)).abs().max() < 1e-7 * values.max()


def test_blur_takes_information_away(model, latents):
    pose = make_pose(ctf=False)
    information = [
        linearise(model, None, pose, latents, blur=blur).hessian.diagonal(dim1=1, dim2=2).sum()
        for blur in (0.0, 2.0, 4.0, 8.0)
    ]
    pairs = zip(information[:-1], information[1:], strict=True)
    assert all(more > less for more, less in pairs)


def test_a_background_changes_nothing(model, latents):
    pose = make_pose()
    plain, raised = (linearise(model, data() + level, pose, latents) for level in (0.0, 5.0))
    for name in ("gradient", "residual", "overlap"):
        torch.testing.assert_close(
            getattr(plain, name), getattr(raised, name), rtol=1e-6, atol=1e-9
        )


def test_contrast_scales_the_model_and_not_the_data(model, latents):
    pose = make_pose()
    before = linearise(model, data(), pose, latents)
    after = linearise(model, data(), pose, latents, contrast=2 * CONTRAST)
    torch.testing.assert_close(after.hessian, 4 * before.hessian)
    torch.testing.assert_close(after.power, 4 * before.power)
    torch.testing.assert_close(after.overlap, 2 * before.overlap)


def test_blocks_of_particles_change_nothing(model, latents, monkeypatch):
    pose = make_pose()
    variance = torch.rand(N, model.structure.n_atoms, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"variance": variance.double()}):
        whole = linearise(model, data(), pose, latents, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(cryochains.inference.likelihood, "BLOCK_BYTES", {"cpu": 1})
            parts = linearise(model, data(), pose, latents, **settings)
        for name in ("hessian", "gradient", "residual", "overlap", "power"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(model, latents, monkeypatch, threads):
    """And what threads do carries no gradients, and leaves their number as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parameter = torch.ones(3, requires_grad=True)
        parts = map_blocks(lambda row: 2 * parameter[row], [0, 1, 2], torch.device("cpu"))
        assert torch.stack(parts).tolist() == [2, 2, 2]
        assert not any(part.requires_grad for part in parts)
        monkeypatch.setattr(cryochains.inference.likelihood, "BLOCK_BYTES", {"cpu": 1})
        threaded = linearise(model, data(), make_pose(), latents)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    monkeypatch.undo()
    torch.testing.assert_close(
        threaded.hessian, linearise(model, data(), make_pose(), latents).hessian
    )


def test_full_steps_find_a_noise_free_image(model, latents):
    """Gauss–Newton from nearby, whatever the pose and CTF."""
    pose = make_pose()
    images = render(model, latents, pose).detach()
    generator = torch.Generator().manual_seed(5)
    z = latents + 0.2 * torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    residuals = []
    for _ in range(6):
        equations = linearise(model, images, pose, z)
        residuals.append(float((equations.residual / equations.power).max()))
        inverse = torch.linalg.pinv(equations.hessian, rtol=1e-6, hermitian=True)
        z = z + (inverse @ equations.gradient.unsqueeze(-1)).squeeze(-1)
    assert residuals[0] > 1e-4 and residuals[-1] < 1e-9, residuals


@pytest.mark.parametrize("blur", [0.0, 4.0, 10.0])
def test_independent_pixels_turn_squares_into_a_variance(model, latents, blur):
    """White noise, filtered and squared: on average its variance times this number."""
    noise_std = 3.0
    noise = noise_std * torch.randn(400, BOX, BOX, generator=torch.Generator().manual_seed(0))
    seen_noise = seen(noise.double(), blur)
    measured = float(seen_noise.square().sum((1, 2)).mean()) / independent_pixels(model, blur)
    assert math.sqrt(measured) == pytest.approx(noise_std, rel=0.01)
    pose = tuple(part[:1].float().expand(400, *part.shape[1:]) for part in make_pose())
    z = latents[:1].float().expand(400, -1)
    images = render(model, z, pose).detach() + noise
    residual = float(linearise(model, images, pose, z, blur=blur).residual.mean())
    n_pixels = independent_pixels(model, blur)
    assert np.sqrt(residual / n_pixels) == pytest.approx(noise_std, rel=0.01)
    if not blur:
        assert independent_pixels(model) == BOX**2 - 1


def test_position_variance_is_that_of_decoded_samples(model, latents):
    """Uncertain latents spread every atom on the image so, averaged over the two axes."""
    generator = torch.Generator().manual_seed(5)
    p, rotations = model.dynamics.n_latents, make_pose()[0]
    root = 0.1 * torch.randn(N, p, p, generator=generator, dtype=torch.float64) / p**0.5
    covariance = root @ root.transpose(1, 2)
    variance = position_variance(model.dynamics, latents, rotations, covariance)
    draws = torch.randn(4000, p, generator=generator, dtype=torch.float64)
    for row in range(N):
        coords = model.decode(latents[row] + draws @ root[row].T)
        seen_at = coords @ rotations[row, :2].T
        expected = seen_at.var(0).mean(-1)
        torch.testing.assert_close(variance[row], expected, rtol=0.12, atol=1e-6)
    far = position_variance(model.dynamics, latents, rotations, 1e6 * covariance)
    assert far.max() == MAX_ATOM_SIGMA**2


def test_an_uncertain_atom_is_drawn_as_its_expected_image(model, latents):
    """Wide atoms are the mean over images whose atoms are displaced at random."""
    pose = make_pose(shifts=False, ctf=False)
    variance = torch.full((N, model.structure.n_atoms), 2.0, dtype=torch.float64)
    images = torch.zeros(N, BOX, BOX, dtype=torch.float64)
    wide = linearise(model, images, pose, latents, variance=variance)
    microscope = model.microscope
    sigma = (microscope.width**2 + 2.0) ** 0.5
    xy = microscope.image_positions(model.decode(latents), pose[0])
    expected = CONTRAST * project(xy, microscope.weight_tensor, BOX, PIXEL, sigma)
    expected = expected - expected.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(wide.power, expected.square().sum((1, 2)), rtol=1e-5, atol=0)
    assert (wide.power < linearise(model, images, pose, latents).power).all()


# Brightness


@pytest.fixture(scope="module")
def particles(closed):
    # Without noise: what is measured from them is exact.
    return simulate_particles(
        closed,
        60,
        conformations=closed.coords[None],
        box_size=32,
        pixel_size=5.0,
        snr_db=np.inf,
        shift_std=2.0,
        progress=False,
    )


@pytest.fixture(scope="module")
def rigid(closed, particles):
    return Model(closed, particles, modes=None)


def scaled(particles, factor, offset=0.0) -> ParticleStack:
    return replace(particles, images=factor * particles.read_images() + offset, truth=None)


@pytest.mark.parametrize("factor", [1.0, 0.02, 350.0])
def test_contrast_is_measured(rigid, particles, factor):
    # A constant background is no brightness of the molecule.
    bright = scaled(particles, factor, 3 * factor)
    assert measure_contrast(rigid, bright) == pytest.approx(factor, rel=1e-3)


def test_motion_does_not_dim_the_images(pair):
    closed, opened = pair
    path = morph(closed, opened, 10)
    moving = simulate_particles(
        closed, 200, conformations=path, box_size=48, snr_db=0.0, seed=0, progress=False
    )
    model = Model(closed, moving, modes=None)
    assert measure_contrast(model, moving) == pytest.approx(1.0, abs=0.06)


def test_contrast_from_some_of_the_particles(rigid, particles):
    assert measure_contrast(rigid, particles, n=10) == pytest.approx(1.0, rel=1e-3)
    assert measure_contrast(rigid, particles[:1]) == pytest.approx(1.0, rel=1e-3)


def test_protein_dark_images_are_noticed(rigid, particles):
    with pytest.raises(ValueError, match=r"expected protein-bright images.*invert=True"):
        measure_contrast(rigid, scaled(particles, -1.0))


def test_images_that_are_not_numbers(rigid, particles):
    images = particles.read_images()
    images[3, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="(?i)nan"):
        measure_contrast(rigid, replace(particles, images=images))
