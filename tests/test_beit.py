"""Evaluation of BEiT and BEiT v2 in folders that timm wrote, and of MoCo v3, which is a plain ViT under other keys."""

import json

import numpy as np
import pytest
import timm
import torch
from classifiers import WNIDS, class_folders, classes_file, vit, write_timm
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.cli import main
from scale_mae.evaluation.evaluate import _transform
from scale_mae.evaluation.features import pool_tokens
from scale_mae.evaluation.models import load_classifier, load_frozen_encoder
from scale_mae.evaluation.results import Result
from scale_mae.model.pos_embed import sincos_pos_embed
from scale_mae.weights.weight_import import read_weights

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def beit(name="beit_base_patch16_224", **sizes):
    """Build a BEiT with random parameters. timm initializes the relative positions to zero, which would hide errors."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SIZES | sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write(folder, model, as_safetensors=True):
    save_for_hf(model, folder, safe_serialization=as_safetensors)
    return folder


def change(folder, tensors=None, config=None, args=None, without=()):
    """Change tensors, entries of the config, and entries of its ``model_args``."""
    state = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({name: t for name, t in state.items() if name not in without}, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    content["model_args"] |= args or {}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("as_safetensors", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {}),
        ("beitv2_large_patch16_224", {"global_pool": "token"}),
        ("beit_base_patch16_384", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": True}),
    ],
    ids=["mean", "token", "shared"],
)
def test_the_outputs_equal_those_of_timm(tmp_path, name, options, as_safetensors):
    timm_model = beit(name, **options)
    subject = load_classifier(write(tmp_path / "f", timm_model, as_safetensors))
    with torch.inference_mode():
        torch.testing.assert_close(subject.model(IMAGES), timm_model(IMAGES), rtol=0, atol=0)
        encoder = load_frozen_encoder(tmp_path / "f").model
        tokens = timm_model.forward_features(IMAGES)
        torch.testing.assert_close(pool_tokens(encoder, IMAGES), timm_model.fc_norm(tokens[:, 1:].mean(1)))
        torch.testing.assert_close(pool_tokens(encoder, IMAGES, "token"), timm_model.fc_norm(tokens[:, 0]))
    family = "BEiTv2" if name.startswith("beitv2") else "BEiT"
    assert (subject.architecture, subject.classes) == (f"{family}-32x3/8, 32 px", 10)
    assert (subject.mean, subject.crop_pct) == (timm_model.pretrained_cfg["mean"], timm_model.pretrained_cfg["crop_pct"])
    assert (len(subject.digest), subject.kind) == (64, f"timm {name}")


def test_published_folders_load(tmp_path):
    """Sizes outside ``model_args``, index tables of older versions of timm, and half precision are accepted."""
    folder = write(tmp_path / "f", beit())
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    state |= {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64) for i in range(3)}
    save_file(state, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    for name in ("img_size", "num_classes", "global_pool", "in_chans"):
        del content["model_args"][name]
    (folder / "config.json").write_text(json.dumps(content))
    subject = load_classifier(folder / "model.safetensors")
    assert (subject.architecture, subject.classes) == ("BEiT-32x3/8, 32 px", 10)
    assert {tensor.dtype for tensor in subject.model.state_dict().values()} == {torch.float32}
    assert _transform("folder", subject, None)[1]["resize"] == "short side to 35, bicubic"
    assert _transform("imagenet_c", subject, None)[1]["resize"] == "none"
    assert _transform("folder", subject, 1.0)[1]["crop_pct"] == 1.0


def test_evaluate_knn_logistic_and_embed_accept_beit(tmp_path, capsys):
    folder, root, out = write(tmp_path / "beit", beit("beitv2_base_patch16_224")), tmp_path / "data", tmp_path / "results"
    class_folders(root)
    data = ["--train", str(root), "--val", str(root)]
    names = classes_file(tmp_path / "names", WNIDS)
    sets = ["--on", "folder", "--root", str(root), "--classes", names]
    assert main(["evaluate", str(folder), *sets, "--out", str(out / "e.json")]) == 0
    assert main(["knn", str(folder), *data, "--k", "1", "--out", str(out / "k.json")]) == 0
    assert "top-1 100.00%" in capsys.readouterr().out
    assert main(["logistic", str(folder), *data, "--out", str(out / "l.json")]) == 0
    for pool in ("mean", "token"):
        assert main(["embed", str(folder), str(root), "--out", str(tmp_path / f"{pool}.npy"), "--pool", pool]) == 0
    assert np.load(tmp_path / "mean.npy").shape == (40, 32)
    assert not np.allclose(np.load(tmp_path / "mean.npy"), np.load(tmp_path / "token.npy"))
    result = Result.read(out / "e.json")
    assert (result.protocol["crop_pct"], result.model["architecture"]) == (0.9, "BEiTv2-32x3/8, 32 px")
    assert main(["evaluate", str(folder), "--on", "imagenet_r", "--root", str(root), "--classes", names]) == 0
    text = capsys.readouterr().out
    assert "not comparable: no published model is a BEiTv2-32x3/8, 32 px" in text
    assert main(["results", str(out)]) == 0
    assert "BEiTv2-32x3/8, 32 px" in capsys.readouterr().out


TABLE = "blocks.0.attn.relative_position_bias_table"
MISMATCHES = {
    "missing": ({"without": ["blocks.1.gamma_1"]}, "missing key blocks.1.gamma_1; timm's beit_base_patch16_224"),
    "superfluous": ({"tensors": {"mask_token": torch.ones(1)}}, "unexpected key mask_token; timm's beit_base_patch16_224"),
    "another grid": ({"args": {"img_size": 64}}, r"_table has shape \[52, 4\], timm's .* \[228, 4\]"),
    "another number of heads": ({"args": {"num_heads": 8}}, r"_table has shape \[52, 4\], timm's .* \[52, 8\]"),
    "another number of classes": ({"args": {"num_classes": 9}}, r"head.* has shape \[10.*\], timm's .* \[9.*\]"),
    "NaN": ({"tensors": {TABLE: torch.full((52, 4), torch.nan)}}, f"{TABLE} contains NaN or infinity"),
    "integers": ({"tensors": {TABLE: torch.ones(52, 4, dtype=torch.int8)}}, f"{TABLE} has dtype int8, expected floating point"),
    "no head": (
        {"args": {"num_classes": 0}},
        "not a classifier .config.json: num_classes=0.*use scale-mae knn, logistic or embed",
    ),
    "no pooling": ({"args": {"global_pool": ""}}, "not a classifier .config.json: num_classes=10, global_pool=''"),
    "grey images": ({"args": {"in_chans": 1}}, "config.json is damaged .*mean, std, crop_pct or the number of channels"),
    "another file": ({"args": {"checkpoint_path": "x.pth"}}, "is damaged .*unknown model_args checkpoint_path"),
    "nonsense": ({"args": {"depth": "many"}}, "config.json is damaged .TypeError"),
    "no arguments": ({"config": {"pretrained_cfg": "none"}}, "config.json is damaged"),
}


@pytest.mark.parametrize(("changes", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_mismatch_is_refused_in_one_line(tmp_path, changes, message):
    folder = change(write(tmp_path / "f", beit()), **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_classifier(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_image_size_is_refused(tmp_path):
    folder = write(tmp_path / "f", beit())
    assert load_classifier(folder, size=32).size == 32
    for load in (load_classifier, load_frozen_encoder):
        with pytest.raises(CheckpointError, match="relative position tables are for images of 32 x 32 px, not for --size 48"):
            load(folder, size=48)
    with pytest.raises(CheckpointError, match="images of 16 x 64 px; evaluation needs square images"):
        load_frozen_encoder(write(tmp_path / "oblong", beit(img_size=(16, 64))))


def test_another_resampling_filter_is_reported(tmp_path):
    folder, warnings = write(tmp_path / "f", beit()), []
    change(folder, config={"pretrained_cfg": {"interpolation": "bilinear"}})
    subject = load_classifier(folder, warnings.append)
    assert warnings == [f"{folder}: config.json asks for 'bilinear' resampling; evaluation uses bicubic"]
    assert subject.mean == (0.5,) * 3


class Trap:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    folder = write(tmp_path / "f", beit(), False)
    torch.save({"head.bias": torch.ones(1), "trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused, because unpickling it would call"):
        load_classifier(folder)


def test_init_and_convert_refuse_beit_and_evaluation_refuses_other_architectures(tmp_path, capsys):
    folder = write(tmp_path / "f", beit())
    message = "is not a plain ViT but Beit. BEiT is supported by evaluate, knn, logistic and embed only."
    assert main(["init", str(folder), "debug", "--out", str(tmp_path / "i.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert main(["convert", str(folder), "--to", "timm", "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    others = {
        "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
        "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)},
        "eva02_tiny_patch14_224": {"depth": 1},
    }
    for name, sizes in others.items():
        write(tmp_path / name, timm.create_model(name, **sizes))
        with pytest.raises(CheckpointError, match="not a plain ViT|not the weights of a ViT") as caught:
            load_classifier(tmp_path / name)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- MoCo v3


def moco(**sizes):
    """Build a ViT of MoCo v3, whose position embedding is the fixed sine-cosine one."""
    model = vit("token", **sizes)
    side = model.patch_embed.grid_size
    model.pos_embed.data.copy_(sincos_pos_embed(model.embed_dim, side))
    return model


def test_moco_v3_in_a_timm_folder(tmp_path):
    timm_model = moco()
    subject = load_classifier(write_timm(tmp_path, timm_model, "token"))
    torch.testing.assert_close(subject.model(IMAGES), timm_model(IMAGES))


def test_moco_v3_in_its_own_files(tmp_path):
    """A pre-training file has two encoders, and the trained one is used. The small ViT has twelve heads."""
    timm_model = moco(embed_dim=384, depth=12, num_heads=12, mlp_ratio=1)
    encoder = {name: tensor for name, tensor in timm_model.state_dict().items() if not name.startswith("head.")}
    state = {f"module.base_encoder.{name}": tensor for name, tensor in encoder.items()}
    state |= {f"module.momentum_encoder.{name}": tensor + 1 for name, tensor in encoder.items()}
    state |= {"module.base_encoder.head.0.weight": torch.ones(8, 384), "module.predictor.0.weight": torch.ones(8, 8)}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}}, tmp_path / "moco.pth.tar")
    subject = load_frozen_encoder(tmp_path / "moco.pth.tar")
    torch.testing.assert_close(subject.model.forward_features(IMAGES), timm_model.forward_features(IMAGES))
    assert (subject.kind, subject.architecture) == ("ViT of MoCo v3, epoch 300", "ViT-small/8, 32 px")
    with pytest.raises(CheckpointError, match=r"not one linear layer on 384 features .head\.0\.weight"):
        load_classifier(tmp_path / "moco.pth.tar")
    skipped = read_weights(tmp_path / "moco.pth.tar").skipped
    assert skipped[0] == "module.base_encoder.head.0.weight"
    assert len(skipped) == 2 + len(encoder)
    probe = {f"module.{name}": tensor for name, tensor in timm_model.state_dict().items()}
    torch.save({"epoch": 90, "arch": "vit_small", "state_dict": probe, "best_acc1": 73.2}, tmp_path / "linear.pth.tar")
    torch.testing.assert_close(load_classifier(tmp_path / "linear.pth.tar").model(IMAGES), timm_model(IMAGES))
