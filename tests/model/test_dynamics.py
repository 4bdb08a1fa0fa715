"""Latents to coordinates: zero motion, units, derivatives, what each switch moves, the way back."""

import itertools
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import roma
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from cryochains.images import random_rotations
from cryochains.model import Dynamics, Microscope, rotvec_to_matrix
from cryochains.molecule import Beads, atom_beads, compute_modes, load_structure, residue_beads

BODIES = {"A": "chain A and resnum 20 to 45", "B": "chain B and resnum 60 to 80"}
SWITCHES = [s for s in itertools.product((True, False), repeat=3) if any(s)]


@pytest.fixture(scope="module")
def small():
    """Two pieces of the two chains, of different length: small enough for numeric derivatives."""
    return load_structure("glua3-closed", bodies=BODIES)


@pytest.fixture(scope="module")
def dynamics(small):
    return Dynamics(small, compute_modes(small, (3, 2)))


@pytest.fixture(scope="module")
def whole(closed):
    return Dynamics(closed, compute_modes(closed, 10))


def random_latents(dynamics, n, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, dynamics.n_latents, generator=generator, dtype=torch.float64)


def one_latent(dynamics, chain, kind, number=0, value=1.0):
    """(p,) latents of which one is not zero."""
    latents = torch.zeros(dynamics.n_latents, dtype=torch.float64)
    latents[getattr(dynamics.chains[chain], kind).start + number] = value
    return latents


# Zero motion and layout


@pytest.mark.parametrize("modes, rotation, translation", SWITCHES)
def test_zero_latents_return_the_reference(small, modes, rotation, translation):
    dynamics = Dynamics(small, compute_modes(small, 4) if modes else None, rotation, translation)
    coords = dynamics.decode(torch.zeros(2, dynamics.n_latents))
    assert coords.dtype == torch.float32
    np.testing.assert_allclose(coords, np.stack([small.coords] * 2), atol=1e-4)


@pytest.mark.parametrize("modes, rotation, translation", SWITCHES)
def test_layout_covers_every_latent_once(small, modes, rotation, translation):
    dynamics = Dynamics(
        small, compute_modes(small, (4, 0)) if modes else None, rotation, translation
    )
    assert dynamics.n_latents == 4 * modes + 6 * rotation + 6 * translation
    chains = np.full(dynamics.n_latents, -1)
    kinds = np.full(dynamics.n_latents, "", dtype=object)
    for chain, layout in enumerate(dynamics.chains):
        chains[layout.latents] = chain
        for kind in ("mode", "rotation", "translation"):
            kinds[getattr(layout, kind)] = kind
    assert chains.tolist() == dynamics.latent_chain.tolist()
    assert kinds.tolist() == dynamics.latent_kind.tolist()
    assert len(dynamics.scale) == dynamics.n_latents and (dynamics.scale > 0).all()


def test_leading_axes_are_free(dynamics):
    latents = random_latents(dynamics, 6)
    flat = dynamics.decode(latents)
    torch.testing.assert_close(dynamics.decode(latents.view(2, 3, -1)), flat.view(2, 3, -1, 3))
    torch.testing.assert_close(dynamics.decode(latents[4]), flat[4])
    assert dynamics.decode(latents[:0]).shape == (0, *flat.shape[1:])


def test_particles_do_not_see_each_other(dynamics):
    latents = random_latents(dynamics, 5)
    together = dynamics.decode(latents)
    for row in range(5):
        torch.testing.assert_close(dynamics.decode(latents[row : row + 1])[0], together[row])


def test_nothing_to_learn_and_nothing_changes(dynamics):
    assert not isinstance(dynamics, nn.Module)
    tensors = (dynamics.reference, dynamics.centers, dynamics.scale_tensor, *dynamics.mode_vectors)
    assert not any(tensor.requires_grad for tensor in tensors)
    with pytest.raises(FrozenInstanceError):
        dynamics.rotation = False
    assert dynamics.to("cpu") is dynamics


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.9e-3, 1.1e-3, 1.0, 3.1, 6.0])
def test_rotation_vectors_are_axis_and_angle(angle):
    """As an independent library has it, and small angles meet the closed form."""
    axes = torch.nn.functional.normalize(
        torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    expected = roma.rotvec_to_rotmat(angle * axes)
    torch.testing.assert_close(rotvec_to_matrix(angle * axes), expected, rtol=0, atol=1e-12)


# What moves


def test_paper_models_are_switches(closed):
    modes = compute_modes(closed, 5)
    counts = {
        "cN5": Dynamics(closed, modes, rotation=False, translation=False).n_latents,
        "cR": Dynamics(closed, None, translation=False).n_latents,
        "cRT": Dynamics(closed, None).n_latents,
        "cRTN5": Dynamics(closed, modes).n_latents,
    }
    assert counts == {"cN5": 10, "cR": 6, "cRT": 12, "cRTN5": 22}
    assembly = closed.as_one_body()
    n_assembly = Dynamics(assembly, compute_modes(assembly, 7), rotation=False, translation=False)
    assert n_assembly.n_latents == 7 and len(n_assembly.chains) == 1
    moved = n_assembly.decode(one_latent(n_assembly, 0, "mode")) - n_assembly.reference
    for chain in (0, 1):
        assert moved[closed.chain_index == chain].norm(dim=1).max() > 0.1, (
            "modes of the assembly move both"
        )


@pytest.mark.parametrize("kind", ["mode", "rotation", "translation"])
def test_a_latent_moves_its_own_chain_alone(dynamics, small, kind):
    for chain in (0, 1):
        moved = dynamics.decode(one_latent(dynamics, chain, kind)) - dynamics.reference
        own = torch.from_numpy(small.chain_index == chain)
        assert moved[~own].abs().max() < 1e-5
        assert moved[own].norm(dim=1).max() > 0.1


def test_a_chain_turns_about_its_own_centre_of_mass(whole, closed):
    for chain in (0, 1):
        atoms = np.flatnonzero(closed.chain_index == chain)
        layout = whole.chains[chain]
        quarter = one_latent(
            whole, chain, "rotation", 2, math.pi / 2 / whole.scale[layout.rotation.start]
        )
        before, after = closed.coords[atoms], whole.decode(quarter).numpy()[atoms]
        np.testing.assert_allclose(after.mean(0), closed.centers[chain], atol=1e-4)
        offset, turned = before - closed.centers[chain], after - closed.centers[chain]
        # A quarter turn about z, as column vectors: (x, y, z) → (−y, x, z).
        np.testing.assert_allclose(turned, offset[:, [1, 0, 2]] * [-1, 1, 1], atol=1e-3)


def test_a_translation_is_in_angstrom(dynamics, small):
    moved = dynamics.decode(one_latent(dynamics, 1, "translation", 1, 2.5)) - dynamics.reference
    expected = np.broadcast_to([0, 2.5, 0], (int((small.chain_index == 1).sum()), 3))
    np.testing.assert_allclose(moved[small.chain_index == 1], expected, atol=1e-5)


def test_bending_carries_no_rigid_motion(whole, closed):
    for chain in (0, 1):
        atoms = np.flatnonzero(closed.chain_index == chain)
        offset = closed.coords[atoms] - closed.centers[chain]
        for mode in range(10):
            moved = (
                whole.decode(one_latent(whole, chain, "mode", mode)) - whole.reference
            ).numpy()[atoms]
            assert np.abs(moved.mean(0)).max() < 1e-4
            assert np.abs(np.cross(offset, moved).mean(0)).max() < 1e-2 * closed.radii[chain]


def test_order_is_bend_turn_shift(dynamics, small):
    """X = R (X⁰ + Σ α U − com) + com + t, each part from the latents in physical units."""
    latents = random_latents(dynamics, 1, 2.0)
    physical = (latents * dynamics.scale_tensor)[0]
    coords = dynamics.decode(latents)[0].numpy()
    for chain, layout in enumerate(dynamics.chains):
        alpha = physical[layout.mode].numpy()
        rotation = roma.rotvec_to_rotmat(physical[layout.rotation]).numpy()
        shift = physical[layout.translation].numpy()
        com = small.centers[chain]
        bent = small.node_coords[small.node_chain == chain] + np.einsum(
            "k,kni->ni", alpha, dynamics.modes.vectors[chain]
        )
        expected = (bent - com) @ rotation.T + com + shift
        np.testing.assert_allclose(coords[layout.atoms], expected, atol=1e-4)


# Units


def test_one_unit_is_one_angstrom(whole, closed):
    for chain in (0, 1):
        atoms = np.flatnonzero(closed.chain_index == chain)
        turns = []
        for kind in ("mode", "rotation", "translation"):
            slot = getattr(whole.chains[chain], kind)
            for number in range(slot.stop - slot.start):
                small_step = one_latent(whole, chain, kind, number, 0.01)
                moved = (whole.decode(small_step) - whole.decode(0 * small_step)).numpy()[
                    atoms
                ] / 0.01
                rms = math.sqrt((moved**2).sum(1).mean())
                if kind == "rotation":
                    turns.append(rms)
                else:
                    assert rms == pytest.approx(1.0, abs=1e-3)
        # A turn moves atoms by their distance from its axis: less than the radius, by √(2/3)
        # over three axes.
        assert max(turns) < 1.0 and min(turns) > 0.4
        assert sum(rms**2 for rms in turns) == pytest.approx(2.0, abs=1e-3)


def test_physical_units(dynamics, small):
    physical = torch.ones(2, dynamics.n_latents) * dynamics.scale_tensor
    assert physical.shape == (2, dynamics.n_latents)
    for chain, layout in enumerate(dynamics.chains):
        n = (small.node_chain == chain).sum()
        np.testing.assert_allclose(physical[0, layout.mode], math.sqrt(n), rtol=1e-5)
        np.testing.assert_allclose(physical[0, layout.rotation], 1 / small.radii[chain], rtol=1e-5)
        np.testing.assert_allclose(physical[0, layout.translation], 1.0)


# Derivatives


@pytest.mark.parametrize("modes, rotation, translation", SWITCHES)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_tangents_are_the_jacobian(small, modes, rotation, translation, spread):
    dynamics = Dynamics(
        small, compute_modes(small, (3, 2)) if modes else None, rotation, translation
    )
    latents = random_latents(dynamics, 2, spread)
    for row in range(2):
        expected = jacobian(dynamics.decode, latents[row])
        for chain, layout in enumerate(dynamics.chains):
            tangents = dynamics.tangents(latents[row : row + 1], chain)[0]
            torch.testing.assert_close(
                tangents,
                expected[layout.atoms, :, layout.latents].permute(2, 0, 1),
                rtol=0,
                atol=1e-8,
            )


@pytest.mark.parametrize("angle", [1e-6, 0.9e-3, 1.1e-3, 0.5, 3.0])
def test_tangents_of_rotations_small_and_large(small, angle):
    """The series for small angles meets the closed form."""
    dynamics = Dynamics(small, translation=False)
    axis = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    latents = torch.cat([angle * axis / dynamics.scale[0], -angle * axis / dynamics.scale[3]])
    expected = jacobian(dynamics.decode, latents)
    for chain, layout in enumerate(dynamics.chains):
        tangents = dynamics.tangents(latents[None], chain)[0]
        torch.testing.assert_close(
            tangents, expected[layout.atoms, :, layout.latents].permute(2, 0, 1), rtol=0, atol=1e-6
        )


def test_tangents_in_the_frame_of_a_pose(dynamics):
    latents = random_latents(dynamics, 3)
    rotations = random_rotations(3, 0).double()
    for chain in (0, 1):
        plain = dynamics.tangents(latents, chain)
        seen = dynamics.tangents(latents, chain, rotations[:, :2])
        assert seen.shape == (*plain.shape[:3], 2)
        torch.testing.assert_close(seen, torch.einsum("bij,bknj->bkni", rotations[:, :2], plain))


def test_gram_is_the_product_of_tangents(dynamics):
    latents = random_latents(dynamics, 2)
    gram = dynamics.gram(latents)
    for row in range(2):
        full = jacobian(dynamics.decode, latents[row]).flatten(0, 1)
        torch.testing.assert_close(gram[row], full.T @ full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("draw", [lambda small: atom_beads(small, 6.4), residue_beads])
def test_gradients_from_latents_to_image(small, spread, draw):
    """Rotation vectors of zero included, where a norm has no derivative."""
    beads = draw(small)
    dynamics = Dynamics(small, compute_modes(small, (2, 1))).with_beads(beads)
    microscope = Microscope(beads.weights, 8, 8.0, small.origin, beads.widths)
    rotations = random_rotations(1, 0).double()
    latents = random_latents(dynamics, 1, spread).requires_grad_()
    assert gradcheck(lambda z: microscope.render(dynamics.decode(z), rotations), latents)


def test_gradient_at_zero_is_finite_in_float32(whole):
    latents = torch.zeros(2, whole.n_latents, requires_grad=True)
    (gradient,) = torch.autograd.grad(whole.decode(latents).square().sum(), latents)
    assert torch.isfinite(gradient).all() and (gradient.abs() > 0).any()


# Sets of atoms


def test_all_atoms_move_with_their_residues(whole, closed):
    latents = random_latents(whole, 3, 2.0)
    all_atoms = closed.all_atoms()
    of_all = whole.all_atoms()
    coords = of_all.decode(latents)
    assert torch.equal(coords, whole.with_structure(all_atoms).decode(latents))
    assert coords.shape == (3, closed.atoms.numAtoms(), 3)
    torch.testing.assert_close(
        coords[:, closed.node_rows], whole.decode(latents), rtol=0, atol=1e-4
    )
    # Bonds of a rigidly carried side chain keep their length when chains only turn and shift.
    rigid = latents.clone()
    rigid[:, torch.from_numpy(whole.latent_kind == "mode")] = 0
    moved = of_all.decode(rigid)
    still = torch.from_numpy(all_atoms.coords)
    ca = torch.from_numpy(closed.node_rows[all_atoms.node_index])
    before = (still - still[ca]).norm(dim=1)
    after = (moved - moved[:, ca]).norm(dim=2)
    torch.testing.assert_close(after, before.expand(3, -1), rtol=0, atol=1e-3)


def test_heavy_and_ca_have_the_same_latents():
    ca, heavy = (load_structure("glua3-closed", atoms=atoms) for atoms in ("ca", "heavy"))
    modes = compute_modes(ca, 4)
    small, large = Dynamics(ca, modes), Dynamics(heavy, modes)
    np.testing.assert_allclose(small.scale, large.scale)
    latents = random_latents(small, 2, 2.0)
    in_heavy = np.searchsorted(heavy.rows, ca.node_rows)
    torch.testing.assert_close(
        large.decode(latents)[:, in_heavy], small.decode(latents), rtol=0, atol=1e-4
    )


def test_beads_at_the_atoms_move_as_the_atoms(whole, closed):
    """Of the imaging atoms, and of all atoms: beads follow their residue's node as atoms do."""
    latents = random_latents(whole, 3, 2.0)
    of_atoms = whole.with_beads(atom_beads(closed))
    assert torch.equal(of_atoms.decode(latents), whole.decode(latents))
    everything = closed.all_atoms()
    of_all = whole.with_beads(atom_beads(everything))
    assert torch.equal(of_all.decode(latents), whole.all_atoms().decode(latents))
    for kind in ("mode", "rotation", "translation"):
        for one, other in zip(of_all.chains, whole.chains, strict=True):
            assert getattr(one, kind) == getattr(other, kind), "latents mean the same"
    np.testing.assert_array_equal(of_all.scale, whole.scale)


def test_beads_are_where_they_are_given_and_move_with_their_node(dynamics, small):
    beads = residue_beads(small)
    of_beads = dynamics.with_beads(beads)
    coords = of_beads.decode(torch.zeros(2, dynamics.n_latents))
    np.testing.assert_allclose(coords, np.stack([beads.coords] * 2), atol=1e-4)
    bent = random_latents(dynamics, 3, 2.0)
    bent[:, torch.from_numpy(dynamics.latent_kind != "mode")] = 0
    of_nodes = dynamics.decode(bent) - dynamics.reference.double()
    moved = of_beads.decode(bent) - of_beads.reference.double()
    torch.testing.assert_close(moved, of_nodes[:, beads.node], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chain", [0, 1])
def test_tangents_of_beads_are_their_derivatives(dynamics, small, chain):
    of_beads = dynamics.with_beads(residue_beads(small))
    layout = of_beads.chains[chain]
    latents = random_latents(of_beads, 2)
    tangents = of_beads.tangents(latents, chain)
    for row in range(2):
        full = jacobian(lambda z: of_beads.decode(z[None])[0], latents[row])
        expected = full[layout.atoms, :, layout.latents].permute(2, 0, 1)
        torch.testing.assert_close(tangents[row], expected, rtol=0, atol=1e-6)


def test_several_beads_a_residue_or_none(dynamics, small):
    """A residue without a bead is not drawn; the others keep their node."""
    beads = residue_beads(small)
    kept = beads.node != 5
    fewer = Beads(*(getattr(beads, name)[kept] for name in ("coords", "node", "weights", "widths")))
    latents = random_latents(dynamics, 2)
    every = dynamics.with_beads(beads).decode(latents)
    torch.testing.assert_close(dynamics.with_beads(fewer).decode(latents), every[:, kept])


def test_other_atoms_have_no_beads(dynamics, small):
    of_beads = dynamics.with_beads(residue_beads(small))
    assert of_beads.beads is not None and dynamics.beads is None
    assert of_beads.to("meta").beads is of_beads.beads
    latents = random_latents(dynamics, 1)
    again = of_beads.with_structure(small)
    assert again.beads is None
    assert torch.equal(again.decode(latents), dynamics.decode(latents))
    assert torch.equal(of_beads.all_atoms().decode(latents), dynamics.all_atoms().decode(latents))


# The way back


@pytest.mark.parametrize("modes, rotation, translation", SWITCHES)
def test_fit_inverts_decode(small, modes, rotation, translation):
    dynamics = Dynamics(small, compute_modes(small, 4) if modes else None, rotation, translation)
    latents = random_latents(dynamics, 4)
    fitted = dynamics.fit(dynamics.decode(latents).numpy())
    assert fitted.dtype == torch.float32
    torch.testing.assert_close(fitted.double(), latents, rtol=0, atol=1e-3)


def test_fit_inverts_large_turns(whole):
    latents = random_latents(whole, 2)
    for chain, layout in enumerate(whole.chains):
        axis = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
        latents[:, layout.rotation] = (1.0 + chain) * axis / whole.scale[layout.rotation.start]
    coords = whole.decode(latents)
    torch.testing.assert_close(whole.decode(whole.fit(coords)), coords.float(), rtol=0, atol=1e-2)


def test_fit_is_the_nearest_point_of_the_manifold(whole, opened):
    """What is left is at right angles to every direction the model can move in."""
    target = torch.from_numpy(opened.coords)[None]
    latents = whole.fit(target).double()
    left = target - whole.decode(latents)
    before = (target - whole.decode(0 * latents)).square().sum()
    assert left.square().sum() < 0.1 * before, "chains turn and shift: most of this motion is rigid"
    for chain, layout in enumerate(whole.chains):
        tangents = whole.tangents(latents, chain)[0].flatten(1)
        cosine = tangents @ left[0, layout.atoms].flatten() / (tangents.norm(dim=1) * left.norm())
        assert cosine.abs().max() < 1e-4


# Bad input


def test_nothing_may_move(small):
    with pytest.raises(
        ValueError, match="expected at least one of modes, rotation and translation, got none"
    ):
        Dynamics(small, None, rotation=False, translation=False)


def test_modes_of_another_structure(closed, opened, small):
    modes = compute_modes(closed, 3)
    for other in (opened, small, closed.as_one_body()):
        with pytest.raises(ValueError, match="got modes of another structure; try compute_modes"):
            Dynamics(other, modes)
    with pytest.raises(ValueError, match="got modes of another structure"):
        Dynamics(closed, modes).with_structure(opened)


def test_latents_of_another_length(dynamics):
    with pytest.raises(ValueError, match=f"expected latents of length {dynamics.n_latents}, got 3"):
        dynamics.decode(torch.zeros(2, 3))


def test_coordinates_of_another_molecule(dynamics):
    n = len(dynamics.reference)
    for shape in ((n, 3), (2, n + 1, 3)):
        with pytest.raises(ValueError, match=rf"expected coordinates \(m, {n}, 3\), got"):
            dynamics.fit(np.zeros(shape))


def test_repr_says_what_moves(small, dynamics):
    assert "17 latents: mode, rotation, translation" in repr(dynamics)
    assert "6 latents: rotation" in repr(Dynamics(small, translation=False))


def test_bodies_that_turn_by_any_angle_are_fitted():
    """From the reference, least squares would not find a turn of half a turn."""
    bodies = {
        "head": "chain A and resnum 1 to 107",
        "tail": "chain A and resnum > 107",
        "other": "chain B",
    }
    structure = load_structure("glua3-closed", bodies=bodies).with_turning("head")
    dynamics = Dynamics(structure, compute_modes(structure, 2))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(20, dynamics.n_latents, generator=generator)
    axes = torch.nn.functional.normalize(torch.randn(20, 3, generator=generator), dim=1)
    angles = torch.linspace(2.0, 3.1, 20).unsqueeze(1)
    turns = dynamics.chains[0].rotation
    latents[:, turns] = angles * axes / dynamics.scale_tensor[turns]
    torch.testing.assert_close(dynamics.fit(dynamics.decode(latents)), latents, rtol=0, atol=0.02)
