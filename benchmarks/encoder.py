"""Encoders that are given residuals, beside other answers where the population is known.

GluA3 from closed to open, as in the demo (64 px, 0 dB, 20 modes a chain); particles of each seed
are given as they are, and with all or each of them brighter or dimmer at the same noise. Ways:

- pretrained: the encoder that comes with the package.
- fresh: one trained here, on draws of a population that as many other particles taught (--fresh).
- estimate, refine: those verbs, with the package's population.
- image, residual: a small convolutional network that is given an image at 32 px, the same under
  its CTF, and the pose; or the residual and the mean's image besides (--inputs). Both are trained
  on draws too, at the brightness of the particles.

    python benchmarks/encoder.py --seeds 52 53 54 --fresh --out docs/encoder.csv

Of "spread", each particle has a brightness of its own from half to double.

`explained` is the explained motion, `spearman` |Spearman| of PC1 with the true coordinate, `ratio`
RMSD over the information limit (of one brightness), `coverage` the share of true PC1 values in
their 95 % intervals, `ms` milliseconds of CPU a particle on one thread, reading included, and
`minutes` those of CPU that training took.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from realism import add_texts, version
from torch import Tensor, nn

import cryochains as cc
from cryochains.images import CTF, ParticleStack, random_rotations
from cryochains.inference import (
    ResidualEncoder,
    estimate,
    load_encoder,
    posterior_covariance,
    train_residual_encoder,
    true_latents,
)
from cryochains.model import Population

QUIET = {"progress": False}
# Times as bright, at the same noise; of "spread" each particle its own between the first and last.
BRIGHTNESS = {"x0.5": 0.5, "x1": 1.0, "x2": 2.0, "spread": None}
N_TAUGHT = 2000
# Of the networks of --inputs: filters, images, and a step's.
FILTERS = (24, 48, 72, 96)
INPUT_DRAWS = 100_000
INPUT_BATCH = 64
MAP_SIZE = 32
COLUMNS = ("seed", "way", "brightness", "n", "explained", "spearman", "rmsd", "limit", "ratio")
COLUMNS += ("coverage", "ms", "minutes", "version", "device", "date")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=int, default=300, help="particles of a seed")
    parser.add_argument("--fresh", action="store_true", help="also train one on the first seed")
    parser.add_argument("--inputs", action="store_true", help="also what encoders are given")
    parser.add_argument("--refine", action="store_true", help="also the refinement")
    parser.add_argument("--out", type=Path, default=Path("results/encoder.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pretrained = load_encoder("glua3")
    model, population = pretrained.model, pretrained.population
    ways: dict[str, Callable[[ParticleStack], cc.Result]] = {
        "pretrained": lambda particles: cc.encode(pretrained, particles),
        "estimate": lambda particles: estimate(model, particles, population, **QUIET),
    }
    if args.refine:
        ways["refine"] = lambda particles: cc.refine(model, particles, population, **QUIET)
    minutes = {}
    if args.fresh:
        began = time.process_time()
        taught = cc.refine(model, simulate(N_TAUGHT, args.seeds[0] + 1000), **QUIET)
        print(f"population learned in {(time.process_time() - began) / 60:.1f} minutes", flush=True)
        began = time.process_time()
        fresh = train_residual_encoder(taught, seed=args.seeds[0], **QUIET)
        minutes["fresh"] = (time.process_time() - began) / 60
        ways["fresh"] = lambda particles: cc.encode(fresh, particles)
    if args.inputs:
        for name in ("image", "residual"):
            began = time.process_time()
            network = InputNetwork(pretrained, name)
            network.learn(args.seeds[0])
            minutes[name] = (time.process_time() - began) / 60
            ways[name] = network.encode
    for seed in args.seeds:
        for brightness, particles in of_brightness(args.n, seed):
            for way, answer in ways.items():
                row = measure(way, answer, particles, pretrained, brightness)
                row |= {"seed": seed, "way": way, "brightness": brightness, "n": args.n}
                row["minutes"] = minutes.get(way, "")
                write_row(args.out, row)


def simulate(n: int, seed: int, snr_db: float = 0.0) -> ParticleStack:
    closed, opened = cc.match_structures(
        cc.load_structure("glua3-closed"), cc.load_structure("glua3-open")
    )
    path = cc.morph(closed, cc.superpose(opened, closed), n=50)
    return cc.simulate_particles(
        closed, n, conformations=path, box_size=64, snr_db=snr_db, seed=seed, **QUIET
    )


def of_brightness(n: int, seed: int) -> Iterator[tuple[str, ParticleStack]]:
    """The same particles and noise at every brightness; the truth's noise is that at brightness 1.

    Of "spread", which has no one noise, it is that of the images.
    """
    noisy, clean = simulate(n, seed), simulate(n, seed, math.inf)
    noise = noisy.read_images() - clean.read_images()
    least = min(value for value in BRIGHTNESS.values() if value)
    for name, value in BRIGHTNESS.items():
        factor = torch.full((n,), value or 1.0)
        if value is None:
            even = 2 * np.random.default_rng(seed).random(n) - 1
            factor = torch.from_numpy(least**even).float()
        images = factor[:, None, None] * clean.read_images() + noise
        truth = replace(noisy.truth, noise_std=noisy.truth.noise_std / (value or 1.0))
        yield name, replace(noisy, images=images, truth=truth)


def measure(
    way: str,
    answer: Callable[[ParticleStack], cc.Result],
    particles: ParticleStack,
    encoder: ResidualEncoder,
    brightness: str,
) -> dict:
    """Scores and times; what is compiled when first used is not counted."""
    answer(particles[:64])
    began = time.process_time()
    result = answer(particles)
    milliseconds = 1000 * (time.process_time() - began) / len(particles)
    # Of all particles, also those that a way takes for junk since they are too dim.
    result = replace(result, responsibility=None)
    motions = cc.compute_pca(result)
    scores = cc.score(result, motions)
    row = {"explained": scores.explained_motion, "spearman": scores.spearman, "rmsd": scores.rmsd}
    row |= {"ms": milliseconds, "device": "CPU, 1 thread", "date": date.today().isoformat()}
    row |= {"version": version(), "limit": "", "ratio": "", "coverage": ""}
    if BRIGHTNESS[brightness] is not None:
        limit = cc.information_limit(encoder.model, particles)
        row["limit"] = float(np.sqrt(np.mean(limit**2)))
        row["ratio"] = scores.rmsd / row["limit"]
    if result.std is not None:
        axis = torch.from_numpy(motions.components[0]).double()
        true = cc.Result(encoder.model, true_latents(encoder.model, particles)[0])
        miss = motions.transform(result)[:, 0] - motions.transform(true)[:, 0]
        error = error_bar(way, result, axis, encoder)
        row["coverage"] = float(np.mean(np.abs(miss) < 1.96 * error))
    return row


def error_bar(way: str, result: cc.Result, axis: Tensor, encoder: ResidualEncoder) -> np.ndarray:
    """(n,) standard deviation of the scores on an axis of the latents."""
    if way == "refine":
        covariance = posterior_covariance(result, slice(None)).double()
        return (covariance @ axis @ axis).sqrt().numpy()
    # Variances along the leading directions, of which the latents' are made.
    directions, population = encoder.directions, result.population
    told = (directions.square() * encoder.variances).sum(1)
    left = population.covariance.diagonal() - told
    squares = directions.square()
    along = torch.linalg.lstsq(squares, (result.std.double().square() - left).T).solution
    rest = population.covariance - directions @ encoder.variances.diag() @ directions.T
    variance = ((axis @ directions).square() @ along.clamp_min(0)) + axis @ rest @ axis
    return variance.sqrt().numpy()


def write_row(path: Path, row: dict) -> None:
    """Add a row to a table, in place of one that is alike, and print it."""
    texts = {
        name: f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
        for name in COLUMNS
    }
    add_texts(path, texts, ("seed", "way", "brightness", "n"))
    print("  ".join(texts[name] for name in COLUMNS[:12]), flush=True)


class InputNetwork(nn.Module):
    """What a convolutional network makes of an image, or of its residual, at a known pose."""

    def __init__(self, encoder: ResidualEncoder, given: str) -> None:
        super().__init__()
        self.expected = encoder.expected_images("cpu")
        self.given = given
        layers: list[nn.Module] = []
        before = 2
        for filters in FILTERS:
            stride = 1 if filters == FILTERS[0] else 2
            layers += [nn.Conv2d(before, filters, 3, stride, 1), nn.ReLU()]
            layers += [nn.Conv2d(filters, filters, 3, 1, 1), nn.ReLU()]
            before = filters
        self.features = nn.Sequential(*layers, nn.Flatten())
        n_features = FILTERS[-1] * (MAP_SIZE // 8) ** 2 + 9
        k = len(encoder.variances)
        self.head = nn.Sequential(
            nn.Linear(n_features, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, k)
        )

    def forward(self, images: Tensor, rotations: Tensor, ctf: Tensor) -> Tensor:
        """(b, k) Å along the leading directions of images (b, 64, 64) without shifts."""
        observed = torch.fft.rfft2(images, norm="ortho")
        if self.given == "image":
            maps = [observed, observed * ctf]
        else:
            microscope = self.expected.model.microscope
            mean = self.expected.model.bead_dynamics.decode(self.expected.mean[None])
            coords = mean.expand(len(images), -1, -1)
            expected = microscope.spectrum(microscope.image_positions(coords, rotations))
            filtered = expected * ctf
            scale = (filtered.conj() * observed).real.sum((1, 2), keepdim=True)
            scale = scale / filtered.abs().square().sum((1, 2), keepdim=True)
            maps = [(observed / scale - filtered) * ctf, expected]
        spectra = torch.stack(maps, dim=1)
        half = MAP_SIZE // 2
        low = torch.cat([spectra[:, :, :half], spectra[:, :, -half:]], dim=2)[..., : half + 1]
        inputs = torch.fft.irfft2(low, s=(MAP_SIZE, MAP_SIZE), norm="ortho")
        inputs = inputs / inputs.std(dim=(0, 2, 3), keepdim=True)
        features = torch.cat([self.features(inputs), rotations.flatten(1)], dim=1)
        return self.head(features) * self.expected.spread

    def learn(self, seed: int) -> None:
        """From drawn particles, with squared errors in Å²."""
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        steps = INPUT_DRAWS // INPUT_BATCH
        pool = simulate(2000, seed + 2000).ctf
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            images, rotations, ctf, true = self.draw(seed * steps + step, pool)
            loss = (self(images, rotations, ctf) - true).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def draw(self, seed: int, pool: CTF) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, rotations, CTFs and true Å along the directions."""
        model, population = self.expected.model, self.expected.population
        generator = torch.Generator().manual_seed(seed)
        latents = draw_latents(population, INPUT_BATCH, generator)
        rotations = random_rotations(INPUT_BATCH, seed)
        rows = torch.randint(len(pool), (INPUT_BATCH,), generator=generator)
        ctf = pool[rows].evaluate(model.box_size, model.pixel_size)
        images = model.render(latents, rotations, None, ctf)
        images += population.noise_std * torch.randn(images.shape, generator=generator)
        moved = (latents - self.expected.mean) * model.atom_share
        return images, rotations, ctf, moved @ self.expected.basis

    @torch.no_grad()
    def encode(self, particles: ParticleStack) -> cc.Result:
        answers = [self(b.images, b.rotations, b.ctf) for b in particles.batches(INPUT_BATCH)]
        latents = self.expected.mean + torch.cat(answers) @ self.expected.basis.T
        return cc.Result(self.expected.model, latents, particles=particles)


def draw_latents(population: Population, n: int, generator: torch.Generator) -> Tensor:
    root = torch.linalg.cholesky(population.covariance)
    normal = torch.randn(n, len(root), generator=generator, dtype=torch.float64)
    return (population.mean + normal @ root.T).float()


if __name__ == "__main__":
    main()
