"""Builds the initial classifier of a fine-tuning or linear-probe run, with an encoder from any supported source."""

from __future__ import annotations

import re

import torch

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.config import Config, ConfigError
from scale_mae.distributed.process_group import World
from scale_mae.model.classifier import Classifier, build_classifier
from scale_mae.model.pos_embed import resize_pos_embed
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES
from scale_mae.weights.encoder_import import extract_encoder
from scale_mae.weights.initialization import load_on_all_ranks
from scale_mae.weights.weight_import import ImportedWeights


def build_classifier_from_config(config: Config, classes: int) -> Classifier:
    """Build the classifier of a run with random weights from its seed. No parameter is frozen yet."""
    m, c = config.model, config.classify
    return build_classifier(
        SIZES[m.size],
        seed=config.run.seed,
        from_scratch=m.init_from is None,
        image_size=m.image_size,
        patch_size=m.patch,
        classes=classes,
        pool=c.pool,
        drop_path=c.drop_path,
    )


@torch.no_grad()
def load_initial_encoder(model: Classifier, weights: ImportedWeights) -> str:
    """Load an imported encoder into a new classifier.

    The position embedding is interpolated bicubically if the grid of patches differs. With mean pooling, the norm after the
    pooling keeps its initial values as in the reference, unless the weights come from a classifier with mean pooling.

    Returns:
        A description of the weights and of all deviations, in one line.

    Raises:
        CheckpointError: The weights are not those of a plain ViT, or their shape differs.
    """
    metadata, tensors = extract_encoder(weights)
    _check_sizes(model, weights, metadata["timm_kwargs"])
    patch = model.patch_embed.patch_size
    source_grid, grid = (
        (height // patch[0], width // patch[1]) for height, width in (metadata["image_size"], model.patch_embed.img_size)
    )
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], source_grid, grid)
    notes = []
    if source_grid != grid:
        notes.append(f"Interpolated pos_embed from {source_grid[0]} x {source_grid[1]} to {grid[0]} x {grid[1]} patches.")
    if metadata["layer_norm_eps"] != LAYER_NORM_EPS:
        notes.append(f"Changed the norm epsilon from {metadata['layer_norm_eps']:g} to {LAYER_NORM_EPS:g}.")
    if model.global_pool == "token":
        tensors = {re.sub(r"^fc_norm\.", "norm.", key): t for key, t in tensors.items()}
    else:  # fc_norm is present only if it was trained after the pooling
        tensors = {key: t for key, t in tensors.items() if not key.startswith("norm.")}
        if "fc_norm.weight" not in tensors:
            notes.append("fc_norm keeps its initial values.")
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        parameters[key].copy_(tensor)
    digest = weights.digest()
    about = weights.provenance.summary() + (f", SHA-256 {digest[:16]}" if digest else "")
    return " ".join([f"Initialized the encoder from {weights.path} ({about}).", *notes])


def _check_sizes(model: Classifier, weights: ImportedWeights, timm_kwargs: dict[str, object]) -> None:
    size = model.size
    for what, found, expected in (
        ("width", timm_kwargs["embed_dim"], size.width),
        ("depth", timm_kwargs["depth"], size.depth),
        ("number of heads", timm_kwargs["num_heads"], size.heads),
    ):
        if found != expected:
            raise CheckpointError(
                f"{weights.path}: the encoder's {what} is {found}, the model's is {expected}. Change model.size."
            )
    if timm_kwargs["patch_size"] != list(model.patch_embed.patch_size):
        patch = timm_kwargs["patch_size"]
        raise CheckpointError(f"{weights.path}: the patch size of the encoder is {patch}. Set model.patch_size={patch}.")


def build_initial_classifier(
    config: Config, classes: int, world: World, notes: list[str], *, resumed: bool
) -> tuple[Classifier, str]:
    """Build the initial classifier of a run on the CPU, with the same weights on every rank. All ranks call it.

    Args:
        config: The configuration. ``model.init_from`` names the encoder's weights. Without it they are random, a function of
            ``run.seed``.
        classes: Number of classes.
        world: The process group.
        notes: Messages for the log are appended.
        resumed: Whether a checkpoint will overwrite the model. Then the initial weights are not read.

    Returns:
        The classifier, and what it was initialized from, in words that are the same for every seed.

    Raises:
        UserError: The weights do not exist, do not match the model, or differ between ranks.
    """
    source = config.model.init_from
    if config.run.task == "linprobe" and source is None:
        notes.append("model.init_from is empty, so the probe classifies random features.")
    model = build_classifier_from_config(config, classes)
    initialized_from = "random weights"

    def load(weights: ImportedWeights) -> str:
        nonlocal initialized_from
        initialized_from = weights.provenance.summary()
        return load_initial_encoder(model, weights)

    if source and not resumed:
        notes.append(load_on_all_ranks(source, world, notes, load))
    try:
        if config.run.task == "linprobe":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed)
                model.add_probes(config.classify.lr_multipliers)
        elif config.classify.trainable_blocks is not None:
            model.freeze(config.classify.trainable_blocks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return model, initialized_from
