"""Every export format, loaded as its users load it, computes what the checkpoint computes."""

import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from scale_mae import UserError
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.weights import convert as convert_module
from scale_mae.weights.convert import convert
from scale_mae.weights.export_formats import FORMATS
from scale_mae.weights.model_loader import load_mae
from scale_mae.weights.safetensors_io import TensorFiles


@pytest.fixture(scope="module")
def trained_mae(runs):
    """A run directory and its trained MAE."""
    run_dir, _ = runs["zero3", "bf16"]
    return run_dir, load_mae(locate_checkpoint(run_dir, print))


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def test_timm_loads_a_folder_with_either_pooling(trained_mae, tmp_path):
    run_dir, mae = trained_mae
    token = timm.create_model(f"local-dir:{convert(run_dir, 'timm', tmp_path / 'token')}", pretrained=True).eval()
    torch.testing.assert_close(token(IMAGES), mae.features(IMAGES)[:, 0], atol=1e-5, rtol=1e-5)
    assert list(token.pretrained_cfg["mean"]) == [0.286] * 3
    mean = timm.create_model(f"local-dir:{convert(run_dir, 'timm', tmp_path / 'avg', pool='avg')}", pretrained=True).eval()
    assert mean(IMAGES).shape == (3, 96)
    torch.testing.assert_close(mean.fc_norm.weight, mae.norm.weight)


@torch.inference_mode()
def test_transformers_loads_the_mae_and_the_encoder(trained_mae, tmp_path):
    from transformers import ViTMAEForPreTraining, ViTModel

    run_dir, mae = trained_mae
    vit_mae = ViTMAEForPreTraining.from_pretrained(convert(run_dir, "vit_mae", tmp_path / "mae")).eval()
    output, expected = vit_mae(IMAGES, noise=NOISE), mae(IMAGES, NOISE)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits, expected.pred, atol=1e-5, rtol=1e-5)
    vit = ViTModel.from_pretrained(convert(run_dir, "vit", tmp_path / "vit"), add_pooling_layer=False).eval()
    torch.testing.assert_close(vit(IMAGES).last_hidden_state, mae.features(IMAGES), atol=1e-5, rtol=1e-5)


def test_mae_and_state_dict_formats_hold_every_tensor(trained_mae, tmp_path):
    run_dir, mae = trained_mae
    mae_file = torch.load(convert(run_dir, "mae", tmp_path / "mae.pth"), weights_only=True)
    state_dict = TensorFiles(convert(run_dir, "state_dict", tmp_path / "all.safetensors"))
    assert set(mae_file["model"]) == set(state_dict) == set(mae.state_dict())
    assert mae_file["scale_mae"]["norm_pixel"] is True
    for key, tensor in mae.state_dict().items():
        assert torch.equal(mae_file["model"][key], tensor), key
        assert torch.equal(state_dict[key], tensor), key


@torch.inference_mode()
def test_exported_graphs_accept_any_batch_size(trained_mae, tmp_path):
    import onnxruntime

    run_dir, mae = trained_mae
    session = onnxruntime.InferenceSession(convert(run_dir, "onnx", tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(convert(run_dir, "torch_export", tmp_path / "e.pt2")).module()
    for count in (1, 3):
        expected = mae.features(IMAGES[:count])
        np.testing.assert_allclose(session.run(None, {"images": IMAGES[:count].numpy()})[0], expected, atol=1e-4)
        torch.testing.assert_close(program(IMAGES[:count])[0], expected, atol=1e-5, rtol=1e-5)


SUFFIX = {"timm": ".safetensors", "mae": ".pth", "onnx": ".onnx", "torch_export": ".pt2"}


def make_slightly_wrong(tensor):
    """Scale all values by 1.01 in fp32. Flip the last bit of one value in 16 bits."""

    def read():
        values = tensor.read().clone()
        if values.dtype == torch.float32:
            return values * 1.01
        values.view(torch.int16).view(-1)[-1] ^= 1
        return values

    return replace(tensor, chunks=lambda: [read().reshape(-1)])


FORMATS_AND_DTYPES = [(to, dtype) for to in FORMATS for dtype in ("fp32", "bf16", "fp16") if to != "onnx" or dtype == "fp32"]


@pytest.mark.parametrize(("to", "dtype"), FORMATS_AND_DTYPES)
def test_an_export_with_one_wrong_weight_is_not_written(trained_mae, tmp_path, monkeypatch, to, dtype):
    """ONNX in fp16 is not tested: only a forward pass verifies it, which does not notice so small a difference."""
    export_format = FORMATS[to]
    for key in ["blocks.3.mlp.fc1.weight", *(["decoder_embed.weight"] if export_format.has_decoder else [])]:

        def write(source, target, key=key):
            exported = {**source.exported, key: make_slightly_wrong(source.exported[key])}
            export_format.write(replace(source, exported=exported), target)

        monkeypatch.setitem(FORMATS, to, replace(export_format, write=write))
        with pytest.raises(UserError, match=r"x[.\w]*: not written; .* (differ from the checkpoint's|when it is read back)"):
            convert(trained_mae[0], to, tmp_path / f"x{SUFFIX.get(to, '')}", dtype=dtype)
        assert not list(tmp_path.iterdir())


def test_image_size_interpolates_both_position_embeddings(trained_mae, tmp_path):
    written = TensorFiles(convert(trained_mae[0], "state_dict", tmp_path / "x.safetensors", image_size=(48, 64)))
    assert written["pos_embed"].shape == (1, 1 + 6 * 8, 96)
    assert written["decoder_pos_embed"].shape[1] == 1 + 6 * 8


def test_invalid_requests_are_refused(trained_mae, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for to, out, options, text in (
        ("vit_mae", "full", {}, "not from an export"),
        ("onnx", "x.onnx", {"dtype": "bf16"}, "bf16"),
        ("mae", "x.bin", {}, "must end in .pth"),
        ("timm", "x.safetensors", {"image_size": (30, 30)}, "not divisible"),
    ):
        with pytest.raises(UserError, match=text):
            convert(trained_mae[0], to, tmp_path / out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_after_an_error_no_import_is_running(trained_mae, tmp_path, monkeypatch):
    """Python prints a traceback if it exits during an import."""
    finished = []

    def import_slowly(name):
        time.sleep(0.5)
        finished.append(name)

    monkeypatch.setattr(convert_module, "import_module", import_slowly)
    with pytest.raises(UserError, match="--probe 7: .* is not a linear probe"):
        convert(trained_mae[0], "timm", tmp_path / "x", probe=7)
    assert finished == ["scale_mae.weights.parity"]
