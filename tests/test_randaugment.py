"""Tests that RandAugment equals timm's and depends on the seeds of each image only."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import timm.data
import torch
from images import make_folders
from PIL import Image
from test_loader import damage_images, make_loader
from timm.data import auto_augment

from scale_mae.config import ConfigError, load_config
from scale_mae.config.schema import DataConfig
from scale_mae.data import decoders, loader
from scale_mae.data.errors import DataError
from scale_mae.data.index_builder import open_index
from scale_mae.data.randaugment import RandAugment
from scale_mae.data.sample_plan import SamplePlan

POLICY = "rand-m9-mstd0.5-inc1"
MEAN = DataConfig().mean


def pictures(n=8, size=(48, 64)):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(*size, 3)
    noise = np.random.default_rng(0).normal(0, 40, (n, *size, 3))
    return (ramp + noise).clip(0, 255).astype(np.uint8)


def timm_transform(policy, image_size):
    """Return the RandAugment that timm puts into the training transform of a classifier."""
    transform = timm.data.create_transform(
        image_size, is_training=True, auto_augment=policy, interpolation="bicubic", mean=MEAN, std=(0.2, 0.2, 0.2)
    )
    return next(part for part in transform.transforms if isinstance(part, auto_augment.RandAugment))


def plans_seeds(n):
    return [(int(first), int(second) >> 32) for first, second in SamplePlan(0, 10, 8).augment_seeds(np.arange(n))]


def posterize_with_mask(image, bits, **_):
    """Posterize as old versions of Pillow do, which accept 0 bits."""
    return image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        "rand",
        "rand-m5-n4-p1",
        "rand-m7-mstd101-inc1",
        "rand-m15-mmax20-p0.8",
        "rand-n3-tweights-mstd1",
        "rand-n3-t3a",
        "rand-n3-t3aw-inc1",
    ],
)
def test_randaugment_equals_timm_with_the_same_seeds(policy, monkeypatch):
    posterize = {name: posterize_with_mask for name, op in auto_augment.NAME_TO_OP.items() if op is auto_augment.posterize}
    monkeypatch.setattr(auto_augment, "NAME_TO_OP", auto_augment.NAME_TO_OP | posterize)
    assert load_config("debug", {"data.randaugment": policy}).data.randaugment == policy
    actual, reference, changed = RandAugment(policy, MEAN), timm_transform(policy, (48, 64)), 0
    images = pictures()
    for number, (first, second) in enumerate(plans_seeds(400)):
        image = images[number % len(images)]
        random.seed(first)
        np.random.seed(second)
        expected = np.asarray(reference(Image.fromarray(image)))
        assert np.array_equal(actual(image, (first, second)), expected)
        changed += not np.array_equal(image, expected)
    assert changed > 200


def record_operations(transform, call, n):
    """Return the operations that each of ``n`` calls applied, as lists of (name, arguments)."""
    done, found = [], []
    for op in transform.ops:
        op.aug_fn = lambda image, *args, name=op.name, **_: done.append((name, args)) or image
    for number in range(n):
        done.clear()
        call(number)
        found.append(list(done))
    return found


def test_the_seeds_of_the_plan_yield_the_distribution_of_timm():
    from scipy import stats  # imported here, so that the GPU test runs without scipy

    n, image, actual, reference = 6000, np.zeros((8, 8, 3), np.uint8), RandAugment(POLICY, MEAN), timm_transform(POLICY, 224)
    seeds = plans_seeds(n)
    actual_calls = record_operations(actual._transform, lambda number: actual(image, seeds[number]), n)
    random.seed(0)
    np.random.seed(0)
    timm_image = Image.fromarray(image)
    reference_calls = record_operations(reference, lambda _: reference(timm_image), n)

    names = [op.name for op in reference.ops]
    table = [
        [sum(name == other_name for calls in found for name, _ in calls) for other_name in names]
        for found in (actual_calls, reference_calls)
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.chisquare(table[0]).pvalue > 1e-3  # all operations occur equally often
    number = np.bincount([len(calls) for calls in actual_calls], minlength=3)
    assert stats.chisquare(number, np.array([0.25, 0.5, 0.25]) * n).pvalue > 1e-3
    pairs = [(names.index(calls[0][0]), names.index(calls[1][0])) for calls in actual_calls if len(calls) == 2]
    assert stats.chi2_contingency(np.histogram2d(*zip(*pairs, strict=True), bins=15)[0]).pvalue > 1e-3
    for name in ("Rotate", "ShearX", "TranslateXRel", "ColorIncreasing", "SolarizeAdd"):
        a, b = (
            [args[0] for calls in found for other_name, args in calls if other_name == name]
            for found in (actual_calls, reference_calls)
        )
        assert stats.ks_2samp(a, b).pvalue > 1e-3
    degrees = np.abs([args[0] for calls in actual_calls for name, args in calls if name == "Rotate"])
    assert degrees.mean() == pytest.approx(27, abs=0.3)
    assert degrees.max() <= 30


def test_threads_do_not_affect_each_other_or_the_global_generators():
    augment, images, seeds = RandAugment(POLICY, MEAN), pictures(), plans_seeds(400)
    one_by_one = [augment(images[i % 8], seeds[i]) for i in range(400)]
    assert len({image.tobytes() for image in one_by_one[::8]}) > 30  # the same image at different positions
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    order = np.random.default_rng(1).permutation(400).tolist()
    with ThreadPoolExecutor(8) as pool:
        at_once = dict(zip(order, pool.map(lambda i: augment(images[i % 8], seeds[i]), order), strict=True))
    assert all(np.array_equal(at_once[i], one_by_one[i]) for i in range(400))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert auto_augment.random is random  # timm's own module is unchanged


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-x3", "rand-m9-inc", "rand-tbest", "rand-m0.5", "rand_m9", "rand-m9-"])
def test_an_unknown_policy_is_a_config_error(policy):
    with pytest.raises(
        ConfigError, match=f"data.randaugment={policy}: not a RandAugment policy of timm. Write rand followed by any of"
    ) as caught:
        load_config("debug", {"data.randaugment": policy})
    assert "\n" not in str(caught.value)


def test_a_policy_that_timm_rejects_raises_a_one_line_error():
    with pytest.raises(DataError, match="data.randaugment=rand-z3: not a policy of timm") as caught:
        RandAugment("rand-z3", MEAN)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- in the loader


@pytest.mark.parametrize("decoder", ["pillow", "dali_cpu"])
def test_batches_equal_those_without_randaugment_followed_by_timm(tmp_path, decoder):
    index, augment, changed = open_index(str(make_folders(tmp_path))), RandAugment(POLICY, MEAN), 0
    cpu = torch.device("cpu")
    plain, with_it = (
        make_loader(index, decoder=decoders.build_decoder(decoder, (16, 16), 4, 2, cpu), threads=3, randaugment=policy).batches(
            5, 25
        )
        for policy in (None, POLICY)
    )
    for step, (before, after) in enumerate(zip(plain, with_it, strict=True), start=5):
        seeds = SamplePlan(0, 12, 4).augment_seeds(np.arange(4 * step, 4 * step + 4))
        for row, (first, second) in enumerate(seeds.tolist()):
            expected = augment(before.images[row].numpy(), (first, second >> 32))
            assert np.array_equal(after.images[row].numpy(), expected)
            changed += not np.array_equal(before.images[row].numpy(), expected)
    assert changed > 40


@pytest.mark.gpu
def test_gpu_batches_are_copied_to_the_host(tmp_path):
    index, augment, gpu = open_index(str(make_folders(tmp_path))), RandAugment(POLICY, MEAN), torch.device("cuda", 0)
    plain, with_it = (
        replace(
            make_loader(index, decoder=decoders.build_decoder("dali_gpu", (16, 16), 4, 2, gpu), randaugment=policy),
            pin_memory=True,
        ).batches(0, 10)
        for policy in (None, POLICY)
    )
    for step, (before, after) in enumerate(zip(plain, with_it, strict=True)):
        assert before.images.is_cuda
        assert after.images.is_pinned()
        seeds = SamplePlan(0, 12, 4).augment_seeds(np.arange(4 * step, 4 * step + 4)).tolist()
        for old, new, (first, second) in zip(before.images.cpu().numpy(), after.images.numpy(), seeds, strict=True):
            assert np.array_equal(new, augment(old, (first, second >> 32)))


def test_a_run_resumed_with_other_world_sizes_and_micro_batches_sees_the_same_images(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    damage_images(tmp_path)  # substitutes are augmented too
    undisturbed = [b.images for b in make_loader(index, micro_batch=12, threads=1, randaugment=POLICY).batches(0, 10)]
    threads, images = threading.active_count(), []
    for first, last, ranks, accumulation in ((0, 3, 2, 1), (3, 6, 1, 3), (6, 10, 3, 2)):
        micro_batch = 12 // ranks // accumulation
        streams = [
            make_loader(index, rank, ranks, accumulation, micro_batch, threads=3, prefetch=5, randaugment=POLICY).batches(
                first, 99
            )
            for rank in range(ranks)
        ]
        for _ in range(first, last):
            images.append(torch.cat([next(stream).images for _ in range(accumulation) for stream in streams]))
        for stream in streams:
            stream.close()
    assert torch.equal(torch.stack(images), torch.stack(undisturbed))
    for _ in range(50):
        if threading.active_count() > threads:
            time.sleep(0.1)
    assert threading.active_count() <= threads  # the thread pools have ended


def test_without_randaugment_no_threads_are_started_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "RandAugment", None)
    batches = make_loader(open_index(str(make_folders(tmp_path)))).batches(0, 2)
    next(batches)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("augment")]
    batches.close()


def test_batches_of_a_classifier_have_a_seed_but_no_mask_noise(tmp_path):
    index = open_index(str(make_folders(tmp_path)))
    batches = list(replace(make_loader(index), num_patches=0).batches(0, 3))
    assert all(batch.mask_noise is None for batch in batches)
    plan = SamplePlan(0, 12, 4)
    assert [b.seed for b in batches] == [plan.batch_seed(np.arange(4 * step, 4 * step + 4)) for step in range(3)]
    assert len({b.seed for b in batches}) == 3
    later = make_loader(index, rank=1, ranks=2, micro_batch=2).batches(1, 2)
    assert next(later).seed == plan.batch_seed(np.array([6]))
