"""The index, the plan, the decoder and the loader."""

import gzip
import io
import math
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

from scale_mae.config import DataConfig
from scale_mae.data.index import DataError, Index, scan
from scale_mae.data.loader import Loader, Share, denormalise, normalise
from scale_mae.data.pillow import Crop, central_square, decode, upright_size
from scale_mae.data.plan import SamplePlan, random_resized_crops


def jpeg(width=40, height=30, seed=0, mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def make_folders(root, classes=3, per_class=4):
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            (root / f"class{c}" / f"{i}.jpg").write_bytes(jpeg(seed=10 * c + i))
    return root


def make_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# ---------------------------------------------------------------- index


def test_shipped_images_are_what_the_readme_says():
    train, val = scan("demo:train"), scan("demo:val")
    assert np.bincount(train.entries["label"]).tolist() == [1000] * 10
    assert np.bincount(val.entries["label"]).tolist() == [200] * 10
    assert set(zip(train.entries["width"], train.entries["height"], strict=True)) == {(28, 28)}
    shipped = sum(Path(p).stat().st_size for p in [*train.shards, *val.shards])
    assert shipped <= 12e6


@pytest.mark.service("dataset-fashion-mnist")
def test_shipped_shards_are_made_from_the_originals(tmp_path):
    from scale_mae.demo_data.make import ORIGINALS, make, read_idx

    make(tmp_path)
    made, shipped = scan(str(tmp_path / "val-0000.tar.gz")), scan("demo:val")
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


def test_class_folders(tmp_path):
    index = scan(str(make_folders(tmp_path)))
    assert len(index) == 12
    assert index.classes == ["class0", "class1", "class2"]
    assert index.entries["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert index.read(5) == (tmp_path / "class1" / "1.jpg").read_bytes()
    assert set(index.entries["width"]) == {40}
    assert set(index.entries["height"]) == {30}


@pytest.mark.parametrize("packed", [False, True])
def test_tar_shards(tmp_path, packed):
    images = [jpeg(seed=i) for i in range(6)]
    for shard in range(2):
        samples = []
        for i in range(3 * shard, 3 * shard + 3):
            samples += [
                (f"a/img.{i}.jpg".replace("img.", "img"), images[i]),
                (f"a/img{i}.cls", b"%d\n" % (7 - i)),
                (f"a/img{i}.json", b"{}"),
            ]
        path = make_tar(tmp_path / f"s-{shard:02d}.tar", samples)
        if packed:
            path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    suffix = ".tar.gz" if packed else ".tar"
    for source in (str(tmp_path), f"{tmp_path}/s-{{00..01}}{suffix}"):
        index = scan(source)
        assert index.entries["label"].tolist() == [7, 6, 5, 4, 3, 2]
        assert [index.read(i) for i in range(6)] == images


def test_odd_file_names_are_read_as_they_are(tmp_path):
    folder = make_folders(tmp_path / "data", classes=1) / "class0"
    (folder / "a\nb.jpg").write_bytes(jpeg(seed=77))
    (folder / "\udcff.jpg").write_bytes(jpeg(seed=78))
    index = scan(str(tmp_path / "data"))
    index.save(tmp_path / "index")
    again = Index.open(tmp_path / "index")
    assert {again.read(i) for i in range(6)} == {p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "index" / "entries.npy").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        Index.open(tmp_path / "index")


def test_saved_index_is_mapped_back_whole(tmp_path):
    index = scan(str(make_folders(tmp_path / "data")))
    index.save(tmp_path / "run" / "index")
    again = Index.open(tmp_path / "run" / "index")
    assert isinstance(again.entries, np.memmap)
    assert (again.entries == index.entries).all()
    assert again.read(7) == index.read(7)
    assert again.classes == index.classes


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    make_tar(tmp_path / "cut.tar", [("1.jpg", jpeg())])
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    make_folders(tmp_path / "bad")
    (tmp_path / "bad" / "class1" / "0.jpg").write_bytes(b"no image")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 5000)[:-9] + b"123456789")
    make_tar(tmp_path / "label.tar", [("1.jpg", jpeg()), ("1.cls", b"\xff\xfe")])
    (tmp_path / "link" / "c").mkdir(parents=True)
    (tmp_path / "link" / "c" / "1.jpg").symlink_to(tmp_path / "gone")
    make_folders(tmp_path / "bomb")
    header = bytearray(b"".join([b"\x89PNG\r\n\x1a\n", b"\0\0\0\rIHDR", (40000).to_bytes(4, "big") * 2, b"\x08\x02\0\0\0"]))
    (tmp_path / "bomb" / "class0" / "0.jpg").write_bytes(bytes(header) + zlib.crc32(header[12:]).to_bytes(4, "big") + bytes(64))
    for source, message in (
        (tmp_path / "x.tar.gz", "not a whole tar file"),
        (tmp_path / "label.tar", "not a whole tar file"),
        (tmp_path / "link", "cannot be read"),
        (tmp_path / "bomb", "class0/0.jpg: not a readable image"),
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "empty", "no images found"),
        (tmp_path / "s-{0..3}.tar", "no such shard"),
        (tmp_path / "cut.tar", "not a whole tar file"),
        (tmp_path / "bad", "class1/0.jpg: not a readable image"),
        ("demo:nothing", "no such shard"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            scan(str(source))
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- plan


@given(st.integers(0, 2**63), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_and_epochs_differ(seed, size):
    plan = SamplePlan(seed, size, 8)
    epochs = plan.samples(np.arange(3 * size)).reshape(3, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    if size > 20:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[1] != epochs[2]).any()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_plan_does_not_depend_on_how_a_batch_is_split(ranks, accumulation, micro_batch, step):
    batch = ranks * accumulation * micro_batch
    plan = SamplePlan(1, 37, batch)
    parts = [
        plan.positions(step, rank, ranks, micro_step, micro_batch)
        for micro_step in range(accumulation)
        for rank in range(ranks)
    ]
    whole = plan.positions(step, 0, 1, 0, batch)
    assert np.concatenate(parts).tolist() == whole.tolist() == list(range(step * batch, (step + 1) * batch))
    sizes = np.full(batch, 100)
    options = {"scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5}
    for whole_result, part_results in (
        (plan.samples(whole), [plan.samples(p) for p in parts]),
        (plan.mask_noise(whole, 9), [plan.mask_noise(p, 9) for p in parts]),
        (
            plan.crops(whole, sizes, sizes, **options),
            [plan.crops(p, sizes[: len(p)], sizes[: len(p)], **options) for p in parts],
        ),
    ):
        assert np.array_equal(np.asarray(whole_result), np.concatenate([np.asarray(p) for p in part_results]))


def test_order_is_not_near_the_identity():
    order = SamplePlan(0, 10_000, 8).samples(np.arange(10_000))
    assert abs(stats.spearmanr(np.arange(10_000), order).statistic) < 0.05
    assert abs(stats.spearmanr(order, SamplePlan(1, 10_000, 8).samples(np.arange(10_000))).statistic) < 0.05


def test_masks_are_uniform_fresh_and_never_repeat():
    plan = SamplePlan(0, 100, 50)
    noise = plan.mask_noise(np.arange(2000), 16)
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    masks = {tuple(row.argsort()[:4].tolist()) for row in noise}
    assert len({row.tobytes() for row in noise}) == 2000
    assert len(masks) > 1500  # of 43,680 possible ones


def test_crop_boxes_follow_torchvision():
    n, width, height, scale, ratio = 4000, 90, 60, (0.2, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    plan = SamplePlan(0, n, 8)
    crops = plan.crops(np.arange(n), np.full(n, width), np.full(n, height), scale=scale, ratio=ratio, flip=0.5)
    ours = np.array([crop[:4] for crop in crops])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(1000, 10, (0, 493, 10, 13)), (10, 1000, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))]
)
def test_images_too_long_for_any_crop_get_torchvisions_central_one(width, height, expected):
    u = np.full((1, 22), 0.999)
    box = random_resized_crops(u, np.array([width]), np.array([height]), (0.9, 1.0), (3 / 4, 4 / 3))
    assert tuple(box[0]) == expected


def test_a_step_is_planned_in_microseconds_at_any_scale():
    def cost(size, step):
        plan = SamplePlan(0, size, 4096)
        times = []
        for s in range(step, step + 30):
            began = time.perf_counter()
            plan.samples(plan.positions(s, 5, 8, 0, 512))
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    assert cost(10**9, 10**7) < max(3 * cost(60_000, 1), 2e-3)


# ---------------------------------------------------------------- decoder


def test_decoding_equals_torchvisions_transform():
    data = jpeg(90, 60)
    image = Image.open(io.BytesIO(data))
    crop = Crop(5, 7, 40, 50, flip=True)
    expected = tvf.hflip(tvf.resized_crop(image, *crop[:4], [32, 48], tvf.InterpolationMode.BICUBIC))
    assert np.array_equal(decode(data, crop, (32, 48)), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(40, 20, exif=exif)
    size = upright_size(data)
    assert size == ((20, 40) if orientation >= 5 else (40, 20))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    whole = decode(data, Crop(0, 0, size[1], size[0], flip=False), (size[1], size[0]))
    assert np.array_equal(whole, np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_become_rgb(mode):
    assert decode(jpeg(mode=mode), central_square(40, 30), (16, 16)).shape == (16, 16, 3)


def test_normalise_and_back():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = normalise(images, mean, std)
    expected = torch.stack([tvf.normalize(tvf.to_tensor(i.numpy()), mean, std) for i in images])
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(denormalise(x, mean, std).permute(0, 2, 3, 1) * 255, images.float(), atol=1e-3, rtol=0)


# ---------------------------------------------------------------- loader


def make_loader(index, rank=0, ranks=1, accumulation=1, micro_batch=4, **data):
    plan = SamplePlan(0, len(index), ranks * accumulation * micro_batch)
    return Loader(index, plan, Share(rank, ranks, micro_batch, accumulation), DataConfig(**data), (16, 16), 4)


def test_batches_are_the_plans_whatever_the_threads_and_prefetch(tmp_path):
    index = scan(str(make_folders(tmp_path)))
    one = list(make_loader(index, threads=1, prefetch=1).batches(2, 8))
    many = list(make_loader(index, threads=5, prefetch=7).batches(2, 8))
    assert len(one) == len(many) == 6
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.noise, b.noise)
        assert a.samples.tolist() == b.samples.tolist()


def test_batches_do_not_depend_on_ranks(tmp_path):
    index = scan(str(make_folders(tmp_path)))
    whole = next(make_loader(index, micro_batch=8).batches(3, 4))
    parts = [next(make_loader(index, rank=r, ranks=2).batches(3, 4)) for r in range(2)]
    assert torch.equal(whole.images, torch.cat([p.images for p in parts]))
    assert torch.equal(whole.noise, torch.cat([p.noise for p in parts]))


def test_a_damaged_image_is_named(tmp_path):
    index = scan(str(make_folders(tmp_path)))
    path = tmp_path / "class2" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200] + bytes(path.stat().st_size - 200))
    with pytest.raises(DataError, match="class2/3.jpg: cannot be decoded"):
        list(make_loader(index).batches(0, 3))


def test_a_vanished_image_is_named(tmp_path):
    index = scan(str(make_folders(tmp_path)))
    (tmp_path / "class0" / "0.jpg").unlink()
    with pytest.raises(DataError, match="class0/0.jpg: cannot be read"):
        list(make_loader(index).batches(0, 3))


def test_prefetch_is_bounded(tmp_path, monkeypatch):
    index = scan(str(make_folders(tmp_path)))
    loader = make_loader(index, prefetch=2, threads=1)
    planned = []
    original = SamplePlan.samples
    monkeypatch.setattr(SamplePlan, "samples", lambda self, positions: planned.append(1) or original(self, positions))
    batches = loader.batches(0, 100)
    for taken in range(1, 5):
        next(batches)
        assert len(planned) <= taken + 2
    batches.close()


def test_epochs_are_exact():
    plan = SamplePlan(0, 10, 4)  # batches straddle epochs; every ten positions hold every image once
    samples = np.concatenate([plan.samples(plan.positions(s, 0, 1, 0, 4)) for s in range(5)])
    assert sorted(samples[:10]) == sorted(samples[10:]) == list(range(10))
    assert math.isclose(5 * 4 / 10, 2)
