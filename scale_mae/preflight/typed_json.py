"""Encode values as JSON, and decode them strictly: JSON that does not have the expected type is an error.

The rendezvous store is open to every program on the network. Decoding therefore never runs code, unlike pickle.
"""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def encode(value: Any) -> str:
    """Return a value as JSON. Bytes become hexadecimal digits, and a dataclass becomes an object."""
    return json.dumps(value, default=lambda part: part.hex() if isinstance(part, bytes) else vars(part))


def decode(value_type: type[T], text: bytes) -> T:
    """Return the value that JSON describes.

    Args:
        value_type: The type of the value: ``bool``, ``int``, ``float``, ``str``, ``bytes``, ``None``, a list, tuple or dict
            with types of its elements, a dataclass, or one of these or ``None``.
        text: The JSON.

    Raises:
        ValueError: The JSON is malformed, or its value has another type.
    """
    try:
        return _convert(value_type, json.loads(text))  # type: ignore[no-any-return]
    except (ValueError, OverflowError, RecursionError):
        raise ValueError("malformed data in the rendezvous store") from None


def _convert(value_type: Any, plain: Any) -> Any:
    origin, arguments = get_origin(value_type) or value_type, get_args(value_type)
    if origin in (Union, UnionType):  # a type or None
        return None if plain is None else _convert(next(t for t in arguments if t is not NoneType), plain)
    if type(plain) is dict and origin is dict:
        return {key: _convert(arguments[1], value) for key, value in plain.items()}
    if type(plain) is dict and is_dataclass(origin) and plain.keys() == (hints := get_type_hints(origin)).keys():
        # an attribute of a generic dataclass has the type parameter as its type
        types = {name: hint[arguments] if getattr(hint, "__parameters__", ()) else hint for name, hint in hints.items()}
        return origin(**{name: _convert(types[name], value) for name, value in plain.items()})  # type: ignore[operator]
    if origin in (list, tuple) and type(plain) is list:
        element_types = arguments if origin is tuple and arguments[-1] is not ... else arguments[:1] * len(plain)
        return origin(_convert(t, value) for t, value in zip(element_types, plain, strict=True))
    if value_type is bytes and type(plain) is str:
        return bytes.fromhex(plain)
    is_float = value_type is float and type(plain) in (int, float) and math.isfinite(plain)
    if not is_float and not (value_type in (bool, int, str, NoneType) and type(plain) is value_type):
        raise ValueError(f"not of type {value_type}")
    return plain
