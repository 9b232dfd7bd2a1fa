"""The classifier that a run begins with: an encoder from anywhere as fine-tuning and probes take it, or a random one."""

from __future__ import annotations

import re

import torch

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.config import Config, ConfigError
from scale_mae.distributed.process_group import World
from scale_mae.model.classifier import Classifier, build_classifier
from scale_mae.model.pos_embed import resize_pos_embed
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES
from scale_mae.weights.importing import Weights
from scale_mae.weights.initialization import begin_everywhere, encoder_of


def classifier_from_config(config: Config, classes: int) -> Classifier:
    """The classifier of a run, freshly initialised from its seed; nothing is frozen yet."""
    m, c = config.model, config.classify
    return build_classifier(
        SIZES[m.size],
        seed=config.run.seed,
        scratch=m.init_from is None,
        image_size=m.image_size,
        patch_size=m.patch,
        classes=classes,
        pool=c.pool,
        drop_path=c.drop_path,
    )


@torch.no_grad()
def begin_with_encoder(model: Classifier, weights: Weights) -> str:
    """Give a new classifier the encoder of some weights; what was done, in one line.

    The position table is interpolated bicubically to another grid of patches. The norm behind average pooling begins anew, as
    in the reference, unless the weights were fine-tuned with one.

    Raises:
        CheckpointError: no plain ViT, or one of another shape.
    """
    facts, tensors = encoder_of(weights)
    given, wanted = facts["timm_kwargs"], model.size
    told = {"width": given["embed_dim"], "depth": given["depth"], "attention heads": given["num_heads"]}
    for what, ours in {"width": wanted.width, "depth": wanted.depth, "attention heads": wanted.heads}.items():
        if told[what] != ours:
            raise CheckpointError(
                f"{weights.path}: an encoder of {what} {told[what]}, the model's is {ours}: change model.size"
            )
    patch = model.patch_embed.patch_size
    if tuple(given["patch_size"]) != patch:
        raise CheckpointError(f"{weights.path}: patches of {given['patch_size']}: set model.patch_size={given['patch_size']}")
    old, new = ((height // patch[0], width // patch[1]) for height, width in (facts["image_size"], model.patch_embed.img_size))
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], old, new)
    notes = [f"pos_embed interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"] if old != new else []
    if facts["layer_norm_eps"] != LAYER_NORM_EPS:
        notes.append(f"its norms' epsilon is {facts['layer_norm_eps']:g}, here {LAYER_NORM_EPS:g}")
    if model.global_pool == "token":
        tensors = {re.sub(r"^fc_norm\.", "norm.", name): t for name, t in tensors.items()}
    else:  # norm is what came before pooling; fc_norm is there if the weights have been behind pooling already
        tensors = {name: t for name, t in tensors.items() if not name.startswith("norm.")}
        if "fc_norm.weight" not in tensors:
            notes.append("fc_norm begins anew")
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    digest = weights.digest()
    about = f"{origin_of(weights)}, SHA-256 {digest[:16]}" if digest else origin_of(weights)
    return "; ".join([f"began with the encoder of {weights.path} ({about})", *notes])


def origin_of(weights: Weights) -> str:
    """What weights are, whatever their seed: their kind, and where known how long and as what they were trained."""
    origin = weights.origin
    told = [origin.kind, *([] if origin.step is None else [f"step {origin.step}"])]
    return ", ".join([*told, *([f"trained as {origin.training}"] if origin.training else [])])


def build_initial_classifier(
    config: Config, classes: int, world: World, notes: list[str], *, resumed: bool
) -> tuple[Classifier, str]:
    """The classifier that a run begins with, on the host, the same on every process. All call it.

    Args:
        config: ``model.init_from`` names the encoder's weights; without it they are random, a function of ``run.seed``.
        classes: to tell apart.
        world: the processes.
        notes: what to tell of it is appended.
        resumed: a checkpoint is going to fill the model, so the weights of the beginning are not looked at.

    Returns:
        The classifier, and what it begins with in words, the same for every seed.

    Raises:
        UserError: the weights are not there, do not fit, or are not the same for all processes.
    """
    source = config.model.init_from
    if config.run.task == "linprobe" and source is None:
        notes.append("model.init_from is empty: the probe is of random features")
    model = classifier_from_config(config, classes)
    began = ["random weights"]

    def begin(weights: Weights) -> str:
        began[0] = origin_of(weights)
        return begin_with_encoder(model, weights)

    if source and not resumed:
        notes.append(begin_everywhere(source, world, notes, begin))
    try:
        if config.run.task == "linprobe":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed)
                model.probe(config.classify.lr_multipliers)
        elif config.classify.trainable_blocks is not None:
            model.freeze(config.classify.trainable_blocks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return model, began[0]
