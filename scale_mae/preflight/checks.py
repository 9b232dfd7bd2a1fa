"""A look at all nodes of a job just before it trains: which is bad, and why. One process a GPU, started as training is.

What a node can tell about itself comes first and meets at a store, so that a process which hangs or never comes is named; only
nodes that pass open a process group and measure the network. Rank 0 judges, prints, and names bad nodes in a file.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from scale_mae.config import UserError
from scale_mae.distributed.launcher import get_rank_and_world_size
from scale_mae.distributed.process_group import get_local_device, process_group
from scale_mae.doctor import print_findings
from scale_mae.preflight import diagnosis, measurements
from scale_mae.preflight.options import PreflightOptions
from scale_mae.preflight.rendezvous import GRACE, CallResult, LostError, Rendezvous, expected, node_name, within

V = TypeVar("V")
CHECK = 20.0  # seconds that one check of one process may take


@dataclass(frozen=True)
class Local:
    """What a process finds without the others; the folders are looked at by the first of each node."""

    seen: CallResult[measurements.NodeState]
    product: CallResult[measurements.Product]
    written: CallResult[measurements.Written] | None
    free: CallResult[dict[str, int]] | None


def preflight(demands: PreflightOptions) -> int:
    """Check all nodes; 0 when they are fit, else 1, with the names of bad ones in ``slurm/bad_nodes``.

    Raises:
        UserError: rank variables that make no sense.
    """
    rank, _ = get_rank_and_world_size()
    if rank == 0:
        within(CHECK, lambda: _write(demands.mark, "here"))
    device = get_local_device()
    seen = within(CHECK, lambda: measurements.look(device))
    with ExitStack() as deadline, ExitStack() as held:
        try:
            run = _Run(demands, Rendezvous(demands.timeout), device)
            _ = run.arrive() and run.look(seen) and run.join(held) and run.pair() and run.reduce()
            return run.end(deadline)
        except LostError as error:
            code = _without_rank_0(demands, str(error))
            _leave_in_time(deadline, code)
            return code
        except UserError:
            if rank == 0:
                within(CHECK, lambda: _finish(demands))
            raise


class _Run:
    """One process's part; rank 0 judges each stage into ``report``."""

    def __init__(self, demands: PreflightOptions, call: Rendezvous, device: Any) -> None:
        self.demands, self.call, self.device = demands, call, device
        self.began = time.monotonic()
        self.node, self.nodes = node_name(), [""] * call.size
        self.missing: list[int] = []
        self.report = diagnosis.Report(self.nodes)

    @property
    def first(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.nodes.index(self.node) == self.call.rank

    def arrive(self) -> bool:
        """Learn who is here."""

        def take(came: dict[int, str]) -> list[str]:
            self.report.nodes = [came.get(rank, "") for rank in range(self.call.size)]
            return self.report.nodes[:]

        self.nodes = self.call.settle("arrived", self.node, (str, list[str]), take, self.demands.timeout)
        if len(self.nodes) != self.call.size or self.nodes[self.call.rank] not in (self.node, ""):
            raise LostError("its list of nodes is not of this job")
        self.missing = [rank for rank, node in enumerate(self.nodes) if not node]
        if self.missing:
            diagnosis.absent(self.report, self.missing, expected(), f"did not come in {self.demands.timeout:g} s")
        elif self.call.size == 1:
            self.report.say("note", f"one process on node {self.node}")
        else:
            self.report.say(
                "ok", f"{self.call.size} processes on {len(self.report.names)} nodes: {', '.join(self.report.names)}"
            )
        return not self.missing

    def look(self, seen: CallResult[measurements.NodeState]) -> bool:
        """The clocks, read when all have just been told to go on; then what each finds alone. Whether to connect."""
        stamp = time.time()
        if not self._settle("clocks", stamp, float, lambda all_: diagnosis.clocks(self.report, self._by_node(all_)), GRACE):
            return False
        demands = self.demands
        places = {"run-dir": demands.run_dir, "/tmp": Path("/tmp"), "/dev/shm": Path("/dev/shm")}
        if demands.local_dir:
            places["local-dir"] = demands.local_dir
        file = demands.mark.with_name(f"{demands.mark.name}-{self.call.rank}.bin")
        product = within(CHECK, lambda: measurements.multiply(self.device))
        try:
            written = within(CHECK, lambda: measurements.write_and_read(file, CHECK / 4)) if self.first else None
            free = within(CHECK, lambda: measurements.room(places)) if self.first else None
            local = Local(seen, product, written, free)
            return self._settle("local checks", local, Local, self._judge_local, 3 * CHECK + GRACE)
        finally:
            if self.first:
                within(CHECK, lambda: file.unlink(missing_ok=True))

    def _judge_local(self, all_: list[Local]) -> bool:
        report, folder = self.report, self.demands.folder
        diagnosis.accelerators(report, [local.seen for local in all_])
        diagnosis.arithmetic(
            report, [local.product for local in all_], any(local.seen.value and local.seen.value.gpus for local in all_)
        )
        go_on = report.fit
        if not go_on:
            report.say("note", "bandwidth is not measured with accelerators like these")
        written = {node: w for node, w in self._by_node([local.written for local in all_]).items() if w}
        files = {node: w.value for node, w in written.items() if w.value}
        unseen = within(CHECK / 2, lambda: measurements.unseen(folder, files)).value or []
        diagnosis.shared_directory(report, written, unseen, str(self.demands.run_dir), self.demands.min_mbps)
        diagnosis.room(
            report, {n: f for n, f in self._by_node([local.free for local in all_]).items() if f}, self.demands.need_gb
        )
        return go_on

    def join(self, held: ExitStack) -> bool:
        """Open the process groups that training opens."""
        error = ""
        try:
            held.enter_context(process_group(timedelta(seconds=self.demands.timeout), self.call.store.clone()))
        except RuntimeError as failure:
            error = str(failure).splitlines()[0]

        def take(errors: list[str]) -> bool:
            failed = {node: f"cannot connect to the others ({e})" for node, e in zip(self.nodes, errors, strict=True) if e}
            self.report.blame(failed, "look at its network", "look at the network, firewalls and GLOO_SOCKET_IFNAME")
            return not failed

        return self._settle("connections", error, str, take, self.demands.timeout + GRACE)

    def pair(self) -> bool:
        """Transfers between the first ranks of nodes, in rounds, so that each node meets two others."""
        leaders = [self.nodes.index(name) for name in dict.fromkeys(self.nodes)]
        speeds: dict[str, list[float]] = {self.nodes[rank]: [] for rank in leaders}
        errors: dict[tuple[str, str], str] = {}
        for number, pairs in enumerate(measurements.rounds(len(leaders)), 1):
            ranks = [(leaders[a], leaders[b]) for a, b in pairs]
            if not self._round(f"transfers, round {number}", ranks, speeds, errors):
                return False

        def take(_: list[bool]) -> bool:
            diagnosis.pairs(self.report, speeds, errors, self.demands.min_gbps)
            return not errors

        return self._settle("transfers", True, bool, take, GRACE)

    def _round(
        self, stage: str, pairs: list[tuple[int, int]], speeds: dict[str, list[float]], errors: dict[tuple[str, str], str]
    ) -> bool:
        """All pairs at once; on rank 0 adds to ``speeds`` (GB/s) and ``errors``."""
        mine = within(CHECK, lambda: measurements.exchange(pairs, self.call.rank, self.device, CHECK / 2))

        def take(all_: list[CallResult[float | None]]) -> None:
            for a, b in pairs:
                names, reasons = (self.nodes[a], self.nodes[b]), [all_[r].error for r in (a, b) if all_[r].error]
                for name in names:
                    speeds[name].append(0.0 if reasons else min(all_[a].value or 0.0, all_[b].value or 0.0))
                if reasons:
                    errors[names] = reasons[0]

        return self._settle(stage, mine, CallResult[float | None], take, CHECK + GRACE)

    def reduce(self) -> bool:
        """Bandwidth of the collective that training lives on."""
        size = self.call.size
        if size == 1:
            return True
        mine = within(CHECK, lambda: measurements.all_reduce(size, self.device))

        def take(all_: list[CallResult[float]]) -> None:
            diagnosis.all_reduce(self.report, all_, measurements.transfer_bytes(self.device))

        return self._settle("all-reduce", mine, CallResult[float], take, CHECK + GRACE)

    def end(self, held: ExitStack) -> int:
        """Print, name bad nodes in a file, and leave."""
        code, bad = 0, self.report.bad
        if self.call.rank == 0:
            code = 0 if self.report.fit else 1
            self._print()
            self.call.tell("end", (code, bad))
        else:
            code, bad = self.call.hear("end", tuple[int, list[str]])
        _leave_in_time(held, code)
        # rank 0's node may be one that cannot write
        writer = next((rank for rank, node in enumerate(self.nodes) if node and node not in bad), 0)
        outcome = within(CHECK / 2, lambda: _name_bad(self.demands, bad)) if writer == self.call.rank else CallResult(None)
        left = self.call.leave(outcome, CallResult[None], [rank for rank in range(self.call.size) if rank not in self.missing])
        if self.call.rank == 0:
            written = left.get(writer)
            if written is None or written.error:
                print(f"scale-mae: warning: {self.demands.bad_nodes} could not be written", file=sys.stderr)
            within(CHECK / 2, lambda: _finish(self.demands))
        self.call.linger()
        return code

    def _print(self) -> None:
        report, seconds = self.report, time.monotonic() - self.began
        if self.demands.as_json:
            findings = [finding._asdict() for finding in report.findings]
            facts = {"fit": report.fit, "bad_nodes": report.bad, "seconds": round(seconds, 1)}
            print(json.dumps(facts | {"findings": findings, "nodes": report.figures}, indent=2), flush=True)
            return
        print_findings(report.findings)
        if report.bad:
            print(f"bad nodes, named in {self.demands.bad_nodes}: {' '.join(report.bad)}")
        sys.stdout.flush()

    def _settle(self, stage: str, value: V, kind: type[V], take: Callable[[list[V]], bool | None], seconds: float) -> bool:
        """Rank 0 takes all values in; whether to go on, which is no when a process is missing."""

        def judge_all(came: dict[int, V]) -> bool:
            self.missing = [rank for rank in range(self.call.size) if rank not in came]
            if self.missing:
                diagnosis.absent(self.report, self.missing, {}, f"no answer in {seconds:g} s ({stage})")
                return False
            return take([came[rank] for rank in range(self.call.size)]) is not False

        return self.call.settle(stage, value, (kind, bool), judge_all, seconds)

    def _by_node(self, values: list[V]) -> dict[str, V]:
        """Those of the first rank of each node."""
        return {name: values[self.nodes.index(name)] for name in dict.fromkeys(self.nodes)}


def _without_rank_0(demands: PreflightOptions, error: str) -> int:
    """Rank 0 does not answer. Unless it turns out to have ended, which means that this process is apart, its node is bad."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if within(1, demands.mark.read_text).value == "done":
            print(f"scale-mae: error: rank 0 ended without this process ({error})", file=sys.stderr, flush=True)
            return 1
        time.sleep(0.2)
    node = next(iter(expected()), None) or os.environ.get("MASTER_ADDR", "")
    within(CHECK, lambda: _name_bad(demands, [node]))
    print(f"scale-mae: error: node {node} of rank 0 does not answer ({error}); leave it out", file=sys.stderr, flush=True)
    return 1


def _leave_in_time(held: ExitStack, code: int) -> None:
    """Should anything hang before ``held`` closes, end this process."""
    timer = threading.Timer(2 * GRACE, os._exit, (code,))
    timer.daemon = True
    timer.start()
    held.callback(timer.cancel)


def _name_bad(demands: PreflightOptions, names: list[str]) -> None:
    if names:
        _write(demands.bad_nodes, "".join(f"{name}\n" for name in names))
    else:
        demands.bad_nodes.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staging.write_text(text)
    staging.rename(path)


def _finish(demands: PreflightOptions) -> None:
    """Say that rank 0 has ended, and clear what killed attempts left."""
    for old in demands.folder.glob("preflight-*"):
        if old != demands.mark:
            with suppress(OSError):
                old.unlink()
    _write(demands.mark, "done")
