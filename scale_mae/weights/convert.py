"""Converts a checkpoint to inference weights: write them to a hidden folder, verify them, move them into place."""

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

from scale_mae.checkpoint.discovery import locate_checkpoint, start_verification
from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.checkpoint.paths import CHECKPOINTS_FOLDER, get_step, is_run_or_checkpoint
from scale_mae.checkpoint.verification import Verification
from scale_mae.config import UserError
from scale_mae.runs import history
from scale_mae.weights.atomic_write import write_atomically
from scale_mae.weights.export_formats import FORMATS, SAFETENSORS
from scale_mae.weights.export_source import DTYPES, ExportRequest, ExportSource, open_checkpoint, open_deepspeed_folder
from scale_mae.weights.metadata import METADATA_FILE, Pool

DEFAULT_SHARD_GB = 5.0


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
    verification: Verification | None = None,
) -> Path:
    """Convert a checkpoint to inference weights.

    The export is verified before it gets its name. A forward pass must compute the same as the checkpoint. For 16-bit dtypes
    and for classifiers, the tensors are read back and compared bit by bit as well. ``state_dict`` is verified bit by bit only.
    An existing file is replaced. An existing folder is replaced if it is an earlier export and contains no other files.

    Args:
        checkpoint: A run directory or a checkpoint. For ``state_dict`` also a folder that plain DeepSpeed code wrote.
        to: An export format, see ``FORMATS``.
        out: The file or folder to write.
        dtype: ``fp32``, ``bf16`` or ``fp16``. ``state_dict`` keeps the dtypes of buffers.
        image_size: (height, width) in pixels to interpolate the position embeddings to.
        pool: How an encoder pools its tokens: ``token`` (default) or ``avg``. A classifier pools as it was trained.
        ema: Whether to export the moving average of the weights.
        probe: Number of the linear probe, from 0 (default: the best).
        max_shard_gb: The largest file of a ``state_dict`` folder in GB (default: 5).
        warn: Receives messages about damaged checkpoints that were skipped, and about missing frozen parameters.
        verification: A running verification of ``checkpoint``, to save time. See
            :func:`scale_mae.checkpoint.discovery.start_verification`.

    Returns:
        ``out``.

    Raises:
        UserError: There is no valid checkpoint, the format does not support the request, ``out`` cannot be written, or the
            verification failed.
    """
    out = Path(out)
    path, request = Path(checkpoint), ExportRequest(to, dtype, image_size, pool, ema, probe)
    as_folder = _check_request(request, out, max_shard_gb)
    export = partial(_export, to=to, as_folder=as_folder, out=out, max_bytes=(max_shard_gb or DEFAULT_SHARD_GB) * 1e9)
    if path.is_dir() and not is_run_or_checkpoint(path):
        export(open_deepspeed_folder(path, request, warn), verify_checkpoint=lambda: None)
        return out
    verification = verification or start_verification(path)
    # Import timm, which takes seconds, while the checkpoint is read. The pool waits for the import after an error too, because
    # an import must not run while Python exits.
    with ThreadPoolExecutor(1, "import") as importer:
        if FORMATS[to].run:
            importer.submit(import_module, "scale_mae.weights.parity")
        exported = _export_valid_checkpoint(path, request, export, verification, warn)
    _record_export(exported.resolve(), to, out, warn)
    return out


def _export_valid_checkpoint(
    path: Path,
    request: ExportRequest,
    export: Callable[..., None],
    verification: Verification,
    warn: Callable[[str], None],
) -> Path:
    """Export the checkpoint while it is being verified. If it is damaged, export the one before. Return the exported one."""
    checkpoint, notes = verification.checkpoint, verification.messages
    try:
        export(open_checkpoint(checkpoint, request), verify_checkpoint=verification.result)
    except UserError:
        if not verification.failed():
            raise
        notes = []
        checkpoint = locate_checkpoint(path, notes.append)  # the one before, or an error that names the damaged file
        export(open_checkpoint(checkpoint, request), verify_checkpoint=lambda: None)
    for note in notes:
        warn(note)
    return checkpoint


def _record_export(checkpoint: Path, to: str, out: Path, warn: Callable[[str], None]) -> None:
    """Record the export in the history of the run, if the checkpoint is in a run directory."""
    if checkpoint.parent.name == CHECKPOINTS_FOLDER:
        run_dir = checkpoint.parent.parent
        try:
            history.append(run_dir, "export", format=to, path=str(out.resolve()), step=get_step(checkpoint))
        except OSError as error:
            warn(f"{run_dir / history.FILE}: the export was not recorded ({error.strerror})")


def _export(
    source: ExportSource,
    verify_checkpoint: Callable[[], object],
    *,
    to: str,
    as_folder: bool,
    out: Path,
    max_bytes: float,
) -> None:
    """Write and verify an export. ``verify_checkpoint`` raises a CheckpointError if the checkpoint is damaged."""
    source, export_format = replace(source, max_bytes=max_bytes), FORMATS[to]
    tensors = source.exported if export_format.has_decoder else source.encoder

    def write(target: Path) -> None:
        if not as_folder:
            return export_format.write(source, target)
        target.mkdir()
        export_format.write(source, target)
        names = sorted([METADATA_FILE, *(p.name for p in target.iterdir())])
        (target / METADATA_FILE).write_text(json.dumps(source.metadata | {"files": names}, indent=1) + "\n")

    def check(target: Path) -> None:
        _verify(source, to, target, out)
        verify_checkpoint()

    write_atomically(out, export_format.disk_copies * sum(t.nbytes for t in tensors.values()), write, check)


def _check_request(request: ExportRequest, out: Path, max_shard_gb: float | None) -> bool:
    """Check the options. Return whether ``out`` is a folder."""
    to, dtype = request.to, request.dtype
    if to not in FORMATS:
        raise UserError(f"--to {to}: unknown format. Use one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown dtype. Use one of {', '.join(DTYPES)}.")
    if request.pool == "avg" and (FORMATS[to].has_decoder or to == "vit"):
        raise UserError(f"--pool avg: --to {to} does not pool. Use it with timm, onnx or torch_export.")
    suffix = FORMATS[to].suffix
    as_folder = FORMATS[to].supports_folder and (suffix is None or out.suffix != suffix)
    if not as_folder and out.suffix != suffix:
        raise UserError(f"--out {out}: the file name for --to {to} must end in {suffix}.")
    if as_folder and out.suffix == SAFETENSORS:
        raise UserError(f"--out {out}: --to {to} writes a folder. Choose a name without {SAFETENSORS}.")
    if max_shard_gb is not None and (to != "state_dict" or not as_folder):
        raise UserError("--max-shard-gb: requires --to state_dict and a folder as --out.")
    if max_shard_gb is not None and not 0 < max_shard_gb < math.inf:
        raise UserError(f"--max-shard-gb {max_shard_gb}: must be positive and finite.")
    if as_folder and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: --to {to} writes a folder, but a file exists. Choose another name.")
    if not as_folder and out.is_dir():
        raise UserError(f"--out {out}: --to {to} writes a file, but a folder exists. Choose another name.")
    if as_folder and out.is_dir() and not _is_replaceable(out):
        raise UserError(f"--out {out}: this folder contains files that are not from an export. Choose another name.")
    return as_folder


def _is_replaceable(folder: Path) -> bool:
    """Return whether a folder is empty, or an export of scale_mae without other files."""
    names = {path.name for path in folder.iterdir()}
    try:
        return not names or names <= set(json.loads((folder / METADATA_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _verify(source: ExportSource, to: str, target: Path, out: Path) -> None:
    """Raise a UserError if the written tensors or what they compute differ from the checkpoint."""
    export_format = FORMATS[to]
    # A wrong weight can hide in the rounding of 16 bits, and in the few logits of a classifier, so compare the tensors too. In
    # the fp32 tokens of an encoder it always shows, so do not spend time on reading everything again.
    if export_format.read_back and (export_format.run is None or source.dtype != "fp32" or source.head):
        _compare_bits(*export_format.read_back(source, target), out)
    if export_format.run is None:
        return
    assert source.config
    from scale_mae.weights.parity import ParityBatch, check_parity, compute_checkpoint_outputs

    batch = ParityBatch.for_config(source.config, export_format.parity_images)
    expected = compute_checkpoint_outputs(source, batch, with_decoder=export_format.has_decoder)
    check_parity(expected, export_format.run(source, target, batch), source.dtype, out)


def _compare_bits(expected: Mapping[str, LazyTensor], written: Mapping[str, Tensor], out: Path) -> None:
    if set(written) != set(expected):
        raise UserError(f"{out}: not written; keys missing or unexpected: {sorted(set(expected) ^ set(written))[:3]}.")
    for key, tensor in expected.items():
        read = written[key]
        if (tuple(read.shape), read.dtype) != (tensor.shape, tensor.dtype) or not _is_same(tensor, read):
            raise UserError(f"{out}: not written; {key} differs from the checkpoint when it is read back.")


def _is_same(expected: LazyTensor, read: Tensor) -> bool:
    read, start = read.reshape(-1).view(torch.uint8) if read.numel() else read.reshape(-1), 0
    for part in expected.chunks():
        stop = start + part.nbytes
        if not torch.equal(part.contiguous().view(torch.uint8), read[start:stop]):
            return False
        start = stop
    return True
