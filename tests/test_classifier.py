"""Tests that loaded third-party classifiers compute the same outputs as in their own libraries."""

import argparse
import json

import pytest
import torch
from classifiers import vit, write_timm
from safetensors.torch import save_file

from scale_mae import load_config
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.evaluation.models import load_classifier, load_frozen_encoder
from scale_mae.model.pos_embed import resize_pos_embed
from scale_mae.weights.metadata import METADATA_KEY, build_metadata
from scale_mae.weights.model_builder import build_mae_from_config, encoder_state
from scale_mae.weights.model_loader import load_encoder

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(subject, images=IMAGES):
    with torch.inference_mode():
        return subject.model(images)


@pytest.mark.parametrize("wrapped", [True, False], ids=["the reference's file", "a state dict"])
@pytest.mark.parametrize("name", ["vit_tiny_gap", "vit_tiny_cls"])
def test_classifiers_of_the_reference_yield_its_logits(golden, tmp_path, name, wrapped):
    values, _ = golden(f"{name}.safetensors")
    state = {n.removeprefix("weights."): t for n, t in values.items() if n.startswith("weights.")}
    write_timm(tmp_path, vit(num_classes=7))  # for its config.json, which contains the number of attention heads
    (tmp_path / "model.safetensors").unlink()
    if wrapped:
        torch.save({"model": state, "args": argparse.Namespace(seed=3), "epoch": 99}, tmp_path / "checkpoint-99.pth")
    else:
        save_file(state, tmp_path / "w.safetensors")
    if name == "vit_tiny_cls":
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"global_pool": "avg"', '"global_pool": "token"'))
    subject = load_classifier(tmp_path)
    torch.testing.assert_close(logits(subject, values["images"]), values["logits"], atol=1e-5, rtol=0)
    assert (subject.classes, subject.architecture) == (7, "ViT-32x3/8, 32 px")


def test_heads_and_seed_come_from_the_options_of_a_reference_checkpoint(tmp_path):
    original = vit(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    options = argparse.Namespace(model="vit_tiny_patch16", seed=3, input_size=32)
    torch.save({"model": original.state_dict(), "args": options}, tmp_path / "checkpoint-99.pth")
    subject = load_classifier(tmp_path / "checkpoint-99.pth")
    assert (subject.seed, subject.architecture, len(subject.digest)) == (3, "ViT-tiny/16, 32 px", 64)
    torch.testing.assert_close(logits(subject), original(IMAGES).detach())


@pytest.mark.parametrize(("pool", "more"), [("avg", {}), ("token", {}), ("avg", {"fc_norm": False})])
def test_timm_folders_yield_the_logits_of_timm(tmp_path, pool, more):
    original = vit(pool, **more)
    subject = load_classifier(write_timm(tmp_path, original, pool))
    torch.testing.assert_close(logits(subject), original(IMAGES).detach())
    assert subject.mean == (0.286,) * 3


def test_a_transformers_folder_yields_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=6)
    original = transformers.ViTForImageClassification(config).eval()
    torch.nn.init.normal_(original.classifier.bias)
    original.save_pretrained(tmp_path)
    subject = load_classifier(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(logits(subject), original(pixel_values=IMAGES).logits, atol=1e-5, rtol=1e-5)


def test_another_image_size_interpolates_the_position_embedding(golden, tmp_path):
    """The position embedding itself is also compared with the reference's fine-tuning."""
    values, _ = golden("recipe.safetensors")
    after = resize_pos_embed(values["interp.before"], (7, 7), (10, 10))
    torch.testing.assert_close(after, values["interp.after"], atol=1e-6, rtol=0)
    original = vit()
    write_timm(tmp_path, original)
    bigger = vit(img_size=48)
    state = original.state_dict() | {"pos_embed": resize_pos_embed(original.pos_embed.detach(), (4, 4), (6, 6))}
    bigger.load_state_dict(state)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(logits(load_classifier(tmp_path, size=48), images), bigger(images).detach())
    with pytest.raises(CheckpointError, match="--size 33 is not a multiple of the patch size, 8 x 8"):
        load_classifier(tmp_path, size=33)


def test_weights_without_a_linear_head_raise_one_line_errors(tmp_path):
    cases = {
        "no head": ({"num_classes": 0}, {}, "an encoder without a classification head; .* scale-mae knn"),
        "two layers": ({}, {"head.extra.weight": torch.ones(2, 2)}, "the head is not one linear layer"),
        "a head of another width": (
            {},
            {"head.weight": torch.ones(10, 31)},
            r"not one linear layer on 32 features .*head.weight .10, 31",
        ),
        "NaN": ({}, {"head.bias": torch.full((10,), torch.nan)}, "head.bias contains NaN or infinity"),
    }
    for name, (more, changes, message) in cases.items():
        folder = write_timm(tmp_path / name, vit(**more))
        save_file(vit(**more).state_dict() | changes, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_classifier(folder)
        assert "\n" not in str(caught.value)
    oblong = write_timm(tmp_path / "oblong", vit())
    text = (oblong / "config.json").read_text().replace('"img_size": 32', '"img_size": [16, 64]')
    (oblong / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="evaluation needs square images: set --size N"):
        load_classifier(oblong)


def test_the_encoder_of_a_classifier_yields_its_features(tmp_path):
    original = vit()
    folder = write_timm(tmp_path / "original", original)
    subject = load_frozen_encoder(folder)
    assert subject.classes == 0
    with torch.inference_mode():
        tokens = subject.model.forward_features(IMAGES)
        expected = original.forward_head(original.forward_features(IMAGES), pre_logits=True)
        torch.testing.assert_close(subject.model.fc_norm(tokens[:, 1:].mean(1)), expected)
    assert load_encoder(folder).fc_norm.weight.equal(original.fc_norm.weight)


def test_an_exported_file_is_an_encoder_but_not_a_classifier(tmp_path):
    config = load_config("debug", ["run.seed=5"])
    state, metadata = encoder_state(build_mae_from_config(config).state_dict()), build_metadata(config, 7)
    save_file(state, tmp_path / "e.safetensors", {METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(CheckpointError, match="an encoder without a classification head"):
        load_classifier(tmp_path / "e.safetensors")
    subject = load_frozen_encoder(tmp_path / "e.safetensors")
    assert (subject.seed, subject.classes, subject.kind) == (5, 0, "scale-mae export")
