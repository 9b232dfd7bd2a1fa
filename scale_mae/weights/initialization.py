"""Initializes a MAE from weights of any supported source. All tensors must match, or an error is raised.

Three deviations are allowed, and each one is logged: a classification head is skipped, a decoder that is absent as a whole
stays random, and position embeddings are interpolated for another image size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.config import Config, UserError
from scale_mae.distributed.process_group import World
from scale_mae.model.mae import MAE, POS_EMBED_NAMES
from scale_mae.model.sizes import LAYER_NORM_EPS
from scale_mae.weights.atomic_write import write_atomically
from scale_mae.weights.encoder_import import is_mean_pooled
from scale_mae.weights.export_formats import SAFETENSORS
from scale_mae.weights.key_matching import check_attention_heads, check_keys, first_of, read_matching
from scale_mae.weights.metadata import METADATA_KEY, build_metadata
from scale_mae.weights.model_builder import build_mae_from_config
from scale_mae.weights.pos_embed_matching import fit_pos_embed, infer_grid
from scale_mae.weights.safetensors_io import TensorFiles, write_tensors
from scale_mae.weights.weight_import import ImportedWeights, is_decoder_key, locate_weights, read_weights


def load_initial_weights(model: MAE, weights: ImportedWeights) -> str:
    """Load imported weights into a new model.

    Returns:
        A description of the weights and of all deviations, in one line.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape or not finite. Do not use the model then, because
            some of its tensors may be overwritten.
    """
    has_decoder, provenance = weights.has_decoder, weights.provenance
    state = {key: t for key, t in model.state_dict().items() if has_decoder or not is_decoder_key(key)}
    # check_keys refuses third-party classifiers with mean pooling, because their norm is missing
    is_own_mean_pooled = is_mean_pooled(weights) and "task" in (provenance.metadata or {})
    if is_own_mean_pooled:
        state = {key: t for key, t in state.items() if not key.startswith("norm.")}
    check_keys(state, weights)
    encoder_block, decoder_block = cast(Block, model.blocks[0]), cast(Block, model.decoder_blocks[0])
    check_attention_heads(weights, encoder_block.attn.num_heads, decoder_block.attn.num_heads)
    notes = [f"Skipped {first_of(weights.skipped)}."] if weights.skipped else []
    if is_own_mean_pooled:
        notes.append(
            "The final norm keeps its initial values, because the norm of the classifier follows the pooling (fc_norm)."
        )
    if not has_decoder:
        notes.append("The decoder starts with random weights, because the source has no decoder.")
    if provenance.layer_norm_eps != LAYER_NORM_EPS:
        notes.append(f"Changed the norm epsilon from {provenance.layer_norm_eps:g} to {LAYER_NORM_EPS:g}.")
    for key, tensor in state.items():
        if key not in POS_EMBED_NAMES:
            tensor.copy_(read_matching(weights, key, tensor))
    source_grid = infer_grid(weights, model.grid)
    for key in state.keys() & set(POS_EMBED_NAMES):
        pos_embed, pos_embed_notes = fit_pos_embed(weights, key, state[key], source_grid=source_grid, model_grid=model.grid)
        state[key].copy_(pos_embed)
        notes += pos_embed_notes
    about = [provenance.kind, *([] if provenance.step is None else [f"step {provenance.step}"])]
    if digest := weights.digest():
        about.append(f"SHA-256 {digest[:16]}")
    return " ".join([f"Initialized from {weights.path} ({', '.join(about)}).", *notes])


def build_initial_model(config: Config, world: World, notes: list[str], *, resumed: bool) -> MAE:
    """Build the initial model of a run on the CPU, with the same weights on every rank. All ranks call it.

    Args:
        config: The configuration. ``model.init_from`` names the initial weights. Without it they are random, a function of
            ``run.seed``.
        world: The process group.
        notes: Messages for the log are appended.
        resumed: Whether a checkpoint will overwrite the model. Then the initial weights are not read.

    Raises:
        UserError: The weights do not exist, do not match the model, or differ between ranks.
    """
    model = build_mae_from_config(config)
    source = config.model.init_from
    if source and not resumed:
        notes.append(load_on_all_ranks(source, world, notes, lambda weights: load_initial_weights(model, weights)))
    return model


def load_on_all_ranks(source: str, world: World, notes: list[str], load: Callable[[ImportedWeights], str]) -> str:
    """Import weights on every rank, pass them to ``load``, and return its message.

    Args:
        source: The path of the weights.
        world: The process group.
        notes: Messages about damaged checkpoints are appended.
        load: Fills a model and returns one line about it. All ranks must return the same line.

    Raises:
        UserError: The weights do not exist, do not match the model, or differ between ranks.
    """
    path = world.run_on_main(lambda: locate_weights(source, notes.append))
    message = world.run_on_all(lambda: load(read_weights(path)))
    if len(set(world.all_gather(message))) > 1:
        raise UserError(f"model.init_from={source}: the weights differ between ranks. Use a path on a shared file system.")
    return message


def load_initial_model(config: Config, warn: Callable[[str], None]) -> tuple[MAE, str]:
    """Build the initial model of a run on the CPU in a single process.

    Returns:
        The model, and a description of its initial weights in one line. The line is empty if they are random.

    Raises:
        UserError: The weights of ``model.init_from`` do not exist or do not match the model.
    """
    model, source = build_mae_from_config(config), config.model.init_from
    return model, load_initial_weights(model, read_weights(locate_weights(source, warn))) if source else ""


def write_initial_weights(config: Config, out: str | Path, warn: Callable[[str], None]) -> str:
    """Write the initial weights of a pre-training run, with scale_mae's keys and metadata.

    Args:
        config: The configuration, with ``model.init_from``.
        out: The file. Its name ends in ``.safetensors``.
        warn: Receives one message for each damaged checkpoint that was skipped.

    Returns:
        A description of the weights in one line.

    Raises:
        UserError: The weights do not match the model, or ``out`` cannot be written.
    """
    out = Path(out)
    if out.suffix != SAFETENSORS or out.is_dir():
        raise UserError(f"--out {out}: the file name must end in {SAFETENSORS}.")
    if config.run.task != "pretrain":
        raise UserError(f"run.task={config.run.task}: init writes the weights of a MAE only. Give a pre-training recipe.")
    model, message = load_initial_model(config, warn)
    state = model.state_dict()
    metadata = build_metadata(config, 0) | {"format": "state_dict", "dtype": "fp32", "initialized_from": message}
    lazy_tensors = {key: LazyTensor(tuple(t.shape), t.dtype, partial(_flatten, t)) for key, t in state.items()}

    def write(target: Path) -> None:
        write_tensors(target, lazy_tensors, {METADATA_KEY: json.dumps(metadata)})

    def check(target: Path) -> None:
        written = TensorFiles(target)
        if not all(torch.equal(written[key], t) for key, t in state.items()):
            raise UserError(f"{out}: not written; a tensor differs when it is read back.")

    write_atomically(out, sum(tensor.nbytes for tensor in lazy_tensors.values()), write, check)
    return message


def _flatten(tensor: Tensor) -> list[Tensor]:
    return [tensor.detach().reshape(-1)]
