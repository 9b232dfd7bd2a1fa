"""Compare clocks, storage, free space and network of all nodes with each other and with required values. Find bad nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import harmonic_mean, median

from scale_mae.preflight.diagnosis import Diagnosis
from scale_mae.preflight.options import PreflightOptions
from scale_mae.preflight.storage import StorageResult
from scale_mae.preflight.timeout import Result

MAX_CLOCK_SKEW = 2.0  # seconds
SLOW_NETWORK = 0.5  # of the median speed
SLOW_STORAGE = 0.25  # of the median speed
SLOW_STORAGE_MB_PER_S = 50.0  # faster storage never counts as slow
GB = 10**9
PLACES = {  # label -> name in messages
    "run_dir": "the run directory",
    "local_dir": "the local checkpoint directory",
    "tmp": "/tmp",
    "dev_shm": "/dev/shm",
}
REQUIRED_TMP_GB = 1.0


def report_missing_ranks(diagnosis: Diagnosis, missing: list[int], expected_tasks: Mapping[str, int], problem: str) -> None:
    """Report ranks that did not answer in time.

    Args:
        diagnosis: Its ``node_of_rank`` has an empty name for each rank whose node is unknown. These names are removed.
        missing: The missing ranks.
        expected_tasks: Number of processes on each node, by name; see :func:`rendezvous.get_expected_tasks`.
        problem: What the ranks did not do, such as "did not answer in 35 s".
    """
    present = Counter(node for rank, node in enumerate(diagnosis.node_of_rank) if rank not in missing)
    known = {diagnosis.node_of_rank[rank] for rank in missing} - {""}
    nodes = sorted(known) or [node for node, tasks in expected_tasks.items() if present[node] < tasks]
    diagnosis.node_of_rank = [node for node in diagnosis.node_of_rank if node]
    if nodes:
        advice = "check the console and the network of the node, or exclude it"
        diagnosis.add_bad_nodes(dict.fromkeys(nodes, f"a process {problem}"), advice)
        return
    ranks = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    advice = "look up the nodes of these ranks in the launcher's log, because Slurm's node list is not available"
    diagnosis.add_finding("problem", f"{'rank' if len(missing) == 1 else 'ranks'} {ranks} {problem}", advice)


def compare_storage(
    diagnosis: Diagnosis,
    results: dict[str, Result[StorageResult]],
    nodes_with_missing_files: list[str],
    options: PreflightOptions,
) -> None:
    """Check that every node can write the run directory, that it is the same directory for all, and that it is fast enough.

    Args:
        diagnosis: Receives the findings.
        results: The result of each node, by name.
        nodes_with_missing_files: Nodes whose files rank 0 does not see.
        options: The run directory and its required speed.
    """
    folder, isolated = options.run_dir, nodes_with_missing_files
    mount_it = "mount the same directory on every node, or choose another --run-dir"
    failed = {node: f"{folder} cannot be used ({result.error})" for node, result in results.items() if result.value is None}
    diagnosis.add_bad_nodes(failed, mount_it, "choose another --run-dir")
    if len(isolated) == len(diagnosis.nodes) - 1 > 1:  # rank 0 sees no other node's files, so its own node is isolated
        isolated = diagnosis.nodes[:1]
    diagnosis.add_bad_nodes(dict.fromkeys(isolated, f"other nodes do not see the files that it writes to {folder}"), mount_it)
    valid = {node: result.value for node, result in results.items() if result.value}
    for node, value in valid.items():
        diagnosis.record(node, "write_mb_per_s", value.write_mb_per_s)
        diagnosis.record(node, "read_mb_per_s", value.read_mb_per_s)
    slow = _find_slow_storage(valid, options)
    diagnosis.add_bad_nodes(slow, "check its mount and network", "checkpoints would take long; choose a faster --run-dir")
    if failed or isolated or slow:
        return
    write, read = min(v.write_mb_per_s for v in valid.values()), min(v.read_mb_per_s for v in valid.values())
    what = f"{folder} is shared; every node writes at least {write:.0f} MB/s and reads at least {read:.0f} MB/s"
    if options.min_storage_speed is None and min(write, read) < SLOW_STORAGE_MB_PER_S:
        advice = "a checkpoint may take long; set --min-storage-speed to make slow storage a problem"
        diagnosis.add_finding("note", f"{what} when all nodes are active", advice)
    else:
        diagnosis.add_finding("ok", what)


def _find_slow_storage(valid: Mapping[str, StorageResult], options: PreflightOptions) -> dict[str, str]:
    required = options.min_storage_speed
    # the harmonic mean, because one of the two speeds may be that of a cache
    means = {node: harmonic_mean([value.write_mb_per_s, value.read_mb_per_s]) for node, value in valid.items()}
    usual = median(means.values()) if means else 0.0
    slow = {}
    for node, value in valid.items():
        lower = min(value.write_mb_per_s, value.read_mb_per_s)
        what = f"{options.run_dir}: writes {value.write_mb_per_s:.0f} MB/s and reads {value.read_mb_per_s:.0f} MB/s"
        if required is not None and lower < required:
            slow[node] = f"{what}; required: {required:g} MB/s"
        elif required is None and lower < SLOW_STORAGE_MB_PER_S and means[node] < SLOW_STORAGE * usual:
            slow[node] = f"{what}, on average {means[node]:.0f} MB/s; the median of all nodes is {usual:.0f} MB/s"
    return slow


def check_free_space(diagnosis: Diagnosis, free: dict[str, Result[dict[str, int]]], min_free_gb: float) -> None:
    """Check the free space of every node.

    Args:
        diagnosis: Receives the findings.
        free: Free bytes by node and by label of :data:`PLACES`.
        min_free_gb: Required space in the run directory and in the local checkpoint directory, in GB.
    """
    hanging = {node: f"its disks do not answer ({result.error})" for node, result in free.items() if result.value is None}
    diagnosis.add_bad_nodes(hanging, "exclude the node")
    known = {node: result.value for node, result in free.items() if result.value}
    for label in next(iter(known.values()), {}):
        required = min_free_gb if label in ("run_dir", "local_dir") else REQUIRED_TMP_GB
        gigabytes = {node: labels[label] / GB for node, labels in known.items()}
        for node, gb in gigabytes.items():
            diagnosis.record(node, f"{label}_free_gb", gb)
        short = {
            node: f"only {gb:.1f} GB free in {PLACES[label]}; required: {required:g} GB"
            for node, gb in gigabytes.items()
            if gb < required
        }
        if label == "dev_shm" and short:
            listed = "; ".join(f"node {node}: {what}" for node, what in short.items())
            diagnosis.add_finding("note", listed, "in a container, set --shm-size=8g")
        else:
            advice = "free disk space, or exclude the node"
            diagnosis.add_bad_nodes(short, advice, "free disk space, choose another directory, or lower --min-free-gb")
        if not short:
            diagnosis.add_finding("ok", f"at least {min(gigabytes.values()):.1f} GB free in {PLACES[label]} on every node")


def compare_clocks(diagnosis: Diagnosis, timestamps: dict[str, float]) -> None:
    """Check that all nodes have the same time.

    Args:
        diagnosis: Receives the findings.
        timestamps: The time of each node in seconds, all read at about the same moment.
    """
    if len(timestamps) == 1:
        return
    middle = median(timestamps.values())
    skews = {node: timestamp - middle for node, timestamp in timestamps.items()}
    for node, skew in skews.items():
        diagnosis.record(node, "clock_skew_s", skew)
    spread = max(skews.values()) - min(skews.values())
    advice = "synchronize the clocks (chronyc tracking)"
    if len(timestamps) == 2 and spread > MAX_CLOCK_SKEW:  # either of the two may be right
        diagnosis.add_finding("problem", f"the clocks of {' and '.join(timestamps)} differ by {spread:.1f} s", advice)
        return
    wrong = {node: f"its clock is off by {skew:+.1f} s" for node, skew in skews.items() if abs(skew) > MAX_CLOCK_SKEW}
    diagnosis.add_bad_nodes(wrong, "synchronize its clock (chronyc tracking)", advice)
    if not wrong:
        diagnosis.add_finding("ok", f"clocks agree within {spread:.2f} s")


def compare_pair_bandwidth(
    diagnosis: Diagnosis, speeds: dict[str, list[float]], errors: dict[tuple[str, str], str], min_speed: float
) -> None:
    """Check the bandwidth between nodes.

    Args:
        diagnosis: Receives the findings.
        speeds: For each node the speeds of its pairs in GB/s. A pair that failed has speed 0.
        errors: The errors of pairs of nodes.
        min_speed: Required speed in GB/s.
    """
    if len(diagnosis.nodes) == 1:
        diagnosis.add_finding("note", "the job has one node, so there is no bandwidth between nodes to measure")
        return
    best = {node: max(node_speeds) for node, node_speeds in speeds.items()}
    for node, speed in best.items():
        diagnosis.record(node, "network_gb_per_s", speed)
    usual, slow = median(best.values()), {}
    for node, speed in best.items():
        what = f"exchanges at most {speed:.3g} GB/s with other nodes"
        if len(best) > 2 and speed < SLOW_NETWORK * usual:  # with two nodes, either may be the slow one
            slow[node] = f"{what}; the median of all nodes is {usual:.3g} GB/s"
        elif speed < min_speed:
            slow[node] = f"{what}; required: {min_speed:g} GB/s"
    advice = "check the network links (ibstat, ethtool) and NCCL_SOCKET_IFNAME"
    diagnosis.add_bad_nodes(slow, f"{advice}, or exclude the node", advice)
    unexplained = {names: error for names, error in errors.items() if not slow.keys() & set(names)}
    for names, error in unexplained.items():
        diagnosis.add_finding("problem", f"nodes {' and '.join(names)} cannot exchange data ({error})", advice)
    if not slow and not unexplained:
        diagnosis.add_finding("ok", f"pairs of nodes exchange at least {min(best.values()):.3g} GB/s in each direction")


def report_all_reduce(diagnosis: Diagnosis, speeds: list[Result[float]], transfer_bytes: int) -> None:
    """Report the bandwidth of an all-reduce over all processes.

    Args:
        diagnosis: Receives the findings.
        speeds: The bus bandwidth that each rank measured, in GB/s.
        transfer_bytes: Size of the tensor in bytes.
    """
    failed = {rank: f"an all-reduce failed ({speed.error})" for rank, speed in enumerate(speeds) if speed.value is None}
    debug = "run preflight again with NCCL_DEBUG=INFO, or without GPUs with TORCH_CPP_LOG_LEVEL=INFO"
    diagnosis.add_bad_ranks(failed, "exclude the node", debug)
    if not failed:
        speed = min(speed.value or 0.0 for speed in speeds)
        what = f"all-reduce of {transfer_bytes / 10**6:.0f} MB over {len(speeds)} processes"
        diagnosis.add_finding("ok", f"{what}: {speed:.3g} GB/s bus bandwidth")
