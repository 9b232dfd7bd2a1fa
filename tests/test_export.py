"""Every format, loaded as its users load it, computes what the checkpoint computes."""

import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from scale_mae import UserError
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.weights import convert as module
from scale_mae.weights.convert import convert
from scale_mae.weights.export_formats import FORMATS
from scale_mae.weights.model_loader import load_mae
from scale_mae.weights.safetensors_io import TensorFiles


@pytest.fixture(scope="module")
def live(runs):
    run_dir, _ = runs["zero3", "bf16"]
    return run_dir, load_mae(locate_checkpoint(run_dir, print))


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def test_timm_folder_with_either_pooling(live, tmp_path):
    run_dir, mae = live
    token = timm.create_model(f"local-dir:{convert(run_dir, 'timm', tmp_path / 'token')}", pretrained=True).eval()
    torch.testing.assert_close(token(IMAGES), mae.features(IMAGES)[:, 0], atol=1e-5, rtol=1e-5)
    assert token.pretrained_cfg["mean"] == (0.286,) * 3 or list(token.pretrained_cfg["mean"]) == [0.286] * 3
    mean = timm.create_model(f"local-dir:{convert(run_dir, 'timm', tmp_path / 'avg', pool='avg')}", pretrained=True).eval()
    assert mean(IMAGES).shape == (3, 96)
    torch.testing.assert_close(mean.fc_norm.weight, mae.norm.weight)


@torch.inference_mode()
def test_hugging_face_folders(live, tmp_path):
    from transformers import ViTMAEForPreTraining, ViTModel

    run_dir, mae = live
    theirs = ViTMAEForPreTraining.from_pretrained(convert(run_dir, "vit_mae", tmp_path / "mae")).eval()
    output, expected = theirs(IMAGES, noise=NOISE), mae(IMAGES, NOISE)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits, expected.pred, atol=1e-5, rtol=1e-5)
    vit = ViTModel.from_pretrained(convert(run_dir, "vit", tmp_path / "vit"), add_pooling_layer=False).eval()
    torch.testing.assert_close(vit(IMAGES).last_hidden_state, mae.features(IMAGES), atol=1e-5, rtol=1e-5)


def test_the_references_file_and_a_state_dict_hold_every_tensor(live, tmp_path):
    run_dir, mae = live
    file = torch.load(convert(run_dir, "mae", tmp_path / "mae.pth"), weights_only=True)
    written = TensorFiles(convert(run_dir, "state_dict", tmp_path / "all.safetensors"))
    assert set(file["model"]) == set(written) == set(mae.state_dict())
    assert file["scale_mae"]["norm_pixel"] is True
    for name, tensor in mae.state_dict().items():
        assert torch.equal(file["model"][name], tensor), name
        assert torch.equal(written[name], tensor), name


@torch.inference_mode()
def test_programs_take_any_batch(live, tmp_path):
    import onnxruntime

    run_dir, mae = live
    session = onnxruntime.InferenceSession(convert(run_dir, "onnx", tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(convert(run_dir, "torch_export", tmp_path / "e.pt2")).module()
    for count in (1, 3):
        expected = mae.features(IMAGES[:count])
        np.testing.assert_allclose(session.run(None, {"images": IMAGES[:count].numpy()})[0], expected, atol=1e-4)
        torch.testing.assert_close(program(IMAGES[:count])[0], expected, atol=1e-5, rtol=1e-5)


SUFFIX = {"timm": ".safetensors", "mae": ".pth", "onnx": ".onnx", "torch_export": ".pt2"}


def slightly_wrong(tensor):
    """In fp32 a hundredth more; in 16 bits the last bit of one value."""

    def read():
        values = tensor.read().clone()
        if values.dtype == torch.float32:
            return values * 1.01
        values.view(torch.int16).view(-1)[-1] ^= 1
        return values

    return replace(tensor, chunks=lambda: [read().reshape(-1)])


WRONG = [(to, dtype) for to in FORMATS for dtype in ("fp32", "bf16", "fp16") if to != "onnx" or dtype == "fp32"]


@pytest.mark.parametrize(("to", "dtype"), WRONG)
def test_a_file_with_one_wrong_weight_gets_no_name(live, tmp_path, monkeypatch, to, dtype):
    """Of ONNX in fp16 a forward pass alone is compared; it would have to be more wrong than this."""
    layout = FORMATS[to]
    for name in ["blocks.3.mlp.fc1.weight", *(["decoder_embed.weight"] if layout.has_decoder else [])]:

        def write(source, target, name=name):
            layout.write(replace(source, exported={**source.exported, name: slightly_wrong(source.exported[name])}), target)

        monkeypatch.setitem(FORMATS, to, replace(layout, write=write))
        with pytest.raises(UserError, match=r"x[.\w]*: not written; .* (differ from the checkpoint's|when it is read back)"):
            convert(live[0], to, tmp_path / f"x{SUFFIX.get(to, '')}", dtype=dtype)
        assert not list(tmp_path.iterdir())


def test_another_image_size_interpolates_both_tables(live, tmp_path):
    written = TensorFiles(convert(live[0], "state_dict", tmp_path / "x.safetensors", image_size=(48, 64)))
    assert written["pos_embed"].shape == (1, 1 + 6 * 8, 96)
    assert written["decoder_pos_embed"].shape[1] == 1 + 6 * 8


def test_what_cannot_be_meant_is_refused(live, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for to, out, options, text in (
        ("vit_mae", "full", {}, "not from an export"),
        ("onnx", "x.onnx", {"dtype": "bf16"}, "bf16"),
        ("mae", "x.bin", {}, "must end in .pth"),
        ("timm", "x.safetensors", {"image_size": (30, 30)}, "not divisible"),
    ):
        with pytest.raises(UserError, match=text):
            convert(live[0], to, tmp_path / out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_no_import_goes_on_after_an_error(live, tmp_path, monkeypatch):
    """An interpreter that ends meanwhile would say so with a traceback."""
    ended = []

    def slow(name):
        time.sleep(0.5)
        ended.append(name)

    monkeypatch.setattr(module, "import_module", slow)
    with pytest.raises(UserError, match="--probe 7: .* is not a linear probe"):
        convert(live[0], "timm", tmp_path / "x", probe=7)
    assert ended == ["scale_mae.weights.parity"]
