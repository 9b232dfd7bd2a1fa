"""Processes that meet at a key-value store and wait for each other a limited time: who does not come can be named.

A collective that waits for a dead process ends, if at all, with an error that names nobody. Here every process posts what it
found under its own key, rank 0 collects what is there in time, and says how to go on.

Anyone on the network can write to the store. So what is posted is JSON, and is read as the type that is expected or not at all;
anything else counts as no answer.
"""

from __future__ import annotations

import json
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from datetime import timedelta
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not listed

from scale_mae.config import UserError
from scale_mae.distributed.launcher import expand_host_list, get_rank_and_world_size, tasks_on_node

T = TypeVar("T")
V = TypeVar("V")
GRACE = 15.0  # seconds that others wait for rank 0 after it has stopped waiting for them
_hanging: list[threading.Thread] = []


class LostError(Exception):
    """Rank 0 cannot be reached, or says nothing."""


@dataclass(frozen=True)
class CallResult(Generic[T]):
    """What an action gave, or why it gave nothing."""

    value: T | None
    error: str = ""


def within(seconds: float, action: Callable[[], T]) -> CallResult[T]:
    """Run an action in a thread and wait a limited time. One that hangs is left behind; it ends with the process."""
    outcomes: queue.Queue[CallResult[T]] = queue.Queue()

    def run() -> None:
        try:
            outcomes.put(CallResult(action()))
        except Exception as error:  # whatever a broken device or file system raises is what was to be found out
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            outcomes.put(CallResult(None, (reason.strip().splitlines() or [""])[0] or type(error).__name__))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return outcomes.get(timeout=seconds)
    except queue.Empty:
        _hanging.append(thread)
        return CallResult(None, f"no end in {seconds:g} s")


def hanging() -> bool:
    """Whether an action still hangs; the interpreter should then not be left to end in order."""
    return any(thread.is_alive() for thread in _hanging)


class Rendezvous:
    """The processes of a job, before and beside any process group.

    Args:
        timeout: seconds until rank 0 must have been reached.

    Attributes:
        rank, size: this process among all.
        store: where they meet.

    Raises:
        LostError: rank 0 was not there in time.
        UserError: rank variables that make no sense, or a port in use.
    """

    def __init__(self, timeout: float) -> None:
        self._since = time.monotonic()
        self.rank, self.size = get_rank_and_world_size()
        self.store = self._meet(timedelta(seconds=timeout))

    def settle(
        self, stage: str, value: V, kinds: tuple[type[V], type[T]], judge: Callable[[dict[int, V]], T], seconds: float
    ) -> T:
        """Post a value; rank 0 judges those of all that posted in time, by rank; its judgement is returned to every process.

        Args:
            kinds: types of a value and of the judgement.
            seconds: that rank 0 waits, counted from the end of the last stage.

        Raises:
            LostError: no judgement came.
        """
        self._post(f"{stage}/{self.rank}", value)
        if self.rank:
            return self._hear(stage, kinds[1], seconds + GRACE)
        judgement = judge(self._collect(stage, kinds[0], range(self.size), seconds))
        self.tell(stage, judgement)
        return judgement

    def tell(self, stage: str, judgement: Any) -> None:
        """Rank 0: give every process a judgement."""
        self._post(f"{stage}/judgement", judgement)
        self._since = time.monotonic()

    def hear(self, stage: str, kind: type[T]) -> T:
        """Others: what rank 0 tells."""
        return self._hear(stage, kind, GRACE)

    def leave(self, value: V, kind: type[V], ranks: list[int]) -> dict[int, V]:
        """Post a last value. Rank 0, which keeps the store, waits for those of ``ranks`` and gives them."""
        self._post(f"left/{self.rank}", value)
        return {} if self.rank else self._collect("left", kind, ranks, GRACE)

    def linger(self) -> None:
        """Others: end after rank 0 has called this, since a launcher may end a job with its first failed process."""
        if self.rank == 0:
            self.store.set("over", "")
            return
        with suppress(RuntimeError):
            self.store.wait(["over"], timedelta(seconds=GRACE))

    def _post(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps(value, default=_plain))
        except RuntimeError as error:
            raise LostError(str(error).splitlines()[0]) from None

    def _hear(self, stage: str, kind: type[T], seconds: float) -> T:
        key = f"{stage}/judgement"
        try:
            self.store.wait([key], timedelta(seconds=max(1.0, self._since + seconds - time.monotonic())))
            self._since = time.monotonic()
            return _read(kind, self.store.get(key))
        except (RuntimeError, ValueError) as error:
            raise LostError(str(error).splitlines()[0]) from None

    def _collect(self, stage: str, kind: type[V], ranks: Iterable[int], seconds: float) -> dict[int, V]:
        keys = {rank: f"{stage}/{rank}" for rank in ranks}
        try:
            self.store.wait(list(keys.values()), timedelta(seconds=max(1.0, self._since + seconds - time.monotonic())))
        except RuntimeError:
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        values = {}
        for rank, key in keys.items():
            with suppress(ValueError):
                values[rank] = _read(kind, self.store.get(key))
        return values

    def _meet(self, timeout: timedelta) -> Any:
        if self.size == 1 and "MASTER_ADDR" not in os.environ:
            return HashStore()
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise UserError(f"MASTER_ADDR or MASTER_PORT is missing or wrong: {error}; use torchrun or srun") from None
        # torchrun keeps the store itself, through all restarts of its processes
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeps = self.rank == 0 and not agent
        try:
            store = TCPStore(host, port, is_master=keeps, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:
            if keeps:
                raise UserError(f"{host}:{port} cannot be opened ({str(error).splitlines()[0]}); set MASTER_PORT") from None
            raise LostError(f"nobody at {host}:{port}") from None
        return PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _plain(value: Any) -> Any:
    """What JSON has no form for: bytes as hexadecimal digits, a dataclass as its attributes."""
    return value.hex() if isinstance(value, bytes) else vars(value)


def _read(kind: type[T], posted: bytes) -> T:
    """The value in what was posted.

    Raises:
        ValueError: it is malformed, or not of that type.
    """
    try:
        return _typed(kind, json.loads(posted))  # type: ignore[no-any-return]
    except (ValueError, OverflowError, RecursionError):
        raise ValueError("something malformed was posted") from None


def _typed(kind: Any, plain: Any) -> Any:
    """What JSON gave, as the type: a simple one or one of those that tell what they hold (``list[int]``, a dataclass).

    Raises:
        ValueError: it is not of that type.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):  # with None
        return None if plain is None else _typed(next(one for one in inner if one is not NoneType), plain)
    if type(plain) is dict and origin is dict:
        return {key: _typed(inner[1], value) for key, value in plain.items()}
    if type(plain) is dict and is_dataclass(origin) and plain.keys() == (hints := get_type_hints(origin)).keys():
        kinds = {name: hint[inner] if getattr(hint, "__parameters__", ()) else hint for name, hint in hints.items()}
        return origin(**{name: _typed(kinds[name], value) for name, value in plain.items()})  # type: ignore[operator]
    if origin in (list, tuple) and type(plain) is list:
        each = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(plain)
        return origin(_typed(one, value) for one, value in zip(each, plain, strict=True))
    if kind is bytes and type(plain) is str:
        return bytes.fromhex(plain)
    number = kind is float and type(plain) in (int, float) and math.isfinite(plain)
    if not number and not (kind in (bool, int, str, NoneType) and type(plain) is kind):
        raise ValueError(f"not of type {kind}")
    return plain


def node_name() -> str:
    """What Slurm calls this machine, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def expected() -> dict[str, int]:
    """Processes that Slurm starts on each node, by name; empty where that cannot be known."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    try:
        names = expand_host_list(nodes) if nodes else []
        return {name: tasks_on_node(tasks, number) if tasks else 1 for number, name in enumerate(names)}
    except (UserError, ValueError, IndexError):
        return {}
