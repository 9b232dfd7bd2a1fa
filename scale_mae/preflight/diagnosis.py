"""What is wrong with which node, from what all processes measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import harmonic_mean, median

from scale_mae.doctor import GIB, Finding
from scale_mae.preflight.measurements import Gpu, NodeState, Product, Written
from scale_mae.preflight.rendezvous import CallResult

SKEW = 2.0  # seconds
EQUAL_SPEED = 0.7  # of the median
EQUAL_BANDWIDTH = 0.5  # of the median
EQUAL_STORAGE = 0.25  # of the median
SLOW_STORAGE = 50.0  # MB/s
GB = 10**9


@dataclass
class Report:
    """What has been found so far.

    Attributes:
        nodes: the name of each rank's node.
        findings: in the order of the checks.
        bad: names of nodes to leave out.
        figures: measured values of each node; the names carry units.
    """

    nodes: list[str]
    findings: list[Finding] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every node once, in the order of their first ranks."""
        return list(dict.fromkeys(self.nodes))

    @property
    def fit(self) -> bool:
        """Whether training may start."""
        return not any(finding.level == "problem" for finding in self.findings)

    def say(self, level: str, what: str, advice: str = "") -> None:
        """Add a finding that concerns no node alone."""
        self.findings.append(Finding(level, what, advice))

    def blame(self, troubles: Mapping[str, str], advice: str, for_all: str = "") -> None:
        """Name nodes as bad, with what is wrong with each.

        Args:
            troubles: by node.
            advice: for one of them.
            for_all: for troubles that may lie elsewhere, advice when every node has one; then none is named.
        """
        if for_all and troubles.keys() >= set(self.names):
            node, what = next(iter(troubles.items()))
            self.say("problem", what if len(self.names) == 1 else f"every node, such as {node}: {what}", for_all)
            return
        for node, what in troubles.items():
            self.say("problem", f"node {node}: {what}", advice)
            if node not in self.bad:
                self.bad.append(node)

    def record(self, node: str, figure: str, value: float) -> None:
        """Keep a measured value; of several of one node the least."""
        known = self.figures.setdefault(node, {})
        known[figure] = round(min(value, known.get(figure, value)), 3)


def absent(report: Report, missing: list[int], expected: Mapping[str, int], what: str) -> None:
    """Ranks that were not there in time. ``report.nodes`` holds those of the others, "" where unknown."""
    here = Counter(node for rank, node in enumerate(report.nodes) if rank not in missing)
    known = {report.nodes[rank] for rank in missing} - {""}
    late = sorted(known) or [node for node, tasks in expected.items() if here[node] < tasks]
    report.nodes = [node for node in report.nodes if node]
    if late:
        report.blame(dict.fromkeys(late, what), "look at its console and network; leave it out")
    else:
        ranks = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        report.say(
            "problem", f"rank {ranks}: {what}", "their nodes are unknown without Slurm's node list; see the launcher's log"
        )


def accelerators(report: Report, seen: list[CallResult[NodeState]]) -> None:
    """Equal on all nodes, and nothing known against any."""
    report.blame(
        _first(report, {rank: f"its GPU does not answer ({s.error})" for rank, s in enumerate(seen) if s.value is None}),
        "drain it and reset the GPU",
    )
    troubled = {rank: f"its GPU: {', '.join(s.value.troubles)}" for rank, s in enumerate(seen) if s.value and s.value.troubles}
    report.blame(_first(report, troubled), "drain it and reset the GPU, or end the other process")
    owned: dict[str, set[Gpu]] = {}
    for node, outcome in zip(report.nodes, seen, strict=True):
        if outcome.value:
            owned.setdefault(node, set()).update(outcome.value.gpus)
    if not owned:
        return
    kinds = {n: (len(gpus), tuple(sorted({(gpu.name, round(gpu.memory / GIB)) for gpu in gpus}))) for n, gpus in owned.items()}
    counts = Counter(kinds.values())
    usual, times = max(counts.items(), key=lambda item: (item[1], item[0][0]))
    odd = {node: f"has {_kind(kind)} where others have {_kind(usual)}" for node, kind in kinds.items() if kind != usual}
    tied = [kind for kind, n in counts.items() if n == times and kind != usual]
    if any(kind[0] == usual[0] for kind in tied):
        report.say(
            "problem",
            "nodes have different GPUs: " + "; ".join(f"{n} {_kind(k)}" for n, k in kinds.items()),
            "ask Slurm for one kind (--constraint or --gres)",
        )
        return
    report.blame(odd, "check its driver and nvidia-smi; leave it out")
    processes = Counter(report.nodes)
    crowded = {n: f"{processes[n]} processes, but {_kind(kinds[n])}" for n in owned if 0 < kinds[n][0] < processes[n]}
    report.blame(crowded, "start one process a GPU there", "--ntasks-per-node must be the number of GPUs")
    if not odd and not crowded and len(owned) == len(report.names):
        report.say("ok" if usual[0] else "note", f"{_kind(usual)} on every node")


def arithmetic(report: Report, products: list[CallResult[Product]], on_gpu: bool) -> None:
    """Products right on every rank, and about equally fast."""
    report.blame(
        _first(report, {r: f"a matrix product failed ({p.error})" for r, p in enumerate(products) if p.value is None}),
        "drain it and test its GPU",
    )
    wrong = {
        r: f"a matrix product is wrong in {', '.join(p.value.wrong)}"
        for r, p in enumerate(products)
        if p.value and p.value.wrong
    }
    report.blame(_first(report, wrong), "drain it: it computes wrong numbers")
    speeds = {rank: p.value.teraflops for rank, p in enumerate(products) if p.value}
    if not speeds:
        return
    usual = median(speeds.values())
    for rank, speed in speeds.items():
        report.record(report.nodes[rank], "matmul_tflops", speed)
    slow = {
        rank: f"multiplies at {speed:.3g} TFLOP/s where the median is {usual:.3g}"
        for rank, speed in speeds.items()
        if speed < EQUAL_SPEED * usual
    }
    if on_gpu:
        report.blame(_first(report, slow), "look for throttling (nvidia-smi -q -d PERFORMANCE); leave it out")
    elif slow:
        report.say("note", "; ".join(f"node {n} {what}" for n, what in _first(report, slow).items()), "machines may be shared")
    if not wrong and len(speeds) == len(products):
        report.say("ok", f"matrix products are right, {usual:.3g} TFLOP/s a process")


def shared_directory(
    report: Report, written: dict[str, CallResult[Written]], unseen: list[str], folder: str, min_mbps: float | None
) -> None:
    """Writable from every node, the same one for all, fast enough: as is wanted, else not far slower than for others."""
    elsewhere = "mount it on every node, or choose another --run-dir"
    failed = {node: f"{folder} cannot be written and read ({w.error})" for node, w in written.items() if w.value is None}
    report.blame(failed, elsewhere, f"choose another --run-dir; this is {folder}")
    if len(unseen) == len(report.names) - 1 > 1:  # rank 0's node is the one that is apart
        unseen = report.names[:1]
    report.blame(dict.fromkeys(unseen, f"its files in {folder} are not seen from the others"), elsewhere)
    speeds = {node: w.value for node, w in written.items() if w.value}
    for node, speed in speeds.items():
        report.record(node, "write_mbps", speed.write_mbps)
        report.record(node, "read_mbps", speed.read_mbps)
    both = {node: harmonic_mean([s.write_mbps, s.read_mbps]) for node, s in speeds.items()}  # one may be a cache's
    usual = median(both.values()) if both else 0.0
    slow = {}
    for node, s in speeds.items():
        what, least = f"{folder} writes {s.write_mbps:.0f} and reads {s.read_mbps:.0f} MB/s", min(s.write_mbps, s.read_mbps)
        if min_mbps is not None and least < min_mbps:
            slow[node] = f"{what}; {min_mbps:g} are wanted"
        elif min_mbps is None and least < SLOW_STORAGE and both[node] < EQUAL_STORAGE * usual:
            slow[node] = f"{what}, {both[node]:.0f} on average where the median is {usual:.0f}"
    report.blame(slow, "look at its mount and network", "a checkpoint would take long; choose a faster --run-dir")
    if not failed and not unseen and not slow:
        writes, reads = min(s.write_mbps for s in speeds.values()), min(s.read_mbps for s in speeds.values())
        told = f"{folder} is shared; every node writes at least {writes:.0f} and reads {reads:.0f} MB/s"
        if min_mbps is None and min(writes, reads) < SLOW_STORAGE:
            report.say(
                "note", f"{told}, all at once", "a checkpoint may take long; --min-mbps makes what is too slow a problem"
            )
        else:
            report.say("ok", told)


def room(report: Report, free: dict[str, CallResult[dict[str, int]]], need_gb: float) -> None:
    """Enough space on the disks of every node."""
    report.blame({n: f"its disks do not answer ({f.error})" for n, f in free.items() if f.value is None}, "leave it out")
    known = {node: f.value for node, f in free.items() if f.value}
    for label in next(iter(known.values()), {}):
        wanted = need_gb if label in ("run-dir", "local-dir") else 1.0
        for node, bytes_ in known.items():
            report.record(node, f"{label.strip('/').replace('/', '_').replace('-', '_')}_free_gb", bytes_[label] / GB)
        short = {
            n: f"{f[label] / GB:.1f} GB free in {label}; {wanted:g} are wanted"
            for n, f in known.items()
            if f[label] < wanted * GB
        }
        if label == "/dev/shm" and short:
            report.say("note", "; ".join(f"node {n}: {what}" for n, what in short.items()), "in a container --shm-size=8g")
        else:
            report.blame(short, "free some; leave it out", "free some, choose another place, or lower --need-gb")
        if not short:
            report.say("ok", f"at least {min(f[label] for f in known.values()) / GB:.1f} GB free in {label}")


def clocks(report: Report, stamps: dict[str, float]) -> None:
    """The same time on all nodes, from stamps (seconds) taken at one moment."""
    if len(stamps) == 1:
        return
    middle = median(stamps.values())
    off = {node: stamp - middle for node, stamp in stamps.items()}
    for node, seconds in off.items():
        report.record(node, "clock_skew_s", seconds)
    spread = max(off.values()) - min(off.values())
    advice = "synchronise its clock (chronyc tracking)"
    if len(stamps) == 2 and spread > SKEW:  # either may be right
        report.say("problem", f"the clocks of {' and '.join(stamps)} differ by {spread:.1f} s", advice)
        return
    bad = {node: f"its clock is off by {s:+.1f} s" for node, s in off.items() if abs(s) > SKEW}
    report.blame(bad, advice, "synchronise the clocks (chronyc tracking)")
    if not bad:
        report.say("ok", f"clocks agree within {spread:.2f} s")


def pairs(report: Report, speeds: dict[str, list[float]], errors: dict[tuple[str, str], str], min_gbps: float) -> None:
    """Bandwidth between nodes: GB/s of each pair that a node was in, 0 for one that failed."""
    if len(report.names) == 1:
        report.say("note", "one node: no bandwidth between nodes to measure")
        return
    best = {node: max(of_node) for node, of_node in speeds.items()}
    for node, speed in best.items():
        report.record(node, "pair_gbps", speed)
    usual, slow = median(best.values()), {}
    for node, speed in best.items():
        if len(best) > 2 and speed < EQUAL_BANDWIDTH * usual:  # of two, either may be the slow one
            slow[node] = f"exchanges at best {speed:.3g} GB/s where the median is {usual:.3g}"
        elif speed < min_gbps:
            slow[node] = f"exchanges at best {speed:.3g} GB/s; {min_gbps:g} are wanted"
    links = "look at the network links (ibstat, ethtool) and at NCCL_SOCKET_IFNAME"
    report.blame(slow, f"{links}; leave it out", links)
    unexplained = {names: error for names, error in errors.items() if not slow.keys() & set(names)}
    for names, error in unexplained.items():
        report.say("problem", f"nodes {' and '.join(names)} cannot exchange data ({error})", links)
    if not slow and not unexplained:
        report.say("ok", f"pairs of nodes exchange at least {min(best.values()):.3g} GB/s each way")


def all_reduce(report: Report, speeds: list[CallResult[float]], transferred: int) -> None:
    """Bus bandwidth of all, in GB/s, of an all-reduce of so many bytes."""
    failed = {rank: f"an all-reduce failed ({s.error})" for rank, s in enumerate(speeds) if s.value is None}
    report.blame(_first(report, failed), "leave it out", "run again with NCCL_DEBUG=INFO (TORCH_CPP_LOG_LEVEL=INFO on CPUs)")
    if not failed:
        speed = min(s.value or 0.0 for s in speeds)
        report.say(
            "ok", f"all-reduce of {transferred / 10**6:.0f} MB over {len(speeds)} processes: {speed:.3g} GB/s of bus bandwidth"
        )


def _first(report: Report, troubles: Mapping[int, str]) -> dict[str, str]:
    """By node instead of by rank; of several of one node the first, with its rank."""
    by_node: dict[str, str] = {}
    for rank, what in troubles.items():
        by_node.setdefault(report.nodes[rank], f"rank {rank}: {what}" if report.nodes.count(report.nodes[rank]) > 1 else what)
    return by_node


def _kind(kind: tuple[int, tuple[tuple[str, int], ...]]) -> str:
    """``(8, (("NVIDIA H100", 80),))`` in words."""
    count, names = kind
    return f"{count} GPUs: {', '.join(f'{name} ({gib} GiB)' for name, gib in names)}" if count else "no GPU"
