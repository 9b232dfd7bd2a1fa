"""The watchdog, and stopping on signals and before the time limit."""

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
    """Train, and hang on one rank after the third batch. The standard error of each rank goes to a file."""
    from scale_mae.training import watchdog
    from scale_mae.training.batch_iterator import BatchIterator

    watchdog.GRACE_SECONDS = 1.0
    own_rank = int(os.environ["RANK"])
    os.dup2(os.open(f"{errors}-{own_rank}", os.O_WRONLY | os.O_CREAT), 2)
    original, taken = BatchIterator.take, []

    def take(self):
        taken.append(1)
        if own_rank == rank and len(taken) > 3:
            how()
        return original(self)

    BatchIterator.take = take
    return train(config)


def sleep_in_python():
    time.sleep(600)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(600)  # unlike CDLL, PyDLL keeps the GIL


@pytest.mark.parametrize("how", [sleep_in_python, hold_the_interpreter])
def test_a_rank_that_hangs_ends_all_ranks_with_their_stacks(tmp_path, how):
    config = make_config(tmp_path / "run", **LONG, **{"run.watchdog_minutes": 0.1, "engine.deepspeed": "zero0"})
    processes, pipes = start_ranks(2, hang, config, 1, how, str(tmp_path / "error"))
    with pytest.raises(RankError):
        collect(processes, pipes, timeout=90)
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert processes[0].exitcode == EXIT_CODE, errors
    assert "rank 0 | no progress for 0.1 minutes (run.watchdog_minutes)" in errors[0]
    assert "in train_step" in errors[0]  # the function in which it waits for the other rank
    assert processes[1].exitcode != 0
    assert how.__name__ in errors[1]
    assert not (tmp_path / "run" / FILE).exists()  # so that the job script restarts the run


def wait_without_progress(minutes):
    from scale_mae.training.watchdog import Watchdog

    with Watchdog(minutes, 0) as watchdog:
        if not minutes:
            watchdog.report_progress()
        time.sleep(1.5)
    return "alive"


def make_progress_again(minutes):
    from scale_mae.training import watchdog

    watchdog.GRACE_SECONDS = 1.0
    with watchdog.Watchdog(minutes, 0) as active:
        active.report_progress()
        time.sleep(60 * minutes + 0.9)
        active.report_progress()
        time.sleep(0.5)
    return "alive"


def test_a_slow_process_does_not_end():
    assert run_ranks(1, make_progress_again, 0.01) == ["alive"]


@pytest.mark.parametrize("minutes", [0.01, 0])
def test_the_watchdog_does_nothing_before_the_first_step_or_with_0_minutes(minutes):
    assert run_ranks(1, wait_without_progress, minutes) == ["alive"]


def train_with_little_time(config, seconds):
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time() + seconds))
    return train(config)


def test_a_run_stops_before_the_time_limit_of_its_job(tmp_path):
    start = time.time()
    results = run_ranks(2, train_with_little_time, make_config(tmp_path, **LONG), 45)
    assert time.time() - start < 45
    assert [r.finished for r in results] == [False, False]
    assert results[0].stopped == f"stopped by the time limit after step {results[0].step}"
    assert results[0].step > 0
    assert [c.name for c in list_checkpoints(tmp_path)] == [f"step-{results[0].step:08d}"]
    assert (tmp_path / FILE).read_text() == results[0].stopped + "\n"


def test_a_stop_is_requested_lead_seconds_before_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    stop = StopRequest()
    assert stop.reason is None
    stop.lead_seconds = 20
    later = time.time() + 81
    monkeypatch.setattr(time, "time", lambda: later)
    assert stop.reason == "the time limit"


def test_the_lead_follows_recent_saves_and_never_exceeds_a_quarter_of_the_time(monkeypatch):
    estimator = StopTimeEstimator(checkpoint_bytes=10**10, save_seconds=[])
    assert estimator.lead_seconds == 2 * 50 + 30
    estimator = StopTimeEstimator(checkpoint_bytes=0, save_seconds=[7200.0])
    estimator.add_step(40)
    assert estimator.lead_seconds == 2 * 7200 + 2 * 40 + 30
    for _ in range(3):
        estimator.add_save(1.0)
    assert estimator.lead_seconds == 2 * 1 + 2 * 40 + 30
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    stop = StopRequest()
    stop.lead_seconds = 1e6  # the lead is at most a quarter of the time
    assert stop.reason is None


def train_and_signal(config, number):
    """Train. Rank 1 signals itself when it has taken three batches."""
    from scale_mae.training.batch_iterator import BatchIterator

    original, taken = BatchIterator.take, []

    def take(self):
        taken.append(1)
        if os.environ["RANK"] == "1" and len(taken) == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # some systems send it twice
        return original(self)

    BatchIterator.take = take
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores SIGHUP, and tests may run under nohup
    return train(config)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_ranks_after_one_save(tmp_path, number):
    results = run_ranks(2, train_and_signal, make_config(tmp_path, **LONG), number)
    assert len({r.step for r in results}) == 1
    assert 1 <= results[0].step < 10
    assert results[1].stopped == f"stopped by {number.name} after step {results[1].step}"
    assert results[0].stopped.startswith("stopped by a signal to another process")
    assert [c.name for c in list_checkpoints(tmp_path)] == [f"step-{results[0].step:08d}"]
    assert max(log(tmp_path, "loss")) == results[0].step


def signal_itself(number):
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    return number


def test_worker_processes_ignore_signals_to_stop():
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]
    with map_unordered(signal_itself, numbers, processes=1, max_pending=1) as results:
        assert list(results) == numbers
