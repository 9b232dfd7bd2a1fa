"""The built wheel contains everything that a run needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_an_installed_wheel_runs_from_an_empty_folder(tmp_path):
    """The dependencies come from this environment, scale_mae itself only from the wheel."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
    subprocess.run(install, check=True, timeout=300)
    assert (site / "scale_mae" / "ds_configs" / "recipes" / "demo.yaml").exists()
    assert len(list((site / "scale_mae" / "demo_data").glob("*.tar.gz"))) == 5
    environment = os.environ | {"PYTHONPATH": str(site)}
    program = "import scale_mae; print(scale_mae.__file__)"
    imported = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert imported.stdout.startswith(str(site))
    overrides = ["train.duration=2 steps", "optim.warmup=1 steps", "data.decoder=auto"]
    command = [sys.executable, "-m", "scale_mae", "pretrain", "demo", *overrides]
    subprocess.run(command, cwd=empty, env=environment, check=True, timeout=300)
    assert (empty / "runs" / "demo" / "checkpoints" / "step-00000002" / "manifest.json").exists()
    assert "data.decoder=dali_cpu (DALI is available" in (empty / "runs" / "demo" / "log.txt").read_text()
