"""Checkpoints become inference weights: written aside, verified against the checkpoint, and only then given their name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import LazyTensor
from scale_mae.checkpoint.store import FOLDER, Verification, begin, is_ours, locate, step_of
from scale_mae.config import UserError
from scale_mae.runs import history
from scale_mae.weights.export_formats import FORMATS, SAFETENSORS
from scale_mae.weights.export_source import DTYPES, ExportRequest, Source, open_foreign, open_ours
from scale_mae.weights.metadata import FACTS_FILE, Pool
from scale_mae.weights.publish import publish

SHARD_GB = 5.0


def convert(
    checkpoint: str | Path,
    to: str,
    out: str | Path,
    *,
    dtype: str = "fp32",
    image_size: tuple[int, int] | None = None,
    pool: Pool | None = None,
    ema: bool = False,
    probe: int | None = None,
    max_shard_gb: float | None = None,
    warn: Callable[[str], None] = print,
    begun: Verification | None = None,
) -> Path:
    """Write a checkpoint as inference weights. They get their name after a forward pass equalled the checkpoint's.

    In 16 bits, and of classifiers, every tensor that can be read back is compared to the bit as well; for ``state_dict``, which
    may be of any model, that alone is done, and says more. A file of the same name is replaced; a folder too if it is an export
    and holds nothing else.

    Args:
        checkpoint: a run directory or a checkpoint; for ``state_dict`` also a folder that plain DeepSpeed code wrote.
        to: one of ``FORMATS``, see docs/guides/converting.md.
        out: file or folder.
        dtype: of the weights: ``fp32``, ``bf16`` or ``fp16``. ``state_dict`` leaves buffers as they are.
        image_size: (height, width) to interpolate the position tables to.
        pool: how an encoder makes one vector of an image: ``token`` (default) or ``avg``; a classifier does as it was trained.
        ema: the moving average of the weights in place of the weights.
        probe: of a linear probe's sweep, counted from 0 (default: the best).
        max_shard_gb: largest file in a folder of ``state_dict`` (default: 5).
        warn: told of damaged checkpoints that were passed over, and of what a stranger's left out.
        begun: what :func:`scale_mae.checkpoint.store.begin` gave for ``checkpoint``, while torch was being imported.

    Returns:
        ``out``.

    Raises:
        UserError: no usable checkpoint, a format that cannot express it, ``out`` not writable, or outputs that differ.
    """
    out = Path(out)
    path, wish = Path(checkpoint), ExportRequest(to, dtype, image_size, pool, ema, probe)
    folder = _check_request(wish, out, max_shard_gb)
    export = partial(_export, to=to, folder=folder, out=out, max_bytes=(max_shard_gb or SHARD_GB) * 1e9)
    if path.is_dir() and not is_ours(path):
        export(open_foreign(path, wish, warn), sound=lambda: None)
        return out
    begun = begun or begin(path)
    with ThreadPoolExecutor(1, "import") as ahead:  # waited for after an error too: no import may go on while Python ends
        if FORMATS[to].outputs:
            ahead.submit(import_module, "scale_mae.weights.parity")  # seconds
        found = _export_sound(path, wish, export, begun, warn)
    _tell_history(found.resolve(), to, out, warn)
    return out


def _export_sound(
    path: Path, wish: ExportRequest, export: Callable[..., None], begun: Verification, warn: Callable[[str], None]
) -> Path:
    """Export the checkpoint whose checksums are being taken, mostly they are right; if not, the one before. Returns which."""
    found, notes = begun.checkpoint, begun.notes
    try:
        export(open_ours(found, wish), sound=begun.result)
    except UserError:
        if not begun.failed():
            raise
        notes = []
        found = locate(path, notes.append)  # another one, or the error that names what is damaged
        export(open_ours(found, wish), sound=lambda: None)
    for note in notes:
        warn(note)
    return found


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


def _check_request(wish: ExportRequest, out: Path, max_shard_gb: float | None) -> bool:
    """Refuse what cannot be meant; whether ``out`` is to be a folder."""
    to, dtype = wish.to, wish.dtype
    if to not in FORMATS:
        raise UserError(f"--to {to}: unknown format; there are {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if wish.pool == "avg" and (FORMATS[to].whole or to == "vit"):
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


def _verify(source: Source, to: str, target: Path, out: Path) -> None:
    """Raise a UserError unless what was written is, and computes, what the checkpoint does."""
    layout = FORMATS[to]
    # The rounding of 16 bits hides a wrong weight from the forward pass, and so do the few logits of a classifier. In an
    # encoder's tokens in fp32 it shows, and reading all again costs time.
    if layout.tensors and (layout.outputs is None or source.dtype != "fp32" or source.head):
        _compare_bits(*layout.tensors(source, target), out)
    if layout.outputs is None:
        return
    assert source.config
    from scale_mae.weights.parity import Probe, require_equal, source_outputs

    probe = Probe.of(source.config, layout.images)
    expected = source_outputs(source, probe, whole=layout.whole)
    require_equal(expected, layout.outputs(source, target, probe), source.dtype, out)


def _compare_bits(expected: Mapping[str, LazyTensor], written: Mapping[str, Tensor], out: Path) -> None:
    if set(written) != set(expected):
        raise UserError(f"{out}: not written; it would lack {sorted(set(expected) ^ set(written))[:3]}")
    for name, tensor in expected.items():
        got = written[name]
        if (tuple(got.shape), got.dtype) != (tensor.shape, tensor.dtype) or not _same_bits(tensor, got):
            raise UserError(f"{out}: not written; {name} reads back otherwise than it is in the checkpoint")


def _same_bits(tensor: LazyTensor, got: Tensor) -> bool:
    got, start = got.reshape(-1).view(torch.uint8) if got.numel() else got.reshape(-1), 0
    for part in tensor.stretches():
        stop = start + part.nbytes
        if not torch.equal(part.contiguous().view(torch.uint8), got[start:stop]):
            return False
        start = stop
    return True
