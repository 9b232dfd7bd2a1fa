"""Weights of a ViT or a MAE from anywhere, under our names: the reference's, timm's, Hugging Face's, our own in any form.

The names tell the kind. Prefixes that wrappers leave (``module.``, ``_orig_mod.``, ``backbone.``, ...) are taken off where
there is one encoder, classification heads are left out and listed, and everything else has to fit (``checkpoint/fit.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scale_mae.checkpoint.safetensors_io import Reading, digest_of
from scale_mae.checkpoint.store import DEEPSPEED_TAG, CheckpointError, is_ours, locate, read_config, read_manifest
from scale_mae.checkpoint.zero_files import find_folder
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.weights.classifier_heads import plain, read_head
from scale_mae.weights.huggingface import from_huggingface
from scale_mae.weights.metadata import describe, is_classifier
from scale_mae.weights.provenance import Origin, of_ours, origin_of
from scale_mae.weights.weight_files import Opened, open_weights

HEADS = ("head.", "fc_norm.", "classifier.", "pooler.")
OURS, THEIRS = "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"
PREFIXES = r"((module|_orig_mod|backbone|encoder|vit|model|base_model|base_encoder)\.)*"
BASE, MOMENTUM = "base_encoder.", "momentum_encoder."  # of MoCo v3: what is trained, and its moving average


_Sorted = tuple[Mapping[str, Tensor], list[str], Mapping[str, Tensor]]  # tensors, names left out, heads


@dataclass(frozen=True)
class Weights:
    """Weights under our names.

    Attributes:
        path: where they were found.
        tensors: without heads; made when asked for where the source allows it.
        left_out: names in the source of the tensors that were left out.
        heads: those of them that a classifier needs, under timm's names (``head.*``, ``fc_norm.*``).
        origin: what is known of them.
        digest: gives the SHA-256 of the file (of several: of their checksums; of our checkpoints: of the tensors, whatever the
            processes that wrote them) in hexadecimal; empty for a folder that plain DeepSpeed code wrote.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    left_out: list[str]
    heads: Mapping[str, Tensor]
    origin: Origin
    digest: Callable[[], str]

    @property
    def has_decoder(self) -> bool:
        """Whether any part of a MAE's decoder is there."""
        return any(is_decoder(name) for name in self.tensors)


def is_decoder(name: str) -> bool:
    """Whether a tensor of ours belongs to the decoder."""
    return name.startswith("decoder_") or name == "mask_token"


def locate_weights(path: str | Path, warn: Callable[[str], None]) -> Path:
    """What :func:`read_weights` takes: of a run directory its newest good checkpoint, else the path itself.

    Our own checkpoints are verified here. One process does it for all.

    Args:
        path: a run directory, a checkpoint, a DeepSpeed folder, an export, or a file or folder of others.
        warn: told of damaged checkpoints that were passed over.

    Raises:
        CheckpointError: a run directory without a good checkpoint, or a damaged checkpoint.
    """
    path = Path(path)
    return locate(path, warn) if is_ours(path) else path


def read_weights(path: Path) -> Weights:
    """Weights of what :func:`locate_weights` found.

    Raises:
        CheckpointError: nothing usable there; one line.
    """
    if is_ours(path):
        return _own_checkpoint(path)
    if path.is_dir() and (any(path.glob("*_model_states.pt")) or (path / "latest").is_file()):
        reader = ZeroReader(find_folder(path))
        origin = Origin(f"DeepSpeed checkpoint, ZeRO-{reader.stage}", step=reader.step)
        return Weights(path, *_our_names(reader, path), origin, lambda: "")
    opened = open_weights(path)
    if damage := opened.damage():
        raise CheckpointError(damage)
    return weights_of(path, opened)


def weights_of(path: Path, opened: Opened) -> Weights:
    """The tensors of a file or folder under our names; ``path`` is named in errors.

    Raises:
        CheckpointError: not those of one ViT.
    """
    huggingface = any(_is_tensor(name, THEIRS) for name in opened.tensors)
    tensors, left_out, heads = (_huggingface_names if huggingface else _our_names)(_pooled(opened), path)
    width, decoder_width = (_width(tensors, name) for name in ("patch_embed.proj.weight", "decoder_embed.weight"))
    origin = origin_of(opened, huggingface, width, decoder_width if any(map(is_decoder, tensors)) else None)
    return Weights(path, tensors, left_out, heads, origin, opened.digest)


def _width(tensors: Mapping[str, Tensor], name: str) -> int:
    """Rows of a tensor; 0 where it is not there."""
    return tensors[name].shape[0] if name in tensors and tensors[name].dim() else 0


def _pooled(opened: Opened) -> Mapping[str, Tensor]:
    """The tensors; of our exported encoders with average pooling, which call the final norm ``fc_norm``, under its usual
    name. A classifier was trained with the norm behind the pooling, which is another thing."""
    arguments = opened.facts.get("timm_kwargs", {})
    if arguments.get("global_pool") != "avg" or arguments.get("num_classes"):
        return opened.tensors
    return _Renamed(opened.tensors, {re.sub(r"^fc_norm\.", "norm.", name): name for name in opened.tensors})


def _own_checkpoint(checkpoint: Path) -> Weights:
    manifest, config, reader = read_manifest(checkpoint), read_config(checkpoint), ZeroReader(checkpoint / DEEPSPEED_TAG)
    tensors: Mapping[str, Tensor] = reader
    head = read_head(config, reader) if is_classifier(config) else None
    if head:
        tensors = Reading(plain({name: reader.lazy(name) for name in reader}, head))
    origin = of_ours(describe(config, manifest.step, head=head), "scale-mae checkpoint")
    return Weights(checkpoint, *_our_names(tensors, checkpoint), origin, lambda: digest_of(tensors))


def _is_tensor(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _prefix(names: Mapping[str, Tensor], anchor: str, path: Path) -> str:
    """What stands before all names of the encoder."""
    found = [name.removesuffix(anchor) for name in names if _is_tensor(name, anchor)]
    if not found:
        raise CheckpointError(f"{path}: not weights of a ViT (none of its {len(names)} tensors is called {anchor})")
    if sorted(found)[1:] == [min(found).replace(BASE, MOMENTUM)]:
        found = [min(found)]
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {len(found)} encoders ({', '.join(found)}); which one is meant cannot be told")
    if not re.fullmatch(PREFIXES, found[0]):
        raise CheckpointError(f"{path}: its names begin with {found[0]!r}, which is not a prefix known here; take it off")
    return found[0]


def _our_names(names: Mapping[str, Tensor], path: Path) -> _Sorted:
    """The reference's and timm's names are ours, but for prefixes."""
    prefix = _prefix(names, OURS, path)
    beside = [name for name in names if prefix.endswith(BASE) and not name.startswith(prefix)]
    places = {name.removeprefix(prefix).replace("_orig_mod.", ""): name for name in names if name not in beside}
    if len(places) + len(beside) < len(names):
        raise CheckpointError(f"{path}: two of its tensors have the same name without the prefix {prefix!r}")
    kept = {name: place for name, place in places.items() if not name.startswith(HEADS)}
    left_out = {name: place for name, place in places.items() if name not in kept}
    return _Renamed(names, kept), [*left_out.values(), *beside], _Renamed(names, left_out)


def _huggingface_names(names: Mapping[str, Tensor], path: Path) -> _Sorted:
    outer = _prefix(names, THEIRS, path).removesuffix("vit.")
    given = {name.removeprefix(outer): tensor for name, tensor in names.items()}
    try:
        tensors = from_huggingface(given)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    left_out = [name for name in given if name.removeprefix("vit.").startswith(HEADS)]
    heads = {re.sub(r"^classifier\.", "head.", name): given[name] for name in left_out}
    return tensors, [outer + name for name in left_out], heads


class _Renamed(Mapping[str, Tensor]):
    """A view of tensors under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], places: dict[str, str]) -> None:
        self._tensors, self._places = tensors, places

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
