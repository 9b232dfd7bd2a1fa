"""Checkpoints of plain DeepSpeed code: every name, dtype and value is that of the live model."""

import shutil
import subprocess
import sys

import pytest
import torch
from strangers import LAYOUTS

from scale_mae.checkpoint.convert import convert
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.checkpoint.tensor_file import TensorFiles
from scale_mae.checkpoint.zero_files import find_folder
from scale_mae.checkpoint.zero_reader import ZeroReader


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_stranger_is_that_of_its_live_model(strangers, layout):
    folder, state, moments = strangers[layout]
    reader = ZeroReader(find_folder(folder))
    for name, expected in state.items():
        got = reader[name]
        assert (got.dtype, got.shape) == (reader.dtype(name), reader.shape(name))
        assert torch.equal(got, torch.as_tensor(expected)), name
        assert got.dtype == torch.as_tensor(expected).dtype, name
    for name, expected in moments.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in expected:
                flat = torch.as_tensor(expected[key]).reshape(-1).float()
                assert torch.equal(reader.flat(name, key), flat), (name, key)
                assert torch.equal(reader.flat(name, key, 1, 3), flat[1:3]), (name, key)


def test_a_stranger_converts_to_the_very_same_tensors(strangers, tmp_path):
    folder, state, _ = strangers["zero3-bf16"]
    written = TensorFiles(convert(folder, "state_dict", tmp_path / "out", max_shard_gb=1e-7))
    assert set(written) >= set(state)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    for name, expected in state.items():
        assert torch.equal(written[name], torch.as_tensor(expected)), name


def test_a_missing_shard_and_files_of_two_steps_are_refused(strangers, tmp_path):
    folder, _, _ = strangers["zero2-bf16"]
    whole = find_folder(folder)
    other = next(p for p in whole.parent.iterdir() if p.is_dir() and p != whole)
    mixed, missing = shutil.copytree(whole, tmp_path / "mixed"), shutil.copytree(whole, tmp_path / "missing")
    name = next(whole.glob("*rank_1*optim_states.pt")).name
    shutil.copy(other / name, mixed / name)
    (missing / name).unlink()
    for path, text in ((missing, "1 of 2"), (mixed, "step|another save|of one save|differ")):
        with pytest.raises(CheckpointError, match=text):
            convert(path, "state_dict", tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_reading_needs_neither_deepspeed_nor_timm():
    program = "import sys, scale_mae.checkpoint.zero_reader; sys.exit('deepspeed' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
