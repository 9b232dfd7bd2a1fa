"""Tests of the reference decoder, of loading batches ahead of time, and of replacing unreadable images."""

import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from images import jpeg, make_folders
from PIL import Image, ImageOps
from torchvision.transforms import functional as tvf

from scale_mae.config.schema import DataConfig
from scale_mae.data import decoders, loader, storage
from scale_mae.data.decoders import PillowDecoder
from scale_mae.data.errors import DataError, ImageError, ImageStatus
from scale_mae.data.failure_counter import WINDOW, DecodeFailure, FailureCounter
from scale_mae.data.index_builder import open_index
from scale_mae.data.loader import BatchShard, Loader, default_prefetch
from scale_mae.data.pillow import Crop, center_square, decode, read_image_header
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.transforms import color_jitter, denormalize, normalize
from scale_mae.system import resources

# ---------------------------------------------------------------- the reference decoder


def test_decode_equals_torchvision():
    data = jpeg(90, 60)
    image = Image.open(io.BytesIO(data))
    crop = Crop(5, 7, 40, 50, flip=True)
    actual, bicubic = decode(data, crop, (32, 48)), tvf.InterpolationMode.BICUBIC
    reference = np.asarray(tvf.hflip(tvf.resized_crop(image, *crop[:4], [32, 48], bicubic)), np.int16)
    assert np.abs(actual - reference).mean() < 0.5  # the order of the two resizing passes depends on the version of Pillow
    rows_first = tvf.resize(tvf.resized_crop(image, *crop[:4], [40, 48], bicubic), [32, 48], bicubic)
    assert np.array_equal(actual, np.asarray(tvf.hflip(rows_first)))


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(40, 20, exif=exif)
    header = read_image_header(data, verify=False)
    assert header[:2] == ((20, 40) if 5 <= orientation <= 8 else (40, 20))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    whole = decode(data, Crop(0, 0, header.height, header.width, flip=False), (header.height, header.width))
    assert np.array_equal(whole, np.asarray(upright))


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_every_image_mode_becomes_rgb():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8), (30, 1)))
    color = Image.merge("RGB", [ramp, ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT), ramp])
    deep = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    alpha = color.copy()
    alpha.putalpha(ramp)
    whole, size = Crop(0, 0, 30, 40, flip=False), (30, 40)
    for image, data, tolerance in (
        (ramp, saved(ramp, "JPEG", quality=95), 6),
        (ramp, saved(deep, "PNG"), 0),
        (ramp, saved(deep, "TIFF"), 0),
        (color, saved(color, "PNG"), 0),
        (color, saved(alpha, "PNG"), 0),
        (color, saved(color.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), 20),
        (color, saved(color, "WEBP", lossless=True), 0),
        (color, saved(color.convert("CMYK"), "JPEG", quality=95), 60),  # Pillow writes and reads Adobe's inverted form
        (color, saved(color.convert("YCbCr"), "JPEG", quality=95), 60),
        (ramp.point(lambda v: 255 * (v > 100), "1"), saved(ramp.point(lambda v: 255 * (v > 100), "1"), "PNG"), 0),
    ):
        expected = np.asarray(image.convert("RGB"), np.int16)
        assert np.abs(decode(data, whole, size) - expected).max() <= tolerance


def test_one_pixel_images_and_very_large_images():
    assert (decode(saved(Image.new("RGB", (1, 1), "red"), "PNG"), Crop(0, 0, 1, 1, False), (4, 4)) == [255, 0, 0]).all()
    wide = saved(Image.new("L", (65000, 40), 77), "PNG")
    assert (decode(wide, Crop(0, 30000, 40, 40, False), (8, 8)) == 77).all()
    with pytest.raises(ImageError, match="too many pixels") as caught:
        read_image_header(saved(Image.new("1", (20000, 20000)), "PNG"), verify=False)
    assert caught.value.cause is ImageStatus.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", ImageStatus.EMPTY),
        (b"hello", ImageStatus.NOT_AN_IMAGE),
        (jpeg()[:-300], ImageStatus.DAMAGED),
        (jpeg(20, 10), ImageStatus.DAMAGED),
    ],
)
def test_an_unreadable_image_raises_an_error_with_its_cause(data, cause):
    with pytest.raises(ImageError) as caught:
        decode(data, center_square(40, 30), (16, 16))
    assert caught.value.cause is cause
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- transforms


def test_normalize_equals_torchvision_and_denormalize_inverts_it():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = normalize(images, mean, std)
    expected = torch.stack([tvf.normalize(tvf.to_tensor(i.numpy()), mean, std) for i in images])
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(denormalize(x, mean, std).permute(0, 2, 3, 1) * 255, images.float(), atol=1e-3, rtol=0)


def test_color_jitter_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((12, 3, 8, 8), generator=generator)
    jitter = torch.from_numpy(SamplePlan(0, 10, 8).color_jitter(np.arange(12), (0.4, 0.4, 0.4)))
    changed = color_jitter(images, jitter)
    changes = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)
    for image, drawn, actual in zip(images, jitter, changed, strict=True):
        reference = image
        for which in drawn[3:].argsort().tolist():
            reference = changes[which](reference, drawn[which].item())
        torch.testing.assert_close(actual, reference, atol=1e-5, rtol=0)
    assert (changed - images).abs().max() > 0.2


# ---------------------------------------------------------------- batches


def make_loader(index, rank=0, ranks=1, accumulation=1, micro_batch=4, warn=print, decoder=None, **data):
    plan = SamplePlan(0, len(index), ranks * accumulation * micro_batch)
    batch_shard = BatchShard(rank, ranks, micro_batch, accumulation)
    decoder = decoder or PillowDecoder((16, 16))
    return Loader(
        index=index,
        plan=plan,
        batch_shard=batch_shard,
        config=DataConfig(**data),
        decoder=decoder,
        image_size=(16, 16),
        num_patches=4,
        warn=warn,
    )


def test_batches_do_not_depend_on_threads_and_prefetch(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    one = list(make_loader(index, threads=1, prefetch=1).batches(2, 8))
    many = list(make_loader(index, threads=5, prefetch=7).batches(2, 8))
    assert len(one) == len(many) == 6
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.mask_noise, b.mask_noise)
        assert a.samples.tolist() == b.samples.tolist()
        assert not a.failures


def test_batches_contain_the_planned_images_and_the_indexed_labels(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    plan = SamplePlan(0, 12, 4)
    for step, batch in enumerate(make_loader(index).batches(0, 6)):
        positions = np.arange(4 * step, 4 * step + 4)
        samples = plan.samples(positions)
        crops = plan.crops(positions, np.full(4, 40), np.full(4, 30), DataConfig(), (16, 16))
        expected = [decode(index.read(s), crop, (16, 16)) for s, crop in zip(samples, crops, strict=True)]
        assert np.array_equal(batch.images.numpy(), np.stack(expected))
        assert [Path(index.location(s)).parent.name for s in samples] == [
            f"class{label}" for label in index.entries["label"][batch.samples]
        ]


def test_a_run_that_is_killed_and_resumed_with_other_world_sizes_loads_the_same_images(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    undisturbed = list(make_loader(index, micro_batch=12).batches(0, 20))
    generator, step, images, threads = random.Random(0), 0, [], threading.active_count()
    for ranks in (2, 4, 1, 3):
        last = min(20, step + generator.randint(2, 6)) if ranks != 3 else 20
        streams = [
            make_loader(index, rank=r, ranks=ranks, micro_batch=12 // ranks, threads=2).batches(step, 99) for r in range(ranks)
        ]
        for _ in range(step, last):
            images.append(torch.cat([next(stream).images for stream in streams]))
        for stream in streams:
            stream.close()
        step = last
    time.sleep(0.2)
    assert threading.active_count() <= threads + 1  # the thread pools have ended
    assert torch.equal(torch.stack(images), torch.stack([batch.images for batch in undisturbed]))


def test_only_random_crop_jitter_adds_color_jitter_to_a_batch(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    assert next(make_loader(index).batches(0, 1)).color_jitter is None
    batch = next(make_loader(index, augmentation="random_crop_jitter").batches(0, 1))
    assert batch.color_jitter.shape == (4, 6)


def test_prefetch_is_limited_and_depends_on_memory_and_threads(tmp_path, monkeypatch):
    index = open_index(str(make_folders(tmp_path)))
    planned = []
    original = SamplePlan.samples
    monkeypatch.setattr(SamplePlan, "samples", lambda self, positions: planned.append(1) or original(self, positions))
    batches = make_loader(index, prefetch=2, threads=1).batches(0, 100)
    for taken in range(1, 5):
        next(batches)
        time.sleep(0.05)
        assert len(planned) <= taken + 2 + 1
    batches.close()
    monkeypatch.setattr(loader, "available_memory", lambda: 64 << 30)
    assert default_prefetch(256, 16, (224, 224)) == 4
    assert default_prefetch(4, 16, (224, 224)) == 8
    monkeypatch.setattr(loader, "available_memory", lambda: 2 << 30)
    assert default_prefetch(256, 16, (224, 224)) == 2
    monkeypatch.setattr(loader, "available_memory", lambda: 0)
    assert default_prefetch(256, 16, (224, 224)) == 1


@pytest.mark.parametrize(("micro_batch", "batches"), [(1, 160), (4, 40), (16, 10)])
def test_all_threads_are_busy_for_any_batch_size(tmp_path, micro_batch, batches):
    class Slow(PillowDecoder):
        def prepare_image(self, data, crop):
            time.sleep(0.05)
            return super().prepare_image(data, crop)

    index = open_index(str(make_folders(tmp_path)))
    stream = make_loader(index, micro_batch=micro_batch, threads=8, decoder=Slow((16, 16))).batches(0, batches)
    began = time.perf_counter()
    assert sum(len(batch.images) for batch in stream) == 160
    assert time.perf_counter() - began < 2 * 160 / 8 * 0.05


def test_available_memory_respects_the_control_group(tmp_path, monkeypatch):
    for group, limit, usage in (("", "max", 0), ("job", 1 << 30, 1 << 29), ("job/step", "max", 5)):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / group / "memory.current").write_text(f"{usage}\n")
        (tmp_path / group / "memory.stat").write_text("anon 7\ninactive_file 1000\n")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    original = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path: "0::/job/step\n" if str(path) == "/proc/self/cgroup" else original(path)
    )
    assert resources.available_memory() == (1 << 29) + 1000


# ---------------------------------------------------------------- unreadable images


def damage_images(root):
    """Make three of twelve images unreadable, each in a different way."""
    (root / "class0" / "0.jpg").unlink()
    (root / "class1" / "1.jpg").write_bytes(bytes(9999))
    path = root / "class2" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300] + bytes(path.stat().st_size - 300))


def test_unreadable_images_get_the_same_substitutes_and_are_reported(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    damage_images(tmp_path)
    streams = [list(make_loader(index, threads=threads).batches(0, 6)) for threads in (1, 4)]
    for one, other in zip(*streams, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.failures == other.failures
        assert len(one.images) == 4
    failures = [failure for batch in streams[0] for failure in batch.failures]
    assert {(Path(f.location).parent.name, f.cause) for f in failures} == {
        ("class0", ImageStatus.UNREADABLE),
        ("class1", ImageStatus.NOT_AN_IMAGE),
        ("class2", ImageStatus.DAMAGED),
    }
    plan = SamplePlan(0, 12, 4)
    used = {int(s) for batch in streams[0] for s in batch.samples}
    assert used == set(range(12)) - {0, 5, 11}
    for failure in failures:
        assert failure.substitute in [index.location(s) for s in plan.substitutes(failure.position)]
        assert str(failure).startswith(f"{failure.location}: ")
    ranks = [list(make_loader(index, rank=r, ranks=2, micro_batch=2).batches(0, 6)) for r in range(2)]
    for step in range(6):
        assert torch.equal(torch.cat([ranks[0][step].images, ranks[1][step].images]), streams[0][step].images)


def test_without_a_readable_substitute_a_one_line_error_is_raised(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"not an image .* None of \d+ substitutes .* Check the storage") as caught:
        next(make_loader(index).batches(0, 3))
    assert "\n" not in str(caught.value)


def test_images_that_fail_in_the_second_decoder_stage_are_replaced(tmp_path):
    class Late(PillowDecoder):
        def decode_batch(self, prepared):
            images, _ = super().decode_batch(prepared)
            return images, {1: ImageError(ImageStatus.DAMAGED, "late")}

    index = open_index(str(make_folders(tmp_path)))
    expected = next(make_loader(index).batches(0, 1))
    batch = next(make_loader(index, decoder=Late((16, 16))).batches(0, 1))
    assert torch.equal(batch.images[[0, 2, 3]], expected.images[[0, 2, 3]])
    (failure,) = batch.failures
    assert failure.position == 1
    assert failure.location == index.location(expected.samples[1])
    assert not torch.equal(batch.images[1], expected.images[1])
    assert index.location(batch.samples[1]) == failure.substitute


def test_reads_that_hang_are_retried_reported_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "READ_TIMEOUTS", (0.3, 0.3, 0.3))
    index = open_index(str(make_folders(tmp_path)))
    slow, hung = tmp_path / "class0" / "1.jpg", tmp_path / "class1" / "2.jpg"
    answers, original = {str(slow): threading.Event(), str(hung): threading.Event()}, storage._OpenFile

    def hang(path):
        if path in answers:
            answers[path].wait()
        return original(path)

    monkeypatch.setattr(storage, "_OpenFile", hang)
    threading.Timer(0.5, answers[str(slow)].set).start()
    warnings = []
    batches = list(make_loader(index, threads=2, warn=warnings.append).batches(0, 3))
    answers[str(hung)].set()
    failures = [failure for batch in batches for failure in batch.failures]
    assert {(f.location, f.cause) for f in failures} == {(str(hung), ImageStatus.UNREADABLE)}
    assert "no answer for 0.9 s" in failures[0].reason
    assert any(str(slow) in line for line in warnings)
    assert sum(str(hung) in line for line in warnings) == 3


def test_a_process_exits_while_a_read_hangs(tmp_path):
    make_folders(tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_loader; import time; from scale_mae.data import storage;"
        "storage.READ_TIMEOUTS = (0.2, 0.2); index = test_loader.open_index(sys.argv[1]);"
        "storage._OpenFile = lambda path: time.sleep(1000);"
        "next(test_loader.make_loader(index).batches(0, 3))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.search(r"DataError: .*unreadable \(no answer for 0.2 s\)\. None of \d+ substitutes", done.stderr)


def count(counter, images, failures):
    counter.add(images, failures)
    counter.check(images, failures)


def test_the_failure_limit_applies_to_the_last_100000_images():
    bad = [DecodeFailure(0, "a.jpg", ImageStatus.DAMAGED, "cut", "b.jpg")]
    counter = FailureCounter(0.001)
    for images in range(1000, 10**6, 1000):
        count(counter, images, bad if images % 2000 == 0 else [])  # 50 in a window of 100,000
    assert counter.counts == {ImageStatus.DAMAGED: 499}
    start = 10**6 + WINDOW + 1000
    for images in range(start, start + 50_000, 1000):
        count(counter, images, bad)
    counter = FailureCounter(
        0.001,
        json.loads(
            json.dumps(counter.state_dict()), object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()}
        ),
    )
    for images in range(start + 50_000, start + WINDOW, 1000):  # the same rate after a resume
        count(counter, images, bad)
    count(counter, start + WINDOW - 600, [])
    with pytest.raises(
        DataError, match=r"101 of the last 100000 images .*600 damaged since the start.*0.001.*a.jpg: damaged"
    ) as caught:
        count(counter, start + WINDOW - 500, bad)
    assert "\n" not in str(caught.value)
    count(counter, start + WINDOW, [])  # no new failures: a run with repaired data continues
    count(FailureCounter(0.001), 64, bad * 100)
    with pytest.raises(DataError, match="101 of the last 128 images"):
        count(FailureCounter(0.001), 128, bad * 101)
    with pytest.raises(DataError):
        count(FailureCounter(0), 128, bad)


# ---------------------------------------------------------------- choice of the decoder, leaks


def test_choosing_a_decoder_gives_the_reason(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(decoders, "_dali_problem", lambda: "")
    assert decoders.choose_decoder("auto", cpu) == ("dali_cpu", "DALI is available, a GPU is not")
    assert decoders.choose_decoder("auto", gpu)[0] == "dali_gpu"
    assert decoders.choose_decoder("pillow", gpu) == ("pillow", "as configured")
    with pytest.raises(DataError, match="data.decoder=dali_gpu: not available, because there is no GPU"):
        decoders.choose_decoder("dali_gpu", cpu)
    monkeypatch.setattr(decoders, "_dali_problem", lambda: "DALI cannot be imported (no such module)")
    assert decoders.choose_decoder("auto", gpu) == ("pillow", "DALI cannot be imported (no such module)")
    with pytest.raises(DataError, match="no such module.*data.decoder=auto"):
        decoders.choose_decoder("dali_cpu", cpu)


def test_dali_is_imported_only_when_it_is_used():
    program = (
        "import sys, torch; from scale_mae.data import decoders; import scale_mae.training.trainer;"
        "cpu = torch.device('cpu');"
        "decoders.build_decoder(decoders.choose_decoder('pillow', cpu)[0], (16, 16), 4, 1, cpu);"
        "assert not any(m.startswith('nvidia.dali') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["pillow", "dali_cpu"])
def test_no_files_threads_or_memory_leak_over_many_steps(tmp_path, name):
    index = open_index(str(make_folders(tmp_path)))
    cpu, process = torch.device("cpu"), psutil.Process()

    def state():
        return process.num_fds(), threading.active_count(), len(os.listdir("/dev/shm")), process.memory_info().rss

    decoder = decoders.build_decoder(name, (16, 16), 4, 2, cpu)
    batches = make_loader(index, decoder=decoder, threads=2).batches(0, 1500)
    for _ in range(500):
        next(batches)
    before = state()
    for _ in range(1000):
        next(batches)
    after = state()
    assert after[0] <= before[0] + 2
    assert after[1:3] == before[1:3]
    assert after[3] < before[3] + 8e6
    with pytest.raises(StopIteration):
        next(batches)
