"""The size of a checkpoint, before it is written."""

from __future__ import annotations


def estimate_checkpoint_size(parameters: int, precision: str, zero_stage: int) -> tuple[int, int]:
    """Return the largest size of a checkpoint, and the part of it that only rank 0 writes, in bytes.

    Args:
        parameters: Number of parameters of the model.
        precision: ``train.precision``.
        zero_stage: ZeRO stage. Without ZeRO (stage 0), rank 0 writes everything.
    """
    module = parameters * (4 if precision == "fp32" else 2)
    nbytes = module + parameters * 12  # fp32 weights and two moments
    return nbytes, module if zero_stage else nbytes
