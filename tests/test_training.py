"""Amortised training: the same numbers for the same seed, cut or not, and the best weights in the end."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState

from cryochains.dynamics import Dynamics
from cryochains.metrics import score_motion
from cryochains.model import CryoChains
from cryochains.particles import ParticleStack
from cryochains.simulation import simulate_particles
from cryochains.training import Epoch, encode_particles, fit


@pytest.fixture(scope="module")
def particles(closed):
    """Chains that stand 3 Å from the reference, so that there is something to learn from every image."""
    dynamics = Dynamics(closed)
    latents = 3.0 + 0.5 * torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    return simulate_particles(closed, 60, dynamics=dynamics, latents=latents, box_size=32, snr_db=5.0, progress=False)


@pytest.fixture(scope="module")
def sets(particles):
    return particles[:44], particles[44:]


def make(structure, particles, **settings) -> CryoChains:
    return CryoChains.for_particles(structure, particles, **{"modes": None, "width": 0.05} | settings)


def run(structure, sets, model=None, **settings):
    model = model or make(structure, sets[0])
    settings = {"epochs": 4, "batch_size": 16, "learning_rate": 0.05, "progress": False} | settings
    return model, fit(model, *sets, **settings)


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def trained(closed, sets):
    """With a step so large that the last epoch is not the best: both sets of weights count."""
    model, history = run(closed, sets)
    losses = [epoch.held_out_loss for epoch in history]
    assert len(losses) == 4 and losses.index(min(losses)) < 3
    return model, history


def without_truth(particles) -> ParticleStack:
    return ParticleStack(
        particles.read_images(), particles.rotations, pixel_size=particles.pixel_size, ctf=particles.ctf
    )


# What it learns


def test_learns(closed, sets):
    model, history = run(closed, sets, epochs=10, learning_rate=0.01, patience=10)
    assert [epoch.epoch for epoch in history] == list(range(1, 11))
    assert history[-1].train_loss < history[0].train_loss
    assert min(epoch.held_out_loss for epoch in history) < history[0].held_out_loss
    still = score_motion(model.dynamics, torch.zeros(len(sets[1]), model.dynamics.n_latents), sets[1])
    assert min(epoch.rmsd for epoch in history) < 0.8 * still.rmsd


def test_only_the_encoder_learns(closed, sets, trained):
    model, _ = trained
    fresh = make(closed, sets[0])
    assert not torch.equal(weights(model), weights(fresh))
    torch.testing.assert_close(model.dynamics.reference, fresh.dynamics.reference, rtol=0, atol=0)
    assert float(model.contrast) != 1.0, "measured before the first epoch"


def test_ends_with_the_best_weights(sets, trained):
    model, history = trained
    assert not model.training
    total = 0.0
    with torch.no_grad():
        for batch in sets[1].batches(16):
            total += float((model(batch.images, *batch.pose) - batch.images).square().mean()) * len(batch)
    best = min(epoch.held_out_loss for epoch in history)
    assert total / len(sets[1]) == pytest.approx(best, rel=1e-5)


def test_scores_are_there_where_the_truth_is_known(closed, sets, trained):
    _, history = trained
    assert all(epoch.rmsd > 0 and epoch.explained_motion < 1 for epoch in history)
    _, unscored = run(closed, tuple(map(without_truth, sets)), epochs=1)
    assert unscored[0].rmsd is None and unscored[0].explained_motion is None
    assert unscored[0].held_out_loss == pytest.approx(history[0].held_out_loss, rel=1e-5)


def test_latents_come_in_the_order_of_the_stack(particles, trained):
    model, _ = trained
    latents = encode_particles(model, particles, batch_size=7)
    assert latents.shape == (60, 12) and not latents.requires_grad
    order = [50, 3, 21]
    torch.testing.assert_close(encode_particles(model, particles[order]), latents[order], rtol=1e-4, atol=1e-4)


# When it stops


def test_stops_when_held_out_loss_no_longer_falls(closed, sets):
    # Without steps every epoch is as good as the first.
    _, history = run(closed, sets, epochs=9, learning_rate=0.0, patience=2)
    assert len(history) == 3
    assert len({epoch.held_out_loss for epoch in history}) == 1


def test_nan_loss_is_one_sentence(closed, sets, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(ValueError, match=r"expected a finite loss, got (nan|inf) in epoch 1; try a lower"):
        run(closed, sets, learning_rate=1e30, checkpoint=checkpoint)
    assert not checkpoint.exists(), "no checkpoint of weights that are not numbers"


def test_images_that_are_not_numbers(closed, sets):
    images = sets[0].read_images()
    images[20, 3, 3] = math.nan
    broken = ParticleStack(images, sets[0].rotations, sets[0].shifts, pixel_size=sets[0].pixel_size, ctf=sets[0].ctf)
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or Inf"):
        run(closed, (broken, sets[1]))


def test_protein_dark_images(closed, sets):
    dark = ParticleStack(
        -sets[0].read_images(), sets[0].rotations, sets[0].shifts, pixel_size=sets[0].pixel_size, ctf=sets[0].ctf
    )
    with pytest.raises(ValueError, match="expected protein-bright images"):
        run(closed, (dark, sets[1]))


# The same numbers again


def test_seed_decides_everything(closed, sets, trained):
    torch.manual_seed(123)
    again, history = run(closed, sets)
    assert torch.equal(weights(again), weights(trained[0]))
    assert history == trained[1]
    other, _ = run(closed, sets, seed=1)
    assert not torch.equal(weights(other), weights(trained[0]))


def test_every_epoch_has_an_order_of_its_own(closed, sets, monkeypatch):
    original, orders = ParticleStack.batches, []

    def batches(self, *args, seed=None, **kwargs):
        if seed is not None:
            orders.append(torch.cat([batch.rows for batch in original(self, 64, seed=seed)]).tolist())
        return original(self, *args, seed=seed, **kwargs)

    monkeypatch.setattr(ParticleStack, "batches", batches)
    run(closed, sets, epochs=3)
    assert len(orders) == 3 and len(set(map(tuple, orders))) == 3
    assert all(sorted(order) == list(range(44)) for order in orders), "each particle once an epoch"


@pytest.mark.parametrize("first", [1, 3])
def test_more_epochs_continue_a_checkpoint(closed, sets, trained, tmp_path, first):
    checkpoint = tmp_path / "run.safetensors"
    run(closed, sets, epochs=first, checkpoint=checkpoint)
    # Another seed of the weights: all that counts is in the file.
    resumed, history = run(closed, sets, make(closed, sets[0], seed=9), checkpoint=checkpoint)
    assert history == trained[1]
    assert torch.equal(weights(resumed), weights(trained[0]))
    assert float(resumed.contrast) == float(trained[0].contrast)


@pytest.mark.parametrize("n_batches", [1, 4, 7])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(closed, sets, trained, tmp_path, monkeypatch, n_batches):
    """Cut in the middle of an epoch, as Ctrl-C would; 3 batches of training and 1 of scoring make one."""
    checkpoint = tmp_path / "run.safetensors"
    original, seen = CryoChains.render, []

    def render(*args, **kwargs):
        if len(seen) == n_batches:
            raise KeyboardInterrupt
        seen.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CryoChains, "render", render)
        run(closed, sets, checkpoint=checkpoint)
    resumed, history = run(closed, sets, checkpoint=checkpoint)
    assert history == trained[1]
    assert torch.equal(weights(resumed), weights(trained[0]))


def test_a_finished_run_only_loads(closed, sets, trained, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run.safetensors"
    run(closed, sets, checkpoint=checkpoint)
    monkeypatch.setattr(CryoChains, "render", lambda *args: pytest.fail("nothing is left to do"))
    model, history = run(closed, sets, checkpoint=checkpoint)
    assert history == trained[1] and torch.equal(weights(model), weights(trained[0]))


def test_checkpoint_of_another_molecule_or_model_is_refused(closed, opened, sets, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(closed, sets, epochs=1, checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    for model, difference in (
        (make(opened, sets[0]), "structure_hash"),
        (make(closed, sets[0], modes=2), "n_latents"),
        (make(closed, sets[0], width=0.1), "width"),
    ):
        with pytest.raises(ValueError, match=f"expected a checkpoint of .*differs in .*{difference}.*try another"):
            run(closed, sets, model, epochs=2, checkpoint=checkpoint)
    for other in ({"sets": (sets[0], sets[1][:9])}, {"sets": (sets[1], sets[0])}, {"learning_rate": 0.01}, {"seed": 4}):
        with pytest.raises(ValueError, match="expected a checkpoint of .*differs in .*data.*try another"):
            run(closed, **{"sets": sets, "epochs": 2, "checkpoint": checkpoint} | other)
    assert checkpoint.read_bytes() == content


def test_files_that_are_no_checkpoint(closed, sets, tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="expected a training checkpoint file, got something unreadable at"):
        run(closed, sets, epochs=1, checkpoint=tmp_path / "text")
    with pytest.raises(ValueError, match="expected a place that can be written"):
        run(closed, sets, epochs=1, checkpoint=tmp_path / "text" / "below")


# Settings


def test_mixed_precision(closed, sets, trained):
    AcceleratorState._reset_state()
    _, history = run(closed, sets, epochs=1, precision="bf16")
    AcceleratorState._reset_state()
    assert history[0].held_out_loss == pytest.approx(trained[1][0].held_out_loss, rel=0.05)


def test_another_precision_in_the_same_notebook(closed, sets, trained):
    run(closed, sets, epochs=1, precision="no")
    run(closed, sets, epochs=1, precision="bf16")


def test_images_of_another_size(closed, sets):
    model = CryoChains(closed, box_size=48, pixel_size=sets[0].pixel_size, modes=None, width=0.05)
    with pytest.raises(ValueError, match="expected (images|particles) of 48 px"):
        run(closed, sets, model)


def test_pixels_of_another_size(closed, sets):
    model = CryoChains(closed, box_size=32, pixel_size=1.2 * sets[0].pixel_size, modes=None, width=0.05)
    with pytest.raises(ValueError, match="expected particles of 32 px"):
        run(closed, sets, model)


def test_sets_without_particles(closed, sets):
    for empty in ((sets[0], sets[1][:0]), (sets[0][:0], sets[1])):
        with pytest.raises(ValueError, match="expected at least one particle, got none; try another selection"):
            run(closed, empty)


def test_history_is_plain_numbers(trained):
    for epoch in trained[1]:
        assert isinstance(epoch, Epoch)
        assert all(isinstance(value, (int, float)) for value in vars(epoch).values())


def test_quiet_when_asked(closed, sets, capfd):
    run(closed, sets, epochs=1)
    assert capfd.readouterr() == ("", "")
    run(closed, sets, epochs=1, progress=True)
    assert "training" in capfd.readouterr().err
