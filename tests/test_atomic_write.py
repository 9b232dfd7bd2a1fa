"""An export is complete or absent. If anything fails, the previous file or folder is unchanged."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_export import IMAGES, SUFFIX

from scale_mae import UserError
from scale_mae.weights import atomic_write, graph_export
from scale_mae.weights.convert import convert
from scale_mae.weights.export_formats import FORMATS
from scale_mae.weights.inspection import inspect


def fail_for(monkeypatch, function, *names):
    """Let ``os.rename`` or ``os.replace`` fail for targets with these names."""
    real = getattr(os, function)

    def fails(source, target, *args, **options):
        if Path(target).name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target, *args, **options)

    monkeypatch.setattr(os, function, fails)


def read_all(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_stays_if_its_replacement_cannot_be_renamed(runs, tmp_path, monkeypatch):
    run_dir, _ = runs["zero2", "fp32"]
    out = convert(run_dir, "vit", tmp_path / "vit")
    before = read_all(out)
    real, failed = os.rename, []

    def fail_once(source, target, *args, **options):
        if Path(target) == out and not failed:
            failed.append(source)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target, *args, **options)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(UserError, match="vit: not written .*Input/output error"):
        convert(run_dir, "vit", out, dtype="fp16")
    assert failed
    assert read_all(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def test_a_previous_folder_that_could_not_be_moved_back_is_restored_by_the_next_export(runs, tmp_path, monkeypatch):
    """A process that is killed between the two renames leaves the same state."""
    run_dir, _ = runs["zero2", "fp32"]
    out = convert(run_dir, "vit", tmp_path / "vit")
    before = read_all(out)
    with monkeypatch.context() as patch:
        fail_for(patch, "rename", "vit")
        with pytest.raises(UserError, match="vit: not written"):
            convert(run_dir, "vit", out, dtype="fp16")
    assert read_all(tmp_path / ".vit.tmp" / atomic_write.REPLACED) == before
    with pytest.raises(UserError, match="check failed"):
        atomic_write.write_atomically(out, 0, Path.touch, fail_check)
    assert read_all(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def fail_check(target):
    raise UserError("check failed")


def test_an_onnx_file_with_external_data_is_complete_at_every_moment(runs, tmp_path, monkeypatch):
    """If a rename fails, the old file still has its old tensors. After the last rename, the old tensors are deleted."""
    import onnxruntime

    monkeypatch.setattr(graph_export, "ONNX_INLINE_BYTES", 0)
    run_dir, _ = runs["zero2", "fp32"]

    def compute():
        session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {"images": IMAGES.numpy()})[0]

    convert(run_dir, "onnx", tmp_path / "e.onnx")
    (data,) = tmp_path.glob("e.onnx.*.data")
    before = compute()
    with monkeypatch.context() as patch:
        fail_for(patch, "replace", "e.onnx")
        with pytest.raises(UserError, match="not written"):
            convert(runs["zero2", "bf16"][0], "onnx", tmp_path / "e.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.onnx", data.name]
    assert (compute() == before).all()
    convert(runs["zero2", "bf16"][0], "onnx", tmp_path / "e.onnx")
    assert len(list(tmp_path.iterdir())) == 2
    assert not data.exists()
    assert not (compute() == before).all()
    assert inspect(tmp_path / "e.onnx")["files"] == 2


# ---------------------------------------------------------------- a full disk


def export_to_full_disk(run_dir, disk):
    """Export every format to a disk that is too small, and return the errors and the files that were left.

    The lack of space is noticed before writing, or, if the first check of free space is skipped, during writing. Runs in a
    mount namespace of its own.
    """
    results, check_space = {}, atomic_write.check_space
    for to in FORMATS:
        out = disk / f"x{SUFFIX.get(to, '')}"
        for is_checked in (True, False):
            calls = []  # other processes fill the disk after the first check
            skip_first = lambda *args, calls=calls: check_space(*args) if calls else calls.append(1)  # noqa: E731
            atomic_write.check_space = check_space if is_checked else skip_first
            try:
                convert(run_dir, to, out)
                message = "written"
            except UserError as error:
                message = str(error)
            results[f"{to} {is_checked}"] = [message, [p.name for p in disk.iterdir()]]
    return results


def test_a_full_disk_gives_one_line_in_every_format_and_leaves_no_files(runs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    program = (
        f"import sys, json, subprocess; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
        f"subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', {str(disk)!r}], check=True)\n"
        "import test_atomic_write\n"
        f"results = test_atomic_write.export_to_full_disk(Path({str(runs['zero2', 'fp32'][0])!r}), Path({str(disk)!r}))\n"
        "print('results ' + json.dumps(results))"
    )
    flags = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *flags, "--mount", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(re.search(r"^results (.*)$", done.stdout, re.M)[1])
    assert len(results) == 2 * len(FORMATS)
    for case, (message, files) in results.items():
        assert re.search(r"x[.\w]*: not written \(.*(GB are needed, .* GB are free|No space left)", message), (case, message)
        assert "\n" not in message
        assert files == []
