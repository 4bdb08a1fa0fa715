"""The CTF: RELION's formula written out, astigmatism and rows."""

import math

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
