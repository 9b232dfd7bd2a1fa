"""Writes the features of all images of a source to one file, with any number of processes.

The processes write pieces of :data:`PIECE` images to ``OUT.pieces``, each atomically. The same command continues an interrupted
run with the missing pieces. The batches depend only on the order of the source, so a resumed run writes the same file as an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.config import UserError
from scale_mae.data.index import Index
from scale_mae.data.index_builder import list_source
from scale_mae.distributed.process_group import World
from scale_mae.evaluation.features import Pool, Progress, features
from scale_mae.evaluation.models import EvaluatedModel
from scale_mae.system.lock import exclusive_lock
from scale_mae.weights.safetensors_io import write_tensors

PIECE = 1024  # images
PLAN, JOINED = "plan.json", "joined.tmp"
Writer = Callable[[Path, NDArray[np.float32], NDArray[np.int32], Sequence[str], dict[str, str]], None]


def embed(
    evaluated: EvaluatedModel,
    source: str,
    out: str | Path,
    world: World,
    *,
    pool: Pool = "mean",
    batch: int = 64,
    progress: Progress | None = None,
) -> str:
    """Write the features of a source's images, in the order of the source. All processes call it.

    Args:
        evaluated: The encoder.
        source: Any image source. Labels are written if there are any.
        out: ``.npy`` (``[N, D]`` fp32; names and labels in a ``.tsv`` file next to it), ``.safetensors`` (``features``,
            ``labels``, and the names in ``paths`` and ``path_ends``) or ``.parquet`` (one row per image).
        world: The process group.
        pool: The pooling of the tokens.
        batch: Images per batch and process.
        progress: Receives (images done by this process, all of its images).

    Returns:
        A summary of the work, one line.

    Raises:
        UserError: An image cannot be read, ``OUT.pieces`` belongs to another command, or a file cannot be written.
    """
    out, began = Path(out), time.monotonic()
    world.run_on_main(lambda: _writer(out))
    pieces = out.with_name(out.name + ".pieces")
    index = world.run_on_main(lambda: list_source(source))
    plan = {"weights": evaluated.digest or evaluated.path, "size": evaluated.size, "pool": pool, "batch": batch, "piece": PIECE}
    plan |= {"images": len(index), "listing": _listing_digest(index)}
    with ExitStack() as held:
        lock = exclusive_lock(pieces.with_name(f"{pieces.name}.lock"), f"{out} is being written")
        world.run_on_main(lambda: held.enter_context(lock))
        done = world.run_on_main(lambda: _begin(pieces, plan))
        starts = [start for start in range(0, len(index), PIECE) if start not in done]
        mine = starts[world.rank :: world.size]
        evaluated.model.to(world.device)
        world.run_on_all(lambda: _compute(evaluated, index, pieces, mine, pool, batch, progress))
        seconds = time.monotonic() - began
        metadata = {"scale_mae_embed": json.dumps(plan | {"source": source, "architecture": evaluated.architecture})}
        world.run_on_main(lambda: _join(index, pieces, out, metadata))
    made = len(index) - sum(min(PIECE, len(index) - start) for start in done)
    kept = f", {len(index) - made} of them from an earlier run" if done else ""
    return f"{out}: {len(index)} images{kept}; {made / max(seconds, 1e-9):.1f} images/s"


def _listing_digest(index: Index) -> str:
    """Return a digest of the locations and labels of all images. It is the same for an index and for a fresh listing."""
    digest = hashlib.sha256()
    for name in ("shard", "offset", "label"):
        digest.update(np.ascontiguousarray(index.entries[name]).tobytes())
    for path in index.shards:
        digest.update(os.fsencode(path) + b"\0")
    return digest.hexdigest()[:32]


def _begin(pieces: Path, plan: dict[str, Any]) -> set[int]:
    """Create or check the folder of pieces. Return the first images of the finished pieces."""
    try:
        pieces.mkdir(parents=True, exist_ok=True)
        if not (pieces / PLAN).exists():
            (pieces / f"{PLAN}.tmp").write_text(json.dumps(plan))
            (pieces / f"{PLAN}.tmp").replace(pieces / PLAN)
        before = json.loads((pieces / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{pieces}: cannot be written or read ({error})") from None
    if changed := [name for name in plan if before.get(name) != plan[name]]:
        raise UserError(
            f"{pieces}: contains unfinished work with a different {', '.join(changed)}; finish it first, or delete it"
        )
    return {int(file.stem) for file in pieces.glob("*.npy")}


def _compute(
    evaluated: EvaluatedModel,
    index: Index,
    pieces: Path,
    starts: Sequence[int],
    pool: Pool,
    batch: int,
    progress: Progress | None,
) -> None:
    total = sum(min(PIECE, len(index) - start) for start in starts)
    before = 0
    for start in starts:
        rows = range(start, min(start + PIECE, len(index)))

        def move(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        found = features(evaluated, index, rows, batch, pool, move)
        before += len(rows)
        path = pieces / f"{start:012d}.npy"
        try:
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.save(file, found.values.numpy())
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}); run the same command again to continue"
            ) from None


def _join(index: Index, pieces: Path, out: Path, metadata: dict[str, str]) -> None:
    """Join the pieces to the output file, atomically, and delete them."""
    files = [pieces / f"{start:012d}.npy" for start in range(0, len(index), PIECE)]
    staging = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        shape = len(index), np.load(files[0], mmap_mode="r").shape[1]
        whole = np.lib.format.open_memmap(pieces / JOINED, "w+", np.float32, shape)  # the features may not fit in memory
        for number, file in enumerate(files):
            whole[number * PIECE : (number + 1) * PIECE] = np.load(file)
        whole.flush()
        names = [index.location(row) for row in range(len(index))]
        _writer(out)(staging, whole, index.entries["label"].astype(np.int32), names, metadata)
        staging.replace(out)
        shutil.rmtree(pieces)
    except (OSError, ValueError) as error:
        staging.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written ({error})") from None


def _writer(out: Path) -> Writer:
    """Return the function that writes this file format.

    Raises:
        UserError: The format is unknown, or its package is missing.
    """
    if out.suffix not in WRITERS or out.is_dir():
        raise UserError(f"--out {out}: unknown format; use a file name that ends in {', '.join(WRITERS)}")
    if out.suffix == ".parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise UserError(
                f"--out {out}: Parquet needs pyarrow; run pip install 'scale-mae[parquet]', or write .npy"
            ) from None
    return WRITERS[out.suffix]


def _write_npy(
    path: Path, values: NDArray[np.float32], labels: NDArray[np.int32], names: Sequence[str], metadata: dict[str, str]
) -> None:
    assert isinstance(values, np.memmap)
    Path(str(values.filename)).replace(path)
    lines = (f"{name}\t{label}\n" for name, label in zip(names, labels.tolist(), strict=True))
    # OUT.npy.<process ID>.tmp -> OUT.tsv; label -1 means no label
    path.with_name(path.name.rsplit(".npy.", 1)[0] + ".tsv").write_text("path\tlabel\n" + "".join(lines), "utf-8")


def _write_safetensors(
    path: Path, values: NDArray[np.float32], labels: NDArray[np.int32], names: Sequence[str], metadata: dict[str, str]
) -> None:
    """Store the names as tensors: all UTF-8 bytes in one, and the end of each name. The header's size is limited."""

    def lazily(array: NDArray[Any]) -> LazyTensor:
        tensor = torch.from_numpy(array)
        return LazyTensor(array.shape, tensor.dtype, lambda: [tensor.reshape(-1)])

    texts = [name.encode() for name in names]
    arrays: dict[str, NDArray[Any]] = {
        "features": values,
        "labels": labels,
        "paths": np.frombuffer(bytearray(b"".join(texts)), np.uint8),
        "path_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }
    # safetensors' own writer copies all values to memory and writes the metadata keys in a random order
    write_tensors(path, {name: lazily(array) for name, array in arrays.items()}, metadata)


def _write_parquet(
    path: Path, values: NDArray[np.float32], labels: NDArray[np.int32], names: Sequence[str], metadata: dict[str, str]
) -> None:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
    table = arrow.table({"path": arrow.array(list(names)), "label": arrow.array(labels), "features": vectors})
    parquet.write_table(table.replace_schema_metadata(metadata), path)


WRITERS: dict[str, Writer] = {".npy": _write_npy, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
