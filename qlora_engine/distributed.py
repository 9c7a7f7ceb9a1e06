"""The processes that torchrun started, as one program: who writes, errors in common, one last line.

A command that was not started by torchrun is a world of one process; everything here is then free.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from .errors import InputError

T = TypeVar("T")
_WAIT = timedelta(hours=12)  # for a process that still works; torchrun ends the others of one that died
_LAST_WORD = timedelta(seconds=10)


class Terminated(BaseException):
    """torchrun asked this process to end, because another one did."""


@dataclass(frozen=True)
class World:
    """This process among those of the run; ``local_rank`` counts on its machine and picks the GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def world() -> World:
    """What torchrun's environment says.

    Raises:
        InputError: half of it is there.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return World()
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE is set, but not all that torchrun sets with it: {error}") from error
    return World(rank, size, local_rank)


@cache
def _store() -> Any:
    """Keys that all processes see; torchrun's own server where it has one, so that it outlives rank 0."""
    import torch.distributed

    dist: Any = torch.distributed  # whose stubs do not name the stores
    here = world()
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        here.size,
        is_master=here.is_main and not served,
        timeout=_WAIT,
        multi_tenant=True,  # Trainer's libraries may ask for it again
    )
    return dist.PrefixStore(f"qlora-engine/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(device_type: str) -> World:
    """Connect the processes (once); nothing in a world of one.

    Args:
        device_type: "cpu": everything through gloo; "cuda": tensors of the GPUs through NCCL.
    """
    here = world()
    if here.size == 1:
        return here
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(here.local_rank)
        backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=_store(), rank=here.rank, world_size=here.size, timeout=_WAIT)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
    return here


def leave() -> None:
    """Disconnect, once all have come so far: a process that ends first would take its connections away."""
    if world().size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; torchrun kills after half a minute
    raise Terminated


def barrier() -> None:
    """Wait for all."""
    if world().size > 1:
        import torch.distributed as dist

        dist.barrier()


def together(work: Callable[[], T]) -> T:
    """Do ``work`` in every process and wait for all.

    Returns:
        This process's result.

    Raises:
        InputError, OSError: ``work`` failed so in any process; all raise the error of the first that did.
    """
    here = world()
    if here.size == 1:
        return work()
    import torch.distributed as dist

    problem: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except (InputError, OSError) as error:
        problem = error
    problems: list[Any] = [None] * here.size
    dist.all_gather_object(problems, problem if problem is None else _sendable(problem))
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise first from problem
    return result  # type: ignore[no-any-return]


def from_main(work: Callable[[], T]) -> T:
    """What ``work`` gives in the main process, to all; its errors as in ``together``."""
    here = world()
    if here.size == 1:
        return work()
    import torch.distributed as dist

    found: list[Any] = [together(lambda: work() if here.is_main else None)]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Every process's value, the first one's first; all must call it."""
    here = world()
    if here.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * here.size
    dist.all_gather_object(values, value)
    return values


def total(value: float) -> float:
    """The sum over all processes."""
    return float(sum(gather(value)))


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of somebody else's that cannot be rebuilt from its arguments
        return InputError(str(error))
    return error


def say_once(say: Callable[[], None]) -> None:
    """Let one process have the last word: the first that asks says it, the others wait until it is said."""
    if world().size == 1:
        say()
        return
    import torch.distributed as dist

    try:
        if _store().add("last word", 1) == 1:
            say()
            _store().set("said", "1")
        else:
            _store().wait(["said"], _LAST_WORD)
    except dist.DistError:  # the server is gone: torchrun has ended
        say()


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` is what a process sees of the end of another."""
    if isinstance(error, Terminated):
        return True
    if world().size == 1:
        return False
    import torch.distributed as dist

    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
