"""Unpickles files of ``torch.save`` safely: the restricted loader builds tensors and plain values only and runs no code.

``argparse.Namespace`` is allowed in addition, because the reference repository stores its options in one.
"""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.deepspeed_unpickle import describe_load_error
from scale_mae.checkpoint.errors import CheckpointError

SAFETENSORS = ".safetensors"
# The keys under which training code stores a state dict next to other values, the most common first.
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")


@dataclass(frozen=True)
class PickledWeights:
    """The contents of a pickled checkpoint.

    Attributes:
        tensors: The state dict.
        extras: The other values, without tensors.
        state_dict_key: The key of the state dict in the file. ``None`` if the file itself is the state dict.
    """

    tensors: dict[str, Tensor]
    extras: dict[str, Any]
    state_dict_key: str | None


def load_pickled_weights(path: Path) -> PickledWeights:
    """Load a file of ``torch.save``. Memory-map it if it is a zip archive.

    Raises:
        CheckpointError: The file is damaged, contains no state dict, or would run code.
    """
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: contains a {type(content).__name__}, not a state dict.")
    key = next((key for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), None)
    state: dict[str, Any] = content if key is None else content[key]
    tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: contains no state dict; its keys are {', '.join(str(k) for k in list(content)[:5])}.")
    extras = {str(name): value for name, value in content.items() if name != key and not isinstance(value, Tensor)}
    return PickledWeights(tensors, extras, key)


def _unpickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            # torch maps zip archives only, and takes a path with this suffix for a safetensors file
            mmap = path.suffix != SAFETENSORS and file.read(2) == b"PK"
            file.seek(0)
            return torch.load(path if mmap else file, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"{path}: refused, because unpickling it would call {forbidden[1]}; "
                "only tensors and plain values are allowed. Save the state dict alone."
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({describe_load_error(error)}).") from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read ({describe_load_error(error)}).") from None
