"""``scale-mae inspect`` describes every kind of path and finds damage in it."""

import json
import random
import re
import shutil

import pytest
import torch
from layouts import copy_as
from safetensors.torch import save_file
from third_party_checkpoints import AwkwardModel

from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import format_checkpoint_name
from scale_mae.cli import main
from scale_mae.model.mae import build_mae
from scale_mae.weights.convert import convert
from scale_mae.weights.inspection import inspect, render

NANO = {"image_size": (32, 32), "patch_size": (8, 8), "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}
SUFFIX = {"timm": ".safetensors", "mae": ".pth", "onnx": ".onnx", "torch_export": ".pt2"}


@pytest.fixture
def run_dir(runs, tmp_path):
    """A copy of a run directory with two checkpoints."""
    folder = shutil.copytree(runs["zero3", "bf16"][0], tmp_path / "run") / "checkpoints"
    copy_as(folder / format_checkpoint_name(3), 9)
    return tmp_path / "run"


def count(model):
    state = model.state_dict()
    return {"tensors": len(state), "parameters": sum(t.numel() for t in state.values())}


def flip_bit(path, offset=-100):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def inspect_damaged(path, capsys, message):
    """Expect exit code 2 and one line on stderr. Return the report on stdout."""
    assert main(["inspect", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    return printed.out


def test_a_checkpoint_report_is_complete(runs):
    checkpoint = locate_checkpoint(runs["zero3", "bf16"][0], print)
    report = inspect(checkpoint)
    model = build_mae("nano", **NANO)
    assert report["kind"] == "scale-mae checkpoint"
    assert (report["step"], report["ZeRO stage"], report["processes"], report["precision"]) == (3, 3, 2, "bf16")
    assert {key: report[key] for key in ("tensors", "parameters")} == count(model)
    assert report["dtypes"] == {"fp32": len(model.state_dict())}
    decayed = [p.numel() for n, p in model.named_parameters() if p.dim() > 1]
    flat = [p.numel() for n, p in model.named_parameters() if p.dim() == 1]
    assert report["groups"] == [
        {"weight decay": 0.0, "tensors": len(flat), "parameters": sum(flat)},
        {"weight decay": 0.05, "tensors": len(decayed), "parameters": sum(decayed)},
    ]
    assert report["bytes"] == sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file())
    assert set(report["versions"]) == {"python", "scale-mae", "torch", "deepspeed", "timm"}
    assert report["problem"] is None
    json.dumps(report)
    text = render(report)
    assert re.search(r"^groups +weight decay 0.0, 63 tensors, 8,992 parameters\n +weight decay 0.05, 33 tensors, ", text, re.M)
    assert "torch 2." in text


def test_a_run_directory_lists_its_checkpoints(run_dir, capsys):
    assert main(["inspect", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "nano, 32 x 32 pixels, patches of 8 x 8" in text
    assert text.count("verified") == 2
    flip_bit(next((run_dir / "checkpoints" / format_checkpoint_name(9)).glob("deepspeed/*optim_states.pt")))
    text = inspect_damaged(run_dir, capsys, "damaged checkpoints: 1 of 2. ")
    assert [line.split()[-1] for line in text.splitlines() if "MB" in line] == ["verified", "damaged"]
    (run_dir / "checkpoints" / format_checkpoint_name(9)).rename(
        run_dir / "checkpoints" / f"damaged-{format_checkpoint_name(9)}"
    )
    assert main(["inspect", "--json", str(run_dir)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["resumes from"] == format_checkpoint_name(3)
    assert report["renamed as damaged"] == [f"damaged-{format_checkpoint_name(9)}"]
    assert [(c["step"], c["problem"]) for c in report["checkpoints"]] == [(3, None)]
    (run_dir / "checkpoints" / format_checkpoint_name(3)).rename(
        run_dir / "checkpoints" / f"damaged-{format_checkpoint_name(3)}"
    )
    inspect_damaged(run_dir, capsys, "no intact checkpoint. Damaged: damaged-step-")


def test_for_the_checkpoints_folder_the_error_names_the_run_directory(run_dir, capsys):
    inspect_damaged(
        run_dir / "checkpoints", capsys, f"a folder of checkpoints. Give one of them, or the run directory {run_dir}."
    )


@pytest.mark.parametrize("victim", ["manifest.json", "config.yaml", "deepspeed/zero_pp_rank_1_mp_rank_00_model_states.pt"])
def test_a_damaged_checkpoint_is_reported_as_far_as_possible(run_dir, victim, capsys):
    checkpoint = run_dir / "checkpoints" / format_checkpoint_name(9)
    (checkpoint / victim).unlink()
    text = inspect_damaged(
        checkpoint, capsys, f"{victim}: missing" if victim != "manifest.json" else "manifest.json is missing or unreadable"
    )
    assert ("ZeRO stage" in text) == (victim != "manifest.json")


def test_a_folder_of_plain_deepspeed_is_reported(runs, tmp_path, capsys):
    folder = shutil.copytree(locate_checkpoint(runs["zero2", "bf16"][0], print) / "deepspeed", tmp_path / "global_step3")
    report = inspect(folder)
    assert report["kind"] == "DeepSpeed checkpoint"
    assert (report["step"], report["ZeRO stage"], report["processes"]) == (3, 2, 2)
    assert {key: report[key] for key in ("tensors", "parameters")} == count(build_mae("nano", **NANO))
    (tmp_path / "latest").write_text("global_step3")
    assert inspect(tmp_path) == report
    next(folder.glob("*rank_1*optim_states.pt")).unlink()
    inspect_damaged(folder, capsys, "1 of 2 *_optim_states.pt files is missing")


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """One run exported to every format."""
    folder = tmp_path_factory.mktemp("exports")
    formats = ("timm", "vit_mae", "vit", "mae", "state_dict", "onnx", "torch_export")
    return {to: convert(runs["zero2", "fp32"][0], to, folder / f"{to}{SUFFIX.get(to, '')}") for to in formats}


@pytest.mark.parametrize("to", ["timm", "vit_mae", "vit", "mae", "state_dict", "onnx", "torch_export"])
def test_an_export_report_shows_its_metadata(exports, to):
    report = inspect(exports[to])
    assert report["kind"].startswith("scale-mae export")
    assert (report["format"], report["step"], report["dtype"]) == (to, 3, "fp32")
    assert report["image size"] == [32, 32]
    assert report["mean"] == [0.286] * 3
    assert report["norm pixel"] is True
    assert len(report["config digest"]) == 16
    mae = build_mae("nano", **NANO)
    has_decoder = to in ("vit_mae", "mae", "state_dict")
    state = mae.state_dict()
    expected = sum(t.numel() for key, t in state.items() if has_decoder or not key.startswith(("decoder_", "mask_")))
    if to in ("onnx", "torch_export"):  # graphs hold constants in addition, and ONNX folds some of them
        assert report["parameters"] == pytest.approx(expected, rel=0.01)
    else:
        assert report["parameters"] == expected
        assert report["encoder"] == "width 96, depth 6, 3 heads, patches of 8 x 8, 16 patches per image"
        assert ("decoder" in report) == has_decoder
    assert set(report["dtypes"]) >= {"fp32"}
    assert report["problem"] is None


@pytest.mark.parametrize("to", ["mae", "torch_export", "timm", "onnx", "vit_mae"])
def test_a_damaged_export_is_found(exports, tmp_path, to, capsys):
    source = exports[to]
    copy = shutil.copytree(source, tmp_path / "x") if source.is_dir() else shutil.copy(source, tmp_path / source.name)
    if to in ("mae", "torch_export"):  # zip archives have checksums
        flip_bit(copy, 3000 if to == "mae" else len(copy.read_bytes()) // 2)
        inspect_damaged(copy, capsys, "damaged")
        shutil.copy(source, copy)
    if source.is_dir():
        (copy / "preprocessor_config.json").unlink()
        inspect_damaged(copy, capsys, "preprocessor_config.json: missing from the export")
    else:
        copy.write_bytes(copy.read_bytes()[:-50])
        assert inspect_damaged(copy, capsys, str(copy)) == ""


def test_third_party_weights_are_reported(tmp_path, capsys):
    state = {
        f"module.{n}": t.bfloat16() for n, t in build_mae("tiny", image_size=(64, 32), patch_size=(16, 16)).state_dict().items()
    }
    torch.save({"model": state | {"module.head.weight": torch.zeros(2, 192)}, "epoch": 7}, tmp_path / "w.pth")
    report = inspect(tmp_path / "w.pth")
    assert report["kind"] == "MAE with reference keys, epoch 7"
    assert report["encoder"] == "width 192, depth 12, patches of 16 x 16, 8 patches per image"
    assert report["decoder"] == "width 512, depth 8"
    assert report["other tensors"] == "module.head.weight"
    assert report["dtypes"] == {"bf16": len(state), "fp32": 1}
    assert report["verified"] == "CRC-32 of every entry"
    unknown = {key: t.detach().clone() for key, t in AwkwardModel().state_dict().items()}
    save_file(unknown, tmp_path / "s.safetensors")
    report = inspect(tmp_path / "s.safetensors")
    assert report["kind"] == "tensors of an unknown model"
    assert report["dtypes"] == {"fp32": len(unknown) - 2, "fp16": 1, "int64": 1}
    assert main(["inspect", str(tmp_path / "s.safetensors")]) == 0
    (tmp_path / "x").write_text("hello")
    capsys.readouterr()
    assert inspect_damaged(tmp_path / "x", capsys, "x: not a file of weights") == ""
    assert inspect_damaged(tmp_path / "absent", capsys, "absent: no such file or folder") == ""
    assert inspect_damaged(tmp_path.parent, capsys, str(tmp_path.parent)) == ""


def test_random_damage_never_raises_anything_but_a_one_line_error(exports, tmp_path):
    rng = random.Random(0)
    for to in ("timm", "mae", "onnx", "torch_export"):
        intact = exports[to].read_bytes()
        for _ in range(12):
            content = bytearray(intact)
            for _ in range(3):
                content[rng.randrange(min(len(intact), rng.choice([100, 5000, len(intact)])))] = rng.randrange(256)
            (tmp_path / "x").write_bytes(content[: rng.choice([len(intact), len(intact), rng.randrange(len(intact))])])
            try:
                json.dumps(inspect(tmp_path / "x"))
            except CheckpointError as error:
                assert "\n" not in str(error)  # noqa: PT017
