"""What the benchmarks share: facts about the machine, a readable table, a result file; and the tables of result files.

python benchmarks/report.py benchmarks/results/*.json     print the tables of these files as Markdown
python benchmarks/report.py benchmarks/results/gpu_X.json     "not measured yet" where a GPU examination has no result
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_stages import STAGES

if TYPE_CHECKING:  # benchmarks/gpu.py prints tables without torch, which takes seconds to import
    import torch

PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "deepspeed", "timm", "transformers", "fairscale")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def save(
    path: Path | None, *, device: torch.device, title: str, table: list[dict[str, str]], show: bool = True, **content: Any
) -> None:
    """Print the table and, where a path is given, write everything: what ran, where, with what, and each sample."""
    if show:
        print(f"\n{title}\n{as_text(table)}", flush=True)
    if path is None:
        return
    threads = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    facts = {
        "title": title,
        "command": shlex.join([*threads, "python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
        "table": table,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, facts | content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file. It is replaced at once, so that no reader finds half of one."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def as_text(table: list[dict[str, str]]) -> str:
    """Rows as aligned columns."""
    rows = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_markdown(table: list[dict[str, str]]) -> str:
    """Rows as a Markdown table."""
    rows = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def tables(path: Path) -> str:
    """The tables of a result file as Markdown: the first one, and those under ``tables``, which have names."""
    if not path.exists() and path.name.startswith("gpu_"):
        return f"`{path.name}`: GPU examination.\n\n{as_markdown(overview({}))}\n"
    result = json.loads(path.read_text())
    more = "".join(f"\n`{name}`:\n\n{as_markdown(rows)}\n" for name, rows in result.get("tables", {}).items() if rows)
    return f"`{path.name}`: {result['title']}.\n\n{as_markdown(result['table'])}\n{more}"


def overview(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One row for each stage of the GPU examination, by the results of the stages that ran."""
    table = []
    for name, (_, question) in STAGES.items():
        result = results.get(name, {"status": "not measured yet"})
        cases = result.get("cases", [])
        table.append(
            {
                "stage": name,
                "question": question,
                "status": str(result["status"]),
                "seconds": f"{result['seconds']:.0f}" if "seconds" in result else "-",
                "cases": str(len(cases)) if cases else "-",
                "errors": str(sum("error" in case for case in cases)) if cases else "-",
            }
        )
    return table


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(tables(Path(name)))
