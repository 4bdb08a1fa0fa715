"""The paper's network: where it starts, what it refuses, that it learns."""

import pytest
import torch
from torch import nn

from cryochains.dynamics import Dynamics
from cryochains.encoder import Encoder
from cryochains.modes import compute_modes


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, (3, 2)))


def make(dynamics, box=32, width=0.05, seed=0, **settings):
    torch.manual_seed(seed)
    return Encoder(dynamics, box, width, **settings)


def pictures(n=4, box=32, seed=0):
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed))


def test_starts_exactly_at_the_reference(dynamics):
    encoder = make(dynamics)
    latents = encoder(10 * pictures() + 3)
    assert latents.shape == (4, dynamics.n_latents)
    assert latents.abs().max() == 0


def test_gradient_at_the_start_is_finite_and_reaches_every_head(dynamics):
    encoder = make(dynamics)
    encoder(pictures()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    for heads in encoder.heads:
        assert set(heads) == {"mode", "rotation", "translation"}
        for head in heads.values():
            assert head[-1].bias.grad.abs().max() > 0


@pytest.mark.parametrize(
    "n_modes, rotation, translation",
    [(4, False, False), (None, True, False), (None, True, True), (None, False, True), ((2, 0), True, True)],
)
def test_heads_are_those_of_the_dynamics(closed, n_modes, rotation, translation):
    modes = None if n_modes is None else compute_modes(closed, n_modes)
    dynamics = Dynamics(closed, modes, rotation, translation)
    assert make(dynamics)(pictures()).shape == (4, dynamics.n_latents)


def test_outputs_land_on_their_latents(dynamics):
    """A head's answer arrives in the slice that `Dynamics` names, and 1 turns or moves a chain by about 1 Å."""
    encoder = make(dynamics)
    for chain in (0, 1):
        with torch.no_grad():
            encoder.heads[chain]["mode"][-1].bias.fill_(10 + chain)
            encoder.heads[chain]["translation"][-1].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
            # The first vector leans from x towards y: a turn about z.
            encoder.heads[chain]["rotation"][-1].bias[1] = 1.0
    latents = encoder(pictures())[0]
    for chain, layout in enumerate(dynamics.chains):
        assert latents[layout.mode].tolist() == [10 + chain] * (layout.mode.stop - layout.mode.start)
        assert latents[layout.translation].tolist() == [1.0, 2.0, 3.0]
        expected = torch.tensor([0.0, 0.0, 1.0])
        torch.testing.assert_close(latents[layout.rotation], expected, rtol=0, atol=0.01)


def test_turns_are_bounded_by_tanh(dynamics):
    encoder = make(dynamics)
    with torch.no_grad():
        for heads in encoder.heads:
            heads["rotation"][-1].bias.copy_(torch.tensor([-1e3, 1e3, -1e3, 1e3, -1e3, 1e3]))
    assert torch.isfinite(encoder(pictures())).all()


def test_brightness_and_background_do_not_matter(dynamics):
    encoder = make(dynamics, width=0.1)
    with torch.no_grad():
        for heads in encoder.heads:
            for head in heads.values():
                nn.init.normal_(head[-1].weight, std=100.0)
    images = pictures()
    latents = encoder(images)
    spread = latents.std(0).max()
    assert spread > 0
    assert (encoder(5 * images - 7) - latents).abs().max() < 0.01 * spread
    assert torch.isfinite(encoder(torch.ones(2, 32, 32))).all(), "an empty image is no reason for NaN"


@pytest.mark.parametrize("pool, n_pools, box", [("block", 4, 16), ("conv", 8, 256)])
def test_architecture_is_the_papers(dynamics, pool, n_pools, box):
    encoder = Encoder(dynamics, box, pool=pool)
    convolutions = [layer for layer in encoder.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 32, 128, 128, 256, 256, 512, 512]
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in encoder.features) == n_pools
    for heads, n_modes in zip(encoder.heads, (3, 2), strict=True):
        for kind, n_out in (("mode", n_modes), ("rotation", 6), ("translation", 3)):
            linear = [layer.out_features for layer in heads[kind] if isinstance(layer, nn.Linear)]
            assert linear == [512, 256, n_out]


@pytest.mark.parametrize("pool, least", [("block", 16), ("conv", 256)])
def test_pooling_refuses_images_it_would_shrink_to_nothing(dynamics, pool, least):
    encoder = make(dynamics, least, 0.01, pool=pool)
    assert encoder(pictures(2, least)).shape == (2, dynamics.n_latents)
    with pytest.raises(ValueError, match=f'expected images of at least {least} px for pool="{pool}", got {least - 2}'):
        make(dynamics, least - 2, 0.01, pool=pool)


def test_boxes_that_are_no_power_of_two(dynamics):
    assert make(dynamics, 50)(pictures(2, 50)).shape == (2, dynamics.n_latents)


def test_bad_input(dynamics):
    with pytest.raises(ValueError, match='expected pool "block" or "conv", got \'max\''):
        make(dynamics, pool="max")
    with pytest.raises(ValueError, match=r"expected images of 32 px, got \(16, 16\)"):
        make(dynamics)(pictures(box=16))


def test_width_scales_the_network(dynamics):
    counts = [sum(p.numel() for p in make(dynamics, width=width).parameters()) for width in (0.05, 0.1, 0.2)]
    assert counts[0] < counts[1] < counts[2]
    state = make(dynamics).state_dict()
    assert set(state) == {name for name, _ in make(dynamics).named_parameters()}


def test_learns_a_tiny_problem(dynamics):
    """Images of a spot, of which the latents are the place."""
    where = 8 * torch.rand(32, 2, generator=torch.Generator().manual_seed(0)) - 4
    distance = torch.arange(32) - 16 - where.unsqueeze(-1)
    x, y = torch.exp(-distance.square() / 18).unbind(1)
    images = y.unsqueeze(2) * x.unsqueeze(1)
    target = where.repeat(1, 9)[:, : dynamics.n_latents] / 2
    encoder = make(dynamics, width=0.1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = (encoder(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
