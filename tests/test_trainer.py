"""Complete runs on several ranks: resume, signals, non-finite values, failed saves, and wrong settings."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from images import demo_index, make_folders
from ranks import RankError, collect, run_ranks, start_ranks

from scale_mae.config import load_config
from scale_mae.metrics.sinks import Log


def make_config(run_dir, **overrides):
    setting = {"run.dir": str(run_dir), "data.source": demo_index(), "checkpoint.interval": "4 steps"}
    return load_config("debug", setting | overrides)


def train(config):
    from scale_mae import pretrain

    torch.set_num_threads(1)
    return pretrain(config)


def train_until(config, step):
    """Train. This rank signals itself when ``step`` is logged."""
    original = Log.write_metrics

    def metrics(self, values):
        original(self, values)
        if values["step"] >= step:
            os.kill(os.getpid(), signal.SIGTERM)

    Log.write_metrics = metrics  # each rank is a separate process
    return train(config)


def log(run_dir, *keys):
    """Return values of ``log.jsonl`` by step. The last line of a step counts."""
    lines = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: tuple(line[key] for key in keys) for line in lines}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of an uninterrupted run on two ranks; its losses, learning rates and gradient norms by step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_ranks(2, train, make_config(folder))[0]
    assert result.finished
    assert result.step == 10
    return folder, log(folder, "loss", "lr", "grad_norm")


@pytest.mark.parametrize("ranks", [2])
def test_a_run_that_resumes_twice_in_one_epoch_equals_an_uninterrupted_run_bit_for_bit(undisturbed, tmp_path, ranks):
    folder, expected = undisturbed
    config = make_config(tmp_path)
    for step in (3, 6):
        # only rank 0 logs, so only rank 0 signals itself, but all ranks must stop
        results = run_ranks(ranks, train_until, config, step)
        assert [r.finished for r in results] == [False] * ranks
        assert len({r.step for r in results}) == 1
        assert step <= results[0].step <= step + 2
        assert (tmp_path / "checkpoints" / f"step-{results[0].step:08d}" / "manifest.json").exists()
    assert run_ranks(ranks, train, config)[0].finished
    assert log(tmp_path, "loss", "lr", "grad_norm") == expected
    assert set(expected) == set(range(1, 11))
    assert weights(tmp_path, 10).keys() == weights(folder, 10).keys()
    for name, tensor in weights(folder, 10).items():
        assert torch.equal(weights(tmp_path, 10)[name], tensor), name


def weights(run_dir, step):
    from scale_mae.checkpoint.zero_reader import ZeroReader

    return dict(ZeroReader(Path(run_dir) / "checkpoints" / f"step-{step:08d}" / "deepspeed"))


@pytest.mark.parametrize(("stage", "precision"), [("zero0", "fp32"), ("zero1", "bf16"), ("zero3", "fp32"), ("zero3", "bf16")])
def test_resume_is_exact_at_other_stages_and_precisions(tmp_path, stage, precision):
    setting = {"engine.deepspeed": stage, "train.precision": precision}
    straight, resumed = make_config(tmp_path / "a", **setting), make_config(tmp_path / "b", **setting)
    run_ranks(2, train, straight)
    run_ranks(2, train_until, resumed, 5)
    run_ranks(2, train, resumed)
    assert log(tmp_path / "b", "loss", "lr") == log(tmp_path / "a", "loss", "lr")


def test_world_size_and_accumulation_do_not_change_the_losses(undisturbed, tmp_path):
    _, expected = undisturbed
    run_ranks(1, train, make_config(tmp_path, **{"train.micro_batch": 16}))
    for step, (loss, lr, _) in log(tmp_path, "loss", "lr", "grad_norm").items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert lr == expected[step][1]


def test_log_lines_contain_the_documented_values(undisturbed):
    folder, _ = undisturbed
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] * 16 / 10_000)
        assert line["images"] == line["step"] * 16
        assert line["images_per_s"] == pytest.approx(16 / line["step_time_s"])
        assert 0 <= line["data_loading_s"] <= line["step_time_s"] * 1.5
        assert line["tflops_per_rank"] > 0
        assert line["peak_memory_gib"] > 0
        assert line["loss_scale"] == 1
    assert (folder / "log.txt").read_text().count("\n") >= 13
    assert "Saved checkpoint" in (folder / "log.txt").read_text()


def test_a_finished_run_that_starts_again_saves_nothing(undisturbed):
    folder, _ = undisturbed
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert run_ranks(2, train, make_config(folder))[0].finished
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("target", [0, 1])
def test_a_signal_to_any_rank_stops_all_ranks_after_one_save(tmp_path, number, target):
    config = make_config(tmp_path, **{"train.duration": "100000 steps", "checkpoint.interval": "100000 steps"})
    processes, pipes = start_ranks(2, train, config)
    deadline = time.monotonic() + 120
    while len(log(tmp_path, "loss") if (tmp_path / "log.jsonl").exists() else ()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[target].pid, number)
    results = collect(processes, pipes, timeout=60)
    assert [r.finished for r in results] == [False, False]
    saved = [p.name for p in (tmp_path / "checkpoints").glob("step-*")]
    assert saved == [f"step-{results[0].step:08d}"]
    assert [p.exitcode for p in processes] == [0, 0]


def train_with_nan(config, step):
    """Train. The loss of the second rank is NaN in one step."""
    from scale_mae.engine.deepspeed import Engine

    original, calls = Engine.forward_backward, []

    def forward_backward(self, images, noise):
        calls.append(1)
        return original(self, images * float("nan") if len(calls) == step and self.world.rank == 1 else images, noise)

    Engine.forward_backward = forward_backward
    return train(config)


@pytest.mark.parametrize("log_every", [1, 20])
def test_a_step_with_a_non_finite_loss_on_one_rank_is_skipped_and_the_run_continues(tmp_path, log_every):
    config = make_config(tmp_path, **{"log.interval": log_every, "train.micro_batch": 8})
    assert run_ranks(2, train_with_nan, config, 6)[0].finished
    lines = log(tmp_path, "loss", "grad_norm", "skipped_steps", "rollbacks")
    assert lines[10][2:] == (1, 0)
    assert math.isfinite(lines[10][0])
    if log_every == 1:
        assert lines[6][0] is None
        assert lines[6][1] is None
        assert [lines[step][2] for step in (5, 6)] == [0, 1]


def train_with_bad_weights(config, bad=4):
    """Train. A weight of the second rank becomes infinite after the step ``bad``."""
    from scale_mae.engine.deepspeed import Engine

    original, steps = Engine.step, []

    def step(self, lr, *, return_norm=False):
        norm = original(self, lr, return_norm=return_norm)
        steps.append(1)
        if len(steps) == bad and self.world.rank == 1:
            self.model.cls_token.data[..., 0] = float("inf")
        return norm

    Engine.step = step
    return train(config)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(RankError, match="weights are not finite after step 4") as caught:
        run_ranks(2, train_with_bad_weights, make_config(tmp_path, **{"train.micro_batch": 8}))
    assert caught.value.kinds == ["NonFiniteError"] * 2
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def make_the_second_save_fail(rank):
    """Make the second save of each file fail on one rank."""
    real, saves = torch.save, Counter()

    def full(state, path, *args, **kwargs):
        saves[Path(path).name] += 1
        if os.environ["RANK"] == str(rank) and saves[Path(path).name] == 2:
            raise OSError(28, "No space left on device")
        return real(state, path, *args, **kwargs)

    torch.save = full


def train_on_a_full_disk(config, rank):
    make_the_second_save_fail(rank)
    return train(config)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("local", [False, True])
def test_a_save_that_fails_on_one_rank_does_not_end_the_run(undisturbed, tmp_path, rank, local):
    setting = {"checkpoint.local_dir": str(tmp_path / "local")} if local else {}
    config = make_config(tmp_path / "run", **setting)
    assert run_ranks(2, train_on_a_full_disk, config, rank, timeout=60)[0].finished
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000004", "step-00000010"]
    assert log(tmp_path / "run", "loss", "lr", "grad_norm") == undisturbed[1]
    failures = log(tmp_path / "run", "checkpoint_failures")
    assert failures[4] == (0,)
    assert failures[10] == (1,)
    assert "Checkpoint not saved (1 so far)" in (tmp_path / "run/log.txt").read_text()


def train_on_a_full_disk_with_bad_weights(config):
    make_the_second_save_fail(1)
    return train_with_bad_weights(config, 8)


def test_the_error_about_weights_names_the_last_checkpoint_that_was_saved(tmp_path):
    setting = {"train.micro_batch": 8, "checkpoint.interval": "2 steps"}
    with pytest.raises(RankError, match=r"weights are not finite after step 8; .*last checkpoint: .*step-00000006\)"):
        run_ranks(2, train_on_a_full_disk_with_bad_weights, make_config(tmp_path, **setting))
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000002", "step-00000006"]


@pytest.mark.parametrize("local", [False, True])
def test_a_final_save_that_fails_is_an_error_and_keeps_the_previous_checkpoint(tmp_path, local):
    setting = {"checkpoint.local_dir": str(tmp_path / "local")} if local else {}
    config = make_config(tmp_path / "run", **{"train.duration": "8 steps"}, **setting)
    with pytest.raises(RankError, match=r"not written \(.*No space left") as caught:
        run_ranks(2, train_on_a_full_disk, config, 1, timeout=60)
    assert caught.value.kinds == ["CheckpointError"] * 2
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000004"]
    assert run_ranks(2, train, config)[0].finished


def train_twice(one, two):
    return train(one).step, train(two).step, {"RANK", "WORLD_SIZE"} & os.environ.keys()


def test_a_process_can_train_twice(tmp_path):
    one, two = make_config(tmp_path / "1"), make_config(tmp_path / "2")
    assert run_ranks(1, train_twice, one, two, timeout=60)[0][:2] == (10, 10)
    assert log(tmp_path / "1", "loss") == log(tmp_path / "2", "loss")


TWICE = """
import sys
import scale_mae
for folder in sys.argv[1:]:
    scale_mae.pretrain("debug", run={"dir": folder}, data={"source": "demo:val"}, train={"duration": "3 steps"})
"""


def test_processes_of_one_torchrun_can_train_twice(tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, str(tmp_path / "twice.py"), str(tmp_path / "1"), str(tmp_path / "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert log(tmp_path / "1", "loss") == log(tmp_path / "2", "loss")


def test_a_run_that_did_not_start_does_not_bind_its_directory_to_its_config(tmp_path):
    with pytest.raises(RankError, match="no such folder"):
        run_ranks(1, train, make_config(tmp_path, **{"data.source": str(tmp_path / "typo")}))
    data = make_folders(tmp_path / "data", per_class=5)
    assert run_ranks(1, train, make_config(tmp_path, **{"data.source": str(data)}))[0].finished
    with pytest.raises(RankError, match="contains a run with another configuration"):
        run_ranks(1, train, make_config(tmp_path))


def test_class_folders_train_with_accumulation(tmp_path):
    data = make_folders(tmp_path / "data", per_class=5)
    result = run_ranks(2, train, make_config(tmp_path / "run", **{"data.source": str(data), "train.micro_batch": 2}))[0]
    assert result.finished


def test_a_run_resumes_from_the_newest_valid_checkpoint(undisturbed, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    newest = folder / "checkpoints" / "step-00000010" / "deepspeed"
    damaged = next(newest.glob("*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (folder / "log.jsonl").unlink()
    assert run_ranks(2, train, make_config(folder))[0].finished
    assert log(folder, "loss", "lr", "grad_norm") == {s: v for s, v in undisturbed[1].items() if s > 8}
    text = (folder / "log.txt").read_text()
    assert "Skipped a damaged checkpoint" in text
    assert "Resumed from" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train.global_batch": 32}, r"contains a run with another configuration \(train\.global_batch: 16 -> 32\)"),
        ({"model.mask_ratio": 0.5, "run.seed": 3}, "another configuration .* and 1 more"),
    ],
)
def test_a_run_directory_of_another_config_is_an_error_on_all_ranks(undisturbed, changed, message):
    with pytest.raises(RankError, match=message) as caught:
        run_ranks(2, train, make_config(undisturbed[0], **changed))
    assert caught.value.kinds == ["UserError"] * 2


def test_settings_that_do_not_change_the_computation_may_change_on_resume(undisturbed):
    changed = {
        "log.interval": 7,
        "checkpoint.keep_latest": 9,
        "checkpoint.interval": "3 steps",
        "data.threads": 1,
        "data.prefetch": 2,
    }
    assert run_ranks(2, train, make_config(undisturbed[0], **changed))[0].finished


def test_a_run_resumes_with_other_world_size_stage_micro_batch_and_activation_checkpointing(undisturbed, tmp_path):
    _, expected = undisturbed
    assert not run_ranks(2, train_until, make_config(tmp_path), 3)[0].finished
    changed = {
        "engine.deepspeed": "zero3",
        "train.micro_batch": 8,
        "train.activation_checkpointing": "every_k",
        "train.activation_checkpointing_every": 3,
    }
    assert not run_ranks(1, train_until, make_config(tmp_path, **changed), 6)[0].finished
    assert run_ranks(4, train, make_config(tmp_path, **{"engine.deepspeed": "zero1", "train.micro_batch": 2}))[0].finished
    got = log(tmp_path, "loss", "lr", "grad_norm")
    assert got.keys() == expected.keys()
    for step, (loss, lr, norm) in got.items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert lr == expected[step][1]
        assert norm == pytest.approx(expected[step][2], rel=1e-3)


def test_a_global_batch_that_is_not_divisible_is_an_error(tmp_path):
    with pytest.raises(RankError, match=r"global_batch=16 is not divisible by train\.micro_batch=4 x 3 processes = 12"):
        run_ranks(3, train, make_config(tmp_path))


def test_a_run_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankError, match=r"cannot be written .*Choose another folder") as caught:
        run_ranks(2, train, make_config(tmp_path / "file" / "run"))
    assert caught.value.kinds == ["UserError"] * 2


def test_losses_with_compiled_blocks_are_the_same(undisturbed, tmp_path):
    run_ranks(2, train, make_config(tmp_path, **{"engine.compile": True}), timeout=600)
    for step, (loss,) in log(tmp_path, "loss").items():
        assert loss == pytest.approx(undisturbed[1][step][0], rel=1e-4)


def count_waits_of_a_run(config):
    """Return how often the host reads a tensor value during a run."""
    from test_engine import WaitCounter

    with WaitCounter() as waits:
        train(config)
    return waits.count


def test_the_host_reads_no_device_tensor_between_log_steps(tmp_path):
    def run(steps):
        setting = {"train.precision": "bf16", "log.interval": 1000, "train.duration": f"{steps} steps", "train.micro_batch": 16}
        return run_ranks(
            1, count_waits_of_a_run, make_config(tmp_path / str(steps), **setting, **{"checkpoint.interval": "1000 steps"})
        )[0]

    reads_per_step = 1  # the vote, a byte in host memory
    assert run(30) - run(10) == 20 * reads_per_step
