"""The CTF: RELION's formula written out, astigmatism and rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains.images import CTF

SEVEN = (
    "defocus_u",
    "defocus_v",
    "defocus_angle",
    "phase_shift",
    "voltage_kv",
    "spherical_aberration_mm",
    "amplitude_contrast",
)


def make_ctf(n: int, seed: int = 0) -> CTF:
    """Astigmatic; phase shifts, voltages and amplitudes differ; the last has U < V."""
    rng = np.random.default_rng(seed)
    u = rng.uniform(8e3, 25e3, n)
    v = u - rng.uniform(0, 2e3, n)
    u[-1], v[-1] = v[-1], u[-1]
    values = {
        "defocus_u": u,
        "defocus_v": v,
        "defocus_angle": rng.uniform(-np.pi, np.pi, n),
        "phase_shift": rng.uniform(0, 2.0, n) * (np.arange(n) % 2),
        "voltage_kv": rng.choice([200.0, 300.0], n),
        "spherical_aberration_mm": rng.choice([0.01, 2.7], n),
        "amplitude_contrast": rng.choice([0.07, 0.1], n),
    }
    return CTF(**{name: torch.from_numpy(value) for name, value in values.items()})


def relion_ctf(ctf: CTF, row: int, box: int, pixel: float) -> np.ndarray:
    """RELION's formula (ctf.cpp, CTF::getGamma and CTF::getCTF), written out."""
    p = {name: float(getattr(ctf, name)[row]) for name in SEVEN}
    volts, cs = 1e3 * p["voltage_kv"], 1e7 * p["spherical_aberration_mm"]
    wavelength = 12.2643247 / math.sqrt(volts * (1 + volts * 0.978466e-6))
    c, s = math.cos(p["defocus_angle"]), math.sin(p["defocus_angle"])
    q = np.array([[c, s], [-s, c]])
    a = q.T @ np.diag([-p["defocus_u"], -p["defocus_v"]]) @ q
    fy, fx = np.meshgrid(np.fft.fftfreq(box, pixel), np.fft.rfftfreq(box, pixel), indexing="ij")
    u2 = fx**2 + fy**2
    gamma = math.pi * wavelength * (a[0, 0] * fx**2 + 2 * a[0, 1] * fx * fy + a[1, 1] * fy**2)
    gamma += math.pi / 2 * cs * wavelength**3 * u2**2
    q0 = p["amplitude_contrast"]
    gamma -= p["phase_shift"] + math.atan(q0 / math.sqrt(1 - q0**2))
    return -np.sin(gamma)


@pytest.mark.parametrize("box, pixel", [(64, 2.0), (32, 3.7), (128, 1.5)])
def test_ctf_is_relions(box, pixel):
    ctf = make_ctf(6)
    result = ctf.evaluate(box, pixel)
    assert result.shape == (6, box, box // 2 + 1) and result.dtype == torch.float32
    for row in range(len(ctf)):
        expected = relion_ctf(ctf, row, box, pixel)
        # The constants in the electron's wavelength differ: 5e-6 of hundreds of radians.
        np.testing.assert_allclose(result[row], expected, atol=2e-3)


def test_swapped_defoci_with_the_angle_turned_are_the_same_ctf():
    ctf = make_ctf(3)
    fields = {name: getattr(ctf, name) for name in SEVEN}
    swapped = fields | {
        "defocus_u": ctf.defocus_v,
        "defocus_v": ctf.defocus_u,
        "defocus_angle": ctf.defocus_angle + math.pi / 2,
    }
    torch.testing.assert_close(
        CTF(**swapped).evaluate(64, 2.0), ctf.evaluate(64, 2.0), rtol=0, atol=1e-3
    )


def test_ctf_is_bright_at_low_frequency():
    result = make_ctf(5).evaluate(64, 2.0)
    assert (result[:, 0, 0] > 0.05).all()


def test_rows_of_ctfs():
    ctf = make_ctf(6)
    assert len(ctf) == 6 and len(ctf[2]) == 1 and len(ctf[1:4]) == 3
    assert len(ctf[torch.tensor([True, False, True, False, False, True])]) == 3
    torch.testing.assert_close(ctf[[4, 1]].evaluate(16, 4.0), ctf.evaluate(16, 4.0)[[4, 1]])


def test_values_are_the_fields_in_their_order():
    ctf = make_ctf(3)
    values = list(ctf.values())
    assert len(values) == 7
    assert values[0] is ctf.defocus_u and values[-1] is ctf.amplitude_contrast


def test_repr_is_short():
    one = torch.ones(3, dtype=torch.float64)
    defocus = torch.tensor([10_000.0, 25_000.0, 17_000.0], dtype=torch.float64)
    ctf = CTF(defocus, defocus, 0 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one)
    assert repr(ctf) == "CTF(3 particles, defocus 1.0–2.5 µm)"
    assert repr(ctf[[0, 0]]) == "CTF(2 particles, defocus 1.0 µm)"
    assert repr(ctf[[]]) == "CTF(0 particles)"


# B-factor, scale, symmetric aberrations


def with_more(ctf: CTF, **more) -> CTF:
    return replace(ctf, **{name: torch.as_tensor(value).double() for name, value in more.items()})


def test_neutral_values_change_nothing():
    """Two ways to the same numbers: torch-ctf in float32, and RELION's formula in float64."""
    ctf = make_ctf(4)
    more = {"even_zernikes": torch.zeros(4, 9), "b_factor": torch.zeros(4), "scale": torch.ones(4)}
    plain = ctf.evaluate(64, 2.0)
    torch.testing.assert_close(with_more(ctf, **more).evaluate(64, 2.0), plain, atol=2e-3, rtol=0)
    for name, value in more.items():
        other = with_more(ctf, **{name: value})
        torch.testing.assert_close(other.evaluate(64, 2.0), plain, atol=2e-3, rtol=0)
        assert len(list(other.values())) == 8 and len(other[1:3]) == 2
        assert getattr(other[1], name).shape[0] == 1


def test_b_factor_and_scale_damp():
    ctf = make_ctf(2)
    damped = with_more(ctf, b_factor=[80.0, 0.0], scale=[1.0, 0.7]).evaluate(32, 2.0)
    x, y = np.fft.rfftfreq(32, 2.0)[None, :], np.fft.fftfreq(32, 2.0)[:, None]
    factors = np.stack([np.exp(-20 * (x**2 + y**2)), np.full((32, 17), 0.7)])
    np.testing.assert_allclose(damped, ctf.evaluate(32, 2.0).numpy() * factors, atol=1e-5)


def test_even_zernikes_of_degree_two_and_four_are_defocus_and_spherical_aberration():
    """Z 2,0 = 2 r² − 1 and Z 4,0 = 6 r⁴ − 6 r² + 1; those of number 1 and 3 are astigmatism."""
    ctf = make_ctf(1)
    volts = 1e3 * float(ctf.voltage_kv)
    wavelength = 12.2643247 / math.sqrt(volts * (1 + volts * 0.978466e-6))
    # 500 Å less of defocus add π λ 500 k² to the phase.
    c = math.pi * wavelength * 500 / 2
    coefficients = torch.zeros(1, 4)
    coefficients[0, 0], coefficients[0, 2] = c, c
    changed = with_more(ctf, even_zernikes=coefficients)
    less = replace(ctf, defocus_u=ctf.defocus_u - 500, defocus_v=ctf.defocus_v - 500)
    torch.testing.assert_close(changed.evaluate(64, 2.0), less.evaluate(64, 2.0), atol=2e-3, rtol=0)
    # 0.1 mm more of spherical aberration add π/2 λ³ 1e6 k⁴.
    c = math.pi / 2 * wavelength**3 * 1e6 / 6
    coefficients = torch.zeros(1, 7)
    coefficients[0, 6], coefficients[0, 2], coefficients[0, 0] = c, 3 * c, 2 * c
    changed = with_more(ctf, even_zernikes=coefficients)
    more = replace(ctf, spherical_aberration_mm=ctf.spherical_aberration_mm + 0.1)
    torch.testing.assert_close(changed.evaluate(64, 2.0), more.evaluate(64, 2.0), atol=2e-3, rtol=0)


def test_astigmatism_as_a_zernike():
    """Number 3 is r² cos 2φ: u larger and v smaller along x."""
    one = torch.ones(1, dtype=torch.float64)
    ctf = CTF(15e3 * one, 15e3 * one, 0 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one)
    astigmatic = replace(ctf, defocus_u=ctf.defocus_u + 400, defocus_v=ctf.defocus_v - 400)
    wavelength = 12.2643247 / math.sqrt(3e5 * (1 + 3e5 * 0.978466e-6))
    for number, turned in ((3, 0.0), (1, math.pi / 4)):
        coefficients = torch.zeros(1, 4)
        coefficients[0, number] = -math.pi * wavelength * 400
        changed = with_more(ctf, even_zernikes=coefficients).evaluate(64, 2.0)
        expected = replace(astigmatic, defocus_angle=ctf.defocus_angle + turned).evaluate(64, 2.0)
        torch.testing.assert_close(changed, expected, atol=2e-3, rtol=0)
