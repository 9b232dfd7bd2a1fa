"""Classifiers from anywhere, as timm models: fine-tuned files of the reference, timm's, Hugging Face's, our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.evaluation.beit import is_beit, read_beit
from scale_mae.model.pos_embed import resize_pos_embed
from scale_mae.model.sizes import SIZES
from scale_mae.weights.encoder_import import extract_encoder
from scale_mae.weights.key_matching import read_matching
from scale_mae.weights.metadata import class_names
from scale_mae.weights.model_builder import build_encoder
from scale_mae.weights.weight_import import ImportedWeights, locate_weights, read_weights

Encoder: TypeAlias = VisionTransformer | Beit


@dataclass(frozen=True)
class Subject:
    """A model whose worth is measured.

    Attributes:
        model: on the host, in evaluation mode.
        path: its weights, as they were asked for.
        kind: where they come from, in words.
        digest: their SHA-256 in hexadecimal, or empty.
        seed: of their training, where something says.
        training: what they were trained as, whatever the seed; empty where nothing says.
        size: side of the images in pixels.
        mean: channel means that images in [0, 1] are normalised with.
        std: channel deviations.
        names: of its classes, where the weights tell them.
        family: its architecture in one word.
        crop_pct: share of the scaled short side that its own config cuts out; None: the reference's for its size.
    """

    model: Encoder
    path: str
    kind: str
    digest: str
    seed: int | None
    training: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    names: tuple[str, ...] = ()
    family: str = "ViT"
    crop_pct: float | None = None

    @property
    def architecture(self) -> str:
        """``ViT-base/16, 224 px`` or ``BEiT-base/16, 224 px``; sizes without a name as width x depth, ``ViT-32x3/8``."""
        blocks, width, patch = self.model.blocks, self.model.embed_dim, self.model.patch_embed.patch_size
        named = [name for name, size in SIZES.items() if (size.width, size.depth) == (width, len(blocks))]
        sides = patch[0] if patch[0] == patch[1] else f"{patch[0]}x{patch[1]}"
        return f"{self.family}-{named[0] if named else f'{width}x{len(blocks)}'}/{sides}, {self.size} px"

    @property
    def classes(self) -> int:
        """Classes it tells apart; 0 without a head."""
        return int(self.model.num_classes)


def load_classifier(path: str | Path, warn: Callable[[str], None] = print, size: int | None = None) -> Subject:
    """A classifier: encoder, pooling and head.

    Where a file has ``fc_norm`` and no ``norm``, the patch tokens are averaged first, as the reference fine-tunes; else the
    class token is classified, unless a config of timm beside it says otherwise.

    Args:
        path: a file or folder of the reference, timm or Hugging Face, or a run of ours that has a head.
        warn: told of damaged checkpoints that were passed over.
        size: side of the images in pixels, if not that of the weights; position tables are interpolated bicubically.

    Raises:
        CheckpointError: neither a plain ViT nor timm's BEiT, without head, or of another image size than can be had; one line.
    """
    place = locate_weights(path, warn)
    if is_beit(place):
        return _beit(path, place, True, size, warn)
    weights = read_weights(place)
    head = {name: t for name, t in weights.head_tensors.items() if name.startswith("head.")}
    if not head:
        advice = "an encoder without a head; scale-mae knn, logistic and embed take it, and evaluate does once it is fine-tuned"
        raise CheckpointError(f"{weights.path}: no classifier ({advice})")
    return _subject(path, weights, head, size)


def load_subject(path: str | Path, warn: Callable[[str], None] = print, size: int | None = None) -> Subject:
    """The encoder of weights from anywhere, without head; see :func:`load_classifier`."""
    place = locate_weights(path, warn)
    return _beit(path, place, False, size, warn) if is_beit(place) else _subject(path, read_weights(place), {}, size)


def _subject(path: str | Path, weights: ImportedWeights, head: dict[str, Tensor], size: int | None) -> Subject:
    metadata, tensors = extract_encoder(weights)
    arguments = dict(metadata["timm_kwargs"])
    patch, old = arguments["patch_size"], arguments["img_size"]
    new = [size, size] if size else list(old)
    if new[0] != new[1]:
        raise CheckpointError(f"{path}: for images of {old[0]} x {old[1]}; evaluation takes squares, give --size N")
    if new[0] % patch[0] or new[1] % patch[1]:
        raise CheckpointError(f"{path}: --size {size} is no multiple of its patches, {patch[0]} x {patch[1]}")
    grids = [(sides[0] // patch[0], sides[1] // patch[1]) for sides in (old, new)]
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], grids[0], grids[1])
    if head:
        shapes = {name: list(tensor.shape) for name, tensor in head.items()}
        rows = shapes.get("head.bias", [0])[0] if shapes.get("head.bias") else 0
        if shapes != {"head.weight": [rows, arguments["embed_dim"]], "head.bias": [rows]}:
            told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise CheckpointError(f"{path}: its head is not one linear layer on {arguments['embed_dim']} features ({told})")
        source = ImportedWeights(weights.path, head, [], {}, weights.provenance, weights.digest)
        tensors |= {name: read_matching(source, name, tensor) for name, tensor in head.items()}
        arguments["num_classes"] = rows
        if weights.provenance.pool == "avg" and arguments["global_pool"] == "token":
            arguments |= {"global_pool": "avg", "fc_norm": False}
    model = build_encoder(metadata | {"timm_kwargs": arguments | {"img_size": new}, "image_size": new})
    model.load_state_dict(tensors, strict=True)
    provenance, (mean, std) = weights.provenance, (metadata["mean"], metadata["std"])
    ours = provenance.metadata if head and provenance.metadata else {}
    names, crop_pct = tuple(class_names(ours)), ours.get("crop_pct") if new == list(old) else None
    where = (str(path), provenance.kind, weights.digest(), provenance.seed, provenance.training_digest)
    return Subject(model, *where, new[0], tuple(mean), tuple(std), names, crop_pct=crop_pct)


def _beit(path: str | Path, place: Path, head: bool, size: int | None, warn: Callable[[str], None]) -> Subject:
    found = read_beit(place, head, warn)
    height, width = found.model.patch_embed.img_size
    if height != width or size not in (None, height):
        asked = f", not of --size {size}" if size else "; evaluation takes squares"
        raise CheckpointError(f"{path}: its relative positions are for images of {height} x {width} px{asked}")
    return Subject(
        found.model,
        str(path),
        f"timm {found.name}",
        found.digest,
        seed=None,
        training="",
        size=height,
        mean=found.mean,
        std=found.std,
        family=found.family,
        crop_pct=found.crop_pct,
    )
