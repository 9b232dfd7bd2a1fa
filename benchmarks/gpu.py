"""The GPU examination: all that a GPU can teach in minutes, by one command that loses nothing when it is cut off.

    python benchmarks/gpu.py --minutes 12 --out DIR                       all stages
    python benchmarks/gpu.py --minutes 4 --out DIR --stages smoke,tests   some of them; DIR keeps the results of the others
    python benchmarks/gpu.py --minutes 4 --out DIR --rehearse             on a CPU, at tiny sizes

Each stage runs in its own process and has its own time limit; the most valuable stages run first. DIR/STAGE.json is complete
after every case. DIR/log.txt has the output of all stages. DIR/gpu_DEVICE.json has the tables of all stages in DIR, and is
what ``benchmarks/report.py`` prints and what belongs in ``benchmarks/results``. Exit status: 0 if every stage is done
without an error, 1 if not, 2 if the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import report
from gpu_stages import STAGES

RESERVE = 8.0  # seconds kept for the table
TOO_LATE = 10.0  # a stage with fewer seconds does not start: it could not even import torch
LINES = 60  # of the printed table
EVERY = 5.0  # seconds after which the result of all stages is written again while a stage runs
TAIL = 40  # lines of output that are kept of a stage that fails
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal ends the examination."""


def main() -> int:
    began = time.monotonic()  # before torch is imported, which takes many seconds on a machine that has just started
    options = _options()
    if options.stage:
        from gpu_stages.child import run_stage

        return run_stage(options.stage, options.out, options.folder, until=options.until, rehearse=options.rehearse)
    until = began + 60 * options.minutes - RESERVE
    with _signals():
        try:
            for name in options.stages:
                (options.out / f"{name}.json").unlink(missing_ok=True)
            for path in (options.out / "log.txt", *options.out.glob("*.partial")):  # the latter of a command that was killed
                path.unlink(missing_ok=True)
            for name in options.stages:
                left = until - time.monotonic()
                if left < TOO_LATE:
                    facts = {"rehearse": options.rehearse, "error": f"{max(0, left):.0f} s were left"}
                    _record(options.out, name, status="cut", **facts)
                else:
                    examine(name, min(STAGES[name][0], left), options)
                save_result(options.out, rehearse=options.rehearse)
        except Stopped as stop:
            print(f"stopped by {stop}", flush=True)
    save_result(options.out, rehearse=options.rehearse)
    results = read_results(options.out, rehearse=options.rehearse)
    print(as_lines(results), flush=True)
    return 0 if all(_good(results.get(name)) for name in options.stages) else 1


def examine(name: str, seconds: float, options: argparse.Namespace) -> None:
    """Run a stage to its end or to its time limit, and record how it ended."""
    began = time.monotonic()
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    output = options.out / "log.txt"
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder, output.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [
                *(sys.executable, os.path.abspath(__file__), "--stage", name, "--until", str(began + seconds)),
                *("--folder", folder, "--out", str(options.out.resolve()), *(["--rehearse"] if options.rehearse else [])),
            ],
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however that happens
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = "stopped"
        try:
            status = _wait(process, began + seconds, options)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the stage, and all that it has started
            code = process.wait()
            process.stdin.close()
            facts: dict[str, Any] = {
                "seconds": round(time.monotonic() - began, 1),
                "exit_code": code,
                "rehearse": options.rehearse,
            }
            if status != "done":
                facts["output"] = _tail(output, start)
            result = _record(options.out, name, status=status, **facts)
    print(f"{name}: {result['status']} in {result['seconds']:.0f} s, {len(result['cases'])} cases", flush=True)


def _wait(process: subprocess.Popen[bytes], until: float, options: argparse.Namespace) -> str:
    """Wait for a stage; how it ended. The file of all stages follows its cases, for nobody may be there to write it later."""
    while (left := until - time.monotonic()) > 0:
        try:
            return "done" if process.wait(min(EVERY, left)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            save_result(options.out, rehearse=options.rehearse)
    return "timed out"


def _record(out: Path, name: str, *, status: str, **facts: Any) -> dict[str, Any]:
    """Add how a stage ended to its file, which it may not have written."""
    path = out / f"{name}.json"
    result = _read(path) or {"stage": name, "cases": []}
    if status == "done" and result.get("status") == "cut":
        status = "cut"  # it found out itself that its time would not do
    result |= {"status": status, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")} | facts
    report.write(path, result)
    return result


def _tail(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[-TAIL:]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def read_results(out: Path, *, rehearse: bool) -> dict[str, dict[str, Any]]:
    """The results of all stages in the folder, of this call and of others; either those of rehearsals or those of a GPU."""
    found = {name: _read(out / f"{name}.json") for name in STAGES}
    return {name: result for name, result in found.items() if result and result.get("rehearse", rehearse) == rehearse}


def _good(result: dict[str, Any] | None) -> bool:
    return result is not None and result["status"] == "done" and not errors({"": result})


def errors(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One row for each case with an error and each stage that did not end well."""
    rows = []
    for name, result in results.items():
        if result["status"] != "done":
            rows.append({"stage": name, "case": "-", "error": f"{result['status']}: {_reason(result)}"})
        rows += [{"stage": name, "case": c["case"], "error": c["error"]} for c in result["cases"] if "error" in c]
    return rows


def _reason(result: dict[str, Any]) -> str:
    """The line of the output that says most: where a stage hangs, or the error at the end."""
    if result["status"] == "running":
        return "it was cut off, or has not ended yet"
    lines = [line.strip() for line in result.get("output", []) if line.strip()]
    if result["status"] == "timed out":
        stacks = [number for number, line in enumerate(lines[:-1]) if line.endswith("(most recent call first):")]
        return lines[stacks[-1] + 1] if stacks else ""
    return str(result.get("error") or (lines[-1] if lines else f"exit code {result.get('exit_code')}"))


def save_result(out: Path, *, rehearse: bool) -> None:
    """Write the one file with all tables and all samples. It is named after the device once a stage has reported the device."""
    results = read_results(out, rehearse=rehearse)
    machine = next((result["machine"] for result in results.values() if "machine" in result), {})
    versions = next((result["versions"] for result in results.values() if "versions" in result), {})
    device = "rehearsal" if rehearse else machine.get("gpu", "unknown")
    content = {
        "title": f"GPU examination, {device}",
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "table": report.overview(results),
        "tables": {name: result.get("table", []) for name, result in results.items()} | {"errors": errors(results)},
        "samples": results,
    }
    (out / "gpu_unknown.json").unlink(missing_ok=True)
    report.write(out / f"gpu_{device.replace(' ', '_')}.json", content)


def as_lines(results: dict[str, dict[str, Any]]) -> str:
    """All tables in at most :data:`LINES` lines: the longest ones lose their last rows."""
    overview = [{key: cell for key, cell in row.items() if key != "question"} for row in report.overview(results)]
    tables = {"overview": overview, **{name: result.get("table", []) for name, result in results.items()}}
    tables["errors"] = [row | {"error": row["error"][:120]} for row in errors(results)]
    blocks = {name: [f"{name}:", *report.as_text(rows).splitlines()] for name, rows in tables.items() if rows}
    while sum(len(lines) for lines in blocks.values()) > LINES:
        longest = max(blocks.values(), key=len)
        del longest[-2:]
        longest.append("  more in the result file")
    return "\n".join(line for lines in blocks.values() for line in lines)


@contextmanager
def _signals() -> Iterator[None]:
    """The first signal raises :class:`Stopped`; others are ignored, so that the table is printed."""

    def stop(number: int, _: Any) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, stop)
    yield


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="the whole command ends before (default: 12)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=f"of {','.join(STAGES)}")
    parser.add_argument("--rehearse", action="store_true", help="run everything on a CPU at tiny sizes")
    for hidden in ("--stage", "--folder", "--until"):  # how the command calls itself for one stage
        parser.add_argument(hidden, type=float if hidden == "--until" else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return options
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        _refuse(f"--stages: there is no stage {unknown[0]!r}; there are {','.join(STAGES)}")
    if not options.minutes >= 0.5:
        _refuse(f"--minutes {options.minutes:g}: at least 0.5")
    if options.out.exists() and not options.out.is_dir():
        _refuse(f"--out {options.out}: is not a folder")
    options.stages = [name for name in STAGES if name in options.stages]
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            _refuse("torch finds no GPU; --rehearse runs the examination on a CPU")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        _refuse(f"--out {options.out}: cannot be written ({error.strerror})")
    return options


def _refuse(reason: str) -> None:
    print(f"gpu.py: {reason}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
