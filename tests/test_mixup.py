"""Tests that random erasing, mixup, CutMix and label smoothing equal timm's and depend on the seed only."""

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from scale_mae.config import ConfigError, load_config
from scale_mae.config.schema import ClassifyConfig
from scale_mae.data.mixup import BatchAugmentation, derive_seeds
from scale_mae.data.transforms import normalize

CLASSES = 10
MIXES = [
    {"mixup": 0.8, "cutmix": 1.0},
    {"mixup": 0.8},
    {"cutmix": 1.0},
    {"mixup": 0.3, "cutmix": 0.5, "mixup_switch_prob": 0.2},
]


def batch(size=6, height=24, width=40):
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, height, width, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), labels


def augment_with_timm(images, labels, config, seed):
    boxes, mixes, pixels = derive_seeds(seed)
    random.seed(boxes)
    np.random.seed(mixes)
    torch.manual_seed(pixels)
    images = RandomErasing(config.random_erasing, mode="pixel", max_count=1, device="cpu")(images.clone())
    kinds = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "switch_prob": config.mixup_switch_prob}
    return Mixup(**kinds, prob=1.0, mode="batch", label_smoothing=config.label_smoothing, num_classes=CLASSES)(images, labels)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("erasing", [0.0, 0.25, 1.0])
def test_batch_augmentation_equals_timm_with_the_same_seeds(mix, erasing):
    config = ClassifyConfig(**mix, random_erasing=erasing, label_smoothing=0.1)
    augmentation = BatchAugmentation(config, CLASSES)
    for seed in range(60):
        images, labels = batch()
        expected, expected_targets = augment_with_timm(images, labels, config, seed)
        changed, targets = augmentation(images.clone(), labels, seed)
        assert torch.equal(changed, expected)
        torch.testing.assert_close(targets, expected_targets, atol=1e-7, rtol=1e-6)
        assert targets.shape == (6, CLASSES)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixup_the_targets_are_smoothed_labels(smoothing):
    images, labels = batch()
    changed, targets = BatchAugmentation(ClassifyConfig(label_smoothing=smoothing), CLASSES)(images.clone(), labels, 0)
    assert torch.equal(changed, images)
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    reference = LabelSmoothingCrossEntropy(smoothing)(logits, labels)
    torch.testing.assert_close(SoftTargetCrossEntropy()(logits, targets), reference)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), reference)
    assert targets.argmax(1).tolist() == labels.tolist()


def test_the_result_depends_on_the_seed_only_and_global_generators_are_restored():
    augmentation = BatchAugmentation(ClassifyConfig(mixup=0.8, cutmix=1.0, random_erasing=0.5, label_smoothing=0.1), CLASSES)
    results = []
    for seed in (*range(40), *reversed(range(40))):
        images, labels = batch()
        random.seed(len(results))
        np.random.seed(len(results))
        torch.manual_seed(len(results))
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        results.append(augmentation(images, labels, seed))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for one, again in zip(results[:40], results[:39:-1], strict=True):
        assert torch.equal(one[0], again[0])
        assert torch.equal(one[1], again[1])
    assert len({images.numpy().tobytes() for images, _ in results}) == 40
    augmentation(*batch(), 2**64 - 1)


def test_consecutive_seeds_draw_from_the_whole_distribution():
    from scipy import stats  # imported here, so that the GPU test runs without scipy

    n, alpha = 4000, 0.8
    shares = [np.random.RandomState(mixes).beta(alpha, alpha) for _, mixes, _ in map(derive_seeds, range(n))]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    erased = 0
    for seed in range(300):
        images = torch.zeros(4, 3, 16, 16)
        BatchAugmentation(ClassifyConfig(random_erasing=0.25), CLASSES)(images, torch.zeros(4, dtype=torch.long), seed)
        erased += int((images != 0).any(dim=(1, 2, 3)).sum())
    assert erased / 1200 == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_mixup_and_cutmix_require_an_even_micro_batch(tmp_path, key):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("run: {task: finetune}\ntrain: {global_batch: 15}\n")
    with pytest.raises(ConfigError, match=r"train.micro_batch=5 is odd, .* mix pairs of images") as caught:
        load_config(recipe, {"train.micro_batch": 5, f"classify.{key}": 0.8})
    assert "\n" not in str(caught.value)
    load_config(recipe, {"train.micro_batch": 5, "classify.label_smoothing": 0.1})


@pytest.mark.gpu
def test_batch_augmentation_does_not_wait_for_the_gpu():
    augmentation = BatchAugmentation(ClassifyConfig(mixup=0.8, cutmix=1.0, random_erasing=0.5, label_smoothing=0.1), CLASSES)
    images, labels = (t.cuda() for t in batch())
    augmentation(images.clone(), labels, 0)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again = (augmentation(images.clone(), labels, 7) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(state, torch.cuda.get_rng_state())
