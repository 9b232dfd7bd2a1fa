"""Compare the GPUs of all nodes, and the correctness and speed of their matrix multiplications, and find bad nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median

from scale_mae.doctor import GIB
from scale_mae.preflight.diagnosis import Diagnosis
from scale_mae.preflight.gpu_health import Gpu, GpuState, MatmulResult
from scale_mae.preflight.timeout import Result

SLOW_MATMUL = 0.7  # of the median speed
Kind = tuple[int, tuple[tuple[str, int], ...]]  # number of GPUs, and name and GiB of each different model


def compare_gpus(diagnosis: Diagnosis, states: list[Result[GpuState]]) -> None:
    """Check that no GPU has a problem and that all nodes have the same GPUs.

    Args:
        diagnosis: Receives the findings.
        states: The GPUs of each rank.
    """
    hanging = {rank: f"the GPU does not answer ({state.error})" for rank, state in enumerate(states) if state.value is None}
    diagnosis.add_bad_ranks(hanging, "drain the node and reset the GPU")
    problems = {rank: f"GPU: {', '.join(s.value.problems)}" for rank, s in enumerate(states) if s.value and s.value.problems}
    diagnosis.add_bad_ranks(problems, "drain the node and reset the GPU, or end the other process")
    gpus_of_node: dict[str, set[Gpu]] = {}
    for node, state in zip(diagnosis.node_of_rank, states, strict=True):
        if state.value:
            gpus_of_node.setdefault(node, set()).update(state.value.visible)
    if gpus_of_node:
        _compare_gpu_kinds(diagnosis, {node: _get_kind(gpus) for node, gpus in gpus_of_node.items()})


def _get_kind(gpus: set[Gpu]) -> Kind:
    return len(gpus), tuple(sorted({(gpu.name, round(gpu.memory / GIB)) for gpu in gpus}))


def _compare_gpu_kinds(diagnosis: Diagnosis, kinds: Mapping[str, Kind]) -> None:
    counts = Counter(kinds.values())
    usual, frequency = max(counts.items(), key=lambda item: (item[1], item[0][0]))
    equally_frequent = [kind for kind, count in counts.items() if count == frequency and kind != usual]
    if any(kind[0] == usual[0] for kind in equally_frequent):  # as many nodes have other GPUs, so neither kind is wrong
        listed = "; ".join(f"{node} has {_describe(kind)}" for node, kind in kinds.items())
        diagnosis.add_finding(
            "problem", f"nodes have different GPUs: {listed}", "request one kind of GPU from Slurm (--constraint or --gres)"
        )
        return
    unusual = {
        node: f"{_describe(kind)}, but other nodes have {_describe(usual)}" for node, kind in kinds.items() if kind != usual
    }
    diagnosis.add_bad_nodes(unusual, "check the driver and nvidia-smi on the node, or exclude it")
    processes = Counter(diagnosis.node_of_rank)
    crowded = {
        node: f"{processes[node]} processes, but only {_describe(kind)}"
        for node, kind in kinds.items()
        if 0 < kind[0] < processes[node]
    }
    diagnosis.add_bad_nodes(crowded, "start one process per GPU", "set --ntasks-per-node to the number of GPUs per node")
    if not unusual and not crowded and len(kinds) == len(diagnosis.nodes):
        level, what = ("ok", f"{_describe(usual)} on every node") if usual[0] else ("note", "no node has a GPU")
        diagnosis.add_finding(level, what)


def _describe(kind: Kind) -> str:
    """Return for instance ``8 GPUs (NVIDIA H100 80 GiB)``."""
    count, models = kind
    if not count:
        return "no GPU"
    return f"{count} {'GPU' if count == 1 else 'GPUs'} ({', '.join(f'{name} {gib} GiB' for name, gib in models)})"


def compare_matmul(diagnosis: Diagnosis, results: list[Result[MatmulResult]], on_gpu: bool) -> None:
    """Check that matrix products are correct on every rank and about equally fast.

    Args:
        diagnosis: Receives the findings.
        results: The result of each rank.
        on_gpu: Whether the products were computed on GPUs. Slow CPUs are no problem, because other programs may use them.
    """
    failed = {
        rank: f"a matrix multiplication failed ({result.error})" for rank, result in enumerate(results) if result.value is None
    }
    diagnosis.add_bad_ranks(failed, "drain the node and test its GPU")
    valid = {rank: result.value for rank, result in enumerate(results) if result.value}
    wrong = {
        rank: f"a matrix multiplication gives wrong results in {', '.join(value.wrong_dtypes)}"
        for rank, value in valid.items()
        if value.wrong_dtypes
    }
    diagnosis.add_bad_ranks(wrong, "drain the node, because it computes wrong numbers")
    if not valid:
        return
    usual = median(value.tflops for value in valid.values())
    for rank, value in valid.items():
        diagnosis.record(diagnosis.node_of_rank[rank], "matmul_tflops", value.tflops)
    slow = {
        rank: f"matrix multiplication at {value.tflops:.3g} TFLOP/s; the median of all ranks is {usual:.3g} TFLOP/s"
        for rank, value in valid.items()
        if value.tflops < SLOW_MATMUL * usual
    }
    if on_gpu:
        diagnosis.add_bad_ranks(slow, "check for throttling (nvidia-smi -q -d PERFORMANCE), or exclude the node")
    elif slow:
        listed = "; ".join(f"node {node}: {what}" for node, what in diagnosis.get_problem_by_node(slow).items())
        diagnosis.add_finding("note", listed, "other programs may use these machines")
    if not wrong and len(valid) == len(results):
        diagnosis.add_finding("ok", f"matrix multiplications are correct, at {usual:.3g} TFLOP/s per process")
