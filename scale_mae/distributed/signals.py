"""Requests to stop: signals, and the time limit of a Slurm job."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType


class StopRequest:
    """Remembers a signal that asks to stop, or notices that the job's time runs out, so that a step can be finished and saved.

    Slurm sends SIGTERM at preemption and before it cancels, SIGUSR1 ahead of the time limit if asked to, other systems SIGHUP.

    Attributes:
        lead: seconds before ``SLURM_JOB_END_TIME`` at which it is time; at most a quarter of those left in the beginning count.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self._asked: str | None = None
        self.lead_seconds = 60.0
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdigit() else float("inf")
        self._most = max(0.0, self._end - time.time()) / 4

    @property
    def reason(self) -> str | None:
        """Name of the signal that came, or ``the time limit``; None: go on."""
        return self._asked or ("the time limit" if time.time() > self._end - min(self.lead_seconds, self._most) else None)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            # nohup and job control have their reasons to ignore SIGHUP
            heard = [s for s in self.SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._handle) for s in heard}
        return self

    def request(self, why: str) -> None:
        """Stop after this step."""
        self._asked = why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            # a second one must not spoil the exit code of a clean stop
            signal.signal(number, signal.SIG_IGN if self._asked and number != signal.SIGINT else handler)
