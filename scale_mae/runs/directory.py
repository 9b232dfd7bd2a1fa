"""The run directory: made or checked, its newest checkpoint found, its index opened."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from scale_mae.checkpoint.discovery import latest_valid
from scale_mae.checkpoint.manifest import read_config
from scale_mae.checkpoint.paths import list_checkpoints
from scale_mae.config import Config, UserError, saved_config
from scale_mae.data.index import INDEX_NAME, Index, existing_index
from scale_mae.data.index_builder import build_index
from scale_mae.distributed.signals import StopRequest
from scale_mae.runs.exit_status import StoppedError
from scale_mae.system.files import flush
from scale_mae.system.progress import ProgressBar

QUICK = 5.0  # seconds; what takes longer shows its progress


def prepare_directory(run_dir: Path, config: Config, notes: list[str]) -> Path | None:
    """Make or check the run directory; the checkpoint to resume from, if there is one.

    Raises:
        UserError: not writable, the run of another config, or damaged checkpoints only.
    """
    saved = run_dir / "config.yaml"
    try:
        before = _config_before(run_dir, notes)
        differences = before.differences(config) if before else []
        if not list_checkpoints(run_dir) and differences:
            _forget_index(run_dir)
        elif differences:
            more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise UserError(
                f"{run_dir} holds a run of another config ({differences[0]}{more}); choose another run.dir or the same values"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        staging = saved.with_suffix(".tmp")
        staging.write_text(config.to_yaml())
        flush(staging)
        staging.rename(saved)
        for name in ("log.txt", "log.jsonl"):
            (run_dir / name).open("a").close()
        for folder in (run_dir, run_dir.parent):
            with suppress(OSError):  # the one above may not be ours to read
                flush(folder)
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written ({error.strerror}); choose another run.dir") from None
    return latest_valid(run_dir, notes.append, rename_damaged=True)


def _config_before(run_dir: Path, notes: list[str]) -> Config | None:
    """The config that a run directory is bound to; None: to none."""
    path = run_dir / "config.yaml"
    if config := saved_config(path):
        return config
    checkpoint = latest_valid(run_dir, lambda _: None)
    if checkpoint:
        notes.append(f"{path} was missing, empty or damaged; restored from {checkpoint}")
        return read_config(checkpoint)
    if path.exists():
        _forget_index(run_dir)
    return None


def _forget_index(run_dir: Path) -> None:
    """A run that never began binds to nothing."""
    for name in (INDEX_NAME, f"{INDEX_NAME}.partial"):
        (run_dir / name).unlink(missing_ok=True)


def find_index(run_dir: Path, source: str, notes: list[str], stop: StopRequest) -> Path:
    """The source's own index; without one, an index beside the run, built at its first start from the images' headers.

    Raises:
        DataError: see :func:`scale_mae.data.index_builder.build_index`.
        StoppedError: a signal came while it was built.
    """
    own, path = existing_index(source), run_dir / INDEX_NAME
    if own:
        return own
    if path.exists():
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        notes.append(f"uses {path}, built {made}; images added to data.source since then are not in it")
        return path
    began = time.perf_counter()
    with ProgressBar(f"images looked at for {path}, because data.source brings no index") as bar:

        def progress(done: int, total: int) -> None:
            if stop.reason:
                raise StoppedError(f"stopped by {stop.reason} while building {path}; the same command goes on with it")
            if time.perf_counter() - began > QUICK:
                bar.update(done, total)

        index = build_index(source, path, verify=False, progress=progress)
    notes.append(
        f"data.source={source} brings no index; built {path} from the headers of {len(index)} images in "
        f"{time.perf_counter() - began:.1f} s (scale-mae index makes one that decodes them all, for any number of runs)"
    )
    notes.extend(index.problems)
    if causes := index.quarantine_counts():
        left_out = ", ".join(f"{number} {cause}" for cause, number in causes.items())
        notes.append(f"left out of the index: {left_out}; named in {path}.quarantined.txt")
    return path


def check_same_data(state_digest: str, index: Index, checkpoint: Path) -> None:
    """A run resumes with the images it began with, or not at all.

    Raises:
        UserError: the index has changed.
    """
    if state_digest != index.digest:
        raise UserError(
            f"{checkpoint} was trained on index {state_digest}, but the index of {index.source} is now {index.digest}; "
            "its sample order would change; restore that index or begin a new run.dir"
        )
