"""The DeepSpeed engine, optimizers and schedule. Only this package and ``checkpoint`` import deepspeed."""

import os

import torch

# DeepSpeed reads this when it is first imported. Without it, DeepSpeed probes for a GPU and warns when there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
