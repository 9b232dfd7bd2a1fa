"""How much time and memory does the conversion of a ZeRO checkpoint to one fp32 safetensors file take?

    python benchmarks/convert.py --out benchmarks/results/convert_cpu_NAME.json

Two gloo ranks write a checkpoint of a MAE with a ``--size`` encoder after one step, under ZeRO-2 and under ZeRO-3. Then
``scale-mae convert --to state_dict`` and ``deepspeed.utils.zero_to_fp32 --safe_serialization`` convert it in turns, each in
a process of its own. The table shows the seconds of the whole process and its peak private memory. Memory is measured in a
separate round, because this slows a process down. It is also shown without the memory that importing the packages of the
tool takes (torch alone takes 0.3 GB with CUDA's libraries).

``scale-mae convert`` also computes the checksums of the checkpoint, reads its file back, compares it bit by bit, and
flushes it to the disk. DeepSpeed's tool does none of this. At the end, both files are compared tensor by tensor.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from process_memory import measure
from report import save
from safetensors import safe_open

STAGES = ("zero2", "zero3")
CONVERT, ZERO_TO_FP32 = "scale-mae convert", "zero_to_fp32"
IMPORTS = {CONVERT: "scale_mae.weights.convert", ZERO_TO_FP32: "deepspeed.utils.zero_to_fp32"}


def import_bytes(module: str) -> int:
    """Return the private bytes of a process that has imported a module, as the median of five."""
    command = [sys.executable, "-c", f"import {module}; import time; time.sleep(1)"]
    return int(statistics.median(measure(command, interval=0.02, quiet=True).largest for _ in range(5)))


def seconds(command: list[str]) -> float:
    """Run a command and return the seconds that it took."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def make_checkpoint(size: str, stage: str, run_dir: Path) -> Path:
    """Train one step on two ranks and return the checkpoint."""
    setting = {
        "run.dir": run_dir,
        "model.size": size,
        "model.image_size": 224,
        "model.patch_size": 16,
        "model.decoder_width": 512,
        "model.decoder_depth": 8,
        "model.decoder_heads": 16,
        "train.duration": "1 steps",
        "train.global_batch": 2,
        "train.micro_batch": 1,
        "train.precision": "bf16",
        "optim.warmup": "0 steps",
        "engine.deepspeed": stage,
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scale_mae"]
    command = [*launcher, "pretrain", "debug", *(f"{key}={value}" for key, value in setting.items())]
    subprocess.run(command, check=True, capture_output=True)
    return run_dir / "checkpoints" / "step-00000001"


def compare(converted: Path, reference: Path) -> tuple[int, int]:
    """Check that both files contain equal tensors. Return the bytes of the largest tensor and of all tensors."""
    sizes = []
    with safe_open(converted, "pt") as file, safe_open(reference, "pt") as reference_file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            sizes.append(file.get_tensor(name).nbytes)
        for name in reference_file.keys():  # noqa: SIM118
            if not torch.equal(file.get_tensor(name), reference_file.get_tensor(name)):
                sys.exit(f"{name} differs between {CONVERT} and {ZERO_TO_FP32}")
    return max(sizes), sum(sizes)


def row(
    stage: str, tool: str, times: dict[str, list[float]], peak: int, imports: int, largest: int, total: int
) -> dict[str, str]:
    ratios = [time / reference for time, reference in zip(times[tool], times[ZERO_TO_FP32], strict=True)]
    return {
        "checkpoint": stage,
        "tool": tool,
        "median s": f"{statistics.median(times[tool]):.2f}",
        "time / zero_to_fp32: median (min-max)": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        "peak private MB": f"{peak / 1e6:.0f}",
        "MB without imports": f"{(peak - imports) / 1e6:.0f}",
        "MB without imports and the largest tensor": f"{(peak - imports - largest) / 1e6:.0f}",
        "peak / size of the file": f"{peak / total:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="encoder size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed conversions by each tool (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="folder for the checkpoints and files")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args()
    table, samples = [], {}
    imports = {tool: import_bytes(module) for tool, module in IMPORTS.items()}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        for stage in STAGES:
            checkpoint = make_checkpoint(options.size, stage, folder / stage)
            converted, reference = folder / "converted.safetensors", folder / "reference"
            commands = {
                CONVERT: ["scale_mae", "convert", str(checkpoint), "--to", "state_dict", "--out", str(converted)],
                ZERO_TO_FP32: ["deepspeed.utils.zero_to_fp32", str(checkpoint), str(reference), "--safe_serialization"],
            }
            commands[ZERO_TO_FP32] += ["--max_shard_size", "50GB"]  # one file, as scale-mae convert writes
            times: dict[str, list[float]] = {tool: [] for tool in commands}
            peak = {}
            for number in range(-1, options.rounds):  # the first round measures memory and fills the page cache
                for tool in list(commands)[:: 1 if number % 2 else -1]:
                    converted.unlink(missing_ok=True) if tool == CONVERT else shutil.rmtree(reference, ignore_errors=True)
                    command = [sys.executable, "-m", *commands[tool]]
                    if number < 0:
                        peak[tool] = measure(command, interval=0.005, quiet=True).largest
                    else:
                        times[tool].append(seconds(command))
                        print(stage, number, tool, times[tool][-1], flush=True)
            largest, total = compare(converted, reference / "model.safetensors")
            table += [row(stage, tool, times, peak[tool], imports[tool], largest, total) for tool in commands]
            samples[stage] = times
            shutil.rmtree(folder / stage)
    title = (
        f"Converting a ViT-{options.size} MAE to one fp32 file of {total / 1e9:.2f} GB (largest tensor "
        f"{largest / 1e6:.0f} MB), written by two ranks in bf16; {options.rounds} rounds in turns"
    )
    save(options.out, device=torch.device("cpu"), title=title, table=table, imports=imports, samples=samples)


if __name__ == "__main__":
    main()
