"""Weights from elsewhere: every format, strictly, on every process; encoders of others computing what they compute at home."""

import argparse
import copy
import functools
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from ranks import RankError, run_ranks
from safetensors.torch import load_file, save_file
from test_model import golden_weights, tiny
from test_trainer import log, make_config, train, weights

from scale_mae import UserError, load_encoder
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.cli import main
from scale_mae.config import load_config
from scale_mae.model.mae import build_mae
from scale_mae.model.pos_embed import resize_pos_embed, sincos_pos_embed
from scale_mae.weights.convert import convert
from scale_mae.weights.initialization import load_initial_model, load_initial_weights
from scale_mae.weights.model_loader import load_untrained_encoder
from scale_mae.weights.weight_import import is_decoder_key, locate_weights, read_weights

NANO = {"image_size": (32, 32), "patch_size": (8, 8), "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}
TIMM = {"embed_dim": 96, "depth": 6, "num_heads": 3, "img_size": 32, "patch_size": 8}


def nano(seed=1, **sizes):
    return build_mae("nano", seed=seed, **NANO | sizes)


def stir(module, seed=0):
    """Random values everywhere, also where initialisation puts ones and zeros, so that nothing can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "pos_embed" not in name and "position_embeddings" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (p.dim() == 1 and name.endswith("norm.weight")))
    return module.eval()


@functools.cache
def _trained():
    return stir(nano()).state_dict()


def trained():
    """Weights of a nano MAE; a new dictionary each time."""
    return dict(_trained())


@functools.cache
def _fresh():
    return nano()


def reference_file(path, state, **more):
    """As the reference's pre-training saves, but for a model of its sizes."""
    args = argparse.Namespace(model="mae_vit_tiny_patch16", norm_pix_loss=True, resume="", lr=1e-3)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"model": state, "optimizer": optimizer, "epoch": 399, "scaler": {"scale": 65536.0}, "args": args} | more, path)
    return path


def begin(path, model=None):
    model = model or copy.deepcopy(_fresh())
    return model, load_initial_weights(model, read_weights(locate_weights(path, print)))


def assert_equal(got, expected):
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))

# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize(("target", "prefix"), [("norm_pixel", "norm_pix"), ("pixel", "raw_pix")])
def test_a_file_of_the_reference_gives_its_loss_and_prediction(golden, tmp_path, target, prefix):
    tensors, _ = golden("mae_tiny.safetensors")
    reference_file(tmp_path / "mae.pth", golden_weights(tensors), args=argparse.Namespace(model="mae_vit_x"))
    model, note = begin(tmp_path / "mae.pth", tiny(target))
    out = model(tensors["images"], tensors["noise"])
    assert out.loss.item() == pytest.approx(tensors[f"{prefix}.loss"].item(), abs=1e-5)
    torch.testing.assert_close(out.pred, tensors[f"{prefix}.pred"], atol=1e-5, rtol=0)
    assert "MAE with the reference's names, epoch 399, SHA-256 " in note
    assert "decoder" not in note


def wrap(prefix):
    return lambda state: {f"{prefix}{n}": t for n, t in state.items()}


FORMS = {
    "wrapped": lambda state: {"model": state},
    "plain": lambda state: state,
    "data parallel": wrap("module."),
    "compiled": wrap("_orig_mod."),
    "blocks compiled": lambda state: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in state.items()},
    "a backbone": lambda state: {"state_dict": wrap("module.backbone.")(state)},
    "with parameters": lambda state: {"model": {n: torch.nn.Parameter(t) for n, t in state.items()}},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 2020"])
@pytest.mark.parametrize("form", FORMS)
def test_prefixes_and_wrappers_are_understood(tmp_path, form, legacy):
    state = trained()
    torch.save(FORMS[form](state), tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    model, note = begin(tmp_path / "w")
    assert_equal(model.state_dict(), state)
    assert "left out" not in note


def test_an_encoder_alone_leaves_the_decoder_at_its_random_start_and_says_so(tmp_path):
    state = {n: t for n, t in trained().items() if not is_decoder_key(n)}
    reference_file(tmp_path / "e.pth", state | {"head.weight": torch.zeros(3, 96), "head.bias": torch.zeros(3)}, args=None)
    model, note = begin(tmp_path / "e.pth")
    fresh = nano().state_dict()
    assert_equal(model.state_dict(), state | {n: t for n, t in fresh.items() if is_decoder_key(n)})
    assert "; skipped head.weight (and 1 more); the decoder starts random, because the file has none" in note
    assert "\n" not in note


# ---------------------------------------------------------------- strictness

WITHOUT = object()
MISFITS = {
    "a block's bias": ({"blocks.3.mlp.fc2.bias": WITHOUT}, "missing key blocks.3.mlp.fc2.bias$"),
    "the class token": ({"cls_token": WITHOUT, "norm.bias": WITHOUT}, r"missing key cls_token \(and 1 more\)"),
    "a table": ({"pos_embed": WITHOUT}, "missing key pos_embed"),
    "half a decoder": (
        {"decoder_norm.weight": WITHOUT},
        "missing key decoder_norm.weight; a decoder must be complete or absent",
    ),
    "attention biases": (
        {f"blocks.{i}.attn.qkv.bias": WITHOUT for i in range(6)},
        r"missing key blocks.0.attn.qkv.bias \(and 5 more\); its attention has no biases",
    ),
    "an attention bias": ({"blocks.2.attn.qkv.bias": WITHOUT}, "missing key blocks.2.attn.qkv.bias$"),
    "integers": (
        {"blocks.1.norm1.bias": torch.ones(96, dtype=torch.int64)},
        "blocks.1.norm1.bias has dtype int64, expected floating point",
    ),
    "integers in a table": (
        {"pos_embed": torch.ones(1, 17, 96, dtype=torch.uint8)},
        "pos_embed has dtype uint8, expected floating point",
    ),
    "NaN in a table": (
        {"decoder_pos_embed": torch.full((1, 17, 64), torch.nan)},
        "decoder_pos_embed holds NaN or infinity",
    ),
    "the norm behind": (
        {"norm.weight": WITHOUT, "norm.bias": WITHOUT, "fc_norm.weight": torch.ones(96)},
        r"missing key norm.weight \(and 1 more\); a classifier that was fine-tuned with mean pooling",
    ),
    "layer scale": ({"blocks.0.ls1.gamma": torch.ones(96)}, "unexpected key blocks.0.ls1.gamma; a MAE has no layer scale"),
    "registers": ({"reg_token": torch.ones(1, 4, 96)}, "unexpected key reg_token; a MAE has no register tokens"),
    "qk norm": ({"blocks.5.attn.q_norm.weight": torch.ones(32)}, "q_norm.weight; a MAE has no query and key normalization"),
    "anything": ({"what": torch.ones(1), "ever": torch.ones(1)}, r"unexpected key ever \(and 1 more\)$"),
    "beside a prefix": ({"neck.conv.weight": torch.ones(1)}, "unexpected key neck.conv.weight"),
    "another encoder": ({"teacher.patch_embed.proj.weight": torch.ones(1)}, "holds 2 encoders"),
    "NaN": ({"blocks.1.norm1.bias": torch.full((96,), torch.nan)}, "blocks.1.norm1.bias holds NaN or infinity"),
    "grey": ({"patch_embed.proj.weight": torch.ones(96, 1, 8, 8)}, r"\[96, 1, 8, 8\].*Its images have 1 channel, not 3"),
    "a shape": ({"norm.bias": torch.ones(95)}, r"norm.bias has shape \[95\], the model \[96\]"),
    "no square": ({"pos_embed": torch.ones(1, 16, 96)}, r"pos_embed has shape \[1, 16, 96\]; its grid of patches is unknown"),
    "a flat table": ({"pos_embed": torch.ones(17, 96)}, r"pos_embed has shape \[17, 96\]; its grid"),
    "tables of two": ({"decoder_pos_embed": torch.ones(1, 26, 64)}, r"decoder_pos_embed .* does not match 4 x 4 patches"),
    "not a ViT": ({"patch_embed.proj.weight": WITHOUT}, "not the weights of a ViT"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_nothing_may_be_missing_or_superfluous(tmp_path, changes, message):
    state = trained() | changes
    save_file({n: t.clone() for n, t in state.items() if t is not WITHOUT}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        begin(tmp_path / "w.safetensors")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "tiny"}, r"has 12 blocks, the model has 6 .*Set model.size=tiny"),
        (
            {"patch_size": (4, 4)},
            r"patch_embed.proj.weight has shape \[96, 3, 4, 4\], the model \[96, 3, 8, 8\]. .*patch_size=\[4, 4\]",
        ),
        ({"decoder_width": 32}, r"\[1, 1, 32\], the model \[1, 1, 64\]. Set model.decoder_width=32"),
        ({"decoder_depth": 2}, r"has 2 decoder_blocks, the model has 1 .*Set model.decoder_depth=2"),
    ],
)
def test_another_size_names_both_shapes_and_the_key_to_change(tmp_path, changes, message):
    state = build_mae(**({"size": "nano"} | NANO | changes)).state_dict()
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        begin(tmp_path / "w.pth")


def test_heads_that_shapes_do_not_show_are_compared_where_something_says_them(tmp_path):
    reference_file(tmp_path / "w.pth", trained(), args=argparse.Namespace(model="mae_vit_large_patch16"))
    with pytest.raises(CheckpointError, match=r"has 16 attention heads, the model has 3. Change model\.size"):
        begin(tmp_path / "w.pth")


# ---------------------------------------------------------------- containers


def spoil(path, content):
    path.write_bytes(content)
    return path


def test_the_content_tells_the_format_not_the_name(tmp_path):
    state = trained()
    save_file(state, tmp_path / "pytorch_model.bin")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert_equal(begin(tmp_path / name)[0].state_dict(), state)


def test_damaged_and_strange_files_are_one_line(tmp_path):
    torch.save(trained(), tmp_path / "w.pth")
    save_file(trained(), tmp_path / "w.safetensors")
    whole, header = (tmp_path / "w.pth").read_bytes(), (tmp_path / "w.safetensors").read_bytes()
    with zipfile.ZipFile(tmp_path / "p.pt2", "w") as program:
        program.writestr("p/archive_format", "pt2")
    for content, message in [
        (b"", "an empty file"),
        (b"hello", "not a file of weights"),
        (whole[:-30], "truncated"),
        (whole[: len(whole) // 2], "truncated"),
        (header[:-30], "not a readable safetensors file"),
        (b"\x80\x02]q\x00.", "cannot be read|holds a list"),
        ((tmp_path / "p.pt2").read_bytes(), "a torch.export program"),
        (b"\x08\x0a\x12\x07pytorch", "an ONNX model"),
        (b'{"weight_map": []}', "weight_map is empty"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: missing"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            begin(spoil(tmp_path / "x", content))
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        begin(tmp_path / "x")
    torch.save({"epoch": 3}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds no state dict; its keys are epoch"):
        begin(tmp_path / "x")
    with pytest.raises(CheckpointError, match="absent: no such file or folder"):
        begin(tmp_path / "absent")
    shutil.copy(tmp_path / "w.safetensors", tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 files of weights \(v\.safetensors, \.\.\.\)"):
        begin(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint nor a folder of weights"):
        begin(tmp_path / "empty")


@pytest.mark.parametrize("form", ["a file", "one of two files"])
def test_a_bit_in_the_middle_of_an_archive_is_found(tmp_path, form):
    state = trained()
    path = victim = tmp_path / "pytorch_model.bin"
    if form == "a file":
        torch.save(state, path)
    else:
        places = {name: f"part-{number % 2}.bin" for number, name in enumerate(state)}
        for part in sorted(set(places.values())):
            torch.save({name: state[name] for name in state if places[name] == part}, victim := tmp_path / part)
        (path := tmp_path / "w.bin.index.json").write_text(json.dumps({"weight_map": places}))
    begin(path)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    for use in (begin, load_encoder):
        with pytest.raises(CheckpointError, match=rf"{victim.name}: damaged \(.*/data/\d+\)"):
            use(path)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, legacy):
    content = {"model": trained(), "args": Evil(tmp_path / "ran")}
    torch.save(content, tmp_path / "w.pth", pickle_module=pickle, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"w\.pth: refused, because unpickling it would call posix.mkdir"):
        begin(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": [1, 2, 3]}),
        pickle.dumps({"a": Path("x")}),
        pickle.dumps({"a": range(3)}, protocol=2),
        pickle.dumps({"a": {1, 2}}, protocol=4),
        b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01cposix\nsystem\nq\x02s.",
        b"\x80\x02\xff.",
        b"\x80\x04.",
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_torchs_advice_to_read_without_restriction_is_never_shown(tmp_path, content, zipped):
    path = tmp_path / "raw.pkl.pt"
    path.write_bytes(content)
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, entry in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"x/{name}", entry)
    for use in (begin, load_encoder):
        with pytest.raises(CheckpointError) as caught:
            use(path)
        assert not re.search("weights_only|torch.load|trusted|file an issue|documentation|\\n", str(caught.value))
        assert "()" not in str(caught.value)


# ---------------------------------------------------------------- timm


def timm_encoder(**more):
    return stir(timm.create_model("vit_tiny_patch16_224", **TIMM | more))


@pytest.mark.parametrize("kind", ["file", "folder", "pickles"])
def test_timm_weights_compute_timms_features(tmp_path, kind):
    theirs = timm_encoder(num_classes=7)
    if kind == "file":
        save_file(theirs.state_dict(), tmp_path / "w.safetensors")
        path = tmp_path / "w.safetensors"
    else:
        path = tmp_path / "folder"
        timm.models.save_for_hf(theirs, str(path), safe_serialization=kind == "folder")
        config = json.loads((path / "config.json").read_text())
        config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
        (path / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        expected = theirs.forward_features(IMAGES)
        model, note = begin(path)
        torch.testing.assert_close(model.features(IMAGES), expected, atol=1e-5, rtol=1e-5)
        encoder = load_encoder(path)
        torch.testing.assert_close(encoder.forward_features(IMAGES), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.pos_embed, theirs.pos_embed)
    assert re.search(r"skipped head\.(weight|bias) \(and 1 more\)", note)
    assert "pos_embed is not the sine-cosine table and is kept without training it" in note
    said = (0.1, 0.2, 0.3) if kind != "file" else (0.485, 0.456, 0.406)
    assert encoder.pretrained_cfg["mean"] == said
    assert encoder.pretrained_cfg["std"] == ((0.5,) * 3 if kind != "file" else (0.229, 0.224, 0.225))
    assert encoder.pretrained_cfg["input_size"] == (3, 32, 32)


def test_encoders_of_any_size_are_measured_or_refused(tmp_path):
    theirs = timm_encoder(patch_size=(8, 4), mlp_ratio=48 / 11, num_classes=0, img_size=(32, 16))
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    with torch.inference_mode():
        images = IMAGES[..., :16]
        torch.testing.assert_close(
            load_encoder(tmp_path / "w.safetensors").forward_features(images), theirs.forward_features(images)
        )
    for more, message in [
        ({"depth": 5}, r"the number of attention heads is unknown \(width 96, depth 5\)"),
        ({"init_values": 1.0}, r"blocks.0.ls1.gamma \(and 11 more\); a MAE has no layer scale"),
        ({"qk_norm": True}, "query and key normalization"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"class_token": False, "global_pool": "avg"}, "missing key cls_token|grid of patches"),
        ({"mlp_layer": timm.layers.SwiGLU}, "not the weights of a plain ViT|gated MLP"),
    ]:
        save_file(timm_encoder(**more).state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_encoder(tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)


def test_what_a_timm_folder_says_is_not_trusted(tmp_path):
    timm.models.save_for_hf(timm_encoder(), str(tmp_path / "f"))
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    for changes, message in [
        ({"architecture": "local-dir:/tmp"}, "timm has no architecture 'local-dir:/tmp'"),
        ({"architecture": "resnet18"}, "timm's resnet18 is not a plain ViT but ResNet"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "the activation of timm's .* is not supported"),
        ({"model_args": {"num_heads": 4}}, "has 4 attention heads, the model has 3. Change model.size"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "the metadata are damaged"),
    ]:
        (tmp_path / "f" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            begin(tmp_path / "f")


# ---------------------------------------------------------------- Hugging Face

SIZES = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384}
SIDES = {"image_size": 32, "patch_size": 8}
DECODER = {f"decoder_{key}": value for key, value in (
    ("hidden_size", 64), ("num_hidden_layers", 1), ("num_attention_heads", 2), ("intermediate_size", 256)
)}  # fmt: skip


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_vit_mae_gives_transformers_loss_for_equal_noise(tmp_path, eps):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(**SIZES, **SIDES, **DECODER, norm_pix_loss=True, layer_norm_eps=eps)
    theirs = stir(ViTMAEForPreTraining(config))
    theirs.vit.embeddings.position_embeddings.data = sincos_pos_embed(96, (4, 4))
    theirs.decoder.decoder_pos_embed.data = sincos_pos_embed(64, (4, 4))
    theirs.save_pretrained(tmp_path)
    model, note = begin(tmp_path)
    with torch.inference_mode():
        expected, got = theirs(IMAGES, noise=NOISE), model.eval()(IMAGES, NOISE)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5 if eps == 1e-6 else 1e-3)
    torch.testing.assert_close(got.pred, expected.logits, atol=1e-5 if eps == 1e-6 else 1e-2, rtol=1e-4)
    assert torch.equal(model.pos_embed, sincos_pos_embed(96, (4, 4)))
    assert "Hugging Face ViTMAEForPreTraining" in note
    assert ("norm epsilon changed from 1e-12 to 1e-06" in note) == (eps == 1e-12)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEModel", "sharded", "pickle", "file"])
def test_transformers_encoders_compute_their_features(tmp_path, kind):
    import transformers

    name = kind if kind.startswith("ViT") else "ViTModel"
    made = getattr(transformers, "ViTMAEConfig" if "MAE" in kind else "ViTConfig")
    theirs = stir(getattr(transformers, name)(made(**SIZES, **SIDES)))
    for block in getattr(theirs, "vit", theirs).modules():  # small inputs of the norms, to which epsilon matters
        if isinstance(block, torch.nn.LayerNorm):
            block.weight.data += 1
    theirs.save_pretrained(tmp_path, max_shard_size="300KB" if kind == "sharded" else "1GB")
    if kind == "pickle":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "sharded")
    encoder = load_encoder(tmp_path / "model.safetensors" if kind == "file" else tmp_path)
    with torch.inference_mode():
        if kind == "ViTMAEModel":
            theirs.config.mask_ratio = 0.0
            hidden = theirs(IMAGES, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        else:
            hidden = getattr(theirs, "vit", theirs)(IMAGES).last_hidden_state
        torch.testing.assert_close(encoder.forward_features(IMAGES), hidden, atol=1e-4, rtol=1e-5)
    assert encoder.norm.eps == 1e-12
    assert encoder.pretrained_cfg["std"] == (0.25,) * 3


def test_what_a_transformers_folder_says_is_compared(tmp_path):
    from transformers import ViTConfig, ViTModel

    stir(ViTModel(ViTConfig(**SIZES, **SIDES))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in [
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported"),
        ({"num_attention_heads": 4}, "has 4 attention heads, the model has 3. Change model.size"),
        ({"layer_norm_eps": "small"}, "the metadata are damaged"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            begin(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.4.attention.attention.key.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"blocks\.4\.attn\.qkv\.bias: key missing"):
        begin(tmp_path)


JUNK = ["abc", 5, 0, -3, 2.5, 1e999, True, None, [], {}, [0, 0], [-32, -32], "nan", 10**30]


def says(folder, file, *keys):
    """Let a JSON file say junk under some keys, one after the other; yields which."""
    whole = json.loads((folder / file).read_text())
    for key in keys:
        for junk in JUNK:
            content = copy.deepcopy(whole)
            *outer, last = key.split("/")
            functools.reduce(dict.__getitem__, outer, content)[last] = junk
            (folder / file).write_text(json.dumps(content))
            yield key, junk
        content = copy.deepcopy(whole)
        del functools.reduce(dict.__getitem__, outer, content)[last]
        (folder / file).write_text(json.dumps(content))
        yield key, "nothing"
    (folder / file).write_text(json.dumps(whole))


@pytest.mark.parametrize("kind", ["transformers", "timm", "ours"])
def test_no_junk_that_a_folder_says_of_itself_makes_a_stack_trace(runs, tmp_path, kind):
    """It is one line, or does not matter: then what was loaded computes finite numbers."""
    folder = tmp_path / "f"
    if kind == "ours":
        convert(runs["zero2", "fp32"][0], "timm", folder)
        keys = [f"timm_kwargs/{key}" for key in json.loads((folder / "scale_mae.json").read_text())["timm_kwargs"]]
        keys += ["timm_name", "timm_kwargs", "image_size", "mean", "std", "layer_norm_eps", "step", "interpolation", "config"]
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors")  # the facts lie in both
        file = "scale_mae.json"
    elif kind == "timm":
        timm.models.save_for_hf(timm_encoder(num_classes=0), str(folder))
        keys, file = (
            ["architecture", "model_args", "model_args/num_heads", "model_args/img_size", "pretrained_cfg/std"],
            "config.json",
        )
    else:
        from transformers import ViTConfig, ViTModel

        stir(ViTModel(ViTConfig(**SIZES, **SIDES))).save_pretrained(folder)
        keys, file = ["num_attention_heads", "image_size", "layer_norm_eps", "hidden_act", "architectures"], "config.json"
    refused = set()
    for key, junk in says(folder, file, *keys):
        try:
            encoder = load_encoder(folder)
        except CheckpointError as error:
            assert "\n" not in str(error), (key, junk)  # noqa: PT017
            refused.add((key, str(junk)))
        else:
            images = torch.zeros(1, 3, *encoder.pretrained_cfg["input_size"][1:])
            assert encoder.forward_features(images).isfinite().all(), (key, junk)
    heads = {"ours": "timm_kwargs/num_heads", "timm": "model_args/num_heads", "transformers": "num_attention_heads"}[kind]
    assert refused >= {(heads, junk) for junk in ("abc", "5", "0", "-3", "2.5", "True", "[]")}
    assert kind != "ours" or refused >= {("timm_name", "nothing"), ("timm_kwargs", "abc"), ("mean", "[]")}
    load_encoder(folder)


# ---------------------------------------------------------------- our own


@pytest.mark.parametrize(
    "form", ["run", "checkpoint", "deepspeed folder", "state_dict", "mae", "vit_mae", "vit", "timm", "avg"]
)
def test_our_runs_and_exports_are_taken_too(runs, tmp_path, form):
    run_dir, live = runs["zero3", "bf16"]
    path = {
        "run": run_dir,
        "checkpoint": locate_checkpoint(run_dir, print),
        "deepspeed folder": locate_checkpoint(run_dir, print) / "deepspeed",
    }.get(form)
    if path is None:
        suffix = {"state_dict": "", "mae": ".pth", "vit_mae": "", "vit": ""}.get(form, ".safetensors")
        pool = "avg" if form == "avg" else "token"
        path = convert(run_dir, "timm" if form == "avg" else form, tmp_path / f"out{suffix}", pool=pool)
    model, note = begin(path)
    whole = form not in ("vit", "timm", "avg")
    for name, value in live.items():
        if whole or not is_decoder_key(name):
            assert torch.equal(model.state_dict()[name], torch.from_numpy(value)), name
    assert ("starts random" in note) == (not whole)
    assert "step 3" in note
    with torch.inference_mode():
        encoder = load_encoder(path) if form != "deepspeed folder" else None
        if encoder and form != "avg":
            torch.testing.assert_close(encoder.forward_features(IMAGES), model.eval().features(IMAGES), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- position tables


def test_tables_are_interpolated_to_another_image_size_and_that_is_said(tmp_path):
    torch.save({"model": trained()}, tmp_path / "w.pth")
    model, note = begin(tmp_path / "w.pth", nano(image_size=(64, 32)))
    for name, width in (("pos_embed", 96), ("decoder_pos_embed", 64)):
        assert torch.equal(getattr(model, name), resize_pos_embed(sincos_pos_embed(width, (4, 4)), (4, 4), (8, 4)))
        assert f"{name} interpolated from 4 x 4 to 8 x 4 patches" in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_sine_cosine_table_becomes_the_exact_one(tmp_path, dtype):
    torch.save({n: t.to(dtype) for n, t in trained().items()}, tmp_path / "w.pth")
    model, note = begin(tmp_path / "w.pth")
    assert torch.equal(model.pos_embed, sincos_pos_embed(96, (4, 4)))
    assert torch.equal(model.decoder_pos_embed, sincos_pos_embed(64, (4, 4)))
    assert torch.equal(model.norm.weight, trained()["norm.weight"].to(dtype).float())
    assert "sine-cosine" not in note


def test_a_table_of_another_grid_with_as_many_patches_is_told_apart(tmp_path):
    """16 patches as 2 x 8 and as 4 x 4."""
    torch.save(nano(image_size=(16, 64)).state_dict(), tmp_path / "w.pth")
    model, note = begin(tmp_path / "w.pth", nano(image_size=(16, 64)))
    assert torch.equal(model.pos_embed, sincos_pos_embed(96, (2, 8)))
    assert "interpolated" not in note
    torch.save(trained(), tmp_path / "w.pth")
    model, note = begin(tmp_path / "w.pth", nano(image_size=(16, 64)))
    assert torch.equal(model.pos_embed, resize_pos_embed(sincos_pos_embed(96, (4, 4)), (4, 4), (2, 8)))
    assert "pos_embed interpolated from 4 x 4 to 2 x 8 patches" in note


# ---------------------------------------------------------------- runs


def train_several(configs, stops):
    """Runs one after the other in one set of ranks, each to its own step; what they said and where they came."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    torch.set_num_threads(1)
    tables = []
    with process_group() as ranks:
        for config, stop in zip(configs, stops, strict=True):
            with StopRequest() as request:
                run = Trainer(config, ranks, request, Watchdog(0, 0))
                original = run.log.write_metrics

                def metrics(values, original=original, request=request, stop=stop):
                    original(values)
                    if values["step"] >= stop:
                        request.ask("the test")

                run.log.write_metrics = metrics
                run.train()
                tables.append((run.engine.model.pos_embed.dtype, run.engine.model.pos_embed.clone().numpy()))
    return tables


def said(run_dir):
    return (Path(run_dir) / "log.txt").read_text()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Of ZeRO-2 and 3 in bf16: a run that begins with a learned table, and one that is stopped, its file deleted, resumed."""
    folder = tmp_path_factory.mktemp("learned")
    theirs = timm_encoder()
    file, gone = folder / "timm.safetensors", folder / "gone.safetensors"
    for path in (file, gone):
        save_file(theirs.state_dict(), path)
    configs = {}
    for stage in ("zero2", "zero3"):
        setting = {"engine.deepspeed": stage, "train.precision": "bf16", "train.duration": "6 steps", "optim.warmup": "1 steps"}
        configs[stage] = make_config(folder / stage, **setting, **{"model.init_from": str(file)})
        configs[f"{stage} resumed"] = make_config(folder / f"{stage}-r", **setting, **{"model.init_from": str(gone)})
    told = run_ranks(2, train_several, list(configs.values()), [6, 3, 6, 3])
    gone.unlink()
    told += run_ranks(2, train_several, [c for n, c in configs.items() if "resumed" in n], [6, 6])
    return theirs, configs, told


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_learned_table_stays_exact_through_bf16_resume_and_export(learned, tmp_path, stage):
    theirs, configs, told = learned
    table = theirs.pos_embed.detach()
    assert not torch.equal(table, table.bfloat16().float())
    for tables in told:
        for dtype, value in tables:
            assert dtype == torch.float32
            assert torch.equal(torch.from_numpy(value), table)
    straight, resumed = configs[stage], configs[f"{stage} resumed"]
    assert "Resumed from" in said(resumed.run.dir)
    assert log(resumed.run.dir, "loss", "lr") == log(straight.run.dir, "loss", "lr")
    assert_equal(weights(resumed.run.dir, 6), weights(straight.run.dir, 6))
    out = convert(resumed.run.dir, "timm", tmp_path / "e.safetensors")
    assert torch.equal(load_file(out)["pos_embed"], table)
    assert torch.equal(load_encoder(resumed.run.dir).pos_embed, table)


def test_a_run_tells_once_what_it_began_with(learned):
    _, configs, _ = learned
    text = said(configs["zero2"].run.dir)
    began = [line for line in text.splitlines() if "initialized from" in line]
    assert len(began) == 1
    assert re.search(
        r"timm.safetensors \(ViT with timm's names, SHA-256 [0-9a-f]{16}\); skipped .*; the decoder starts random", began[0]
    )
    assert said(configs["zero2 resumed"].run.dir).count("initialized from") == 1


def test_the_untrained_encoder_is_the_one_that_the_run_began_with(learned):
    theirs, configs, _ = learned
    assert_equal(theirs.state_dict(), load_untrained_encoder(configs["zero2"].run.dir).state_dict())
    trained = load_encoder(configs["zero2"].run.dir)
    assert not torch.equal(trained.norm.weight, theirs.norm.weight)
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file or folder"):
        load_untrained_encoder(configs["zero2 resumed"].run.dir)


def train_in(folders, config):
    os.chdir(folders[int(os.environ["RANK"])])
    return train(config)


@pytest.mark.parametrize("second", ["other", "misfit", "absent"])
def test_processes_agree_on_errors_and_on_the_weights(tmp_path, second):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    torch.save(trained(), folders[0] / "w.pth")
    state = {"other": trained() | {"norm.bias": torch.ones(96)}, "misfit": {"patch_embed.proj.weight": torch.ones(1)}}.get(
        second
    )
    if state:
        torch.save(state, folders[1] / "w.pth")
    message = {"other": "the weights differ between ranks", "misfit": "has 0 blocks", "absent": "w.pth: no such file"}[second]
    with pytest.raises(RankError, match=message) as caught:
        run_ranks(2, train_in, folders, make_config(tmp_path / "run", **{"model.init_from": "w.pth"}))
    assert caught.value.kinds == ["UserError" if second == "other" else "CheckpointError"] * 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_init_writes_what_a_run_begins_with(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(timm_encoder().state_dict(), "timm.safetensors")
    words = ["init", "timm.safetensors", "debug", "--out", "initial.safetensors", "model.image_size=64", "run.seed=5"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "initial.safetensors: initialized from timm.safetensors (ViT with timm's names" in told
    assert "pos_embed interpolated from 4 x 4 to 8 x 8 patches" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["initial.safetensors", "timm.safetensors"]
    config = load_config("debug", ["model.image_size=64", "run.seed=5", "model.init_from=timm.safetensors"])
    assert main(["inspect", "initial.safetensors"]) == 0
    assert re.search(r"^initialized from +timm.safetensors \(ViT", capsys.readouterr().out, re.M)
    model, _ = load_initial_model(config, print)
    assert_equal(load_file("initial.safetensors"), model.state_dict())
    again, _ = begin("initial.safetensors", nano(image_size=(64, 64)))
    assert_equal(again.state_dict(), model.state_dict())
    assert_equal(model.state_dict(), load_encoder("initial.safetensors").state_dict())
    for words, message in [
        (["init", "timm.safetensors", "vit_base", "--out", "x.safetensors"], "Set model.size=nano|No model.size"),
        (["init", "timm.safetensors", "debug", "--out", "x.pth"], "not a file name that ends in .safetensors"),
        (["init", "absent", "debug", "--out", "x.safetensors"], "absent: no such file or folder"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("x*"))
