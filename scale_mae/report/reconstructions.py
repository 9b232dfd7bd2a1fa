"""Pictures of what the model made of a few images at points of training, kept in the run directory for later reports."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from scale_mae.checkpoint.paths import list_checkpoints, step_of
from scale_mae.config import Config, UserError

FOLDER = "reconstructions"
HIDDEN = (75, 85, 95)  # per cent of the patches
IMAGES = 4  # of the run's own index, always the same
POINTS = 6  # of training on a page: the first, the newest, and some between
WIDEST = 900  # pixels of a picture on the page


@dataclass(frozen=True)
class Picture:
    """One drawn file."""

    path: Path
    step: int
    hidden: int

    def data_uri(self) -> str:
        """The picture itself, small enough for a page."""
        with Image.open(self.path) as image:
            image.thumbnail((WIDEST, 100 * WIDEST))
            content = io.BytesIO()
            image.convert("RGB").save(content, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def folder_of(run: Path, images: Sequence[str]) -> Path:
    """Where pictures of these images are kept; those of the run's own index have the plain name."""
    if not images:
        return run / FOLDER
    digest = hashlib.sha256()
    for image in images:
        try:
            content = Path(image).read_bytes()
            with Image.open(io.BytesIO(content)) as opened:
                opened.load()
        except UnidentifiedImageError:
            raise UserError(f"{image}: cannot be read as an image (of no known kind)") from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{image}: cannot be read as an image ({getattr(error, 'strerror', None) or error})") from None
        digest.update(content)
    return run / FOLDER / f"of-{digest.hexdigest()[:12]}"


def drawn(folder: Path) -> list[Picture]:
    """Pictures that are there, oldest step first."""
    found = []
    for path in folder.glob("step-*.png"):
        if name := re.fullmatch(r"step-(\d{8,})-(\d\d)\.png", path.name):
            found.append(Picture(path, int(name[1]), int(name[2])))
    return sorted(found, key=lambda picture: (picture.step, picture.hidden))


def chosen(pictures: Sequence[Picture]) -> dict[int, list[Picture]]:
    """Those of at most :data:`POINTS` steps, evenly from the first to the newest."""
    steps = sorted({picture.step for picture in pictures})
    if len(steps) > POINTS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (POINTS - 1))] for i in range(POINTS)})
    return {step: [picture for picture in pictures if picture.step == step] for step in steps}


def draw_missing(run: Path, config: Config | None, images: Sequence[str], warn: Callable[[str], None]) -> list[Picture]:
    """Draw what each checkpoint makes of the images where that has not been done.

    Args:
        run: the run directory; where it cannot be written, pictures are kept for this process only.
        config: of the run; without it the pictures that are there are all.
        images: files; empty: a few of the run's own index.
        warn: told what could not be drawn, one line each.

    Returns:
        All pictures of the images, oldest step first.

    Raises:
        UserError: a file of ``images`` cannot be read, or is no image.
    """
    folder = folder_of(run, images)
    if config is None or config.run.task != "pretrain":
        return drawn(folder)
    possible = [hidden for hidden in HIDDEN if _kept(config, hidden)]
    if len(possible) < len(HIDDEN):
        left_out = ", ".join(f"{hidden} %" for hidden in HIDDEN if hidden not in possible)
        warn(f"no reconstructions at {left_out}: that hides all patches of so small an image")
    there = {(picture.step, picture.hidden) for picture in drawn(folder)}
    missing = {}
    for checkpoint in list_checkpoints(run):
        ratios = [hidden for hidden in possible if (step_of(checkpoint), hidden) not in there]
        if ratios:
            missing[checkpoint] = ratios
    if not missing:
        return drawn(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    kept = folder if writable else _for_this_process(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            paths = list(images) or _own_images(run, config, Path(scratch))
        except UserError as error:
            warn(f"no reconstructions drawn: {error}")
            return drawn(folder)
        for checkpoint, ratios in missing.items():
            try:
                _draw(checkpoint, ratios, paths, kept, Path(scratch))
            except UserError as error:
                warn(f"{checkpoint.name}: no reconstructions drawn: {error}")
    return sorted({*drawn(folder), *drawn(kept)}, key=lambda picture: (picture.step, picture.hidden))


def _kept(config: Config, hidden: int) -> int:
    """Patches that are shown."""
    rows, columns = (side // p for side, p in zip(config.model.image_size, config.model.patch, strict=True))
    return int(rows * columns * (1 - hidden / 100))


_scratch: dict[Path, tempfile.TemporaryDirectory[str]] = {}


def _for_this_process(folder: Path) -> Path:
    if folder not in _scratch:
        _scratch[folder] = tempfile.TemporaryDirectory()
    return Path(_scratch[folder].name)


def _own_images(run: Path, config: Config, scratch: Path) -> list[str]:
    from scale_mae.data.errors import ImageError
    from scale_mae.data.index import INDEX_NAME, Index, existing_index

    index = Index.open(existing_index(config.data.source) or run / INDEX_NAME)
    paths = []
    for number in range(min(IMAGES, len(index))):
        sample = number * len(index) // IMAGES
        try:
            content = index.read(sample)
        except ImageError as error:
            raise UserError(f"{index.location(sample)}: {error}") from None
        paths.append(scratch / f"image {sample}")
        paths[-1].write_bytes(content)
    return [str(path) for path in paths]


def _draw(checkpoint: Path, ratios: Sequence[int], paths: Sequence[str], folder: Path, scratch: Path) -> None:
    from scale_mae.checkpoint.manifest import read_config
    from scale_mae.checkpoint.verification import verify
    from scale_mae.evaluation.reconstruct import draw
    from scale_mae.weights.model_loader import load_mae

    step = verify(checkpoint, checksums=False).step
    model, config = load_mae(checkpoint), read_config(checkpoint)
    for hidden in ratios:
        name = f"step-{step:08d}-{hidden}.png"
        drawing = draw(model, config, paths, scratch / name, [hidden / 100], step)
        staging = folder / f".{name}.{os.getpid()}"  # a reader sees a whole picture or none
        staging.write_bytes(drawing.read_bytes())
        staging.rename(folder / name)
