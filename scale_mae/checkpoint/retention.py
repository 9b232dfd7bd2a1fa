"""Which checkpoints stay."""

from __future__ import annotations


def retained(steps: list[int], keep: int, keep_every: int | None) -> set[int]:
    """Which checkpoints stay: the newest ``keep``, and the first of every stretch of ``keep_every`` steps.

    What it drops has no bearing on what it keeps the next time, so it may be applied after every save.

    Args:
        steps: of all checkpoints.
        keep: at least 1.
        keep_every: in steps; the first stretch, before any multiple of it, has none to keep. None: no such ones.
    """
    firsts: dict[int, int] = {}
    for step in sorted(steps) if keep_every else ():
        firsts.setdefault(step // keep_every, step)  # type: ignore[operator]  # not None here
    firsts.pop(0, None)
    return {*sorted(steps)[-keep:], *firsts.values()}
