"""Processes: who they are, how they meet, and how they agree. Ranks come from torchrun or Slurm."""
