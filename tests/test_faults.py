"""After any fault, the next start continues as if the fault had not happened: kills, damaged files, full disks."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from images import demo_index
from ranks import RankError, collect, run_ranks, start_ranks
from test_trainer import log, make_config, train, weights

from scale_mae.checkpoint.discovery import find_latest_valid, rename_as_damaged
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import format_checkpoint_name, get_step, list_checkpoints
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import load_config

STEPS = 60


class KillSwitch:
    """Kills this process at one of its kill points: the moments before and after each change that a save makes on a disk.

    Args:
        at: Number of the kill point, from 1. 0 kills nothing.
    """

    def __init__(self, at):
        self.at, self.passed = at, []

    def pass_point(self, name):
        self.passed.append(name)
        if len(self.passed) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def add_before_and_after(self, owner, name):
        """Add kill points before and after a call."""
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.pass_point(f"before {name}")
            result = real(*args, **kwargs)
            self.pass_point(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    def add_half_written(self, owner, name, path_at):
        """Add a kill point at which a call has written half of the file that its argument number ``path_at`` names."""
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = real(*args, **kwargs)
            content = Path(args[path_at]).read_bytes()
            Path(args[path_at]).write_bytes(content[: len(content) // 2])
            self.pass_point(f"within {name}")
            Path(args[path_at]).write_bytes(content)
            return result

        setattr(owner, name, wrapped)

    def arm(self):
        self.add_half_written(torch, "save", 1)
        for owner, names in (
            (os, ("fsync", "close")),
            (torch, ("save",)),
            (Path, ("mkdir", "write_text", "rename")),
            (shutil, ("rmtree",)),
        ):
            for name in names:
                self.add_before_and_after(owner, name)


def train_until_kill_point(config, rank, at):
    """Train, and kill this process at kill point ``at`` of its first save if it is ``rank``.

    Return the training result and the names of the kill points of the first save.
    """
    from scale_mae.checkpoint.saver import Saver

    kill_switch, real = KillSwitch(at if os.environ["RANK"] == str(rank) else 0), Saver.save

    def save(self, *args, **more):
        Saver.save = real
        kill_switch.arm()
        real(self, *args, **more)
        self.wait()
        kill_points.extend(kill_switch.passed)

    kill_points = []
    Saver.save = save
    result = train(config)
    return result, kill_points


def train_for_seconds(config, rank, seconds):
    """Train, and kill this process some seconds after its first step started if it is ``rank``."""
    from scale_mae.engine.deepspeed import Engine

    real = Engine.step

    def step(self, *args, **kwargs):
        Engine.step = real
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return real(self, *args, **kwargs)

    if os.environ["RANK"] == str(rank):
        Engine.step = step
    return train(config)


def run_until_killed(function, args, kill_all):
    """Start two ranks. When one is killed, kill the other, or wait until it notices. Return whether they finished instead."""
    processes, pipes = start_ranks(2, function, *args)
    while all(p.is_alive() for p in processes):
        time.sleep(0.002)
    if kill_all:
        for process in processes:
            process.kill()
    try:
        collect(processes, pipes, timeout=60)
        return True
    except RankError:
        return False


def train_config(run_dir, **overrides):
    setting = {
        "train.duration": f"{STEPS} steps",
        "checkpoint.interval": "1 steps",
        "log.interval": 1,
        "checkpoint.keep_latest": 2,
    }
    return make_config(run_dir, **(setting | overrides))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """An undisturbed run, and the kill points of a save on each rank, without and with a node-local folder."""
    folder = tmp_path_factory.mktemp("expected")
    run_ranks(2, train, train_config(folder / "undisturbed"))
    kill_points = {}
    for local in (False, True):
        config = train_config(folder / f"kill points {local}", **{"train.duration": "1 steps", "optim.warmup": "1 steps"})
        if local:
            config = with_local(config, folder / "local")
        kill_points[local] = [names for _, names in run_ranks(2, train_until_kill_point, config, None, 0)]
    return folder / "undisturbed", kill_points


def with_local(config, folder):
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"local_dir": str(folder)})})


def latest_step(run_dir):
    checkpoint = find_latest_valid(run_dir, lambda text: pytest.fail(f"a checkpoint is damaged: {text}"))
    return get_step(checkpoint) if checkpoint else 0


def check_equal(run_dir, undisturbed):
    """Compare the final weights and every logged line, including those of steps that were lost and repeated."""
    assert log(run_dir, "loss", "lr", "grad_norm") == log(undisturbed, "loss", "lr", "grad_norm")
    final = weights(run_dir, STEPS)
    for name, tensor in weights(undisturbed, STEPS).items():
        assert torch.equal(final[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_a_run_that_is_killed_many_times_equals_an_undisturbed_run(expected, tmp_path, kills):
    """One or both of two ranks are killed at random moments and at kill points of a save. Many kills cover every kill point."""
    undisturbed, kill_points = expected
    generator = random.Random(0)
    points = [
        (local, rank, at) for local in kill_points for rank in (0, 1) for at in range(1, len(kill_points[local][rank]) + 1)
    ]
    if kills < len(points):
        points = generator.sample(points, kills - 5)
    faults = [(train_until_kill_point, *point) for point in points]
    while len(faults) < kills:
        faults.append((train_for_seconds, generator.random() < 0.5, generator.randrange(2), generator.uniform(0, 0.6)))
    generator.shuffle(faults)
    run, before = 0, 0
    for function, local, rank, at in faults:
        run_dir = tmp_path / str(run)
        config = train_config(run_dir)
        config = with_local(config, tmp_path / "local") if local else config
        finished = run_until_killed(function, (config, rank, at), kill_all=generator.random() < 0.5)
        after = latest_step(run_dir)
        assert after >= before  # no checkpoint is lost
        before = after
        if finished:
            check_equal(run_dir, undisturbed)
            run, before = run + 1, 0
    assert run_ranks(2, train, train_config(tmp_path / str(run)))[0].finished
    check_equal(tmp_path / str(run), undisturbed)


# ---------------------------------------------------------------- damaged files


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [truncate, flip_bit, empty, Path.unlink]
DAMAGED_FILES = ["deepspeed/*_optim_states.pt", "deepspeed/*_model_states.pt", "config.yaml", "manifest.json"]


def train_all(configs):
    """Train several runs in one process group."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    with process_group() as ranks, StopRequest() as stop:
        return [Trainer(config, ranks, stop, Watchdog(0, 0)).train().finished for config in configs]


def test_damaged_checkpoints_are_renamed_and_the_run_resumes_from_the_one_before(expected, tmp_path):
    undisturbed, _ = expected
    runs = {}
    for damage in DAMAGES:
        for pattern in DAMAGED_FILES:
            name = f"{damage.__name__} {pattern.partition('/')[2] or pattern}"
            runs[name] = shutil.copytree(undisturbed, tmp_path / name.replace("*", ""))
            damage(sorted((runs[name] / "checkpoints" / format_checkpoint_name(STEPS)).glob(pattern))[0])
    for name, content in (("no latest", None), ("garbage latest", b"\0garbage"), ("wrong latest", b"step-00000099")):
        runs[name] = shutil.copytree(undisturbed, tmp_path / name)
        latest = runs[name] / "checkpoints" / "latest"
        latest.unlink() if content is None else latest.write_bytes(content)
    for run_dir in runs.values():
        (run_dir / "log.jsonl").unlink()
    assert all(run_ranks(2, train_all, [train_config(run_dir) for run_dir in runs.values()])[0])
    expected_log = log(undisturbed, "loss", "lr", "grad_norm")
    for name, run_dir in runs.items():
        is_damaged = "latest" not in name
        assert log(run_dir, "loss", "lr", "grad_norm") == ({STEPS: expected_log[STEPS]} if is_damaged else {}), name
        assert (f"Renamed it to {run_dir}/checkpoints/damaged-" in (run_dir / "log.txt").read_text()) == is_damaged, name
        assert [p.name for p in (run_dir / "checkpoints").glob("damaged-*")] == [
            f"damaged-{format_checkpoint_name(STEPS)}"
        ] * is_damaged
        assert latest_step(run_dir) == STEPS
        for key, tensor in weights(undisturbed, STEPS).items():
            assert torch.equal(weights(run_dir, STEPS)[key], tensor), (name, key)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_from_step_0(expected, tmp_path):
    run_dir = shutil.copytree(expected[0], tmp_path / "run")
    for checkpoint in list_checkpoints(run_dir):
        empty(checkpoint / "config.yaml")
    for _ in range(2):  # the second start fails in the same way
        with pytest.raises(
            RankError, match="all 2 checkpoints are damaged .*To start again from step 0, move .* away"
        ) as caught:
            run_ranks(2, train, train_config(run_dir))
        assert caught.value.kinds == ["CheckpointError"] * 2
    rename_as_damaged(list_checkpoints(run_dir)[0])
    rename_as_damaged(list_checkpoints(run_dir)[0])
    with pytest.raises(RankError, match="all 2 checkpoints are damaged. To start again"):
        run_ranks(1, train, train_config(run_dir, **{"train.micro_batch": 8}))


@pytest.mark.parametrize("content", [b"", bytes(700), b"\xff\xfe", None])
def test_a_config_that_a_power_cut_damaged_is_restored_from_the_latest_checkpoint(expected, tmp_path, content):
    run_dir = shutil.copytree(expected[0], tmp_path / "run")
    config = run_dir / "config.yaml"
    config.unlink() if content is None else config.write_bytes(content)
    with pytest.raises(RankError, match=r"contains a run with another configuration \(run\.seed: 0 -> 3\)"):
        run_ranks(2, train, train_config(run_dir, **{"run.seed": 3}))
    assert run_ranks(2, train, train_config(run_dir))[0].finished
    message = (
        f"config.yaml was missing, empty or damaged. Restored it from {run_dir}/checkpoints/{format_checkpoint_name(STEPS)}."
    )
    assert message in (run_dir / "log.txt").read_text()
    assert load_config(config) == train_config(run_dir)


# ---------------------------------------------------------------- two jobs at once


def test_a_second_job_in_the_same_run_directory_is_refused(expected, tmp_path):
    undisturbed, _ = expected
    config = train_config(tmp_path / "run")
    processes, pipes = start_ranks(2, train, config)
    while not (tmp_path / "run" / "log.jsonl").exists() or not log(tmp_path / "run", "loss"):
        assert all(p.is_alive() for p in processes)
        time.sleep(0.02)
    holder = f"process {processes[0].pid} on {socket.gethostname()}"
    with pytest.raises(RankError, match=f"run.dir=.*run is in use by {holder}") as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["UserError"] * 2
    assert [result.finished for result in collect(processes, pipes)] == [True, True]
    check_equal(tmp_path / "run", undisturbed)
    assert not (tmp_path / "run" / "run.lock").exists()


# ---------------------------------------------------------------- a commit in the background that fails


def train_with_a_failing_commit(config, step, bad_image):
    """Train. The commit of ``step`` fails after two seconds. ``bad_image`` ends the run at that step."""
    from scale_mae.checkpoint.commit import Committer
    from scale_mae.data.errors import DataError
    from scale_mae.training.trainer import Trainer

    commit, train_step = Committer.commit, Trainer.train_step

    def fail(self, world, current_step, *args, **more):
        if current_step == step:
            time.sleep(2)
            raise CheckpointError("the disk is gone")
        return commit(self, world, current_step, *args, **more)

    def end(self, *args):
        if self.step == step and bad_image:
            raise DataError("a bad image")
        return train_step(self, *args)

    Committer.commit, Trainer.train_step = fail, end
    return train(config)


def test_a_checkpoint_stores_the_number_of_failed_saves_including_the_last_one(tmp_path):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    assert run_ranks(2, train_with_a_failing_commit, config, 4, False)[0].finished
    reader = ZeroReader(tmp_path / "run" / "checkpoints" / format_checkpoint_name(8) / "deepspeed")
    assert reader.state["failed_saves"] == 1


def test_a_run_that_ends_with_an_error_logs_that_its_last_save_failed(tmp_path):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    with pytest.raises(RankError, match="a bad image"):
        run_ranks(2, train_with_a_failing_commit, config, 6, True)
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "Checkpoint not saved (1 so far): the disk is gone" in text.partition("Stopped by an error: a bad image")[0]


def train_with_a_bit_flip(config):
    """Train. A bit of the second checkpoint flips while it is copied to the run directory."""
    from scale_mae.checkpoint import commit

    real = commit.flush

    def flush(path):
        if path.name.endswith("optim_states.pt") and format_checkpoint_name(8) in str(path):
            flip_bit(path)
        real(path)

    commit.flush = flush
    return train(config)


def test_a_checkpoint_that_differs_from_its_local_copy_is_not_committed(tmp_path):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    assert run_ranks(2, train_with_a_bit_flip, config)[0].finished
    assert [get_step(c) for c in list_checkpoints(tmp_path / "run")] == [4, 10]
    assert "differs from the file that it was copied from" in (tmp_path / "run" / "log.txt").read_text()


def test_a_local_folder_that_cannot_be_created_is_reported_with_its_key(tmp_path):
    with pytest.raises(
        RankError, match=r"checkpoint\.local_dir=/dev/null/x: cannot be written \(Not a directory\)\. Set it to a"
    ):
        run_ranks(1, train, with_local(make_config(tmp_path, **{"train.micro_batch": 16}), "/dev/null/x"))


def train_and_record_flushed_paths(config):
    """Train and return the path of each flushed file and folder, as it was at that time."""
    flushed, real = [], os.fsync

    def fsync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    os.fsync = fsync
    train(config)
    return flushed


def test_the_names_of_all_folders_and_the_config_are_flushed(tmp_path):
    config = make_config(tmp_path / "run", **{"train.micro_batch": 16, "train.duration": "1 steps", "optim.warmup": "0 steps"})
    (flushed,) = run_ranks(1, train_and_record_flushed_paths, config)
    run, checkpoints = str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")
    first = next(i for i, path in enumerate(flushed) if path.startswith(checkpoints))
    assert run in flushed[:first]
    assert f"{run}/config.tmp" in flushed[:first]
    assert checkpoints in flushed[first:]


# ---------------------------------------------------------------- the pointer to the latest checkpoint


@pytest.mark.parametrize("local", [False, True])
def test_a_pointer_that_cannot_be_updated_loses_no_checkpoint(tmp_path, local):
    """``latest`` is a folder that is not empty."""
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    pointer.mkdir(parents=True)
    (pointer / "file").write_text("")
    config = make_config(tmp_path / "run", **{"checkpoint.interval": "2 steps", "checkpoint.keep_latest": 2})
    config = with_local(config, tmp_path / "local") if local else config
    assert run_ranks(2, train, config)[0].finished
    assert [get_step(c) for c in list_checkpoints(tmp_path / "run")] == [8, 10]
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "Checkpoint not saved" not in text
    assert text.count("latest: not updated (Directory not empty)") == 5
    assert log(tmp_path / "run", "checkpoint_failures")[10] == (0,)


@pytest.mark.parametrize("name", ["latest", "latest.tmp"])
def test_an_empty_folder_in_the_place_of_the_pointer_is_replaced(tmp_path, name):
    (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    assert run_ranks(1, train, make_config(tmp_path / "run", **{"train.micro_batch": 16}))[0].finished
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == format_checkpoint_name(10)


# ---------------------------------------------------------------- a local folder that fails on one rank


def train_with_a_blocked_folder(config, rank):
    """Train. During the second save, this rank's local folder is a file."""
    from scale_mae.checkpoint.saver import Saver

    real = Saver.save

    def save(self, *args, **more):
        self.wait()
        (folder,) = Path(config.checkpoint.local_dir).iterdir()
        local, is_blocked = folder / f"rank-{rank}", args[0] == 8 and os.environ["RANK"] == str(rank)
        if is_blocked:
            shutil.rmtree(local, ignore_errors=True)
            local.write_text("")
        real(self, *args, **more)
        if is_blocked:
            local.unlink()

    Saver.save = save
    return train(config)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_start_a_local_save_does_not_block_the_others(tmp_path, rank):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    results = run_ranks(2, train_with_a_blocked_folder, config, rank, timeout=60)
    assert [result.finished for result in results] == [True] * 2
    assert [get_step(c) for c in list_checkpoints(tmp_path / "run")] == [4, 10]
    assert log(tmp_path / "run", "checkpoint_failures")[9] == (1,)
    assert "File exists" in (tmp_path / "run" / "log.txt").read_text()


def train_without_locks(config):
    import fcntl

    def flock(*_):
        raise OSError(95, os.strerror(95))

    fcntl.flock = flock
    return train(config)


def test_a_file_system_without_locks_is_reported_in_the_log(tmp_path):
    config = make_config(tmp_path / "run", **{"train.micro_batch": 16})
    assert run_ranks(1, train_without_locks, config)[0].finished
    message = "run.lock: the file system has no locks (Operation not supported). Make sure that no second job uses this folder."
    assert message in (tmp_path / "run" / "log.txt").read_text()


# ---------------------------------------------------------------- a full disk, a read-only one


SHORT = {"train.duration": "8 steps", "train.micro_batch": 16}


def mount(*args):
    subprocess.run(["mount", *map(str, args)], check=True)


def run_in_mount_namespace(function, folder, *args):
    """Call a function of this module in a mount namespace of its own, so that no other process sees its mounts."""
    flags = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    program = f"import pathlib, test_faults as t; t.{function}(pathlib.Path({str(folder)!r}), {demo_index()!r}, *{args!r})"
    command = ["unshare", *flags, "--mount", sys.executable, "-c", program]
    here, env = Path(__file__).parent, os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def checkpoint_bytes(run_dir):
    return sum(p.stat().st_size for p in (run_dir / "checkpoints" / format_checkpoint_name(STEPS)).rglob("*"))


def train_with_a_small_local_disk(folder, index, nbytes):
    """Train two ranks on a local disk with enough space for one rank only. Then enlarge the disk and train again."""
    disk = folder / "local"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={int(0.75 * nbytes)}", "tmpfs", disk)
    config = with_local(make_config(folder / "run", **{"data.source": index}), disk)
    with pytest.raises(RankError) as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["CheckpointError"] * 2
    assert not list_checkpoints(folder / "run")
    mount("-o", f"remount,size={2 * nbytes}", disk)
    assert run_ranks(2, train, config)[0].finished
    assert not list(disk.iterdir())


def test_a_local_save_needs_free_space_for_all_ranks_of_the_node(expected, tmp_path):
    run_in_mount_namespace("train_with_a_small_local_disk", tmp_path, checkpoint_bytes(expected[0]))
    text = (tmp_path / "run" / "log.txt").read_text()
    lost = r"Checkpoint not saved \(. so far\): .*/step-.{8}: not written \(.*/local/.* GB are needed, .* GB are free"
    assert len(re.findall(lost, text)) == 3, text


def lock_on_a_failing_disk(folder, _):
    """Take a lock on a full disk. Then make the disk read-only."""
    from scale_mae.system.lock import exclusive_lock

    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk)
    subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=64k"], check=False)
    with exclusive_lock(disk / "lock", "it is in use"):
        mount("--bind", disk, disk)
        mount("-o", "remount,ro,bind", disk)


def test_a_lock_that_can_neither_be_written_nor_deleted_is_no_error(tmp_path):
    run_in_mount_namespace("lock_on_a_failing_disk", tmp_path)


def train_while_the_disk_is_full(folder, index):
    """Train. The disk of the run directory is completely full from step 10 to step 45."""
    from scale_mae.metrics.sinks import Log

    torch.set_num_threads(1)
    disk, real = folder / "disk", Log.write_metrics
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=20m", "tmpfs", disk)

    def metrics(self, values):
        real(self, values)
        if values["step"] == 10:
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={disk}/filler", "bs=64k", "status=none"], check=False, stderr=subprocess.DEVNULL
            )
        elif values["step"] == 45:
            (disk / "filler").unlink()

    Log.write_metrics = metrics
    setting = {"train.micro_batch": 16, "checkpoint.interval": "20 steps", "data.source": index}
    assert train(train_config(disk / "run", **setting)).finished
    shutil.copytree(disk / "run", folder / "kept")


def test_logging_continues_after_a_full_disk_and_counts_the_failed_saves(tmp_path):
    stderr = run_in_mount_namespace("train_while_the_disk_is_full", tmp_path)
    failures = log(tmp_path / "kept", "checkpoint_failures")  # no line is truncated
    assert failures.keys() >= {*range(1, 11), *range(46, STEPS + 1)}
    assert len(failures) < STEPS
    assert failures[STEPS - 1] == (2,)
    text = (tmp_path / "kept" / "log.txt").read_text()
    assert f"step {STEPS}/{STEPS}" in text
    for name in ("log.txt", "log.jsonl"):
        assert stderr.count(f"{name}: cannot be written (No space left on device)") == 1
        assert stderr.count(f"{name}: writable again") == 1


def test_the_line_after_a_truncated_line_starts_on_a_new_line(tmp_path):
    from scale_mae.metrics.sinks import JsonLinesSink

    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    for step in (2, 3):
        sink = JsonLinesSink(tmp_path / "log.jsonl")
        sink.write_metrics({"step": step})
        sink.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'


def train_on_failing_disks(folder, index, nbytes):
    """Train on failing disks, and again after each disk is repaired. Write the result of every start to ``results.json``.

    One disk is too small for two checkpoints, which the run detects before it writes. The next one is the same, but the run
    detects it only while it writes. The last one becomes read-only.
    """
    from scale_mae.checkpoint import commit
    from scale_mae.checkpoint.saver import Saver
    from scale_mae.config import UserError

    def start(run_dir):
        try:
            train(train_config(run_dir, **{"data.source": index}, **SHORT))
            results.append("finished")
        except UserError as error:
            results.append(str(error))

    torch.set_num_threads(1)
    results, real, save = [], commit.check_space, Saver.save
    start(folder / "undisturbed" / "run")
    for name in ("full", "overrun"):
        disk = folder / name
        disk.mkdir()
        mount("-t", "tmpfs", "-o", f"size={int(1.5 * nbytes)}", "tmpfs", disk)
        commit.check_space = real if name == "full" else lambda *_: None
        start(disk / "run")
        mount("-o", f"remount,size={5 * nbytes}", disk)
        start(disk / "run")

    checkpoints = folder / "read-only" / "run" / "checkpoints"

    def save_on_read_only_disk(self, step, *args, **more):
        if step == 4:
            mount("--bind", checkpoints, checkpoints)
            mount("-o", "remount,ro,bind", checkpoints)
        save(self, step, *args, **more)

    Saver.save = save_on_read_only_disk
    start(checkpoints.parent)
    Saver.save = save
    subprocess.run(["umount", checkpoints], check=True)
    mount("--bind", checkpoints.parent, checkpoints.parent)
    mount("-o", "remount,ro,bind", checkpoints.parent)
    start(checkpoints.parent)
    subprocess.run(["umount", checkpoints.parent], check=True)
    start(checkpoints.parent)
    for name in ("full", "overrun"):
        shutil.copytree(folder / name / "run", folder / f"{name} kept")
    (folder / "results.json").write_text(json.dumps(results))


def test_a_full_or_read_only_disk_loses_checkpoints_but_not_the_run(expected, tmp_path):
    run_in_mount_namespace("train_on_failing_disks", tmp_path, checkpoint_bytes(expected[0]))
    expected_log = log(tmp_path / "undisturbed" / "run", "loss", "lr", "grad_norm")
    for name, reason in (
        ("full", "GB are needed, but only 0.0[0-9]* GB are free"),
        ("overrun", "No space left|disk is full or not writable"),
    ):
        text = (tmp_path / f"{name} kept" / "log.txt").read_text()
        assert len(re.findall(rf"Checkpoint not saved \(. so far\): .*({reason})", text)) == 7, text
        assert "step-00000001 at step 1 " in text.partition("Resumed from")[2]
        assert log(tmp_path / f"{name} kept", "loss", "lr", "grad_norm") == expected_log
    assert log(tmp_path / "read-only" / "run", "loss", "lr", "grad_norm") == expected_log
    results = json.loads((tmp_path / "results.json").read_text())
    lost = "step-00000008: not written"
    parts = ["finished", *[lost, "finished"] * 2, lost, "cannot be written", "finished"]
    assert [part in text for text, part in zip(results, parts, strict=True)] == [True] * 8, results
    assert ["Read-only file system" in text for text in results[-3:]] == [True, True, False]
