"""Fine-tuned classifiers and linear probes: every export computes what the run computes, and every command accepts the run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from classifier_runs import CLASSES, LR_MULTIPLIERS, STEP, logits, random_images, train_classifiers
from classifiers import class_folders
from test_export import make_slightly_wrong
from torch import nn

from scale_mae import UserError, load_config, load_encoder
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.cli import main
from scale_mae.config import saved_config
from scale_mae.evaluation.models import load_classifier, load_frozen_encoder
from scale_mae.report.reconstructions import draw_missing
from scale_mae.weights.classifier_heads import fold_batch_norm
from scale_mae.weights.classifier_initialization import build_classifier_from_config, load_initial_encoder
from scale_mae.weights.convert import convert
from scale_mae.weights.export_formats import FORMATS
from scale_mae.weights.initialization import load_initial_weights
from scale_mae.weights.inspection import inspect, render
from scale_mae.weights.model_builder import build_mae_from_config
from scale_mae.weights.model_loader import load_mae
from scale_mae.weights.weight_import import locate_weights, read_weights

IMAGES = random_images(3)
NAMES = ("mean", "token", "probe")


@pytest.fixture(scope="module")
def classifier_runs(tmp_path_factory):
    return train_classifiers(tmp_path_factory.mktemp("classifiers"))


def assert_close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), expected, atol=1e-5, rtol=0)


def test_a_folded_probe_computes_batch_norm_and_linear():
    torch.manual_seed(0)
    norm, probe = nn.BatchNorm1d(64, affine=False, eps=1e-6), nn.Linear(64, 5)
    norm.running_mean.copy_(torch.randn(64) * 3)
    norm.running_var.copy_(torch.rand(64) * torch.logspace(-8, 1, 64))
    features = torch.randn(7, 64, dtype=torch.float64) * norm.running_var.sqrt() + norm.running_mean
    weight, bias = fold_batch_norm(probe.weight.detach(), probe.bias.detach(), norm.running_mean, norm.running_var)
    with torch.no_grad():
        expected = probe.double()(norm.double().eval()(features))
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(features @ weight.double().T + bias.double(), expected, atol=1e-2, rtol=0)  # fp32 weights
    exact = features @ (probe.weight / (norm.running_var + 1e-6).sqrt()).T
    torch.testing.assert_close(weight.double(), probe.weight / (norm.running_var + 1e-6).sqrt(), rtol=1e-7, atol=0)
    torch.testing.assert_close(bias.double(), (expected - exact)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_timm_loads_a_classifier_from_folder_and_file(classifier_runs, tmp_path, name):
    run, model = classifier_runs[name]
    folder = convert(run, "timm", tmp_path / "f")
    timm_model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_close(timm_model(IMAGES).detach(), logits(model, IMAGES))
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (10, CLASSES)
    assert config["global_pool"] == ("avg" if name == "mean" else "token")
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    metadata = json.loads((folder / "scale_mae.json").read_text())
    assert metadata["task"] == ("linprobe" if name == "probe" else "finetune")
    assert {"norm_pixel", "mask_ratio"}.isdisjoint(metadata)
    half = convert(run, "timm", tmp_path / "half.safetensors", dtype="bf16")
    for out, tolerance in ((folder, 1e-5), (half, 0.2)):
        actual = logits(load_classifier(out).model, IMAGES)
        torch.testing.assert_close(actual, logits(model, IMAGES), atol=tolerance, rtol=0)


def test_transformers_loads_a_classifier_of_the_class_token(classifier_runs, tmp_path):
    from transformers import ViTForImageClassification

    for name in ("token", "probe"):
        run, model = classifier_runs[name]
        folder = convert(run, "vit", tmp_path / name)
        huggingface_model = ViTForImageClassification.from_pretrained(folder).eval()
        assert_close(huggingface_model(IMAGES).logits.detach(), logits(model, IMAGES))
        assert huggingface_model.config.id2label == dict(enumerate(CLASSES))
        assert huggingface_model.config.label2id["n00000003"] == 3
        assert_close(logits(load_classifier(folder).model, IMAGES), logits(model, IMAGES))
        assert load_classifier(folder).names == tuple(CLASSES)


@torch.inference_mode()
def test_exported_graphs_return_logits_for_any_batch_size(classifier_runs, tmp_path):
    import onnxruntime

    (probe_run, probe), (mean_run, mean) = classifier_runs["probe"], classifier_runs["mean"]
    session = onnxruntime.InferenceSession(convert(probe_run, "onnx", tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(convert(mean_run, "torch_export", tmp_path / "e.pt2")).module()
    assert [output.name for output in session.get_outputs()] == ["logits"]
    for count in (1, 3):
        (onnx_logits,) = session.run(None, {"images": IMAGES[:count].numpy()})
        np.testing.assert_allclose(onnx_logits, logits(probe, IMAGES[:count]), atol=1e-4)
        assert_close(program(IMAGES[:count])[0], logits(mean, IMAGES[:count]))


def test_probe_and_ema_options_select_the_exported_weights(classifier_runs, tmp_path):
    run, model = classifier_runs["probe"]
    for number in range(len(LR_MULTIPLIERS)):
        out = tmp_path / f"{number}.safetensors"
        assert main(["convert", str(run), "--to", "state_dict", "--out", str(out), "--probe", str(number)]) == 0
        assert_close(logits(load_classifier(out).model, IMAGES), logits(model, IMAGES, probe=number))
        assert inspect(out)["probe"] == number
    run, model = classifier_runs["mean"]
    out = tmp_path / "ema"
    assert main(["convert", str(run), "--to", "timm", "--out", str(out), "--ema"]) == 0
    state, reader = load_classifier(out).model.state_dict(), ZeroReader(locate_checkpoint(run, print) / DEEPSPEED_TAG)
    for key, parameter in model.named_parameters():
        assert torch.equal(state[key].reshape(-1), reader.flat(key, "ema"))
        assert not torch.equal(state[key], parameter)
    assert inspect(out)["ema"] == 0.9


WRONG = {
    "in fp32": (
        "token",
        "vit",
        "blocks.3.mlp.fc1.weight",
        True,
        "layer.3.intermediate.dense.weight differs from the checkpoint when it is read back",
    ),
    "a bias": ("mean", "timm", "head.bias", False, "logits differ from the checkpoint's"),
    "a folded weight": ("probe", "timm", "head.weight", False, "logits differ from the checkpoint's"),
}


@pytest.mark.parametrize(("name", "to", "key", "with_read_back", "message"), WRONG.values(), ids=WRONG)
def test_an_export_with_one_wrong_weight_is_not_written(
    classifier_runs, tmp_path, monkeypatch, name, to, key, with_read_back, message
):
    export_format = FORMATS[to]

    def write(source, target):
        exported = {**source.exported, key: make_slightly_wrong(source.exported[key])}
        export_format.write(replace(source, exported=exported), target)

    read_back = export_format.read_back if with_read_back else None
    monkeypatch.setitem(FORMATS, to, replace(export_format, write=write, read_back=read_back))
    with pytest.raises(UserError, match=f"not written; .*({message})"):
        convert(classifier_runs[name][0], to, tmp_path / "x")
    assert not list(tmp_path.iterdir())


UNSUPPORTED = {
    "a decoder": ("mean", "mae", "x.pth", {}, r"--to mae: .* is a classifier and has no decoder. Use one of timm"),
    "transformers' MAE": ("token", "vit_mae", "x", {}, "--to vit_mae: .* is a classifier"),
    "averaged tokens": ("mean", "vit", "x", {}, "--to vit: .* averages the patch tokens, which no classifier of transformers"),
    "another pooling": ("token", "timm", "x", {"pool": "avg"}, "--pool avg: .* is a classifier and pools as it was trained"),
    "no average": ("token", "timm", "x", {"ema": True}, r"--ema: .* has no moving average of the weights .optim.ema_decay"),
    "no probes": ("mean", "timm", "x", {"probe": 0}, "--probe 0: run.task=finetune has no probes"),
    "too few probes": ("probe", "timm", "x", {"probe": 3}, "--probe 3: the run has probes 0 to 2"),
}


@pytest.mark.parametrize(("name", "to", "out", "options", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_requests_are_refused_in_one_line(classifier_runs, tmp_path, name, to, out, options, message):
    with pytest.raises(UserError, match=message) as caught:
        convert(classifier_runs[name][0], to, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_loads_as_classifier_and_as_encoder(classifier_runs, tmp_path, name):
    run, model = classifier_runs[name]
    subject = load_classifier(run)
    assert_close(logits(subject.model, IMAGES), logits(model, IMAGES))
    assert (subject.classes, subject.names, subject.seed, subject.kind) == (10, tuple(CLASSES), 7, "scale-mae checkpoint")
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
        for encoder in (load_encoder(run), load_frozen_encoder(run).model, load_encoder(convert(run, "timm", tmp_path / "t"))):
            assert encoder.num_classes == 0
            assert_close(encoder(IMAGES), expected)
    assert load_encoder(run).pretrained_cfg["num_classes"] == 0


def test_image_size_resizes_a_classifier_as_evaluation_does(classifier_runs, tmp_path):
    run, _ = classifier_runs["mean"]
    larger = load_classifier(convert(run, "timm", tmp_path / "x.safetensors", image_size=(48, 48)))
    assert larger.size == 48
    images = torch.ones(1, 3, 48, 48)
    assert_close(logits(larger.model, images), logits(load_classifier(run, size=48).model, images))


def test_evaluate_accepts_a_run_and_its_export(classifier_runs, tmp_path, capsys):
    class_folders(tmp_path / "val", classes=range(3, 7), per_class=2)  # matched by the class names in the weights
    scores = {}
    run, _ = classifier_runs["mean"]
    for path in (run, convert(run, "timm", tmp_path / "f")):
        out = tmp_path / f"{path.name}.json"
        assert main(["evaluate", str(path), "--on", "folder", "--root", str(tmp_path / "val"), "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        scores[path.name] = result["scores"]
        assert (result["model"]["seed"], result["model"]["classes"]) == (7, 10)
        assert len(result["model"]["sha256"]) == 64
    assert scores["mean"] == pytest.approx(scores["f"])
    assert "ViT-nano/4, 32 px" in capsys.readouterr().out


def test_knn_and_embed_accept_a_run_but_knn_has_no_untrained_classifier(classifier_runs, tmp_path, capsys):
    sources = [
        argument for part in ("train", "val") for argument in (f"--{part}", str(class_folders(tmp_path / part, per_class=2)))
    ]
    assert main(["knn", str(classifier_runs["probe"][0]), *sources, "--k", "3"]) == 0
    assert main(["embed", str(classifier_runs["mean"][0]), str(tmp_path / "val"), "--out", str(tmp_path / "e.npy")]) == 0
    assert np.load(tmp_path / "e.npy").shape == (20, 96)
    capsys.readouterr()
    assert main(["knn", str(classifier_runs["probe"][0]), *sources, "--k", "3", "--untrained"]) == 2
    printed = capsys.readouterr()
    assert "trained:" not in printed.out
    assert printed.err.count("\n") == 1
    assert "a classifier; the untrained weights of its encoder are not stored. It was initialized randomly." in printed.err


def initialize(path, **overrides):
    config = load_config("debug", overrides)
    model = build_mae_from_config(config)
    return model, load_initial_weights(model, read_weights(locate_weights(path, print)))


def test_a_mae_can_be_initialized_from_a_classifier(classifier_runs, tmp_path):
    sizes = {"model.patch_size": 4, "model.image_size": 32}
    for name in NAMES:
        run, classifier = classifier_runs[name]
        for path in (run, convert(run, "timm", tmp_path / name)):
            mae, message = initialize(path, **sizes)
            mae_state, classifier_state = mae.state_dict(), classifier.state_dict()
            shared = [key for key in mae_state if key in classifier_state]
            assert len(shared) >= 6 * 12 + 4
            assert all(torch.equal(mae_state[key], classifier_state[key]) for key in shared)
            assert "The decoder starts with random weights" in message
            assert ("The final norm keeps its initial values" in message) == (name == "mean")


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_can_be_initialized_from_another_classifier(classifier_runs, tmp_path, name):
    run, trained = classifier_runs[name]
    config = saved_config(run / "config.yaml")
    for path in (run, convert(run, "timm", tmp_path / name)):
        model = build_classifier_from_config(config, 4)
        message = load_initial_encoder(model, read_weights(locate_weights(path, print)))
        assert "initial values" not in message  # the fc_norm of a classifier with mean pooling is loaded too
        with torch.inference_mode():
            actual, expected = (m.forward_head(m.forward_features(IMAGES), pre_logits=True) for m in (model.eval(), trained))
        assert_close(actual, expected)


def test_reconstructions_of_a_classifier_are_refused(classifier_runs, tmp_path, capsys):
    with pytest.raises(UserError, match=r"a classifier \(run.task=finetune\); it has no decoder"):
        load_mae(locate_checkpoint(classifier_runs["mean"][0], print))
    run, warnings = classifier_runs["mean"][0], []
    assert draw_missing(run, saved_config(run / "config.yaml"), [], warnings.append) == warnings == []
    assert main(["reconstruct", str(classifier_runs["probe"][0]), "x.jpg", "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_shows_task_classes_and_best_probe(classifier_runs, tmp_path):
    run, model = classifier_runs["probe"]
    report = inspect(locate_checkpoint(run, print))
    assert (report["task"], report["pooling"], report["best probe"]) == ("linprobe", "class token", model.best)
    assert report["classes"] == "10 (n00000000, n00000001, n00000002, ...)"
    assert "best probe" in render(report)
    assert inspect(classifier_runs["mean"][0])["task"] == "finetune"
    report = inspect(convert(classifier_runs["mean"][0], "timm", tmp_path / "f"))
    assert (report["task"], report["num classes"], report["step"]) == ("finetune", 10, STEP)
    assert report["other tensors"] == "fc_norm.bias, fc_norm.weight, head.bias, head.weight"
