"""Memory-maps DeepSpeed's files and unpickles them safely: nothing that a pickle names is imported or called.

torch's restricted unpickler rebuilds tensors and plain containers. Objects of other classes, from DeepSpeed or from user code,
become placeholders without contents.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError

# Names of the standard library that only hold data. A checkpoint has no reason to name any other.
_DATA_TYPES = re.compile(
    r"(argparse|collections|datetime|decimal|fractions|pathlib|typing|uuid)\.\w+|_codecs\.encode|copyreg\._reconstructor|"
    r"builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|slice|str|tuple|type)"
)


class _Placeholder:
    """Replaces an object of an unknown class, and the class itself. It ignores its arguments and its state."""

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _DictPlaceholder:
    """Replaces a subclass of ``dict``. The restricted unpickler can fill only the dictionaries that it knows."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _Stage(int):
    """Replaces DeepSpeed's ``ZeroStageEnum``."""


def _get_stage(owner: Any, name: str) -> _Stage:
    """Replace ``getattr``, with which Python 3.11.0 to 3.11.3 (also of Debian 12) pickles a member of an enumeration."""
    if owner is not _Stage:
        raise ValueError("it would call builtins.getattr, which is not allowed")
    return _Stage(("disabled", "optimizer_states", "gradients", "weights").index(name))


def load_file(path: Path) -> dict[str, Any]:
    """Return the contents of a file that ``torch.save`` wrote. Its tensors are memory-mapped.

    Raises:
        CheckpointError: The file is damaged, would call a function, or does not contain a dictionary.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        replacements: list[Any] = [(_find_replacement(name), name) for name in names]
        with torch.serialization.safe_globals(replacements):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the pickle of a damaged file can raise anything
        raise CheckpointError(f"{path}: cannot be read ({describe_load_error(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: cannot be read (DeepSpeed did not write it)")
    return content


def describe_load_error(error: Exception) -> str:
    """Return in one line why torch could not load a file, without its advice to lift the restriction."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    text = re.split(r"Check the documentation|Please use `torch.serialization|, and we don't|[^.]*weights_only", text)[0]
    return " ".join(text.split())[:200] or type(error).__name__


def _find_replacement(name: str) -> Any:
    """Return the object that replaces the class or function ``name`` of a pickle.

    Raises:
        ValueError: ``name`` belongs to the standard library and does more than hold data.
    """
    module, _, attribute = name.partition(".")
    module = IMPORT_MAPPING.get(module, module)  # pickles of protocol 2 use Python 2's names of modules
    if (module, attribute) == ("builtins", "getattr"):
        return _get_stage
    if module in sys.stdlib_module_names and not _DATA_TYPES.fullmatch(f"{module}.{attribute}"):
        raise ValueError(f"it would call {module}.{attribute}, which is not allowed")
    if name.endswith(".ZeroStageEnum"):
        return _Stage
    return _DictPlaceholder if name.lower().endswith("dict") else _Placeholder


def find_memory_maps(path: Path, content: Any) -> Iterator[tuple[int, int]]:
    """Yield (address, size in bytes) of the memory map of ``path`` that contains the tensors of ``content``. Linux only."""
    address_inside = next((t.untyped_storage().data_ptr() for t in _iterate_tensors(content) if t.numel()), 0)
    if sys.platform != "linux" or not address_inside:
        return
    mapped_file = os.path.realpath(path)
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, *_, file = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(number, 16) for number in addresses.split("-"))
            if file == mapped_file and start <= address_inside < end:
                yield start, end - start


def _iterate_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _iterate_tensors(value)


def release_memory_maps(maps: Iterable[tuple[int, int]]) -> None:
    """Return the pages of memory maps to the operating system. They are read from the files again when used."""
    if sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        for start, size in maps:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
