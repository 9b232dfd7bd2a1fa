"""The training loop and what belongs to it: tasks, batches, metrics logging, monitoring, rollback and the watchdog."""
