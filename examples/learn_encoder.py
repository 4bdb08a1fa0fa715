"""Train the encoder that comes with the package: the GluA3 morph (synthetic particles).

It is taught by draws from the population of `learn_population.py`, with CTFs of a 300 kV microscope
at 1 to 2.5 µm; none of the particles' images teaches it anything. Its scores are those of
`benchmarks/encoder.py`.
"""

import argparse
import time
from pathlib import Path

import cryochains as cc
from cryochains.inference import estimate, train_residual_encoder


def main() -> None:
    args = parse_arguments()
    closed, opened = cc.match_structures(
        cc.load_structure("glua3-closed"), cc.load_structure("glua3-open")
    )
    path = cc.morph(closed, cc.superpose(opened, closed), n=50)
    # Their CTFs alone are used. The seed of the particles that the population was learned from.
    particles = cc.simulate_particles(closed, 2000, conformations=path, box_size=64, seed=100)
    model = cc.Model(closed, particles, modes=20)
    result = estimate(model, particles, cc.load_population("glua3"))
    began = time.perf_counter()
    encoder = train_residual_encoder(result, draws=args.draws, seed=args.seed)
    minutes = (time.perf_counter() - began) / 60
    encoder.save(args.out)
    last = encoder.history[-1]
    print(f"{encoder}: {minutes:.1f} minutes; {args.out}: {args.out.stat().st_size / 1e3:.0f} kB")
    print(f"explained motion of held-out draws {last['explained_motion']:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200_000, help="images to learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/glua3-encoder.safetensors"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
