"""An export gets its name when it is whole; until then, and when anything fails, what had the name is there as it was."""

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


def refuse(monkeypatch, method, *names):
    """Let moving to these names fail."""
    real = getattr(os, method)

    def fails(source, target, *args, **options):
        if Path(target).name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target, *args, **options)

    monkeypatch.setattr(os, method, fails)


def content_of(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_folder_that_cannot_be_replaced_stays(runs, tmp_path, monkeypatch):
    run_dir, _ = runs["zero2", "fp32"]
    out = convert(run_dir, "vit", tmp_path / "vit")
    before = content_of(out)
    real, tried = os.rename, []

    def once(source, target, *args, **options):
        if Path(target) == out and not tried:
            tried.append(source)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target, *args, **options)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(UserError, match="vit: not written .*Input/output error"):
        convert(run_dir, "vit", out, dtype="fp16")
    assert tried
    assert content_of(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def test_an_old_folder_that_cannot_even_be_moved_back_is_not_deleted_and_found_again(runs, tmp_path, monkeypatch):
    """The same is left when the process is killed between the two renames."""
    run_dir, _ = runs["zero2", "fp32"]
    out = convert(run_dir, "vit", tmp_path / "vit")
    before = content_of(out)
    with monkeypatch.context() as patch:
        refuse(patch, "rename", "vit")
        with pytest.raises(UserError, match="vit: not written"):
            convert(run_dir, "vit", out, dtype="fp16")
    assert content_of(tmp_path / ".vit.tmp" / atomic_write.REPLACED) == before
    with pytest.raises(UserError, match="a full stop"):
        atomic_write.write_atomically(out, 0, Path.touch, lambda target: stop())
    assert content_of(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def stop():
    raise UserError("a full stop")


def test_onnx_with_its_tensors_beside_it_is_whole_at_every_moment(runs, tmp_path, monkeypatch):
    """Whatever move fails, the old file names the old tensors; after the last, the old tensors are gone."""
    import onnxruntime

    monkeypatch.setattr(graph_export, "ONNX_INLINE_BYTES", 0)
    run_dir, _ = runs["zero2", "fp32"]

    def compute():
        session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {"images": IMAGES.numpy()})[0]

    convert(run_dir, "onnx", tmp_path / "e.onnx")
    (data,) = tmp_path.glob("e.onnx.*.data")
    old = compute()
    with monkeypatch.context() as patch:
        refuse(patch, "replace", "e.onnx")
        with pytest.raises(UserError, match="not written"):
            convert(runs["zero2", "bf16"][0], "onnx", tmp_path / "e.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.onnx", data.name]
    assert (compute() == old).all()
    convert(runs["zero2", "bf16"][0], "onnx", tmp_path / "e.onnx")
    assert len(list(tmp_path.iterdir())) == 2
    assert not data.exists()
    assert not (compute() == old).all()
    assert inspect(tmp_path / "e.onnx")["files"] == 2


# ---------------------------------------------------------------- a full disk


def on_full_disks(run_dir, disk):
    """In a mount namespace of its own: every format on a disk too small, seen before and while it is written; what was said."""
    told, real = {}, atomic_write.check_space
    for to in FORMATS:
        out = disk / f"x{SUFFIX.get(to, '')}"
        for seen in (True, False):
            first = []  # others fill the disk between the look at it and the writing
            atomic_write.check_space = real if seen else lambda *args, first=first: real(*args) if first else first.append(1)
            try:
                convert(run_dir, to, out)
                told[f"{to} {seen}"] = "written"
            except UserError as error:
                told[f"{to} {seen}"] = str(error)
            told[f"{to} {seen} left"] = [p.name for p in disk.iterdir()]
    return told


def test_a_full_disk_is_one_line_in_every_format_and_leaves_nothing(runs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    program = (
        f"import sys, json, subprocess; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
        f"subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', {str(disk)!r}], check=True)\n"
        "import test_atomic_write\n"
        f"told = test_atomic_write.on_full_disks(Path({str(runs['zero2', 'fp32'][0])!r}), Path({str(disk)!r}))\n"
        "print('told ' + json.dumps(told))"
    )
    flags = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *flags, "--mount", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    told = json.loads(re.search(r"^told (.*)$", done.stdout, re.M)[1])
    for to in FORMATS:
        for seen in (True, False):
            line = told[f"{to} {seen}"]
            assert re.search(r"x[.\w]*: not written \(.*(GB are needed, .* GB are free|No space left)", line), (to, seen, line)
            assert "\n" not in line
            assert told[f"{to} {seen} left"] == []
