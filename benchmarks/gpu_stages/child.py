"""The process of one stage of the GPU examination."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 4.0  # seconds between the time limit that the stage knows and the one at which it is killed


def run_stage(name: str, out: Path, folder: str, *, until: float, rehearse: bool) -> int:
    """Run a stage and end this process.

    Args:
        name: of the stage.
        out: folder of the result files.
        folder: an empty folder, removed afterwards.
        until: when this process is killed, by ``time.monotonic``, which is the same in all processes.
        rehearse: use the CPU and tiny sizes.
    """
    _die_with_parent()  # before any thread runs
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, until - time.monotonic() - 1), exit=False)  # says where a stage hangs
    sys.path.insert(1, str(ROOT))  # scale_mae need not be installed
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    code = 1
    try:
        code = _run(name, out / f"{name}.json", Path(folder), until - time.monotonic() - MARGIN, rehearse)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the result is on the disk; nothing that hangs at the end of Python is waited for


def _run(name: str, out: Path, folder: Path, seconds: float, rehearse: bool) -> int:
    from importlib import import_module

    import report

    from gpu_stages.stage import OutOfTime, Stage

    module: Any = None

    class WithTable(Stage):
        """Keeps the table of the stage in its file, so that nobody has to import the stage to print it."""

        def save(self) -> None:
            self.result["table"] = _table(module, self.result)
            super().save()

    stage = WithTable(name, out, folder, seconds=seconds, rehearse=rehearse)
    stage.result |= {"machine": report.machine(stage.device), "versions": report.versions()}
    stage.save()
    module = import_module(f"gpu_stages.{name}")
    try:
        module.run(stage)
    except OutOfTime as late:
        stage.result |= {"status": "cut", "error": str(late)}
    else:
        stage.result["status"] = "done"
    stage.save()
    return 0


def _table(module: Any, result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of a stage with the same columns in each; a mistake in them must not lose the result."""
    if module is None:
        return []
    try:
        rows = module.rows(result)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return [{column: str(row.get(column, "-")) for column in columns} for row in rows]
    except Exception as error:
        traceback.print_exc()
        return [{"table": f"{type(error).__name__}: {error}"}]


def _die_with_parent() -> None:
    """Have a process of its own kill this one, and all that it starts, when the standard input closes: the parent is gone."""
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
