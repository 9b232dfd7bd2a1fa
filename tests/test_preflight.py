"""Preflight on real ranks, each of which acts as a node. A fault on one node must be reported for this node and no other."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from slurm_cluster import SlurmCluster

from scale_mae.preflight import compare_gpus, compare_nodes, gpu_health, network_bandwidth, rendezvous, stages, storage
from scale_mae.preflight.command import add_preflight_arguments
from scale_mae.preflight.diagnosis import Diagnosis
from scale_mae.preflight.gpu_health import Gpu, GpuState, MatmulResult
from scale_mae.preflight.options import PreflightOptions
from scale_mae.preflight.rendezvous import Rendezvous, RendezvousError
from scale_mae.preflight.storage import StorageResult
from scale_mae.preflight.timeout import Result, has_hanging_actions, run_with_timeout

PREFLIGHT = [sys.executable, "-m", "scale_mae", "preflight", "--min-free-gb=0.1", "--min-storage-speed=1"]
H100 = [Gpu(f"uuid-{n}", "H100", 80 * 2**30) for n in range(8)]
A100 = [Gpu(f"uuid-{n}", "A100", 80 * 2**30) for n in range(8)]
LOW_REQUIREMENTS = {"min_free_gb": 0.1, "min_storage_speed": 0.1}


# -- faults that one rank injects into itself


def clock_off(options):
    original = time.time
    time.time = lambda: original() + 6000
    return options


def not_shared(options):
    return PreflightOptions(options.run_dir.with_name("other"), **LOW_REQUIREMENTS)


def unwritable(options):
    file = options.run_dir.with_name("file")
    file.touch()
    return PreflightOptions(file / "run", **LOW_REQUIREMENTS)


def full_disk(options):
    original = shutil.disk_usage
    shutil.disk_usage = lambda path: original(path)._replace(free=10**7)
    return options


def stuck_disk(options):
    os.fsync = lambda file: time.sleep(30)
    return options


def slow_disk(options):
    stored = {}

    def slow(file):  # 250 kB/s
        time.sleep((os.fstat(file).st_size - stored.get(file, 0)) / 250_000)
        stored[file] = os.fstat(file).st_size

    os.fsync = slow
    return options


def slow_network(options):
    original = network_bandwidth.send_and_receive
    network_bandwidth.send_and_receive = lambda *arguments: (time.sleep(1), original(*arguments))
    return options


def broken_network(options):
    def fail(*arguments):
        raise RuntimeError("connection reset by peer")

    network_bandwidth.send_and_receive = fail
    return options


def unreachable(options):
    original = dist.new_group

    def late(ranks=None, **options):
        if ranks and int(os.environ["RANK"]) in ranks:
            time.sleep(stages.CHECK_SECONDS / 2 + 1)  # until the peer gives up
        return original(ranks, **options)

    dist.new_group = late
    return options


def wrong_products(options):
    original = torch.Tensor.__matmul__

    def wrong(a, b):
        c = original(a, b)
        if c.dim() == 2:
            c[17, 3] += 1
        return c

    torch.Tensor.__matmul__ = wrong
    return options


def hang(options):
    time.time = lambda: time.sleep(6)  # in the main thread, when the clocks are read
    return options


FAULTS = {
    fault.__name__: fault
    for fault in (
        clock_off,
        not_shared,
        unwritable,
        full_disk,
        stuck_disk,
        slow_disk,
        slow_network,
        broken_network,
        unreachable,
        wrong_products,
        hang,
    )
}


def run_as_node(options, faults, check_seconds, grace_seconds, absent, gpu_states):
    """Run preflight on this rank, as node0, node1, ... Return the exit code and the output."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank in absent:
        return None, ""
    os.environ |= {"SLURMD_NODENAME": f"node{rank}", "SLURM_STEP_NODELIST": ",".join(f"node{r}" for r in range(size))}
    storage.FILE_BYTES = 4 * 10**6
    stages.CHECK_SECONDS, rendezvous.GRACE_SECONDS = check_seconds, grace_seconds
    # Ranks share the cores of a busy machine: one may read its clock seconds late, or be many times slower than another.
    compare_nodes.MAX_CLOCK_SKEW = 600.0
    compare_nodes.SLOW_NETWORK = 0.1 if ["slow_network"] in faults.values() else 0.001
    if gpu_states:
        gpu_health.get_gpu_state = lambda device: gpu_states[rank]
        gpu_health.measure_matmul = lambda device: MatmulResult((), 700.0)  # equal, because a slow GPU is a problem
    for fault in faults.get(rank, ()):
        options = FAULTS[fault](options)
    with redirect_stdout(io.StringIO()) as output:
        exit_code = stages.run_preflight(options)
    return exit_code, output.getvalue()


@pytest.fixture
def preflight(tmp_path):
    """Return ``preflight(size, {rank: [fault]}, exit_code)``, which runs preflight on ranks that act as nodes.

    It checks that all ranks (or those in ``checked_ranks``) end with this exit code, and returns the bad nodes and the output.
    """

    def run(size, faults, exit_code, checked_ranks=None, check=20.0, grace=15.0, absent=(), gpu_states=None, **requirements):
        options = PreflightOptions(tmp_path / "run", **(LOW_REQUIREMENTS | requirements))
        results = run_ranks(size, run_as_node, options, faults, check, grace, absent, gpu_states, timeout=240)
        checked = [results[rank] for rank in checked_ranks or range(size)]
        assert {code for code, _ in checked} == {exit_code}, results
        assert not list(tmp_path.rglob("*.bin")), "a test file was not deleted"
        bad_nodes = options.bad_nodes.read_text().split() if options.bad_nodes.exists() else []
        return bad_nodes, "".join(text for _, text in results)

    return run


def problems(output):
    return [line for line in output.splitlines() if line.startswith("PROBLEM")]


def test_good_nodes_pass_and_an_old_list_of_bad_nodes_is_deleted(preflight, tmp_path):
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/bad_nodes").write_text("node1\n")
    bad_nodes, output = preflight(4, {}, 0)
    assert bad_nodes == problems(output) == []
    assert not (tmp_path / "run/slurm/bad_nodes").exists()
    for expected in (
        "4 processes on 4 nodes: node0, node1, node2, node3",
        "is shared",
        "in each direction",
        "GB/s bus bandwidth",
    ):
        assert expected in output
    assert output.endswith("no problems\n")


def test_every_fault_is_reported_for_its_node_only(preflight):
    faults = {1: ["clock_off"], 3: ["not_shared"], 4: ["unwritable"], 5: ["full_disk"]}
    bad_nodes, output = preflight(6, faults, 1)
    assert sorted(bad_nodes) == ["node1", "node3", "node4", "node5"]
    reported = problems(output)
    assert "bad nodes, listed in" in output
    for node, reason in (("node1", "clock is off by +60"), ("node3", "do not see the files"), ("node4", "Not a directory")):
        assert [line for line in reported if f"node {node}: " in line and reason in line], reported
    full = [line for line in reported if "node node5: only 0.0 GB free" in line]
    assert len(full) == 2, reported  # the run directory and /tmp
    assert len(reported) == 5, reported


def test_if_rank_0_does_not_share_the_directory_another_node_writes_the_list(preflight):
    bad_nodes, output = preflight(3, {0: ["not_shared"]}, 1)
    assert bad_nodes == ["node0"]
    assert len(problems(output)) == 1


def test_problem_of_every_node_marks_no_node_as_bad(preflight):
    bad_nodes, output = preflight(2, {}, 1, min_free_gb=1e9, min_storage_speed=1e9, min_network_speed=1e9)
    assert bad_nodes == []
    assert [line for line in problems(output) if "every node" in line and "required: 1e+09" in line]
    assert len(problems(output)) == 3


def test_two_clocks_that_differ_mark_no_node_as_bad(preflight):
    bad_nodes, output = preflight(2, {1: ["clock_off"]}, 1)
    assert bad_nodes == []
    assert "the clocks of node0 and node1 differ by 60" in output


def test_hanging_disk_does_not_hang_preflight(preflight):
    start = time.monotonic()
    bad_nodes, output = preflight(3, {2: ["stuck_disk"]}, 1, check=3.0)
    assert bad_nodes == ["node2"]
    assert "did not finish in 3 s" in output
    assert time.monotonic() - start < 25


def test_file_system_that_is_slow_on_all_nodes_is_no_problem(preflight):
    bad_nodes, output = preflight(2, {0: ["slow_disk"], 1: ["slow_disk"]}, 0, check=8.0, min_storage_speed=None)
    assert bad_nodes == problems(output) == []
    assert "every node writes at least 0 MB/s and reads" in output
    assert "a checkpoint may take long" in output


def test_product_with_one_wrong_element_is_found(preflight):
    bad_nodes, output = preflight(3, {1: ["wrong_products"]}, 1)
    assert bad_nodes == ["node1"]
    assert "wrong results in float32, bfloat16" in output
    assert "bandwidth is not measured" in output


def test_node_with_fewer_gpus_is_bad(preflight):
    gpu_states = [GpuState(tuple(gpus), ()) for gpus in (H100, H100, H100[:7])]
    bad_nodes, output = preflight(3, {}, 1, gpu_states=gpu_states)
    assert bad_nodes == ["node2"]
    assert "7 GPUs (H100 80 GiB), but other nodes have 8 GPUs (H100 80 GiB)" in output


def test_only_the_slow_node_is_bad(preflight):
    bad_nodes, output = preflight(4, {1: ["slow_network"]}, 1)
    assert bad_nodes == ["node1"]
    assert "node node1: exchanges at most" in problems(output)[0]


def test_node_that_no_transfer_reaches_is_bad(preflight):
    bad_nodes, output = preflight(6, {2: ["unreachable"]}, 1, check=10.0)
    assert bad_nodes == ["node2"]
    assert "exchanges at most 0 GB/s" in output


def test_two_nodes_that_cannot_exchange_data_are_both_reported_and_neither_is_bad(preflight):
    bad_nodes, output = preflight(2, {1: ["broken_network"]}, 1, check=4.0)
    assert bad_nodes == []
    assert "nodes node0 and node1 cannot exchange data" in output


def test_process_that_never_joins_is_reported_in_time(preflight):
    start = time.monotonic()
    bad_nodes, output = preflight(3, {}, 1, checked_ranks=(0, 1), absent=(2,), timeout=3.0)
    assert bad_nodes == ["node2"]
    assert "node node2: a process did not join in 3 s" in output
    assert time.monotonic() - start < 20


def test_process_that_stops_answering_is_reported(preflight):
    bad_nodes, output = preflight(3, {1: ["hang"]}, 1, checked_ranks=(0, 2), grace=3.0)
    assert bad_nodes == ["node1"]
    assert "node node1: a process did not answer in 3 s (stage: clocks)" in output


def test_node_of_a_missing_rank_0_is_bad(preflight):
    bad_nodes, _ = preflight(3, {}, 1, checked_ranks=(1, 2), absent=(0,), timeout=2.0, grace=1.0)
    assert bad_nodes == ["node0"]


# -- parts


@pytest.mark.parametrize("nodes", range(1, 12))
def test_each_node_exchanges_with_two_others_and_is_in_one_pair_per_round(nodes):
    peers = {node: set() for node in range(nodes)}
    for pairs in network_bandwidth.get_pair_rounds(nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
        for a, b in pairs:
            peers[a].add(b)
            peers[b].add(a)
    assert all(len(others) == min(2, nodes - 1) for others in peers.values())


@pytest.mark.parametrize(
    ("gpus", "bad", "problem"),
    [
        ([H100, H100], [], False),
        ([H100, H100, [], H100], ["n2"], True),
        ([H100[:7], H100], ["n0"], True),  # of two nodes, the one with fewer GPUs
        ([H100, A100], [], True),
        ([H100, H100, A100], ["n2"], True),
        ([[], []], [], False),
    ],
)
def test_nodes_with_different_gpus(gpus, bad, problem):
    diagnosis = Diagnosis([f"n{n}" for n in range(len(gpus))])
    compare_gpus.compare_gpus(diagnosis, [Result(GpuState(tuple(of_node), ())) for of_node in gpus])
    assert (diagnosis.bad_nodes, diagnosis.passed) == (bad, not problem)


def test_each_process_may_see_only_its_own_gpu():
    diagnosis = Diagnosis(["a", "a", "b", "b"])
    compare_gpus.compare_gpus(diagnosis, [Result(GpuState((gpu,), ())) for gpu in H100[:4]])
    assert diagnosis.findings == [("ok", "2 GPUs (H100 80 GiB) on every node", "")]


def test_more_processes_than_gpus_on_every_node_marks_no_node_as_bad():
    diagnosis = Diagnosis(["a", "a", "b", "b"])
    compare_gpus.compare_gpus(diagnosis, [Result(GpuState((gpu,), ())) for gpu in (H100[0], H100[0], H100[1], H100[1])])
    assert diagnosis.bad_nodes == []
    assert "--ntasks-per-node" in diagnosis.findings[0].advice


def test_node_with_a_slow_gpu_is_bad():
    diagnosis = Diagnosis(["a", "b", "c"])
    speeds = [Result(MatmulResult((), teraflops)) for teraflops in (700.0, 680.0, 400.0)]
    compare_gpus.compare_matmul(diagnosis, speeds, on_gpu=True)
    assert diagnosis.bad_nodes == ["c"]
    shared_machines = Diagnosis(["a", "b", "c"])
    compare_gpus.compare_matmul(shared_machines, speeds, on_gpu=False)
    assert shared_machines.passed


@pytest.mark.parametrize(
    ("speeds", "required", "bad", "levels"),
    [
        ([(90, 900)] * 4, None, [], ["ok"]),
        ([(8, 9), (7, 9), (8, 8), (15, 30)], None, [], ["note"]),  # many nodes share one file system
        ([(8, 9)], None, [], ["note"]),
        ([(90, 5000), (90, 5000), (90, 40)], None, [], ["note"]),  # the other nodes read from a cache
        ([(600, 5000), (600, 5000), (90, 90)], None, [], ["ok"]),
        ([(90, 900), (90, 900), (9, 9)], None, ["n2"], ["problem"]),
        ([(90, 900), (90, 900), (9, 900)], None, ["n2"], ["problem"]),
        ([(90, 900), (90, 900), (9, 9)], 5, [], ["ok"]),
        ([(90, 900), (90, 900), (45, 900)], 50, ["n2"], ["problem"]),
        ([(8, 9)] * 4, 50, [], ["problem"]),
    ],
)
def test_slow_storage_is_a_problem_if_a_speed_is_required_or_one_node_is_much_slower(speeds, required, bad, levels):
    diagnosis = Diagnosis([f"n{n}" for n in range(len(speeds))])
    written = {node: Result(StorageResult("a", b"", *map(float, s))) for node, s in zip(diagnosis.nodes, speeds, strict=True)}
    compare_nodes.compare_storage(diagnosis, written, [], PreflightOptions(Path("runs"), min_storage_speed=required))
    assert (diagnosis.bad_nodes, [finding.level for finding in diagnosis.findings]) == (bad, levels)
    assert diagnosis.measurements["n0"] == {"write_mb_per_s": speeds[0][0], "read_mb_per_s": speeds[0][1]}


def test_no_storage_speed_is_required_by_default():
    parser = argparse.ArgumentParser()
    add_preflight_arguments(parser)
    assert parser.parse_args(["--run-dir=runs"]).min_storage_speed is None is PreflightOptions(Path("runs")).min_storage_speed
    assert parser.parse_args(["--run-dir=runs", "--min-storage-speed=50"]).min_storage_speed == 50


def test_driver_reports_problems_of_a_gpu(monkeypatch):
    errors = {name: type(name, (Exception,), {}) for name in ("NVMLError_NotSupported", "NVMLError_NoPermission")}

    def no_rows(gpu):
        raise errors["NVMLError_NotSupported"]

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEccErrors=lambda gpu, kind, counter: 3,
        nvmlDeviceGetRemappedRows=lambda gpu: (0, 1, 1, 0),
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(free=20, total=80),
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        **errors,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    reported = list(gpu_health.get_driver_problems("1234"))
    assert [word in line for word, line in zip(("3 uncorrected", "after a reset", "PID 1", "25%"), reported, strict=True)]
    nvml.nvmlDeviceGetRemappedRows = no_rows
    assert len(list(gpu_health.get_driver_problems("1234"))) == 3


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def meeting(monkeypatch):
    """Return the rendezvous of a job with one process. Tests write to its store."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return Rendezvous(1.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_data_of_other_programs_runs_no_code_and_counts_as_missing(meeting, rank, tmp_path):
    meeting.world_size = 2
    meeting.rank = rank
    meeting.store.set(f"clocks/{1 - rank}", pickle.dumps(Evil(tmp_path / "evil")))
    meeting.store.set("clocks/decision", pickle.dumps(Evil(tmp_path / "evil")))
    if rank == 0:
        assert meeting.gather_and_decide("clocks", 1.5, float, list[int], list, 1.0) == [0]
    else:
        with pytest.raises(RendezvousError, match="malformed"):
            meeting.gather_and_decide("clocks", 1.5, float, bool, bool, 1.0)
    assert not (tmp_path / "evil").exists()


LOCAL = stages.LocalResults(
    Result(GpuState(tuple(H100), ("used by another process (PID 1)",))),
    Result(None, "did not finish in 20 s"),
    Result(StorageResult("a.bin", b"\x00\xff", 100.0, 2.5)),
    None,
)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (LOCAL, stages.LocalResults),
        (
            stages.LocalResults(Result(None), Result(MatmulResult((), 1.0)), None, Result({"/tmp": 1})),
            stages.LocalResults,
        ),
        (Result(None), Result[float | None]),
        (Result(1.5), Result[float | None]),
        (Result(None, "disk full"), Result[None]),
        ((1, ["node1"]), tuple[int, list[str]]),
    ],
)
def test_posted_values_arrive_unchanged(meeting, value, kind):
    assert meeting.post_last_value(value, kind, [0]) == {0: value}


@pytest.mark.parametrize(
    ("posted", "kind"),
    [
        ("", str),
        ("\udcff".encode(errors="surrogateescape"), str),
        ("[" * 100_000, list[str]),
        ("1", bool),
        ("true", int),
        ("1.5", int),
        ("NaN", float),
        ("1" + "0" * 400, float),
        ('["a", 1]', list[str]),
        ("[1]", tuple[int, list[str]]),
        ('{"value": 1.5}', Result[float]),
        ('{"value": "1.5", "error": ""}', Result[float]),
        ('{"value": 1.5, "error": "", "more": 1}', Result[float]),
        (
            '{"value": {"file_name": "a", "head": "xy", "write_mb_per_s": 1, "read_mb_per_s": 1}, "error": ""}',
            Result[StorageResult],
        ),
        ("null", stages.LocalResults),
    ],
)
def test_value_of_another_type_counts_as_missing(meeting, posted, kind):
    meeting.world_size = 2
    meeting.store.set("last/1", posted)
    assert meeting.post_last_value("", kind, [1]) == {}


def test_action_that_hangs_is_abandoned():
    assert run_with_timeout(5, lambda: 1) == Result(1)
    assert run_with_timeout(5, lambda: 1 / 0) == Result(None, "division by zero")
    assert run_with_timeout(0.1, lambda: time.sleep(1)) == Result(None, "did not finish in 0.1 s")
    assert has_hanging_actions()


def test_file_with_other_bytes_than_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FILE_BYTES", 10**6)
    written = storage.write_and_read_file(tmp_path / "a", 5)
    assert (tmp_path / "a").stat().st_size == 10**6
    assert storage.find_nodes_with_missing_files(tmp_path, {"n": written}, seconds=0) == []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: (tmp_path / "a").write_bytes(b"other"))
    with pytest.raises(OSError, match="other bytes than were written"):
        storage.write_and_read_file(tmp_path / "a", 5)


# -- the command


def test_command_on_one_process_prints_json(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*PREFLIGHT, "--run-dir", str(tmp_path), "--json"], capture_output=True, text=True, env=env, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["passed"]
    assert summary["bad_nodes"] == []
    (measurements,) = summary["nodes"].values()
    assert measurements.keys() >= {"matmul_tflops", "write_mb_per_s", "read_mb_per_s", "run_dir_free_gb", "tmp_free_gb"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env["OMP_NUM_THREADS"] = "1"
        yield cluster


@pytest.mark.service("slurm-wlm", "munge")
def test_srun_checks_two_nodes_in_a_minute(cluster, tmp_path):
    start = time.monotonic()
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", *PREFLIGHT, "--run-dir", str(tmp_path / "run")]
    done = cluster.run(*command, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr + cluster.logs()
    assert time.monotonic() - start < 60
    assert "2 processes on 2 nodes: 127.0.0.1, 127.0.0.2" in done.stdout
    assert done.stdout.endswith("no problems\n")
    assert not (tmp_path / "run/slurm/bad_nodes").exists()


@pytest.mark.service("slurm-wlm", "munge")
def test_srun_reports_the_node_whose_process_does_not_join(cluster, tmp_path):
    script = f"[ $SLURM_PROCID = 1 ] && exec sleep 60; exec {' '.join(PREFLIGHT)} --timeout=5 --run-dir={tmp_path}/run"
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "sh", "-c", script]
    done = cluster.run(*command, timeout=100)
    assert done.returncode != 0
    assert "node 127.0.0.2: a process did not join in 5 s" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run/slurm/bad_nodes").read_text() == "127.0.0.2\n"


@pytest.mark.gpu
def test_gpu_is_visible_and_multiplies_correctly():
    device = torch.device("cuda", 0)
    state = gpu_health.get_gpu_state(device)
    assert len(state.visible) == torch.cuda.device_count()
    result = gpu_health.measure_matmul(device)
    assert result.wrong_dtypes == ()
    assert result.tflops > 1


@pytest.mark.gpu
def test_preflight_on_a_gpu(preflight):
    bad_nodes, output = preflight(1, {}, 0)
    assert bad_nodes == []
    assert "1 GPU (" in output
