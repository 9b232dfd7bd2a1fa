"""Whatever strikes a run, the next start goes on as if nothing had: kills at any moment, damaged files, full disks."""

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

from scale_mae.checkpoint.discovery import latest_valid, rename_as_damaged
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import checkpoint_name, list_checkpoints, step_of
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import load_config

STEPS = 60


class Bomb:
    """Kills this process at one of the moments between which a save changes something on a disk."""

    def __init__(self, at):
        self.at, self.passed = at, []

    def tick(self, name):
        self.passed.append(name)
        if len(self.passed) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner, name):
        """Moments before and after a call."""
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.tick(f"before {name}")
            result = real(*args, **kwargs)
            self.tick(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    def within(self, owner, name, path_at):
        """The moment when half a file is written, besides those before and after."""
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = real(*args, **kwargs)
            content = Path(args[path_at]).read_bytes()
            Path(args[path_at]).write_bytes(content[: len(content) // 2])
            self.tick(f"within {name}")
            Path(args[path_at]).write_bytes(content)
            return result

        setattr(owner, name, wrapped)

    def plant(self):
        self.within(torch, "save", 1)
        for owner, names in (
            (os, ("fsync", "close")),
            (torch, ("save",)),
            (Path, ("mkdir", "write_text", "rename")),
            (shutil, ("rmtree",)),
        ):
            for name in names:
                self.around(owner, name)


def train_with_a_bomb(config, rank, at):
    """Train; this process's ``at``-th moment is its last if it is ``rank``. The names of the moments of its first save."""
    from scale_mae.checkpoint.saver import Saver

    bomb, real = Bomb(at if os.environ["RANK"] == str(rank) else 0), Saver.save

    def save(self, *args, **more):
        Saver.save = real
        bomb.plant()
        real(self, *args, **more)
        self.drain()
        moments.extend(bomb.passed)

    moments = []
    Saver.save = save
    result = train(config)
    return result, moments


def train_until_killed(config, rank, seconds):
    """Train; kill this process, if it is ``rank``, so long after its first step began."""
    from scale_mae.engine.deepspeed import Engine

    real = Engine.step

    def step(self, *args, **kwargs):
        Engine.step = real
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return real(self, *args, **kwargs)

    if os.environ["RANK"] == str(rank):
        Engine.step = step
    return train(config)


def run_to_death(function, args, every):
    """Start two ranks; when one is gone, kill the other, or let it find out by itself. Whether they finished instead."""
    processes, pipes = start_ranks(2, function, *args)
    while all(p.is_alive() for p in processes):
        time.sleep(0.002)
    if every:
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
    """The run that nothing strikes, and the moments of a save on each rank, without and with a local folder."""
    folder = tmp_path_factory.mktemp("expected")
    run_ranks(2, train, train_config(folder / "whole"))
    moments = {}
    for local in (False, True):
        config = train_config(folder / f"moments{local}", **{"train.duration": "1 steps", "optim.warmup": "1 steps"})
        if local:
            config = with_local(config, folder / "local")
        moments[local] = [names for _, names in run_ranks(2, train_with_a_bomb, config, None, 0)]
    return folder / "whole", moments


def with_local(config, folder):
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"local_dir": str(folder)})})


def newest(run_dir):
    found = latest_valid(run_dir, lambda text: pytest.fail(f"a checkpoint was left damaged: {text}"))
    return step_of(found) if found else 0


def check_equal(run_dir, whole):
    """Every line ever logged, also those of steps that were lost and done again, and the last weights."""
    right = log(whole, "loss", "lr", "grad_norm")
    assert log(run_dir, "loss", "lr", "grad_norm") == right
    last = weights(run_dir, STEPS)
    for name, tensor in weights(whole, STEPS).items():
        assert torch.equal(last[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_killed_at_many_moments_a_run_equals_the_one_that_was_not(expected, tmp_path, kills):
    """Two ranks, of which one or all are killed: at boundaries inside a save (at every one, if there are kills enough), and at
    random moments."""
    whole, moments = expected
    chance = random.Random(0)
    boundaries = [(local, rank, at) for local in moments for rank in (0, 1) for at in range(1, len(moments[local][rank]) + 1)]
    if kills < len(boundaries):
        boundaries = chance.sample(boundaries, kills - 5)
    strikes = [(train_with_a_bomb, *boundary) for boundary in boundaries]
    while len(strikes) < kills:
        strikes.append((train_until_killed, chance.random() < 0.5, chance.randrange(2), chance.uniform(0, 0.6)))
    chance.shuffle(strikes)
    run, before = 0, 0
    for function, local, rank, at in strikes:
        config = train_config(tmp_path / str(run))
        config = with_local(config, tmp_path / "local") if local else config
        finished = run_to_death(function, (config, rank, at), every=chance.random() < 0.5)
        reached = newest(tmp_path / str(run))
        assert reached >= before  # what was once saved stays
        before = reached
        if finished:
            check_equal(tmp_path / str(run), whole)
            run, before = run + 1, 0
    assert run_ranks(2, train, train_config(tmp_path / str(run)))[0].finished
    check_equal(tmp_path / str(run), whole)


# ---------------------------------------------------------------- damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [cut, flip, empty, Path.unlink]
VICTIMS = ["deepspeed/*_optim_states.pt", "deepspeed/*_model_states.pt", "config.yaml", "manifest.json"]


def train_all(configs):
    """Several runs in one set of ranks."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.trainer import Run
    from scale_mae.training.watchdog import Watchdog

    with process_group() as ranks, StopRequest() as stop:
        return [Run(config, ranks, stop, Watchdog(0, 0)).loop().finished for config in configs]


def test_damaged_checkpoints_are_set_aside_and_the_run_goes_on_from_the_one_before(expected, tmp_path):
    whole, _ = expected
    runs = {}
    for damage in DAMAGES:
        for victim in VICTIMS:
            name = f"{damage.__name__} {victim.partition('/')[2] or victim}"
            runs[name] = shutil.copytree(whole, tmp_path / name.replace("*", ""))
            damage(sorted((runs[name] / "checkpoints" / checkpoint_name(STEPS)).glob(victim))[0])
    for name, content in (("no latest", None), ("garbage latest", b"\0garbage"), ("foreign latest", b"step-00000099")):
        runs[name] = shutil.copytree(whole, tmp_path / name)
        latest = runs[name] / "checkpoints" / "latest"
        latest.unlink() if content is None else latest.write_bytes(content)
    for run_dir in runs.values():
        (run_dir / "log.jsonl").unlink()
    assert all(run_ranks(2, train_all, [train_config(run_dir) for run_dir in runs.values()])[0])
    right = log(whole, "loss", "lr", "grad_norm")
    for name, run_dir in runs.items():
        damaged = "latest" not in name
        assert log(run_dir, "loss", "lr", "grad_norm") == ({STEPS: right[STEPS]} if damaged else {}), name
        assert (f"Renamed it to {run_dir}/checkpoints/damaged-" in (run_dir / "log.txt").read_text()) == damaged, name
        assert [p.name for p in (run_dir / "checkpoints").glob("damaged-*")] == [f"damaged-{checkpoint_name(STEPS)}"] * damaged
        assert newest(run_dir) == STEPS
        for key, tensor in weights(whole, STEPS).items():
            assert torch.equal(weights(run_dir, STEPS)[key], tensor), (name, key)


def test_a_run_whose_checkpoints_are_all_bad_never_starts_anew(expected, tmp_path):
    run_dir = shutil.copytree(expected[0], tmp_path / "run")
    for checkpoint in list_checkpoints(run_dir):
        empty(checkpoint / "config.yaml")
    for _ in range(2):  # the same the next time
        with pytest.raises(
            RankError, match="all 2 checkpoints are damaged .*To start again from step 0, move .* away"
        ) as caught:
            run_ranks(2, train, train_config(run_dir))
        assert caught.value.kinds == ["CheckpointError"] * 2
    rename_as_damaged(list_checkpoints(run_dir)[0])
    rename_as_damaged(list_checkpoints(run_dir)[0])
    with pytest.raises(RankError, match="all 2 checkpoints are damaged. To start again"):
        run_ranks(1, train, train_config(run_dir, **{"train.micro_batch": 8}))


@pytest.mark.parametrize("left", [b"", bytes(700), b"\xff\xfe", None])
def test_a_config_that_a_power_cut_spoilt_comes_back_from_the_newest_checkpoint(expected, tmp_path, left):
    run_dir = shutil.copytree(expected[0], tmp_path / "run")
    config = run_dir / "config.yaml"
    config.unlink() if left is None else config.write_bytes(left)
    with pytest.raises(RankError, match=r"contains a run with another configuration \(run\.seed: 0 -> 3\)"):
        run_ranks(2, train, train_config(run_dir, **{"run.seed": 3}))
    assert run_ranks(2, train, train_config(run_dir))[0].finished
    said = f"config.yaml was missing, empty or damaged; restored from {run_dir}/checkpoints/{checkpoint_name(STEPS)}"
    assert said in (run_dir / "log.txt").read_text()
    assert load_config(config) == train_config(run_dir)


# ---------------------------------------------------------------- two at once


def test_the_second_of_two_jobs_on_one_run_directory_refuses(expected, tmp_path):
    whole, _ = expected
    config = train_config(tmp_path / "run")
    processes, pipes = start_ranks(2, train, config)
    while not (tmp_path / "run" / "log.jsonl").exists() or not log(tmp_path / "run", "loss"):
        assert all(p.is_alive() for p in processes)
        time.sleep(0.02)
    who = f"process {processes[0].pid} on {socket.gethostname()}"
    with pytest.raises(RankError, match=f"run.dir=.*run is in use by {who}") as caught:
        run_ranks(2, train, config)
    assert caught.value.kinds == ["UserError"] * 2
    assert [result.finished for result in collect(processes, pipes)] == [True, True]
    check_equal(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "run.lock").exists()


# ---------------------------------------------------------------- a publication that fails


def train_with_a_failing_publication(config, step, bad_image):
    """The publication of ``step`` fails, after a while; ``bad_image`` ends the run at that step."""
    from scale_mae.checkpoint.saver import Saver
    from scale_mae.data.errors import DataError
    from scale_mae.training.trainer import Run

    commit, one_step = Saver._commit, Run._one_step

    def fail(self, world, now, write):
        if now == step:
            time.sleep(2)
            raise CheckpointError("the disk is gone")
        return commit(self, world, now, write)

    def end(self, *args):
        if self.step == step and bad_image:
            raise DataError("a bad image")
        return one_step(self, *args)

    Saver._commit, Run._one_step = fail, end
    return train(config)


def test_a_checkpoint_counts_the_publication_that_failed_just_before(tmp_path):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    assert run_ranks(2, train_with_a_failing_publication, config, 4, False)[0].finished
    reader = ZeroReader(tmp_path / "run" / "checkpoints" / checkpoint_name(8) / "deepspeed")
    assert reader.state["failed_saves"] == 1


def test_a_run_that_ends_with_an_error_tells_what_became_of_its_last_save(tmp_path):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    with pytest.raises(RankError, match="a bad image"):
        run_ranks(2, train_with_a_failing_publication, config, 6, True)
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "checkpoint lost, 1 so far: the disk is gone" in text.partition("Stopped by an error: a bad image")[0]


def train_with_a_flip(config):
    """A bit of the second checkpoint flips on its way to the disk of the run directory."""
    from scale_mae.checkpoint import saver

    real = saver.flush

    def flush(path):
        if path.name.endswith("optim_states.pt") and checkpoint_name(8) in str(path):
            flip(path)
        real(path)

    saver.flush = flush
    return train(config)


def test_what_differs_from_its_local_copy_gets_no_name(tmp_path):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    assert run_ranks(2, train_with_a_flip, config)[0].finished
    assert [step_of(c) for c in list_checkpoints(tmp_path / "run")] == [4, 10]
    assert "differs from the file that it was copied from" in (tmp_path / "run" / "log.txt").read_text()


def test_a_local_folder_that_cannot_be_is_named_by_its_key(tmp_path):
    with pytest.raises(
        RankError, match=r"checkpoint\.local_dir=/dev/null/x: cannot be written \(Not a directory\)\. Set it to a"
    ):
        run_ranks(1, train, with_local(make_config(tmp_path, **{"train.micro_batch": 16}), "/dev/null/x"))


def train_and_tell_what_is_flushed(config):
    """Paths at the time of flushing."""
    flushed, real = [], os.fsync

    def fsync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    os.fsync = fsync
    train(config)
    return flushed


def test_the_names_of_all_folders_and_the_config_are_flushed(tmp_path):
    config = make_config(tmp_path / "run", **{"train.micro_batch": 16, "train.duration": "1 steps", "optim.warmup": "0 steps"})
    (flushed,) = run_ranks(1, train_and_tell_what_is_flushed, config)
    run, checkpoints = str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")
    first = next(i for i, path in enumerate(flushed) if path.startswith(checkpoints))
    assert run in flushed[:first]
    assert f"{run}/config.tmp" in flushed[:first]
    assert checkpoints in flushed[first:]


# ---------------------------------------------------------------- what follows a save


@pytest.mark.parametrize("local", [False, True])
def test_a_pointer_that_cannot_be_renewed_loses_no_checkpoint(tmp_path, local):
    """A folder with something in it, or an empty one, or garbage, lies where ``latest`` goes."""
    place = tmp_path / "run" / "checkpoints" / "latest"
    place.mkdir(parents=True)
    (place / "mine").write_text("")
    config = make_config(tmp_path / "run", **{"checkpoint.interval": "2 steps", "checkpoint.keep_latest": 2})
    config = with_local(config, tmp_path / "local") if local else config
    assert run_ranks(2, train, config)[0].finished
    assert [step_of(c) for c in list_checkpoints(tmp_path / "run")] == [8, 10]
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "checkpoint lost" not in text
    assert text.count("latest: not updated (Directory not empty)") == 5
    (place / "mine").unlink()
    assert log(tmp_path / "run", "checkpoint_failures")[10] == (0,)


@pytest.mark.parametrize("name", ["latest", "latest.tmp"])
def test_what_lies_in_the_place_of_the_pointer_is_replaced(tmp_path, name):
    (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    assert run_ranks(1, train, make_config(tmp_path / "run", **{"train.micro_batch": 16}))[0].finished
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == checkpoint_name(10)


# ---------------------------------------------------------------- a local folder that fails on one rank


def train_with_a_blocked_folder(config, rank):
    """Before the second save, a file lies where this rank's local folder was; after it, no longer."""
    from scale_mae.checkpoint.saver import Saver

    real = Saver.save

    def save(self, *args, **more):
        self.drain()
        (folder,) = Path(config.checkpoint.local_dir).iterdir()
        place, blocked = folder / f"rank-{rank}", args[0] == 8 and os.environ["RANK"] == str(rank)
        if blocked:
            shutil.rmtree(place, ignore_errors=True)
            place.write_text("")
        real(self, *args, **more)
        if blocked:
            place.unlink()

    Saver.save = save
    return train(config)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_begin_a_local_save_holds_up_no_other(tmp_path, rank):
    config = with_local(make_config(tmp_path / "run"), tmp_path / "local")
    results = run_ranks(2, train_with_a_blocked_folder, config, rank, timeout=60)
    assert [result.finished for result in results] == [True] * 2
    assert [step_of(c) for c in list_checkpoints(tmp_path / "run")] == [4, 10]
    assert log(tmp_path / "run", "checkpoint_failures")[9] == (1,)
    assert "File exists" in (tmp_path / "run" / "log.txt").read_text()


def train_without_locks(config):
    import fcntl

    def flock(*_):
        raise OSError(95, os.strerror(95))

    fcntl.flock = flock
    return train(config)


def test_a_file_system_without_locks_is_named_in_the_log(tmp_path):
    config = make_config(tmp_path / "run", **{"train.micro_batch": 16})
    assert run_ranks(1, train_without_locks, config)[0].finished
    said = "run.lock: its file system has no locks (Operation not supported); nothing keeps a second job out"
    assert said in (tmp_path / "run" / "log.txt").read_text()


# ---------------------------------------------------------------- a full disk, a read-only one


SHORT = {"train.duration": "8 steps", "train.micro_batch": 16}


def mount(*args):
    subprocess.run(["mount", *map(str, args)], check=True)


def with_own_mounts(function, folder, *args):
    """Call a function of this module with a folder in a mount namespace of its own, so that no other process is touched."""
    flags = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    program = f"import pathlib, test_faults as t; t.{function}(pathlib.Path({str(folder)!r}), {demo_index()!r}, *{args!r})"
    command = ["unshare", *flags, "--mount", sys.executable, "-c", program]
    here, env = Path(__file__).parent, os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def checkpoint_bytes(run_dir):
    return sum(p.stat().st_size for p in (run_dir / "checkpoints" / checkpoint_name(STEPS)).rglob("*"))


def strike_local_disk(folder, index, nbytes):
    """Two ranks share a local disk that is too small for both, though not for either; then it grows."""
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


def test_the_room_for_all_ranks_of_a_node_is_looked_at_before_a_local_save(expected, tmp_path):
    with_own_mounts("strike_local_disk", tmp_path, checkpoint_bytes(expected[0]))
    text = (tmp_path / "run" / "log.txt").read_text()
    lost = r"checkpoint lost, . so far: .*/checkpoints/step-.{8}: not written \(.*/local/.* GB are needed, .* GB are free"
    assert len(re.findall(lost, text)) == 3, text


def strike_lock(folder, _):
    """A lock is taken on a full disk; then the disk becomes read-only."""
    from scale_mae.system.lock import exclusive_lock

    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk)
    subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=64k"], check=False)
    with exclusive_lock(disk / "lock", "it is in use"):
        mount("--bind", disk, disk)
        mount("-o", "remount,ro,bind", disk)


def test_a_lock_that_can_be_neither_written_nor_removed_is_no_error(tmp_path):
    with_own_mounts("strike_lock", tmp_path)


def strike_logs(folder, index):
    """The disk of a run directory is full, to the last byte, from step 10 until step 45."""
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


def test_logs_go_on_after_a_full_disk_and_count_the_checkpoints_it_cost(tmp_path):
    told = with_own_mounts("strike_logs", tmp_path)
    failures = log(tmp_path / "kept", "checkpoint_failures")  # every line is whole
    assert failures.keys() >= {*range(1, 11), *range(46, STEPS + 1)}
    assert len(failures) < STEPS
    assert failures[STEPS - 1] == (2,)
    text = (tmp_path / "kept" / "log.txt").read_text()
    assert f"step {STEPS}/{STEPS}" in text
    for name in ("log.txt", "log.jsonl"):
        assert told.count(f"{name}: cannot be written (No space left on device)") == 1
        assert told.count(f"{name}: writable again") == 1


def test_a_line_that_a_crash_cut_short_is_ended_before_the_next(tmp_path):
    from scale_mae.metrics.sinks import JsonLinesSink

    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    for step in (2, 3):
        sink = JsonLinesSink(tmp_path / "log.jsonl")
        sink.write_metrics({"step": step})
        sink.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'


def strike_disks(folder, index, nbytes):
    """Disks too small for two checkpoints, which is found out before or while writing; one that becomes read-only; each mended
    in the end. Tells what each start came to."""
    from scale_mae.checkpoint import saver
    from scale_mae.config import UserError

    def start(run_dir):
        try:
            train(train_config(run_dir, **{"data.source": index}, **SHORT))
            told.append([str(run_dir.parent), "finished"])
        except UserError as error:
            told.append([str(run_dir.parent), str(error)])

    torch.set_num_threads(1)
    told, real, save = [], saver.check_space, saver.Saver.save
    start(folder / "whole" / "run")
    for name in ("full", "overrun"):
        disk = folder / name
        disk.mkdir()
        mount("-t", "tmpfs", "-o", f"size={int(1.5 * nbytes)}", "tmpfs", disk)
        saver.check_space = real if name == "full" else lambda *_: None
        start(disk / "run")
        mount("-o", f"remount,size={5 * nbytes}", disk)
        start(disk / "run")

    checkpoints = folder / "read-only" / "run" / "checkpoints"

    def save_with_accident(self, step, *args, **more):
        if step == 4:
            mount("--bind", checkpoints, checkpoints)
            mount("-o", "remount,ro,bind", checkpoints)
        save(self, step, *args, **more)

    saver.Saver.save = save_with_accident
    start(checkpoints.parent)
    saver.Saver.save = save
    subprocess.run(["umount", checkpoints], check=True)
    mount("--bind", checkpoints.parent, checkpoints.parent)
    mount("-o", "remount,ro,bind", checkpoints.parent)
    start(checkpoints.parent)
    subprocess.run(["umount", checkpoints.parent], check=True)
    start(checkpoints.parent)
    for name in ("full", "overrun"):
        shutil.copytree(folder / name / "run", folder / f"{name} kept")
    (folder / "told.json").write_text(json.dumps(told))


def test_a_full_and_a_read_only_disk_cost_checkpoints_but_not_the_run(expected, tmp_path):
    with_own_mounts("strike_disks", tmp_path, checkpoint_bytes(expected[0]))
    right = log(tmp_path / "whole" / "run", "loss", "lr", "grad_norm")
    for name, fate in (
        ("full", "GB are needed, 0.0[0-9]* GB are free"),
        ("overrun", "No space left|disk is full or not writable"),
    ):
        text = (tmp_path / f"{name} kept" / "log.txt").read_text()
        assert len(re.findall(f"checkpoint lost, . so far: .*({fate})", text)) == 7, text
        assert "step-00000001\n" in text.partition("resumed from")[2]
        assert log(tmp_path / f"{name} kept", "loss", "lr", "grad_norm") == right
    assert log(tmp_path / "read-only" / "run", "loss", "lr", "grad_norm") == right
    told = json.loads((tmp_path / "told.json").read_text())
    lost = "step-00000008: not written"
    parts = ["finished", *[lost, "finished"] * 2, lost, "cannot be written", "finished"]
    assert [part in text for (_, text), part in zip(told, parts, strict=True)] == [True] * 8, told
    assert ["Read-only file system" in text for _, text in told[-3:]] == [True, True, False]
