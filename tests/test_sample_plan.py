"""Tests of the sample plan: order, crops, flips, color jitter and masks as pure functions of a position."""

import math
import random
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from scale_mae.config.schema import DataConfig
from scale_mae.data.crop_boxes import fixed_size_crops, random_resized_crops
from scale_mae.data.sample_plan import NUM_SUBSTITUTES, SamplePlan

SIZE = (224, 224)


@given(st.integers(0, 2**63 - 1), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_every_epoch_is_a_different_permutation(seed, size):
    plan = SamplePlan(seed, size, 8)
    epochs = plan.samples(np.arange(3 * size)).reshape(3, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    if size > 20:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[1] != epochs[2]).any()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_the_plan_does_not_depend_on_how_a_batch_is_split(ranks, accumulation, micro_batch, step):
    batch = ranks * accumulation * micro_batch
    plan, config = SamplePlan(1, 37, batch), DataConfig()
    parts = [
        plan.positions(step, rank, ranks, micro_step, micro_batch)
        for micro_step in range(accumulation)
        for rank in range(ranks)
    ]
    whole = plan.positions(step, 0, 1, 0, batch)
    assert np.concatenate(parts).tolist() == whole.tolist() == list(range(step * batch, (step + 1) * batch))
    sizes = np.full(batch, 100)
    for whole_result, part_results in (
        (plan.samples(whole), [plan.samples(p) for p in parts]),
        (plan.mask_noise(whole, 9), [plan.mask_noise(p, 9) for p in parts]),
        (plan.color_jitter(whole, (0.4, 0.4, 0.4)), [plan.color_jitter(p, (0.4, 0.4, 0.4)) for p in parts]),
        (plan.augment_seeds(whole), [plan.augment_seeds(p) for p in parts]),
        (
            plan.crops(whole, sizes, sizes, config, SIZE),
            [plan.crops(p, sizes[: len(p)], sizes[: len(p)], config, SIZE) for p in parts],
        ),
    ):
        assert np.array_equal(np.asarray(whole_result), np.concatenate([np.asarray(p) for p in part_results]))


@given(
    st.integers(0, 2**32),
    st.integers(1, 400),
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 30)), min_size=4, max_size=7),
)
@settings(max_examples=60, deadline=None)
def test_a_run_that_is_killed_and_resumed_with_other_world_sizes_sees_the_same_samples(seed, size, lives):
    """Each life is a number of ranks and a number of steps, after which all ranks are killed."""
    plan = SamplePlan(seed, size, 24)
    seen, step = [], 0
    for ranks, steps in lives:
        micro_batch = 24 // ranks // 2
        for _ in range(steps):
            of_step = [
                plan.samples(plan.positions(step, rank, ranks, micro_step, micro_batch))
                for micro_step in range(2)
                for rank in range(ranks)
            ]
            seen.append(np.concatenate(of_step))
            step += 1
    assert np.array_equal(np.concatenate(seen), plan.samples(np.arange(24 * step)))


def test_the_order_is_uncorrelated_with_identity_other_epochs_and_other_seeds():
    first, second = SamplePlan(0, 10_000, 8).samples(np.arange(20_000)).reshape(2, -1)
    other = SamplePlan(1, 10_000, 8).samples(np.arange(10_000))
    for a, b in ((np.arange(10_000), first), (first, second), (first, other), (first[:-1], first[1:])):
        assert abs(stats.spearmanr(a, b).statistic) < 0.05
    small = np.stack([SamplePlan(seed, 5, 1).samples(np.arange(5)) for seed in range(24_000)])
    _, counts = np.unique(small, axis=0, return_counts=True)
    assert len(counts) == 120  # every order of five images occurs, about equally often
    assert counts.min() > 100
    assert counts.max() < 320


def test_4096_ranks_cover_a_billion_images_without_gaps():
    """In random windows of steps, the ranks together take consecutive positions, each image at most once per epoch."""
    ranks, micro_batch = 4096, 2
    plan = SamplePlan(0, 10**9, ranks * micro_batch)
    generator = np.random.default_rng(0)
    for first in generator.integers(0, 10**7, 4):
        window = [
            plan.positions(step, rank, ranks, 0, micro_batch) for step in range(first, first + 3) for rank in range(ranks)
        ]
        positions = np.concatenate(window)
        assert np.array_equal(positions, np.arange(first * ranks * micro_batch, (first + 3) * ranks * micro_batch))
        samples = plan.samples(positions)
        for epoch in np.unique(positions // plan.dataset_size):
            of_epoch = samples[positions // plan.dataset_size == epoch]
            assert len(np.unique(of_epoch)) == len(of_epoch)
        assert samples.max() < 10**9
        one_rank = plan.positions(int(first) + 1, 77, ranks, 0, micro_batch)
        assert np.array_equal(plan.samples(one_rank), samples[(ranks + 77) * micro_batch :][:micro_batch])


def test_time_and_memory_of_a_step_do_not_depend_on_the_scale():
    def cost(size, step):
        plan = SamplePlan(0, size, 4096)
        times = []
        tracemalloc.start()
        for s in range(step, step + 30):
            began = time.perf_counter()
            plan.samples(plan.positions(s, 5, 8, 0, 512))
            times.append(time.perf_counter() - began)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return float(np.median(times)), peak

    small, large = cost(60_000, 1), cost(10**9, 10**7)
    assert large[0] < max(3 * small[0], 2e-3)
    assert large[1] < small[1] + 100_000


def test_mask_noise_is_uniform_and_never_repeats():
    plan = SamplePlan(0, 100, 50)
    noise = plan.mask_noise(np.arange(2000), 16)  # twenty epochs
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    assert noise.dtype == np.float32
    assert noise.min() >= 0
    assert noise.max() < 1
    masks = {tuple(row.argsort()[:4].tolist()) for row in noise}
    assert len({row.tobytes() for row in noise}) == 2000
    assert len(masks) > 1500  # of 43,680 possible ones
    by_rank = [plan.mask_noise(plan.positions(3, rank, 5, 0, 10), 16) for rank in range(5)]
    assert len(np.unique(np.concatenate(by_rank), axis=0)) == 50
    of_one_image = noise[plan.samples(np.arange(2000)) == 7]
    assert len(np.unique(of_one_image, axis=0)) == 20


@pytest.mark.parametrize(("width", "height"), [(90, 60), (500, 375), (33, 70)])
def test_random_crops_have_the_distribution_of_torchvision(width, height):
    n, config = 4000, DataConfig()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    scale, ratio = list(config.crop_scale), list(config.crop_ratio)
    reference = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    plan = SamplePlan(0, n, 8)
    crops = plan.crops(np.arange(n), np.full(n, width), np.full(n, height), config, SIZE)
    actual = np.array([crop[:4] for crop in crops])
    for column in range(4):
        assert stats.ks_2samp(actual[:, column], reference[:, column]).pvalue > 1e-3
    assert (actual[:, 0] + actual[:, 2] <= height).all()
    assert (actual[:, 1] + actual[:, 3] <= width).all()
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.5, abs=0.03)


def draw_clipped_crop(generator, width, height, scale, ratio):
    """Draw one crop step by step, as the paper's linear probe does."""
    area = generator.uniform(*scale) * width * height
    shape = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = min(round(math.sqrt(area * shape)), width)
    h = min(round(math.sqrt(area / shape)), height)
    return generator.randrange(height - h + 1), generator.randrange(width - w + 1), h, w


@pytest.mark.parametrize(("width", "height"), [(90, 60), (500, 375), (33, 70), (400, 40)])
def test_random_crop_once_clips_its_only_attempt_to_the_image(width, height):
    n, config, generator = 4000, DataConfig(augmentation="random_crop_once", crop_scale=(0.08, 1)), random.Random(0)
    reference = np.array([draw_clipped_crop(generator, width, height, config.crop_scale, config.crop_ratio) for _ in range(n)])
    sizes, plan = (np.full(n, width), np.full(n, height)), SamplePlan(0, n, 8)
    crops = plan.crops(np.arange(n), *sizes, config, SIZE)
    actual = np.array([crop[:4] for crop in crops])
    for column in range(4):
        assert stats.ks_2samp(actual[:, column], reference[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(actual[:, 2] / actual[:, 3], reference[:, 2] / reference[:, 3]).pvalue > 1e-3
    cut = np.mean((actual[:, 2] == height) | (actual[:, 3] == width))
    assert cut == pytest.approx(np.mean((reference[:, 2] == height) | (reference[:, 3] == width)), abs=0.03)
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.5, abs=0.03)
    again = DataConfig(augmentation="random_crop", crop_scale=config.crop_scale)
    redrawn = np.array([crop[:4] for crop in plan.crops(np.arange(n), *sizes, again, SIZE)])
    kept = (redrawn == actual).all(axis=1)
    assert (actual[~kept, 2:] == [height, width]).any(axis=1).all()  # only boxes that do not fit differ


def test_seeds_of_images_and_batches_are_independent():
    plan, positions = SamplePlan(3, 100, 8), np.arange(20_000)
    seeds = plan.augment_seeds(positions)
    assert seeds.shape == (20_000, 2)
    assert len(np.unique(seeds)) == 40_000  # all seeds differ
    batches = [plan.batch_seed(positions[i : i + 8]) for i in range(0, 4000, 8)]
    assert len(set(batches)) == 500
    assert all(0 <= seed < 2**63 for seed in batches)
    assert plan.batch_seed(positions[16:24]) == plan.batch_seed(positions[16:20]) != SamplePlan(4, 100, 8).batch_seed(positions)
    assert not set(batches) & set((seeds >> np.uint64(1)).ravel().tolist())


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_every_crop_box_lies_inside_its_image(width, height, position):
    plan, sizes = SamplePlan(0, 10, 8), (np.array([width]), np.array([height]))
    for augmentation in ("none", "fixed_crop", "random_crop", "random_crop_once"):
        for image_size in (SIZE, (64, 128)):
            config = DataConfig(augmentation=augmentation)
            ((top, left, h, w, _),) = plan.crops(np.array([position]), *sizes, config, image_size)
            assert 0 <= top < top + h <= height
            assert 0 <= left < left + w <= width


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(1000, 10, (0, 493, 10, 13)), (10, 1000, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))]
)
def test_elongated_images_get_the_central_crop_of_torchvision(width, height, expected):
    u = np.full((1, 22), 0.999)
    box = random_resized_crops(u, np.array([width]), np.array([height]), (0.9, 1.0), (3 / 4, 4 / 3))
    assert tuple(box[0]) == expected


def test_fixed_crops_take_224_of_256_and_no_augmentation_takes_the_center():
    n, plan = 3000, SamplePlan(0, 10, 8)
    widths, heights = np.full(n, 341), np.full(n, 256)
    fixed = np.array(plan.crops(np.arange(n), widths, heights, DataConfig(augmentation="fixed_crop"), SIZE))
    assert set(map(tuple, fixed[:, 2:4])) == {(224, 224)}
    assert sorted(set(fixed[:, 0])) == list(range(33))
    assert stats.kstest(fixed[:, 1], stats.randint(0, 118).cdf).pvalue > 1e-3
    assert fixed[:, 4].mean() == pytest.approx(0.5, abs=0.04)
    plain = plan.crops(np.arange(n), widths, heights, DataConfig(augmentation="none"), SIZE)
    assert set(plain) == {(16, 59, 224, 224, False)}
    box = fixed_size_crops(np.full((1, 2), 0.5), np.array([1000]), np.array([400]), (100, 200))
    assert tuple(box[0]) == (25, 150, 350, 700)


def test_color_jitter_has_the_distribution_of_torchvision():
    n, strength = 4000, (0.4, 0.3, 0.0)
    actual = SamplePlan(0, 10, 8).color_jitter(np.arange(n), strength)
    torch.manual_seed(0)
    transform = ColorJitter(0.4, 0.3)
    draws = [transform.get_params(transform.brightness, transform.contrast, (1.0, 1.0), None) for _ in range(n)]
    for column in (0, 1):
        reference = [draw[column + 1] for draw in draws]
        assert stats.ks_2samp(actual[:, column], reference).pvalue > 1e-3
    assert set(actual[:, 2]) == {1.0}
    _, counts = np.unique(actual[:, 3:].argsort(axis=1), axis=0, return_counts=True)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert len(counts) == 6


def test_substitutes_are_uniform_and_reproducible():
    plan = SamplePlan(0, 1000, 8)
    drawn = [plan.substitutes(position) for position in range(500)]
    assert drawn == [SamplePlan(0, 1000, 99).substitutes(position) for position in range(500)]
    assert {len(numbers) for numbers in drawn} == {NUM_SUBSTITUTES}
    assert stats.kstest(np.ravel(drawn), stats.randint(0, 1000).cdf).pvalue > 1e-3


def test_batches_that_span_two_epochs_contain_every_image_once_per_epoch():
    plan = SamplePlan(0, 10, 4)  # a batch may contain the end of one epoch and the start of the next
    samples = np.concatenate([plan.samples(plan.positions(s, 0, 1, 0, 4)) for s in range(5)])
    assert sorted(samples[:10]) == sorted(samples[10:]) == list(range(10))


RANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), max_size=4)


@given(RANGES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_steps_take_all_positions_except_skipped_ones_once_and_in_order(ranges, ranks, micro_batch, steps):
    batch = ranks * micro_batch
    plan, skipped = SamplePlan(3, 37, batch), set()
    for first, length in ranges:
        plan = plan.skip(first, first + length)
        skipped |= set(range(first, first + length))
    taken = np.concatenate([plan.positions(s, r, ranks, 0, micro_batch) for s in range(steps) for r in range(ranks)])
    kept = [position for position in range(1000) if position not in skipped]
    assert taken.tolist() == kept[: steps * batch]
    assert {p for first, stop in plan.skipped for p in range(first, stop)} == skipped
    assert all(a[1] < b[0] for a, b in zip(plan.skipped, plan.skipped[1:], strict=False))
    # random numbers of a position do not depend on skipped positions, nor on how positions are grouped
    whole = SamplePlan(3, 37, batch)
    positions = plan.positions(steps - 1, 0, 1, 0, batch)
    alone = np.concatenate([whole.mask_noise(np.array([p]), 9) for p in positions])
    assert np.array_equal(plan.mask_noise(positions, 9), alone)


@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_skipping_positions_does_not_change_earlier_steps(step, length, later):
    plan = SamplePlan(0, 50, 8)
    without = plan.skip(step * 8, (step + length) * 8)
    for number in range(step):
        assert np.array_equal(plan.positions(number, 0, 1, 0, 8), without.positions(number, 0, 1, 0, 8))
    after = step + later
    assert np.array_equal(plan.positions(after + length, 0, 1, 0, 8), without.positions(after, 0, 1, 0, 8))
