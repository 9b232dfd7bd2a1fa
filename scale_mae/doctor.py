"""``scale-mae doctor``: checks the machine before a run uses it, and prints one line per finding with advice on problems."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from scale_mae.system.resources import available_cores

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "fairscale", "nvidia-dali-cuda130", "safetensors", "prometheus-client")
# Older versions are not tested, and some take the value -1, which means "no gradient norm", for a norm.
OLDEST_DEEPSPEED = (0, 19, 8)
GIB = 2**30


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        level: ``ok``, ``note`` or ``problem``.
        what: What was found.
        advice: What to do about it.
    """

    level: str
    what: str
    advice: str = ""


def check_machine() -> int:
    """Check this machine and print the findings. Return 0 if none of them is a problem, otherwise 1."""
    return print_findings(run_checks())


def print_findings(findings: Iterable[Finding]) -> int:
    """Print findings and the number of problems. Return 0 if none of them is a problem, otherwise 1."""
    findings = list(findings)
    for finding in findings:
        mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.level]
        print(f"{mark}  {finding.what}{': ' + finding.advice if finding.advice else ''}")
    problems = sum(finding.level == "problem" for finding in findings)
    print(f"{problems or 'no'} {'problem' if problems == 1 else 'problems'}")
    return 1 if problems else 0


def run_checks() -> Iterator[Finding]:
    """Yield every finding, starting with the fastest checks."""
    yield from _check_python()
    yield from _check_packages()
    yield from _check_accelerators()
    yield from _check_imports()
    yield from _check_limits()
    yield from _check_launcher()


def _check_python() -> Iterator[Finding]:
    what = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {available_cores()} cores"
    yield Finding("ok", what)


def _check_packages() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            yield Finding("problem", f"{package} is not installed", f"pip install {package}")
            continue
        numbers = tuple(int(n) for n in installed.split("+")[0].split(".")[:3] if n.isdigit())
        if package == "deepspeed" and numbers < OLDEST_DEEPSPEED:
            yield Finding("problem", f"deepspeed {installed} is too old", "pip install 'deepspeed>=0.19.8'")
        else:
            yield Finding("ok", f"{package} {installed}")


def _check_accelerators() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            what = f"GPU {number}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
            if torch.cuda.is_bf16_supported():
                yield Finding("ok", what)
            else:
                yield Finding("note", what, "it does not support bf16; set train.precision=fp16")
    elif driver := _nvidia_driver():
        yield Finding(
            "problem",
            f"NVIDIA driver {driver} is installed, but PyTorch finds no GPU",
            f"check CUDA_VISIBLE_DEVICES, and that the driver supports CUDA {torch.version.cuda}",
        )
    else:
        yield Finding("note", "no GPU", "training uses the CPU, which is fast enough for the demo and the tests only")


def _nvidia_driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML has many errors for a missing driver
        return None


def _check_imports() -> Iterator[Finding]:
    for module, use in (("deepspeed", "training"), ("nvidia.dali", "decoding on the GPU")):
        # in a process of its own, because a broken native library can end the process
        result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            yield Finding("problem", f"{module}, for {use}, cannot be imported ({reason})", "reinstall it")
        else:
            yield Finding("ok", f"{module} can be imported")


def _check_limits() -> Iterator[Finding]:
    """Check free disk space and memory, shared memory, and the limit of open files."""
    disk, memory = shutil.disk_usage(".").free, psutil.virtual_memory().available
    for what, free, needed, advice in (
        ("of disk space free", disk, 10 * GIB, "a ViT-H checkpoint takes 8 GiB; set run.dir to a folder on a larger disk"),
        ("of memory free", memory, 4 * GIB, "a process of a small run takes 1 GiB, a process of a ViT-H run takes 12 GiB"),
    ):
        too_little = free < needed
        yield Finding("problem" if too_little else "ok", f"{free / GIB:.1f} GiB {what}", advice if too_little else "")
    if Path("/dev/shm").exists() and (size := shutil.disk_usage("/dev/shm").total) < GIB:
        advice = "collectives between the GPUs of a node need more; in a container, set --shm-size=8g"
        yield Finding("problem", f"{size / GIB:.2f} GiB of shared memory", advice)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 1024:
        yield Finding("problem", f"only {files} open files allowed", "ulimit -n 65536")


def _check_launcher() -> Iterator[Finding]:
    if shutil.which("srun"):
        yield Finding("ok", "Slurm: srun is on the PATH")
    else:
        advice = "to use several processes on this machine, run torchrun --nproc-per-node N -m scale_mae ..."
        yield Finding("note", "no Slurm", advice)
    if "OMP_NUM_THREADS" in os.environ:
        yield Finding("note", f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", "it limits the threads of each process")
