"""What it takes to turn a ZeRO checkpoint into one fp32 safetensors file, here and by DeepSpeed's own tool.

    python benchmarks/convert.py --out benchmarks/results/convert_cpu_NAME.json

Two gloo ranks write a checkpoint of a MAE with a ViT of ``--size`` encoder after one step, under ZeRO-2 and under ZeRO-3. Then,
in turns, ``scale-mae convert --to state_dict`` and ``deepspeed.utils.zero_to_fp32 --safe_serialization`` convert it, each in a
process of its own. Counted are the seconds from start to end and, in a round apart as looking slows a process down, the peak of
private memory, also without what importing the tool's packages takes by itself (torch alone 0.3 GB with CUDA's libraries). Ours
also takes the checksums of the checkpoint, reads back what it wrote, compares it to the bit, and flushes the file to the disk;
DeepSpeed's does none of these. In the end both files are compared, tensor by tensor.
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
from report import save
from safetensors import safe_open
from watch import watch

STAGES = ("zero2", "zero3")
OURS, THEIRS = "scale-mae convert", "zero_to_fp32"


IMPORTS = {OURS: "scale_mae.weights.convert", THEIRS: "deepspeed.utils.zero_to_fp32"}


def imported(modules: str) -> int:
    """Private bytes of a process that has imported these modules, the median of five."""
    command = [sys.executable, "-c", f"import {modules}; import time; time.sleep(1)"]
    return int(statistics.median(watch(command, interval=0.02, quiet=True).private for _ in range(5)))


def seconds(command: list[str]) -> float:
    """Until it ended."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def make_checkpoint(size: str, stage: str, run_dir: Path) -> Path:
    """One step of two ranks; the checkpoint it leaves."""
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


def largest_and_equal(ours: Path, theirs: Path) -> tuple[int, int]:
    """Bytes of the largest tensor and of all; every tensor that DeepSpeed's tool writes must be the same in both files."""
    sizes = []
    with safe_open(ours, "pt") as mine, safe_open(theirs, "pt") as other:
        for name in mine.keys():  # noqa: SIM118  (not a mapping)
            sizes.append(mine.get_tensor(name).nbytes)
        for name in other.keys():  # noqa: SIM118
            if not torch.equal(mine.get_tensor(name), other.get_tensor(name)):
                sys.exit(f"{name} differs between {OURS} and {THEIRS}")
    return max(sizes), sum(sizes)


def row(
    stage: str, tool: str, taken: dict[str, list[float]], private: int, imports: int, largest: int, total: int
) -> dict[str, str]:
    ratios = [mine / other for mine, other in zip(taken[tool], taken[THEIRS], strict=True)]
    return {
        "checkpoint": stage,
        "tool": tool,
        "median s": f"{statistics.median(taken[tool]):.2f}",
        "time / zero_to_fp32: median (min-max)": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        "peak private MB": f"{private / 1e6:.0f}",
        "less imports": f"{(private - imports) / 1e6:.0f}",
        "less imports and the largest tensor": f"{(private - imports - largest) / 1e6:.0f}",
        "/ size of the file": f"{private / total:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints and files are made")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table, samples = [], {}
    imports = {tool: imported(modules) for tool, modules in IMPORTS.items()}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        for stage in STAGES:
            checkpoint = make_checkpoint(options.size, stage, folder / stage)
            ours, theirs = folder / "ours.safetensors", folder / "theirs"
            commands = {
                OURS: ["scale_mae", "convert", str(checkpoint), "--to", "state_dict", "--out", str(ours)],
                THEIRS: ["deepspeed.utils.zero_to_fp32", str(checkpoint), str(theirs), "--safe_serialization"],
            }
            # in one file, as ours
            commands[THEIRS] += ["--max_shard_size", "50GB"]
            taken: dict[str, list[float]] = {tool: [] for tool in commands}
            private = {}
            for number in range(-1, options.rounds):  # the first round fills the page cache for both; its time is not counted
                for tool in list(commands)[:: 1 if number % 2 else -1]:
                    ours.unlink(missing_ok=True) if tool == OURS else shutil.rmtree(theirs, ignore_errors=True)
                    command = [sys.executable, "-m", *commands[tool]]
                    if number < 0:
                        private[tool] = watch(command, interval=0.005, quiet=True).private
                    else:
                        taken[tool].append(seconds(command))
                        print(stage, number, tool, taken[tool][-1], flush=True)
            largest, total = largest_and_equal(ours, theirs / "model.safetensors")
            table += [row(stage, tool, taken, private[tool], imports[tool], largest, total) for tool in commands]
            samples[stage] = taken
            shutil.rmtree(folder / stage)
    title = (
        f"Converting a ViT-{options.size} MAE to one fp32 file of {total / 1e9:.2f} GB (largest tensor "
        f"{largest / 1e6:.0f} MB), written by two ranks in bf16; {options.rounds} rounds in turns"
    )
    save(options.out, device=torch.device("cpu"), title=title, table=table, imports=imports, samples=samples)


if __name__ == "__main__":
    main()
