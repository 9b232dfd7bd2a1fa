"""Makes small image sources for tests."""

import functools
import io
import tarfile
import tempfile
import weakref

import numpy as np
from PIL import Image


def jpeg(width=40, height=30, seed=0, mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def make_folders(root, classes=3, per_class=4):
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            (root / f"class{c}" / f"{i}.jpg").write_bytes(jpeg(seed=10 * c + i))
    return root


def make_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@functools.cache
def demo_index():
    """Build one index of ``demo:train`` for all runs of a test session, so that they need not build one each."""
    from scale_mae.data.index_builder import build_index

    folder = tempfile.TemporaryDirectory()
    weakref.finalize(demo_index, folder.cleanup)
    build_index("demo:train", f"{folder.name}/demo.index", verify=False)
    return f"{folder.name}/demo.index"
