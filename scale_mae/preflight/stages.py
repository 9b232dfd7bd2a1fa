"""The stages of a preflight, in each process of a job. One process runs on each GPU, as in training.

First the processes meet at a rendezvous and check their own nodes, so that a process that hangs or is missing can be
identified. Only if all nodes pass do they open a process group and measure the network. Rank 0 compares the results, prints
the findings and lists bad nodes in a file.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from scale_mae.config import UserError
from scale_mae.distributed.launcher import get_rank_and_world_size
from scale_mae.distributed.process_group import get_local_device, process_group
from scale_mae.preflight import compare_gpus, compare_nodes, gpu_health, network_bandwidth, rendezvous, storage
from scale_mae.preflight.bad_nodes import write_bad_nodes
from scale_mae.preflight.diagnosis import Diagnosis, print_diagnosis
from scale_mae.preflight.options import PreflightOptions
from scale_mae.preflight.rank_0_state import get_state_path, has_rank_0_ended, mark_rank_0_as_ended, mark_rank_0_as_running
from scale_mae.preflight.rendezvous import Rendezvous, RendezvousError
from scale_mae.preflight.timeout import Result, run_with_timeout

V = TypeVar("V")
CHECK_SECONDS = 20.0  # time limit of one check of one process


@dataclass(frozen=True)
class LocalResults:
    """What a process measures without the others. Only the first process of each node measures storage and free space."""

    gpu_state: Result[gpu_health.GpuState]
    matmul: Result[gpu_health.MatmulResult]
    storage: Result[storage.StorageResult] | None
    free_bytes: Result[dict[str, int]] | None


def run_preflight(options: PreflightOptions) -> int:
    """Check all nodes of the job. All processes call this.

    Returns:
        The exit code: 0 if training may start, otherwise 1. The file ``options.bad_nodes`` then lists the bad nodes.

    Raises:
        UserError: The rank variables are invalid, or the port of the rendezvous is in use.
    """
    rank, _ = get_rank_and_world_size()
    if rank == 0:
        run_with_timeout(CHECK_SECONDS, lambda: mark_rank_0_as_running(options))
    device = get_local_device()
    gpu_state = run_with_timeout(CHECK_SECONDS, lambda: gpu_health.get_gpu_state(device))
    with ExitStack() as exit_timer, ExitStack() as process_groups:
        try:
            preflight = _Preflight(options, Rendezvous(options.timeout), device)
            stages: list[Callable[[], bool]] = [
                preflight.join,
                lambda: preflight.check_nodes(gpu_state),
                lambda: preflight.connect(process_groups),
                preflight.measure_pair_bandwidth,
                preflight.measure_all_reduce,
            ]
            all(stage() for stage in stages)  # stops after the first stage that returns False
            return preflight.finish(exit_timer)
        except RendezvousError as error:
            exit_code = _report_missing_rank_0(options, str(error))
            _start_exit_timer(exit_timer, exit_code)
            return exit_code
        except UserError:
            if rank == 0:
                run_with_timeout(CHECK_SECONDS, lambda: mark_rank_0_as_ended(options))
            raise


class _Preflight:
    """One process of a preflight.

    Each stage returns whether the next stage may start. On rank 0 the stages add findings to ``diagnosis``.
    """

    def __init__(self, options: PreflightOptions, meeting: Rendezvous, device: torch.device) -> None:
        self.options, self.rendezvous, self.device = options, meeting, device
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.start = time.monotonic()
        self.node, self.node_of_rank = rendezvous.get_node_name(), [""] * self.world_size
        self.missing_ranks: list[int] = []
        self.diagnosis = Diagnosis(self.node_of_rank)

    @property
    def is_first_of_node(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.node_of_rank.index(self.node) == self.rank

    def join(self) -> bool:
        """Wait for all processes, and learn on which nodes they run."""
        timeout = self.options.timeout

        def collect_nodes(nodes: dict[int, str]) -> list[str]:
            self.diagnosis.node_of_rank = [nodes.get(rank, "") for rank in range(self.world_size)]
            return self.diagnosis.node_of_rank[:]

        self.node_of_rank = self.rendezvous.gather_and_decide("join", self.node, str, list[str], collect_nodes, timeout)
        if len(self.node_of_rank) != self.world_size or self.node_of_rank[self.rank] not in (self.node, ""):
            raise RendezvousError("rank 0 sent a list of nodes that does not match this job")
        self.missing_ranks = [rank for rank, node in enumerate(self.node_of_rank) if not node]
        if self.missing_ranks:
            tasks, problem = rendezvous.get_expected_tasks(), f"did not join in {timeout:g} s"
            compare_nodes.report_missing_ranks(self.diagnosis, self.missing_ranks, tasks, problem)
        elif self.world_size == 1:
            self.diagnosis.add_finding("note", f"one process on node {self.node}")
        else:
            nodes = self.diagnosis.nodes
            self.diagnosis.add_finding("ok", f"{self.world_size} processes on {len(nodes)} nodes: {', '.join(nodes)}")
        return not self.missing_ranks

    def check_nodes(self, gpu_state: Result[gpu_health.GpuState]) -> bool:
        """Compare the clocks, then check GPUs, storage and free space of each node."""
        timestamp = time.time()  # all processes have just received the same message, so they read their clocks together

        def compare_clocks(timestamps: list[float]) -> None:
            compare_nodes.compare_clocks(self.diagnosis, self._get_by_node(timestamps))

        if not self._gather_and_decide("clocks", timestamp, float, compare_clocks, rendezvous.GRACE_SECONDS):
            return False
        state_path = get_state_path(self.options)
        test_file = state_path.with_name(f"{state_path.name}-{self.rank}.bin")
        matmul = run_with_timeout(CHECK_SECONDS, lambda: gpu_health.measure_matmul(self.device))
        try:
            storage_result = free_bytes = None
            if self.is_first_of_node:
                storage_result = run_with_timeout(
                    CHECK_SECONDS, lambda: storage.write_and_read_file(test_file, CHECK_SECONDS / 4)
                )
                free_bytes = run_with_timeout(CHECK_SECONDS, lambda: storage.get_free_bytes(self._get_places()))
            results = LocalResults(gpu_state, matmul, storage_result, free_bytes)
            seconds = 3 * CHECK_SECONDS + rendezvous.GRACE_SECONDS
            return self._gather_and_decide("node checks", results, LocalResults, self._compare_local_results, seconds)
        finally:
            if self.is_first_of_node:
                run_with_timeout(CHECK_SECONDS, lambda: test_file.unlink(missing_ok=True))

    def _get_places(self) -> dict[str, Path]:
        places = {"run_dir": self.options.run_dir, "tmp": Path("/tmp"), "dev_shm": Path("/dev/shm")}
        return places | ({"local_dir": self.options.local_dir} if self.options.local_dir else {})

    def _compare_local_results(self, results: list[LocalResults]) -> bool:
        diagnosis = self.diagnosis
        compare_gpus.compare_gpus(diagnosis, [result.gpu_state for result in results])
        on_gpu = any(result.gpu_state.value and result.gpu_state.value.visible for result in results)
        compare_gpus.compare_matmul(diagnosis, [result.matmul for result in results], on_gpu)
        may_connect = diagnosis.passed
        if not may_connect:
            diagnosis.add_finding("note", "network bandwidth is not measured, because of the problems above")
        files = {node: file for node, file in self._get_by_node([result.storage for result in results]).items() if file}
        written = {node: file.value for node, file in files.items() if file.value}
        missing = run_with_timeout(
            CHECK_SECONDS / 2, lambda: storage.find_nodes_with_missing_files(self.options.folder, written)
        ).value
        compare_nodes.compare_storage(diagnosis, files, missing or [], self.options)
        free = {node: result for node, result in self._get_by_node([r.free_bytes for r in results]).items() if result}
        compare_nodes.check_free_space(diagnosis, free, self.options.min_free_gb)
        return may_connect

    def connect(self, process_groups: ExitStack) -> bool:
        """Open the process groups that training opens."""
        error, timeout = "", self.options.timeout
        try:
            process_groups.enter_context(process_group(timedelta(seconds=timeout), self.rendezvous.store.clone()))
        except RuntimeError as failure:
            error = str(failure).splitlines()[0]

        def report_errors(errors: list[str]) -> bool:
            failed = {rank: f"cannot connect to the other processes ({e})" for rank, e in enumerate(errors) if e}
            advice = "check the network, firewalls and GLOO_SOCKET_IFNAME"
            self.diagnosis.add_bad_ranks(failed, "check its network", advice)
            return not failed

        return self._gather_and_decide("connect", error, str, report_errors, timeout + rendezvous.GRACE_SECONDS)

    def measure_pair_bandwidth(self) -> bool:
        """Measure transfers between the first ranks of nodes, in rounds, so that each node exchanges data with two others."""
        first_ranks = [self.node_of_rank.index(node) for node in dict.fromkeys(self.node_of_rank)]
        speeds: dict[str, list[float]] = {self.node_of_rank[rank]: [] for rank in first_ranks}
        errors: dict[tuple[str, str], str] = {}
        for number, pairs in enumerate(network_bandwidth.get_pair_rounds(len(first_ranks)), 1):
            ranks = [(first_ranks[a], first_ranks[b]) for a, b in pairs]
            if not self._measure_round(f"transfers, round {number}", ranks, speeds, errors):
                return False

        def compare(_: list[bool]) -> bool:
            compare_nodes.compare_pair_bandwidth(self.diagnosis, speeds, errors, self.options.min_network_speed)
            return not errors

        return self._gather_and_decide("transfers", True, bool, compare, rendezvous.GRACE_SECONDS)

    def _measure_round(
        self, stage: str, pairs: list[tuple[int, int]], speeds: dict[str, list[float]], errors: dict[tuple[str, str], str]
    ) -> bool:
        """Measure all pairs at the same time. On rank 0, add to ``speeds`` (GB/s) and ``errors``."""
        result = run_with_timeout(
            CHECK_SECONDS,
            lambda: network_bandwidth.measure_pair_bandwidth(pairs, self.rank, self.device, CHECK_SECONDS / 2),
        )

        def collect(results: list[Result[float | None]]) -> None:
            for a, b in pairs:
                nodes = (self.node_of_rank[a], self.node_of_rank[b])
                reasons = [results[rank].error for rank in (a, b) if results[rank].error]
                for node in nodes:
                    speeds[node].append(0.0 if reasons else min(results[a].value or 0.0, results[b].value or 0.0))
                if reasons:
                    errors[nodes] = reasons[0]

        return self._gather_and_decide(stage, result, Result[float | None], collect, CHECK_SECONDS + rendezvous.GRACE_SECONDS)

    def measure_all_reduce(self) -> bool:
        """Measure the bandwidth of an all-reduce over all processes, the collective on which training depends most."""
        if self.world_size == 1:
            return True
        result = run_with_timeout(
            CHECK_SECONDS, lambda: network_bandwidth.measure_all_reduce_bandwidth(self.world_size, self.device)
        )

        def report(results: list[Result[float]]) -> None:
            compare_nodes.report_all_reduce(self.diagnosis, results, network_bandwidth.get_transfer_bytes(self.device))

        return self._gather_and_decide("all-reduce", result, Result[float], report, CHECK_SECONDS + rendezvous.GRACE_SECONDS)

    def finish(self, exit_timer: ExitStack) -> int:
        """Print the findings, write the list of bad nodes, and return the exit code."""
        if self.rank == 0:
            exit_code, bad_nodes = 0 if self.diagnosis.passed else 1, self.diagnosis.bad_nodes
            print_diagnosis(self.diagnosis, self.options, time.monotonic() - self.start)
            self.rendezvous.publish_decision("finish", (exit_code, bad_nodes))
        else:
            exit_code, bad_nodes = self.rendezvous.receive_decision("finish", tuple[int, list[str]])
        _start_exit_timer(exit_timer, exit_code)
        # a good node writes the list, because the node of rank 0 may be unable to write
        writer = next((rank for rank, node in enumerate(self.node_of_rank) if node and node not in bad_nodes), 0)
        written: Result[None] = Result(None)
        if writer == self.rank:
            written = run_with_timeout(CHECK_SECONDS / 2, lambda: write_bad_nodes(self.options, bad_nodes))
        present = [rank for rank in range(self.world_size) if rank not in self.missing_ranks]
        results = self.rendezvous.post_last_value(written, Result[None], present)
        if self.rank == 0:
            if writer not in results or results[writer].error:
                print(f"scale-mae: warning: {self.options.bad_nodes} could not be updated", file=sys.stderr)
            run_with_timeout(CHECK_SECONDS / 2, lambda: mark_rank_0_as_ended(self.options))
        self.rendezvous.wait_for_rank_0_to_end()
        return exit_code

    def _gather_and_decide(
        self, stage: str, value: V, value_type: type[V], decide: Callable[[list[V]], bool | None], seconds: float
    ) -> bool:
        """Let rank 0 decide whether to continue, from the values of all ranks. If a rank is missing, it does not continue."""

        def decide_or_report(values: dict[int, V]) -> bool:
            self.missing_ranks = [rank for rank in range(self.world_size) if rank not in values]
            if self.missing_ranks:
                problem = f"did not answer in {seconds:g} s (stage: {stage})"
                compare_nodes.report_missing_ranks(self.diagnosis, self.missing_ranks, {}, problem)
                return False
            return decide([values[rank] for rank in range(self.world_size)]) is not False

        return self.rendezvous.gather_and_decide(stage, value, value_type, bool, decide_or_report, seconds)

    def _get_by_node(self, values: list[V]) -> dict[str, V]:
        """Return the values of the first rank of each node, by node."""
        return {node: values[self.node_of_rank.index(node)] for node in dict.fromkeys(self.node_of_rank)}


def _report_missing_rank_0(options: PreflightOptions, error: str) -> int:
    """Report that rank 0 does not answer, and list its node as bad. If rank 0 has ended, this process has the problem."""
    deadline = time.monotonic() + rendezvous.GRACE_SECONDS
    while time.monotonic() < deadline:
        if run_with_timeout(1, lambda: has_rank_0_ended(options)).value:
            print(f"scale-mae: error: rank 0 ended before this process joined ({error})", file=sys.stderr, flush=True)
            return 1
        time.sleep(0.2)
    node = next(iter(rendezvous.get_expected_tasks()), None) or os.environ.get("MASTER_ADDR", "")
    run_with_timeout(CHECK_SECONDS, lambda: write_bad_nodes(options, [node]))
    print(f"scale-mae: error: rank 0 on node {node} does not answer ({error}). Exclude the node.", file=sys.stderr, flush=True)
    return 1


def _start_exit_timer(exit_timer: ExitStack, exit_code: int) -> None:
    """End this process if it hangs before ``exit_timer`` closes."""
    timer = threading.Timer(2 * rendezvous.GRACE_SECONDS, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()
    exit_timer.callback(timer.cancel)
