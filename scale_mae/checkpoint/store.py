"""Checkpoints on disk: a reader sees a whole one or none.

    checkpoints/step-00000100/   manifest.json  config.yaml  latest  deepspeed/*.pt
    checkpoints/latest           name of the newest

A checkpoint is written to a hidden folder beside the others, every file is flushed to the disk and its checksum put in the
manifest, and only then does the folder get its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scale_mae import __version__
from scale_mae.config import Config, UserError, load_config
from scale_mae.engine.distributed import World

FOLDER = "checkpoints"
PREFIX = "step-"
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or unfit."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        step: optimizer steps done.
        world_size: processes that wrote it.
        zero_stage: of DeepSpeed.
        config_digest: see :meth:`Config.digest`.
        versions: of Python and the packages that wrote it.
        files: size in bytes and SHA-256 of every other file, by path inside the checkpoint.
    """

    step: int
    world_size: int
    zero_stage: int
    config_digest: str
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]


def checkpoint_name(step: int) -> str:
    """Folder name of a step: ``step-00000100``."""
    return f"{PREFIX}{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / FOLDER).glob(f"{PREFIX}*") if p.is_dir())


def save(run_dir: Path, step: int, config: Config, world: World, zero_stage: int, write: Callable[[Path], None]) -> Path:
    """Commit a checkpoint and delete those beyond ``checkpoint.keep``. All processes call it.

    Args:
        run_dir: the run directory.
        step: optimizer steps done.
        config: stored beside the states.
        world: the processes; they share the work of checksums.
        zero_stage: of DeepSpeed.
        write: writes this process's files into the folder it is given.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a write failed; the new checkpoint is lost, the earlier ones are not.
    """
    final = run_dir / FOLDER / checkpoint_name(step)
    staging = final.with_name(f".{final.name}.tmp")

    def prepare() -> None:
        for left_over in final.parent.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        staging.mkdir(parents=True)
        (staging / "config.yaml").write_text(config.to_yaml())

    def commit(files: dict[str, dict[str, Any]]) -> None:
        """Manifest, names, and only then the deletion of what is no longer kept."""
        manifest = Manifest(step, world.size, zero_stage, config.digest(), _versions(), files)
        (staging / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
        _flush(staging / MANIFEST)
        for folder in (*(p for p in staging.rglob("*") if p.is_dir()), staging):
            _flush(folder)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        pointer = final.with_name("latest.tmp")
        pointer.write_text(final.name)
        _flush(pointer)
        pointer.rename(final.with_name("latest"))
        _flush(final.parent)
        # a newer one can only be one that was found damaged; it does not count among those kept
        for old in [c for c in checkpoints(run_dir) if c.name <= final.name][: -config.checkpoint.keep]:
            shutil.rmtree(old)

    try:
        _write(world, final, staging, prepare, write, commit)
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _write(
    world: World,
    final: Path,
    staging: Path,
    prepare: Callable[[], None],
    write: Callable[[Path], None],
    commit: Callable[[dict[str, dict[str, Any]]], None],
) -> None:
    """The steps of :func:`save`, each agreed on by all processes before the next."""
    world.on_main(lambda: _failing_as_checkpoint(prepare, final))
    world.together(lambda: _failing_as_checkpoint(lambda: write(staging), final))
    mine = sorted(p for p in staging.rglob("*") if p.is_file())[world.rank :: world.size]
    sums = world.together(lambda: _failing_as_checkpoint(lambda: {str(p.relative_to(staging)): _seal(p) for p in mine}, final))
    files = {name: facts for part in world.gather(sums) for name, facts in part.items()}
    world.on_main(lambda: _failing_as_checkpoint(lambda: commit(files), final))


def _failing_as_checkpoint(action: Callable[[], Any], final: Path) -> Any:
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"{final}: not written ({error}); earlier checkpoints are untouched") from error


def _seal(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    ours = {"python": platform.python_version(), "scale-mae": __version__}
    return ours | {p: version(p) for p in ("torch", "deepspeed", "timm")}


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    try:
        manifest = Manifest(**json.loads((checkpoint / MANIFEST).read_text()))
        if not isinstance(manifest.files, dict):
            raise TypeError
        return manifest
    except OSError:
        raise CheckpointError(f"{checkpoint}: not a checkpoint (no readable {MANIFEST})") from None
    except (ValueError, TypeError):
        raise CheckpointError(f"{checkpoint / MANIFEST}: damaged") from None


def read_config(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was written with.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return load_config(checkpoint / "config.yaml")
    except UserError as error:
        raise CheckpointError(f"{checkpoint}: its config cannot be read ({error})") from None


def verify(checkpoint: Path) -> Manifest:
    """Check size and checksum of every file.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    for name, facts in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: damaged ({path.stat().st_size} bytes, {facts['bytes']} were written)")
        try:
            same = _sha256(path) == facts["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if not same:
            raise CheckpointError(f"{path}: damaged (its checksum differs from the manifest's)")
    return manifest


def newest_good(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None where there are none at all.

    Args:
        run_dir: the run directory.
        warn: told of each damaged one passed over.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    found = checkpoints(run_dir)
    for checkpoint in reversed(found):
        try:
            verify(checkpoint)
            return checkpoint
        except CheckpointError as error:
            warn(f"passed over: {error}")
    if found:
        raise CheckpointError(
            f"{run_dir}: all {len(found)} checkpoints are damaged; move {run_dir / FOLDER} away to start anew"
        )
    return None


def locate(path: str | Path, warn: Callable[[str], None]) -> Path:
    """The checkpoint a user means by a run directory (its newest good one) or by a checkpoint's own folder.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    path = Path(path)
    if (path / FOLDER).is_dir():
        found = newest_good(path, warn)
        if found is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet")
        return found
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run directory or checkpoint")
    verify(path)
    return path
