"""Batches for all processes in step, decoded by the same kind of decoder on all."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from types import TracebackType

from scale_mae.config import Config
from scale_mae.data import decoders
from scale_mae.data.errors import DataError
from scale_mae.data.loader import Batch, num_decoding_threads
from scale_mae.distributed.process_group import World
from scale_mae.distributed.signals import StopRequest
from scale_mae.distributed.stop_vote import StopVote, Vote
from scale_mae.metrics.step_timer import StepTimer


class BatchIterator:
    """Batches with agreement: a process that cannot load one, or was told to stop, tells all before the next forward pass.

    A context: at its end nothing is loaded any more, and the vote that was under way has been counted.

    The vote for the next batch is cast while the accelerator works on the present one.
    """

    def __init__(self, batches: Generator[Batch, None, None], world: World, stop: StopRequest, watch: StepTimer) -> None:
        self._batches, self._world, self._stop, self._watch = batches, world, stop, watch
        self._ballot = StopVote(world)
        self._batch: Batch | None = None
        self._problem: DataError | None = None
        self.advance()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._batches.close()
        if kind is None:  # else others may be gone, and it would never be counted
            self._ballot.count()

    def advance(self) -> None:
        """Fetch the next batch, if any is left, and cast the vote on it."""
        vote = Vote.STOP if self._stop.reason else Vote.CONTINUE
        try:
            self._batch = next(self._batches, None)
        except DataError as problem:
            self._problem, vote = problem, Vote.FAILED
        except Exception as problem:  # a fault of ours must not leave the others waiting either
            traceback.print_exc()
            self._problem, vote = DataError(f"a batch cannot be loaded ({type(problem).__name__}: {problem})"), Vote.FAILED
        self._watch.mark("data")
        self._ballot.cast(vote)

    def take(self) -> tuple[Batch, Vote]:
        """The fetched batch, and the largest vote of all processes.

        Raises:
            DataError: on every process, when any could not load its batch.
        """
        vote = self._ballot.count()
        self._watch.mark("vote")
        if vote is Vote.FAILED:
            raise next(problem for problem in self._world.all_gather(self._problem) if problem)
        assert self._batch is not None  # the loop asks for no more than the loader has
        return self._batch, vote


def build_decoder(config: Config, world: World) -> tuple[decoders.Decoder, decoders.DecoderName, str]:
    """The same kind of decoder on every process, its name, and why it is that. All processes call it.

    Raises:
        DataError: the one asked for does not work on some process.
    """
    size, batch, threads = config.model.image_size, config.train.micro_batch, num_decoding_threads(config.data)
    name, why = world.run_on_main(lambda: decoders.choose_decoder(config.data.decoder, world.device))
    try:
        return world.run_on_all(lambda: decoders.build_decoder(name, size, batch, threads, world.device)), name, why
    except DataError as error:
        if config.data.decoder != "auto":
            raise
        return decoders.build_decoder("pillow", size, batch, threads, world.device), "pillow", str(error)
