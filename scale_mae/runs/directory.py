"""Prepares the run directory: creates or checks it, and finds the checkpoint to resume from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from scale_mae.checkpoint.discovery import find_latest_valid
from scale_mae.checkpoint.manifest import read_config
from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.config import Config, UserError, saved_config
from scale_mae.runs.run_index import delete_run_index
from scale_mae.system.files import flush


def prepare_run_directory(run_dir: Path, config: Config, messages: list[str]) -> Path | None:
    """Create or check the run directory.

    Args:
        run_dir: The run directory.
        config: The configuration of this start.
        messages: Messages for the log are appended.

    Returns:
        The checkpoint to resume from. ``None`` if the run has none.

    Raises:
        UserError: The directory cannot be written, belongs to a run with another configuration, or all its checkpoints are
            damaged.
    """
    saved = run_dir / "config.yaml"
    try:
        previous = _read_previous_config(run_dir, messages)
        differences = previous.differences(config) if previous else []
        if differences and list_checkpoints(run_dir):
            more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise UserError(
                f"run.dir={run_dir}: contains a run with another configuration ({differences[0]}{more}). "
                "Set another run.dir, or use the configuration of that run."
            )
        if not list_checkpoints(run_dir) and differences:
            delete_run_index(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        staging = saved.with_suffix(".tmp")
        staging.write_text(config.to_yaml())
        flush(staging)
        staging.rename(saved)
        for name in ("log.txt", "log.jsonl"):
            (run_dir / name).open("a").close()
        for folder in (run_dir, run_dir.parent):
            with suppress(OSError):  # the parent folder may not be readable
                flush(folder)
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written ({error.strerror}). Set another run.dir.") from None
    return find_latest_valid(run_dir, messages.append, rename_damaged=True)


def _read_previous_config(run_dir: Path, messages: list[str]) -> Config | None:
    """Return the configuration that the run in a directory started with. ``None`` if no run has started there."""
    path = run_dir / "config.yaml"
    if config := saved_config(path):
        return config
    checkpoint = find_latest_valid(run_dir, lambda _: None)
    if checkpoint:
        messages.append(f"{path} was missing, empty or damaged. Restored it from {checkpoint}.")
        return read_config(checkpoint)
    if path.exists():
        delete_run_index(run_dir)
    return None
