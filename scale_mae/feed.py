"""Batches for all processes in step."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from scale_mae.data.loader import Batch
from scale_mae.data.storage import DataError
from scale_mae.engine.distributed import Ballot, StopRequest, Vote, World
from scale_mae.metrics.stopwatch import Stopwatch


class Feed:
    """Batches with agreement: a process that cannot load one, or was told to stop, tells all before the next forward pass.

    The vote for the next batch is cast while the accelerator works on the present one.
    """

    def __init__(self, batches: Iterator[Batch], ranks: World, stop: StopRequest, watch: Stopwatch) -> None:
        self._batches, self._ranks, self._stop, self._watch = batches, ranks, stop, watch
        self._ballot = Ballot(ranks)
        self._batch: Batch | None = None
        self._problem: DataError | None = None
        self.advance()

    def advance(self) -> None:
        """Fetch the next batch, if any is left, and cast the vote on it."""
        vote = Vote.STOP if self._stop.received else Vote.GO_ON
        try:
            self._batch = next(self._batches, None)
        except DataError as problem:
            self._problem, vote = problem, Vote.FAILED
        except Exception as problem:  # a fault of ours must not leave the others waiting either
            traceback.print_exc()
            self._problem, vote = DataError(f"a batch cannot be loaded ({type(problem).__name__}: {problem})"), Vote.FAILED
        self._watch.lap("data")
        self._ballot.cast(vote)

    def take(self) -> tuple[Batch, Vote]:
        """The fetched batch, and the largest vote of all processes.

        Raises:
            DataError: on every process, when any could not load its batch.
        """
        vote = self._ballot.count()
        self._watch.lap("vote")
        if vote is Vote.FAILED:
            raise next(problem for problem in self._ranks.gather(self._problem) if problem)
        assert self._batch is not None  # the loop asks for no more than the loader has
        return self._batch, vote
