"""Shared fixtures, and the rules for tests that need a GPU or a service.

Without a GPU, GPU tests are deselected. Without its service, a test is skipped, or fails if ``REQUIRE_SERVICES`` is set (CI).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
SERVICES = {  # Debian package -> a file that it contains
    "slurm-wlm": "/usr/sbin/slurmctld",
    "munge": "/usr/sbin/munged",
    "dataset-fashion-mnist": "/usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
    "buildah": "/usr/bin/buildah",
    "debootstrap": "/usr/sbin/debootstrap",
    "prometheus": "/usr/bin/prometheus",
    "chromium": "/usr/bin/chromium",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        deselected = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("service"):
        missing = [p for p in marker.args if not (Path(SERVICES[p]).exists() or shutil.which(Path(SERVICES[p]).name))]
        if missing:
            text = f"Debian packages are missing: {', '.join(missing)}. Run make services."
            pytest.fail(text) if os.environ.get("REQUIRE_SERVICES") else pytest.skip(text)


@pytest.fixture(scope="session")
def golden():
    """``golden(name)`` returns the tensors and the metadata of a file of reference values."""

    def load(name):
        with safe_open(GOLDEN / name, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(GOLDEN / name), metadata

    return load


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs of three steps on two ranks for every ZeRO stage and precision.

    (stage, precision) -> (run directory, fp32 weights of the live model)
    """
    from layouts import make_runs

    return make_runs(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def third_party_checkpoints(tmp_path_factory):
    """Checkpoints that plain DeepSpeed wrote on two ranks, in every layout.

    name -> (folder, state of the live model, moments of the live optimizer)
    """
    from third_party_checkpoints import make_third_party_checkpoints

    return make_third_party_checkpoints(tmp_path_factory.mktemp("third_party"))
