"""Numbers gone bad: steps left out, spikes told from noise, runs that go back and leave out what led there."""

import contextlib
import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from bad_gradients import leave_out
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import BATCH, make_config
from test_trainer import log, train, train_until
from test_trainer import make_config as make_run

from scale_mae.config import ConfigError, UserError
from scale_mae.config.sections import RollbackConfig
from scale_mae.runs import history
from scale_mae.training import rollback
from scale_mae.training.anomaly_detector import Anomaly, AnomalyDetector


def test_where_a_run_went_back_to_again_with_nothing_saved_since_it_goes_further(tmp_path, monkeypatch):
    def latest_valid(run_dir, warn, *, rename_damaged, max_step):
        return next((tmp_path / f"step-{step:08d}" for step in (30, 15) if step <= max_step), None)

    monkeypatch.setattr(rollback, "latest_valid", latest_valid)
    controller = object.__new__(rollback.RollbackController)
    controller._run_dir, controller._log_message = tmp_path, [].append
    for past, chosen in (([], 30), ([30], 15), ([30, 15], 30), ([30, 15, 30], 15)):  # after 15, step 30 was saved anew
        controller._past = [{"to": to} for to in past]
        assert controller._choose_checkpoint(40).name == f"step-{chosen:08d}", past


# ---------------------------------------------------------------- steps with gradients that are not finite

LAYOUTS = [
    *(("fp32", f"zero{stage}") for stage in range(4)),
    *(("bf16", f"zero{stage}") for stage in range(4)),
    *itertools.product(("fp32", "bf16"), ("zero2_offload", "zero3_offload")),
]


@pytest.mark.parametrize(
    ("value", "micro", "clip"), [(float("nan"), 0, 0.5), pytest.param(float("inf"), 1, None, marks=pytest.mark.long)]
)
def test_a_bad_gradient_on_one_rank_changes_nothing_on_any(tmp_path, value, micro, clip):
    settings = [{"stage": s, "precision": p, "micro_batch": BATCH // 4, "clip": clip} for p, s in LAYOUTS]
    for told in run_ranks(2, leave_out, settings, value, micro, tmp_path):
        for setting, (unchanged, skipped, as_without, as_before, finite) in zip(settings, told, strict=True):
            assert unchanged, setting
            assert skipped == (0, 1, 1.0, None), setting
            assert as_without, setting
            assert as_before, setting
            assert finite, setting


def test_gradients_without_a_norm_are_refused(tmp_path):
    from scale_mae.engine.deepspeed_config import build_deepspeed_config

    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}')
    with pytest.raises(ConfigError, match="compute_grad_norm=false disables the check that skips steps"):
        build_deepspeed_config(make_config(stage=str(path)), 1)


# ---------------------------------------------------------------- spikes told from noise

HEAL = RollbackConfig(window=20, spike_threshold=10.0, max_spikes=3, max_skipped_steps=4)


def verdict_of(losses, config=HEAL, skipped=(), health=None):
    health = health or AnomalyDetector(config)
    for step, loss in enumerate(losses, 1):
        if verdict := health.add_step(step, loss, step in skipped):
            return verdict
    return None


def rollbacks(run_dir):
    return [event for event in history.read(run_dir) if event["event"] == "rollback"]


def noise(number, seed=0):
    return (1 + 0.01 * np.random.default_rng(seed).standard_normal(number)).tolist()


def test_some_losses_in_a_row_that_are_too_high_give_a_verdict_that_names_them():
    assert verdict_of([*noise(30), 2.0, 2.0, 2.0]) == Anomaly(31, 33, "loss spikes")
    assert verdict_of([*noise(30), 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, *noise(9)]) is None
    assert verdict_of([*noise(30), 2.0, 2.0, 1.0, 2.0, 2.0]) == Anomaly(31, 35, "loss spikes")  # one takes back one
    assert verdict_of([*noise(30), 0.1, 0.1, 0.1, 0.1]) is None  # only upward
    assert verdict_of([*noise(19), 2.0, 2.0, 2.0]) is None  # the window is not full
    assert verdict_of([*noise(30), 9.0, 9.0, 9.0], HEAL.model_copy(update={"spike_threshold": None})) is None


def test_steps_left_out_in_a_row_give_a_verdict_at_any_time():
    assert verdict_of(noise(9), skipped={3, 4, 5, 6}) == Anomaly(3, 6, "non-finite gradients")
    assert verdict_of(noise(9), skipped={2, 3, 4, 6, 7, 8}) is None
    assert verdict_of([1.0, math.nan, math.inf, 1e30, -math.inf, math.nan], skipped={4}) == Anomaly(
        2, 5, "non-finite gradients"
    )


def test_losses_that_do_not_differ_or_rise_slowly_are_no_spikes():
    assert verdict_of([1.0] * 30 + [1.005] * 30) is None
    assert verdict_of([1.0] * 30 + [1.5] * 3) == Anomaly(31, 33, "loss spikes")
    assert verdict_of(np.linspace(1, 3, 2000).tolist()) is None
    assert verdict_of([0.0] * 60) is None


@given(st.lists(st.sampled_from([1.0, 1.01, 0.99, 1.02, 5.0, math.nan]), min_size=22, max_size=60), st.integers(0, 59))
@settings(max_examples=200, deadline=None)
def test_a_resumed_run_comes_to_the_same_verdict(tail, cut):
    losses = noise(20) + tail
    whole, resumed = AnomalyDetector(HEAL), AnomalyDetector(HEAL)
    for step, loss in enumerate(losses, 1):
        if step == cut:
            resumed = AnomalyDetector(HEAL, json.loads(json.dumps(resumed.state())))
        verdict = whole.add_step(step, loss, False)
        assert resumed.add_step(step, loss, False) == verdict
        assert resumed.suspicious == whole.suspicious
        if verdict:
            break


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_like_that_of_a_clean_run_is_left_alone(seed):
    """Steep at first, then flat, with the noise of small batches, now and then a batch out of the ordinary."""
    generator = np.random.default_rng(seed)
    steps = np.arange(4000)
    curve = 0.5 + 0.6 * np.exp(-steps / 150) + 0.3 * np.exp(-steps / 1500)
    curve *= 1 + 0.05 * generator.standard_t(3, len(steps)).clip(-20, 20)
    assert verdict_of(curve.tolist(), RollbackConfig()) is None


# ---------------------------------------------------------------- runs that go back

MARK = 251  # every pixel of a poisoned image has this value
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
POISON = (26 * 16, 29 * 16)  # positions of steps 27 to 29
LEFT_OUT = [25 * 16, 29 * 16]  # with the step before them


def poison(value, first, stop):
    """Images at some positions are worth ``value`` times what others are."""
    import scale_mae.training.trainer
    from scale_mae.data.loader import Loader

    assemble, normalize = Loader._assemble, scale_mae.training.trainer.normalize

    def poisoned(self, staged, *pools):
        positions, (batch, changes) = staged.result().positions, assemble(self, staged, *pools)
        batch.images[torch.from_numpy((positions >= first) & (positions < stop))] = MARK
        return batch, changes

    def spoilt(images, *args):
        marked = (images == MARK).flatten(1).all(1)
        return torch.where(marked[:, None, None, None], value, 1.0) * normalize(images, *args)

    Loader._assemble, scale_mae.training.trainer.normalize = poisoned, spoilt


def train_on_poison(config, value, span=POISON):
    poison(value, *span)
    return train(config)


def train_without(config, left_out):
    """A run that never sees some positions, and has no poison."""
    import scale_mae.training.trainer
    from scale_mae.data.sample_plan import SamplePlan

    scale_mae.training.trainer.SamplePlan = lambda *args: SamplePlan(*args).skip(*left_out)
    return train(config)


def killed_as_it_goes_on(config, value):
    """The rollback is recorded and loaded; then all is over."""
    from scale_mae.training.trainer import Trainer

    poison(value, *POISON)
    go_back = Trainer._roll_back

    def then_die(self, verdict):
        go_back(self, verdict)
        os.kill(os.getpid(), signal.SIGKILL)

    Trainer._roll_back = then_die
    return train(config)


CASES = {
    "spike": (300.0, {"engine.deepspeed": "zero2"}),
    "nan": (
        math.nan,
        {"engine.deepspeed": "zero3", "train.precision": "bf16", "log.interval": 7, "checkpoint.interval": "12 steps"},
    ),
}


@pytest.mark.parametrize("case", ["spike", pytest.param("nan", marks=pytest.mark.long)])
def test_a_run_goes_back_and_leaves_out_what_led_astray_killed_or_not(tmp_path, case):
    value, setting = CASES[case]
    whole, killed, clean = (make_run(tmp_path / name, **RUN, **setting) for name in ("whole", "killed", "clean"))
    assert run_ranks(2, train_on_poison, whole, value)[0].finished
    (event,) = [e for e in history.read(tmp_path / "whole") if e["event"] == "rollback"]
    assert (event["number"], event["to"], event["skipped_steps"], event["positions"]) == (1, 24, [26, 29], LEFT_OUT)
    assert event["detected"] == (29 if case == "spike" else 35)  # seen at the next log step
    assert len(event["samples"]) == 20
    text = (tmp_path / "whole/log.txt").read_text()
    assert "in steps 27 to 29. The run skips 64 images from position 400 (" in text
    assert "Rollback 1 from step" in text
    # as if the run had never seen those images
    run_ranks(2, train_without, clean, LEFT_OUT)
    assert log(tmp_path / "whole", "loss", "lr", "grad_norm") == log(tmp_path / "clean", "loss", "lr", "grad_norm")
    assert log(tmp_path / "whole", "rollbacks", "skipped_steps")[36] == (1, 3 * (case == "nan"))
    smoothed, clean_smoothed = (log(tmp_path / name, "loss_smoothed")[36] for name in ("whole", "clean"))
    assert smoothed == pytest.approx(clean_smoothed, rel=0.05)  # what was taken back is not in it
    skipped = [step for e in history.read(tmp_path / "whole") if e["event"] == "steps_skipped" for step in e["steps"]]
    assert skipped == ([27, 28, 29] if case == "nan" else [])
    with pytest.raises(RankError):
        run_ranks(2, killed_as_it_goes_on, killed, value)
    assert max(log(tmp_path / "killed", "step")) < 36
    assert run_ranks(2, train_on_poison, killed, value)[0].finished
    assert log(tmp_path / "killed", "loss", "lr") == log(tmp_path / "whole", "loss", "lr")
    assert len([e for e in history.read(tmp_path / "killed") if e["event"] == "rollback"]) == 1
    for name in ("whole", "killed"):  # nothing of what was taken back
        curve = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload().Scalars("loss")
        assert [(e.step, e.value) for e in curve] == [(s, pytest.approx(v)) for s, (v,) in log(tmp_path / name, "loss").items()]


def command(run_dir, value, span, *words):
    """Exit code and error lines of the console command on poisoned data."""
    from scale_mae.cli import main

    poison(value, *span)
    torch.set_num_threads(1)
    config = make_run(run_dir, **RUN, **{"train.micro_batch": 16})
    path = run_dir.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    told = run_dir.with_suffix(".err")
    with open(told, "w") as file, contextlib.redirect_stderr(file):
        code = main(["pretrain", str(path), *words])
    return code, [line for line in told.read_text().splitlines() if line.startswith("scale-mae: error:")]


def test_a_run_that_went_back_often_enough_stops_with_one_line(tmp_path):
    """From one position on everything is bad: it goes back again, then further, then to what it saved since, then no more."""
    code, lines = run_ranks(1, command, tmp_path / "run", math.nan, (POISON[0], 10**9))[0]
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
    assert (last["positions"], len(last["samples"])) == ([368, 608], 20)  # what was left out before lies between
    assert last["reason"] == "non-finite gradients"
    aside = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("damaged-*"))
    assert [name[:21] for name in aside] == ["damaged-step-00000024"]  # the first one, which was no better
    assert log(tmp_path / "run", "checkpoint_step")[22] == (20,)  # not the one that was turned away from


def test_a_run_without_a_checkpoint_to_go_back_to_says_so(tmp_path):
    code, lines = run_ranks(1, command, tmp_path / "run", math.nan, POISON, "checkpoint.interval=1000 steps")[0]
    assert code == 2
    assert "there is no earlier checkpoint to roll back to" in lines[0]


def test_a_checkpoint_waits_until_it_is_known_what_its_steps_are_worth(tmp_path):
    span = (26 * 16, 28 * 16)  # two high steps, the second of which is one to save; three would be too many
    config = make_run(tmp_path, **RUN | {"train.duration": "30 steps"}, **{"train.micro_batch": 8})
    assert run_ranks(2, train_on_poison, config, 30.0, span)[0].finished
    saved = [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert "step-00000028" not in saved
    assert "step-00000024" in saved


def train_to_a_signal(config, value, step):
    poison(value, *POISON)
    return train_until(config, step)


def test_a_signal_among_bad_steps_saves_them_aside_of_what_is_good_and_the_resumed_run_goes_back(tmp_path):
    config = make_run(tmp_path, **RUN | {"checkpoint.keep_latest": 1}, **{"train.micro_batch": 8})
    (result, _) = run_ranks(2, train_to_a_signal, config, 300.0, 26)
    assert result.step == 28  # two steps of three
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000024", "step-00000028"]
    assert run_ranks(2, train_on_poison, config, 300.0)[0].finished
    (event,) = rollbacks(tmp_path)
    assert (event["to"], event["skipped_steps"], event["detected"]) == (24, [26, 29], 29)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("*step-*"))] == ["damaged-step-00000028", "step-00000036"]


@pytest.mark.long
def test_a_clean_run_gives_no_reason_for_suspicion(tmp_path):
    setting = {"train.duration": "300 steps", "train.micro_batch": 16, "checkpoint.interval": "150 steps"}
    assert run_ranks(1, train, make_run(tmp_path, **setting))[0].finished
    losses = [loss for (loss,) in log(tmp_path, "loss").values()]
    assert len(losses) == 300
    health = AnomalyDetector(RollbackConfig(window=50, spike_threshold=RollbackConfig().spike_threshold / 2))
    for step, loss in enumerate(losses, 1):
        health.add_step(step, loss, False)
        assert not health.suspicious, step


def test_a_run_begun_anew_has_noread_rollbacks(tmp_path):
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
