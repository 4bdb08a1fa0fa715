"""The command line, for where no notebook is: thin over `check`, `refine` and `reconstruct`.

Exit status: 0 where all is well, 1 where input is refused (one sentence says why), 2 for a wrong
command, and of ``check`` 3 where something has to be mended first.

Several processes, started by ``torchrun … -m cryochains`` or ``srun cryochains``, share the
particles.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .images import ParticleStack
    from .model import Model

_REFUSED = (ValueError, OSError, ImportError)
_TO_BE_MENDED = 3
# Seconds between two lines of progress in a log file.
_LOG_INTERVAL = "60"


def _in_one_sentence(command: Callable) -> Callable:
    """The command, whose refusals are one sentence and no traceback."""

    @wraps(command)
    def answered(**arguments: Any) -> None:
        try:
            command(**arguments)
        except _REFUSED as error:
            raise click.ClickException(str(error)) from error

    return answered


class _Lines:
    """Standard error of a log file: what a terminal would overwrite becomes lines."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """All that is not an empty line of a progress bar."""
        lines = text.replace("\r", "\n")
        return self.stream.write(lines if lines.strip() or text == "\n" else "")

    def flush(self) -> None:
        """As of the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """It is a file."""
        return False

    def fileno(self) -> int:
        """As of the stream."""
        return self.stream.fileno()


def _particle_options(command: Callable) -> Callable:
    """Arguments and options that say which particles, in which order they are shown."""
    options = [
        click.argument("particles", type=click.Path(path_type=Path)),
        click.option(
            "--box-size", type=int, metavar="PX", help="Crop to this even box, in Fourier space."
        ),
        click.option("--invert", is_flag=True, help="Protein is dark in the images."),
        click.option(
            "--datadir", type=click.Path(path_type=Path), help="Folder of the image stacks."
        ),
        click.option(
            "--device",
            metavar="NAME",
            help="Such as cpu or cuda; by default a GPU where there is one.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _model_options(command: Callable) -> Callable:
    """Arguments and options that say which model."""
    options = [
        click.argument("structure"),
        click.option(
            "--bodies",
            type=click.Choice(["chains", "domains"]),
            default="chains",
            show_default=True,
            help="What moves as one.",
        ),
        click.option(
            "--modes",
            type=click.IntRange(min=0),
            default=20,
            show_default=True,
            help="Normal modes of each body.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _open_particles(
    path: Path, box_size: int | None, invert: bool, datadir: Path | None
) -> "ParticleStack":
    from .images import load_particles

    return load_particles(path, invert, box_size=box_size, datadir=datadir)


def _open_model(structure: str, bodies: str, modes: int, particles: "ParticleStack") -> "Model":
    from .model import Model
    from .molecule import load_structure

    return Model(load_structure(structure, bodies=bodies), particles, modes=modes)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cryochains")
def main() -> None:
    """How the chains of a molecule move, from cryo-EM particle images with known poses."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", _LOG_INTERVAL)
        sys.stderr = _Lines(sys.stderr)  # type: ignore[assignment]


@main.command("check", short_help="Do the particles show the structure?")
@_particle_options
@_model_options
@_in_one_sentence
def _check(particles, structure, box_size, invert, datadir, device, bodies, modes) -> None:
    """Look whether PARTICLES (.star or .cs) show STRUCTURE (a file, a PDB id) as their table says.

    Takes under a minute. The exit status is 3 where something has to be mended first.
    """
    from ._processes import is_first
    from .inference import check

    stack = _open_particles(particles, box_size, invert, datadir)
    report = check(_open_model(structure, bodies, modes, stack), stack, device=device)
    if is_first():
        click.echo(repr(report))
    if report.problem:
        sys.exit(_TO_BE_MENDED)


@main.command("refine", short_help="Find how every particle moves.")
@_particle_options
@_model_options
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run."
)
@click.option(
    "--population", "known", metavar="FILE", help="A population, or the name of one, that is known."
)
@click.option(
    "--n-population",
    type=click.IntRange(min=1),
    default=4000,
    show_default=True,
    help="Particles that are refined together.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Chooses those that teach the population first.",
)
@click.option(
    "--no-check", is_flag=True, help="Do not refuse particles that are certainly misread."
)
@_in_one_sentence
def _refine(
    particles,
    structure,
    box_size,
    invert,
    datadir,
    device,
    bodies,
    modes,
    out,
    known,
    n_population,
    seed,
    no_check,
) -> None:
    """Find how every particle of PARTICLES bends, turns and shifts the chains of STRUCTURE.

    A run that was cut goes on where it was when the same command is given again. In Python,
    cc.load_result(FOLDER) opens what it wrote.
    """
    from ._processes import is_first
    from .inference import RESULT_FILE, refine, remove_run_states
    from .model import load_population

    path = out / RESULT_FILE
    if path.exists():
        raise ValueError(
            f"expected a folder without a result, got one at {path}; try another folder, or move it"
        )
    stack = _open_particles(particles, box_size, invert, datadir)
    model = _open_model(structure, bodies, modes, stack)
    result = refine(
        model,
        stack,
        None if known is None else load_population(known),
        n_population=n_population,
        check=not no_check,
        seed=seed,
        checkpoint=out,
        device=device,
    )
    if not is_first():
        return
    result.save(path)
    remove_run_states(out)
    click.echo(repr(result))
    click.echo(repr(result.verdict))
    click.echo(f"written: {path}")


@main.command("reconstruct", short_help="A map of the particles.")
@_particle_options
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Map, such as map.mrc."
)
@click.option("--structure", metavar="FILE", help="The map lies over this structure.")
@_in_one_sentence
def _reconstruct(particles, box_size, invert, datadir, device, out, structure) -> None:
    """Reconstruct a map of PARTICLES from their images and poses alone."""
    from ._processes import is_first
    from .images import reconstruct
    from .molecule import load_structure

    stack = _open_particles(particles, box_size, invert, datadir)
    origin = None if structure is None else load_structure(structure).origin
    density = reconstruct(stack, origin=origin, device=device)
    if not is_first():
        return
    density.save(out)
    click.echo(repr(density))
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
