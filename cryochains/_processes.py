"""Several processes that share the particles, such as ``torchrun`` or SLURM's ``srun`` start.

Each process looks at its own share of the particles. What is learned from all of them is gathered
or summed, so that every process knows the same; the first one writes. Nothing here is needed to run
in one process, where every function gives back what it is given.
"""

import atexit
import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Value = TypeVar("_Value")
# A process may wait that long for the others, such as for the first one's reading of a folder.
_TIMEOUT = timedelta(hours=1)
# Ports that SLURM jobs of one node meet at.
_FIRST_PORT = 20_000
_PORTS = 20_000


def n_processes() -> int:
    """How many processes share the particles; they are joined when this is first asked."""
    group = _group()
    return 1 if group is None else dist.get_world_size(group)


def _rank() -> int:
    """Number of this process, from 0."""
    group = _group()
    return 0 if group is None else dist.get_rank(group)


def local_rank() -> int:
    """Number of this process among those of its computer, from 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return _rank() == 0


def own_share(n: int) -> slice:
    """Of n rows those that this process looks at; the shares follow each other."""
    return _share(n, _rank())


def _share(n: int, rank: int) -> slice:
    size = n_processes()
    return slice(n * rank // size, n * (rank + 1) // size)


def gather(own: Tensor, n: int) -> Tensor:
    """(n, …) of all particles, from each process's (own, …); the same in every process."""
    group = _group()
    if group is None:
        return own
    shares = [_share(n, rank) for rank in range(n_processes())]
    counts = [share.stop - share.start for share in shares]
    # Of equal size, as the exchange wants it.
    padded = torch.zeros(max(counts), *own.shape[1:], dtype=_sent_dtype(own))
    padded[: len(own)] = own.detach().cpu()
    parts = [torch.empty_like(padded) for _ in counts]
    _exchange(lambda: dist.all_gather(parts, padded, group=group))
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole.to(device=own.device, dtype=own.dtype)


def total(own: Tensor) -> Tensor:
    """Sum over all processes of tensors of one shape; the same in every process."""
    group = _group()
    if group is None:
        return own
    summed = own.detach().cpu().clone().contiguous()
    _exchange(lambda: dist.all_reduce(summed, group=group))
    return summed.to(own.device)


def agree(own: Tensor) -> Tensor:
    """The first process's tensor, of one shape in all.

    Processors of different make may round differently.
    """
    group = _group()
    if group is None:
        return own
    agreed = own.detach().to("cpu", _sent_dtype(own), copy=True).contiguous()
    _exchange(lambda: dist.broadcast(agreed, src=0, group=group))
    return agreed.to(device=own.device, dtype=own.dtype)


def from_first(make: Callable[[], _Value]) -> _Value:
    """What the first process makes, in every process; what it refuses, all refuse."""
    group = _group()
    if group is None:
        return make()
    answer: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            answer[0] = make()
        except (ValueError, OSError) as error:
            answer[1] = error
    _exchange(lambda: dist.broadcast_object_list(answer, src=0, group=group))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather_answers(own: list[_Value], device: torch.device) -> list[_Value]:
    """What the processes have in their lists, in one list; the same in every process.

    Answers are tensors, or tuples or dicts of them, and come to this process's `device`.
    """
    group = _group()
    if group is None:
        return own
    parts: list[Any] = [None] * n_processes()
    sent = _moved_to(own, torch.device("cpu"))
    _exchange(lambda: dist.all_gather_object(parts, sent, group=group))
    return [_moved_to(answer, device) for part in parts for answer in part]


def require_same(**values: object) -> None:
    """Raise ValueError unless every process was given the same; values are short, by name."""
    group = _group()
    if group is None:
        return
    parts: list[Any] = [None] * n_processes()
    _exchange(lambda: dist.all_gather_object(parts, values, group=group))
    differing = [name for name in values if any(part[name] != parts[0][name] for part in parts)]
    if differing:
        raise ValueError(
            f"expected the same {' and '.join(differing)} in all {len(parts)} processes, which "
            "share the particles, got others in some; try one process for each job"
        )


def _moved_to(answer: Any, device: torch.device) -> Any:
    if isinstance(answer, Tensor):
        return answer.detach().to(device)
    if isinstance(answer, dict):
        return {name: _moved_to(value, device) for name, value in answer.items()}
    return type(answer)(_moved_to(value, device) for value in answer)


def _sent_dtype(tensor: Tensor) -> torch.dtype:
    return torch.uint8 if tensor.dtype == torch.bool else tensor.dtype


def _exchange(work: Callable[[], object]) -> None:
    """Talk to the other processes; ConnectionError where one of them has ended."""
    try:
        work()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"expected all {n_processes()} processes to go on, got none from one of them "
            f"({reason}); try its message, then the same command, which goes on where it was"
        ) from error


def _group() -> dist.ProcessGroup | None:
    """All processes; None where there is one."""
    if dist.is_available() and dist.is_initialized():
        return _cpu_group() if dist.get_world_size() > 1 else None
    started = _started_together(os.environ)
    if started is None:
        return None
    rank, size, address, port = started
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    atexit.register(_leave)
    return _cpu_group()


@cache
def _cpu_group() -> dist.ProcessGroup:
    """What is exchanged is small, and in the memory of CPUs."""
    default = dist.group.WORLD
    if default is not None and dist.get_backend() == "gloo":
        return default
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _started_together(environment: Mapping[str, str]) -> tuple[int, int, str, int] | None:
    """Rank, number of processes, address and port of those that were started together.

    By torchrun or accelerate, which name them all, or by SLURM's srun. None for a process alone.

    Examples
    --------
    >>> _started_together({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"})
    (1, 2, 'n1', 29500)
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1 and "RANK" in environment:
        return (
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment.get("MASTER_ADDR", "localhost"),
            int(environment.get("MASTER_PORT", "29500")),
        )
    # A batch script itself has the job's number of tasks, but no step's.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size < 2 or "SLURM_PROCID" not in environment:
        return None
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    return (
        int(environment["SLURM_PROCID"]),
        size,
        environment.get("MASTER_ADDR", _first_node(environment["SLURM_STEP_NODELIST"])),
        int(environment.get("MASTER_PORT", _FIRST_PORT + job % _PORTS)),
    )


def _first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as node03 of node[03-05,9],other."""
    first = re.match(r"([^\[,]+)(?:\[(\d+))?([^,\[\]]*)?", nodes)
    if first is None:
        raise ValueError(f"expected SLURM's list of nodes, got {nodes!r}; try setting MASTER_ADDR")
    return f"{first[1]}{first[2] or ''}"
