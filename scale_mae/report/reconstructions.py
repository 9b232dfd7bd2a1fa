"""Reconstructions for the report: pictures of a few images at several steps, kept in the run directory for later reports."""

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

from scale_mae.checkpoint.paths import get_step, list_checkpoints
from scale_mae.config import Config, UserError

FOLDER = "reconstructions"
MASK_PERCENTS = (75, 85, 95)
DEFAULT_IMAGES = 4  # images from the index of the run, always the same ones
MAX_STEPS = 6  # on a page: the first, the newest, and some in between
MAX_WIDTH = 900  # pixels of a picture on the page


@dataclass(frozen=True)
class Picture:
    """A picture file.

    Attributes:
        path: The PNG file.
        step: Step of the checkpoint.
        mask_percent: Percentage of masked patches.
    """

    path: Path
    step: int
    mask_percent: int

    def data_uri(self) -> str:
        """Return the picture as a data URI, scaled down for the page."""
        with Image.open(self.path) as image:
            image.thumbnail((MAX_WIDTH, 100 * MAX_WIDTH))
            content = io.BytesIO()
            image.convert("RGB").save(content, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def picture_folder(run: Path, images: Sequence[str]) -> Path:
    """Return the folder for pictures of these images. Without images, it is the folder for images of the run's index.

    Raises:
        UserError: A file is not a readable image.
    """
    if not images:
        return run / FOLDER
    digest = hashlib.sha256()
    for image in images:
        try:
            content = Path(image).read_bytes()
            with Image.open(io.BytesIO(content)) as opened:
                opened.load()
        except UnidentifiedImageError:
            raise UserError(f"{image}: cannot be read as an image (unknown format)") from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{image}: cannot be read as an image ({getattr(error, 'strerror', None) or error})") from None
        digest.update(content)
    return run / FOLDER / f"of-{digest.hexdigest()[:12]}"


def existing_pictures(folder: Path) -> list[Picture]:
    """Return the pictures in a folder, sorted by step."""
    pictures = []
    for path in folder.glob("step-*.png"):
        if name := re.fullmatch(r"step-(\d{8,})-(\d\d)\.png", path.name):
            pictures.append(Picture(path, int(name[1]), int(name[2])))
    return sorted(pictures, key=lambda picture: (picture.step, picture.mask_percent))


def select_steps(pictures: Sequence[Picture]) -> dict[int, list[Picture]]:
    """Return the pictures of at most :data:`MAX_STEPS` steps, evenly from the first to the newest."""
    steps = sorted({picture.step for picture in pictures})
    if len(steps) > MAX_STEPS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)})
    return {step: [picture for picture in pictures if picture.step == step] for step in steps}


def draw_missing(run: Path, config: Config | None, images: Sequence[str], warn: Callable[[str], None]) -> list[Picture]:
    """Draw the reconstructions of each checkpoint that do not exist yet.

    Args:
        run: Run directory. If it is not writable, the pictures exist only as long as this process.
        config: Configuration of the run. Without it, only existing pictures are returned.
        images: Image files; empty selects a few images of the run's index.
        warn: Receives one line for each picture that cannot be drawn.

    Returns:
        All pictures of the images, sorted by step.

    Raises:
        UserError: A file of ``images`` is not a readable image.
    """
    folder = picture_folder(run, images)
    if config is None or config.run.task != "pretrain":
        return existing_pictures(folder)
    possible = [percent for percent in MASK_PERCENTS if _visible_patches(config, percent)]
    if len(possible) < len(MASK_PERCENTS):
        impossible = ", ".join(f"{percent} %" for percent in MASK_PERCENTS if percent not in possible)
        warn(f"no reconstructions with a mask ratio of {impossible}: no patch of such a small image would remain visible")
    missing = _missing_pictures(run, possible, existing_pictures(folder))
    if not missing:
        return existing_pictures(folder)
    target = _writable_folder(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            paths = list(images) or _images_of_index(run, config, Path(scratch))
        except UserError as error:
            warn(f"no new reconstructions: {error}")
            return existing_pictures(folder)
        for checkpoint, percents in missing.items():
            try:
                _draw(checkpoint, percents, paths, target, Path(scratch))
            except UserError as error:
                warn(f"{checkpoint.name}: no reconstructions: {error}")
    pictures = {*existing_pictures(folder), *existing_pictures(target)}
    return sorted(pictures, key=lambda picture: (picture.step, picture.mask_percent))


def _missing_pictures(run: Path, percents: Sequence[int], existing: Sequence[Picture]) -> dict[Path, list[int]]:
    """Return the percentages that are missing for each checkpoint."""
    known = {(picture.step, picture.mask_percent) for picture in existing}
    missing = {
        checkpoint: [percent for percent in percents if (get_step(checkpoint), percent) not in known]
        for checkpoint in list_checkpoints(run)
    }
    return {checkpoint: missing_percents for checkpoint, missing_percents in missing.items() if missing_percents}


def _visible_patches(config: Config, mask_percent: int) -> int:
    rows, columns = (side // p for side, p in zip(config.model.image_size, config.model.patch, strict=True))
    return int(rows * columns * (1 - mask_percent / 100))


_temporary_folders: dict[Path, tempfile.TemporaryDirectory[str]] = {}


def _writable_folder(folder: Path) -> Path:
    """Return the folder, or a folder that exists as long as this process if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    if folder not in _temporary_folders:
        _temporary_folders[folder] = tempfile.TemporaryDirectory()
    return Path(_temporary_folders[folder].name)


def _images_of_index(run: Path, config: Config, scratch: Path) -> list[str]:
    from scale_mae.data.errors import ImageError
    from scale_mae.data.index import INDEX_NAME, Index, existing_index

    index = Index.open(existing_index(config.data.source) or run / INDEX_NAME)
    paths = []
    for number in range(min(DEFAULT_IMAGES, len(index))):
        sample = number * len(index) // DEFAULT_IMAGES
        try:
            content = index.read(sample)
        except ImageError as error:
            raise UserError(f"{index.location(sample)}: {error}") from None
        paths.append(scratch / f"image {sample}")
        paths[-1].write_bytes(content)
    return [str(path) for path in paths]


def _draw(checkpoint: Path, percents: Sequence[int], paths: Sequence[str], folder: Path, scratch: Path) -> None:
    from scale_mae.checkpoint.manifest import read_config
    from scale_mae.checkpoint.verification import verify
    from scale_mae.evaluation.reconstruct import draw_reconstructions
    from scale_mae.weights.model_loader import load_mae

    step = verify(checkpoint, checksums=False).step
    model, config = load_mae(checkpoint), read_config(checkpoint)
    for percent in percents:
        name = f"step-{step:08d}-{percent}.png"
        drawing = draw_reconstructions(model, config, paths, scratch / name, [percent / 100], step)
        staging = folder / f".{name}.{os.getpid()}"  # renamed when complete, so that a reader never sees a partial file
        staging.write_bytes(drawing.read_bytes())
        staging.rename(folder / name)
