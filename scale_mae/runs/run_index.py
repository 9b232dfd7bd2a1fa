"""The index of a run: that of its source, or one that the run builds in its own directory."""

from __future__ import annotations

import time
from pathlib import Path

from scale_mae.config import UserError
from scale_mae.data.index import INDEX_NAME, Index, existing_index
from scale_mae.data.index_builder import build_index
from scale_mae.distributed.signals import StopRequest
from scale_mae.runs.exit_status import StoppedError
from scale_mae.system.progress import ProgressBar

PROGRESS_DELAY_SECONDS = 5.0  # no progress is shown before


def find_or_build_index(run_dir: Path, source: str, messages: list[str], stop: StopRequest) -> Path:
    """Return the path of the index. Build one in the run directory at the first start if the source has none.

    The run's own index is built from the headers of the images. Later starts use it again.

    Args:
        run_dir: The run directory.
        source: ``data.source``.
        messages: Messages for the log are appended.
        stop: A stop request ends the build.

    Raises:
        DataError: See :func:`scale_mae.data.index_builder.build_index`.
        StoppedError: A stop was requested. The next call continues the build.
    """
    source_index, path = existing_index(source), run_dir / INDEX_NAME
    if source_index:
        return source_index
    if path.exists():
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        messages.append(f"Using {path}, built on {built}. It does not contain images that were added to data.source later.")
        return path
    start = time.perf_counter()
    with ProgressBar(f"images read for {path}, because data.source has no index") as bar:

        def progress(done: int, total: int) -> None:
            if stop.reason:
                raise StoppedError(f"stopped by {stop.reason} while building {path}. Run the same command again to continue.")
            if time.perf_counter() - start > PROGRESS_DELAY_SECONDS:
                bar.update(done, total)

        index = build_index(source, path, verify=False, progress=progress)
    messages.append(
        f"Built {path} from the headers of {len(index)} images in {time.perf_counter() - start:.1f} s, because "
        f"data.source={source} has no index. To decode and check all images once for several runs, use scale-mae index."
    )
    messages.extend(index.problems)
    if counts := index.quarantine_counts():
        causes = ", ".join(f"{number} {cause}" for cause, number in counts.items())
        messages.append(f"Quarantined images: {causes}. {path}.quarantined.txt lists them.")
    return path


def delete_run_index(run_dir: Path) -> None:
    """Delete the index in a run directory, because the run that it was built for never started."""
    for name in (INDEX_NAME, f"{INDEX_NAME}.partial"):
        (run_dir / name).unlink(missing_ok=True)


def check_index_unchanged(checkpoint_digest: str, index: Index, checkpoint: Path) -> None:
    """Check that a run resumes with the index that it started with.

    Args:
        checkpoint_digest: Digest of the index, from the checkpoint.
        index: The index of this start.
        checkpoint: The checkpoint.

    Raises:
        UserError: The index has changed.
    """
    if checkpoint_digest != index.digest:
        raise UserError(
            f"{checkpoint}: the run was trained with index {checkpoint_digest}, but the index of {index.source} is now "
            f"{index.digest}. This would change the order of the samples. Restore that index, or set a new run.dir."
        )
