"""One stage of the GPU examination: its time limit and its result file, which is complete after every case."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
import torch


class Stage:
    """What a stage module gets. The result file is replaced atomically, so a reader never sees half of one.

    Attributes:
        device: ``cuda:0``, or ``cpu`` in a rehearsal.
        rehearse: run everything at tiny sizes on the CPU.
        folder: an existing empty folder for data, runs and other temporary files.
        result: the content of the result file: ``stage``, ``status``, ``cases`` and what the stage adds.
    """

    def __init__(self, name: str, out: Path, folder: Path, *, seconds: float, rehearse: bool) -> None:
        self.name, self.out, self.folder, self.rehearse = name, out, folder, rehearse
        self.device = torch.device("cpu") if rehearse else torch.device("cuda", 0)
        self._deadline = time.monotonic() + seconds
        self.result: dict[str, Any] = {"stage": name, "status": "running", "rehearse": rehearse, "cases": []}
        self.save()

    def left(self) -> float:
        """Seconds until the time limit of this stage."""
        return self._deadline - time.monotonic()

    @contextmanager
    def case(self, name: str, *, needs: float = 0.0) -> Iterator[dict[str, Any]]:
        """A case, which writes the result file at its end. The block fills the yielded dict.

        An exception, which includes one for running out of memory, becomes the case's ``error`` and ends this case only. A case
        that needs more seconds than are left raises :class:`OutOfTime`, which ends the stage with the status ``cut``.
        """
        if self.left() < needs:
            raise OutOfTime(f"{name} needs {needs:.0f} s, {self.left():.0f} s are left")
        self._free()  # once more: at the end of a case that fails, its error still holds memory
        began = time.monotonic()
        case: dict[str, Any] = {"case": name}
        self.result["cases"].append(case)
        try:
            yield case
        except OutOfTime:
            raise
        except Exception as error:
            case["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            case["traceback"] = traceback.format_exc()
        finally:
            case["seconds"] = round(time.monotonic() - began, 2)
            self.save()
            self._free()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def save(self) -> None:
        """Write the result file."""
        report.write(self.out, self.result)


class OutOfTime(Exception):
    """The time limit of the stage leaves no room for the next case."""
