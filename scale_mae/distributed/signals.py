"""Requests to stop a run: signals, and the end of the Slurm job's time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType


class StopRequest:
    """Records that a run must stop, so that the current step can be finished and saved. It is a context manager.

    Slurm sends SIGTERM at preemption and before it cancels a job. It sends SIGUSR1 ahead of the time limit if the job
    script asks for it. Other systems send SIGHUP.

    Attributes:
        lead_seconds: The run stops this many seconds before ``SLURM_JOB_END_TIME``. The lead never exceeds a quarter of
            the time that was left at the start.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self._requested: str | None = None
        self.lead_seconds = 60.0
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdigit() else float("inf")
        self._max_lead = max(0.0, self._end - time.time()) / 4

    @property
    def reason(self) -> str | None:
        """Why the run must stop: the name of a signal, or ``the time limit``. None if it need not stop."""
        time_is_up = time.time() > self._end - min(self.lead_seconds, self._max_lead)
        return self._requested or ("the time limit" if time_is_up else None)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers in no other thread
            # nohup and job control ignore SIGHUP on purpose
            handled = [s for s in self.SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
            self._previous = {s: signal.signal(s, self._handle) for s in handled}
        return self

    def request(self, reason: str) -> None:
        """Ask the run to stop after the current step."""
        self._requested = reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_previous", {}).items():
            # a second signal must not change the exit code of a clean stop
            signal.signal(number, signal.SIG_IGN if self._requested and number != signal.SIGINT else handler)
