"""What a path holds: a run, a checkpoint, an export, or weights of others; and whether it is sound.

Checksums are compared where there are any: SHA-256 in our checkpoints, CRC-32 in zip archives (``.pth``, ``.pt2``). Of all else
headers are read, whose sizes must agree with the files'.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.store import (
    DAMAGED,
    DEEPSPEED_TAG,
    FOLDER,
    CheckpointError,
    checkpoints,
    is_ours,
    read_config,
    read_manifest,
    verify,
)
from scale_mae.checkpoint.zero_files import find_folder
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, UserError, saved_config
from scale_mae.weights.classifier_heads import read_head
from scale_mae.weights.inspect_weights import PROBLEM, Report, by, bytes_in, counts, inspect_weights
from scale_mae.weights.metadata import is_classifier


def inspect(path: str | Path) -> Report:
    """What ``path`` is.

    Args:
        path: a run directory, a checkpoint, a DeepSpeed folder, an export, or a file or folder of weights.

    Returns:
        Plain values that JSON can hold, in the order to show them. ``problem`` says what is damaged, and is None if nothing is.

    Raises:
        CheckpointError: nothing that is known here, or too damaged to tell anything.
    """
    path = Path(path)
    try:
        if (path / FOLDER).is_dir():
            return _run(path)
        if is_ours(path):
            return _checkpoint(path)
        if path.is_dir() and (any(path.glob("*_model_states.pt")) or (path / "latest").is_file()):
            return _deepspeed(path)
        return inspect_weights(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail anywhere, in libraries of others too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: cannot be read ({reason[:200]})") from None


def _run(run_dir: Path) -> Report:
    config = saved_config(run_dir / "config.yaml")
    found = [_listed(checkpoint) for checkpoint in checkpoints(run_dir)]
    good = [checkpoint["name"] for checkpoint in found if not checkpoint[PROBLEM]]
    bad = [checkpoint[PROBLEM] for checkpoint in found if checkpoint[PROBLEM]]
    aside = sorted(p.name for p in (run_dir / FOLDER).glob(f"{DAMAGED}*"))
    problem = f"{run_dir}: {len(bad)} of {len(found)} checkpoints damaged; {bad[-1]}" if bad else None
    if aside and not found:
        problem = f"{run_dir}: all {len(aside)} checkpoints are damaged and set aside"
    return {
        "kind": "run directory",
        "path": str(run_dir),
        **(_model(config) if config else {}),
        "checkpoints": found,
        "resume takes": good[-1] if good else None,
        "set aside": aside,
        PROBLEM: problem,
    }


def _listed(checkpoint: Path) -> Report:
    """A line about one checkpoint of a run."""
    step, problem = None, None
    try:
        step = read_manifest(checkpoint).step
        verify(checkpoint)
    except CheckpointError as error:
        problem = str(error)
    return {
        "name": checkpoint.name,
        "step": step,
        "saved": _saved(checkpoint),
        "bytes": bytes_in([checkpoint]),
        PROBLEM: problem,
    }


def _saved(path: Path) -> str:
    """When it was written, local time: the newest file's."""
    newest = max((p.stat().st_mtime for p in [path, *path.rglob("*")] if p.is_file()), default=path.stat().st_mtime)
    return datetime.datetime.fromtimestamp(newest).isoformat(sep=" ", timespec="seconds")


def _model(config: Config) -> Report:
    m = config.model
    report: Report = {"model": f"{m.size}, {by(m.image_size)} pixels, patches of {by(m.patch)}"}
    if is_classifier(config):
        pool = "mean of the patch tokens" if config.classify.pool == "mean" else "class token"
        report |= {"task": config.run.task, "pooling": pool}
    return report | {"precision": config.train.precision}


def _head(config: Config, reader: ZeroReader) -> Report:
    """What a classifier tells apart."""
    if not is_classifier(config):
        return {}
    head = read_head(config, reader)
    some = ", ".join(head.classes[:3]) + (", ..." if len(head.classes) > 3 else "")
    return {"classes": f"{len(head.classes)} ({some})", "best probe": head.probe}


def _checkpoint(checkpoint: Path) -> Report:
    manifest = read_manifest(checkpoint)
    report: Report = {
        "kind": "checkpoint of scale-mae",
        "path": str(checkpoint),
        "step": manifest.step,
        "saved": _saved(checkpoint),
        "ZeRO stage": manifest.zero_stage,
        "processes": manifest.world_size,
    }
    try:
        verify(checkpoint)
        config, reader = read_config(checkpoint), ZeroReader(checkpoint / DEEPSPEED_TAG)
        head = _head(config, reader)
    except CheckpointError as error:
        return report | {"bytes": bytes_in([checkpoint]), "versions": manifest.versions, PROBLEM: str(error)}
    groups = [
        {
            "weight decay": group["weight_decay"],
            **({"learning rate x": group["lr_scale"]} if group.get("lr_scale", 1.0) != 1 else {}),
            "tensors": len(names),
            "parameters": sum(torch.Size(reader.shape(n)).numel() for n in names),
        }
        for names, group in zip(reader.state["parameter_groups"], reader.groups, strict=True)
    ]
    counted = counts({n: torch.empty(reader.shape(n), dtype=reader.dtype(n), device="meta") for n in reader})
    return report | {
        **_model(config),
        **head,
        "config digest": manifest.config_digest,
        **counted,
        "groups": groups,
        "bytes": bytes_in([checkpoint]),
        "versions": manifest.versions,
        "verified": "SHA-256 of every file",
        PROBLEM: None,
    }


def _deepspeed(path: Path) -> Report:
    folder = find_folder(path)
    reader = ZeroReader(folder)
    return {
        "kind": "DeepSpeed checkpoint",
        "path": str(folder),
        "step": reader.step,
        "saved": _saved(folder),
        "ZeRO stage": reader.stage,
        "processes": reader.world_size,
        **counts({n: torch.empty(reader.shape(n), dtype=reader.dtype(n), device="meta") for n in reader}),
        "trained": len(reader.parameters),
        "bytes": bytes_in([folder]),
        "verified": "no checksums there; all files are there and of one save",
        PROBLEM: None,
    }


def render(report: Report) -> str:
    """A report as text, for people."""
    width = max(map(len, report)) + 2
    lines = []
    for key, value in report.items():
        if value in (None, [], {}) or key == PROBLEM:
            continue
        rows = value if isinstance(value, list) and isinstance(value[0], dict) else [value]
        lines += [(key if i == 0 else "").ljust(width) + _text(key, row) for i, row in enumerate(rows)]
    return "\n".join(lines)


def _text(key: str, value: Any) -> str:
    if isinstance(value, dict) and "saved" in value:
        size = f"{value['bytes'] / 1e6:,.1f} MB"
        return f"{value['name']}  {value['saved']}  {size:>12}  {'damaged' if value[PROBLEM] else 'verified'}"
    if isinstance(value, dict):  # a name before a version or a setting, after a number of things
        return ", ".join(f"{v:,} {k}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return (" x " if key in ("image size", "patch size") else ", ").join(map(str, value))
    if key == "bytes":
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    return f"{value:,}" if key == "parameters" else str(value)
