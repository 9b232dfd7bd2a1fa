"""How a run ended last, for whoever looks at its directory from outside: job scripts, ``scale-mae status``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scale_mae.config import UserError

FILE = "exit_status"


class StoppedError(UserError):
    """A signal came before the first step."""


class ExitStatus:
    """One line in the file ``exit_status``: ``finished``, ``stopped by SIGTERM after step 12``, or ``failed: why``.

    The file does not exist while the run is going on, or after it was killed.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE

    @contextmanager
    def told(self) -> Iterator[None]:
        """Forget the last one; an error of the user's, which starting again would only repeat, becomes the next."""
        self._path.unlink(missing_ok=True)
        try:
            yield
        except UserError as error:
            self.tell(str(error) if isinstance(error, StoppedError) else f"failed: {error}")
            raise

    def tell(self, text: str) -> None:
        """Write it."""
        with suppress(OSError):  # a full disk; the log says it too
            staging = self._path.with_suffix(".tmp")  # a reader sees a whole line
            staging.write_text(text + "\n")
            staging.rename(self._path)
