"""pytest plugin of the stage ``tests``: one line of JSON for each test that starts and each that ends, written at once.

The file is ``$GPU_TEST_LINES``. Tests that have a line in it are left out, so that a second pytest continues after a crash.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ORDER = (  # how test ids begin, the quickest and most informative first; what is not here runs last
    *("tests/test_metrics.py", "tests/test_preflight.py::test_gpu_is_visible", "tests/test_mixup.py"),
    *("tests/test_gpu.py::test_losses", "tests/test_gpu.py::test_the_host", "tests/test_dali.py", "tests/test_randaugment.py"),
    *("tests/test_gpu.py::test_activation", "tests/test_preflight.py", "tests/test_gpu.py::test_a_run", "tests/test_gpu.py"),
)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines but one that is half written."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def write(path: Path, **values: Any) -> None:
    """Add a line: ``collected`` tests, a test that is ``started`` or ``ended``, or the ``outcome`` of a ``test``."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(values | {"at": time.monotonic()}) + "\n")


def _path() -> Path:
    return Path(os.environ["GPU_TEST_LINES"])


def rank(test: str) -> int:
    """Place of a test in the order."""
    return next((place for place, beginning in enumerate(ORDER) if test.startswith(beginning)), len(ORDER))


@pytest.hookimpl(trylast=True)  # after those that deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = {line["started"] for line in read(_path()) if "started" in line}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
    items[:] = sorted((item for item in items if item.nodeid not in before), key=lambda item: rank(item.nodeid))
    write(_path(), collected=[item.nodeid for item in items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write(_path(), test=report.nodeid, outcome="failed", seconds=0.0, text=f"cannot be collected\n{report.longreprtext}")


def pytest_runtest_logstart(nodeid: str) -> None:
    write(_path(), started=nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    write(_path(), ended=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The call of each test, and a setup or teardown that does not pass."""
    if report.when == "call" or not report.passed:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        write(_path(), test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=text)
