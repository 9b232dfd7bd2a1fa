"""Stopping in time, whoever asks for it, and ending where nothing moves."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest
from ranks import RankError, collect, run_ranks, start_ranks
from test_trainer import log, make_config, train

from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.distributed.signals import StopRequest
from scale_mae.runs.exit_status import FILE
from scale_mae.system.process_pool import map_unordered
from scale_mae.training.time_limit import StopTimeEstimator
from scale_mae.training.watchdog import EXIT_CODE

LONG = {"train.duration": "5000 steps", "checkpoint.interval": "5000 steps"}


def hang(config, rank, how, errors):
    """Train, and stop moving on one rank after the third batch; standard error goes to a file a rank."""
    from scale_mae.training import watchdog
    from scale_mae.training.batch_iterator import BatchIterator

    watchdog.GRACE_SECONDS = 1.0
    mine = int(os.environ["RANK"])
    os.dup2(os.open(f"{errors}-{mine}", os.O_WRONLY | os.O_CREAT), 2)
    original, taken = BatchIterator.take, []

    def take(self):
        taken.append(1)
        if mine == rank and len(taken) > 3:
            how()
        return original(self)

    BatchIterator.take = take
    return train(config)


def sleep_in_python():
    time.sleep(600)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(600)  # unlike CDLL, this does not let other threads run


@pytest.mark.parametrize("how", [sleep_in_python, hold_the_interpreter])
def test_a_rank_that_stops_moving_ends_all_with_their_stacks(tmp_path, how):
    config = make_config(tmp_path / "run", **LONG, **{"run.watchdog_minutes": 0.1, "engine.deepspeed": "zero0"})
    processes, pipes = start_ranks(2, hang, config, 1, how, str(tmp_path / "error"))
    with pytest.raises(RankError):
        collect(processes, pipes, timeout=90)
    told = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert processes[0].exitcode == EXIT_CODE, told
    assert "rank 0 | no progress for 0.1 minutes (run.watchdog_minutes)" in told[0]
    assert "in train_step" in told[0]  # where it waits for the other
    assert processes[1].exitcode != 0
    assert how.__name__ in told[1]
    assert not (tmp_path / "run" / FILE).exists()  # for a job script: start again


def wait_without_a_step(minutes):
    from scale_mae.training.watchdog import Watchdog

    with Watchdog(minutes, 0) as watchdog:
        if not minutes:
            watchdog.report_progress()
        time.sleep(1.5)
    return "alive"


def move_again(minutes):
    from scale_mae.training import watchdog

    watchdog.GRACE_SECONDS = 1.0
    with watchdog.Watchdog(minutes, 0) as watched:
        watched.report_progress()
        time.sleep(60 * minutes + 0.9)
        watched.report_progress()
        time.sleep(0.5)
    return "alive"


def test_who_was_only_slow_lives():
    assert run_ranks(1, move_again, 0.01) == ["alive"]


@pytest.mark.parametrize("minutes", [0.01, 0])
def test_before_the_first_step_and_switched_off_it_sleeps(minutes):
    assert run_ranks(1, wait_without_a_step, minutes) == ["alive"]


def train_with_little_time(config, seconds):
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time() + seconds))
    return train(config)


def test_a_run_stops_in_time_before_its_job_does(tmp_path):
    began = time.time()
    results = run_ranks(2, train_with_little_time, make_config(tmp_path, **LONG), 45)
    assert time.time() - began < 45
    assert [r.finished for r in results] == [False, False]
    assert results[0].stopped == f"stopped by the time limit after step {results[0].step}"
    assert results[0].step > 0
    assert [c.name for c in list_checkpoints(tmp_path)] == [f"step-{results[0].step:08d}"]
    assert (tmp_path / FILE).read_text() == results[0].stopped + "\n"


def test_the_time_to_stop_follows_the_slowest_save(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    stop = StopRequest()
    assert stop.reason is None
    stop.lead_seconds = 20
    later = time.time() + 81
    monkeypatch.setattr(time, "time", lambda: later)
    assert stop.reason == "the time limit"


def test_one_save_that_hung_long_ago_does_not_stop_jobs_early_for_ever(monkeypatch):
    pace = StopTimeEstimator(checkpoint_bytes=10**10, save_seconds=[])
    assert pace.lead_seconds == 2 * 50 + 30
    pace = StopTimeEstimator(checkpoint_bytes=0, save_seconds=[7200.0])
    pace.add_step(40)
    assert pace.lead_seconds == 2 * 7200 + 2 * 40 + 30
    for _ in range(3):
        pace.add_save(1.0)
    assert pace.lead_seconds == 2 * 1 + 2 * 40 + 30
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    stop = StopRequest()
    stop.lead_seconds = 1e6  # no more than a quarter of the time is given to leaving
    assert stop.reason is None


def train_and_signal(config, number):
    """Signal rank 1, from inside, once it has taken three batches."""
    from scale_mae.training.batch_iterator import BatchIterator

    original, taken = BatchIterator.take, []

    def take(self):
        taken.append(1)
        if os.environ["RANK"] == "1" and len(taken) == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # some systems signal twice
        return original(self)

    BatchIterator.take = take
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, has it ignored
    return train(config)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_any_rank_stops_all_after_one_save(tmp_path, number):
    results = run_ranks(2, train_and_signal, make_config(tmp_path, **LONG), number)
    assert len({r.step for r in results}) == 1
    assert 1 <= results[0].step < 10
    assert results[1].stopped == f"stopped by {number.name} after step {results[1].step}"
    assert results[0].stopped.startswith("stopped by a signal to another process")
    assert [c.name for c in list_checkpoints(tmp_path)] == [f"step-{results[0].step:08d}"]
    assert max(log(tmp_path, "loss")) == results[0].step


def signalled(number):
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    return number


def test_workers_leave_signals_to_their_parent():
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]
    with map_unordered(signalled, numbers, processes=1, max_pending=1) as results:
        assert list(results) == numbers
