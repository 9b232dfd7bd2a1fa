"""DeepSpeed, ranks and optimizer. Nothing outside this package and ``checkpoint`` imports deepspeed."""

import os

import torch

# said before deepspeed is first imported, so that it neither probes for nor warns about a missing GPU
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

TAG = "deepspeed"  # folder of DeepSpeed's own files inside a checkpoint
