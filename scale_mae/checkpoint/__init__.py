"""Checkpoints: committed, read, exported."""
