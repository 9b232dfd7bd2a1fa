"""Skipped steps, the detection of loss spikes, and rollback to a checkpoint."""

import contextlib
import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from bad_gradients import train_with_a_bad_step
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import BATCH, make_config
from test_trainer import log, train, train_until
from test_trainer import make_config as make_run

from scale_mae.config import ConfigError, UserError
from scale_mae.config.schema import RollbackConfig
from scale_mae.runs import history
from scale_mae.training import rollback
from scale_mae.training.anomaly_detector import Anomaly, AnomalyDetector


def test_a_second_rollback_to_the_same_checkpoint_returns_to_the_one_before(tmp_path, monkeypatch):
    def find_latest_valid(run_dir, warn, *, rename_damaged, max_step):
        return next((tmp_path / f"step-{step:08d}" for step in (30, 15) if step <= max_step), None)

    monkeypatch.setattr(rollback, "find_latest_valid", find_latest_valid)
    controller = object.__new__(rollback.RollbackController)
    controller._run_dir, controller._log_message = tmp_path, [].append
    for past, chosen in (
        ([], 30),
        ([30], 15),
        ([30, 15], 30),
        ([30, 15, 30], 15),
    ):  # after the rollback to 15, step 30 was saved again
        controller._past = [{"to": step} for step in past]
        assert controller._choose_checkpoint(40).name == f"step-{chosen:08d}", past


# ---------------------------------------------------------------- steps with gradients that are not finite

LAYOUTS = [
    *(("fp32", f"zero{stage}") for stage in range(4)),
    *(("bf16", f"zero{stage}") for stage in range(4)),
    *itertools.product(("fp32", "bf16"), ("zero2_offload", "zero3_offload")),
]


@pytest.mark.parametrize(
    ("factor", "micro", "clip"), [(float("nan"), 0, 0.5), pytest.param(float("inf"), 1, None, marks=pytest.mark.long)]
)
def test_a_step_with_non_finite_gradients_on_one_rank_changes_nothing_on_any_rank(tmp_path, factor, micro, clip):
    settings = [{"stage": s, "precision": p, "micro_batch": BATCH // 4, "clip": clip} for p, s in LAYOUTS]
    for results in run_ranks(2, train_with_a_bad_step, settings, factor, micro, tmp_path):
        for setting, (unchanged, skipped, as_without, as_without_after_load, finite) in zip(settings, results, strict=True):
            assert unchanged, setting
            assert skipped == (0, 1, 1.0, None), setting
            assert as_without, setting
            assert as_without_after_load, setting
            assert finite, setting


def test_a_deepspeed_file_must_not_disable_the_gradient_norm(tmp_path):
    from scale_mae.engine.deepspeed_config import build_deepspeed_config

    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}')
    with pytest.raises(ConfigError, match="compute_grad_norm=false disables the check that skips steps"):
        build_deepspeed_config(make_config(stage=str(path)), 1)


# ---------------------------------------------------------------- anomaly detection

CONFIG = RollbackConfig(window=20, spike_threshold=10.0, max_spikes=3, max_skipped_steps=4)


def find_anomaly(losses, config=CONFIG, skipped=()):
    detector = AnomalyDetector(config)
    for step, loss in enumerate(losses, 1):
        if anomaly := detector.add_step(step, loss, step in skipped):
            return anomaly
    return None


def rollbacks(run_dir):
    return [event for event in history.read(run_dir) if event["event"] == "rollback"]


def noise(number, seed=0):
    return (1 + 0.01 * np.random.default_rng(seed).standard_normal(number)).tolist()


def test_several_spikes_are_an_anomaly_that_names_their_steps():
    assert find_anomaly([*noise(30), 2.0, 2.0, 2.0]) == Anomaly(31, 33, "loss spikes")
    assert find_anomaly([*noise(30), 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, *noise(9)]) is None
    assert find_anomaly([*noise(30), 2.0, 2.0, 1.0, 2.0, 2.0]) == Anomaly(
        31, 35, "loss spikes"
    )  # a good step cancels one spike
    assert find_anomaly([*noise(30), 0.1, 0.1, 0.1, 0.1]) is None  # low losses are no spikes
    assert find_anomaly([*noise(19), 2.0, 2.0, 2.0]) is None  # the window is not full
    assert find_anomaly([*noise(30), 9.0, 9.0, 9.0], CONFIG.model_copy(update={"spike_threshold": None})) is None


def test_consecutive_skipped_steps_are_an_anomaly_at_any_time():
    assert find_anomaly(noise(9), skipped={3, 4, 5, 6}) == Anomaly(3, 6, "non-finite gradients")
    assert find_anomaly(noise(9), skipped={2, 3, 4, 6, 7, 8}) is None
    assert find_anomaly([1.0, math.nan, math.inf, 1e30, -math.inf, math.nan], skipped={4}) == Anomaly(
        2, 5, "non-finite gradients"
    )


def test_constant_and_slowly_rising_losses_are_no_spikes():
    assert find_anomaly([1.0] * 30 + [1.005] * 30) is None
    assert find_anomaly([1.0] * 30 + [1.5] * 3) == Anomaly(31, 33, "loss spikes")
    assert find_anomaly(np.linspace(1, 3, 2000).tolist()) is None
    assert find_anomaly([0.0] * 60) is None


@given(st.lists(st.sampled_from([1.0, 1.01, 0.99, 1.02, 5.0, math.nan]), min_size=22, max_size=60), st.integers(0, 59))
@settings(max_examples=200, deadline=None)
def test_a_resumed_run_finds_the_same_anomaly(tail, cut):
    losses = noise(20) + tail
    uninterrupted, resumed = AnomalyDetector(CONFIG), AnomalyDetector(CONFIG)
    for step, loss in enumerate(losses, 1):
        if step == cut:
            resumed = AnomalyDetector(CONFIG, json.loads(json.dumps(resumed.state())))
        anomaly = uninterrupted.add_step(step, loss, False)
        assert resumed.add_step(step, loss, False) == anomaly
        assert resumed.suspicious == uninterrupted.suspicious
        if anomaly:
            break


@pytest.mark.parametrize("seed", range(5))
def test_a_normal_loss_curve_has_no_anomaly(seed):
    """The curve is steep at first, then flat, with the noise of small batches and occasional outliers."""
    generator = np.random.default_rng(seed)
    steps = np.arange(4000)
    curve = 0.5 + 0.6 * np.exp(-steps / 150) + 0.3 * np.exp(-steps / 1500)
    curve *= 1 + 0.05 * generator.standard_t(3, len(steps)).clip(-20, 20)
    assert find_anomaly(curve.tolist(), RollbackConfig()) is None


# ---------------------------------------------------------------- rollback

MARK = 251  # the value of every pixel of a bad image
RUN = {
    "train.duration": "36 steps",
    "rollback.window": 20,
    "rollback.max_spikes": 3,
    "rollback.max_skipped_steps": 3,
    "model.target": "pixel",
    "checkpoint.keep_latest": 20,
    "data.threads": 1,
    "log.trackers": ["tensorboard"],
}
BAD_POSITIONS = (26 * 16, 29 * 16)  # of steps 27 to 29
SKIPPED_POSITIONS = [25 * 16, 29 * 16]  # the step before them is skipped as well


def make_images_bad(factor, first, stop):
    """Multiply the images at some positions by ``factor``."""
    import scale_mae.training.trainer
    from scale_mae.data.loader import Loader

    assemble, normalize = Loader._assemble, scale_mae.training.trainer.normalize

    def assemble_and_mark(self, staged, *pools):
        positions, (batch, changes) = staged.result().positions, assemble(self, staged, *pools)
        batch.images[torch.from_numpy((positions >= first) & (positions < stop))] = MARK
        return batch, changes

    def normalize_and_multiply(images, *args):
        marked = (images == MARK).flatten(1).all(1)
        return torch.where(marked[:, None, None, None], factor, 1.0) * normalize(images, *args)

    Loader._assemble, scale_mae.training.trainer.normalize = assemble_and_mark, normalize_and_multiply


def train_on_bad_images(config, factor, positions=BAD_POSITIONS):
    make_images_bad(factor, *positions)
    return train(config)


def train_without(config, positions):
    """Train without bad images and without some positions."""
    import scale_mae.training.trainer
    from scale_mae.data.sample_plan import SamplePlan

    scale_mae.training.trainer.SamplePlan = lambda *args: SamplePlan(*args).skip(*positions)
    return train(config)


def train_until_killed_after_a_rollback(config, factor):
    """Train until the run has rolled back, and kill it before its next step."""
    from scale_mae.training.trainer import Trainer

    make_images_bad(factor, *BAD_POSITIONS)
    roll_back = Trainer._roll_back

    def roll_back_and_die(self, anomaly):
        roll_back(self, anomaly)
        os.kill(os.getpid(), signal.SIGKILL)

    Trainer._roll_back = roll_back_and_die
    return train(config)


CASES = {
    "spike": (300.0, {"engine.deepspeed": "zero2"}),
    "nan": (
        math.nan,
        {"engine.deepspeed": "zero3", "train.precision": "bf16", "log.interval": 7, "checkpoint.interval": "12 steps"},
    ),
}


@pytest.mark.parametrize("case", ["spike", pytest.param("nan", marks=pytest.mark.long)])
def test_a_run_rolls_back_and_skips_the_bad_images_also_if_it_is_killed_then(tmp_path, case):
    factor, setting = CASES[case]
    bad, killed, clean = (make_run(tmp_path / name, **RUN, **setting) for name in ("bad", "killed", "clean"))
    assert run_ranks(2, train_on_bad_images, bad, factor)[0].finished
    (event,) = [e for e in history.read(tmp_path / "bad") if e["event"] == "rollback"]
    assert (event["number"], event["to"], event["skipped_steps"], event["positions"]) == (1, 24, [26, 29], SKIPPED_POSITIONS)
    assert event["detected"] == (29 if case == "spike" else 35)  # at the next log step
    assert len(event["samples"]) == 20
    text = (tmp_path / "bad/log.txt").read_text()
    assert "in steps 27 to 29. The run skips 64 images from position 400 (" in text
    assert "Rollback 1 from step" in text
    # the run equals one that never reads these images
    run_ranks(2, train_without, clean, SKIPPED_POSITIONS)
    assert log(tmp_path / "bad", "loss", "lr", "grad_norm") == log(tmp_path / "clean", "loss", "lr", "grad_norm")
    assert log(tmp_path / "bad", "rollbacks", "skipped_steps")[36] == (1, 3 * (case == "nan"))
    smoothed, clean_smoothed = (log(tmp_path / name, "loss_smoothed")[36] for name in ("bad", "clean"))
    assert smoothed == pytest.approx(clean_smoothed, rel=0.05)  # without the losses before the rollback
    skipped = [step for e in history.read(tmp_path / "bad") if e["event"] == "steps_skipped" for step in e["steps"]]
    assert skipped == ([27, 28, 29] if case == "nan" else [])
    with pytest.raises(RankError):
        run_ranks(2, train_until_killed_after_a_rollback, killed, factor)
    assert max(log(tmp_path / "killed", "step")) < 36
    assert run_ranks(2, train_on_bad_images, killed, factor)[0].finished
    assert log(tmp_path / "killed", "loss", "lr") == log(tmp_path / "bad", "loss", "lr")
    assert len([e for e in history.read(tmp_path / "killed") if e["event"] == "rollback"]) == 1
    for name in ("bad", "killed"):  # the steps before the rollback are gone
        curve = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload().Scalars("loss")
        assert [(e.step, e.value) for e in curve] == [(s, pytest.approx(v)) for s, (v,) in log(tmp_path / name, "loss").items()]


def run_command(run_dir, factor, positions, *overrides):
    """Run ``scale-mae pretrain`` on bad images. Return its exit code and its error lines."""
    from scale_mae.cli import main

    make_images_bad(factor, *positions)
    torch.set_num_threads(1)
    config = make_run(run_dir, **RUN, **{"train.micro_batch": 16})
    path = run_dir.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    stderr = run_dir.with_suffix(".err")
    with open(stderr, "w") as file, contextlib.redirect_stderr(file):
        code = main(["pretrain", str(path), *overrides])
    return code, [line for line in stderr.read_text().splitlines() if line.startswith("scale-mae: error:")]


def test_a_run_that_exceeds_max_rollbacks_stops_with_one_error_line(tmp_path):
    """All images from one position on are bad.

    The run rolls back to step 24, then to the checkpoint before it, then to a new checkpoint of step 24, then it stops.
    """
    code, lines = run_ranks(1, run_command, tmp_path / "run", math.nan, (BAD_POSITIONS[0], 10**9))[0]
    assert code == 2
    assert len(lines) == 1
    assert "non-finite gradients in steps 25 to 27, and" in lines[0]
    assert "rollback.max_rollbacks=3 allows no further rollback" in lines[0]
    assert "64 images from position 368 (" in lines[0]
    assert "history.jsonl" in lines[0]
    assert (tmp_path / "run/exit_status").read_text().startswith("failed: non-finite gradients in steps 25 to 27")
    events = [(e["number"], e["to"], e["skipped_steps"]) for e in rollbacks(tmp_path / "run")]
    assert events == [(1, 24, [26, 29]), (2, 20, [25, 28]), (3, 24, [25, 27])]
    (last,) = [e for e in history.read(tmp_path / "run") if e["event"] == "rollback_failed"]
    assert (last["positions"], len(last["samples"])) == ([368, 608], 20)  # the positions that were skipped before lie between
    assert last["reason"] == "non-finite gradients"
    renamed = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("damaged-*"))
    assert [name[:21] for name in renamed] == ["damaged-step-00000024"]  # the first checkpoint of step 24
    assert log(tmp_path / "run", "checkpoint_step")[22] == (20,)  # not the renamed one


def test_an_anomaly_before_the_first_checkpoint_is_an_error(tmp_path):
    code, lines = run_ranks(1, run_command, tmp_path / "run", math.nan, BAD_POSITIONS, "checkpoint.interval=1000 steps")[0]
    assert code == 2
    assert "there is no earlier checkpoint to roll back to" in lines[0]


def test_no_checkpoint_is_saved_while_the_last_steps_are_suspicious(tmp_path):
    positions = (26 * 16, 28 * 16)  # two spikes; a checkpoint is due after the second, and three would be an anomaly
    config = make_run(tmp_path, **RUN | {"train.duration": "30 steps"}, **{"train.micro_batch": 8})
    assert run_ranks(2, train_on_bad_images, config, 30.0, positions)[0].finished
    saved = [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert "step-00000028" not in saved
    assert "step-00000024" in saved


def train_on_bad_images_until(config, factor, step):
    make_images_bad(factor, *BAD_POSITIONS)
    return train_until(config, step)


def test_a_checkpoint_of_suspicious_steps_deletes_no_good_one_and_the_resumed_run_rolls_back(tmp_path):
    config = make_run(tmp_path, **RUN | {"checkpoint.keep_latest": 1}, **{"train.micro_batch": 8})
    (result, _) = run_ranks(2, train_on_bad_images_until, config, 300.0, 26)
    assert result.step == 28  # two of three spikes
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000024", "step-00000028"]
    assert run_ranks(2, train_on_bad_images, config, 300.0)[0].finished
    (event,) = rollbacks(tmp_path)
    assert (event["to"], event["skipped_steps"], event["detected"]) == (24, [26, 29], 29)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("*step-*"))] == ["damaged-step-00000028", "step-00000036"]


@pytest.mark.long
def test_no_step_of_a_clean_run_is_suspicious(tmp_path):
    setting = {"train.duration": "300 steps", "train.micro_batch": 16, "checkpoint.interval": "150 steps"}
    assert run_ranks(1, train, make_run(tmp_path, **setting))[0].finished
    losses = [loss for (loss,) in log(tmp_path, "loss").values()]
    assert len(losses) == 300
    detector = AnomalyDetector(RollbackConfig(window=50, spike_threshold=RollbackConfig().spike_threshold / 2))
    for step, loss in enumerate(losses, 1):
        detector.add_step(step, loss, False)
        assert not detector.suspicious, step


def test_rollbacks_before_the_last_start_at_step_0_do_not_count(tmp_path):
    from scale_mae.training.rollback import read_rollbacks

    history.append(tmp_path, "rollback", number=1, to=4, positions=[64, 96])
    assert len(read_rollbacks(tmp_path)) == 1
    history.append(tmp_path, "start", step=4)
    assert len(read_rollbacks(tmp_path)) == 1
    history.append(tmp_path, "start", step=0)
    assert read_rollbacks(tmp_path) == []
    history.append(tmp_path, "rollback", number=1, to=4)
    with pytest.raises(UserError, match="does not contain the positions that it skipped"):
        read_rollbacks(tmp_path)
