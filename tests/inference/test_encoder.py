"""The paper's network: where it starts, what it refuses, that it learns; and its answers."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from cryochains._files import load_tensors, save_tensors
from cryochains.images import random_rotations
from cryochains.inference import Encoder, EncoderNetwork, encode, load_encoder, load_result
from cryochains.inference.encoder import new_network, two_vectors_to_rotation
from cryochains.model import Dynamics, Model, simulate_particles
from cryochains.molecule import compute_modes


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, (3, 2)))


@pytest.fixture(scope="module")
def particles(closed):
    return simulate_particles(
        closed, 7, conformations=closed.coords[None], box_size=32, shift_std=2.0, progress=False
    )


@pytest.fixture(scope="module")
def model(closed, particles, dynamics):
    return Model(closed, particles, modes=dynamics.modes)


@pytest.fixture(scope="module")
def encoder(model):
    """Not trained, but with answers that depend on the image."""
    network = new_network(model, 0.1, "block", seed=0)
    with torch.no_grad():
        for heads in network.heads:
            for head in heads.values():
                nn.init.normal_(head[-1].weight, generator=torch.Generator().manual_seed(1))
    return Encoder(model, network.eval(), 2.0, ({"epoch": 1, "held_out_loss": 0.5},))


def make(dynamics, box=32, width=0.05, seed=0, **settings):
    torch.manual_seed(seed)
    return EncoderNetwork(dynamics, box, width, **settings)


def weights(network) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def pictures(n=4, box=32, seed=0):
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed))


def test_starts_exactly_at_the_reference(dynamics):
    network = make(dynamics)
    latents = network(10 * pictures() + 3)
    assert latents.shape == (4, dynamics.n_latents)
    assert latents.abs().max() == 0


def test_gradient_at_the_start_is_finite_and_reaches_every_head(dynamics):
    network = make(dynamics)
    network(pictures()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    for heads in network.heads:
        assert set(heads) == {"mode", "rotation", "translation"}
        for head in heads.values():
            assert head[-1].bias.grad.abs().max() > 0


@pytest.mark.parametrize(
    "n_modes, rotation, translation",
    [
        (4, False, False),
        (None, True, False),
        (None, True, True),
        (None, False, True),
        ((2, 0), True, True),
    ],
)
def test_heads_are_those_of_the_dynamics(closed, n_modes, rotation, translation):
    modes = None if n_modes is None else compute_modes(closed, n_modes)
    dynamics = Dynamics(closed, modes, rotation, translation)
    assert make(dynamics)(pictures()).shape == (4, dynamics.n_latents)


def test_outputs_land_on_their_latents(dynamics):
    """A head's answer is in the slice that `Dynamics` names; 1 moves a chain by about 1 Å."""
    network = make(dynamics)
    for chain in (0, 1):
        with torch.no_grad():
            network.heads[chain]["mode"][-1].bias.fill_(10 + chain)
            network.heads[chain]["translation"][-1].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
            # The first vector leans from x towards y: a turn about z.
            network.heads[chain]["rotation"][-1].bias[1] = 1.0
    latents = network(pictures())[0]
    for chain, layout in enumerate(dynamics.chains):
        assert latents[layout.mode].tolist() == [10 + chain] * (
            layout.mode.stop - layout.mode.start
        )
        assert latents[layout.translation].tolist() == [1.0, 2.0, 3.0]
        expected = torch.tensor([0.0, 0.0, 1.0])
        torch.testing.assert_close(latents[layout.rotation], expected, rtol=0, atol=0.01)


def test_turns_are_bounded_by_tanh(dynamics):
    network = make(dynamics)
    with torch.no_grad():
        for heads in network.heads:
            heads["rotation"][-1].bias.copy_(torch.tensor([-1e3, 1e3, -1e3, 1e3, -1e3, 1e3]))
    assert torch.isfinite(network(pictures())).all()


def test_brightness_and_background_do_not_matter(dynamics):
    network = make(dynamics, width=0.1)
    with torch.no_grad():
        for heads in network.heads:
            for head in heads.values():
                nn.init.normal_(head[-1].weight, std=100.0)
    images = pictures()
    latents = network(images)
    spread = latents.std(0).max()
    assert spread > 0
    assert (network(5 * images - 7) - latents).abs().max() < 0.01 * spread
    assert torch.isfinite(network(torch.ones(2, 32, 32))).all(), (
        "an empty image is no reason for NaN"
    )


@pytest.mark.parametrize("pool, n_pools, box", [("block", 4, 16), ("conv", 8, 256)])
def test_architecture_is_the_papers(dynamics, pool, n_pools, box):
    network = EncoderNetwork(dynamics, box, pool=pool)
    convolutions = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 32, 128, 128, 256, 256, 512, 512]
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in network.features) == n_pools
    for heads, n_modes in zip(network.heads, (3, 2), strict=True):
        for kind, n_out in (("mode", n_modes), ("rotation", 6), ("translation", 3)):
            linear = [layer.out_features for layer in heads[kind] if isinstance(layer, nn.Linear)]
            assert linear == [512, 256, n_out]


@pytest.mark.parametrize("pool, least", [("block", 16), ("conv", 256)])
def test_pooling_refuses_images_it_would_shrink_to_nothing(dynamics, pool, least):
    network = make(dynamics, least, 0.01, pool=pool)
    assert network(pictures(2, least)).shape == (2, dynamics.n_latents)
    sentence = f'expected images of at least {least} px for pool="{pool}", got {least - 2}'
    with pytest.raises(ValueError, match=sentence):
        make(dynamics, least - 2, 0.01, pool=pool)


def test_boxes_that_are_no_power_of_two(dynamics):
    assert make(dynamics, 50)(pictures(2, 50)).shape == (2, dynamics.n_latents)


def test_bad_input(dynamics):
    with pytest.raises(ValueError, match='expected pool "block" or "conv", got \'max\''):
        make(dynamics, pool="max")
    with pytest.raises(ValueError, match=r"expected images of 32 px, got \(16, 16\)"):
        make(dynamics)(pictures(box=16))


def test_width_scales_the_network(dynamics):
    counts = [len(weights(make(dynamics, width=width))) for width in (0.05, 0.1, 0.2)]
    assert counts[0] < counts[1] < counts[2]
    state = make(dynamics).state_dict()
    assert set(state) == {name for name, _ in make(dynamics).named_parameters()}


def test_learns_a_tiny_problem(dynamics):
    """Images of a spot, of which the latents are the position."""
    where = 8 * torch.rand(32, 2, generator=torch.Generator().manual_seed(0)) - 4
    distance = torch.arange(32) - 16 - where.unsqueeze(-1)
    x, y = torch.exp(-distance.square() / 18).unbind(1)
    images = y.unsqueeze(2) * x.unsqueeze(1)
    target = where.repeat(1, 9)[:, : dynamics.n_latents] / 2
    network = make(dynamics, width=0.1)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = (network(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


# Two vectors


def test_two_vectors_become_a_rotation():
    vectors = torch.randn(
        100, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    rotations = two_vectors_to_rotation(vectors)
    eye = torch.eye(3, dtype=torch.float64).expand(100, 3, 3)
    torch.testing.assert_close(rotations @ rotations.mT, eye, rtol=0, atol=1e-9)
    one = torch.ones(100, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.det(rotations), one, rtol=0, atol=1e-9)
    first = torch.nn.functional.normalize(vectors[:, 0], dim=1)
    torch.testing.assert_close(rotations[:, :, 0], first, rtol=0, atol=1e-9)
    assert (rotations[:, :, 2] * vectors[:, 1]).sum(1).abs().max() < 1e-9, (
        "the second stays in their plane"
    )
    assert ((rotations[:, :, 1] * vectors[:, 1]).sum(1) > 0).all(), "and on its side"


def test_two_vectors_of_a_rotation_give_it_back():
    rotations = random_rotations(20, 0).double()
    columns = rotations[:, :, :2].mT
    torch.testing.assert_close(two_vectors_to_rotation(columns), rotations, rtol=0, atol=1e-5)
    stretched = columns * torch.tensor([[3.0], [0.2]])
    torch.testing.assert_close(two_vectors_to_rotation(stretched), rotations, rtol=0, atol=1e-5)


def test_two_vectors_at_the_identity_have_a_gradient():
    vectors = torch.eye(3, dtype=torch.float64)[:2].clone().requires_grad_()
    assert gradcheck(two_vectors_to_rotation, vectors)


def test_untrained_it_answers_with_the_reference_and_draws_it(model):
    network = new_network(model, 0.05, "block", seed=0)
    rotations = random_rotations(3, 0)
    shifts = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-3.0, 5.0]])
    coords = torch.from_numpy(model.beads.coords).float().expand(3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            model.render(network(pictures(3)), rotations, shifts),
            model.microscope.render(coords, rotations, shifts),
            rtol=0,
            atol=1e-5,
        )


def test_the_loss_of_an_image_reaches_the_encoder(model, particles):
    network = new_network(model, 0.05, "block", seed=0)
    batch = next(particles.batches(4))
    expected = model.render(network(batch.images), *batch.pose)
    (expected - 1.1 * batch.images).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    last = network.heads[0]["translation"][-1]
    assert last.weight.grad.abs().max() > 0


def test_seed_decides_the_weights_and_nothing_else(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights(new_network(model, 0.05, "block", seed=0))
    assert torch.equal(torch.rand(3), expected), "the caller's random state is left alone"
    assert torch.equal(weights(new_network(model, 0.05, "block", seed=0)), first)
    assert not torch.equal(weights(new_network(model, 0.05, "block", seed=1)), first)


# Answers to particles


def test_encode_is_the_networks_answer_to_each_image(encoder, particles):
    result = encode(encoder, particles, batch_size=3)
    with torch.no_grad():
        expected = encoder.network(particles.read_images())
    assert expected.abs().max() > 0.1 and expected.std(0).max() > 1e-3
    torch.testing.assert_close(result.latents, expected, rtol=1e-4, atol=1e-4)
    assert not result.latents.requires_grad
    assert result.particles is particles and result.ids.tolist() == particles.ids.tolist()
    assert (result.kind, result.std, result.population) == ("encoded", None, None)
    assert result.scale.tolist() == [2.0] * 7 and result.noise is None
    assert result.shows_molecule.all() and result.misfit is None
    assert result.model.fingerprint == encoder.model.fingerprint


def test_answers_come_in_the_order_of_the_stack(encoder, particles):
    latents = encode(encoder, particles).latents
    order = [5, 3, 1]
    some = encode(encoder, particles[order])
    torch.testing.assert_close(some.latents, latents[order], rtol=1e-4, atol=1e-4)
    assert some.ids.tolist() == particles.ids[order].tolist()


def test_particles_of_another_size(closed, encoder):
    for box, pixel in ((48, encoder.model.pixel_size), (32, 1.1 * encoder.model.pixel_size)):
        others = simulate_particles(
            closed,
            2,
            conformations=closed.coords[None],
            box_size=box,
            pixel_size=pixel,
            progress=False,
        )
        with pytest.raises(ValueError, match="expected particles of 32 px × .* Å, got"):
            encode(encoder, others)


# Saved and read

IN_A_FRESH_INTERPRETER = """
import sys
from cryochains import encode, load_particles
from cryochains.inference import load_encoder
encode(load_encoder(sys.argv[1]), load_particles(sys.argv[2])).save(sys.argv[3])
"""


def test_a_saved_encoder_gives_the_same_answers_in_a_fresh_interpreter(
    encoder, particles, tmp_path
):
    encoder.save(tmp_path / "encoder.safetensors")
    particles.save(tmp_path / "a.star")
    paths = [tmp_path / name for name in ("encoder.safetensors", "a.star", "answer.safetensors")]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_INTERPRETER, *map(str, paths)], check=True)
    answer = load_result(paths[2])
    torch.testing.assert_close(answer.latents, encode(encoder, particles).latents)
    again = load_encoder(paths[0])
    assert torch.equal(weights(again.network), weights(encoder.network))
    assert (again.contrast, list(again.history)) == (2.0, list(encoder.history))
    assert (again.network.width, again.network.pool) == (0.1, "block")
    assert again.model.fingerprint == encoder.model.fingerprint
    assert not again.network.training and repr(again) == repr(encoder)


def test_damaged_encoder_files_are_one_sentence(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match="expected an? encoder file, got .* there is none"):
        load_encoder(path)
    encoder.save(path)
    tensors, meta = load_tensors(path, "encoder")
    fewer = {name: tensor for name, tensor in tensors.items() if "features.0" not in name}
    for changed, described in (
        (fewer, meta),
        (tensors, {k: v for k, v in meta.items() if k != "width"}),
        (tensors, meta | {"width": 0.2}),
        (tensors, meta | {"model": None}),
        (tensors, meta | {"contrast": None}),
    ):
        save_tensors(path, changed, described)
        with pytest.raises(ValueError, match="expected an encoder file, got one that is damaged"):
            load_encoder(path)
    save_tensors(path, tensors, meta | {"kind": "result"})
    with pytest.raises(ValueError, match="expected an? encoder file, got result at"):
        load_encoder(path)
