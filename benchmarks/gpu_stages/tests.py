"""The tests that need a GPU, each with a time limit. One that hangs or crashes ends its pytest only; a new one continues."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from gpu_stages.pytest_lines import read, write
from gpu_stages.stage import OutOfTime, Stage

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 45.0  # seconds of a test
GRACE = 10.0  # seconds that pytest-timeout gets to end it in good order
TAIL = 30  # lines that are kept of a failure


def run(stage: Stage) -> None:
    if stage.rehearse:
        return examine(stage, [str(ROOT / "tests/test_metrics.py"), "-k", "nvml or peak"])
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    examine(stage, [*files, "-m", "gpu"])


def examine(stage: Stage, arguments: list[str], limit: float = LIMIT, grace: float = GRACE) -> None:
    """Run pytest with these arguments until every test has a case."""
    lines = stage.folder / "tests.jsonl"
    while True:
        before = len(read(lines))
        process = _start(stage, arguments, lines, limit)
        try:
            trouble = _follow(process, stage, lines, limit + grace)
        finally:
            _kill(process)
        if not trouble:
            break
        running = _running(read(lines)[before:])
        if running is None:
            raise RuntimeError(f"pytest {trouble} while no test runs")
        test, seconds = running["started"], time.monotonic() - running["at"]
        write(lines, test=test, outcome="failed", seconds=seconds, text=f"pytest {trouble} in this test")
        write(lines, ended=test)
    _add_cases(stage, read(lines))
    if not stage.result["cases"]:
        raise RuntimeError("there are no tests to run")


def _start(stage: Stage, arguments: list[str], lines: Path, limit: float) -> subprocess.Popen[bytes]:
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "gpu_stages.pytest_lines"]
    options += ["--continue-on-collection-errors", "--rootdir", str(ROOT), "--basetemp", str(stage.folder / "pytest")]
    if find_spec("pytest_timeout"):
        options += [f"--timeout={limit}", "--timeout-method=signal"]
    paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GPU_TEST_LINES": str(lines)}
    return subprocess.Popen([sys.executable, "-m", "pytest", *options, *arguments], cwd=ROOT, env=environment)


def _follow(process: subprocess.Popen[bytes], stage: Stage, path: Path, limit: float) -> str:
    """Make cases of what pytest writes until it ends; why it did not end well, or nothing."""
    while True:
        ended = process.poll() is not None
        lines = read(path)
        _add_cases(stage, lines)
        if ended:
            return "" if process.returncode in (0, 1, 5) else f"ends with exit code {process.returncode}"
        running = _running(lines)
        if running and time.monotonic() - running["at"] > limit:
            return f"hangs for {limit:.0f} s"
        if stage.left() < 2:
            raise OutOfTime(f"{len(stage.result['not_run'])} tests did not run")
        time.sleep(0.2)


def _running(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of the test that has started and not ended."""
    marks = [line for line in lines if "started" in line or "ended" in line]
    return marks[-1] if marks and "started" in marks[-1] else None


def _add_cases(stage: Stage, lines: list[dict[str, Any]]) -> None:
    """Make one case for each test with an outcome, and save the stage if there are new ones."""
    outcomes: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "outcome" in line and (line["test"] not in outcomes or line["outcome"] == "failed"):
            outcomes[line["test"]] = line
    collected = {test: None for line in lines for test in line.get("collected", [])}
    cases = [_case(line) for line in outcomes.values()]
    not_run = [test for test in collected if test not in outcomes]
    if (cases, not_run) != (stage.result["cases"], stage.result.get("not_run")):
        stage.result |= {"cases": cases, "not_run": not_run}
        stage.save()


def _case(line: dict[str, Any]) -> dict[str, Any]:
    case = {"case": line["test"], "outcome": line["outcome"], "seconds": round(line["seconds"], 2)}
    text = line["text"].strip().splitlines()
    if line["outcome"] == "failed":
        errors = [part[1:].strip() for part in text if part.startswith("E ")]
        case |= {"error": (errors or text or ["no message"])[0][:300], "traceback": "\n".join(text[-TAIL:])}
    elif line["outcome"] == "skipped":
        case["reason"] = text[-1] if text else ""
    return case


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End pytest and the ranks that its tests have started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each file. Failures are among the errors of the examination."""
    files: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    named = [(case["case"], case["outcome"], case["seconds"]) for case in result["cases"]]
    for test, outcome, spent in [*named, *((test, "not run", 0.0) for test in result.get("not_run", []))]:
        file = Path(test.split("::")[0]).name
        files.setdefault(file, Counter())[outcome] += 1
        seconds[file] += spent
    outcomes = ("passed", "failed", "skipped", "not run")
    return [
        {"file": file} | {outcome: str(counts[outcome]) for outcome in outcomes} | {"seconds": f"{seconds[file]:.1f}"}
        for file, counts in files.items()
    ]
