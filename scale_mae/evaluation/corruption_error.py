"""The mean corruption error (mCE) of ImageNet-C (Hendrycks & Dietterich 2019, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

SEVERITIES = (1, 2, 3, 4, 5)
# Top-1 error of AlexNet, mean over the five severities. Source: github.com/hendrycks/robustness, pull request 20 and issue 10
# (each severity). The keys are names, because published lists use different orders.
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CORRUPTIONS = tuple(ALEXNET_ERROR)
EXTRA_CORRUPTIONS = (
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)  # ImageNet-C provides them for validation; mCE does not include them


def error_of(corruption: str, top1: Mapping[str, float]) -> float:
    """Return the mean top-1 error over the severities. ``top1`` maps ``corruption/severity`` to accuracies in [0, 1]."""
    return fmean(1 - top1[f"{corruption}/{severity}"] for severity in SEVERITIES)


def corruption_errors(top1: Mapping[str, float]) -> dict[str, float]:
    """Return the error of each corruption divided by AlexNet's (1: as bad as AlexNet). ``top1`` is as for :func:`error_of`."""
    return {name: error_of(name, top1) / alexnet for name, alexnet in ALEXNET_ERROR.items()}


def mean_corruption_error(top1: Mapping[str, float]) -> float:
    """Return the mCE: the mean of :func:`corruption_errors` over the 15 corruptions."""
    return fmean(corruption_errors(top1).values())


def unnormalized_error(top1: Mapping[str, float]) -> float | None:
    """Return the mean error over all 19 corruptions, not divided by AlexNet's. ImageNet-C's own ``test.py`` prints this value.

    It is not the mCE: ViT-B/16 of the MAE paper has 37.8 to 38.0 % here and an mCE of 51.7 % (github.com/facebookresearch/mae,
    issue 104). Return ``None`` if an extra corruption is missing.
    """
    distortions = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    if any(f"{name}/1" not in top1 for name in distortions):
        return None
    return fmean(error_of(name, top1) for name in distortions)
