"""Jobs on a real Slurm of two nodes: submitted, ended in every way, cancelled, given up; and what never reaches the queue."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from slurm_cluster import SlurmCluster
from test_trainer import log

from scale_mae.checkpoint.store import checkpoints, read_manifest
from scale_mae.cli import main
from scale_mae.config import load_config
from scale_mae.distributed.launcher import rendezvous_port
from scale_mae.slurm.site import Site
from scale_mae.slurm.submit import prepare, set_aside

PATIENCE = 400  # seconds; the machine may have other work
ROOT = Path(__file__).parent.parent
SITE = "preflight: {preflight}\npreflight_options: [--need-gb=1, --min-mbps=1]\nenv: {{OMP_NUM_THREADS: 1}}\ntime: '30'\n"
RUN = ["train.duration=400 steps", "checkpoint.interval=400 steps"]
service = pytest.mark.service("slurm-wlm", "munge")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    """A user of the cluster, in a folder with a site file."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    write_site(tmp_path)
    return tmp_path


def write_site(folder, preflight="false"):
    (folder / "site.yaml").write_text(SITE.format(preflight=preflight))


def submit(capsys, run, *words, nodes="2"):
    """Numbers of the submitted jobs."""
    assert main(["submit", "debug", f"run.dir={run}", *RUN, *words, "--nodes", nodes]) == 0
    return [int(line.split()[1].rstrip(":")) for line in capsys.readouterr().out.splitlines() if line.startswith("job ")]


def wait(cluster, run, what, ready):
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-3000:] for path in sorted((run / "slurm").glob("job-*.log")))
            queue = cluster.run("scontrol", "show", "job").stdout
            pytest.fail(f"not within {PATIENCE} s: {what}\n{logs}\n{queue}\n{cluster.logs()}")
        time.sleep(0.1)


def steps(run):
    return max(log(run, "loss"), default=0) if (run / "log.jsonl").exists() else 0


def ended(cluster):
    return lambda: not cluster.run("squeue", "--noheader").stdout.strip()


def finish(cluster, run):
    """The job's end, and all losses of the run."""
    wait(cluster, run, "the job ends", ended(cluster))
    assert (run / "exit_status").read_text() == "finished\n", said(run)
    return log(run, "loss")


def said(run):
    return (run / "log.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """Losses of the run on two nodes that nothing disturbs, submitted like the others."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_site(folder, preflight="true")
    command = [sys.executable, "-m", "scale_mae", "submit", "debug", "run.dir=run", *RUN, "--nodes=2"]
    done = subprocess.run(
        command, cwd=folder, env=cluster.env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = finish(cluster, folder / "run")
    (output,) = (folder / "run" / "slurm").glob("job-*.log")
    assert all(f"{node}" in output.read_text() for node in cluster.nodes)
    assert "no problems" in output.read_text()
    assert max(losses) == 400
    return losses


def attempts(run):
    try:
        return [line for line in (run / "slurm" / "attempts").read_text().splitlines() if "job=" in line]
    except OSError:
        return []


def some_steps(cluster, run, what):
    begun = steps(run)
    wait(cluster, run, f"some steps before {what}", lambda: steps(run) > begun + 5)


def disturb(cluster, run, what, action):
    """Do something to a run that has taken some steps, and wait until its job begins again; the seconds that took."""
    some_steps(cluster, run, what)
    restarts, began = len(attempts(run)), time.monotonic()
    action()
    wait(cluster, run, f"the job begins again after {what}", lambda: len(attempts(run)) > restarts)
    return time.monotonic() - began


def kill_a_rank(cluster, node):
    """SIGKILL the training process of a node."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == cluster.env["SLURM_CONF"]
            if ours and environment.get("SLURMD_NODENAME") == node and "pretrain" in process.cmdline():
                process.kill()
                return
    raise AssertionError("no such process")


@service
@pytest.mark.long
def test_whatever_ends_a_job_it_goes_on_to_the_same_losses(cluster, undisturbed, here, capsys):
    run = here / "run"
    (number,) = submit(capsys, run)
    job = str(number)

    def slurm(*command):
        done = cluster.run(*command)
        assert done.returncode == 0, done.stderr

    disturb(cluster, run, "SIGTERM", lambda: slurm("scancel", "--signal=TERM", job))
    disturb(cluster, run, "the time limit", lambda: slurm("scontrol", "update", f"JobId={job}", "TimeLimit=2"))
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    disturb(cluster, run, "requeue", lambda: slurm("scontrol", "requeue", job))
    assert disturb(cluster, run, "a rank dies", lambda: kill_a_rank(cluster, cluster.nodes[1])) < 60
    some_steps(cluster, run, "a node fails")
    cluster.fail_node(cluster.nodes[1])
    wait(cluster, run, "Slurm notices", lambda: cluster.run("squeue", "--noheader", "--format=%t").stdout.strip() == "PD")
    cluster.start_node(cluster.nodes[1])
    assert finish(cluster, run) == undisturbed
    text = said(run)
    assert "stopped by SIGTERM after" in text
    assert "stopped by SIGUSR1 after" in text
    assert "ended without a word, exit code" in text
    assert len(attempts(run)) >= 6
    assert {read_manifest(c).world_size for c in checkpoints(run)} == {2}


@service
@pytest.mark.long
def test_a_fine_tuning_is_submitted_and_preempted_like_a_pre_training(cluster, here, capsys):
    encoder, run = here / "encoder", here / "run"
    own = [
        "train.duration=2 steps",
        "train.global_batch=16",
        "train.micro_batch=8",
        "log.metrics_port=null",
        "optim.warmup=1 steps",
    ]
    command = [sys.executable, "-m", "scale_mae", "pretrain", "demo", f"run.dir={encoder}", *own]
    subprocess.run(command, env=cluster.env | {"PYTHONPATH": str(ROOT)}, check=True)
    own = [f"run.dir={run}", f"model.init_from={encoder}", "train.duration=200 steps", "train.global_batch=32"]
    own += ["train.micro_batch=8", "checkpoint.interval=200 steps", "classify.eval_interval=100 steps", "optim.warmup=10 steps"]
    assert main(["submit", "finetune_demo", *own, "--nodes=2"]) == 0
    job = capsys.readouterr().out.split()[1].rstrip(":")
    disturb(cluster, run, "SIGTERM", lambda: cluster.run("scancel", "--signal=TERM", job))
    assert max(finish(cluster, run)) == 200
    assert "stopped by SIGTERM after" in said(run)
    result = json.loads((run / "results" / "finetune.json").read_text())
    assert (result["model"]["step"], result["data"]["images"], result["made"]["processes"]) == (200, 2000, 2)


@service
@pytest.mark.long
def test_preempted_it_waits_and_goes_on_to_the_same_losses(cluster, undisturbed, here, capsys):
    run, urgent = here / "run", here / "urgent.txt"
    (job,) = submit(capsys, run)

    def preempt():
        script = f"squeue --noheader --format='%i %T' > {urgent}; sleep 3"
        done = cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap", script)
        assert done.returncode == 0, done.stderr

    disturb(cluster, run, "preemption", preempt)
    assert f"{job} PENDING" in urgent.read_text()
    assert finish(cluster, run) == undisturbed
    assert len(attempts(run)) == 2
    assert " saved " in said(run).split(", restart 1")[0], "preempted without a checkpoint"


@service
@pytest.mark.long
def test_a_run_stops_by_itself_before_the_time_limit(cluster, here, capsys):
    run = here / "run"
    with (here / "site.yaml").open("a") as file:
        file.write("sbatch: ['--signal=USR1@0']\n")  # none from Slurm
    (job,) = submit(capsys, run, "train.duration=1000000 steps", "checkpoint.interval=1000000 steps", "--time=2")
    wait(cluster, run, "the job runs", lambda: attempts(run))
    limit = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%e").stdout.strip()
    wait(cluster, run, "it stops and begins again", lambda: len(attempts(run)) > 1)
    (checkpoint,) = checkpoints(run)
    assert checkpoint.stat().st_mtime < datetime.fromisoformat(limit).timestamp()
    assert f"stopped by the time limit after step {read_manifest(checkpoint).step}; starts again\n" in said(run)
    assert attempts(run)[-1].endswith(f"at={checkpoint.name}")
    some_steps(cluster, run, "it is cancelled")
    assert f"resumed from {checkpoint}" in said(run)
    assert main(["cancel", str(run)]) == 0
    wait(cluster, run, "the end", ended(cluster))
    assert "stopped by SIG" not in said(run).split("resumed from")[0]


@service
@pytest.mark.long
def test_with_fewer_nodes_it_goes_on_with_fewer(cluster, undisturbed, here, capsys):
    run, gone = here / "run", cluster.nodes[1]
    (job,) = submit(capsys, run, nodes="1-2")
    some_steps(cluster, run, "one node is taken away")
    cluster.run("scontrol", "update", f"NodeName={gone}", "State=DRAIN", "Reason=test")
    cluster.run("scancel", "--signal=TERM", str(job))
    losses = finish(cluster, run)
    cluster.run("scontrol", "update", f"NodeName={gone}", "State=RESUME")
    wait(cluster, run, "the node is back", lambda: cluster.node_states() == ["idle", "idle"])
    assert {step: loss for step, (loss,) in losses.items()} == pytest.approx(
        {step: loss for step, (loss,) in undisturbed.items()}, rel=1e-5
    )
    assert read_manifest(checkpoints(run)[-1]).world_size == 1
    assert [line.split("nodes=")[1].split()[0] for line in attempts(run)] == ["127.0.0.[1-2]", "127.0.0.1"]


@service
@pytest.mark.long
@pytest.mark.parametrize("chain", [1, 2])
def test_a_node_that_preflight_finds_unfit_is_left_out(cluster, here, capsys, chain):
    run, bad = here / "run", cluster.nodes[1]
    limited = f"import os, resource\nif os.environ.get('SLURMD_NODENAME') == '{bad}':\n"
    limited += "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"  # as a full quota would, on that node only
    (here / "faulty").mkdir()
    (here / "faulty" / "sitecustomize.py").write_text(limited)
    write_site(here, preflight="true")
    with (here / "site.yaml").open("a") as file:
        file.write(f"setup: export PYTHONPATH={here}/faulty\n")
    first, *_ = submit(capsys, run, "--exclude-bad-nodes", "--chain", str(chain), "train.duration=20 steps", nodes="1-2")
    finish(cluster, run)
    nodes = [(line.split("job=")[1].split()[0], line.split("nodes=")[1].split()[0]) for line in attempts(run)]
    assert nodes == [(str(first), "127.0.0.[1-2]"), (str(first + 1), "127.0.0.1")]
    goes_on = f"job {first + 1} goes on without {bad}" if chain == 1 else "the next job of the chain goes on"
    assert f"unfit are {bad}; see {run}/slurm/job-{first}.log; {goes_on}" in said(run)


@pytest.mark.long
@service
def test_a_job_that_cannot_progress_gives_up(cluster, here, capsys):
    run = here / "run"
    (here / "site.yaml").write_text((here / "site.yaml").read_text() + "setup: ulimit -v 100000; set -e\n")
    submit(capsys, run)
    wait(cluster, run, "the job gives up", ended(cluster))
    assert len(attempts(run)) == 4
    assert (
        (run / "exit_status")
        .read_text()
        .startswith("failed: 3 restarts in a row made no progress; the last attempt ended without")
    )
    assert main(["status", str(run)]) == 0
    assert "failed: 3 restarts in a row made no progress" in capsys.readouterr().out
    # the same command again begins to count anew
    write_site(here)
    submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps")
    finish(cluster, run)


@pytest.mark.long
@service
def test_setup_that_ends_the_job_is_told_and_counts_as_an_attempt(cluster, here, capsys, monkeypatch):
    run = here / "run"
    monkeypatch.setattr("scale_mae.slurm.submit.PAUSE", 0)
    with (here / "site.yaml").open("a") as file:  # the first line spoils, if it can, what the job goes by
        file.write(
            f"vain_restarts: 1\nsetup: |\n  set -eu; run=/absent vain=9 pause=9 chain=9/1; [ -e {here}/ready ] || (exit 3)\n"
        )
    (job,) = submit(capsys, run)
    wait(cluster, run, "the job gives up", ended(cluster))
    why = f"ended in setup, exit code 3; see {run}/slurm/job-{job}.log"
    assert (run / "exit_status").read_text() == f"failed: 1 restarts in a row made no progress; the last attempt {why}\n"
    assert f"job {job}: {why}; starts again\n" in said(run)
    assert len(attempts(run)) == 2
    (here / "ready").touch()
    submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps")
    finish(cluster, run)


@service
def test_a_job_that_slurm_ends_in_setup_does_not_begin_again(cluster, here, capsys, monkeypatch):
    run = here / "run"
    monkeypatch.setattr("scale_mae.slurm.submit.PAUSE", 0)
    with (here / "site.yaml").open("a") as file:
        file.write(f"setup: touch {here}/begun; sleep 60\n")
    (job,) = submit(capsys, run)
    wait(cluster, run, "setup runs", (here / "begun").exists)
    cluster.run("scancel", str(job))
    wait(cluster, run, "the end", ended(cluster))
    assert len(attempts(run)) == 1
    assert not (run / "log.txt").exists()


@pytest.mark.long
@service
def test_a_port_that_is_taken_is_not_tried_again(cluster, here, capsys):
    run = here / "run"
    # the number of the next job, from which follows where its first step meets
    number = int(cluster.run("sbatch", "--parsable", "--hold", "--wrap", "true").stdout) + 1
    cluster.run("scancel", str(number - 1))
    with socket.socket() as stranger:
        stranger.bind(("0.0.0.0", rendezvous_port(str(number), "0", "0")))
        stranger.listen()
        assert submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps") == [number]
        finish(cluster, run)
    assert len(attempts(run)) == 2
    (output,) = (run / "slurm").glob("job-*.log")
    assert "in use" in output.read_text()


@service
def test_cancel_saves_and_stays_cancelled_and_a_chain_goes_on(cluster, here, capsys):
    run = here / "run"
    first, second, third = submit(capsys, run, "--chain", "3")
    some_steps(cluster, run, "the first job of the chain ends")
    assert main(["submit", "debug", f"run.dir={run}", *RUN]) == 2
    assert f"job {first}, {second}, {third} of this run is in the queue" in capsys.readouterr().err
    cluster.run("scancel", "--signal=TERM", str(first))
    wait(cluster, run, "the second job", lambda: len(attempts(run)) == 2)
    some_steps(cluster, run, "it is cancelled")
    assert main(["status", str(run), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["state"] == f"running (job {second})"
    assert (shown["total_steps"], shown["restarts"]) == (400, 1)
    assert shown["checkpoint"] == checkpoints(run)[-1].name
    assert main(["cancel", str(run)]) == 0
    assert f"job {second} stops after a checkpoint; job {third} taken from the queue" in capsys.readouterr().out
    wait(cluster, run, "the end", ended(cluster))
    assert read_manifest(checkpoints(run)[-1]).step == steps(run) < 400
    assert f"job {second}: cancelled (stopped by SIGTERM after step {steps(run)})" in said(run)
    assert len(attempts(run)) == 2
    assert main(["cancel", str(run)]) == 2
    assert "nothing of this run is running or waiting" in capsys.readouterr().err
    # by hand it goes on; a second job of the run does not disturb it
    by_hand = [cluster.run("sbatch", "--parsable", str(run / "slurm" / "job.sh")).stdout.strip()]
    some_steps(cluster, run, "another job of the run is submitted")
    by_hand.append(cluster.run("sbatch", "--parsable", "--overcommit", str(run / "slurm" / "job.sh")).stdout.strip())
    assert main(["cancel", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"job {by_hand[0]} stops after a checkpoint" in told
    assert f"job {by_hand[1]} taken from the queue" in told
    wait(cluster, run, "the end", ended(cluster))
    assert f"job {by_hand[0]}: cancelled" in said(run)


@service
def test_nothing_around_the_submission_reaches_the_job(cluster, here, capsys, monkeypatch):
    run = here / "run"
    strange = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1", "SBATCH_TIMELIMIT": "1", "SBATCH_EXPORT": "NONE"}
    strange |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "SLURM_JOB_END_TIME": "1", "SLURM_EXPORT_ENV": "NONE"}
    for name, value in strange.items():
        monkeypatch.setenv(name, value)
    # nor does a queue that gives no answer: no end is known then, rather than one long past
    (here / "bin").mkdir()
    (here / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (here / "bin" / "squeue").chmod(0o755)
    with (here / "site.yaml").open("a") as file:
        file.write(f'sbatch: [--export=NONE]\nsetup: |\n  [ -n "$UNSET" ]\n  export PATH={here}/bin:{cluster.env["PATH"]}\n')
    submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps")
    for name in strange:
        monkeypatch.delenv(name)
    finish(cluster, run)
    assert "2 processes on cpu" in said(run)
    assert read_manifest(checkpoints(run)[-1]).world_size == 2


@service
def test_cancelled_before_training_begins_it_does_not_begin(cluster, here, capsys):
    run = here / "run"
    with (here / "site.yaml").open("a") as file:
        file.write("setup: sleep 3\n")
    (job,) = submit(capsys, run)
    wait(cluster, run, "the job runs", lambda: "R" in cluster.run("squeue", "--noheader", "--format=%t").stdout)
    assert main(["cancel", str(run)]) == 0
    wait(cluster, run, "the end", ended(cluster))
    assert f"job {job}: cancelled" in said(run)
    assert (run / "exit_status").read_text() == "stopped by scale-mae cancel\n"
    assert not (run / "log.jsonl").exists()


@service
def test_each_process_has_the_cores_that_were_asked_for(tmp_path, tmp_path_factory, monkeypatch):
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=1, binds=True) as cluster:  # a short path, for its sockets
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        config = load_config("debug", {"run.dir": str(tmp_path / "run")})
        job = prepare(config, Site(cpus_per_task=2, preflight=False, requeue=False))
        path = set_aside(job)
        (path.with_name("code") / "run.py").write_text("import os; print('cores', len(os.sched_getaffinity(0)))")
        done = cluster.run("sbatch", "--wait", str(path), timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, ""), cluster.logs()
        (output,) = path.parent.glob("job-*.log")
        assert "cores 2" in output.read_text(), output.read_text()


@service
def test_a_config_error_never_reaches_the_queue(cluster, here, capsys):
    for words, message in (
        (["train.learning_rate=1"], "train.learning_rate: unknown key"),
        (["--nodes", "3"], "train.global_batch=16 is not divisible by train.micro_batch=4 x 3 processes = 12"),
        (["engine.deepspeed=zero9"], "engine.deepspeed=zero9: no such file"),
        (["--time", "soon"], "--time soon: not a time limit; write minutes"),
        (["--partition", "absent"], "sbatch: error: invalid partition specified: absent"),
    ):
        assert main(["submit", "debug", "run.dir=run", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not cluster.run("squeue", "--noheader").stdout
    assert not (here / "run" / "log.txt").exists()
