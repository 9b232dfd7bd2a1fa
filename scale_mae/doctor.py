"""A look at the machine before a run does: one line a finding, and what to do about each problem."""

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
DEEPSPEED_FLOOR = (0, 19, 8)  # older ones are not tested, and some take a gradient norm that is none for one
GIB = 2**30


class Finding(NamedTuple):
    """``level`` is ok, note or problem; ``advice`` says what to do."""

    level: str
    what: str
    advice: str = ""


def examine() -> int:
    """Print all findings; 0 when none is a problem, else 1."""
    return report(find())


def report(findings: Iterable[Finding]) -> int:
    """Print findings and how many are problems; 0 when none is, else 1."""
    findings = list(findings)
    for finding in findings:
        mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.level]
        print(f"{mark}  {finding.what}{': ' + finding.advice if finding.advice else ''}")
    problems = sum(f.level == "problem" for f in findings)
    print(f"{problems} problems" if problems else "no problems")
    return 1 if problems else 0


def find() -> Iterator[Finding]:
    """Every finding, cheapest first."""
    yield from _python()
    yield from _packages()
    yield from _accelerators()
    yield from _imports()
    yield from _room()
    yield from _cluster()


def _python() -> Iterator[Finding]:
    what = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {available_cores()} cores"
    yield Finding("ok", what)


def _packages() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding("problem", f"{package} is not installed", f"pip install {package}")
            continue
        numbers = tuple(int(n) for n in found.split("+")[0].split(".")[:3] if n.isdigit())
        if package == "deepspeed" and numbers < DEEPSPEED_FLOOR:
            yield Finding("problem", f"deepspeed {found} is too old", "pip install 'deepspeed>=0.19.8'")
        else:
            yield Finding("ok", f"{package} {found}")


def _accelerators() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            what = f"GPU {number}: {facts.name}, {facts.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
            if torch.cuda.is_bf16_supported():
                yield Finding("ok", what)
            else:
                yield Finding("note", what, "no bf16; set train.precision=fp16")
    elif driver := _nvidia_driver():
        yield Finding(
            "problem",
            f"NVIDIA driver {driver} is there, but PyTorch sees no GPU",
            f"check CUDA_VISIBLE_DEVICES and that the driver is new enough for CUDA {torch.version.cuda}",
        )
    else:
        yield Finding("note", "no GPU", "runs use the CPU, which is enough for the demo and for tests")


def _nvidia_driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML raises errors of its own for every way in which there is no driver
        return None


def _imports() -> Iterator[Finding]:
    for module, use in (("deepspeed", "training"), ("nvidia.dali", "decoding on the GPU")):
        # in a process of its own, because a broken native library can take the process with it
        tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if tried.returncode:
            reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
            yield Finding("problem", f"{module}, for {use}, cannot be imported ({reason})", "reinstall it")
        else:
            yield Finding("ok", f"{module} can be imported")


def _room() -> Iterator[Finding]:
    for what, free, wanted, advice in (
        ("disk in this folder", shutil.disk_usage(".").free, 10 * GIB, "a ViT-H checkpoint takes 8 GiB; set run.dir elsewhere"),
        ("memory", psutil.virtual_memory().available, 4 * GIB, "a process of a small run takes 1 GiB, of ViT-H 12 GiB"),
    ):
        yield Finding(
            "problem" if free < wanted else "ok", f"{free / GIB:.1f} GiB of {what} free", advice if free < wanted else ""
        )
    if Path("/dev/shm").exists() and (size := shutil.disk_usage("/dev/shm").total) < GIB:
        advice = "collectives between the GPUs of a node need more; in a container --shm-size=8g"
        yield Finding("problem", f"{size / GIB:.2f} GiB of shared memory", advice)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 1024:
        yield Finding("problem", f"only {files} open files allowed", "ulimit -n 65536")


def _cluster() -> Iterator[Finding]:
    if shutil.which("srun"):
        yield Finding("ok", "Slurm: srun is on the PATH")
    else:
        yield Finding(
            "note", "no Slurm here", "several processes on this machine: torchrun --nproc-per-node N -m scale_mae ..."
        )
    if "OMP_NUM_THREADS" in os.environ:
        yield Finding("note", f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", "limits the threads of each process")
