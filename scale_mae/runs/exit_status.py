"""The exit status of a run in its file ``exit_status``, which job scripts and ``scale-mae status`` read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scale_mae.config import UserError

FILE = "exit_status"


class StoppedError(UserError):
    """A signal stopped the run before its first step."""


class ExitStatus:
    """Writes one line to the file ``exit_status``: ``finished``, ``stopped by SIGTERM after step 12``, or ``failed: ...``.

    The file does not exist while the run is running, or after it was killed.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE

    @contextmanager
    def recording_errors(self) -> Iterator[None]:
        """Delete the last exit status, and write one if the block raises a UserError, which a restart would only repeat."""
        self._path.unlink(missing_ok=True)
        try:
            yield
        except UserError as error:
            self.write(str(error) if isinstance(error, StoppedError) else f"failed: {error}")
            raise

    def write(self, text: str) -> None:
        """Write the exit status."""
        with suppress(OSError):  # for example a full disk; the log contains the same text
            staging = self._path.with_suffix(".tmp")  # readers must not see an incomplete line
            staging.write_text(text + "\n")
            staging.rename(self._path)
