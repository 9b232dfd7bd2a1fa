"""The manifest of a checkpoint (``manifest.json``), which lists the size and the checksum of each of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.paths import MANIFEST_FILE, get_step, is_checkpoint_name, is_checkpoints_folder
from scale_mae.config import Config, UserError, load_config


@dataclass(frozen=True)
class Manifest:
    """Metadata of a checkpoint and the checksums of its files.

    Attributes:
        step: Optimizer steps done.
        world_size: Number of processes that wrote the checkpoint.
        zero_stage: ZeRO stage.
        config_digest: Digest of the configuration, see :meth:`Config.digest`.
        versions: Versions of Python and of the packages that wrote the checkpoint.
        files: ``{"bytes": size, "sha256": checksum}`` of every other file, by its path inside the checkpoint.
    """

    step: int
    world_size: int
    zero_stage: int
    config_digest: str
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        """Return the text of ``manifest.json``.

        Its key ``digest`` is the SHA-256 of the other keys, written as compact JSON with sorted keys.
        """
        content = asdict(self)
        compact = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return json.dumps(content | {"digest": hashlib.sha256(compact.encode()).hexdigest()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Return the manifest that :meth:`to_json` wrote.

        Raises:
            ValueError: The text differs from what :meth:`to_json` writes, even by a space.
            Exception: Any other error of the JSON parser, for instance for text that is nested too deep.
        """
        content = json.loads(text)
        manifest = cls(**{field.name: content[field.name] for field in fields(cls)})
        counts = (manifest.step, manifest.world_size, manifest.zero_stage)
        texts = (manifest.config_digest, *manifest.versions.values())
        if {type(count) for count in counts} != {int} or {type(text) for text in texts} != {str}:
            raise ValueError
        if manifest.to_json() != text or not manifest.files:
            raise ValueError
        for file in manifest.files.values():
            if file.keys() != {"bytes", "sha256"} or (type(file["bytes"]), type(file["sha256"])) != (int, str):
                raise ValueError
        return manifest


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: The manifest is missing or damaged, or its step differs from the one in the folder's name.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = Manifest.from_json(path.read_bytes().decode())
    except OSError:
        if is_checkpoints_folder(checkpoint):
            raise CheckpointError(
                f"{checkpoint}: a folder of checkpoints. Give one of them, or the run directory {checkpoint.parent}."
            ) from None
        raise CheckpointError(f"{checkpoint}: not a complete checkpoint ({MANIFEST_FILE} is missing or unreadable)") from None
    except Exception:  # damaged JSON can raise anything
        raise CheckpointError(f"{path}: damaged") from None
    if is_checkpoint_name(checkpoint.name) and get_step(checkpoint) != manifest.step:
        raise CheckpointError(f"{path}: damaged (it belongs to step {manifest.step})")
    return manifest


def read_config(checkpoint: Path) -> Config:
    """Return the configuration that a checkpoint was written with.

    Raises:
        CheckpointError: The configuration is missing or damaged.
    """
    try:
        return load_config(checkpoint / "config.yaml")
    except UserError as error:
        raise CheckpointError(f"{checkpoint}: its configuration cannot be read ({error})") from None
