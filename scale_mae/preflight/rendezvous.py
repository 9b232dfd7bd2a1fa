"""A rendezvous of all processes at a key-value store, with time limits that identify missing processes.

A collective that waits for a dead process ends, if at all, with an error that does not identify the process. Here every
process posts its results under its own key. Rank 0 collects the results that arrive in time and decides how to continue.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not listed

from scale_mae.config import UserError
from scale_mae.distributed.launcher import count_tasks_on_node, expand_host_list, get_rank_and_world_size
from scale_mae.preflight import typed_json

D = TypeVar("D")
V = TypeVar("V")
GRACE_SECONDS = 15.0  # other processes wait for rank 0 this much longer than rank 0 waits for them


class RendezvousError(Exception):
    """Rank 0 cannot be reached or does not answer."""


class Rendezvous:
    """The connection of this process to all other processes of the job. It needs no process group.

    Args:
        timeout: Seconds in which rank 0 must be reachable.

    Attributes:
        rank: Rank of this process.
        world_size: Number of processes.
        store: The key-value store.

    Raises:
        RendezvousError: Rank 0 cannot be reached in time.
        UserError: The rank variables are invalid, or the port of the store is in use.
    """

    def __init__(self, timeout: float) -> None:
        self._stage_start = time.monotonic()
        self.rank, self.world_size = get_rank_and_world_size()
        self.store = self._open_store(timedelta(seconds=timeout))

    def gather_and_decide(
        self,
        stage: str,
        value: V,
        value_type: type[V],
        decision_type: type[D],
        decide: Callable[[dict[int, V]], D],
        seconds: float,
    ) -> D:
        """Post a value and return the decision of rank 0. All processes call this.

        Args:
            stage: Name of the stage; the same in all processes.
            value: The value of this process.
            value_type: Type of the value.
            decision_type: Type of the decision.
            decide: Rank 0 calls this with the values that arrived in time, by rank.
            seconds: How long rank 0 waits for the values, from the end of the previous stage.

        Raises:
            RendezvousError: The decision does not arrive in time.
        """
        self._post(f"{stage}/{self.rank}", value)
        if self.rank:
            return self._receive(stage, decision_type, seconds + GRACE_SECONDS)
        decision = decide(self._collect(stage, value_type, range(self.world_size), seconds))
        self.publish_decision(stage, decision)
        return decision

    def publish_decision(self, stage: str, decision: Any) -> None:
        """Send a decision to all other processes. Only rank 0 calls this."""
        self._post(f"{stage}/decision", decision)
        self._stage_start = time.monotonic()

    def receive_decision(self, stage: str, decision_type: type[D]) -> D:
        """Wait for a decision of rank 0 and return it. All ranks except rank 0 call this.

        Raises:
            RendezvousError: The decision does not arrive in time.
        """
        return self._receive(stage, decision_type, GRACE_SECONDS)

    def post_last_value(self, value: V, value_type: type[V], ranks: list[int]) -> dict[int, V]:
        """Post a last value. On rank 0, wait for the values of ``ranks`` and return them; on other ranks return nothing."""
        self._post(f"last/{self.rank}", value)
        return {} if self.rank else self._collect("last", value_type, ranks, GRACE_SECONDS)

    def wait_for_rank_0_to_end(self) -> None:
        """On rank 0, let the other processes end. On other ranks, wait for that.

        A launcher may end the whole job when the first process fails, so rank 0 must finish first.
        """
        if self.rank == 0:
            self.store.set("ended", "")
            return
        with suppress(RuntimeError):
            self.store.wait(["ended"], timedelta(seconds=GRACE_SECONDS))

    def _post(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, typed_json.encode(value))
        except RuntimeError as error:
            raise RendezvousError(str(error).splitlines()[0]) from None

    def _receive(self, stage: str, decision_type: type[D], seconds: float) -> D:
        key = f"{stage}/decision"
        try:
            self.store.wait([key], self._remaining(seconds))
            self._stage_start = time.monotonic()
            return typed_json.decode(decision_type, self.store.get(key))
        except (RuntimeError, ValueError) as error:
            raise RendezvousError(str(error).splitlines()[0]) from None

    def _collect(self, stage: str, value_type: type[V], ranks: Iterable[int], seconds: float) -> dict[int, V]:
        """Return the valid values that arrive in time, by rank."""
        keys = {rank: f"{stage}/{rank}" for rank in ranks}
        try:
            self.store.wait(list(keys.values()), self._remaining(seconds))
        except RuntimeError:
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        values = {}
        for rank, key in keys.items():
            with suppress(ValueError):  # an invalid value counts as a missing one
                values[rank] = typed_json.decode(value_type, self.store.get(key))
        return values

    def _remaining(self, seconds: float) -> timedelta:
        return timedelta(seconds=max(1.0, self._stage_start + seconds - time.monotonic()))

    def _open_store(self, timeout: timedelta) -> Any:
        if self.world_size == 1 and "MASTER_ADDR" not in os.environ:
            return HashStore()
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"MASTER_ADDR or MASTER_PORT is missing or invalid ({error}). Start preflight with srun or torchrun."
            ) from None
        # the agent of torchrun keeps the store itself, also when it restarts its processes
        torchrun_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeps_store = self.rank == 0 and not torchrun_keeps_store
        try:
            store = TCPStore(host, port, is_master=keeps_store, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:
            if keeps_store:
                reason = str(error).splitlines()[0]
                raise UserError(f"{host}:{port} cannot be opened ({reason}). Set MASTER_PORT to a free port.") from None
            raise RendezvousError(f"no process listens at {host}:{port}") from None
        return PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def get_node_name() -> str:
    """Return Slurm's name of this node, or its host name without Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def get_expected_tasks() -> dict[str, int]:
    """Return the number of processes that Slurm starts on each node, by name. Without Slurm the dict is empty."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    try:
        names = expand_host_list(nodes) if nodes else []
        return {name: count_tasks_on_node(tasks, number) if tasks else 1 for number, name in enumerate(names)}
    except (UserError, ValueError, IndexError):
        return {}
