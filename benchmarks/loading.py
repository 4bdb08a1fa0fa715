"""Time and memory of opening large tables of particles, and of scattered images of a cold stack.

The stacks are sparse files: as long as real ones, with real pixels where images are read. Before
images are read their files are dropped from the system's cache (posix_fadvise), which Linux does;
what a disk of its own accord keeps in memory stays there. Each table is opened by a fresh process,
whose peak memory counts the interpreter and its libraries.

    python benchmarks/loading.py --rows 200000 1000000
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mrcfile
import numpy as np

BOX = 128
PIXEL = 1.5
# Images in a stack of the tables of many.
STACK = 200_000
SCATTERED = 500


def write_sparse(path: Path, n: int, rows: np.ndarray) -> None:
    """A stack of n images, of which those at `rows` have pixels and take room on the disk."""
    rng = np.random.default_rng(0)
    with mrcfile.new(path, np.zeros((1, BOX, BOX), dtype=np.float32), overwrite=True) as mrc:
        mrc.set_image_stack()
        mrc.voxel_size = PIXEL
        mrc.header.nz = n
        mrc.header.mz = 1
    with open(path, "r+b") as file:
        file.truncate(1024 + n * BOX**2 * 4)
        for row in rows:
            file.seek(1024 + int(row) * BOX**2 * 4)
            file.write(rng.normal(size=(BOX, BOX)).astype(np.float32).tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_star(path: Path, n: int, rng: np.random.Generator) -> None:
    """Fourteen columns, as a refinement of RELION's has."""
    names = "ImageName MicrographName AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst "
    names += "DefocusU DefocusV DefocusAngle RandomSubset OpticsGroup MaxValueProbDistribution "
    names += "LogLikeliContribution"
    optics = "OpticsGroup Voltage SphericalAberration AmplitudeContrast ImagePixelSize ImageSize"
    numbers = rng.uniform(0, 180, (n, 10))
    with open(path, "w") as file:
        file.write("data_optics\n\nloop_\n")
        file.writelines(f"_rln{name} #{i}\n" for i, name in enumerate(optics.split(), 1))
        file.write(f"1 300 2.7 0.1 {PIXEL} {BOX}\n\n\ndata_particles\n\nloop_\n")
        file.writelines(f"_rln{name} #{i}\n" for i, name in enumerate(names.split(), 1))
        for i, row in enumerate(numbers.tolist()):
            rot, tilt, psi, x, y, u, v, angle, share, log = row
            file.write(
                f"{i % STACK + 1:06d}@stack{i // STACK}.mrcs mic{i // 300:06d}.mrc {rot:.6f} "
                f"{tilt:.6f} {psi:.6f} {x / 20:.6f} {y / 20:.6f} {1e4 + u:.6f} {1e4 + v:.6f} "
                f"{angle:.6f} {i % 2 + 1} 1 {share / 180:.6f} {1e5 + log:.6f}\n"
            )


def write_cs(path: Path, n: int, rng: np.random.Generator) -> None:
    """Fields of a refinement of cryoSPARC's."""
    kinds = [("uid", "<u8"), ("blob/path", "S40"), ("blob/idx", "<u4"), ("blob/shape", "<u4", 2)]
    kinds += [("blob/psize_A", "<f4"), ("blob/sign", "<f4"), ("location/micrograph_path", "S120")]
    names = "accel_kv cs_mm amp_contrast df1_A df2_A df_angle_rad phase_shift_rad scale bfactor"
    kinds += [(f"ctf/{name}", "<f4") for name in names.split()]
    kinds += [("ctf/anisomag", "<f4", 4), ("ctf/tilt_A", "<f4", 2)]
    kinds += [("alignments3D/pose", "<f4", 3), ("alignments3D/shift", "<f4", 2)]
    kinds += [("alignments3D/psize_A", "<f4"), ("alignments3D/error", "<f4")]
    array = np.zeros(n, dtype=kinds)
    index = np.arange(n)
    array["uid"] = rng.permutation(n)
    array["blob/path"] = np.char.add(b">stack", np.char.add((index // STACK).astype("S"), b".mrcs"))
    array["blob/idx"], array["blob/shape"], array["blob/psize_A"] = index % STACK, BOX, PIXEL
    array["blob/sign"], array["alignments3D/psize_A"], array["ctf/scale"] = 1, PIXEL, 1
    array["ctf/accel_kv"], array["ctf/cs_mm"], array["ctf/amp_contrast"] = 300, 2.7, 0.1
    array["ctf/df1_A"], array["ctf/df2_A"] = rng.uniform(1e4, 2e4, (2, n))
    array["alignments3D/pose"] = rng.normal(size=(n, 3))
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def scattered_rows(n: int, repeat: int) -> np.ndarray:
    return np.sort(np.random.default_rng(1 + repeat).choice(n, SCATTERED, replace=False))


def drop_from_cache(paths: list[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(path: Path, repeats: int) -> dict:
    """Seconds and peak GB of opening a table, and seconds of reading cold images."""
    import cryochains as cc

    start = time.perf_counter()
    particles = cc.load_particles(path)
    opened = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    cold = []
    for repeat in range(repeats):
        rows = scattered_rows(len(particles), repeat)
        drop_from_cache(list(particles.images.paths))
        start = time.perf_counter()
        images = particles.read_images(rows)
        cold.append(time.perf_counter() - start)
        # No hole of the file was read.
        if not bool(images.flatten(1).std(dim=1).gt(0.5).all()):
            raise ValueError(f"expected pixels in every image of {path}, got none in some")
    return {"open_s": opened, "peak_gb": peak, "cold_s": cold}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are put; default: a new one")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(folder: Path, n: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    chosen = np.unique(np.concatenate([scattered_rows(n, repeat) for repeat in range(repeats)]))
    for number in range(-(-n // STACK)):
        inside = chosen[chosen // STACK == number] % STACK
        write_sparse(folder / f"stack{number}.mrcs", min(STACK, n - number * STACK), inside)
    for suffix, write in ((".star", write_star), (".cs", write_cs)):
        path = folder / f"particles{suffix}"
        write(path, n, rng)
        command = [sys.executable, __file__, "--measure", str(path), "--repeats", str(repeats)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        cold = " ".join(f"{seconds:.2f}" for seconds in measured["cold_s"])
        print(
            f"{suffix:6}{n:>10,} rows × {BOX} px: open {measured['open_s']:.1f} s, peak "
            f"{measured['peak_gb']:.2f} GB, {SCATTERED} scattered cold images {cold} s",
            flush=True,
        )


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.repeats)))
        return
    for n in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            run(Path(folder), n, arguments.repeats)


if __name__ == "__main__":
    main()
