"""Amortised training: one seed, one result, cut or not, and the best weights in the end."""

import json
import math
from dataclasses import replace

import pytest
import torch

import cryochains.inference.training
from cryochains.images import ParticleStack
from cryochains.inference import (
    Encoder,
    Result,
    encode,
    measure_contrast,
    score,
    train_encoder,
)
from cryochains.inference.encoder import new_network
from cryochains.model import Dynamics, Microscope, Model, simulate_particles


@pytest.fixture(scope="module")
def particles(closed):
    """Chains 3 Å from the reference: there is something to learn from each image."""
    dynamics = Dynamics(closed)
    latents = 3.0 + 0.5 * torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    return simulate_particles(
        closed,
        60,
        dynamics=dynamics,
        latents=latents,
        box_size=32,
        snr_db=5.0,
        progress=False,
    )


@pytest.fixture(scope="module")
def sets(particles):
    return particles[:44], particles[44:]


def make(structure, particles, **settings) -> Model:
    return Model(structure, particles, **{"modes": None} | settings)


SETTINGS = {
    "width": 0.05,
    "epochs": 4,
    "batch_size": 16,
    "learning_rate": 0.05,
    "progress": False,
}


def run(structure, sets, model=None, **settings) -> Encoder:
    model = model or make(structure, sets[0])
    return train_encoder(model, *sets, **SETTINGS | settings)


def weights(encoder) -> torch.Tensor:
    network = encoder.network
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def assert_same(a: Encoder, b: Encoder):
    assert torch.equal(weights(a), weights(b))
    assert list(a.history) == list(b.history)
    assert a.contrast == b.contrast


@pytest.fixture(scope="module")
def trained(closed, sets):
    """With a step so large that the last epoch is not the best: both sets of weights count."""
    encoder = run(closed, sets)
    losses = held_out(encoder)
    assert len(losses) == 4 and losses.index(min(losses)) < 3
    return encoder


def held_out(encoder) -> list[float]:
    return [record["held_out_loss"] for record in encoder.history]


def without_truth(particles) -> ParticleStack:
    return replace(particles, truth=None)


# What it learns


def test_learns(closed, sets):
    encoder = run(closed, sets, epochs=10, learning_rate=0.01, patience=10)
    history = encoder.history
    assert [record["epoch"] for record in history] == list(range(1, 11))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert min(held_out(encoder)) < held_out(encoder)[0]
    zeros = torch.zeros(len(sets[1]), encoder.model.n_latents)
    still = score(Result(encoder.model, zeros, particles=sets[1]))
    assert min(record["rmsd"] for record in history) < 0.8 * still.rmsd


def test_only_the_encoder_learns(closed, sets, trained):
    model = make(closed, sets[0])
    reference = model.dynamics.reference.clone()
    before = dict(model.fingerprint)
    encoder = run(closed, sets, model, epochs=1)
    untrained = Encoder(model, new_network(model, 0.05, "block", 0), 1.0, ())
    assert not torch.equal(weights(trained), weights(untrained))
    assert encoder.model is model and model.fingerprint == before
    torch.testing.assert_close(model.dynamics.reference, reference, rtol=0, atol=0)
    assert trained.contrast != 1.0, "measured before the first epoch"
    assert trained.contrast == measure_contrast(model, sets[0])


def test_ends_with_the_best_weights(sets, trained):
    assert not trained.network.training
    model, network = trained.model, trained.network
    total = 0.0
    with torch.no_grad():
        for batch in sets[1].batches(16):
            expected = trained.contrast * model.render(network(batch.images), *batch.pose)
            total += float((expected - batch.images).square().mean()) * len(batch)
    assert total / len(sets[1]) == pytest.approx(min(held_out(trained)), rel=1e-5)


def test_scores_are_there_where_the_truth_is_known(closed, sets, trained):
    history = trained.history
    assert all(record["rmsd"] > 0 and record["explained_motion"] < 1 for record in history)
    unscored = run(closed, tuple(map(without_truth, sets)), epochs=1)
    record = unscored.history[0]
    assert record["rmsd"] is None and record["explained_motion"] is None
    assert record["held_out_loss"] == pytest.approx(history[0]["held_out_loss"], rel=1e-5)


def test_scores_are_those_of_its_answers(closed, sets):
    encoder = run(closed, sets, epochs=1)
    scores = score(encode(encoder, sets[1]))
    record = encoder.history[0]
    assert record["rmsd"] == pytest.approx(scores.rmsd, rel=1e-5)
    assert record["explained_motion"] == pytest.approx(scores.explained_motion, rel=1e-4)


def test_latents_come_in_the_order_of_the_stack(particles, trained):
    latents = encode(trained, particles, batch_size=7).latents
    assert latents.shape == (60, 12) and not latents.requires_grad
    order = [50, 3, 21]
    some = encode(trained, particles[order]).latents
    torch.testing.assert_close(some, latents[order], rtol=1e-4, atol=1e-4)


# When it stops


def test_stops_when_held_out_loss_no_longer_falls(closed, sets):
    # Without steps every epoch is as good as the first.
    encoder = run(closed, sets, epochs=9, learning_rate=1e-30, patience=2)
    assert len(encoder.history) == 3
    assert len(set(held_out(encoder))) == 1


def test_nan_loss_is_one_sentence(closed, sets, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(
        ValueError, match=r"expected a finite loss, got (nan|inf) in epoch 1; try a lower"
    ):
        run(closed, sets, learning_rate=1e30, checkpoint=checkpoint)
    assert not list(checkpoint.glob("*.safetensors")), "no weights that are not numbers"


def test_images_that_are_not_numbers(closed, sets):
    images = sets[0].read_images()
    images[20, 3, 3] = math.nan
    broken = replace(sets[0], images=images)
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or Inf"):
        run(closed, (broken, sets[1]))


def test_protein_dark_images(closed, sets):
    dark = replace(sets[0], images=-sets[0].read_images())
    with pytest.raises(ValueError, match="expected protein-bright images"):
        run(closed, (dark, sets[1]))


# The same numbers again


def test_seed_decides_everything(closed, sets, trained):
    torch.manual_seed(123)
    assert_same(run(closed, sets), trained)
    other = run(closed, sets, seed=1)
    assert not torch.equal(weights(other), weights(trained))


def test_every_epoch_has_an_order_of_its_own(closed, sets, monkeypatch):
    original = cryochains.inference.training._shared_batches
    orders = []

    def batches(*arguments):
        orders.append([])
        for batch, n in original(*arguments):
            orders[-1] += batch.images.sum((1, 2)).tolist()
            yield batch, n

    monkeypatch.setattr(cryochains.inference.training, "_shared_batches", batches)
    run(closed, sets, epochs=3)
    assert len(orders) == 3 and len(set(map(tuple, orders))) == 3
    every = sorted(sets[0].read_images().sum((1, 2)).tolist())
    assert all(sorted(order) == every for order in orders), "each particle once an epoch"


@pytest.mark.parametrize("first", [1, 3])
def test_more_epochs_continue_a_checkpoint(closed, sets, trained, tmp_path, first, monkeypatch):
    checkpoint = tmp_path / "run.safetensors"
    run(closed, sets, epochs=first, checkpoint=checkpoint)
    # Other weights to begin with: all that counts is in the file.
    monkeypatch.setattr(cryochains.inference.training, "new_network", of_another_seed)
    assert_same(run(closed, sets, checkpoint=checkpoint), trained)


def of_another_seed(model, width, pool, seed):
    return new_network(model, width, pool, seed + 9)


@pytest.mark.parametrize("n_batches", [1, 4, 7])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(
    closed, sets, trained, tmp_path, n_batches
):
    """Cut within an epoch, as Ctrl-C would; 3 batches of training and 1 of scoring make one."""
    checkpoint = tmp_path / "run.safetensors"
    original = Microscope.render
    seen = []

    def render(*args, **kwargs):
        if len(seen) == n_batches:
            raise KeyboardInterrupt
        seen.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Microscope, "render", render)
        run(closed, sets, checkpoint=checkpoint)
    assert_same(run(closed, sets, checkpoint=checkpoint), trained)


def test_a_finished_run_only_loads(closed, sets, trained, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run.safetensors"
    run(closed, sets, checkpoint=checkpoint)
    monkeypatch.setattr(Microscope, "render", lambda *args: pytest.fail("nothing is left to do"))
    assert_same(run(closed, sets, checkpoint=checkpoint), trained)


def test_checkpoint_of_another_molecule_or_model_is_refused(closed, opened, sets, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(closed, sets, epochs=1, checkpoint=checkpoint)
    content = (checkpoint / "training.safetensors").read_bytes()
    settings = {"epochs": 2, "checkpoint": checkpoint}
    for model, difference in (
        (make(opened, sets[0]), "structure or bodies"),
        (make(closed, sets[0], modes=2), "number of modes"),
        (make(closed, sets[0], sigma=6.0), "width of an atom"),
    ):
        sentence = f"expected a run .* of Model.*what differs is its .*{difference}.*; try"
        with pytest.raises(ValueError, match=sentence):
            run(closed, sets, model, **settings)
    for other, difference in (
        ({"sets": (sets[0], sets[1][:9])}, "data"),
        ({"sets": (sets[1], sets[0])}, "data"),
        ({"learning_rate": 0.01}, "learning_rate"),
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 4}, "seed"),
        ({"width": 0.1}, "width"),
    ):
        sentence = f"expected a run of .*differs in {difference} in .*try another"
        with pytest.raises(ValueError, match=sentence):
            run(closed, **{"sets": sets} | settings | other)
    assert (checkpoint / "training.safetensors").read_bytes() == content


def test_folders_that_are_of_no_run(closed, sets, tmp_path):
    (tmp_path / "training.safetensors").write_text("hello")
    sentence = "got a damaged part: expected a training state file, got something unreadable at"
    with pytest.raises(ValueError, match=sentence):
        run(closed, sets, epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="expected a folder that can be written"):
        run(closed, sets, epochs=1, checkpoint=tmp_path / "training.safetensors" / "below")


# Settings


def test_mixed_precision(closed, sets, trained):
    half = run(closed, sets, epochs=1, precision="bf16")
    assert held_out(half)[0] == pytest.approx(held_out(trained)[0], rel=0.05)
    losses = [encoder.history[0]["train_loss"] for encoder in (half, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    with pytest.raises(
        ValueError, match='expected precision "no" or "bf16", got \'half\'; try "no"'
    ):
        run(closed, sets, precision="half")


def test_another_precision_in_the_same_notebook(closed, sets, trained):
    run(closed, sets, epochs=1, precision="no")
    run(closed, sets, epochs=1, precision="bf16")


def test_images_of_another_size(closed, sets):
    model = Model(closed, box_size=48, pixel_size=sets[0].pixel_size, modes=None)
    with pytest.raises(ValueError, match="expected (images|particles) of 48 px"):
        run(closed, sets, model)


def test_pixels_of_another_size(closed, sets):
    model = Model(closed, box_size=32, pixel_size=1.2 * sets[0].pixel_size, modes=None)
    with pytest.raises(ValueError, match="expected particles of 32 px"):
        run(closed, sets, model)


def test_sets_without_particles(closed, sets):
    for empty in ((sets[0], sets[1][:0]), (sets[0][:0], sets[1])):
        with pytest.raises(ValueError, match="expected at least one particle, got none; try anoth"):
            run(closed, empty, make(closed, sets[0]))


def test_history_is_plain_numbers(trained):
    names = {"epoch", "train_loss", "held_out_loss", "rmsd", "explained_motion"}
    for record in trained.history:
        assert type(record) is dict and set(record) == names
        assert all(type(value) in (int, float) for value in record.values())
    assert json.loads(json.dumps(trained.history)) == list(trained.history)


def test_quiet_when_asked(closed, sets, capfd):
    run(closed, sets, epochs=1)
    assert capfd.readouterr() == ("", "")
    run(closed, sets, epochs=1, progress=True)
    assert "training" in capfd.readouterr().err
