"""The linearised likelihood, against forward-mode derivatives of the image."""

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
    filter_images,
    gaussian_transfer,
    pixel_grid,
    project,
    random_rotations,
)
from cryochains.inference import NormalEquations, normal_equations, position_variance
from cryochains.inference.likelihood import (
    MAX_ATOM_SIGMA,
    crop_spectrum,
    frequency_band,
    information_of,
    map_blocks,
    real_parts,
)
from cryochains.model import Model, Population
from cryochains.molecule import load_structure

BOX, PIXEL, N = 36, 4.0, 3
N_RINGS = BOX // 2 + 1
# Of each image over the model's.
SCALE = torch.tensor([0.6, 1.7, 2.3], dtype=torch.float64)
BODIES = {"A": "chain A and resnum 20 to 45", "B": "chain B and resnum 60 to 80"}


@pytest.fixture(scope="module", params=[6.5, None], ids=["atoms", "beads"])
def model(request):
    """Of atoms wide enough that nothing is left at the Nyquist frequency, and as by default.

    Beads are narrower than these pixels represent.
    """
    structure = load_structure("glua3-closed", bodies=BODIES)
    return Model(structure, box_size=BOX, pixel_size=PIXEL, sigma=request.param, modes=(3, 2))


@pytest.fixture(scope="module")
def latents(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, model.dynamics.n_latents, generator=generator, dtype=torch.float64)


def make_pose(shifts=True, ctf=True, astigmatism=1e3):
    one = torch.ones(N, dtype=torch.float64)
    angle = torch.tensor([0.3, 1.1, -0.5], dtype=torch.float64)
    v = (1.6e4 - astigmatism) * one
    optics = CTF(1.6e4 * one, v, angle, 0 * one, 300 * one, 2.7 * one, 0.1 * one)
    return (
        random_rotations(N, 1).double(),
        torch.tensor([[2.0, -3.0], [0.0, 1.0], [5.0, 4.0]], dtype=torch.float64)
        if shifts
        else None,
        optics.evaluate(BOX, PIXEL).double() if ctf else None,
    )


def plain_project(coords, weights, box_size, pixel_size, sigma):
    """The projection as one formula, which every kind of derivative passes through.

    `sigma` is one number, or one of each Gaussian of each image.
    """
    grid = pixel_grid(box_size, pixel_size, coords)
    sigma = torch.as_tensor(sigma, dtype=coords.dtype).expand(coords.shape[:2])
    gx, gy = (
        torch.exp(-((grid - coords[..., axis].unsqueeze(-1)) ** 2) / (2 * sigma.unsqueeze(-1) ** 2))
        for axis in (0, 1)
    )
    amplitudes = weights.to(coords.dtype) / (2 * math.pi * sigma**2)
    return torch.einsum("bn,bny,bnx->byx", amplitudes, gy, gx)


def seen(images, blur):
    """What is compared: blurred, without each image's mean."""
    images = filter_images(images, gaussian_transfer(BOX, PIXEL, blur).double()) if blur else images
    return images - images.mean(dim=(-2, -1), keepdim=True)


def draw(model, latents, pose, blur):
    """Images as they are compared, in plain operations.

    Of beads that pixels cannot represent, blurred ones are drawn and not drawn ones blurred.
    """
    if model.sigma is not None:
        return seen(model.render(latents, *pose), blur)
    coords = model.bead_dynamics.decode(latents)
    return seen(model.microscope.render(coords, *pose, blur=blur), 0.0)


def data(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return 1e-2 * torch.randn(N, BOX, BOX, generator=generator, dtype=torch.float64)


def render(model, latents, pose):
    """Images as bright as the particles."""
    return SCALE[:, None, None] * model.render(latents, *pose)


def totals(equations: NormalEquations, scale=SCALE) -> dict[str, torch.Tensor]:
    """All that equations say of images at a brightness, summed over rings."""
    return {
        "hessian": equations.hessian,
        "gradient": equations.gradient(scale),
        "residual": equations.residual(scale),
        "data": equations.data_power.sum(1),
        "overlap": equations.overlap.sum(1),
        "power": equations.model_power.sum(1),
    }


def ring_of_frequencies() -> np.ndarray:
    """(box, box) of a full transform; one Fourier pixel wide, the corners on the last."""
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    radius = np.hypot(frequency[:, None], frequency[None])
    return np.minimum(np.rint(radius).astype(int), N_RINGS - 1)


def coloured(kind: str) -> torch.Tensor | None:
    """Noise spectra: none, white, one of all particles, or one a particle."""
    generator = torch.Generator().manual_seed(7)
    shape = {"none": None, "white": None, "shared": (N_RINGS,), "own": (N, N_RINGS)}[kind]
    if shape is not None:
        return 1.0 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return None if kind == "none" else torch.ones(N_RINGS, dtype=torch.float64)


def whitened(images, spectrum):
    """(box, box) images divided by the noise's amplitude in Fourier space."""
    if spectrum is None:
        return images
    amplitude = spectrum.sqrt()[torch.from_numpy(ring_of_frequencies())]
    return torch.fft.ifft2(torch.fft.fft2(images) / amplitude).real


def independent_pixels(model, blur=0.0) -> float:
    return frequency_band(model.microscope, blur).n_pixels


def assert_derivatives(model, monkeypatch, equations, images, pose, latents, spectrum, blur):
    """Equations are those of forward-mode derivatives of a·f, at each particle's brightness a."""
    monkeypatch.setattr(cryochains.model.microscope, "project", plain_project)
    for row, a in enumerate(SCALE):
        of_row = [None if part is None else part[row : row + 1] for part in pose]
        of_noise = spectrum[row] if spectrum is not None and spectrum.ndim == 2 else spectrum

        def image(z, of_row=of_row, a=a, of_noise=of_noise):
            drawn = a * draw(model, z[None], of_row, blur)[0]
            return whitened(drawn, of_noise).flatten()

        j = jacfwd(image)(latents[row]).detach()
        f = image(latents[row]).detach()
        y = whitened(seen(images[row], blur), of_noise).flatten()
        expected = {
            "hessian": j.T @ j / a**2,
            "gradient": j.T @ (y - f),
            "residual": (y - f) @ (y - f),
            "data": y @ y,
            "overlap": y @ f / a,
            "power": f @ f / a**2,
        }
        got = totals(equations)
        for name, value in expected.items():
            difference = (got[name][row] - value).abs().max()
            assert difference / value.abs().max() < 2e-5, (name, float(difference))


def pose_of(model, shifts=True, ctf=True):
    # Beads leave something at the Nyquist frequency, where an image and its transform are the same
    # for round CTFs only.
    return make_pose(shifts, ctf, 1e3 if model.sigma is not None else 0.0)


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("ctf", [True, False])
@pytest.mark.parametrize("blur", [0.0, 6.0])
def test_normal_equations_are_those_of_forward_mode_derivatives(
    model, latents, monkeypatch, shifts, ctf, blur
):
    pose = pose_of(model, shifts, ctf)
    images = render(model, latents, pose).detach() + data()
    equations = normal_equations(model, images, pose, latents, blur=blur)
    assert_derivatives(model, monkeypatch, equations, images, pose, latents, None, blur)


# Noise that is not white


@pytest.mark.parametrize("kind", ["shared", "own"])
@pytest.mark.parametrize("blur", [0.0, 6.0])
def test_coloured_noise_is_divided_by_its_amplitude(model, latents, monkeypatch, kind, blur):
    """The same as images and model that were whitened in Fourier space."""
    pose, spectrum = pose_of(model), coloured(kind)
    images = render(model, latents, pose).detach() + data()
    settings = {"noise_spectrum": spectrum, "blur": blur}
    equations = normal_equations(model, images, pose, latents, **settings)
    assert_derivatives(model, monkeypatch, equations, images, pose, latents, spectrum, blur)


@pytest.mark.parametrize("blur", [0.0, 6.0])
def test_a_white_spectrum_is_none(model, latents, blur):
    pose = make_pose()
    plain, white, of_each = (
        normal_equations(model, data(), pose, latents, noise_spectrum=spectrum, blur=blur)
        for spectrum in (None, coloured("white"), coloured("white").expand(N, -1))
    )
    for name in plain.known():
        assert torch.equal(getattr(plain, name), getattr(white, name)), name
        assert torch.equal(getattr(plain, name), getattr(of_each, name)), name


def test_twice_the_spectrum_is_half_the_power(model, latents):
    pose, spectrum = make_pose(), coloured("shared")
    once, twice = (
        normal_equations(model, data(), pose, latents, noise_spectrum=factor * spectrum)
        for factor in (1, 2)
    )
    for name in once.known():
        torch.testing.assert_close(getattr(once, name), 2 * getattr(twice, name))


# Rings of frequencies


def rings_of(images, others) -> torch.Tensor:
    """(N, R) sums of products over rings of a full transform."""
    transforms = [np.fft.fft2(seen(part, 0.0).numpy(), norm="ortho") for part in (images, others)]
    products = (transforms[0] * transforms[1].conj()).real
    ring = ring_of_frequencies()
    sums = [products[:, ring == r].sum(1) for r in range(N_RINGS)]
    return torch.from_numpy(np.stack(sums, 1))


def test_powers_are_those_of_rings(model, latents):
    pose = pose_of(model)
    drawn = model.render(latents, *pose).detach()
    equations = normal_equations(model, data(), pose, latents)
    for name, expected in (
        ("data_power", rings_of(data(), data())),
        ("overlap", rings_of(data(), drawn)),
        ("model_power", rings_of(drawn, drawn)),
    ):
        rings = getattr(equations, name)
        torch.testing.assert_close(rings, expected, rtol=1e-5, atol=1e-7 * expected.abs().max())
    band = frequency_band(model.microscope)
    counts = np.bincount(ring_of_frequencies().flatten())
    counts[0] = 0
    np.testing.assert_allclose(band.ring_pixels, counts, rtol=1e-6)
    assert float(band.ring_pixels.sum()) == band.n_pixels


@pytest.mark.parametrize("blur", [0.0, 4.0, 10.0])
def test_rings_of_white_noise_have_its_variance(model, blur):
    """Each of them: on average its variance times the ring's pixels."""
    band = frequency_band(model.microscope, blur)
    noise = torch.randn(4000, BOX, BOX, generator=torch.Generator().manual_seed(0))
    transforms = crop_spectrum(torch.fft.rfft2(noise, norm="ortho"), band.box_size)
    power = band.sum_rings(real_parts(transforms * band.weights * band.low_pass).square()).double()
    pixels = band.ring_pixels
    kept = pixels > 0.01 * frequency_band(model.microscope).ring_pixels
    measured = (power.mean(0) / pixels)[kept]
    assert kept.any() and float((measured - 1).abs().max()) < 0.05
    # And all of them together tell a variance as exactly as so many independent pixels do.
    total = power.sum(1) / band.n_pixels
    assert 2 / float(total.var()) == pytest.approx(band.n_independent, rel=0.15)
    if not blur:
        assert band.n_independent == pytest.approx(BOX**2 - 1, rel=1e-3)


def misfit_rings(equations, scale) -> torch.Tensor:
    a = scale[:, None]
    return equations.data_power - 2 * a * equations.overlap + a**2 * equations.model_power


@pytest.mark.parametrize("blur", [0.0, 6.0])
@pytest.mark.parametrize("kind", ["none", "own"])
def test_sampled_power_without_a_step_is_the_residual(model, latents, kind, blur):
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    equations = normal_equations(
        model,
        images,
        pose,
        latents,
        noise_spectrum=coloured(kind),
        blur=blur,
        sampler=lambda rows, _: (torch.zeros_like(latents[rows]), SCALE[rows]),
    )
    expected = misfit_rings(equations, SCALE)
    torch.testing.assert_close(equations.sampled_power, expected, rtol=1e-6, atol=1e-10)
    total = equations.sampled_power.sum(1)
    torch.testing.assert_close(total, equations.residual(SCALE), rtol=1e-6, atol=0)


def test_sampled_power_is_that_of_linear_images(model, latents):
    """‖y − a (f + J δ)‖², which the equations of the same particles say too."""
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    step = 0.3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).double()
    given = []

    def sampler(rows, equations):
        given.append((rows, equations))
        return step[rows], SCALE[rows]

    equations = normal_equations(model, images, pose, latents, sampler=sampler)
    assert given[0][1].sampled_power is None
    a = SCALE[:, None]
    curvature = ((equations.hessian @ step.unsqueeze(-1)).squeeze(-1) * step).sum(1)
    expected = (
        equations.residual(SCALE)
        - 2 * (equations.gradient(SCALE) * step).sum(1)
        + SCALE**2 * curvature
    )
    torch.testing.assert_close(equations.sampled_power.sum(1), expected, rtol=1e-6, atol=0)
    # A small step: nearly the images there.
    near = normal_equations(
        model, images, pose, latents, sampler=lambda rows, _: (1e-3 * step[rows], SCALE[rows])
    )
    there = normal_equations(model, images, pose, latents + 1e-3 * step)
    torch.testing.assert_close(
        near.sampled_power, misfit_rings(there, a.squeeze(1)), rtol=1e-4, atol=1e-6
    )


def test_rows_of_equations(model, latents):
    equations = normal_equations(
        model,
        data(),
        make_pose(),
        latents,
        sampler=lambda rows, _: (latents[rows], SCALE[rows]),
    )
    assert len(equations.known()) == 7
    for rows in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])):
        some = equations[rows]
        assert some.known() == equations.known()
        for name in some.known():
            assert torch.equal(getattr(some, name), getattr(equations, name)[rows]), name
    without = normal_equations(model, data(), make_pose(), latents)[:2]
    assert without.sampled_power is None and len(without.hessian) == 2


# Brightness


def test_brightness_is_that_of_the_model_and_not_of_the_data(model, latents):
    """Images twice as bright fit at twice the brightness; a scale is a number or one a particle."""
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    once = normal_equations(model, images, pose, latents)
    twice = normal_equations(model, 2 * images, pose, latents)
    torch.testing.assert_close(once.hessian, twice.hessian)
    torch.testing.assert_close(4 * once.residual(SCALE), twice.residual(2 * SCALE))
    torch.testing.assert_close(4 * once.gradient(SCALE), twice.gradient(2 * SCALE))
    torch.testing.assert_close(once.gradient(1.7), once.gradient(torch.full((N,), 1.7)))
    torch.testing.assert_close(once.residual(1.7), once.residual(torch.full((N,), 1.7)))
    torch.testing.assert_close(once.residual(0.0), once.data_power.sum(1))
    assert once.gradient(0.0).abs().max() == 0


def test_what_could_be_brightness_says_less_of_latents(model, latents):
    """The information of latents and log brightness together, brightness taken out."""
    p = model.n_latents
    equations = normal_equations(model, None, make_pose(), latents)
    noise = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    mean, spread = torch.zeros(p), 0.3
    population = Population(mean, torch.eye(p), 1.0, 1.0, {}, contrast_spread=spread)
    got = information_of(equations, SCALE, noise, population)
    for row in range(N):
        joint = torch.zeros(p + 1, p + 1, dtype=torch.float64)
        joint[:p, :p] = equations.hessian[row]
        joint[:p, p] = joint[p, :p] = equations.model_slope[row]
        joint[p, p] = equations.model_power[row].sum()
        joint *= (SCALE[row] / noise[row]) ** 2
        joint[p, p] += 1 / spread**2
        # A prior in common makes what is hidden invertible.
        joint[:p, :p] += torch.eye(p)
        expected = torch.linalg.inv(torch.linalg.inv(joint)[:p, :p]) - torch.eye(p)
        torch.testing.assert_close(got[row], expected, rtol=1e-6, atol=1e-6 * expected.abs().max())
    known = replace(population, contrast_spread=1e-9)
    weight = ((SCALE / noise) ** 2)[:, None, None]
    torch.testing.assert_close(
        information_of(equations, SCALE, noise, known), weight * equations.hessian
    )


# What holds for all of them


def test_float32_is_close_to_float64(model, latents):
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    exact = normal_equations(model, images, pose, latents)
    single_pose = tuple(part.float() for part in pose)
    single = normal_equations(model, images.float(), single_pose, latents.float())
    of_exact = totals(exact)
    for name, value in totals(single).items():
        expected = of_exact[name]
        assert value.dtype == torch.float32
        assert (value - expected).abs().max() / expected.abs().max() < 1e-4, name


def test_gradient_is_that_of_the_squared_error(model, latents):
    """Half of ‖y − f‖², by finite differences: its derivative is −g."""
    pose = make_pose()
    images = render(model, latents, pose).detach() + data()
    equations = normal_equations(model, images, pose, latents)
    step = 1e-4
    for k in (0, 4, 9, latents.shape[1] - 1):
        ahead, behind = latents.clone(), latents.clone()
        ahead[:, k] += step
        behind[:, k] -= step
        difference = normal_equations(model, images, pose, ahead).residual(
            SCALE
        ) - normal_equations(model, images, pose, behind).residual(SCALE)
        torch.testing.assert_close(
            equations.gradient(SCALE)[:, k], -difference / (4 * step), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("blur", [0.0, 5.0])
def test_without_images_only_the_information_is_left(model, latents, blur):
    pose = make_pose()
    without = normal_equations(model, None, pose, latents, blur=blur)
    with_images = normal_equations(model, data(), pose, latents, blur=blur)
    assert without.gradient().abs().max() == 0 and without.residual().abs().max() == 0
    torch.testing.assert_close(without.overlap, without.model_power)
    torch.testing.assert_close(without.data_power, without.model_power)
    torch.testing.assert_close(without.model_power, with_images.model_power)
    torch.testing.assert_close(without.hessian, with_images.hessian)


def test_only_shifts_along_the_line_of_sight_are_hidden(model, latents):
    pose = make_pose()
    hessian = normal_equations(model, None, pose, latents).hessian
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
        normal_equations(model, None, pose, latents, blur=blur)
        .hessian.diagonal(dim1=1, dim2=2)
        .sum()
        for blur in (0.0, 2.0, 4.0, 8.0)
    ]
    pairs = zip(information[:-1], information[1:], strict=True)
    assert all(more > less for more, less in pairs)


def test_a_background_changes_nothing(model, latents):
    pose = make_pose()
    plain, raised = (normal_equations(model, data() + level, pose, latents) for level in (0.0, 5.0))
    of_raised = totals(raised)
    for name, value in totals(plain).items():
        torch.testing.assert_close(value, of_raised[name], rtol=1e-6, atol=1e-9)


def draw_steps(rows, equations):
    """A sampler that depends on the equations and on which particles they are of."""
    slope = equations.gradient(SCALE[rows])
    return 0.1 * slope / slope.norm(dim=1, keepdim=True), SCALE[rows]


def of_everything(model, seed=0) -> dict:
    """Settings that differ between particles."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "variance": torch.rand(N, len(model.beads), generator=generator).double(),
        "noise_spectrum": coloured("own"),
        "sampler": draw_steps,
    }


def test_blocks_of_particles_change_nothing(model, latents, monkeypatch):
    pose = make_pose()
    every = of_everything(model)
    for names in ((), ("variance",), ("noise_spectrum",), ("sampler",), tuple(every)):
        settings = {name: every[name] for name in names}
        whole = normal_equations(model, data(), pose, latents, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(cryochains.inference.likelihood, "BLOCK_BYTES", {"cpu": 1})
            parts = normal_equations(model, data(), pose, latents, **settings)
        assert parts.known() == whole.known()
        for name in whole.known():
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
        threaded = normal_equations(model, data(), make_pose(), latents, **of_everything(model))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    monkeypatch.undo()
    alone = normal_equations(model, data(), make_pose(), latents, **of_everything(model))
    for name in alone.known():
        torch.testing.assert_close(getattr(threaded, name), getattr(alone, name))


def test_full_steps_find_a_noise_free_image(model, latents):
    """Gauss–Newton from nearby, whatever the pose and CTF."""
    pose = pose_of(model)
    images = render(model, latents, pose).detach()
    generator = torch.Generator().manual_seed(5)
    z = latents + 0.2 * torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    residuals = []
    for _ in range(6):
        equations = normal_equations(model, images, pose, z)
        power = SCALE**2 * equations.model_power.sum(1)
        residuals.append(float((equations.residual(SCALE) / power).max()))
        hessian = SCALE[:, None, None] ** 2 * equations.hessian
        inverse = torch.linalg.pinv(hessian, rtol=1e-6, hermitian=True)
        z = z + (inverse @ equations.gradient(SCALE).unsqueeze(-1)).squeeze(-1)
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
    images = 1.7 * model.render(z, *pose).detach() + noise
    residual = float(normal_equations(model, images, pose, z, blur=blur).residual(1.7).mean())
    n_pixels = independent_pixels(model, blur)
    assert np.sqrt(residual / n_pixels) == pytest.approx(noise_std, rel=0.01)
    if not blur:
        # The weights are roots in single precision.
        assert independent_pixels(model) == pytest.approx(BOX**2 - 1, rel=1e-7)


def test_position_variance_is_that_of_decoded_samples(model, latents):
    """Uncertain latents spread every atom on the image so, averaged over the two axes."""
    generator = torch.Generator().manual_seed(5)
    p, rotations = model.dynamics.n_latents, make_pose()[0]
    root = 0.1 * torch.randn(N, p, p, generator=generator, dtype=torch.float64) / p**0.5
    covariance = root @ root.transpose(1, 2)
    dynamics = model.bead_dynamics
    variance = position_variance(dynamics, latents, rotations, covariance)
    draws = torch.randn(4000, p, generator=generator, dtype=torch.float64)
    for row in range(N):
        coords = dynamics.decode(latents[row] + draws @ root[row].T)
        seen_at = coords @ rotations[row, :2].T
        expected = seen_at.var(0).mean(-1)
        torch.testing.assert_close(variance[row], expected, rtol=0.12, atol=1e-6)
    far = position_variance(dynamics, latents, rotations, 1e6 * covariance)
    assert far.max() == MAX_ATOM_SIGMA**2


def test_an_uncertain_atom_is_drawn_as_its_expected_image(model, latents):
    """Wide atoms are the mean over images whose atoms are displaced at random."""
    pose = make_pose(shifts=False, ctf=False)
    variance = torch.full((N, len(model.beads)), 2.0, dtype=torch.float64)
    images = torch.zeros(N, BOX, BOX, dtype=torch.float64)
    wide = normal_equations(model, images, pose, latents, variance=variance)
    beads = model.beads
    # What pixels cannot represent is drawn wider, and sharpened.
    extra = max(0.0, (0.8 * PIXEL) ** 2 - beads.widths.min() ** 2)
    sigma = torch.from_numpy(np.sqrt(beads.widths**2 + 2.0 + extra)).expand(N, -1)
    xy = model.microscope.image_positions(model.bead_dynamics.decode(latents), pose[0])
    expected = project(xy, torch.from_numpy(beads.weights), BOX, PIXEL, sigma)
    frequency = torch.from_numpy(np.fft.fftfreq(BOX, PIXEL))
    squared = frequency[:, None] ** 2 + frequency[: BOX // 2 + 1] ** 2
    sharpening = torch.exp(2 * math.pi**2 * extra * squared.clamp(max=0.25 / PIXEL**2))
    expected = seen(filter_images(expected, sharpening), 0.0)
    power = wide.model_power.sum(1)
    torch.testing.assert_close(power, expected.square().sum((1, 2)), rtol=1e-5, atol=0)
    assert (power < normal_equations(model, images, pose, latents).model_power.sum(1)).all()
