"""Inspects runs, checkpoints, exports and third-party weights: what a path contains, and whether it is damaged.

Checksums are compared where they exist: SHA-256 in checkpoints of scale_mae, CRC-32 in zip archives (``.pth``, ``.pt2``). For
other files, the sizes in the header are compared with the size of the file.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.deepspeed_files import find_deepspeed_folder, is_deepspeed_folder
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.manifest import read_config, read_manifest
from scale_mae.checkpoint.paths import CHECKPOINTS_FOLDER, DAMAGED_PREFIX, DEEPSPEED_TAG, is_run_or_checkpoint, list_checkpoints
from scale_mae.checkpoint.verification import verify
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError, saved_config
from scale_mae.weights.classifier_heads import read_head
from scale_mae.weights.file_inspection import PROBLEM, Report, count_bytes, count_tensors, format_size, inspect_weight_files
from scale_mae.weights.metadata import is_classifier


def inspect(path: str | Path) -> Report:
    """Inspect a path.

    Args:
        path: A run directory, a checkpoint, a DeepSpeed folder, an export, or a file or folder of weights.

    Returns:
        A report with values that JSON supports, in the order in which to show them. ``problem`` describes the damage, or is
        ``None``.

    Raises:
        CheckpointError: The kind of ``path`` is unknown, or it is too damaged for a report.
    """
    path = Path(path)
    try:
        if (path / CHECKPOINTS_FOLDER).is_dir():
            return _inspect_run(path)
        if is_run_or_checkpoint(path):
            return _inspect_checkpoint(path)
        if is_deepspeed_folder(path):
            return _inspect_deepspeed(path)
        return inspect_weight_files(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything, in libraries too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: cannot be read ({reason[:200]}).") from None


def _inspect_run(run_dir: Path) -> Report:
    config = saved_config(run_dir / "config.yaml")
    rows = [_checkpoint_row(checkpoint) for checkpoint in list_checkpoints(run_dir)]
    valid = [row["name"] for row in rows if not row[PROBLEM]]
    problems = [row[PROBLEM] for row in rows if row[PROBLEM]]
    renamed = sorted(p.name for p in (run_dir / CHECKPOINTS_FOLDER).glob(f"{DAMAGED_PREFIX}*"))
    problem = f"{run_dir}: damaged checkpoints: {len(problems)} of {len(rows)}. {problems[-1]}" if problems else None
    if renamed and not rows:
        problem = f"{run_dir}: no intact checkpoint. Damaged: {', '.join(renamed)}."
    return {
        "kind": "run directory",
        "path": str(run_dir),
        **(_model_report(config) if config else {}),
        "checkpoints": rows,
        "resumes from": valid[-1] if valid else None,
        "renamed as damaged": renamed,
        PROBLEM: problem,
    }


def _checkpoint_row(checkpoint: Path) -> Report:
    """Return a short report of one checkpoint of a run."""
    step, problem = None, None
    try:
        step = read_manifest(checkpoint).step
        verify(checkpoint)
    except CheckpointError as error:
        problem = str(error)
    return {
        "name": checkpoint.name,
        "step": step,
        "saved": _time_saved(checkpoint),
        "bytes": count_bytes([checkpoint]),
        PROBLEM: problem,
    }


def _time_saved(path: Path) -> str:
    """Return the local time at which the newest file of a folder was written."""
    newest = max((p.stat().st_mtime for p in [path, *path.rglob("*")] if p.is_file()), default=path.stat().st_mtime)
    return datetime.datetime.fromtimestamp(newest).isoformat(sep=" ", timespec="seconds")


def _model_report(config: Config) -> Report:
    m = config.model
    report: Report = {"model": f"{m.size}, {format_size(m.image_size)} pixels, patches of {format_size(m.patch)}"}
    if is_classifier(config):
        pool = "mean of the patch tokens" if config.classify.pool == "mean" else "class token"
        report |= {"task": config.run.task, "pooling": pool}
    return report | {"precision": config.train.precision}


def _head_report(config: Config, reader: ZeroReader) -> Report:
    if not is_classifier(config):
        return {}
    head = read_head(config, reader)
    first_names = ", ".join(head.classes[:3]) + (", ..." if len(head.classes) > 3 else "")
    return {"classes": f"{len(head.classes)} ({first_names})", "best probe": head.probe}


def _tensor_report(reader: ZeroReader) -> Report:
    return count_tensors({key: torch.empty(reader.shape(key), dtype=reader.dtype(key), device="meta") for key in reader})


def _inspect_checkpoint(checkpoint: Path) -> Report:
    manifest = read_manifest(checkpoint)
    report: Report = {
        "kind": "scale-mae checkpoint",
        "path": str(checkpoint),
        "step": manifest.step,
        "saved": _time_saved(checkpoint),
        "ZeRO stage": manifest.zero_stage,
        "processes": manifest.world_size,
    }
    try:
        verify(checkpoint)
        config, reader = read_config(checkpoint), ZeroReader(checkpoint / DEEPSPEED_TAG)
        head_report = _head_report(config, reader)
    except CheckpointError as error:
        return report | {"bytes": count_bytes([checkpoint]), "versions": manifest.versions, PROBLEM: str(error)}
    groups = [
        {
            "weight decay": group["weight_decay"],
            **({"learning rate x": group["lr_scale"]} if group.get("lr_scale", 1.0) != 1 else {}),
            "tensors": len(keys),
            "parameters": sum(torch.Size(reader.shape(key)).numel() for key in keys),
        }
        for keys, group in zip(reader.state["parameter_groups"], reader.groups, strict=True)
    ]
    return report | {
        **_model_report(config),
        **head_report,
        "config digest": manifest.config_digest,
        **_tensor_report(reader),
        "groups": groups,
        "bytes": count_bytes([checkpoint]),
        "versions": manifest.versions,
        "verified": "SHA-256 of every file",
        PROBLEM: None,
    }


def _inspect_deepspeed(path: Path) -> Report:
    folder = find_deepspeed_folder(path)
    reader = ZeroReader(folder)
    return {
        "kind": "DeepSpeed checkpoint",
        "path": str(folder),
        "step": reader.step,
        "saved": _time_saved(folder),
        "ZeRO stage": reader.stage,
        "processes": reader.world_size,
        **_tensor_report(reader),
        "trained tensors": len(reader.parameters),
        "bytes": count_bytes([folder]),
        "verified": "complete and from one save; the format has no checksums",
        PROBLEM: None,
    }


def render(report: Report) -> str:
    """Return a report as text."""
    width = max(map(len, report)) + 2
    lines = []
    for key, value in report.items():
        if value in (None, [], {}) or key == PROBLEM:
            continue
        rows = value if isinstance(value, list) and isinstance(value[0], dict) else [value]
        lines += [(key if i == 0 else "").ljust(width) + _render_value(key, row) for i, row in enumerate(rows)]
    return "\n".join(lines)


def _render_value(key: str, value: Any) -> str:
    if isinstance(value, dict) and "saved" in value:
        size = f"{value['bytes'] / 1e6:,.1f} MB"
        return f"{value['name']}  {value['saved']}  {size:>12}  {'damaged' if value[PROBLEM] else 'verified'}"
    if isinstance(value, dict):  # "33 tensors", but "weight decay 0.05" and "torch 2.11.0"
        return ", ".join(f"{v:,} {k}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return (" x " if key in ("image size", "patch size") else ", ").join(map(str, value))
    if key == "bytes":
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    return f"{value:,}" if key == "parameters" else str(value)
