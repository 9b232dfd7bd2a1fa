"""Fine-tuning and linear probing: published recipes, outputs of the reference, exact resume, and exact evaluation."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from torch import nn

import scale_mae
from scale_mae.checkpoint.paths import DEEPSPEED_TAG, list_checkpoints
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.cli import main
from scale_mae.config import ConfigError, UserError, load_config
from scale_mae.data.index_builder import open_index
from scale_mae.evaluation.models import load_classifier
from scale_mae.metrics.counters import Counters
from scale_mae.model.classifier import Classifier, LinearProbes
from scale_mae.model.sizes import SIZES, EncoderSize
from scale_mae.report.run_record import read_run_record
from scale_mae.report.sections import configuration, evaluations
from scale_mae.training import classification
from scale_mae.weights.convert import convert
from scale_mae.weights.metadata import build_metadata
from scale_mae.weights.provenance import provenance_from_metadata
from scale_mae.weights.weight_import import read_weights

TINY = EncoderSize(width=32, depth=3, heads=4, patch_size=8)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("size", "base_lr", "decay", "drop_path", "epochs"),
    [("base", 5e-4, 0.65, 0.1, 100), ("large", 1e-3, 0.75, 0.2, 50), ("huge", 1e-3, 0.75, 0.3, 50)],
)
def test_fine_tuning_recipes_equal_the_published_ones(size, base_lr, decay, drop_path, epochs):
    for name in (f"finetune_{size}", *(["finetune_huge_448"] if size == "huge" else [])):
        config = load_config(name)
        o, c, d, t = config.optim, config.classify, config.data, config.train
        assert (config.run.task, config.model.size, t.duration, t.global_batch) == ("finetune", size, f"{epochs} epochs", 1024)
        assert (o.name, o.base_lr, o.min_lr, o.warmup, o.weight_decay) == ("adamw", base_lr, 1e-6, "5 epochs", 0.05)
        assert (o.betas, o.layer_decay, o.clip_grad_norm, o.ema_decay) == ((0.9, 0.999), decay, None, None)
        assert (c.pool, c.drop_path, c.label_smoothing) == ("mean", drop_path, 0.1)
        assert (c.mixup, c.cutmix, c.mixup_switch_prob) == (0.8, 1.0, 0.5)
        assert (c.random_erasing, c.trainable_blocks, c.crop_pct) == (0.25, None, None)
        assert (d.augmentation, d.crop_scale, d.flip) == ("random_crop", (0.08, 1.0), 0.5)
        assert d.randaugment == "rand-m9-mstd0.5-inc1"
        assert config.model.image_size == ((448, 448) if "448" in name else (224, 224))


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_linear_probe_recipes_equal_the_published_ones(size):
    config = load_config(f"linprobe_{size}")
    o, c, d, t = config.optim, config.classify, config.data, config.train
    assert (config.run.task, config.model.size, t.duration, t.global_batch) == ("linprobe", size, "90 epochs", 16384)
    assert (o.name, o.momentum, o.trust_coefficient) == ("lars", 0.9, 0.001)
    assert (o.min_lr, o.warmup, o.weight_decay) == (0.0, "10 epochs", 0.0)
    assert config.peak_lr == pytest.approx(6.4)
    assert (c.pool, c.lr_multipliers) == ("token", (1.0,))
    assert (d.augmentation, d.crop_scale, d.crop_ratio, d.flip) == ("random_crop_once", (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (d.randaugment, c.mixup, c.cutmix, c.random_erasing, c.label_smoothing, c.drop_path) == (None, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("size", "epochs", "drop_path"), [("base", 300, 0.1), ("large", 200, 0.2), ("huge", 200, 0.2)])
def test_supervised_recipes_equal_those_of_the_paper(size, epochs, drop_path):
    config = load_config(f"supervised_{size}")
    o, c, d, t = config.optim, config.classify, config.data, config.train
    assert (config.model.size, config.model.init_from, t.duration, t.global_batch) == (size, None, f"{epochs} epochs", 4096)
    assert (o.base_lr, o.warmup, o.weight_decay, o.betas, o.ema_decay) == (1e-4, "20 epochs", 0.3, (0.9, 0.95), 0.9999)
    assert (o.layer_decay, c.drop_path, c.label_smoothing, c.mixup, c.cutmix) == (1.0, drop_path, 0.1, 0.8, 1.0)
    assert d.randaugment == "rand-m9-mstd0.5-inc1"


def test_the_partial_recipe_trains_four_blocks_of_a_large_encoder():
    config = load_config("partial_large")
    assert (config.model.size, config.classify.trainable_blocks) == ("large", 4)
    assert (config.optim.base_lr, config.optim.layer_decay, config.classify.drop_path) == (1e-3, 0.75, 0.1)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("demo", "classify.mixup=0.8", "classify.mixup has no effect with run.task=pretrain"),
        ("demo", "optim.layer_decay=0.5", "optim.layer_decay has no effect with run.task=pretrain"),
        ("finetune_base", "model.mask_ratio=0.5", "model.mask_ratio has no effect with run.task=finetune"),
        ("finetune_base", "classify.lr_multipliers=[1, 2]", "classify.lr_multipliers has no effect with run.task=finetune"),
        ("linprobe_base", "classify.drop_path=0.1", "classify.drop_path has no effect with run.task=linprobe"),
        ("linprobe_base", "engine.deepspeed=zero2", "Set engine.deepspeed=zero0"),
        ("finetune_base", "classify.trainable_blocks=1.3", "not a multiple of 0.5. Set a whole or half number."),
    ],
)
def test_settings_that_contradict_each_other_are_an_error_of_one_line(recipe, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(recipe, [override])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(("name", "pool"), [("vit_tiny_gap", "mean"), ("vit_tiny_cls", "token")])
def test_logits_equal_those_of_the_reference(golden, name, pool):
    tensors, _ = golden(f"{name}.safetensors")
    classes = tensors["logits"].shape[1]
    model = Classifier(TINY, image_size=(32, 32), patch_size=(8, 8), classes=classes, pool=pool).eval()
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    torch.testing.assert_close(model(tensors["images"]).logits, tensors["logits"], atol=1e-5, rtol=1e-5)
    model.freeze(0)
    torch.testing.assert_close(model(tensors["images"]).logits, tensors["logits"], atol=1e-5, rtol=1e-5)


def make_model(**kwargs):
    torch.manual_seed(0)
    return Classifier(TINY, image_size=(32, 32), patch_size=(8, 8), classes=7, **kwargs)


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        (0, ["head"]),
        (0.5, ["blocks.2.norm2", "blocks.2.mlp", "fc_norm", "head"]),
        (1, ["blocks.2", "fc_norm", "head"]),
        (1.5, ["blocks.1.norm2", "blocks.1.mlp", "blocks.2", "fc_norm", "head"]),
        (3, ["blocks", "fc_norm", "head"]),
    ],
)
def test_freeze_leaves_only_the_last_blocks_trainable(blocks, trained):
    whole, model = make_model(), make_model()
    model.freeze(blocks)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters() if name.startswith(tuple(f"{part}." for part in trained))}
    assert model.state_dict().keys() == whole.state_dict().keys()
    images, targets = torch.randn(4, 3, 32, 32), torch.eye(7)[:4]
    for each in (whole, model):
        each(images, targets).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad)


def test_more_trainable_blocks_than_the_encoder_has_are_an_error():
    with pytest.raises(ValueError, match=r"classify.trainable_blocks=4, but the encoder has 3 blocks"):
        make_model().freeze(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_weights_stay_fp32_if_the_engine_casts_the_model(dtype):
    model = make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.freeze(0.5)
    model.to(dtype)
    trained = {name for name, _ in model.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, buffer in model.named_buffers():
        assert name not in trained
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    images = torch.randn(4, 3, 32, 32)
    frozen_embedding = make_model()
    frozen_embedding.freeze(3)
    assert frozen_embedding.to(dtype)(images, torch.eye(7)[:4]).logits.dtype == dtype
    exact = make_model()
    torch.testing.assert_close(model(images).logits.float(), exact(images).logits, atol=0.05, rtol=0.05)


def test_each_of_several_probes_has_the_gradients_of_a_single_probe():
    images, targets = torch.randn(6, 3, 32, 32), torch.eye(7)[:6]
    model = make_model(pool="token")
    model.add_probes([1.0, 0.5])
    assert isinstance(model.head, LinearProbes)
    assert set(dict(model.named_parameters())) == set(model.lr_scales())
    assert model.lr_scales()["head.probes.1.weight"] == 0.5
    out = model(images, targets)
    out.loss.backward()
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    scaled = nn.functional.batch_norm(features, None, None, training=True, eps=1e-6)
    for number, probe in enumerate(model.head.probes):
        alone = nn.Linear(32, 7)
        alone.load_state_dict(probe.state_dict())
        torch.testing.assert_close(alone(scaled), out.logits[number])
        nn.functional.cross_entropy(alone(scaled), torch.arange(6)).backward()
        torch.testing.assert_close(alone.weight.grad, probe.weight.grad)


def test_flops_count_the_backward_pass_of_trained_parts_only():
    whole, probe = make_model(), make_model()
    probe.add_probes([1.0])
    tokens, width = 17, 32
    block = 2 * tokens * width * 12 * width + 4 * tokens * tokens * width
    embed, head = 2 * 16 * 192 * width, 2 * width * 7
    assert whole.flops().forward == embed + 3 * block + head
    assert whole.flops().train == 3 * (embed + 3 * block + head) - embed
    assert probe.flops().train == embed + 3 * block + 3 * head


# ---------------------------------------------------------------- runs


FOLDER = Path(tempfile.gettempdir()) / f"finetune-images-{os.getpid()}"
COUNTS = {"train": 80, "val": 50}


@pytest.fixture(scope="session", autouse=True)
def images():
    """Write some of the shipped images to class folders."""
    for split, count in COUNTS.items():
        source = open_index(f"demo:{split}")
        for row in range(count):
            folder = FOLDER / split / f"class{source.entries['label'][row]}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.jpg").write_bytes(source.read(row))
    yield
    shutil.rmtree(FOLDER)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Run directory of a short pre-training run."""
    run = tmp_path_factory.mktemp("encoder") / "run"
    run_ranks(1, train, "pretrain", "demo", settings(run, "4 steps", **{"classify.val_source": None}))
    return run


def settings(run, duration, **more):
    overrides: dict = {
        "data.source": str(FOLDER / "train"),
        "classify.val_source": str(FOLDER / "val"),
        "run.dir": str(run),
        "train.duration": duration,
        "optim.warmup": "1 steps",
        "train.global_batch": 16,
        "train.micro_batch": 4,
        "log.interval": 1,
        "log.metrics_port": None,
        "data.threads": 1,
    }
    return overrides | more


def train(task, recipe, overrides, stop_after=None):
    from scale_mae.training.trainer import Trainer

    torch.set_num_threads(1)
    if stop_after:
        train_step = Trainer.train_step

        def train_step_and_stop(self, batches):
            vote = train_step(self, batches)
            if self.step == stop_after:
                self.stop.request("a test")
            return vote

        Trainer.train_step = train_step_and_stop
    result = getattr(scale_mae, task)(load_config(recipe, overrides))
    return result.step, result.finished


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def weights(run):
    reader = ZeroReader(list_checkpoints(Path(run))[-1] / DEEPSPEED_TAG)
    return {name: reader[name].clone() for name in reader}


EVERYTHING = {
    "classify.mixup": 0.8,
    "classify.cutmix": 1.0,
    "classify.random_erasing": 0.25,
    "classify.drop_path": 0.3,
    "data.randaugment": "rand-m9-mstd0.5-inc1",
    "optim.ema_decay": 0.9,
    "classify.eval_interval": "3 steps",
    "classify.crop_pct": 0.7,
}


def test_a_resumed_fine_tuning_run_equals_an_uninterrupted_one(tmp_path, encoder):
    overrides = EVERYTHING | {"model.init_from": str(encoder), "train.micro_batch": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_ranks(2, train, "finetune", "finetune_demo", settings(whole, "6 steps", **overrides))[0] == (6, True)
    assert run_ranks(2, train, "finetune", "finetune_demo", settings(parts, "6 steps", **overrides), 2)[0][1] is False
    assert run_ranks(2, train, "finetune", "finetune_demo", settings(parts, "6 steps", **overrides))[0] == (6, True)
    assert losses(parts) == losses(whole)
    one, two = weights(whole), weights(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    results = [json.loads((run / "results" / "finetune.json").read_text()) for run in (whole, parts)]
    scores = [result["scores"] for result in results]
    assert scores[0] == scores[1]
    assert results[0]["protocol"] == results[1]["protocol"]
    training = read_weights(list_checkpoints(encoder)[-1]).provenance.training_digest
    # also after a resume, which does not read the initial weights
    assert results[0]["protocol"]["initialized_from"] == f"scale-mae checkpoint, step 4, training {training}"
    assert {"top1", "top5", "loss", "ema_top1"} <= scores[0].keys()
    for run, result in ((whole, results[0]), (parts, results[1])):
        assert result["model"]["sha256"] == read_weights(run / "checkpoints" / "step-00000006").digest()
    history = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert [(e["step"], e["val_images"]) for e in history if e["event"] == "evaluation"] == [(3, 50), (6, 50)]
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert line["val_top1"] == scores[0]["top1"]
    assert line["val_step"] == 6


def test_evaluate_gives_the_scores_that_training_gave(tmp_path, encoder):
    run, out = tmp_path / "run", tmp_path / "out.json"
    overrides = {"model.init_from": str(encoder), "classify.crop_pct": 0.7, "optim.base_lr": 0.1}
    run_ranks(2, train, "finetune", "finetune_demo", settings(run, "4 steps", **overrides))
    assert main(["evaluate", str(run), "--on", "folder", "--root", str(FOLDER / "val"), "--out", str(out)]) == 0
    trained, evaluated = (json.loads(path.read_text()) for path in (run / "results" / "finetune.json", out))
    assert evaluated["scores"] == pytest.approx({name: trained["scores"][name] for name in evaluated["scores"]}, abs=1e-6)
    assert evaluated["protocol"]["crop_pct"] == trained["protocol"]["crop_pct"] == 0.7
    for metadata in (("model", "sha256"), ("data", "digest"), ("data", "images")):
        assert evaluated[metadata[0]][metadata[1]] == trained[metadata[0]][metadata[1]]
    assert load_classifier(run, size=48).crop_pct is None  # the default of the reference for that size


def train_with_slow_evaluation(recipe, overrides):
    original = classification.normalize

    def slow(*args):
        time.sleep(0.4)  # per batch of the evaluation
        return original(*args)

    classification.normalize = slow
    return train("finetune", recipe, overrides)


def test_the_step_time_does_not_include_evaluations(tmp_path, encoder):
    run = tmp_path / "run"
    overrides = {"model.init_from": str(encoder), "classify.eval_interval": "3 steps", "train.micro_batch": 16}
    run_ranks(1, train_with_slow_evaluation, "finetune_demo", settings(run, "6 steps", **overrides))
    lines = {line["step"]: line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())}
    assert lines[4]["evaluation_s"] > 1.5  # four batches
    assert all(line["step_time_s"] < 1 and line["forward_backward_s"] < 1 for step, line in lines.items() if step > 1)
    counters = json.loads((run / "counters.json").read_text())
    counts, total = Counters(counters).histogram("step_seconds/evaluation")
    assert counts[-1] == ("+Inf", 2)  # also the last one, which no step follows
    assert total > 3
    page = str(configuration(read_run_record(run)))
    assert "drop path 0.1" in page
    assert "mask ratio" not in page


def test_a_damaged_validation_image_does_not_end_the_run(tmp_path, encoder):
    val, run = shutil.copytree(FOLDER / "val", tmp_path / "val"), tmp_path / "run"
    damaged = sorted(val.glob("*/*.jpg"))[7]
    damaged.write_bytes(damaged.read_bytes()[:300])
    overrides = {
        "model.init_from": str(encoder),
        "classify.val_source": str(val),
        "engine.deepspeed": "zero3",
        "classify.eval_interval": "2 steps",
    }
    assert run_ranks(2, train, "finetune", "finetune_demo", settings(run, "4 steps", **overrides))[0] == (4, True)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [event["step"] for event in history if event["event"] == "evaluation_failed"] == [2, 4]
    assert f"The evaluation at step 4 failed; training continues: {damaged}" in (run / "log.txt").read_text()
    assert "evaluation" not in (run / "exit_status").read_text()
    assert str(damaged) in evaluations(read_run_record(run))


def test_resumed_and_exported_weights_have_the_same_digest_and_training(tmp_path, encoder):
    overrides = {"model.init_from": str(encoder)}
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    run_ranks(2, train, "finetune", "finetune_demo", settings(one, "4 steps", **overrides))
    run_ranks(2, train, "finetune", "finetune_demo", settings(two, "4 steps", **overrides), 2)
    run_ranks(2, train, "finetune", "finetune_demo", settings(two, "4 steps", **overrides))
    run_ranks(2, train, "finetune", "finetune_demo", settings(other, "4 steps", **overrides, **{"run.seed": 1}))
    subjects = [load_classifier(run) for run in (one, two, other)]
    assert subjects[0].digest == subjects[1].digest != subjects[2].digest
    assert len({subject.training for subject in subjects}) == 1
    exported = load_classifier(convert(one, "timm", tmp_path / "timm"))
    assert exported.training == subjects[0].training
    longer = settings(tmp_path / "longer", "5 steps", **overrides)
    run_ranks(1, train, "finetune", "finetune_demo", longer)
    assert load_classifier(tmp_path / "longer").training != subjects[0].training


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ({"run.seed": 7, "train.micro_batch": 32, "data.threads": 3, "classify.val_source": "x", "model.init_from": "y"}, True),
        ({"classify.drop_path": 0.3}, False),
        ({"train.duration": "7 epochs"}, False),
        ({"data.source": "z"}, False),
        ({"model.init_from": None}, False),
    ],
)
def test_the_training_digest_depends_on_the_settings_that_change_the_weights_except_the_seed(override, same):
    def training(overrides):
        return provenance_from_metadata(build_metadata(load_config("finetune_base", overrides), 5), "").training_digest

    assert (training({"model.init_from": "x"}) == training({"model.init_from": "x"} | override)) == same


def test_a_linear_probe_does_not_change_the_backbone(tmp_path, encoder):
    run = tmp_path / "probe"
    overrides = {"model.init_from": str(encoder), "train.precision": "bf16", "classify.lr_multipliers": [0.5, 2.0]}
    run_ranks(2, train, "linprobe", "linprobe_demo", settings(run, "4 steps", **overrides))
    before, after = weights(encoder), weights(run)
    backbone = {name for name in after if not name.startswith("head.")}
    assert backbone == {name for name in before if not name.startswith(("decoder_", "mask_token"))}
    for name in backbone:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], before[name])
    assert after["head.probes.0.weight"].abs().sum() > 0
    assert not torch.equal(after["head.norm.running_mean"], torch.zeros(SIZES["nano"].width))
    result = json.loads((run / "results" / "linprobe.json").read_text())
    assert result["data"]["images"] == 50
    assert set(result["parts"]) == {"lr x 0.5", "lr x 2"}
    assert result["scores"]["top1"] == max(part["top1"] for part in result["parts"].values())


def test_batch_norm_statistics_are_averaged_over_all_ranks(tmp_path, encoder):
    overrides = {"model.init_from": str(encoder), "data.augmentation": "none"}
    found = []
    for ranks in (1, 2):
        run, batch = tmp_path / f"probe{ranks}", {"train.global_batch": 8, "train.micro_batch": 8 // ranks}
        run_ranks(ranks, train, "linprobe", "linprobe_demo", settings(run, "3 steps", **overrides) | batch)
        found.append(weights(run)["head.norm.running_mean"])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", [1.5, None])
def test_only_trainable_blocks_change_also_with_zero_3(tmp_path, encoder, blocks):
    found = {}
    for stage, ranks in (("zero2", 1), ("zero3", 2)):
        run = tmp_path / stage
        overrides = {"model.init_from": str(encoder), "classify.trainable_blocks": blocks, "engine.deepspeed": stage}
        run_ranks(ranks, train, "finetune", "finetune_demo", settings(run, "3 steps", **overrides))
        found[stage] = weights(run), losses(run), json.loads((run / "results" / "finetune.json").read_text())
    before, (after, one, result), (_, other, again) = weights(encoder), found["zero2"], found["zero3"]
    frozen = [n for n in after if n in before and torch.equal(before[n], after[n])]
    for name in after:
        trained = blocks is None or name.startswith(("blocks.5.", "blocks.4.norm2", "blocks.4.mlp", "fc_norm", "head"))
        assert (name in frozen) != trained, name
    for step, (loss, norm) in one.items():
        assert other[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-3))
    assert again["scores"]["top1"] == pytest.approx(result["scores"]["top1"], abs=0.002)
    assert again["data"] == result["data"]


def test_position_embeddings_are_interpolated_to_another_image_size(tmp_path, encoder):
    run = tmp_path / "large"
    overrides = {"model.init_from": str(encoder), "model.image_size": [48, 48], "classify.val_source": None}
    run_ranks(1, train, "finetune", "finetune_demo", settings(run, "1 steps", **overrides))
    assert "Interpolated pos_embed from 8 x 8 to 12 x 12 patches." in (run / "log.txt").read_text()
    assert weights(run)["pos_embed"].shape == (1, 145, 96)
    assert not (run / "results").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.init_from": "ENCODER", "model.size": "tiny"},
            "width is 96, the model's is 192. Change model.size",
        ),
        ({"model.init_from": "ENCODER", "model.patch_size": 8}, r"Set model.patch_size=\[4, 4\]"),
        (
            {"classify.trainable_blocks": 7, "model.init_from": None},
            "classify.trainable_blocks=7, but the encoder has 6 blocks",
        ),
        ({"classify.val_source": "nowhere", "model.init_from": None}, "classify.val_source=nowhere"),
        ({"classify.val_source": "OTHER_CLASSES", "model.init_from": None}, "other0 is not a class of data.source"),
        ({"data.source": "ONE_CLASS", "model.init_from": None}, "all images belong to one class"),
        ({"classify.eval_interval": "0 epochs", "model.init_from": None}, "classify.eval_interval=0 epochs is 0 steps"),
        ({"data.source": "UNLABELED", "model.init_from": None}, "16 of 16 images have no label"),
    ],
)
def test_weights_and_images_that_do_not_match_are_an_error(tmp_path, encoder, overrides, message):
    folder = tmp_path / "images"
    folder.mkdir()
    source = open_index("demo:val")
    for row in range(16):
        (folder / f"{row}.jpg").write_bytes(source.read(row))
    for number in range(10):
        (tmp_path / "other" / f"other{number}").mkdir(parents=True)
        shutil.copy(folder / "0.jpg", tmp_path / "other" / f"other{number}")
    (tmp_path / "one" / "class0").mkdir(parents=True)
    shutil.copy(folder / "0.jpg", tmp_path / "one" / "class0")
    listed = tmp_path / "images.txt"
    listed.write_text("".join(f"images/{row}.jpg\n" for row in range(16)))
    places = {"ENCODER": str(encoder), "UNLABELED": str(listed)}
    places |= {"OTHER_CLASSES": str(tmp_path / "other"), "ONE_CLASS": str(tmp_path / "one")}
    overrides = {key: places.get(value, value) if isinstance(value, str) else value for key, value in overrides.items()}
    with pytest.raises(RankError, match=message):
        run_ranks(1, train, "finetune", "finetune_demo", settings(tmp_path / "run", "1 steps", **overrides))


def test_a_recipe_of_another_task_is_an_error(tmp_path):
    with pytest.raises(UserError, match="run.task=finetune: not a configuration for pretrain"):
        scale_mae.pretrain("finetune_demo", run={"dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_scores_count_every_image_once_also_if_a_rank_has_none(tmp_path):
    for ranks in (1, 3):
        found = run_ranks(ranks, score_some)
        assert all(each == found[0] for each in found)
        assert found[0][0] == (7, 4 / 7, 1.0)
        assert found[0][1] == (7, 3 / 7, 1.0)
        assert len({calls for *_, calls in run_ranks(ranks, count_calls)}) == 1


def part_of(count):
    from scale_mae.evaluation.datasets import DatasetPart

    index = open_index("demo:val")

    class Few:
        entries = index.entries[:count].copy()
        where, read = index.location, index.read

        def __len__(self):
            return count

    few = Few()
    few.entries["label"] = np.arange(count) % 2
    return DatasetPart("few", few, None, None)


def score_some():
    """Score two classifiers on seven images of two classes. One always predicts class 0, the other class 1."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.evaluation.accuracy import score_classifiers
    from scale_mae.evaluation.image_loader import center_crop_transform

    def logits(images):
        one = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        return one[:, None].expand(2, len(images), 2)

    with process_group() as world:
        found = score_classifiers(logits, part_of(7), center_crop_transform(28, None), world, 2)
    return [(each.images, each.top1, each.top5) for each in found]


def count_calls():
    from scale_mae.distributed.process_group import process_group
    from scale_mae.evaluation.accuracy import score_classifiers
    from scale_mae.evaluation.image_loader import center_crop_transform

    calls = []

    def logits(images):
        calls.append(len(images))
        return torch.zeros(1, len(images), 2)

    with process_group() as world:
        score_classifiers(logits, part_of(2), center_crop_transform(28, None), world, 1)
    return "called", len(calls)
