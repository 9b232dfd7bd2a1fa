"""Checkpoints become inference weights: written aside, verified against the checkpoint, and only then given their name."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae import history
from scale_mae.checkpoint.facts import FACTS_FILE, Pool, describe
from scale_mae.checkpoint.formats import FORMATS, SAFETENSORS, Source
from scale_mae.checkpoint.publish import publish
from scale_mae.checkpoint.store import FOLDER, Verification, begin, is_ours, locate, read_config, read_manifest, step_of
from scale_mae.checkpoint.tensor_file import Lazy
from scale_mae.checkpoint.zero_files import find_folder
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError
from scale_mae.engine import TAG
from scale_mae.model.positions import resize_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_GB = 5.0
RELEASE_EVERY = 1 << 25  # bytes of a checkpoint that are held mapped at most, but for one tensor
TABLES = ("pos_embed", "decoder_pos_embed")


def convert(
    checkpoint: str | Path,
    to: str,
    out: str | Path,
    *,
    dtype: str = "fp32",
    image_size: tuple[int, int] | None = None,
    pool: Pool = "token",
    max_shard_gb: float | None = None,
    warn: Callable[[str], None] = print,
    begun: Verification | None = None,
) -> Path:
    """Write a checkpoint as inference weights. They get their name after a forward pass equalled the checkpoint's.

    In 16 bits every tensor that can be read back is compared to the bit as well; for ``state_dict``, which may be of any model,
    that alone is done, and says more. A file of the same name is replaced; a folder too if it is an
    export and holds nothing else.

    Args:
        checkpoint: a run directory or a checkpoint; for ``state_dict`` also a folder that plain DeepSpeed code wrote.
        to: one of ``FORMATS``, see docs/weights.md.
        out: file or folder.
        dtype: of the weights: ``fp32``, ``bf16`` or ``fp16``. ``state_dict`` leaves buffers as they are.
        image_size: (height, width) to interpolate the position tables to.
        pool: how an encoder makes one vector of an image: ``token`` or ``avg``.
        max_shard_gb: largest file in a folder of ``state_dict`` (default: 5).
        warn: told of damaged checkpoints that were passed over, and of what a stranger's left out.
        begun: what :func:`scale_mae.checkpoint.store.begin` gave for ``checkpoint``, while torch was being imported.

    Returns:
        ``out``.

    Raises:
        UserError: no usable checkpoint, a format that cannot express it, ``out`` not writable, or outputs that differ.
    """
    out = Path(out)
    folder = _check_request(to, out, dtype, pool, max_shard_gb)
    path, export = Path(checkpoint), partial(_export, to=to, folder=folder, out=out, max_bytes=(max_shard_gb or SHARD_GB) * 1e9)
    if path.is_dir() and not is_ours(path):
        export(_open_foreign(path, to, dtype, image_size, warn), sound=lambda: None)
        return out
    if FORMATS[to].outputs:
        threading.Thread(target=import_module, args=("scale_mae.checkpoint.parity",), daemon=True).start()  # seconds
    begun = begun or begin(path)  # checksums are taken meanwhile; mostly they are right
    found, notes = begun.checkpoint, begun.notes
    try:
        export(_open(found, to, dtype, image_size, pool), sound=begun.result)
    except UserError:
        if not begun.failed():
            raise
        notes = []
        found = locate(path, notes.append)  # another one, or the error that names what is damaged
        export(_open(found, to, dtype, image_size, pool), sound=lambda: None)
    for note in notes:
        warn(note)
    _tell_history(found.resolve(), to, out, warn)
    return out


def _tell_history(checkpoint: Path, to: str, out: Path, warn: Callable[[str], None]) -> None:
    """An export of a checkpoint that lies in a run directory belongs to what happened to the run."""
    if checkpoint.parent.name == FOLDER:
        run = checkpoint.parent.parent
        try:
            history.append(run, "export", format=to, path=str(out.resolve()), step=step_of(checkpoint))
        except OSError as error:
            warn(f"{run / history.FILE}: the export is not told there ({error.strerror})")


def _export(source: Source, sound: Callable[[], object], *, to: str, folder: bool, out: Path, max_bytes: float) -> None:
    """Write and compare; ``sound`` raises a CheckpointError if the checkpoint is not."""
    source, layout = replace(source, max_bytes=max_bytes), FORMATS[to]
    values = (source.exported if layout.whole else source.encoder).values()

    def write(target: Path) -> None:
        if not folder:
            return layout.write(source, target)
        target.mkdir()
        layout.write(source, target)
        names = sorted([FACTS_FILE, *(p.name for p in target.iterdir())])
        (target / FACTS_FILE).write_text(json.dumps(source.facts | {"files": names}, indent=1) + "\n")

    def check(target: Path) -> None:
        _verify(source, to, target, out)
        sound()

    publish(out, layout.copies * sum(t.nbytes for t in values), write, check)


def _check_request(to: str, out: Path, dtype: str, pool: Pool, max_shard_gb: float | None) -> bool:
    """Refuse what cannot be meant; whether ``out`` is to be a folder."""
    if to not in FORMATS:
        raise UserError(f"--to {to}: unknown format; there are {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if pool == "avg" and (FORMATS[to].whole or to == "vit"):
        raise UserError(f"--pool avg: --to {to} pools nothing; it is for timm, onnx and torch_export")
    suffix = FORMATS[to].suffix
    folder = FORMATS[to].folder and (suffix is None or out.suffix != suffix)
    if not folder and out.suffix != suffix:
        raise UserError(f"--out {out}: the name of a file for --to {to} ends in {suffix}")
    if folder and out.suffix == SAFETENSORS:
        raise UserError(f"--out {out}: --to {to} writes a folder")
    if max_shard_gb is not None and (to != "state_dict" or not folder):
        raise UserError("--max-shard-gb: only for --to state_dict with a folder as --out")
    if max_shard_gb is not None and not 0 < max_shard_gb < math.inf:
        raise UserError(f"--max-shard-gb {max_shard_gb}: not a size")
    if folder and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: --to {to} writes a folder, and a file is there")
    if not folder and out.is_dir():
        raise UserError(f"--out {out}: --to {to} writes a file, and a folder is there")
    if folder and out.is_dir() and not _replaceable(out):
        raise UserError(f"--out {out}: this folder holds something else than an earlier export; choose another name")
    return folder


def _replaceable(folder: Path) -> bool:
    """Empty, or an export of ours that nobody put anything into."""
    names = {path.name for path in folder.iterdir()}
    try:
        return not names or names <= set(json.loads((folder / FACTS_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(checkpoint: Path, to: str, dtype: str, image_size: tuple[int, int] | None, pool: Pool) -> Source:
    config = read_config(checkpoint)
    facts = describe(config, read_manifest(checkpoint).step, image_size, pool) | {"format": to, "dtype": dtype}
    reader = ZeroReader(checkpoint / TAG)
    weights = _lazily(reader)
    if image_size and image_size != config.model.image_size:
        config, weights = _resized(config, weights, image_size)
    return Source(weights, dtype, facts, config, _rounded(weights, reader, to, dtype))


def _open_foreign(path: Path, to: str, dtype: str, image_size: tuple[int, int] | None, warn: Callable[[str], None]) -> Source:
    reader = ZeroReader(find_folder(path))
    if to != "state_dict" or image_size:
        what = f"--to {to}" if to != "state_dict" else "--image-size"
        raise UserError(f"{path}: not a checkpoint of scale-mae; {what} needs to know the model (use --to state_dict)")
    if reader.without_frozen:
        warn(f"{path}: saved with exclude_frozen_parameters; its frozen parameters, if it has any, are not in it")
    weights = _lazily(reader)
    facts = {"format": to, "dtype": dtype, "step": reader.step, "zero_stage": reader.stage, "world_size": reader.world_size}
    return Source(weights, dtype, facts, None, _rounded(weights, reader, to, dtype))


def _lazily(reader: ZeroReader) -> dict[str, Lazy]:
    """A checkpoint's tensors; now and then the pages read for earlier ones are given back."""
    mapped = 0

    def stretches(name: str) -> Iterator[Tensor]:
        nonlocal mapped
        if mapped >= RELEASE_EVERY:
            reader.release()
            mapped = 0
        for part in reader.stretches(name):
            mapped += part.nbytes
            yield part

    return {name: Lazy(reader.shape(name), reader.dtype(name), partial(stretches, name)) for name in reader}


def _resized(config: Config, weights: dict[str, Lazy], image_size: tuple[int, int]) -> tuple[Config, dict[str, Lazy]]:
    model = config.model
    if any(side < 1 or side % p for side, p in zip(image_size, model.patch, strict=True)):
        raise UserError(f"--image-size {image_size[0]}x{image_size[1]}: not divisible by patches of {list(model.patch)} pixels")
    old, new = ((height // model.patch[0], width // model.patch[1]) for height, width in (model.image_size, image_size))

    def resized(table: Lazy) -> Lazy:
        shape = (1, 1 + math.prod(new), table.shape[2])
        return replace(table, shape=shape, stretches=lambda: [resize_table(table.read(), old, new).reshape(-1)])

    tables = {name: resized(weights[name]) for name in TABLES}
    return config.model_copy(update={"model": model.model_copy(update={"image_size": image_size})}), weights | tables


def _rounded(weights: Mapping[str, Lazy], reader: ZeroReader, to: str, dtype: str) -> dict[str, Lazy]:
    trained = set(reader.parameters)
    return {n: t.to(DTYPES[dtype]) if to != "state_dict" or n in trained else t for n, t in weights.items()}


class _Read(Mapping[str, Tensor]):
    """Lazy tensors as a plain mapping."""

    def __init__(self, tensors: Mapping[str, Lazy]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _verify(source: Source, to: str, target: Path, out: Path) -> None:
    """Raise a UserError unless what was written is, and computes, what the checkpoint does."""
    layout = FORMATS[to]
    # the rounding of 16 bits hides a wrong weight from the forward pass; in fp32 it shows, and reading all again costs time
    if layout.tensors and (layout.outputs is None or source.dtype != "fp32"):
        _compare_bits(*layout.tensors(source, target), out)
    if layout.outputs is None:
        return
    assert source.config
    from scale_mae.checkpoint.parity import Probe, empty_mae, encoder_outputs, mae_outputs, require_equal, streamed

    model, probe = empty_mae(source.config), Probe.of(source.config, layout.images)
    with streamed(model, _Read(source.weights)):
        pool = source.facts["timm_kwargs"]["global_pool"]
        expected = mae_outputs(model, probe) if layout.whole else encoder_outputs(model, probe, pool)
    require_equal(expected, layout.outputs(source, target, probe), source.dtype, out)


def _compare_bits(expected: Mapping[str, Lazy], written: Mapping[str, Tensor], out: Path) -> None:
    if set(written) != set(expected):
        raise UserError(f"{out}: not written; it would lack {sorted(set(expected) ^ set(written))[:3]}")
    for name, tensor in expected.items():
        got = written[name]
        if (tuple(got.shape), got.dtype) != (tensor.shape, tensor.dtype) or not _same_bits(tensor, got):
            raise UserError(f"{out}: not written; {name} reads back otherwise than it is in the checkpoint")


def _same_bits(tensor: Lazy, got: Tensor) -> bool:
    got, start = got.reshape(-1).view(torch.uint8) if got.numel() else got.reshape(-1), 0
    for part in tensor.stretches():
        stop = start + part.nbytes
        if not torch.equal(part.contiguous().view(torch.uint8), got[start:stop]):
            return False
        start = stop
    return True
