"""What all tests share: no test is skipped for a missing service where CI asks for all, GPU tests need a GPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
SERVICES = {  # Debian package -> a file it brings
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
        without = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("service"):
        missing = [p for p in marker.args if not (Path(SERVICES[p]).exists() or shutil.which(Path(SERVICES[p]).name))]
        if missing:
            text = f"Debian package missing: {', '.join(missing)} (make services)"
            pytest.fail(text) if os.environ.get("REQUIRE_SERVICES") else pytest.skip(text)


@pytest.fixture(scope="session")
def golden():
    """``golden(name)``: tensors and metadata of a file of reference values."""

    def load(name):
        with safe_open(GOLDEN / name, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(GOLDEN / name), metadata

    return load


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs of three steps by two ranks in every layout: (stage, precision) -> (run directory, live fp32 weights)."""
    from layouts import make_runs

    return make_runs(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def third_party_checkpoints(tmp_path_factory):
    """Checkpoints by two ranks of plain DeepSpeed in every layout: name -> (folder, live state, live moments)."""
    from third_party_checkpoints import make_third_party_checkpoints

    return make_third_party_checkpoints(tmp_path_factory.mktemp("strangers"))
