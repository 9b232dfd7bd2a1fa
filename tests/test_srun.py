"""Runs that ``srun`` starts without ``scale-mae submit``, on real Slurm daemons with two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from slurm_cluster import SlurmCluster

from scale_mae.checkpoint.manifest import read_manifest
from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.config import UserError
from scale_mae.distributed.launcher import count_tasks_on_node, get_first_host, get_ranks

TRAIN = [sys.executable, "-m", "scale_mae", "pretrain", "debug"]
ON_TWO_NODES = ["srun", "--nodes=2", "--ntasks-per-node=1"]
TIMEOUT = 150  # seconds
service = pytest.mark.service("slurm-wlm", "munge")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env["OMP_NUM_THREADS"] = "1"  # ranks share the cores of one machine here
        yield cluster


@pytest.fixture
def on_cluster(cluster, monkeypatch):
    """Make this process a client of the cluster."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    return cluster


@contextmanager
def started(command, cluster, output):
    """Yield the running process of a command. The process, and the job of an srun, end with the block at the latest."""
    with open(output, "w") as file, subprocess.Popen(command, env=cluster.env, stdout=file, stderr=file) as process:
        try:
            yield process
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"{error}\n{output.read_text()}\n{cluster.logs()}")
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def log_records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


@service
@pytest.mark.slow
def test_srun_gives_the_losses_of_one_process(cluster, tmp_path):
    one_process, two_nodes, output = tmp_path / "one", tmp_path / "two", tmp_path / "output.txt"
    with started([*ON_TWO_NODES, *TRAIN, f"run.dir={two_nodes}"], cluster, output) as srun:
        single = cluster.run(*TRAIN, f"run.dir={one_process}", timeout=TIMEOUT)
        assert single.returncode == 0, single.stderr
        assert srun.wait(TIMEOUT) == 0, output.read_text() + cluster.logs()

    records = log_records(two_nodes)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in log_records(one_process)], rel=1e-5)
    assert [read_manifest(c).world_size for c in list_checkpoints(two_nodes)] == [2, 2]
    assert [read_manifest(c).world_size for c in list_checkpoints(one_process)] == [1, 1]


@service
@pytest.mark.slow
def test_scancel_saves_once_and_the_same_command_resumes(cluster, tmp_path):
    run_dir = tmp_path / "run"
    first = stop_after_some_steps(cluster, run_dir)
    (checkpoint,) = list_checkpoints(run_dir)
    assert checkpoint.name == f"step-{first:08d}"
    assert read_manifest(checkpoint).world_size == 2
    text = (run_dir / "log.txt").read_text()
    assert text.count("stopped by") == text.count(f"after step {first}.\n") == 1
    assert "Resumed" not in text

    second = stop_after_some_steps(cluster, run_dir)
    text = (run_dir / "log.txt").read_text()
    assert f"Resumed from {checkpoint} at step" in text
    assert f"after step {second}.\n" in text
    assert [read_manifest(c).step for c in list_checkpoints(run_dir)] == [first, second]
    assert [r["step"] for r in log_records(run_dir)] == list(range(1, second + 1))  # no step is missing, and none occurs twice


def stop_after_some_steps(cluster, run_dir):
    """Train on both nodes and send SIGTERM to the job step after a few optimizer steps. Return the last step of the run."""
    log, output = run_dir / "log.jsonl", run_dir.with_name("srun.txt")
    enough = 5 + (len(log_records(run_dir)) if log.exists() else 0)
    command = [*ON_TWO_NODES, *TRAIN, f"run.dir={run_dir}", "train.duration=2000 steps", "checkpoint.interval=2000 steps"]
    with started(command, cluster, output) as srun:
        deadline = time.monotonic() + TIMEOUT
        while not log.exists() or log.read_text().count("\n") < enough:
            problem = "srun ended" if srun.poll() is not None else "too slow" if time.monotonic() > deadline else None
            assert not problem, f"{problem}: {output.read_text()}\n{cluster.logs()}"
            time.sleep(0.1)
        (step,) = cluster.steps()
        cancelled = cluster.run("scancel", "--signal=TERM", step)
        assert cancelled.returncode == 0, cancelled.stderr
        assert srun.wait(TIMEOUT) == 0, output.read_text() + cluster.logs()
    last = log_records(run_dir)[-1]["step"]
    assert last < 2000, "the run ended before the signal arrived"
    return last


@service
def test_config_error_is_printed_once_and_fails_the_job(cluster, tmp_path):
    done = cluster.run(*ON_TWO_NODES, *TRAIN, f"run.dir={tmp_path}/run", "train.learning_rate=1", timeout=TIMEOUT)
    assert done.returncode == 2, done.stderr
    own_lines = [line for line in done.stderr.splitlines() if not line.startswith("srun:")]
    assert len(own_lines) == 1, done.stderr
    assert own_lines[0].startswith("scale-mae: error: train.learning_rate: unknown key")
    assert not (tmp_path / "run").exists()


@service
def test_tasks_on_node_agrees_with_slurm(cluster):
    show = "echo $SLURM_NODEID $SLURM_STEP_TASKS_PER_NODE"
    done = cluster.run("srun", "--nodes=2", "--ntasks=3", "--overcommit", "sh", "-c", show)
    tasks = Counter(tuple(line.split()) for line in done.stdout.splitlines())
    assert sum(tasks.values()) == 3, done.stderr
    for (node, tasks_per_node), count in tasks.items():
        assert count_tasks_on_node(tasks_per_node, int(node)) == count


@pytest.mark.parametrize(
    ("tasks_per_node", "counts"),
    [("4", [4]), ("4(x2),3", [4, 4, 3]), ("2,1", [2, 1]), ("1(x12)", [1] * 12), ("3,4(x2)", [3, 4, 4])],
)
def test_tasks_on_node(tasks_per_node, counts):
    assert [count_tasks_on_node(tasks_per_node, node) for node in range(len(counts))] == counts


@pytest.mark.parametrize("nodes", ["gpu03", "gpu03,gpu05", "gpu03,cpu1,gpu05"])
def test_first_host_of_a_plain_list(nodes, monkeypatch):
    monkeypatch.setenv("PATH", "")  # a list without brackets needs no scontrol
    assert get_first_host(nodes) == "gpu03"


@service
@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[03-05,9],cpu1", "gpu03"), ("cpu1,gpu[03-05]", "cpu1"), ("rack[2-3]node[07-08]", "rack2node07")]
)
def test_first_host_of_a_list_with_brackets(nodes, first, on_cluster):
    assert get_first_host(nodes) == first


def test_first_host_without_scontrol_is_an_error_with_advice(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST=gpu\[1-2\] .* set MASTER_ADDR"):
        get_first_host("gpu[1-2]")


def test_each_step_and_restart_of_a_job_has_its_own_rendezvous_port(monkeypatch):
    def port_of(job, step, restart):
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "SLURM_RESTART_COUNT"):
            monkeypatch.setenv(name, "restored after the test")
            monkeypatch.delenv(name)
        words = {
            "SLURM_PROCID": 1,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_STEP_NODELIST": "a,b",
            "SLURM_NODEID": 1,
            "SLURM_LOCALID": 0,
        }
        words |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        words |= {} if restart is None else {"SLURM_RESTART_COUNT": restart}
        for name, value in words.items():
            monkeypatch.setenv(name, str(value))
        assert get_ranks() == (1, 2, 0)
        return int(os.environ["MASTER_PORT"])

    ports = {port_of(job, step, restart) for job in (7, 8, 9) for step in (0, 1) for restart in (None, 1, 2, 3, 4)}
    assert len(ports) == 30
    assert 20000 <= min(ports) <= max(ports) < 32768
