"""Checkpoints: committed, read, exported."""

import scale_mae.engine  # noqa: F401  (before deepspeed: it chooses the accelerator)
