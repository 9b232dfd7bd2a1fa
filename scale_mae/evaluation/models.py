"""Loads the models to evaluate, encoders and classifiers of any supported origin, as timm models."""

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
class EvaluatedModel:
    """A model to evaluate, and what is known about its weights.

    Attributes:
        model: The model, on the host, in evaluation mode.
        path: The path of the weights, as the user gave it.
        kind: The origin of the weights, in words.
        digest: The SHA-256 of the weights in hexadecimal, or empty.
        seed: The seed of the training run, if the weights record it.
        training: A digest of the training settings without the seed. Empty if unknown.
        size: The side of the images in pixels.
        mean: The channel means for images in [0, 1].
        std: The channel standard deviations.
        names: The class names, if the weights record them.
        family: The architecture family in one word.
        crop_pct: The center crop in the model's own config. ``None``: the reference's crop for its size.
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
        """The architecture as text: ``ViT-base/16, 224 px``. A size without a name is width x depth: ``ViT-32x3/8``."""
        blocks, width, patch = self.model.blocks, self.model.embed_dim, self.model.patch_embed.patch_size
        named = [name for name, size in SIZES.items() if (size.width, size.depth) == (width, len(blocks))]
        sides = patch[0] if patch[0] == patch[1] else f"{patch[0]}x{patch[1]}"
        return f"{self.family}-{named[0] if named else f'{width}x{len(blocks)}'}/{sides}, {self.size} px"

    @property
    def classes(self) -> int:
        """The number of classes; 0 without a head."""
        return int(self.model.num_classes)


def load_classifier(path: str | Path, warn: Callable[[str], None] = print, size: int | None = None) -> EvaluatedModel:
    """Load a classifier: encoder, pooling and head.

    The head reads the mean of the patch tokens if the file has ``fc_norm`` and no ``norm``, as the reference fine-tunes. Else
    it reads the class token, unless timm's config file next to the weights says otherwise.

    Args:
        path: A file or folder of the reference, timm or Hugging Face, or a run directory of a classifier.
        warn: Receives a warning for each damaged checkpoint that was skipped.
        size: The side of the images in pixels, if it differs from the weights'. The position embedding is interpolated.

    Raises:
        CheckpointError: The model is neither a plain ViT nor timm's BEiT, has no head, or does not support the size.
    """
    place = locate_weights(path, warn)
    if is_beit(place):
        return _build_beit(path, place, True, size, warn)
    weights = read_weights(place)
    head = {name: t for name, t in weights.head_tensors.items() if name.startswith("head.")}
    if not head:
        advice = "fine-tune it first, or use scale-mae knn, logistic or embed"
        raise CheckpointError(f"{weights.path}: an encoder without a classification head; {advice}")
    return _build_vit(path, weights, head, size)


def load_frozen_encoder(path: str | Path, warn: Callable[[str], None] = print, size: int | None = None) -> EvaluatedModel:
    """Load an encoder without its head; see :func:`load_classifier`."""
    place = locate_weights(path, warn)
    return _build_beit(path, place, False, size, warn) if is_beit(place) else _build_vit(path, read_weights(place), {}, size)


def _build_vit(path: str | Path, weights: ImportedWeights, head: dict[str, Tensor], size: int | None) -> EvaluatedModel:
    metadata, tensors = extract_encoder(weights)
    arguments = dict(metadata["timm_kwargs"])
    patch, old = arguments["patch_size"], arguments["img_size"]
    new = [size, size] if size else list(old)
    if new[0] != new[1]:
        raise CheckpointError(
            f"{path}: the model expects images of {old[0]} x {old[1]} px; evaluation needs square images: set --size N"
        )
    if new[0] % patch[0] or new[1] % patch[1]:
        raise CheckpointError(f"{path}: --size {size} is not a multiple of the patch size, {patch[0]} x {patch[1]}")
    grids = [(sides[0] // patch[0], sides[1] // patch[1]) for sides in (old, new)]
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], grids[0], grids[1])
    if head:
        shapes = {name: list(tensor.shape) for name, tensor in head.items()}
        rows = shapes.get("head.bias", [0])[0] if shapes.get("head.bias") else 0
        if shapes != {"head.weight": [rows, arguments["embed_dim"]], "head.bias": [rows]}:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise CheckpointError(f"{path}: the head is not one linear layer on {arguments['embed_dim']} features ({listed})")
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
    return EvaluatedModel(model, *where, new[0], tuple(mean), tuple(std), names, crop_pct=crop_pct)


def _build_beit(path: str | Path, place: Path, head: bool, size: int | None, warn: Callable[[str], None]) -> EvaluatedModel:
    found = read_beit(place, head, warn)
    height, width = found.model.patch_embed.img_size
    if height != width or size not in (None, height):
        requested = f", not for --size {size}" if size else "; evaluation needs square images"
        raise CheckpointError(f"{path}: its relative position tables are for images of {height} x {width} px{requested}")
    return EvaluatedModel(
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
