"""Durations as text."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Return a duration such as ``2 d 3 h``, ``3 h 20 min``, ``5 min`` or ``12 s``."""
    total = int(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{total} s"
