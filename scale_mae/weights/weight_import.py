"""Imports weights of a ViT or a MAE from any supported source, and renames their tensors to the keys that scale_mae uses.

Sources are runs, checkpoints and exports of scale_mae, folders of plain DeepSpeed code, and files of the reference repository,
timm, MoCo v3 and Hugging Face. The reference and timm use the same keys as scale_mae; Hugging Face keys are mapped
(``weights/huggingface.py``). The keys show which kind it is. Prefixes of wrappers (``module.``, ``_orig_mod.``, ``backbone.``,
...) are removed. Classification heads are separated. Whether all other tensors match a model is checked in
``weights/key_matching.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from scale_mae.checkpoint.deepspeed_files import find_deepspeed_folder, is_deepspeed_folder
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.lazy_tensor import LazyTensorReader
from scale_mae.checkpoint.manifest import read_config, read_manifest
from scale_mae.checkpoint.paths import DEEPSPEED_TAG, is_run_or_checkpoint
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.weights.classifier_heads import read_head, to_linear_head
from scale_mae.weights.huggingface import from_huggingface
from scale_mae.weights.metadata import build_metadata, is_classifier
from scale_mae.weights.provenance import Provenance, detect_provenance, provenance_from_metadata
from scale_mae.weights.safetensors_io import compute_digest
from scale_mae.weights.weight_files import WeightFiles, open_weights

HEAD_PREFIXES = ("head.", "fc_norm.", "classifier.", "pooler.")
# The key of the patch embedding shows whose keys a file uses, and their common prefix.
TIMM_ANCHOR, HUGGINGFACE_ANCHOR = "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"
WRAPPER_PREFIXES = r"((module|_orig_mod|backbone|encoder|vit|model|base_model|base_encoder)\.)*"
MOCO_ENCODER, MOCO_EMA_ENCODER = "base_encoder.", "momentum_encoder."  # MoCo v3 stores the trained encoder and its EMA


@dataclass(frozen=True)
class ImportedWeights:
    """Weights under scale_mae's keys.

    Attributes:
        path: The file or folder.
        tensors: The state dict without head. A tensor is read when it is accessed, if the source allows it.
        skipped: The keys in the source of all tensors that are not in ``tensors``.
        head_tensors: The tensors of a classification head under timm's keys (``head.*``, ``fc_norm.*``).
        provenance: What is known of the weights.
        digest: Returns a SHA-256 in hexadecimal: of the file; of the joined digests of several files; of the tensors of a
            scale_mae checkpoint, independent of how many processes wrote it. Empty for a folder of plain DeepSpeed code.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    skipped: list[str]
    head_tensors: Mapping[str, Tensor]
    provenance: Provenance
    digest: Callable[[], str]

    @property
    def has_decoder(self) -> bool:
        """Whether there is at least one tensor of a MAE decoder."""
        return any(is_decoder_key(key) for key in self.tensors)


class _SplitTensors(NamedTuple):
    """Tensors under scale_mae's keys, split into encoder and decoder, head, and the source's keys that are not used."""

    tensors: Mapping[str, Tensor]
    skipped: list[str]
    head_tensors: Mapping[str, Tensor]


def is_decoder_key(key: str) -> bool:
    """Return whether a tensor of scale_mae belongs to the decoder."""
    return key.startswith("decoder_") or key == "mask_token"


def locate_weights(path: str | Path, warn: Callable[[str], None]) -> Path:
    """Return the path to pass to :func:`read_weights`: the newest valid checkpoint of a run directory, else ``path`` itself.

    Checkpoints of scale_mae are verified here. In a distributed job one process does it for all.

    Args:
        path: A run directory, a checkpoint, a DeepSpeed folder, an export, or a third-party file or folder.
        warn: Receives one message for each damaged checkpoint that was skipped.

    Raises:
        CheckpointError: The run directory has no valid checkpoint, or the checkpoint is damaged.
    """
    path = Path(path)
    return locate_checkpoint(path, warn) if is_run_or_checkpoint(path) else path


def read_weights(path: Path) -> ImportedWeights:
    """Import weights from a path that :func:`locate_weights` returned.

    Raises:
        CheckpointError: ``path`` contains no usable weights.
    """
    if is_run_or_checkpoint(path):
        return _read_checkpoint(path)
    if is_deepspeed_folder(path):
        reader = ZeroReader(find_deepspeed_folder(path))
        provenance = Provenance(f"DeepSpeed checkpoint, ZeRO-{reader.stage}", step=reader.step)
        return ImportedWeights(path, *_split_timm_keys(reader, path), provenance=provenance, digest=lambda: "")
    files = open_weights(path)
    if damage := files.find_damage():
        raise CheckpointError(damage)
    return import_weight_files(path, files)


def import_weight_files(path: Path, files: WeightFiles) -> ImportedWeights:
    """Rename the tensors of a file or folder to scale_mae's keys.

    Args:
        path: The file or folder, for errors.
        files: Its contents.

    Raises:
        CheckpointError: The tensors are not those of one ViT.
    """
    is_huggingface = any(_is_anchor(key, HUGGINGFACE_ANCHOR) for key in files.tensors)
    split = (_split_huggingface_keys if is_huggingface else _split_timm_keys)(_rename_final_norm(files), path)
    width = _count_rows(split.tensors, "patch_embed.proj.weight")
    decoder_width = _count_rows(split.tensors, "decoder_embed.weight") if any(map(is_decoder_key, split.tensors)) else None
    provenance = detect_provenance(files, is_huggingface, width, decoder_width)
    return ImportedWeights(path, *split, provenance=provenance, digest=files.digest)


def _count_rows(tensors: Mapping[str, Tensor], key: str) -> int:
    """Return the number of rows of a tensor, or 0 if it is missing."""
    return tensors[key].shape[0] if key in tensors and tensors[key].dim() else 0


def _rename_final_norm(files: WeightFiles) -> Mapping[str, Tensor]:
    """Rename the ``fc_norm`` of an encoder that scale_mae exported with average pooling to ``norm``.

    A classifier keeps its ``fc_norm``, because it was trained with the norm after the pooling.
    """
    arguments = files.metadata.get("timm_kwargs", {})
    if arguments.get("global_pool") != "avg" or arguments.get("num_classes"):
        return files.tensors
    return _RenamedTensors(files.tensors, {re.sub(r"^fc_norm\.", "norm.", key): key for key in files.tensors})


def _read_checkpoint(checkpoint: Path) -> ImportedWeights:
    manifest, config, reader = read_manifest(checkpoint), read_config(checkpoint), ZeroReader(checkpoint / DEEPSPEED_TAG)
    tensors: Mapping[str, Tensor] = reader
    head = read_head(config, reader) if is_classifier(config) else None
    if head:
        tensors = LazyTensorReader(to_linear_head({key: reader.lazy(key) for key in reader}, head))
    provenance = provenance_from_metadata(build_metadata(config, manifest.step, head=head), "scale-mae checkpoint")
    split = _split_timm_keys(tensors, checkpoint)
    return ImportedWeights(checkpoint, *split, provenance=provenance, digest=lambda: compute_digest(tensors))


def _is_anchor(key: str, anchor: str) -> bool:
    return key == anchor or key.endswith(f".{anchor}")


def _find_prefix(tensors: Mapping[str, Tensor], anchor: str, path: Path) -> str:
    """Return the common prefix of the encoder's keys."""
    prefixes = [key.removesuffix(anchor) for key in tensors if _is_anchor(key, anchor)]
    if not prefixes:
        raise CheckpointError(f"{path}: not the weights of a ViT (none of the {len(tensors)} tensors is named {anchor}).")
    if sorted(prefixes)[1:] == [min(prefixes).replace(MOCO_ENCODER, MOCO_EMA_ENCODER)]:
        prefixes = [min(prefixes)]
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path}: contains {len(prefixes)} encoders ({', '.join(prefixes)}). Give a file with one encoder."
        )
    if not re.fullmatch(WRAPPER_PREFIXES, prefixes[0]):
        raise CheckpointError(f"{path}: the keys start with the unknown prefix {prefixes[0]!r}. Remove it from the file.")
    return prefixes[0]


def _split_timm_keys(tensors: Mapping[str, Tensor], path: Path) -> _SplitTensors:
    """Remove the prefix of the keys of timm, the reference repository or scale_mae, and separate the head."""
    prefix = _find_prefix(tensors, TIMM_ANCHOR, path)
    outside = [key for key in tensors if prefix.endswith(MOCO_ENCODER) and not key.startswith(prefix)]
    source_keys = {key.removeprefix(prefix).replace("_orig_mod.", ""): key for key in tensors if key not in outside}
    if len(source_keys) + len(outside) < len(tensors):
        raise CheckpointError(f"{path}: two tensors have the same key without the prefix {prefix!r}.")
    head = {key: source for key, source in source_keys.items() if key.startswith(HEAD_PREFIXES)}
    backbone = {key: source for key, source in source_keys.items() if key not in head}
    skipped = [*head.values(), *outside]
    return _SplitTensors(_RenamedTensors(tensors, backbone), skipped, _RenamedTensors(tensors, head))


def _split_huggingface_keys(tensors: Mapping[str, Tensor], path: Path) -> _SplitTensors:
    """Map the keys of transformers, and separate the head."""
    prefix = _find_prefix(tensors, HUGGINGFACE_ANCHOR, path).removesuffix("vit.")
    stripped = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    try:
        backbone = from_huggingface(stripped)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    head_keys = [key for key in stripped if key.removeprefix("vit.").startswith(HEAD_PREFIXES)]
    head = {re.sub(r"^classifier\.", "head.", key): stripped[key] for key in head_keys}
    return _SplitTensors(backbone, [prefix + key for key in head_keys], head)


class _RenamedTensors(Mapping[str, Tensor]):
    """A view of tensors under other keys."""

    def __init__(self, tensors: Mapping[str, Tensor], source_keys: dict[str, str]) -> None:
        self._tensors, self._source_keys = tensors, source_keys

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[self._source_keys[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source_keys)

    def __len__(self) -> int:
        return len(self._source_keys)
