"""Our own classifiers, fine-tuned and probed: every format computes what the run does, and every command takes the run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from classifiers import class_folders
from own_runs import CLASSES, STEP, SWEEP, images, logits, make_own_runs
from test_export import slightly_wrong
from torch import nn

from scale_mae import UserError, load_config, load_encoder
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.cli import main
from scale_mae.config import saved_config
from scale_mae.evaluation.classifier import load_classifier, load_subject
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

IMAGES = images(3)
NAMES = ("mean", "token", "probe")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return make_own_runs(tmp_path_factory.mktemp("own"))


def close(got, wanted):
    torch.testing.assert_close(torch.as_tensor(got), wanted, atol=1e-5, rtol=0)


def test_the_folded_probe_is_batch_norm_and_linear():
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
def test_timm_opens_folder_and_file(own, tmp_path, name):
    run, model = own[name]
    folder = convert(run, "timm", tmp_path / "f")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    close(theirs(IMAGES).detach(), logits(model, IMAGES))
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (10, CLASSES)
    assert config["global_pool"] == ("avg" if name == "mean" else "token")
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    metadata = json.loads((folder / "scale_mae.json").read_text())
    assert metadata["task"] == ("linprobe" if name == "probe" else "finetune")
    assert {"norm_pixel", "mask_ratio"}.isdisjoint(metadata)
    half = convert(run, "timm", tmp_path / "half.safetensors", dtype="bf16")
    for out, difference in ((folder, 1e-5), (half, 0.2)):
        got = logits(load_classifier(out).model, IMAGES)
        torch.testing.assert_close(got, logits(model, IMAGES), atol=difference, rtol=0)


def test_transformers_opens_what_classifies_the_class_token(own, tmp_path):
    from transformers import ViTForImageClassification

    for name in ("token", "probe"):
        run, model = own[name]
        folder = convert(run, "vit", tmp_path / name)
        theirs = ViTForImageClassification.from_pretrained(folder).eval()
        close(theirs(IMAGES).logits.detach(), logits(model, IMAGES))
        assert theirs.config.id2label == dict(enumerate(CLASSES))
        assert theirs.config.label2id["n00000003"] == 3
        close(logits(load_classifier(folder).model, IMAGES), logits(model, IMAGES))
        assert load_classifier(folder).names == tuple(CLASSES)


@torch.inference_mode()
def test_programs_give_logits_for_any_batch(own, tmp_path):
    import onnxruntime

    (run, probe), (other, mean) = own["probe"], own["mean"]
    session = onnxruntime.InferenceSession(convert(run, "onnx", tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(convert(other, "torch_export", tmp_path / "e.pt2")).module()
    assert [output.name for output in session.get_outputs()] == ["logits"]
    for count in (1, 3):
        (theirs,) = session.run(None, {"images": IMAGES[:count].numpy()})
        np.testing.assert_allclose(theirs, logits(probe, IMAGES[:count]), atol=1e-4)
        close(program(IMAGES[:count])[0], logits(mean, IMAGES[:count]))


def test_another_probe_and_the_moving_average(own, tmp_path):
    run, model = own["probe"]
    for number in range(len(SWEEP)):
        out = tmp_path / f"{number}.safetensors"
        assert main(["convert", str(run), "--to", "state_dict", "--out", str(out), "--probe", str(number)]) == 0
        close(logits(load_classifier(out).model, IMAGES), logits(model, IMAGES, probe=number))
        assert inspect(out)["probe"] == number
    run, model = own["mean"]
    out = tmp_path / "ema"
    assert main(["convert", str(run), "--to", "timm", "--out", str(out), "--ema"]) == 0
    ours, reader = load_classifier(out).model.state_dict(), ZeroReader(locate_checkpoint(run, print) / DEEPSPEED_TAG)
    for tensor, parameter in model.named_parameters():
        assert torch.equal(ours[tensor].reshape(-1), reader.flat(tensor, "ema"))
        assert not torch.equal(ours[tensor], parameter)
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


@pytest.mark.parametrize(("name", "to", "tensor", "read_back", "message"), WRONG.values(), ids=WRONG)
def test_one_wrong_weight_gets_no_name(own, tmp_path, monkeypatch, name, to, tensor, read_back, message):
    layout = FORMATS[to]

    def write(source, target):
        layout.write(replace(source, exported={**source.exported, tensor: slightly_wrong(source.exported[tensor])}), target)

    monkeypatch.setitem(FORMATS, to, replace(layout, write=write, read_back=layout.read_back if read_back else None))
    with pytest.raises(UserError, match=f"not written; .*({message})"):
        convert(own[name][0], to, tmp_path / "x")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "a decoder": ("mean", "mae", "x.pth", {}, r"--to mae: .* is a classifier and has no decoder. Use one of timm"),
    "transformers' MAE": ("token", "vit_mae", "x", {}, "--to vit_mae: .* is a classifier"),
    "averaged tokens": ("mean", "vit", "x", {}, "--to vit: .* averages the patch tokens, which no classifier of transformers"),
    "another pooling": ("token", "timm", "x", {"pool": "avg"}, "--pool avg: .* is a classifier and pools as it was trained"),
    "no average": ("token", "timm", "x", {"ema": True}, r"--ema: .* has no moving average of the weights .optim.ema_decay"),
    "no probes": ("mean", "timm", "x", {"probe": 0}, "--probe 0: run.task=finetune has no probes"),
    "too few probes": ("probe", "timm", "x", {"probe": 3}, "--probe 3: the run has probes 0 to 2"),
}


@pytest.mark.parametrize(("name", "to", "out", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_given_is_refused_in_one_line(own, tmp_path, name, to, out, options, message):
    with pytest.raises(UserError, match=message) as caught:
        convert(own[name][0], to, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_a_classifier_and_an_encoder(own, tmp_path, name):
    run, model = own[name]
    subject = load_classifier(run)
    close(logits(subject.model, IMAGES), logits(model, IMAGES))
    assert (subject.classes, subject.names, subject.seed, subject.kind) == (10, tuple(CLASSES), 7, "scale-mae checkpoint")
    with torch.inference_mode():
        wanted = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
        for encoder in (load_encoder(run), load_subject(run).model, load_encoder(convert(run, "timm", tmp_path / "t"))):
            assert encoder.num_classes == 0
            close(encoder(IMAGES), wanted)
    assert load_encoder(run).pretrained_cfg["num_classes"] == 0


def test_another_image_size(own, tmp_path):
    run, _ = own["mean"]
    bigger = load_classifier(convert(run, "timm", tmp_path / "x.safetensors", image_size=(48, 48)))
    assert bigger.size == 48
    close(logits(bigger.model, torch.ones(1, 3, 48, 48)), logits(load_classifier(run, size=48).model, torch.ones(1, 3, 48, 48)))


def test_evaluate_a_run(own, tmp_path, capsys):
    class_folders(tmp_path / "val", classes=range(3, 7), per_class=2)  # by their names, which the weights know
    scores = {}
    for what in (own["mean"][0], convert(own["mean"][0], "timm", tmp_path / "f")):
        out = tmp_path / f"{what.name}.json"
        assert main(["evaluate", str(what), "--on", "folder", "--root", str(tmp_path / "val"), "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        scores[what.name] = result["scores"]
        assert (result["model"]["seed"], result["model"]["classes"]) == (7, 10)
        assert len(result["model"]["sha256"]) == 64
    assert scores["mean"] == pytest.approx(scores["f"])
    assert "ViT-nano/4, 32 px" in capsys.readouterr().out


def test_quick_looks_take_a_run_and_know_no_untrained_one(own, tmp_path, capsys):
    sources = [
        argument for part in ("train", "val") for argument in (f"--{part}", str(class_folders(tmp_path / part, per_class=2)))
    ]
    assert main(["knn", str(own["probe"][0]), *sources, "--k", "3"]) == 0
    assert main(["embed", str(own["mean"][0]), str(tmp_path / "val"), "--out", str(tmp_path / "e.npy")]) == 0
    assert np.load(tmp_path / "e.npy").shape == (20, 96)
    capsys.readouterr()
    assert main(["knn", str(own["probe"][0]), *sources, "--k", "3", "--untrained"]) == 2
    told = capsys.readouterr()
    assert "trained:" not in told.out
    assert told.err.count("\n") == 1
    assert "a classifier; the untrained weights of its encoder are not stored. It was initialized randomly." in told.err


def begin(path, **changes):
    config = load_config("debug", changes)
    model = build_mae_from_config(config)
    return model, load_initial_weights(model, read_weights(locate_weights(path, print)))


def test_a_mae_begins_with_the_encoder_of_a_classifier(own, tmp_path):
    sizes = {"model.patch_size": 4, "model.image_size": 32}
    for name in NAMES:
        run, theirs = own[name]
        for path in (run, convert(run, "timm", tmp_path / name)):
            mae, note = begin(path, **sizes)
            own_state, state = mae.state_dict(), theirs.state_dict()
            shared = [tensor for tensor in own_state if tensor in state]
            assert len(shared) >= 6 * 12 + 4
            assert all(torch.equal(own_state[tensor], state[tensor]) for tensor in shared)
            assert "the decoder starts random" in note
            assert ("the final norm starts anew" in note) == (name == "mean")


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_begins_with_the_encoder_of_another(own, tmp_path, name):
    run, theirs = own[name]
    config = saved_config(run / "config.yaml")
    for path in (run, convert(run, "timm", tmp_path / name)):
        model = build_classifier_from_config(config, 4)
        note = load_initial_encoder(model, read_weights(locate_weights(path, print)))
        assert "anew" not in note  # of a classifier with mean pooling the norm behind it is taken too
        with torch.inference_mode():
            ours, expected = (m.forward_head(m.forward_features(IMAGES), pre_logits=True) for m in (model.eval(), theirs))
        close(ours, expected)


def test_pictures_of_a_classifier_are_refused(own, tmp_path, capsys):
    with pytest.raises(UserError, match=r"a classifier \(run.task=finetune\); it has no decoder"):
        load_mae(locate_checkpoint(own["mean"][0], print))
    told = []
    assert draw_missing(own["mean"][0], saved_config(own["mean"][0] / "config.yaml"), [], told.append) == told == []
    assert main(["reconstruct", str(own["probe"][0]), "x.jpg", "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_tells_what_it_is(own, tmp_path):
    report = inspect(locate_checkpoint(own["probe"][0], print))
    assert (report["task"], report["pooling"], report["best probe"]) == ("linprobe", "class token", own["probe"][1].best)
    assert report["classes"] == "10 (n00000000, n00000001, n00000002, ...)"
    assert "best probe" in render(report)
    assert inspect(own["mean"][0])["task"] == "finetune"
    report = inspect(convert(own["mean"][0], "timm", tmp_path / "f"))
    assert (report["task"], report["num classes"], report["step"]) == ("finetune", 10, STEP)
    assert report["other tensors"] == "fc_norm.bias, fc_norm.weight, head.bias, head.weight"
