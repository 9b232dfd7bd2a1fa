"""Pre-training of masked autoencoders at scale. Public names are imported on first use, because importing torch is slow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scale_mae.api import finetune as finetune
    from scale_mae.api import linprobe as linprobe
    from scale_mae.api import pretrain as pretrain
    from scale_mae.config import UserError as UserError
    from scale_mae.config import load_config as load_config
    from scale_mae.weights.model_loader import load_encoder as load_encoder

__version__ = "0.1.0"
_MODULE_OF = {
    "pretrain": "scale_mae.api",
    "finetune": "scale_mae.api",
    "linprobe": "scale_mae.api",
    "load_encoder": "scale_mae.weights.model_loader",
    "load_config": "scale_mae.config",
    "UserError": "scale_mae.config",
}
__all__ = ["UserError", "finetune", "linprobe", "load_config", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
