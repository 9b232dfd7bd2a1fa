"""Checkpoints on disk, as their readers see them: a whole one or none.

    checkpoints/step-00000100/           manifest.json  config.yaml  latest  deepspeed/*.pt
    checkpoints/damaged-step-00000080/   found damaged when the run was resumed
    checkpoints/latest                   name of the newest, for people and scripts; nothing here relies on it

Which one is good is found by looking: the newest whose files all have the sizes and checksums that its manifest states.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scale_mae.config import Config, UserError, load_config
from scale_mae.system.files import sha256
from scale_mae.system.resources import available_cores
from scale_mae.system.thread_pool import DaemonThreadPool

FOLDER = "checkpoints"
PREFIX = "step-"
DAMAGED = "damaged-"
DEEPSPEED_TAG = "deepspeed"  # folder of DeepSpeed's own files inside a checkpoint
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

    def to_text(self) -> str:
        """The content of ``manifest.json``: itself, and under ``digest`` the SHA-256 of all that as compact JSON, sorted."""
        content = asdict(self)
        compact = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return json.dumps(content | {"digest": hashlib.sha256(compact.encode()).hexdigest()}, indent=1)

    @classmethod
    def of_text(cls, text: str) -> Manifest:
        """From what :meth:`to_text` gave.

        Raises:
            ValueError: another text, be it by a space.
            Exception: any other; nested too deep, for instance.
        """
        content = json.loads(text)
        manifest = cls(**{field.name: content[field.name] for field in fields(cls)})
        counts = (manifest.step, manifest.world_size, manifest.zero_stage)
        texts = (manifest.config_digest, *manifest.versions.values())
        if {type(count) for count in counts} != {int} or {type(text) for text in texts} != {str}:
            raise ValueError
        if manifest.to_text() != text or not manifest.files:
            raise ValueError
        for file in manifest.files.values():
            if file.keys() != {"bytes", "sha256"} or (type(file["bytes"]), type(file["sha256"])) != (int, str):
                raise ValueError
        return manifest


def checkpoint_name(step: int) -> str:
    """Folder name of a step: ``step-00000100``."""
    return f"{PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, from the folder's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / FOLDER).glob(f"{PREFIX}*") if p.is_dir() and _is_name(p.name))


def _is_name(name: str) -> bool:
    return re.fullmatch(rf"{PREFIX}\d+", name, re.ASCII) is not None


def is_ours(path: Path) -> bool:
    """Whether a folder is a run directory, its folder of checkpoints or a checkpoint, be it without manifest."""
    if (path / FOLDER).is_dir() or (path / MANIFEST).is_file() or _holds_checkpoints(path):
        return True
    named = _is_name(path.name.removeprefix(DAMAGED).partition(".")[0])
    return (path / DEEPSPEED_TAG).is_dir() and (named or (path / "config.yaml").is_file())


def _holds_checkpoints(path: Path) -> bool:
    return path.name == FOLDER and path.is_dir() and bool(checkpoints(path.parent))


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it is that of another step than the folder's name tells.
    """
    try:
        manifest = Manifest.of_text((checkpoint / MANIFEST).read_bytes().decode())
    except OSError:
        if _holds_checkpoints(checkpoint):
            raise CheckpointError(f"{checkpoint}: holds checkpoints; give one of them, or {checkpoint.parent}") from None
        raise CheckpointError(f"{checkpoint}: not a checkpoint (no readable {MANIFEST})") from None
    except Exception:  # whatever a few changed bytes make of JSON
        raise CheckpointError(f"{checkpoint / MANIFEST}: damaged") from None
    if _is_name(checkpoint.name) and step_of(checkpoint) != manifest.step:
        raise CheckpointError(f"{checkpoint / MANIFEST}: damaged (it is that of step {manifest.step})")
    return manifest


def read_config(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was written with.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return load_config(checkpoint / "config.yaml")
    except UserError as error:
        raise CheckpointError(f"{checkpoint}: its config cannot be read ({error})") from None


class Verification:
    """The checksums of a checkpoint, taken in threads from the moment that this is made; no process waits for them to end.

    Attributes:
        checkpoint: whose.
        notes: told when it was looked for.

    Raises:
        CheckpointError: its manifest is damaged.
    """

    def __init__(self, checkpoint: Path, notes: Sequence[str] = ()) -> None:
        self.checkpoint, self.notes, self._manifest = checkpoint, list(notes), read_manifest(checkpoint)
        threads, files = DaemonThreadPool(available_cores(), "checksum"), self._manifest.files
        self._checks = [threads.submit(_verify_file, checkpoint / name, facts, True) for name, facts in files.items()]
        threads.shutdown()

    def result(self) -> Manifest:
        """Wait for them.

        Raises:
            CheckpointError: names the first file that is missing or differs.
        """
        for check in self._checks:
            check.result()
        return self._manifest

    def failed(self) -> bool:
        """Wait for them; whether any differs."""
        try:
            self.result()
        except CheckpointError:
            return True
        return False


def begin(path: str | Path) -> Verification:
    """Find the checkpoint that :func:`locate` would, looking at sizes only, and begin to take its checksums.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    notes: list[str] = []
    return Verification(locate(path, notes.append, checksums=False), notes)


def verify(checkpoint: Path, *, checksums: bool = True) -> Manifest:
    """Check size and, if so wished, checksum of every file.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    if checksums:
        return Verification(checkpoint).result()
    manifest = read_manifest(checkpoint)
    for name, facts in manifest.files.items():
        _verify_file(checkpoint / name, facts, False)
    return manifest


def _verify_file(path: Path, facts: dict[str, Any], checksums: bool) -> None:
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(f"{path}: damaged ({size} bytes, {facts['bytes']} were written)")
        same = not checksums or sha256(path) == facts["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing from the checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not same:
        raise CheckpointError(f"{path}: damaged (its checksum differs from the manifest's)")


def newest_good(
    run_dir: Path,
    warn: Callable[[str], None],
    *,
    set_aside: bool = False,
    checksums: bool = True,
    last: int | None = None,
) -> Path | None:
    """The newest checkpoint that verifies; None where there never was one.

    Args:
        run_dir: the run directory.
        warn: told of each damaged one passed over.
        set_aside: rename those to ``damaged-step-...``, as a run does that goes on from the one before. Where that is not
            possible they stay, and a new checkpoint of their step takes their place.
        checksums: see :func:`verify`.
        last: step of the newest that counts; those after it are not looked at.

    Raises:
        CheckpointError: there are checkpoints and all are damaged; then none is renamed.
    """
    found = [checkpoint for checkpoint in checkpoints(run_dir) if last is None or step_of(checkpoint) <= last]
    damaged = []
    for checkpoint in reversed(found):
        try:
            verify(checkpoint, checksums=checksums)
            break
        except CheckpointError as error:
            damaged.append((checkpoint, error))
    else:
        aside = list((run_dir / FOLDER).glob(f"{DAMAGED}*")) if last is None else []
        if found or aside:
            named = f"; {damaged[0][1]}" if damaged else ""
            raise CheckpointError(
                f"{run_dir}: all {len(found) + len(aside)} checkpoints are damaged{named}; "
                f"to start anew, move {run_dir / FOLDER} away"
            )
        return None
    for bad, why in damaged:
        where = move_aside(bad) if set_aside else None
        warn(f"passed over: {why}" + (f"; set aside as {where}" if where else ""))
    return checkpoint


def move_aside(checkpoint: Path) -> Path | None:
    """Rename a damaged checkpoint so that nothing takes it for a good one; its new path, or None where that is forbidden."""
    for number in range(1000):
        target = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}" + (f".{number}" if number else ""))
        if not target.exists():
            try:
                checkpoint.rename(target)
            except OSError:
                break
            return target
    return None


def locate(path: str | Path, warn: Callable[[str], None], *, checksums: bool = True) -> Path:
    """The checkpoint a user means by a run directory (its newest good one) or by a checkpoint's own folder.

    Args:
        path: either.
        warn: told of each damaged one passed over.
        checksums: see :func:`verify`.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    path = Path(path)
    if (path / FOLDER).is_dir():
        found = newest_good(path, warn, checksums=checksums)
        if found is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet")
        return found
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run directory or checkpoint")
    verify(path, checksums=checksums)
    return path
