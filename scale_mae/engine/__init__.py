"""The DeepSpeed engine, optimizers and the learning-rate schedule. Only this package and ``checkpoint`` import deepspeed."""

import os

import torch

# DeepSpeed reads this variable at its first import. Without it, DeepSpeed probes for a GPU and warns if it finds none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
