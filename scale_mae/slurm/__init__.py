"""Slurm jobs: submit, show and cancel runs. This package imports no torch, so it works on a login node without one."""
