"""Checkpoints of a run: save, commit, verify, retain, and resume on any number of processes.

``saver`` saves during training, and ``commit`` makes each save atomic. ``discovery`` finds the checkpoint to resume from.
``zero_reader`` reads the parameters of any ZeRO checkpoint by name, and ``elastic_resume`` loads them into an engine.
"""
