"""Initialization from weights of every source: strict matching, the same on every rank, and outputs equal to the original's."""

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


def randomize(module, seed=0):
    """Fill all parameters with random values. Initial ones and zeros would hide parameters that are mixed up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "pos_embed" not in name and "position_embeddings" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (p.dim() == 1 and name.endswith("norm.weight")))
    return module.eval()


@functools.cache
def _trained():
    return randomize(nano()).state_dict()


def trained():
    """Return the state dict of a randomized nano MAE, as a new dictionary."""
    return dict(_trained())


@functools.cache
def _fresh():
    return nano()


def write_reference_file(path, state, **entries):
    """Write a checkpoint as the pre-training of the reference repository does."""
    args = argparse.Namespace(model="mae_vit_tiny_patch16", norm_pix_loss=True, resume="", lr=1e-3)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save(
        {"model": state, "optimizer": optimizer, "epoch": 399, "scaler": {"scale": 65536.0}, "args": args} | entries, path
    )
    return path


def initialize(path, model=None):
    """Load the weights at a path into a MAE. Return the MAE and the message."""
    model = model or copy.deepcopy(_fresh())
    return model, load_initial_weights(model, read_weights(locate_weights(path, print)))


def assert_equal(actual, expected):
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))

# ---------------------------------------------------------------- reference repository


@pytest.mark.parametrize(("target", "prefix"), [("norm_pixel", "norm_pix"), ("pixel", "raw_pix")])
def test_a_file_of_the_reference_computes_its_loss_and_prediction(golden, tmp_path, target, prefix):
    tensors, _ = golden("mae_tiny.safetensors")
    write_reference_file(tmp_path / "mae.pth", golden_weights(tensors), args=argparse.Namespace(model="mae_vit_x"))
    model, message = initialize(tmp_path / "mae.pth", tiny(target))
    output = model(tensors["images"], tensors["noise"])
    assert output.loss.item() == pytest.approx(tensors[f"{prefix}.loss"].item(), abs=1e-5)
    torch.testing.assert_close(output.pred, tensors[f"{prefix}.pred"], atol=1e-5, rtol=0)
    assert "MAE with reference keys, epoch 399, SHA-256 " in message
    assert "decoder" not in message


def add_prefix(prefix):
    return lambda state: {f"{prefix}{n}": t for n, t in state.items()}


WRAPPERS = {
    "wrapped": lambda state: {"model": state},
    "plain": lambda state: state,
    "data parallel": add_prefix("module."),
    "compiled": add_prefix("_orig_mod."),
    "blocks compiled": lambda state: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in state.items()},
    "a backbone": lambda state: {"state_dict": add_prefix("module.backbone.")(state)},
    "with parameters": lambda state: {"model": {n: torch.nn.Parameter(t) for n, t in state.items()}},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 2020"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_and_wrappers_are_removed(tmp_path, wrapper, legacy):
    state = trained()
    torch.save(WRAPPERS[wrapper](state), tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    model, message = initialize(tmp_path / "w")
    assert_equal(model.state_dict(), state)
    assert "Skipped" not in message


def test_without_a_decoder_the_decoder_stays_random_and_the_message_says_so(tmp_path):
    state = {n: t for n, t in trained().items() if not is_decoder_key(n)}
    write_reference_file(
        tmp_path / "e.pth", state | {"head.weight": torch.zeros(3, 96), "head.bias": torch.zeros(3)}, args=None
    )
    model, message = initialize(tmp_path / "e.pth")
    fresh = nano().state_dict()
    assert_equal(model.state_dict(), state | {n: t for n, t in fresh.items() if is_decoder_key(n)})
    assert (
        " Skipped head.weight (and 1 more). The decoder starts with random weights, because the source has no decoder."
        in message
    )
    assert "\n" not in message


# ---------------------------------------------------------------- strict matching

REMOVED = object()
MISMATCHES = {
    "a block's bias": ({"blocks.3.mlp.fc2.bias": REMOVED}, r"missing key blocks.3.mlp.fc2.bias\.$"),
    "the class token": ({"cls_token": REMOVED, "norm.bias": REMOVED}, r"missing key cls_token \(and 1 more\)"),
    "a table": ({"pos_embed": REMOVED}, "missing key pos_embed"),
    "half a decoder": (
        {"decoder_norm.weight": REMOVED},
        "missing key decoder_norm.weight; a decoder must be complete or absent",
    ),
    "attention biases": (
        {f"blocks.{i}.attn.qkv.bias": REMOVED for i in range(6)},
        r"missing key blocks.0.attn.qkv.bias \(and 5 more\); its attention has no biases",
    ),
    "an attention bias": ({"blocks.2.attn.qkv.bias": REMOVED}, r"missing key blocks.2.attn.qkv.bias\.$"),
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
        "decoder_pos_embed contains NaN or infinity",
    ),
    "the norm behind": (
        {"norm.weight": REMOVED, "norm.bias": REMOVED, "fc_norm.weight": torch.ones(96)},
        r"missing key norm.weight \(and 1 more\); a classifier that was fine-tuned with mean pooling",
    ),
    "layer scale": ({"blocks.0.ls1.gamma": torch.ones(96)}, "unexpected key blocks.0.ls1.gamma; a MAE has no layer scale"),
    "registers": ({"reg_token": torch.ones(1, 4, 96)}, "unexpected key reg_token; a MAE has no register tokens"),
    "qk norm": ({"blocks.5.attn.q_norm.weight": torch.ones(32)}, "q_norm.weight; a MAE has no query and key normalization"),
    "anything": ({"what": torch.ones(1), "ever": torch.ones(1)}, r"unexpected key ever \(and 1 more\)\.$"),
    "beside a prefix": ({"neck.conv.weight": torch.ones(1)}, "unexpected key neck.conv.weight"),
    "another encoder": ({"teacher.patch_embed.proj.weight": torch.ones(1)}, "contains 2 encoders"),
    "NaN": ({"blocks.1.norm1.bias": torch.full((96,), torch.nan)}, "blocks.1.norm1.bias contains NaN or infinity"),
    "grey": ({"patch_embed.proj.weight": torch.ones(96, 1, 8, 8)}, r"\[96, 1, 8, 8\].*Its images have 1 channel, not 3"),
    "a shape": ({"norm.bias": torch.ones(95)}, r"norm.bias has shape \[95\], the model \[96\]"),
    "no square": ({"pos_embed": torch.ones(1, 16, 96)}, r"pos_embed has shape \[1, 16, 96\]; its grid of patches is unknown"),
    "a flat table": ({"pos_embed": torch.ones(17, 96)}, r"pos_embed has shape \[17, 96\]; its grid"),
    "tables of two": ({"decoder_pos_embed": torch.ones(1, 26, 64)}, r"decoder_pos_embed .* does not match 4 x 4 patches"),
    "not a ViT": ({"patch_embed.proj.weight": REMOVED}, "not the weights of a ViT"),
}


@pytest.mark.parametrize(("changes", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_mismatch_is_refused_in_one_line(tmp_path, changes, message):
    state = trained() | changes
    save_file({n: t.clone() for n, t in state.items() if t is not REMOVED}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        initialize(tmp_path / "w.safetensors")
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
def test_the_error_for_another_size_names_both_shapes_and_the_config_key(tmp_path, changes, message):
    state = build_mae(**({"size": "nano"} | NANO | changes)).state_dict()
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        initialize(tmp_path / "w.pth")


def test_the_number_of_attention_heads_is_compared_if_it_is_known(tmp_path):
    write_reference_file(tmp_path / "w.pth", trained(), args=argparse.Namespace(model="mae_vit_large_patch16"))
    with pytest.raises(CheckpointError, match=r"has 16 attention heads, the model has 3. Change model\.size"):
        initialize(tmp_path / "w.pth")


# ---------------------------------------------------------------- file formats


def overwrite(path, content):
    path.write_bytes(content)
    return path


def test_the_format_is_detected_by_content_not_by_name(tmp_path):
    state = trained()
    save_file(state, tmp_path / "pytorch_model.bin")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert_equal(initialize(tmp_path / name)[0].state_dict(), state)


def test_damaged_and_unknown_files_give_a_one_line_error(tmp_path):
    torch.save(trained(), tmp_path / "w.pth")
    save_file(trained(), tmp_path / "w.safetensors")
    pickled, safetensors = (tmp_path / "w.pth").read_bytes(), (tmp_path / "w.safetensors").read_bytes()
    with zipfile.ZipFile(tmp_path / "p.pt2", "w") as program:
        program.writestr("p/archive_format", "pt2")
    for content, message in [
        (b"", "an empty file"),
        (b"hello", "not a file of weights"),
        (pickled[:-30], "truncated"),
        (pickled[: len(pickled) // 2], "truncated"),
        (safetensors[:-30], "not a readable safetensors file"),
        (b"\x80\x02]q\x00.", "cannot be read|contains a list"),
        ((tmp_path / "p.pt2").read_bytes(), "a torch.export program"),
        (b"\x08\x0a\x12\x07pytorch", "an ONNX model"),
        (b'{"weight_map": []}', "weight_map is empty"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: missing"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            initialize(overwrite(tmp_path / "x", content))
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "x")
    with pytest.raises(CheckpointError, match="contains a list, not a state dict"):
        initialize(tmp_path / "x")
    torch.save({"epoch": 3}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="contains no state dict; its keys are epoch"):
        initialize(tmp_path / "x")
    with pytest.raises(CheckpointError, match="absent: no such file or folder"):
        initialize(tmp_path / "absent")
    shutil.copy(tmp_path / "w.safetensors", tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"contains 2 files of weights \(v\.safetensors, \.\.\.\)"):
        initialize(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint nor a folder of weights"):
        initialize(tmp_path / "empty")


@pytest.mark.parametrize("files", ["one file", "two shards"])
def test_a_flipped_bit_in_a_zip_archive_is_found(tmp_path, files):
    state = trained()
    path = victim = tmp_path / "pytorch_model.bin"
    if files == "one file":
        torch.save(state, path)
    else:
        weight_map = {key: f"part-{number % 2}.bin" for number, key in enumerate(state)}
        for part in sorted(set(weight_map.values())):
            torch.save({key: state[key] for key in state if weight_map[key] == part}, victim := tmp_path / part)
        (path := tmp_path / "w.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    initialize(path)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    for load in (initialize, load_encoder):
        with pytest.raises(CheckpointError, match=rf"{victim.name}: damaged \(.*/data/\d+\)"):
            load(path)


class MakesFolder:
    """Its unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, legacy):
    content = {"model": trained(), "args": MakesFolder(tmp_path / "ran")}
    torch.save(content, tmp_path / "w.pth", pickle_module=pickle, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"w\.pth: refused, because unpickling it would call posix.mkdir"):
        initialize(tmp_path / "w.pth")
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
def test_errors_never_show_torchs_advice_to_unpickle_without_restriction(tmp_path, content, zipped):
    path = tmp_path / "raw.pkl.pt"
    path.write_bytes(content)
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, entry in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"x/{name}", entry)
    for load in (initialize, load_encoder):
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert not re.search("weights_only|torch.load|trusted|file an issue|documentation|\\n", str(caught.value))
        assert "()" not in str(caught.value)


# ---------------------------------------------------------------- timm


def timm_encoder(**options):
    return randomize(timm.create_model("vit_tiny_patch16_224", **TIMM | options))


@pytest.mark.parametrize("kind", ["file", "folder", "pickles"])
def test_timm_weights_compute_the_features_of_timm(tmp_path, kind):
    timm_model = timm_encoder(num_classes=7)
    if kind == "file":
        save_file(timm_model.state_dict(), tmp_path / "w.safetensors")
        path = tmp_path / "w.safetensors"
    else:
        path = tmp_path / "folder"
        timm.models.save_for_hf(timm_model, str(path), safe_serialization=kind == "folder")
        config = json.loads((path / "config.json").read_text())
        config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
        (path / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        expected = timm_model.forward_features(IMAGES)
        model, message = initialize(path)
        torch.testing.assert_close(model.features(IMAGES), expected, atol=1e-5, rtol=1e-5)
        encoder = load_encoder(path)
        torch.testing.assert_close(encoder.forward_features(IMAGES), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.pos_embed, timm_model.pos_embed)
    assert re.search(r"Skipped head\.(weight|bias) \(and 1 more\)", message)
    assert "pos_embed is learned, so it is kept and not trained" in message
    assert encoder.pretrained_cfg["mean"] == ((0.1, 0.2, 0.3) if kind != "file" else (0.485, 0.456, 0.406))
    assert encoder.pretrained_cfg["std"] == ((0.5,) * 3 if kind != "file" else (0.229, 0.224, 0.225))
    assert encoder.pretrained_cfg["input_size"] == (3, 32, 32)


def test_load_encoder_infers_sizes_and_refuses_other_architectures(tmp_path):
    timm_model = timm_encoder(patch_size=(8, 4), mlp_ratio=48 / 11, num_classes=0, img_size=(32, 16))
    save_file(timm_model.state_dict(), tmp_path / "w.safetensors")
    with torch.inference_mode():
        images = IMAGES[..., :16]
        torch.testing.assert_close(
            load_encoder(tmp_path / "w.safetensors").forward_features(images), timm_model.forward_features(images)
        )
    for options, message in [
        ({"depth": 5}, r"the number of attention heads is unknown \(width 96, depth 5\)"),
        ({"init_values": 1.0}, r"blocks.0.ls1.gamma \(and 11 more\); a MAE has no layer scale"),
        ({"qk_norm": True}, "query and key normalization"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"class_token": False, "global_pool": "avg"}, "missing key cls_token|grid of patches"),
        ({"mlp_layer": timm.layers.SwiGLU}, "not the weights of a plain ViT|gated MLP"),
    ]:
        save_file(timm_encoder(**options).state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_encoder(tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)


def test_the_config_of_a_timm_folder_is_validated(tmp_path):
    timm.models.save_for_hf(timm_encoder(), str(tmp_path / "f"))
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    for changes, message in [
        ({"architecture": "local-dir:/tmp"}, "timm has no architecture 'local-dir:/tmp'"),
        ({"architecture": "resnet18"}, "timm's resnet18 is not a plain ViT but ResNet"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "the activation of timm's .* is not supported"),
        ({"model_args": {"num_heads": 4}}, "has 4 attention heads, the model has 3. Change model.size"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "the metadata is damaged"),
    ]:
        (tmp_path / "f" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            initialize(tmp_path / "f")


# ---------------------------------------------------------------- Hugging Face

SIZES = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384}
SIDES = {"image_size": 32, "patch_size": 8}
DECODER = {f"decoder_{key}": value for key, value in (
    ("hidden_size", 64), ("num_hidden_layers", 1), ("num_attention_heads", 2), ("intermediate_size", 256)
)}  # fmt: skip


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_vit_mae_computes_the_loss_of_transformers_for_equal_noise(tmp_path, eps):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(**SIZES, **SIDES, **DECODER, norm_pix_loss=True, layer_norm_eps=eps)
    hf_model = randomize(ViTMAEForPreTraining(config))
    hf_model.vit.embeddings.position_embeddings.data = sincos_pos_embed(96, (4, 4))
    hf_model.decoder.decoder_pos_embed.data = sincos_pos_embed(64, (4, 4))
    hf_model.save_pretrained(tmp_path)
    model, message = initialize(tmp_path)
    with torch.inference_mode():
        expected, actual = hf_model(IMAGES, noise=NOISE), model.eval()(IMAGES, NOISE)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5 if eps == 1e-6 else 1e-3)
    torch.testing.assert_close(actual.pred, expected.logits, atol=1e-5 if eps == 1e-6 else 1e-2, rtol=1e-4)
    assert torch.equal(model.pos_embed, sincos_pos_embed(96, (4, 4)))
    assert "Hugging Face ViTMAEForPreTraining" in message
    assert ("Changed the norm epsilon from 1e-12 to 1e-06" in message) == (eps == 1e-12)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEModel", "sharded", "pickle", "file"])
def test_transformers_encoders_compute_the_features_of_transformers(tmp_path, kind):
    import transformers

    name = kind if kind.startswith("ViT") else "ViTModel"
    config_class = getattr(transformers, "ViTMAEConfig" if "MAE" in kind else "ViTConfig")
    hf_model = randomize(getattr(transformers, name)(config_class(**SIZES, **SIDES)))
    for block in getattr(hf_model, "vit", hf_model).modules():  # larger weights show an error in epsilon
        if isinstance(block, torch.nn.LayerNorm):
            block.weight.data += 1
    hf_model.save_pretrained(tmp_path, max_shard_size="300KB" if kind == "sharded" else "1GB")
    if kind == "pickle":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "sharded")
    encoder = load_encoder(tmp_path / "model.safetensors" if kind == "file" else tmp_path)
    with torch.inference_mode():
        if kind == "ViTMAEModel":
            hf_model.config.mask_ratio = 0.0
            hidden = hf_model(IMAGES, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        else:
            hidden = getattr(hf_model, "vit", hf_model)(IMAGES).last_hidden_state
        torch.testing.assert_close(encoder.forward_features(IMAGES), hidden, atol=1e-4, rtol=1e-5)
    assert encoder.norm.eps == 1e-12
    assert encoder.pretrained_cfg["std"] == (0.25,) * 3


def test_the_config_of_a_transformers_folder_is_validated(tmp_path):
    from transformers import ViTConfig, ViTModel

    randomize(ViTModel(ViTConfig(**SIZES, **SIDES))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in [
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported"),
        ({"num_attention_heads": 4}, "has 4 attention heads, the model has 3. Change model.size"),
        ({"layer_norm_eps": "small"}, "the metadata is damaged"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            initialize(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.4.attention.attention.key.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"blocks\.4\.attn\.qkv\.bias: key missing"):
        initialize(tmp_path)


JUNK = ["abc", 5, 0, -3, 2.5, 1e999, True, None, [], {}, [0, 0], [-32, -32], "nan", 10**30]


def write_junk(folder, file, *keys):
    """Replace the values of a JSON file by junk, one after the other. Yield key and junk."""
    original = json.loads((folder / file).read_text())
    for key in keys:
        for junk in JUNK:
            content = copy.deepcopy(original)
            *outer, last = key.split("/")
            functools.reduce(dict.__getitem__, outer, content)[last] = junk
            (folder / file).write_text(json.dumps(content))
            yield key, junk
        content = copy.deepcopy(original)
        del functools.reduce(dict.__getitem__, outer, content)[last]
        (folder / file).write_text(json.dumps(content))
        yield key, "nothing"
    (folder / file).write_text(json.dumps(original))


@pytest.mark.parametrize("kind", ["transformers", "timm", "scale_mae"])
def test_junk_in_metadata_gives_a_one_line_error_or_a_usable_encoder(runs, tmp_path, kind):
    folder = tmp_path / "f"
    if kind == "scale_mae":
        convert(runs["zero2", "fp32"][0], "timm", folder)
        keys = [f"timm_kwargs/{key}" for key in json.loads((folder / "scale_mae.json").read_text())["timm_kwargs"]]
        keys += ["timm_name", "timm_kwargs", "image_size", "mean", "std", "layer_norm_eps", "step", "interpolation", "config"]
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors")  # without its metadata, which are in the JSON file too
        file = "scale_mae.json"
    elif kind == "timm":
        timm.models.save_for_hf(timm_encoder(num_classes=0), str(folder))
        keys, file = (
            ["architecture", "model_args", "model_args/num_heads", "model_args/img_size", "pretrained_cfg/std"],
            "config.json",
        )
    else:
        from transformers import ViTConfig, ViTModel

        randomize(ViTModel(ViTConfig(**SIZES, **SIDES))).save_pretrained(folder)
        keys, file = ["num_attention_heads", "image_size", "layer_norm_eps", "hidden_act", "architectures"], "config.json"
    refused = set()
    for key, junk in write_junk(folder, file, *keys):
        try:
            encoder = load_encoder(folder)
        except CheckpointError as error:
            assert "\n" not in str(error), (key, junk)  # noqa: PT017
            refused.add((key, str(junk)))
        else:
            images = torch.zeros(1, 3, *encoder.pretrained_cfg["input_size"][1:])
            assert encoder.forward_features(images).isfinite().all(), (key, junk)
    heads = {"scale_mae": "timm_kwargs/num_heads", "timm": "model_args/num_heads", "transformers": "num_attention_heads"}[kind]
    assert refused >= {(heads, junk) for junk in ("abc", "5", "0", "-3", "2.5", "True", "[]")}
    assert kind != "scale_mae" or refused >= {("timm_name", "nothing"), ("timm_kwargs", "abc"), ("mean", "[]")}
    load_encoder(folder)


# ---------------------------------------------------------------- scale_mae


@pytest.mark.parametrize(
    "source", ["run", "checkpoint", "deepspeed folder", "state_dict", "mae", "vit_mae", "vit", "timm", "avg"]
)
def test_runs_and_exports_of_scale_mae_are_accepted(runs, tmp_path, source):
    run_dir, live = runs["zero3", "bf16"]
    path = {
        "run": run_dir,
        "checkpoint": locate_checkpoint(run_dir, print),
        "deepspeed folder": locate_checkpoint(run_dir, print) / "deepspeed",
    }.get(source)
    if path is None:
        suffix = {"state_dict": "", "mae": ".pth", "vit_mae": "", "vit": ""}.get(source, ".safetensors")
        pool = "avg" if source == "avg" else "token"
        path = convert(run_dir, "timm" if source == "avg" else source, tmp_path / f"out{suffix}", pool=pool)
    model, message = initialize(path)
    has_decoder = source not in ("vit", "timm", "avg")
    for name, value in live.items():
        if has_decoder or not is_decoder_key(name):
            assert torch.equal(model.state_dict()[name], torch.from_numpy(value)), name
    assert ("starts with random weights" in message) == (not has_decoder)
    assert "step 3" in message
    with torch.inference_mode():
        encoder = load_encoder(path) if source != "deepspeed folder" else None
        if encoder and source != "avg":
            torch.testing.assert_close(encoder.forward_features(IMAGES), model.eval().features(IMAGES), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- position embeddings


def test_position_embeddings_are_interpolated_and_the_message_says_so(tmp_path):
    torch.save({"model": trained()}, tmp_path / "w.pth")
    model, message = initialize(tmp_path / "w.pth", nano(image_size=(64, 32)))
    for name, width in (("pos_embed", 96), ("decoder_pos_embed", 64)):
        assert torch.equal(getattr(model, name), resize_pos_embed(sincos_pos_embed(width, (4, 4)), (4, 4), (8, 4)))
        assert f"Interpolated {name} from 4 x 4 to 8 x 4 patches" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_sine_cosine_embedding_becomes_the_exact_one(tmp_path, dtype):
    torch.save({n: t.to(dtype) for n, t in trained().items()}, tmp_path / "w.pth")
    model, message = initialize(tmp_path / "w.pth")
    assert torch.equal(model.pos_embed, sincos_pos_embed(96, (4, 4)))
    assert torch.equal(model.decoder_pos_embed, sincos_pos_embed(64, (4, 4)))
    assert torch.equal(model.norm.weight, trained()["norm.weight"].to(dtype).float())
    assert "learned" not in message


def test_two_grids_with_equally_many_patches_are_distinguished(tmp_path):
    """16 patches can be 2 x 8 or 4 x 4."""
    torch.save(nano(image_size=(16, 64)).state_dict(), tmp_path / "w.pth")
    model, message = initialize(tmp_path / "w.pth", nano(image_size=(16, 64)))
    assert torch.equal(model.pos_embed, sincos_pos_embed(96, (2, 8)))
    assert "Interpolated" not in message
    torch.save(trained(), tmp_path / "w.pth")
    model, message = initialize(tmp_path / "w.pth", nano(image_size=(16, 64)))
    assert torch.equal(model.pos_embed, resize_pos_embed(sincos_pos_embed(96, (4, 4)), (4, 4), (2, 8)))
    assert "Interpolated pos_embed from 4 x 4 to 2 x 8 patches" in message


# ---------------------------------------------------------------- runs


def train_several(configs, stops):
    """Train runs one after the other on the same ranks, each up to its own step. Return their position embeddings."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    torch.set_num_threads(1)
    pos_embeds = []
    with process_group() as world:
        for config, stop in zip(configs, stops, strict=True):
            with StopRequest() as request:
                run = Trainer(config, world, request, Watchdog(0, 0))
                original = run.log.write_metrics

                def metrics(values, original=original, request=request, stop=stop):
                    original(values)
                    if values["step"] >= stop:
                        request.request("the test")

                run.log.write_metrics = metrics
                run.train()
                pos_embeds.append((run.engine.model.pos_embed.dtype, run.engine.model.pos_embed.clone().numpy()))
    return pos_embeds


def read_log(run_dir):
    return (Path(run_dir) / "log.txt").read_text()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """For ZeRO-2 and ZeRO-3 in bf16: a run that is initialized with a learned position embedding, and one that is also resumed.

    The file of the initial weights is deleted before the second run resumes.
    """
    folder = tmp_path_factory.mktemp("learned")
    initial_encoder = timm_encoder()
    file, deleted = folder / "timm.safetensors", folder / "deleted.safetensors"
    for path in (file, deleted):
        save_file(initial_encoder.state_dict(), path)
    configs = {}
    for stage in ("zero2", "zero3"):
        setting = {"engine.deepspeed": stage, "train.precision": "bf16", "train.duration": "6 steps", "optim.warmup": "1 steps"}
        configs[stage] = make_config(folder / stage, **setting, **{"model.init_from": str(file)})
        configs[f"{stage} resumed"] = make_config(folder / f"{stage}-r", **setting, **{"model.init_from": str(deleted)})
    pos_embeds = run_ranks(2, train_several, list(configs.values()), [6, 3, 6, 3])
    deleted.unlink()
    pos_embeds += run_ranks(2, train_several, [c for n, c in configs.items() if "resumed" in n], [6, 6])
    return initial_encoder, configs, pos_embeds


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_learned_position_embedding_stays_exact_in_bf16_through_resume_and_export(learned, tmp_path, stage):
    initial_encoder, configs, pos_embeds = learned
    pos_embed = initial_encoder.pos_embed.detach()
    assert not torch.equal(pos_embed, pos_embed.bfloat16().float())
    for values in pos_embeds:
        for dtype, value in values:
            assert dtype == torch.float32
            assert torch.equal(torch.from_numpy(value), pos_embed)
    uninterrupted, resumed = configs[stage], configs[f"{stage} resumed"]
    assert "Resumed from" in read_log(resumed.run.dir)
    assert log(resumed.run.dir, "loss", "lr") == log(uninterrupted.run.dir, "loss", "lr")
    assert_equal(weights(resumed.run.dir, 6), weights(uninterrupted.run.dir, 6))
    out = convert(resumed.run.dir, "timm", tmp_path / "e.safetensors")
    assert torch.equal(load_file(out)["pos_embed"], pos_embed)
    assert torch.equal(load_encoder(resumed.run.dir).pos_embed, pos_embed)


def test_a_run_logs_its_initial_weights_once(learned):
    _, configs, _ = learned
    text = read_log(configs["zero2"].run.dir)
    lines = [line for line in text.splitlines() if "Initialized from" in line]
    assert len(lines) == 1
    assert re.search(
        r"timm.safetensors \(ViT with timm keys, SHA-256 [0-9a-f]{16}\)\. Skipped .*\. The decoder starts with random weights",
        lines[0],
    )
    assert read_log(configs["zero2 resumed"].run.dir).count("Initialized from") == 1


def test_the_untrained_encoder_has_the_initial_weights_of_the_run(learned):
    initial_encoder, configs, _ = learned
    assert_equal(initial_encoder.state_dict(), load_untrained_encoder(configs["zero2"].run.dir).state_dict())
    trained_encoder = load_encoder(configs["zero2"].run.dir)
    assert not torch.equal(trained_encoder.norm.weight, initial_encoder.norm.weight)
    with pytest.raises(UserError, match=r"deleted\.safetensors: no such file or folder"):
        load_untrained_encoder(configs["zero2 resumed"].run.dir)


def train_in(folders, config):
    os.chdir(folders[int(os.environ["RANK"])])
    return train(config)


@pytest.mark.parametrize("second", ["other", "mismatch", "absent"])
def test_all_ranks_raise_the_same_error_for_different_weights(tmp_path, second):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    torch.save(trained(), folders[0] / "w.pth")
    state = {"other": trained() | {"norm.bias": torch.ones(96)}, "mismatch": {"patch_embed.proj.weight": torch.ones(1)}}.get(
        second
    )
    if state:
        torch.save(state, folders[1] / "w.pth")
    message = {"other": "the weights differ between ranks", "mismatch": "has 0 blocks", "absent": "w.pth: no such file"}[second]
    with pytest.raises(RankError, match=message) as caught:
        run_ranks(2, train_in, folders, make_config(tmp_path / "run", **{"model.init_from": "w.pth"}))
    assert caught.value.kinds == ["UserError" if second == "other" else "CheckpointError"] * 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_init_writes_the_initial_weights_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(timm_encoder().state_dict(), "timm.safetensors")
    words = ["init", "timm.safetensors", "debug", "--out", "initial.safetensors", "model.image_size=64", "run.seed=5"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "initial.safetensors: Initialized from timm.safetensors (ViT with timm keys" in printed
    assert "Interpolated pos_embed from 4 x 4 to 8 x 8 patches" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["initial.safetensors", "timm.safetensors"]
    config = load_config("debug", ["model.image_size=64", "run.seed=5", "model.init_from=timm.safetensors"])
    assert main(["inspect", "initial.safetensors"]) == 0
    assert re.search(r"^initialized from +timm.safetensors \(ViT", capsys.readouterr().out, re.M)
    model, _ = load_initial_model(config, print)
    assert_equal(load_file("initial.safetensors"), model.state_dict())
    again, _ = initialize("initial.safetensors", nano(image_size=(64, 64)))
    assert_equal(again.state_dict(), model.state_dict())
    assert_equal(model.state_dict(), load_encoder("initial.safetensors").state_dict())
    for words, message in [
        (["init", "timm.safetensors", "vit_base", "--out", "x.safetensors"], "Set model.size=nano|No model.size"),
        (["init", "timm.safetensors", "debug", "--out", "x.pth"], "the file name must end in .safetensors"),
        (["init", "absent", "debug", "--out", "x.safetensors"], "absent: no such file or folder"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("x*"))
