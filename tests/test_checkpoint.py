"""Checkpoints are committed atomically, verified, read for every ZeRO stage and precision, and converted."""

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from layouts import LAYOUTS, copy_as
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainer import make_config, train

from scale_mae import UserError, load_encoder
from scale_mae.checkpoint.discovery import find_latest_valid, locate_checkpoint
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.manifest import read_config, read_manifest
from scale_mae.checkpoint.paths import format_checkpoint_name, list_checkpoints
from scale_mae.checkpoint.retention import select_retained_steps
from scale_mae.checkpoint.verification import verify
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import load_config
from scale_mae.model.mae import build_mae
from scale_mae.weights.convert import convert
from scale_mae.weights.metadata import build_metadata
from scale_mae.weights.model_loader import load_mae
from scale_mae.weights.safetensors_io import TensorFiles
from scale_mae.weights.weight_import import locate_weights, read_weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_timm_accepts_the_export_and_computes_the_live_features(runs, layout, tmp_path):
    run_dir, live = runs[layout]
    out = convert(run_dir, "timm", tmp_path / "encoder.safetensors")
    files = TensorFiles(out)
    metadata, weights = json.loads(files.metadata["scale_mae"]), dict(files)
    model = timm.create_model(metadata["timm_name"], **metadata["timm_kwargs"])
    model.load_state_dict(weights, strict=True)
    mae = build_mae("nano", image_size=(32, 32), patch_size=(8, 8), decoder_width=64, decoder_depth=1, decoder_heads=2)
    reader = ZeroReader(locate_checkpoint(run_dir, print) / "deepspeed")
    state = {name: torch.from_numpy(value) for name, value in live.items()}
    if layout == ("zero0", "bf16"):
        state = {name: reader[name] for name in live}
    mae.load_state_dict(state | {n: reader[n] for n in ("pos_embed", "decoder_pos_embed")})
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = mae.eval().features(images)
        torch.testing.assert_close(model.eval().forward_features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(load_encoder(out).forward_features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(load_encoder(run_dir).forward_features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_an_export_has_the_requested_dtype_and_describes_its_use(runs, tmp_path, dtype, expected):
    run_dir, _ = runs["zero2", "fp32"]
    out = convert(run_dir, "timm", tmp_path / "e.safetensors", dtype=dtype)
    assert {t.dtype for t in load_file(out).values()} == {expected}
    with safe_open(out, "pt") as file:
        metadata = json.loads(file.metadata()["scale_mae"])
    assert metadata["norm_pixel"] is True
    assert metadata["mean"] == [0.286] * 3
    assert metadata["std"] == [0.353] * 3
    assert metadata["layer_norm_eps"] == 1e-6
    assert metadata["image_size"] == [32, 32]
    assert metadata["patch_size"] == [8, 8]
    assert metadata["step"] == 3
    assert metadata["dtype"] == dtype
    assert metadata["config_digest"] == read_config(locate_checkpoint(run_dir, print)).digest()
    assert load_encoder(out).pretrained_cfg["mean"] == (0.286,) * 3


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_standard_sizes_have_the_keys_and_shapes_of_the_timm_model(size):
    """``timm.create_model(name)`` without further arguments has the keys and shapes of an export."""
    config = load_config(f"vit_{size}")
    metadata = build_metadata(config, 0)
    with torch.device("meta"):
        encoder = build_mae(size, image_size=config.model.image_size).state_dict()
        timm_model = timm.create_model(metadata["timm_name"]).state_dict()
    shapes = {n: t.shape for n, t in encoder.items() if not n.startswith("decoder") and n != "mask_token"}
    assert shapes == {n: t.shape for n, t in timm_model.items()}


@pytest.mark.parametrize("size", ["nano", "tiny", "small", "giant", "2b"])
def test_other_sizes_have_the_keys_and_shapes_of_the_timm_model_with_arguments(size):
    config = load_config("vit_base", {"model.size": size})
    metadata = build_metadata(config, 0)
    with torch.device("meta"):
        encoder = build_mae(size, image_size=(224, 224)).state_dict()
        timm_model = timm.create_model(metadata["timm_name"], **metadata["timm_kwargs"]).state_dict()
    shapes = {n: t.shape for n, t in encoder.items() if not n.startswith("decoder") and n != "mask_token"}
    assert shapes == {n: t.shape for n, t in timm_model.items()}


def test_an_export_that_differs_from_the_live_model_is_not_written(runs, tmp_path, monkeypatch):
    from scale_mae.weights import parity

    real = parity.compute_timm_outputs
    monkeypatch.setattr(parity, "compute_timm_outputs", lambda *args: {name: t * 1.01 for name, t in real(*args).items()})
    with pytest.raises(UserError, match="not written; the export's .* differ"):
        convert(runs["zero2", "fp32"][0], "timm", tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- verification


@pytest.fixture
def run_dir(runs, tmp_path):
    """A copy of a run with two checkpoints, so that a test can damage it."""
    source, _ = runs["zero2", "fp32"]
    shutil.copytree(source, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    copy_as(folder / format_checkpoint_name(3), 9)
    return tmp_path / "run"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink, lambda p: p.write_bytes(b"")])
@pytest.mark.parametrize("victim", ["deepspeed/*_optim_states.pt", "deepspeed/*_model_states.pt", "config.yaml"])
def test_damage_is_detected_and_the_checkpoint_before_is_used(run_dir, damage, victim):
    newest = run_dir / "checkpoints" / format_checkpoint_name(9)
    verify(newest)
    path = sorted(newest.glob(victim))[0]
    damage(path)
    with pytest.raises(CheckpointError, match=path.name):
        verify(newest)
    warnings = []
    assert find_latest_valid(run_dir, warnings.append).name == format_checkpoint_name(3)
    assert path.name in warnings[0]
    with pytest.raises(CheckpointError, match=path.name):
        locate_checkpoint(newest, print)
    assert load_mae(locate_checkpoint(run_dir, print))


def negate_weights(path):
    """Change the sign of some weights. Only the checksum shows this."""
    content = torch.load(path, weights_only=False)
    values = content["optimizer_state_dict"]["single_partition_of_fp32_groups"][1].detach()
    before = values[1000:1016].numpy().tobytes()
    raw = path.read_bytes()
    path.write_bytes(raw.replace(before, (-values[1000:1016]).numpy().tobytes()))


@pytest.mark.parametrize("damage", [truncate, flip_bit, negate_weights])
def test_a_damaged_checkpoint_is_not_exported(run_dir, tmp_path, damage):
    newest = run_dir / "checkpoints" / format_checkpoint_name(9)
    damage(sorted(newest.glob("deepspeed/*_optim_states.pt"))[0])
    out, warnings = tmp_path / "out" / "e.safetensors", []
    out.parent.mkdir()
    with pytest.raises(CheckpointError, match="damaged"):
        convert(newest, "state_dict", out)
    assert not list(out.parent.iterdir())
    convert(run_dir, "state_dict", out, warn=warnings.append)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["scale_mae"])["step"] == 3
    assert len(warnings) == 1
    assert "damaged" in warnings[0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"step": 3}', "[" * 100_000, "\xff", "1" * 5000])
def test_a_damaged_manifest_is_detected(run_dir, content):
    manifest = run_dir / "checkpoints" / format_checkpoint_name(9) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match="manifest.json"):
        verify(manifest.parent)
    assert find_latest_valid(run_dir, lambda _: None).name == format_checkpoint_name(3)


def test_a_flip_of_any_bit_of_a_manifest_is_detected(run_dir):
    manifest = run_dir / "checkpoints" / format_checkpoint_name(9) / "manifest.json"
    intact = manifest.read_bytes()
    for position in range(len(intact)):
        for bit in range(8):
            content = bytearray(intact)
            content[position] ^= 1 << bit
            manifest.write_bytes(content)
            with pytest.raises(CheckpointError, match="manifest.json: damaged"):
                verify(manifest.parent)
    manifest.write_bytes(intact)
    assert verify(manifest.parent).step == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 12},
        {"step": "9"},
        {"step": True},
        {"world_size": 2.0},
        {"versions": {"torch": 2}},
        {"versions": []},
        {"config_digest": None},
        {"files": {}},
        {"files": []},
        {"files": {"config.yaml": {"bytes": "1", "sha256": ""}}},
        {"files": {"config.yaml": {"bytes": 1}}},
        {"files": {"config.yaml": None}},
    ],
)
def test_a_manifest_with_a_valid_checksum_but_wrong_contents_is_rejected(run_dir, changes):
    checkpoint = run_dir / "checkpoints" / format_checkpoint_name(9)
    content = replace(read_manifest(checkpoint), **changes)
    (checkpoint / "manifest.json").write_text(content.to_json())
    with pytest.raises(CheckpointError, match="manifest.json: damaged"):
        verify(checkpoint)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENAMETOOLONG])
def test_a_file_that_the_disk_cannot_read_counts_as_damaged(run_dir, monkeypatch, number):
    """Even the size of a file of the latest checkpoint cannot be read."""
    real, victim = Path.stat, run_dir / "checkpoints" / format_checkpoint_name(9) / "config.yaml"

    def stat(self, **options):
        if self == victim:
            raise OSError(number, os.strerror(number))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(CheckpointError, match=f"config.yaml: cannot be read .{os.strerror(number)}"):
        verify(victim.parent)
    assert find_latest_valid(run_dir, lambda _: None).name == format_checkpoint_name(3)


def test_a_bit_flip_in_any_file_is_detected(run_dir):
    checkpoint, generator = run_dir / "checkpoints" / format_checkpoint_name(9), random.Random(0)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        intact = path.read_bytes()
        for position in (0, len(intact) - 1, *(generator.randrange(len(intact)) for _ in range(8))):
            content = bytearray(intact)
            content[position] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=path.name):
                verify(checkpoint)
        path.write_bytes(intact)
    verify(checkpoint)


def test_all_checkpoints_damaged_is_an_error_but_no_checkpoint_is_not(run_dir, tmp_path):
    for checkpoint in list_checkpoints(run_dir):
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        find_latest_valid(run_dir, print)
    assert find_latest_valid(tmp_path / "new", print) is None
    with pytest.raises(CheckpointError, match="no such run directory or checkpoint"):
        locate_checkpoint(tmp_path / "new", print)


@pytest.mark.parametrize("lost", ["manifest.json", "manifest.json config.yaml"])
@pytest.mark.parametrize("use", ["convert", "load", "init"])
def test_a_checkpoint_without_its_manifest_is_not_read_as_a_third_party_checkpoint(run_dir, tmp_path, lost, use):
    checkpoint = run_dir / "checkpoints" / format_checkpoint_name(9)
    for name in lost.split():
        (checkpoint / name).unlink()
    uses = {
        "convert": lambda path: convert(path, "state_dict", tmp_path / "x.safetensors"),
        "load": load_encoder,
        "init": lambda path: read_weights(locate_weights(path, print)),
    }
    with pytest.raises(
        CheckpointError, match=r"step-00000009: not a complete checkpoint \(manifest.json is missing or unreadable\)"
    ):
        uses[use](checkpoint)
    with pytest.raises(
        CheckpointError, match=rf"checkpoints: a folder of checkpoints. Give one of them, or the run directory {run_dir}\.$"
    ):
        uses[use](run_dir / "checkpoints")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_latest_checkpoints_are_kept_and_the_pointer_names_the_last(tmp_path):
    config = make_config(tmp_path, **{"checkpoint.interval": "2 steps", "checkpoint.keep_latest": 2})
    run_ranks(2, train, config)
    assert [p.name for p in list_checkpoints(tmp_path)] == [format_checkpoint_name(8), format_checkpoint_name(10)]
    assert (tmp_path / "checkpoints" / "latest").read_text() == format_checkpoint_name(10)
    manifest = verify(tmp_path / "checkpoints" / format_checkpoint_name(10))
    assert (manifest.step, manifest.world_size, manifest.zero_stage) == (10, 2, 2)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_retention_keeps_the_latest_checkpoints_and_the_first_of_each_interval():
    assert select_retained_steps([10, 20, 30, 40, 50, 60], keep_latest=2, keep_interval=25) == {30, 50, 60}
    assert select_retained_steps([10, 20, 30], keep_latest=2, keep_interval=None) == {20, 30}
    kept = set()
    for step in range(10, 510, 10):  # applied after every save, it keeps the same
        kept = select_retained_steps([*kept, step], keep_latest=2, keep_interval=100)
    assert (
        kept
        == select_retained_steps(list(range(10, 510, 10)), keep_latest=2, keep_interval=100)
        == {100, 200, 300, 400, 490, 500}
    )


def test_a_pickle_that_would_run_code_is_rejected_without_running_it(runs, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    checkpoint = shutil.copytree(locate_checkpoint(runs["zero2", "fp32"][0], print), tmp_path / "c")
    victim = next((checkpoint / "deepspeed").glob("*model_states.pt"))
    torch.save({"module": Evil()}, victim, pickle_module=pickle)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ZeroReader(checkpoint / "deepspeed")
    assert not (tmp_path / "ran").exists()


def test_the_error_names_a_missing_file(run_dir):
    folder = locate_checkpoint(run_dir, print) / "deepspeed"
    next(folder.glob("*rank_1*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="1 of 2"):
        ZeroReader(folder)


# ---------------------------------------------------------------- the largest model of the paper


def train_huge(config):
    """Train ViT-H/14. Return the number of steps and the peak memory of this rank in GiB."""
    from scale_mae import pretrain
    from scale_mae.metrics.memory import peak_memory_bytes

    torch.set_num_threads(1)
    result = pretrain(config)
    return result.step, peak_memory_bytes() / 2**30


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_vit_huge_trains_under_zero3_and_timm_loads_it(tmp_path):
    setting = {
        "model": {"size": "huge", "image_size": 224, "patch_size": 14, "decoder_width": 512, "decoder_depth": 8}
        | {"decoder_heads": 16},
        "train": {"duration": "2 steps", "global_batch": 2, "micro_batch": 1, "precision": "bf16"}
        | {"activation_checkpointing": "full"},
        "optim": {"warmup": "0 steps"},
        "engine": {"deepspeed": "zero3"},
        "checkpoint": {"interval": "2 steps"},
    }  # fmt: skip
    config = load_config("debug", {"run.dir": str(tmp_path / "run"), **setting})
    results = run_ranks(2, train_huge, config, timeout=1500)
    assert [step for step, _ in results] == [2, 2]
    print(f"peak memory of each rank: {[f'{gib:.1f} GiB' for _, gib in results]}")
    assert max(gib for _, gib in results) < 12
    out = convert(tmp_path / "run", "timm", tmp_path / "huge.safetensors")
    encoder = timm.create_model("vit_huge_patch14_224.mae")
    encoder.load_state_dict(load_file(out), strict=True)
    assert sum(p.numel() for p in encoder.parameters()) == 630_764_800
    assert not torch.equal(encoder.blocks[31].mlp.fc2.weight, initial_last_block_weight())
    shutil.rmtree(tmp_path / "run")


def initial_last_block_weight():
    """Return an encoder weight before training. The two steps must have changed it."""
    model = build_mae("huge", image_size=(224, 224), seed=0)
    return model.blocks[31].mlp.fc2.weight
