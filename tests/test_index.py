"""Tests of building, reading and packing an index, and of reading bytes from storage."""

import errno
import gzip
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from images import jpeg, make_folders, make_tar
from PIL import Image
from safetensors.numpy import load_file

from scale_mae.cli import main
from scale_mae.config import UserError
from scale_mae.data import index_builder as building
from scale_mae.data import storage
from scale_mae.data.errors import DataError, ImageError, ImageStatus
from scale_mae.data.index import ENTRY_DTYPE, Index, ShardPaths, write_index
from scale_mae.data.index_builder import build_index, open_index
from scale_mae.data.pack import pack
from scale_mae.data.pillow import decode

PNG_BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (40000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
PNG_BOMB += zlib.crc32(PNG_BOMB[12:]).to_bytes(4, "big") + b"\0\0\0\x0aIDAT" + bytes(14)


def make_damaged(root):
    """Make class folders in which five of fourteen images are unreadable, each for a different reason."""
    make_folders(root)
    folder = root / "class1"
    for name, content in (
        ("0.jpg", b""),
        ("1.jpg", b"no image"),
        ("2.jpg", jpeg()[:-200]),
        ("3.png", PNG_BOMB),
    ):
        (folder / name).write_bytes(content)
    (root / "class2" / "gone.jpg").symlink_to(root / "nowhere")
    return root


# ---------------------------------------------------------------- index file


def test_the_demo_data_has_the_documented_size_and_labels():
    train, val = open_index("demo:train"), open_index("demo:val")
    assert np.bincount(train.entries["label"]).tolist() == [1000] * 10
    assert np.bincount(val.entries["label"]).tolist() == [200] * 10
    assert set(zip(train.entries["width"], train.entries["height"], strict=True)) == {(28, 28)}
    shipped = sum(Path(p).stat().st_size for p in [*train.shards, *val.shards])
    assert shipped <= 12e6


@pytest.mark.service("dataset-fashion-mnist")
def test_the_demo_shards_equal_the_original_fashion_mnist(tmp_path):
    from scale_mae.demo_data.pack_fashion_mnist import ORIGINALS, pack_shards, read_idx

    pack_shards(tmp_path)
    made, shipped = open_index(str(tmp_path / "val-0000.tar.gz")), open_index("demo:val")
    assert len(made) == len(shipped) == 2000
    images = read_idx(ORIGINALS / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(ORIGINALS / "t10k-labels-idx1-ubyte.gz", 8)
    with gzip.open(shipped.shards[0]) as file, tarfile.open(fileobj=file) as tar:
        names = [m.name for m in tar if m.name.endswith(".jpg")]
    for i in range(0, 2000, 97):
        original = int(names[i].removeprefix("val-").removesuffix(".jpg"))
        for index in (made, shipped):
            pixels = np.asarray(Image.open(io.BytesIO(index.read(i))), np.int16)
            assert np.abs(pixels - images[original]).mean() < 6
            assert index.entries["label"][i] == labels[original]


def test_an_index_row_contains_location_size_orientation_and_label(tmp_path):
    root = make_folders(tmp_path / "data")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (root / "class0" / f"turned{orientation}.jpg").write_bytes(jpeg(40, 20, exif=exif))
    index = build_index(str(root), tmp_path / "x.index")
    assert isinstance(index.entries, np.memmap)
    assert len(index) == 20
    assert index.classes == ["class0", "class1", "class2"]
    assert index.entries["label"].tolist() == [0] * 12 + [1] * 4 + [2] * 4
    assert set(index.entries["status"]) == {ImageStatus.DECODED}
    turned = {index.location(i)[-5]: index.entries[i] for i in range(20) if "turned" in index.location(i)}
    for orientation, row in turned.items():
        assert row["orientation"] == int(orientation)
        assert (row["width"], row["height"]) == ((20, 40) if int(orientation) >= 5 else (40, 20))
    for i in range(20):
        assert index.read(i) == Path(index.location(i)).read_bytes()
    assert load_file(tmp_path / "x.index")["entries"].shape == (20, 32)  # as documented


def test_an_index_can_be_moved_with_its_images_and_its_digest_depends_on_every_row(tmp_path):
    make_folders(tmp_path / "a" / "data")
    index = build_index(str(tmp_path / "a" / "data"), tmp_path / "a" / "x.index")
    expected = [index.read(i) for i in range(12)]
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Index.open(tmp_path / "b" / "x.index")
    assert [moved.read(i) for i in range(12)] == expected
    outside = build_index(str(tmp_path / "b" / "data"), tmp_path / "elsewhere" / "x.index")
    (tmp_path / "elsewhere").rename(tmp_path / "other")
    assert Index.open(tmp_path / "other" / "x.index").read(3) == outside.read(3) == expected[3]
    rows = np.array(moved.entries)
    rows["label"][4] = 9
    write_index(tmp_path / "y.index", rows, moved.shards, {"usable": 12, "classes": [], "source": "", "problems": []})
    assert len({index.digest, moved.digest}) == 1
    assert Index.open(tmp_path / "y.index").digest != index.digest


def test_file_names_with_line_breaks_and_invalid_utf8_are_supported(tmp_path):
    folder = make_folders(tmp_path / "data", classes=1) / "class0"
    (folder / "a\nb.jpg").write_bytes(jpeg(seed=77))
    (folder / "\udcff.jpg").write_bytes(jpeg(seed=78))
    (folder / "\udcfe\n.jpg").write_bytes(b"bad")
    index = build_index(str(tmp_path / "data"), tmp_path / "x.index")
    (line,) = (tmp_path / "x.index.quarantined.txt").read_text().splitlines()
    assert line.endswith("\\udcfe\\n.jpg\tnot an image")
    assert {index.read(i) for i in range(6)} == {p.read_bytes() for p in folder.iterdir()} - {b"bad"}


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:5], lambda b: b[:-9], lambda b: b"\xff" * 40, lambda b: b[8:]])
def test_a_damaged_index_raises_a_one_line_error(tmp_path, damage):
    path = tmp_path / "x.index"
    build_index(str(make_folders(tmp_path / "data")), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="damaged index") as caught:
        Index.open(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such index"):
        Index.open(tmp_path / "absent.index")


def test_opening_an_index_of_14_million_images_is_fast_and_small(tmp_path):
    """Opening takes under 0.2 s and 50 MB of private memory, whatever the number of rows and paths."""
    count = 14_000_000
    rows = np.zeros(count, ENTRY_DTYPE)
    rows["shard"] = np.arange(count)
    text = np.tile(np.frombuffer(b"n01440764/n01440764_10026.JPEG", np.uint8), count)
    ends = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(30)
    facts = {"usable": count, "classes": [], "source": "", "problems": []}
    write_index(tmp_path / "x.index", rows, ShardPaths("/data", text, ends), facts)
    del rows, text, ends
    program = (
        "import psutil, sys, time; from scale_mae.data.index import Index; own = psutil.Process().memory_full_info;"
        "before = own().uss;"
        "began = time.perf_counter(); index = Index.open(sys.argv[1]); opened = time.perf_counter() - began;"
        "assert len(index) == 14_000_000; assert index.location(13_999_999) == '/data/n01440764/n01440764_10026.JPEG';"
        "print(opened, own().uss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.index")], capture_output=True, text=True, check=True
    )
    seconds, memory = map(float, done.stdout.split())
    assert seconds < 0.2
    assert memory < 50e6


# ---------------------------------------------------------------- building


def test_unreadable_images_are_quarantined_with_their_cause(tmp_path):
    index = build_index(str(make_damaged(tmp_path / "data")), tmp_path / "x.index")
    assert index.quarantine_counts() == {
        "empty file": 1,
        "unreadable": 1,
        "not an image": 1,
        "damaged": 1,
        "too many pixels": 1,
    }
    assert len(index) == 9
    assert max(index.entries["status"]) == ImageStatus.DECODED
    quarantined = dict(line.split("\t") for line in (tmp_path / "x.index.quarantined.txt").read_text().splitlines())
    assert {Path(path).name: cause for path, cause in quarantined.items()} == {
        "0.jpg": "empty file",
        "1.jpg": "not an image",
        "2.jpg": "damaged",
        "3.png": "too many pixels",
        "gone.jpg": "unreadable",
    }


def test_without_verification_only_headers_are_checked(tmp_path):
    index = build_index(str(make_damaged(tmp_path / "data")), tmp_path / "x.index", verify=False)
    assert "damaged" not in index.quarantine_counts()
    assert set(index.entries["status"]) == {ImageStatus.HEADER_READ}
    assert set(index.entries["width"]) == {40}


def test_a_source_without_usable_images_raises_an_error(tmp_path):
    (tmp_path / "data" / "c").mkdir(parents=True)
    (tmp_path / "data" / "c" / "1.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 1 images is usable. .*1\.jpg: not an image"):
        build_index(str(tmp_path / "data"), tmp_path / "x.index")
    assert not (tmp_path / "x.index").exists()


def test_an_interrupted_build_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "CHUNK", 2)
    root = str(make_damaged(tmp_path / "data"))
    expected = build_index(root, tmp_path / "whole.index")

    def interrupt(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(root, tmp_path / "x.index", workers=1, progress=interrupt)
    assert not (tmp_path / "x.index").exists()
    progress = []
    with pytest.raises(DataError, match="unfinished index"):
        build_index(root, tmp_path / "x.index", verify=False)
    index = build_index(root, tmp_path / "x.index", progress=lambda done, total: progress.append(done))
    assert progress[0] >= 6
    assert index.digest == expected.digest
    assert not list(tmp_path.glob("x.index.partial*"))


def test_a_killed_build_leaves_no_process_and_continues(tmp_path):
    root = make_folders(tmp_path / "data", classes=1, per_class=1)
    slow = jpeg(2500, 2500)
    for i in range(60):
        (root / "class0" / f"x{i}.jpg").write_bytes(slow)
    program = "import sys; from scale_mae.data import index_builder as b; b.CHUNK = 3; b.build_index(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", program, str(root), str(tmp_path / "x.index")])
    partial = tmp_path / "x.index.partial"
    while not partial.exists() or not (np.array(building.map_index(partial)[1]["status"]) == ImageStatus.DECODED).any():
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    with pytest.raises(UserError, match="is being built by process"):
        build_index(str(root), tmp_path / "x.index")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    progress = []
    index = build_index(str(root), tmp_path / "x.index", progress=lambda done, total: progress.append(done))
    assert 0 < progress[0] < 61
    assert len(index) == 61


def test_an_image_that_crashes_the_decoder_is_quarantined(tmp_path, monkeypatch):
    root = make_folders(tmp_path / "data")
    (root / "class1" / "2.jpg").write_bytes(b"poison")
    original = building.read_image_header

    def end(data):
        if data == b"poison":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(building, "read_image_header", lambda data, verify=False: end(data) or original(data, verify=verify))
    index = build_index(str(root), tmp_path / "x.index")
    assert index.quarantine_counts() == {"crashes the decoder": 1}
    assert len(index) == 11


def test_the_complete_images_of_a_truncated_tar_are_used(tmp_path, capsys):
    shard = make_tar(tmp_path / "s.tar", [(f"{i}.jpg", jpeg(seed=i)) for i in range(6)])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert main(["index", str(shard), "--out", str(tmp_path / "x.index")]) == 0
    index = Index.open(tmp_path / "x.index")
    assert 1 <= len(index) < 6
    assert [index.read(i) for i in range(len(index))] == [jpeg(seed=i) for i in range(len(index))]
    assert f"{shard}: " in capsys.readouterr().err


def test_pipes_folders_and_huge_files_are_quarantined(tmp_path):
    root = make_folders(tmp_path / "data")
    os.mkfifo(root / "class0" / "pipe.jpg")
    with open(root / "class0" / "huge.jpg", "wb") as file:
        file.truncate(5 << 30)
    (root / "class1" / "folder.jpg").mkdir()
    (root / "class1" / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n")
    index = build_index(str(root), tmp_path / "x.index")
    assert index.quarantine_counts() == {"unreadable": 1, "not an image": 1, "too many pixels": 1}
    assert len(index) == 12


def test_workers_that_are_killed_at_the_start_stop_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr("scale_mae.system.process_pool._start_worker", lambda given: os._exit(1))
    with pytest.raises(DataError, match="killed as they start"):
        build_index(str(make_folders(tmp_path / "data")), tmp_path / "x.index")


def test_a_truncated_unfinished_index_raises_an_error(tmp_path):
    root = str(make_folders(tmp_path / "data"))
    with pytest.raises(KeyboardInterrupt):
        build_index(root, tmp_path / "x.index", progress=lambda done, total: exec("raise KeyboardInterrupt"))
    partial = tmp_path / "x.index.partial"
    partial.write_bytes(partial.read_bytes()[:-600])
    with pytest.raises(DataError, match="truncated"):
        build_index(root, tmp_path / "x.index")


# ---------------------------------------------------------------- storage


def test_transient_read_errors_are_retried(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    pauses, failures = [], [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]
    original = os.pread

    def pread(*args):
        if failures:
            raise OSError(failures.pop(0), "storage fails")
        return original(args[0], min(args[1], 3), args[2])  # return less than requested

    monkeypatch.setattr(storage.os, "pread", pread)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    assert storage.read(str(path), 2, 7) == b"2345678"
    assert pauses == sorted(pauses)
    assert len(pauses) == 3
    failures += [errno.EIO] * 9
    with pytest.raises(ImageError, match=r"unreadable \(storage fails, 4 attempts") as caught:
        storage.read(str(path), 0, 4)
    assert caught.value.cause is ImageStatus.UNREADABLE
    assert len(failures) == 5
    with pytest.raises(ImageError, match="No such file"):
        storage.read(str(tmp_path / "absent"), 0, 4)
    assert len(failures) == 5


def test_the_number_of_open_shards_is_limited(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for i in range(2 * storage.MAX_OPEN_SHARDS):
        (tmp_path / f"{i}").write_bytes(b"abcdef")
        assert storage.read(str(tmp_path / f"{i}"), 2, 3) == b"cde"
        assert storage.read(str(tmp_path / f"{i}"), 0, 3) == b"abc"
    assert len(os.listdir("/proc/self/fd")) <= before + storage.MAX_OPEN_SHARDS


# ---------------------------------------------------------------- packing


def test_packed_shards_contain_every_image_once_shuffled_and_scaled_down(tmp_path):
    root = make_folders(tmp_path / "data", classes=3, per_class=10)
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "class0" / "turned.jpg").write_bytes(jpeg(40, 20, exif=exif))
    Image.new("CMYK", (50, 60)).save(root / "class1" / "cmyk.jpg")
    (root / "class2" / "0.jpg").write_bytes(b"bad")
    index = build_index(str(root), tmp_path / "x.index")
    packed = pack(str(tmp_path / "x.index"), tmp_path / "out", short_side=16, shard_mb=0.02, workers=2).index
    assert len(packed) == len(index) == 31
    assert packed.classes == index.classes
    assert np.bincount(packed.entries["label"]).tolist() == np.bincount(index.entries["label"]).tolist()
    assert (np.minimum(packed.entries["width"], packed.entries["height"]) == 16).all()
    assert len(packed.shards) > 2
    labels = packed.entries["label"].tolist()
    assert labels != sorted(labels)
    turned = [i for i in range(31) if packed.entries["height"][i] == 32]
    assert len(turned) == 1
    assert len({packed.read(i) for i in range(31)}) == 31
    assert open_index(str(tmp_path / "out")).digest == packed.digest
    with tarfile.open(packed.shards[0]) as tar:
        assert {os.path.splitext(name)[1] for name in tar.getnames()} == {".jpg", ".cls"}


def test_interrupted_packing_continues(tmp_path):
    root = str(make_folders(tmp_path / "data", classes=3, per_class=10))
    build_index(root, tmp_path / "x.index")
    source, options = str(tmp_path / "x.index"), {"short_side": 16, "shard_mb": 0.02, "workers": 1}
    expected = pack(source, tmp_path / "whole", **options).index

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", **options, progress=interrupt)
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert 0 < len(shards) < len(expected.shards) - 2  # no further shard was started
    again = pack(source, tmp_path / "out", **options).index
    assert all(path.stat().st_mtime_ns == written for path, written in shards.items())
    assert [again.read(i) for i in range(30)] == [expected.read(i) for i in range(30)]
    with pytest.raises(DataError, match="contains shards of other images or settings"):
        pack(source, tmp_path / "out", short_side=17)
    with pytest.raises(DataError, match="data: not empty"):
        pack(source, tmp_path / "data")
    with pytest.raises(DataError, match="quality"):
        pack(source, tmp_path / "new", quality=100)


def test_killed_packing_continues_and_loses_no_image(tmp_path):
    root = make_folders(tmp_path / "data", classes=2, per_class=30)
    for i in range(0, 30, 3):
        path = root / "class1" / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    build_index(str(root), tmp_path / "x.index", verify=False)
    source, out = str(tmp_path / "x.index"), tmp_path / "out"
    program = (
        "import sys, time; from scale_mae.data import pack; add = pack._add;"
        "pack._add = lambda *args: (time.sleep(0.02), add(*args));"
        "pack.pack(sys.argv[1], sys.argv[2], short_side=16, shard_mb=0.01, workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, source, str(out)])
    while len(list(out.glob("*.tar"))) < 3:
        time.sleep(0.01)
    with pytest.raises(UserError, match="is being packed by process"):
        pack(source, out, short_side=16, shard_mb=0.01)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=10)
    before = len(list(out.glob("*.tar")))
    for i in range(0, 30, 2):  # the images per shard must not be estimated again
        (root / "class0" / f"{i}.jpg").unlink()
    packed = pack(source, out, short_side=16, shard_mb=0.01)
    assert before < len(packed.index.shards)
    assert len(packed.index) + len(packed.skipped) == 60
    assert sum("class1" in line for line in packed.skipped) == 10
    assert not list(out.glob("*.tmp"))


def test_packing_reports_skipped_images(tmp_path, capsys):
    root = make_folders(tmp_path / "data")
    (root / "class1" / "1.jpg").write_bytes(jpeg()[:-200])
    (root / "class1" / "2.jpg").write_bytes(b"")
    assert main(["pack", str(root), "--out", str(tmp_path / "out"), "--short-side", "20"]) == 0
    text = capsys.readouterr()
    assert "class1/1.jpg: damaged" in text.err
    assert "class1/2.jpg: empty file" in text.err
    assert "10 images in 1 shards" in text.out
    assert decode(open_index(str(tmp_path / "out")).read(0), (0, 0, 20, 20, False), (8, 8)).shape == (8, 8, 3)


def test_the_index_command_reports_results_and_errors(tmp_path, capsys):
    make_damaged(tmp_path / "data")
    assert main(["index", str(tmp_path / "data"), "--out", str(tmp_path / "x.index"), "--workers", "2"]) == 0
    text = capsys.readouterr()
    assert "9 images, 3 named classes" in text.out
    assert "1 empty file" in text.err
    assert "14 of 14 images" in text.err
    for words, message in (
        (["index", "demo:val", "--out", str(tmp_path / "x")], "ends in .index"),
        (["index", str(tmp_path / "absent"), "--out", str(tmp_path / "x.index")], "absent"),
        (["index", "demo:val", "--out", "/proc/x.index"], "cannot be written"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
