"""Jobs on a real Slurm with two nodes: submission, restarts after every kind of end, cancellation, and giving up."""

from __future__ import annotations

import json
import re
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

from scale_mae.checkpoint.manifest import read_manifest
from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.cli import main
from scale_mae.config import load_config
from scale_mae.distributed.launcher import get_rendezvous_port
from scale_mae.slurm.site_config import SiteConfig
from scale_mae.slurm.submit import prepare_job, write_job_files

TIMEOUT = 400  # seconds; the machine may be busy
ROOT = Path(__file__).parent.parent
SITE = """\
preflight: {preflight}
preflight_options: [--min-free-gb=1, --min-storage-speed=1]
env: {{OMP_NUM_THREADS: 1}}
time: '30'
"""
RUN = ["train.duration=400 steps", "checkpoint.interval=400 steps"]
service = pytest.mark.service("slurm-wlm", "munge")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    """The current directory of a user of the cluster. It contains a site file."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    write_site(tmp_path)
    return tmp_path


def write_site(folder, preflight="false"):
    (folder / "site.yaml").write_text(SITE.format(preflight=preflight))


def submit(capsys, run, *words, nodes="2"):
    """Submit a run and return the numbers of its jobs."""
    assert main(["submit", "debug", f"run.dir={run}", *RUN, *words, "--nodes", nodes]) == 0
    return submitted_jobs(capsys.readouterr().out)


def submitted_jobs(output):
    return [int(number) for number in re.findall(r"^Submitted job (\d+)\.", output, re.MULTILINE)]


def wait(cluster, run, what, ready):
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-3000:] for path in sorted((run / "slurm").glob("job-*.log")))
            queue = cluster.run("scontrol", "show", "job").stdout
            pytest.fail(f"after {TIMEOUT} s still not: {what}\n{logs}\n{queue}\n{cluster.logs()}")
        time.sleep(0.1)


def last_step(run):
    return max(log(run, "loss"), default=0) if (run / "log.jsonl").exists() else 0


def queue_is_empty(cluster):
    return lambda: not cluster.run("squeue", "--noheader").stdout.strip()


def finish(cluster, run):
    """Wait until the run is finished, and return its losses."""
    wait(cluster, run, "the job ends", queue_is_empty(cluster))
    assert (run / "exit_status").read_text() == "finished\n", log_text(run)
    return log(run, "loss")


def log_text(run):
    return (run / "log.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """Return the losses of an undisturbed run on two nodes."""
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


def wait_for_steps(cluster, run, what):
    start = last_step(run)
    wait(cluster, run, f"some steps before {what}", lambda: last_step(run) > start + 5)


def disturb(cluster, run, what, action):
    """Run an action after some steps of a run, and wait until its job restarts. Return the seconds that this took."""
    wait_for_steps(cluster, run, what)
    restarts, began = len(attempts(run)), time.monotonic()
    action()
    wait(cluster, run, f"the job restarts after {what}", lambda: len(attempts(run)) > restarts)
    return time.monotonic() - began


def kill_a_rank(cluster, node):
    """Send SIGKILL to the training process of a node."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            is_of_cluster = environment.get("SLURM_CONF") == cluster.env["SLURM_CONF"]
            if is_of_cluster and environment.get("SLURMD_NODENAME") == node and "pretrain" in process.cmdline():
                process.kill()
                return
    raise AssertionError("no such process")


@service
@pytest.mark.long
def test_run_resumes_to_the_same_losses_however_its_job_ends(cluster, undisturbed, here, capsys):
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
    wait_for_steps(cluster, run, "a node fails")
    cluster.fail_node(cluster.nodes[1])
    wait(cluster, run, "Slurm notices", lambda: cluster.run("squeue", "--noheader", "--format=%t").stdout.strip() == "PD")
    cluster.start_node(cluster.nodes[1])
    assert finish(cluster, run) == undisturbed
    text = log_text(run)
    assert "stopped by SIGTERM after" in text
    assert "stopped by SIGUSR1 after" in text
    assert "and wrote no exit status (see " in text
    assert len(attempts(run)) >= 6
    assert {read_manifest(c).world_size for c in list_checkpoints(run)} == {2}


@service
@pytest.mark.long
def test_fine_tuning_can_be_submitted_and_restarted_too(cluster, here, capsys):
    encoder, run = here / "encoder", here / "run"
    overrides = [
        "train.duration=2 steps",
        "train.global_batch=16",
        "train.micro_batch=8",
        "log.metrics_port=null",
        "optim.warmup=1 steps",
    ]
    command = [sys.executable, "-m", "scale_mae", "pretrain", "demo", f"run.dir={encoder}", *overrides]
    subprocess.run(command, env=cluster.env | {"PYTHONPATH": str(ROOT)}, check=True)
    overrides = [f"run.dir={run}", f"model.init_from={encoder}", "train.duration=200 steps", "train.global_batch=32"]
    overrides += [
        "train.micro_batch=8",
        "checkpoint.interval=200 steps",
        "classify.eval_interval=100 steps",
        "optim.warmup=10 steps",
    ]
    assert main(["submit", "finetune_demo", *overrides, "--nodes=2"]) == 0
    (job,) = submitted_jobs(capsys.readouterr().out)
    disturb(cluster, run, "SIGTERM", lambda: cluster.run("scancel", "--signal=TERM", str(job)))
    assert max(finish(cluster, run)) == 200
    assert "stopped by SIGTERM after" in log_text(run)
    result = json.loads((run / "results" / "finetune.json").read_text())
    assert (result["model"]["step"], result["data"]["images"], result["environment"]["processes"]) == (200, 2000, 2)


@service
@pytest.mark.long
def test_preempted_run_saves_waits_and_resumes_to_the_same_losses(cluster, undisturbed, here, capsys):
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
    assert "Saved checkpoint" in log_text(run).split("Restart: 1.")[0], "preempted without a checkpoint"


@service
@pytest.mark.long
def test_run_saves_and_stops_before_the_time_limit(cluster, here, capsys):
    run = here / "run"
    with (here / "site.yaml").open("a") as file:
        file.write("sbatch: ['--signal=USR1@0']\n")  # Slurm sends no warning
    (job,) = submit(capsys, run, "train.duration=1000000 steps", "checkpoint.interval=1000000 steps", "--time=2")
    wait(cluster, run, "the job runs", lambda: attempts(run))
    limit = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%e").stdout.strip()
    wait(cluster, run, "the job restarts", lambda: len(attempts(run)) > 1)
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.stat().st_mtime < datetime.fromisoformat(limit).timestamp()
    assert f"stopped by the time limit after step {read_manifest(checkpoint).step}. The job requeues itself.\n" in log_text(run)
    assert attempts(run)[-1].endswith(f"checkpoint={checkpoint.name}")
    wait_for_steps(cluster, run, "the run is cancelled")
    assert f"Resumed from {checkpoint}" in log_text(run)
    assert main(["cancel", str(run)]) == 0
    wait(cluster, run, "the end", queue_is_empty(cluster))
    assert "stopped by SIG" not in log_text(run).split("Resumed from")[0]


@service
@pytest.mark.long
def test_run_resumes_on_fewer_nodes_if_a_node_is_gone(cluster, undisturbed, here, capsys):
    run, gone = here / "run", cluster.nodes[1]
    (job,) = submit(capsys, run, nodes="1-2")
    wait_for_steps(cluster, run, "one node is taken away")
    cluster.run("scontrol", "update", f"NodeName={gone}", "State=DRAIN", "Reason=test")
    cluster.run("scancel", "--signal=TERM", str(job))
    losses = finish(cluster, run)
    cluster.run("scontrol", "update", f"NodeName={gone}", "State=RESUME")
    wait(cluster, run, "the node is back", lambda: cluster.node_states() == ["idle", "idle"])
    assert {step: loss for step, (loss,) in losses.items()} == pytest.approx(
        {step: loss for step, (loss,) in undisturbed.items()}, rel=1e-5
    )
    assert read_manifest(list_checkpoints(run)[-1]).world_size == 1
    assert [line.split("nodes=")[1].split()[0] for line in attempts(run)] == ["127.0.0.[1-2]", "127.0.0.1"]


@service
@pytest.mark.long
@pytest.mark.parametrize("chain", [1, 2])
def test_node_that_preflight_rejects_is_excluded(cluster, here, capsys, chain):
    run, bad = here / "run", cluster.nodes[1]
    limited = f"import os, resource\nif os.environ.get('SLURMD_NODENAME') == '{bad}':\n"
    limited += "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"  # like a full quota, on that node only
    (here / "faulty").mkdir()
    (here / "faulty" / "sitecustomize.py").write_text(limited)
    write_site(here, preflight="true")
    with (here / "site.yaml").open("a") as file:
        file.write(f"setup: export PYTHONPATH={here}/faulty\n")
    first, *_ = submit(capsys, run, "--exclude-bad-nodes", "--chain", str(chain), "train.duration=20 steps", nodes="1-2")
    finish(cluster, run)
    nodes = [(line.split("job=")[1].split()[0], line.split("nodes=")[1].split()[0]) for line in attempts(run)]
    assert nodes == [(str(first), "127.0.0.[1-2]"), (str(first + 1), "127.0.0.1")]
    reason = f"preflight ended with exit code 1 and reported bad nodes: {bad} (see {run}/slurm/job-{first}.log)"
    resumes = (
        f"Job {first + 1} resumes the run and excludes {bad}." if chain == 1 else "The next job of the chain resumes the run."
    )
    assert f"Attempt ended: {reason}. {resumes}\n" in log_text(run)


@pytest.mark.long
@service
def test_job_without_progress_gives_up(cluster, here, capsys):
    run = here / "run"
    (here / "site.yaml").write_text((here / "site.yaml").read_text() + "setup: ulimit -v 100000; set -e\n")
    submit(capsys, run)
    wait(cluster, run, "the job gives up", queue_is_empty(cluster))
    assert len(attempts(run)) == 4
    failed = "failed: no new checkpoint after 3 restarts. Newest checkpoint: none. Last attempt: training ended with exit code"
    assert (run / "exit_status").read_text().startswith(failed)
    assert main(["status", str(run)]) == 0
    assert "failed: no new checkpoint after 3 restarts" in capsys.readouterr().out
    # a new submission counts restarts from zero
    write_site(here)
    submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps")
    finish(cluster, run)


@pytest.mark.long
@service
def test_setup_that_exits_is_logged_and_counts_as_an_attempt(cluster, here, capsys, monkeypatch):
    run = here / "run"
    monkeypatch.setattr("scale_mae.slurm.job_script.PAUSE_SECONDS", 0)
    with (here / "site.yaml").open("a") as file:  # overwrites variables of the script
        file.write("max_restarts_without_progress: 1\nsetup: |\n  set -eu; run=/absent max_restarts=9 pause=9 chain=9/1\n")
        file.write(f"  [ -e {here}/ready ] || (exit 3)\n")
    (job,) = submit(capsys, run)
    wait(cluster, run, "the job gives up", queue_is_empty(cluster))
    reason = f"setup ended with exit code 3 (see {run}/slurm/job-{job}.log)"
    assert (run / "exit_status").read_text() == (
        f"failed: no new checkpoint after 1 restart. Newest checkpoint: none. Last attempt: {reason}\n"
    )
    assert f"job {job}: Attempt ended: {reason}. The job requeues itself.\n" in log_text(run)
    assert len(attempts(run)) == 2
    (here / "ready").touch()
    submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps")
    finish(cluster, run)


@service
def test_job_that_slurm_ends_during_setup_does_not_restart(cluster, here, capsys, monkeypatch):
    run = here / "run"
    monkeypatch.setattr("scale_mae.slurm.job_script.PAUSE_SECONDS", 0)
    with (here / "site.yaml").open("a") as file:
        file.write(f"setup: touch {here}/started; sleep 60\n")
    (job,) = submit(capsys, run)
    wait(cluster, run, "setup runs", (here / "started").exists)
    cluster.run("scancel", str(job))
    wait(cluster, run, "the end", queue_is_empty(cluster))
    assert len(attempts(run)) == 1
    assert not (run / "log.txt").exists()


@pytest.mark.long
@service
def test_restart_uses_another_port_if_the_first_is_taken(cluster, here, capsys):
    run = here / "run"
    # the rendezvous port of the first job step follows from the number of the job
    number = int(cluster.run("sbatch", "--parsable", "--hold", "--wrap", "true").stdout) + 1
    cluster.run("scancel", str(number - 1))
    with socket.socket() as other_program:
        other_program.bind(("0.0.0.0", get_rendezvous_port(str(number), "0", "0")))
        other_program.listen()
        assert submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps") == [number]
        finish(cluster, run)
    assert len(attempts(run)) == 2
    (output,) = (run / "slurm").glob("job-*.log")
    assert "in use" in output.read_text()


@service
def test_chain_resumes_and_cancel_saves_a_checkpoint_and_ends_it(cluster, here, capsys):
    run = here / "run"
    first, second, third = submit(capsys, run, "--chain", "3")
    wait_for_steps(cluster, run, "the first job of the chain ends")
    assert main(["submit", "debug", f"run.dir={run}", *RUN]) == 2
    assert f"jobs {first}, {second}, {third} are already in the queue" in capsys.readouterr().err
    cluster.run("scancel", "--signal=TERM", str(first))
    wait(cluster, run, "the second job", lambda: len(attempts(run)) == 2)
    wait_for_steps(cluster, run, "the run is cancelled")
    assert main(["status", str(run), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["state"] == f"running (job {second})"
    assert (shown["total_steps"], shown["restarts"]) == (400, 1)
    assert shown["checkpoint"] == list_checkpoints(run)[-1].name
    assert main(["cancel", str(run)]) == 0
    assert f"Job {second} saves a checkpoint and stops. Job {third} is removed from the queue." in capsys.readouterr().out
    wait(cluster, run, "the end", queue_is_empty(cluster))
    assert read_manifest(list_checkpoints(run)[-1]).step == last_step(run) < 400
    assert f"job {second}: Cancelled (stopped by SIGTERM after step {last_step(run)})" in log_text(run)
    assert len(attempts(run)) == 2
    assert main(["cancel", str(run)]) == 2
    assert "no job and no process of this run exists" in capsys.readouterr().err
    # sbatch resumes the run; a second job of the run does not disturb it
    by_hand = [cluster.run("sbatch", "--parsable", str(run / "slurm" / "job.sh")).stdout.strip()]
    wait_for_steps(cluster, run, "another job of the run is submitted")
    by_hand.append(cluster.run("sbatch", "--parsable", "--overcommit", str(run / "slurm" / "job.sh")).stdout.strip())
    assert main(["cancel", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"Job {by_hand[0]} saves a checkpoint and stops." in output
    assert f"Job {by_hand[1]} is removed from the queue." in output
    wait(cluster, run, "the end", queue_is_empty(cluster))
    assert f"job {by_hand[0]}: Cancelled" in log_text(run)


@service
def test_variables_of_an_outer_job_or_launcher_do_not_reach_the_job(cluster, here, capsys, monkeypatch):
    run = here / "run"
    outer = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1", "SBATCH_TIMELIMIT": "1", "SBATCH_EXPORT": "NONE"}
    outer |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "SLURM_JOB_END_TIME": "1", "SLURM_EXPORT_ENV": "NONE"}
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    # if squeue fails, the job has no end time; the outer job's end time must not replace it
    (here / "bin").mkdir()
    (here / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (here / "bin" / "squeue").chmod(0o755)
    with (here / "site.yaml").open("a") as file:
        file.write(f'sbatch: [--export=NONE]\nsetup: |\n  [ -n "$UNSET" ]\n  export PATH={here}/bin:{cluster.env["PATH"]}\n')
    submit(capsys, run, "train.duration=5 steps", "checkpoint.interval=5 steps")
    for name in outer:
        monkeypatch.delenv(name)
    finish(cluster, run)
    assert "x 2 cpu ranks" in log_text(run)
    assert read_manifest(list_checkpoints(run)[-1]).world_size == 2


@service
def test_job_that_is_cancelled_during_setup_does_not_train(cluster, here, capsys):
    run = here / "run"
    with (here / "site.yaml").open("a") as file:
        file.write("setup: sleep 3\n")
    (job,) = submit(capsys, run)
    wait(cluster, run, "the job runs", lambda: "R" in cluster.run("squeue", "--noheader", "--format=%t").stdout)
    assert main(["cancel", str(run)]) == 0
    wait(cluster, run, "the end", queue_is_empty(cluster))
    assert f"job {job}: Cancelled" in log_text(run)
    assert (run / "exit_status").read_text() == "stopped by scale-mae cancel\n"
    assert not (run / "log.jsonl").exists()


@service
def test_each_process_gets_the_requested_cores(tmp_path, tmp_path_factory, monkeypatch):
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=1, binds=True) as cluster:  # a short path for the sockets
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        config = load_config("debug", {"run.dir": str(tmp_path / "run")})
        job = prepare_job(config, SiteConfig(cpus_per_task=2, preflight=False, requeue=False))
        path = write_job_files(job)
        (path.with_name("code") / "run.py").write_text("import os; print('cores', len(os.sched_getaffinity(0)))")
        done = cluster.run("sbatch", "--wait", str(path), timeout=TIMEOUT)
        assert (done.returncode, done.stderr) == (0, ""), cluster.logs()
        (output,) = path.parent.glob("job-*.log")
        assert "cores 2" in output.read_text(), output.read_text()


@service
def test_configuration_error_never_reaches_the_queue(cluster, here, capsys):
    for words, message in (
        (["train.learning_rate=1"], "train.learning_rate: unknown key"),
        (["--nodes", "3"], "train.global_batch=16 is not divisible by train.micro_batch=4 x 3 processes = 12"),
        (["engine.deepspeed=zero9"], "engine.deepspeed=zero9: cannot be read (No such file"),
        (["--time", "soon"], "--time=soon: not a time limit. Write minutes"),
        (["--partition", "absent"], "sbatch: error: invalid partition specified: absent"),
    ):
        assert main(["submit", "debug", "run.dir=run", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not cluster.run("squeue", "--noheader").stdout
    assert not (here / "run" / "log.txt").exists()
