"""Features written to files: right, whole, and the same after an interruption."""

import json
import os

import numpy as np
import pytest
import torch
from classifiers import class_folders, vit, write_timm
from ranks import run_ranks
from safetensors import safe_open
from safetensors.numpy import load_file

from scale_mae.cli import main
from scale_mae.config import UserError
from scale_mae.data.index_builder import list_source
from scale_mae.distributed.process_group import process_group
from scale_mae.evaluation import embed as module
from scale_mae.evaluation.embed import embed
from scale_mae.evaluation.image_loader import full_square_transform, load_images
from scale_mae.evaluation.models import load_frozen_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_timm(tmp_path_factory.mktemp("model"), vit("token"), "token")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data") / "d", per_class=3)


def write(model, source, out, stop_after=None, **options):
    """By this process, in pieces of 8; killed after ``stop_after`` images."""

    def progress(done, total):
        if stop_after and done >= stop_after:
            raise KeyboardInterrupt

    module.PIECE = 8
    with process_group() as ranks:
        return embed(load_frozen_encoder(model), str(source), out, ranks, batch=4, progress=progress, **options)


def test_features_of_a_folder_with_names_and_labels(model, data, tmp_path):
    lines = write(model, data, tmp_path / "f.npy")
    assert "f.npy: 30 images;" in lines
    assert lines.endswith("images/s")
    values = np.load(tmp_path / "f.npy")
    assert (values.shape, values.dtype) == ((30, 32), np.float32)
    subject, index = load_frozen_encoder(model), list_source(str(data))
    (viewed,) = load_images(index, range(30), full_square_transform(32), 30)
    images = (viewed.images.permute(0, 3, 1, 2) / 255 - 0.286) / 0.353
    with torch.inference_mode():
        tokens = subject.model.forward_features(images)
    torch.testing.assert_close(torch.from_numpy(values), tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-4)
    lines = (tmp_path / "f.tsv").read_text().splitlines()
    assert lines[0] == "path\tlabel"
    assert lines[4].split("\t") == [index.location(3), "1"]
    assert sorted(os.listdir(tmp_path)) == ["f.npy", "f.tsv"]
    write(model, data, tmp_path / "t.safetensors", pool="token")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("features"), tokens[:, 0], atol=1e-5, rtol=1e-4)
        assert file.get_tensor("labels").tolist() == [c for c in range(10) for _ in range(3)]
        assert json.loads(file.metadata()["scale_mae_embed"])["pool"] == "token"
    assert paths_in(tmp_path / "t.safetensors") == [index.location(row) for row in range(30)]


def paths_in(file):
    """As docs/guides/evaluation.md reads them."""
    tensors = load_file(file)
    text, ends = tensors["paths"].tobytes(), tensors["path_ends"].tolist()
    return [text[begin:end].decode() for begin, end in zip([0, *ends], ends)]  # noqa: B905


def test_as_many_paths_as_imagenet_has_fit_into_a_safetensors_file(tmp_path):
    names = [f"{number:0100d}é" for number in range(1_281_167)]
    values, labels = np.zeros((len(names), 1), np.float32), np.zeros(len(names), np.int32)
    module._write_safetensors(tmp_path / "f.safetensors", values, labels, names, {})
    assert paths_in(tmp_path / "f.safetensors") == names


def test_a_safetensors_file_is_the_same_to_the_bit_each_time(model, data, tmp_path):
    contents = set()
    for _ in range(8):
        write(model, data, tmp_path / "f.safetensors")
        contents.add((tmp_path / "f.safetensors").read_bytes())
    assert len(contents) == 1


def test_an_interrupted_run_goes_on_and_the_file_is_the_same_to_the_bit(model, data, tmp_path):
    write(model, data, tmp_path / "whole.npy")
    out = tmp_path / "f.npy"
    with pytest.raises(KeyboardInterrupt):
        write(model, data, out, stop_after=20)
    assert not out.exists()
    done = sorted((tmp_path / "f.npy.pieces").glob("*.npy"))
    assert [path.name for path in done] == ["000000000000.npy", "000000000008.npy"]
    stamps = [path.stat().st_mtime_ns for path in done]
    with pytest.raises(UserError, match="unfinished work with a different pool"):
        write(model, data, out, pool="token")
    assert [path.stat().st_mtime_ns for path in done] == stamps
    assert "30 images, 16 of them from an earlier run" in write(model, data, out)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not (tmp_path / "f.npy.pieces").exists()


def embed_in_rank(model, data, out):
    return write(model, data, out)


def test_several_processes_write_one_file(model, data, tmp_path):
    write(model, "demo:val", tmp_path / "one.npy")
    found = run_ranks(2, embed_in_rank, model, "demo:val", tmp_path / "two.npy")
    assert "2000 images" in found[0]
    # processes that share cores compute with fewer threads each, which may round otherwise
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"), rtol=0, atol=1e-5)


def test_what_cannot_be_written(model, data, tmp_path):
    with pytest.raises(UserError, match=r"ends in \.npy, \.safetensors, \.parquet"):
        write(model, data, tmp_path / "f.txt")
    bad = class_folders(tmp_path / "bad", per_class=1)
    next(bad.glob("*/*")).write_bytes(b"no image")
    with pytest.raises(UserError, match="not an image"):
        write(model, bad, tmp_path / "f.npy")


def test_parquet_or_what_to_install(model, data, tmp_path):
    out = tmp_path / "f.parquet"
    try:
        import pyarrow.parquet
    except ImportError:
        with pytest.raises(UserError, match=r"Parquet needs pyarrow; run pip install 'scale-mae\[parquet\]'"):
            write(model, data, out)
        return
    write(model, data, out)
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["path", "label", "features"]
    assert len(table) == 30


def test_through_the_command_line(model, data, tmp_path, capsys):
    assert main(["embed", str(model), str(data), "--out", str(tmp_path / "f.npy")]) == 0
    assert "30 images;" in capsys.readouterr().out
    assert main(["embed", str(model), str(data), "--out", str(tmp_path / "f")]) == 2
