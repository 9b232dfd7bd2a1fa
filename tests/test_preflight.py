"""Preflight on real ranks, each of which plays a node of its own: whatever is wrong with one, that one is named, no other."""

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

from scale_mae.preflight import checks, command, diagnosis, measurements, rendezvous
from scale_mae.preflight.measurements import Gpu, NodeState
from scale_mae.preflight.options import PreflightOptions
from scale_mae.preflight.rendezvous import CallResult, LostError, Rendezvous, within

PREFLIGHT = [sys.executable, "-m", "scale_mae", "preflight", "--need-gb=0.1", "--min-mbps=1"]
H100 = [Gpu(f"uuid-{n}", "H100", 80 * 2**30) for n in range(8)]
A100 = [Gpu(f"uuid-{n}", "A100", 80 * 2**30) for n in range(8)]
ENOUGH = {"need_gb": 0.1, "min_mbps": 0.1}


# -- faults, each injected at the edge of one rank's process


def clock_off(demands):
    right = time.time
    time.time = lambda: right() + 6000
    return demands


def elsewhere(demands):
    return PreflightOptions(demands.run_dir.with_name("not_shared"), **ENOUGH)


def unwritable(demands):
    file = demands.run_dir.with_name("file")
    file.touch()
    return PreflightOptions(file / "run", **ENOUGH)


def full_disk(demands):
    right = shutil.disk_usage
    shutil.disk_usage = lambda path: right(path)._replace(free=10**7)
    return demands


def stuck_disk(demands):
    os.fsync = lambda file: time.sleep(30)
    return demands


def slow_disk(demands):
    stored = {}

    def slow(file):  # 250 kB a second
        time.sleep((os.fstat(file).st_size - stored.get(file, 0)) / 250_000)
        stored[file] = os.fstat(file).st_size

    os.fsync = slow
    return demands


def slow_network(demands):
    right = measurements.send_and_receive
    measurements.send_and_receive = lambda *words: (time.sleep(1), right(*words))
    return demands


def broken_network(demands):
    def fail(*words):
        raise RuntimeError("connection reset by peer")

    measurements.send_and_receive = fail
    return demands


def unreachable(demands):
    right = dist.new_group

    def late(ranks=None, **options):
        if ranks and int(os.environ["RANK"]) in ranks:
            time.sleep(checks.CHECK / 2 + 1)  # until the other one gives up
        return right(ranks, **options)

    dist.new_group = late
    return demands


def wrong_products(demands):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        c = right(a, b)
        if c.dim() == 2:
            c[17, 3] += 1
        return c

    torch.Tensor.__matmul__ = wrong
    return demands


def hang(demands):
    time.time = lambda: time.sleep(6)  # in the main thread, when the clocks are read
    return demands


FAULTS = {
    fault.__name__: fault
    for fault in (
        clock_off,
        elsewhere,
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


def as_node(demands, faults, check, grace, absent, seen):
    """(exit code, what is printed) of preflight on this rank, which is a node called node0, node1, ..."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank in absent:
        return None, ""
    os.environ |= {"SLURMD_NODENAME": f"node{rank}", "SLURM_STEP_NODELIST": ",".join(f"node{r}" for r in range(size))}
    measurements.FILE_BYTES = 4 * 10**6
    checks.CHECK, checks.GRACE, rendezvous.GRACE = check, grace, grace
    # Ranks share this machine's cores, with others besides: one may read its clock seconds late, or be many times as slow.
    diagnosis.SKEW, diagnosis.EQUAL_BANDWIDTH = 600.0, 0.1 if ["slow_network"] in faults.values() else 0.001
    if seen:
        measurements.look = lambda device: seen[rank]
        measurements.multiply = lambda device: measurements.Product(
            (), 700.0
        )  # a GPU that is slower than others is one to be named
    for fault in faults.get(rank, ()):
        demands = FAULTS[fault](demands)
    with redirect_stdout(io.StringIO()) as printed:
        code = checks.preflight(demands)
    return code, printed.getvalue()


@pytest.fixture
def fly(tmp_path):
    """``fly(size, {rank: [fault]})``: (bad nodes in the file, all that is printed); every rank ends with the same code."""

    def run_it(size, faults, wanted_code, ranks_that_count=None, check=20.0, grace=15.0, absent=(), seen=None, **options):
        demands = PreflightOptions(tmp_path / "run", **(ENOUGH | options))
        outcomes = run_ranks(size, as_node, demands, faults, check, grace, absent, seen, timeout=240)
        counted = [outcomes[rank] for rank in ranks_that_count or range(size)]
        assert {code for code, _ in counted} == {wanted_code}, outcomes
        assert not list(tmp_path.rglob("*.bin")), "a trial file was left"
        named = demands.bad_nodes.read_text().split() if demands.bad_nodes.exists() else []
        return named, "".join(text for _, text in outcomes)

    return run_it


def problems(printed):
    return [line for line in printed.splitlines() if line.startswith("PROBLEM")]


def test_fit_nodes_pass_and_an_old_verdict_goes(fly, tmp_path):
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/bad_nodes").write_text("node1\n")
    named, printed = fly(4, {}, 0)
    assert named == problems(printed) == []
    assert not (tmp_path / "run/slurm/bad_nodes").exists()
    for said in ("4 processes on 4 nodes: node0, node1, node2, node3", "is shared", "GB/s each way", "GB/s of bus bandwidth"):
        assert said in printed
    assert printed.endswith("no problems\n")


def test_every_fault_is_told_of_its_node_and_of_no_other(fly):
    faults = {1: ["clock_off"], 3: ["elsewhere"], 4: ["unwritable"], 5: ["full_disk"]}
    named, printed = fly(6, faults, 1)
    assert sorted(named) == ["node1", "node3", "node4", "node5"]
    told = problems(printed)
    assert "bad nodes, named in" in printed
    for node, reason in (("node1", "clock is off by +60"), ("node3", "not seen"), ("node4", "Not a directory")):
        assert [line for line in told if f"node {node}: " in line and reason in line], told
    assert len([line for line in told if "node node5: 0.0 GB free" in line]) == 2, told  # the run directory and /tmp
    assert len(told) == 5, told


def test_rank_0_may_be_the_one_apart_and_another_node_writes_the_names(fly):
    named, printed = fly(3, {0: ["elsewhere"]}, 1)
    assert named == ["node0"]
    assert len(problems(printed)) == 1


def test_what_every_node_has_is_blamed_on_none(fly):
    named, printed = fly(2, {}, 1, need_gb=1e9, min_mbps=1e9, min_gbps=1e9)
    assert named == []
    assert [line for line in problems(printed) if "every node" in line and "1e+09 are wanted" in line]
    assert len(problems(printed)) == 3


def test_of_two_clocks_either_may_be_right(fly):
    named, printed = fly(2, {1: ["clock_off"]}, 1)
    assert named == []
    assert "the clocks of node0 and node1 differ by 60" in printed


def test_a_disk_that_hangs_does_not_hang_preflight(fly):
    began = time.monotonic()
    named, printed = fly(3, {2: ["stuck_disk"]}, 1, check=3.0)
    assert named == ["node2"]
    assert "no end in 3 s" in printed
    assert time.monotonic() - began < 25


def test_a_file_system_that_all_nodes_keep_busy_is_slow_and_no_problem(fly):
    named, printed = fly(2, {0: ["slow_disk"], 1: ["slow_disk"]}, 0, check=8.0, min_mbps=None)
    assert named == problems(printed) == []
    assert "every node writes at least 0 and reads" in printed
    assert "a checkpoint may take long" in printed


def test_a_wrong_product_is_found_by_one_element(fly):
    named, printed = fly(3, {1: ["wrong_products"]}, 1)
    assert named == ["node1"]
    assert "wrong in float32, bfloat16" in printed
    assert "bandwidth is not measured" in printed


def test_a_node_with_fewer_gpus_is_named(fly):
    seen = [NodeState(tuple(H100), ()), NodeState(tuple(H100), ()), NodeState(tuple(H100[:7]), ())]
    named, printed = fly(3, {}, 1, seen=seen)
    assert named == ["node2"]
    assert "has 7 GPUs: H100 (80 GiB) where others have 8 GPUs: H100 (80 GiB)" in printed


def test_the_slow_node_is_named_and_only_it(fly):
    named, printed = fly(4, {1: ["slow_network"]}, 1)
    assert named == ["node1"]
    assert "node node1: exchanges at best" in problems(printed)[0]


def test_a_node_that_no_transfer_reaches_is_named(fly):
    named, printed = fly(6, {2: ["unreachable"]}, 1, check=10.0)
    assert named == ["node2"]
    assert "exchanges at best 0 GB/s" in printed


def test_two_nodes_that_cannot_exchange_are_told_and_neither_is_blamed(fly):
    named, printed = fly(2, {1: ["broken_network"]}, 1, check=4.0)
    assert named == []
    assert "nodes node0 and node1 cannot exchange data" in printed


def test_a_process_that_never_comes_is_named_in_time(fly):
    began = time.monotonic()
    named, printed = fly(3, {}, 1, ranks_that_count=(0, 1), absent=(2,), timeout=3.0)
    assert named == ["node2"]
    assert "node node2: did not come in 3 s" in printed
    assert time.monotonic() - began < 20


def test_a_process_that_stops_answering_is_named(fly):
    named, printed = fly(3, {1: ["hang"]}, 1, ranks_that_count=(0, 2), grace=3.0)
    assert named == ["node1"]
    assert "node node1: no answer in 3 s (clocks)" in printed


def test_without_rank_0_its_node_is_named(fly):
    named, _ = fly(3, {}, 1, ranks_that_count=(1, 2), absent=(0,), timeout=2.0, grace=1.0)
    assert named == ["node0"]


# -- parts


@pytest.mark.parametrize("nodes", range(1, 12))
def test_each_node_meets_two_others_and_is_in_one_pair_at_a_time(nodes):
    met = {node: set() for node in range(nodes)}
    for pairs in measurements.rounds(nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
        for a, b in pairs:
            met[a].add(b)
            met[b].add(a)
    assert all(len(others) == min(2, nodes - 1) for others in met.values())


@pytest.mark.parametrize(
    ("gpus", "bad", "problem"),
    [
        ([H100, H100], [], False),
        ([H100, H100, [], H100], ["n2"], True),
        ([H100[:7], H100], ["n0"], True),  # of two, the one with fewer
        ([H100, A100], [], True),
        ([H100, H100, A100], ["n2"], True),
        ([[], []], [], False),
    ],
)
def test_accelerators_that_differ(gpus, bad, problem):
    report = diagnosis.Report([f"n{n}" for n in range(len(gpus))])
    diagnosis.accelerators(report, [CallResult(NodeState(tuple(of_node), ())) for of_node in gpus])
    assert (report.bad, report.fit) == (bad, not problem)


def test_each_process_may_see_its_own_gpu_only():
    report = diagnosis.Report(["a", "a", "b", "b"])
    diagnosis.accelerators(report, [CallResult(NodeState((gpu,), ())) for gpu in H100[:4]])
    assert report.findings == [("ok", "2 GPUs: H100 (80 GiB) on every node", "")]


def test_more_processes_than_gpus_on_every_node_is_the_job_s_fault():
    report = diagnosis.Report(["a", "a", "b", "b"])
    diagnosis.accelerators(report, [CallResult(NodeState((gpu,), ())) for gpu in (H100[0], H100[0], H100[1], H100[1])])
    assert report.bad == []
    assert "--ntasks-per-node" in report.findings[0].advice


def test_a_gpu_slower_than_the_others_is_named():
    report = diagnosis.Report(["a", "b", "c"])
    speeds = [CallResult(measurements.Product((), teraflops)) for teraflops in (700.0, 680.0, 400.0)]
    diagnosis.arithmetic(report, speeds, on_gpu=True)
    assert report.bad == ["c"]
    shared_machines = diagnosis.Report(["a", "b", "c"])
    diagnosis.arithmetic(shared_machines, speeds, on_gpu=False)
    assert shared_machines.fit


@pytest.mark.parametrize(
    ("speeds", "min_mbps", "bad", "levels"),
    [
        ([(90, 900)] * 4, None, [], ["ok"]),
        ([(8, 9), (7, 9), (8, 8), (15, 30)], None, [], ["note"]),  # many nodes share what there is
        ([(8, 9)], None, [], ["note"]),
        ([(90, 5000), (90, 5000), (90, 40)], None, [], ["note"]),  # others read from a cache
        ([(600, 5000), (600, 5000), (90, 90)], None, [], ["ok"]),
        ([(90, 900), (90, 900), (9, 9)], None, ["n2"], ["problem"]),
        ([(90, 900), (90, 900), (9, 900)], None, ["n2"], ["problem"]),
        ([(90, 900), (90, 900), (9, 9)], 5, [], ["ok"]),
        ([(90, 900), (90, 900), (45, 900)], 50, ["n2"], ["problem"]),
        ([(8, 9)] * 4, 50, [], ["problem"]),
    ],
)
def test_slow_storage_is_a_problem_where_a_speed_is_wanted_or_one_node_is_apart(speeds, min_mbps, bad, levels):
    report = diagnosis.Report([f"n{n}" for n in range(len(speeds))])
    written = {
        node: CallResult(measurements.Written("a", b"", *map(float, s))) for node, s in zip(report.nodes, speeds, strict=True)
    }
    diagnosis.shared_directory(report, written, [], "runs", min_mbps)
    assert (report.bad, [finding.level for finding in report.findings]) == (bad, levels)
    assert report.figures["n0"] == {"write_mbps": speeds[0][0], "read_mbps": speeds[0][1]}


def test_no_speed_of_storage_is_wanted_unless_given():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args(["--run-dir=runs"]).min_mbps is None is PreflightOptions(Path("runs")).min_mbps
    assert parser.parse_args(["--run-dir=runs", "--min-mbps=50"]).min_mbps == 50


def test_what_the_driver_knows_against_a_gpu(monkeypatch):
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
    told = list(measurements.nvml_troubles("1234"))
    assert [word in line for word, line in zip(("3 uncorrected", "waits for a reset", "process 1", "25%"), told, strict=True)]
    nvml.nvmlDeviceGetRemappedRows = no_rows
    assert len(list(measurements.nvml_troubles("1234"))) == 3


class Evil:
    """Unpickled, makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def call(monkeypatch):
    """The only process of a job, whose store any test may write to."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return Rendezvous(1.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_strangers_post_runs_no_code_and_is_no_answer(call, rank, tmp_path):
    call.size = 2
    call.rank = rank
    call.store.set(f"clocks/{1 - rank}", pickle.dumps(Evil(tmp_path / "evil")))
    call.store.set("clocks/judgement", pickle.dumps(Evil(tmp_path / "evil")))
    if rank == 0:
        assert call.settle("clocks", 1.5, (float, list[int]), list, 1.0) == [0]
    else:
        with pytest.raises(LostError, match="malformed"):
            call.settle("clocks", 1.5, (float, bool), bool, 1.0)
    assert not (tmp_path / "evil").exists()


LOCAL = checks.Local(
    CallResult(NodeState(tuple(H100), ("used by process 1",))),
    CallResult(None, "no end in 20 s"),
    CallResult(measurements.Written("a.bin", b"\x00\xff", 100.0, 2.5)),
    None,
)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (LOCAL, checks.Local),
        (
            checks.Local(CallResult(None), CallResult(measurements.Product((), 1.0)), None, CallResult({"/tmp": 1})),
            checks.Local,
        ),
        (CallResult(None), CallResult[float | None]),
        (CallResult(1.5), CallResult[float | None]),
        (CallResult(None, "disk full"), CallResult[None]),
        ((1, ["node1"]), tuple[int, list[str]]),
    ],
)
def test_what_is_posted_arrives_as_it_was(call, value, kind):
    assert call.leave(value, kind, [0]) == {0: value}


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
        ('{"value": 1.5}', CallResult[float]),
        ('{"value": "1.5", "error": ""}', CallResult[float]),
        ('{"value": 1.5, "error": "", "more": 1}', CallResult[float]),
        (
            '{"value": {"name": "a", "head": "xy", "write_mbps": 1, "read_mbps": 1}, "error": ""}',
            CallResult[measurements.Written],
        ),
        ("null", checks.Local),
    ],
)
def test_what_is_not_of_the_type_is_no_answer(call, posted, kind):
    call.size = 2
    call.store.set("left/1", posted)
    assert call.leave("", kind, [1]) == {}


def test_an_action_has_a_limited_time():
    assert within(5, lambda: 1) == CallResult(1)
    assert within(5, lambda: 1 / 0) == CallResult(None, "division by zero")
    assert within(0.1, lambda: time.sleep(1)) == CallResult(None, "no end in 0.1 s")
    assert rendezvous.hanging()


def test_a_file_that_reads_otherwise_than_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "FILE_BYTES", 10**6)
    written = measurements.write_and_read(tmp_path / "a", 5)
    assert (tmp_path / "a").stat().st_size == 10**6
    assert measurements.unseen(tmp_path, {"n": written}, seconds=0) == []
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: (tmp_path / "a").write_bytes(b"other"))
    with pytest.raises(OSError, match="not what was written"):
        measurements.write_and_read(tmp_path / "a", 5)


# -- the command


def test_the_command_alone_prints_json(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*PREFLIGHT, "--run-dir", str(tmp_path), "--json"], capture_output=True, text=True, env=env, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["fit"]
    assert facts["bad_nodes"] == []
    (figures,) = facts["nodes"].values()
    assert figures.keys() >= {"matmul_tflops", "write_mbps", "read_mbps", "run_dir_free_gb", "tmp_free_gb"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env["OMP_NUM_THREADS"] = "1"
        yield cluster


@pytest.mark.service("slurm-wlm", "munge")
def test_srun_looks_over_two_nodes_in_a_minute(cluster, tmp_path):
    began = time.monotonic()
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", *PREFLIGHT, "--run-dir", str(tmp_path / "run")]
    done = cluster.run(*command, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr + cluster.logs()
    assert time.monotonic() - began < 60
    assert "2 processes on 2 nodes: 127.0.0.1, 127.0.0.2" in done.stdout
    assert done.stdout.endswith("no problems\n")
    assert not (tmp_path / "run/slurm/bad_nodes").exists()


@pytest.mark.service("slurm-wlm", "munge")
def test_srun_names_the_node_whose_process_does_not_come(cluster, tmp_path):
    script = f"[ $SLURM_PROCID = 1 ] && exec sleep 60; exec {' '.join(PREFLIGHT)} --timeout=5 --run-dir={tmp_path}/run"
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "sh", "-c", script]
    done = cluster.run(*command, timeout=100)
    assert done.returncode != 0
    assert "node 127.0.0.2: did not come in 5 s" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run/slurm/bad_nodes").read_text() == "127.0.0.2\n"


@pytest.mark.gpu
def test_a_gpu_is_looked_at_and_multiplies_right():
    device = torch.device("cuda", 0)
    seen = measurements.look(device)
    assert len(seen.gpus) == torch.cuda.device_count()
    product = measurements.multiply(device)
    assert product.wrong == ()
    assert product.teraflops > 1


@pytest.mark.gpu
def test_preflight_on_a_gpu(fly):
    named, printed = fly(1, {}, 0)
    assert named == []
    assert "1 GPUs" in printed
