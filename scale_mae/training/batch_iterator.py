"""Batches of all processes in lockstep, with a vote on whether to continue; and the loader and decoder they come from."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from types import TracebackType

from scale_mae.config import Config
from scale_mae.data import decoders
from scale_mae.data.errors import DataError
from scale_mae.data.index import Index
from scale_mae.data.loader import Batch, BatchShard, Loader, num_decoding_threads
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.distributed.process_group import World
from scale_mae.distributed.signals import StopRequest
from scale_mae.distributed.stop_vote import StopVote, Vote
from scale_mae.metrics.sinks import print_to_stderr
from scale_mae.metrics.step_timer import StepTimer


class BatchIterator:
    """Iterates over batches, with a vote on each: a process that cannot load a batch, or must stop, informs all others.

    The vote on the next batch is cast while the accelerator works on the current one. All processes get its result before
    the next forward pass. Use it as a context manager: at the end, it stops the loader and counts the pending vote.

    Args:
        batches: Batches of this process.
        world: The process group.
        stop: Whether this process must stop.
        step_timer: Gets the phases ``data`` and ``vote``.
    """

    def __init__(self, batches: Generator[Batch, None, None], world: World, stop: StopRequest, step_timer: StepTimer) -> None:
        self._batches, self._world, self._stop, self._step_timer = batches, world, stop, step_timer
        self._vote = StopVote(world)
        self._batch: Batch | None = None
        self._error: DataError | None = None
        self.fetch_next()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._batches.close()
        if kind is None:  # after an error, other processes may be gone and would never vote
            self._vote.count()

    def fetch_next(self) -> None:
        """Fetch the next batch, if there is one, and cast the vote on it."""
        vote = Vote.STOP if self._stop.reason else Vote.CONTINUE
        try:
            self._batch = next(self._batches, None)
        except DataError as error:
            self._error, vote = error, Vote.FAILED
        except Exception as error:  # a bug must not leave the other processes waiting
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            self._error = DataError(f"rank {self._world.rank}: a batch cannot be loaded ({reason}). See the traceback above.")
            vote = Vote.FAILED
        self._step_timer.mark("data")
        self._vote.cast(vote)

    def take(self) -> tuple[Batch, Vote]:
        """Return the fetched batch, and the largest vote of all processes.

        Raises:
            DataError: At least one process could not load its batch. Raised on all processes.
        """
        vote = self._vote.count()
        self._step_timer.mark("vote")
        if vote is Vote.FAILED:
            raise next(error for error in self._world.all_gather(self._error) if error)
        assert self._batch is not None  # the training loop takes no more batches than the loader has
        return self._batch, vote


def build_loader(config: Config, world: World, index: Index, plan: SamplePlan, num_patches: int) -> tuple[Loader, str]:
    """Build the loader of this process, and a message for the log that names the decoder. All processes call this.

    Raises:
        DataError: The decoder that ``data.decoder`` names does not work on at least one process.
    """
    train = config.train
    decoder, name, reason = _build_decoder(config, world)
    loader = Loader(
        index,
        plan,
        BatchShard(world.rank, world.size, train.micro_batch, config.accumulation(world.size)),
        config.data,
        decoder,
        config.model.image_size,
        num_patches,
        pin_memory=world.device.type == "cuda",
        warn=lambda message: print_to_stderr(f"rank {world.rank}: {message}"),
    )
    return loader, f"Data: {len(index)} images, data.decoder={name} ({reason})."


def _build_decoder(config: Config, world: World) -> tuple[decoders.Decoder, decoders.DecoderName, str]:
    """Build the same kind of decoder on all processes. Return it, its name, and why it was chosen."""
    size, batch, threads = config.model.image_size, config.train.micro_batch, num_decoding_threads(config.data)
    name, reason = world.run_on_main(lambda: decoders.choose_decoder(config.data.decoder, world.device))
    try:
        return world.run_on_all(lambda: decoders.build_decoder(name, size, batch, threads, world.device)), name, reason
    except DataError as error:
        if config.data.decoder != "auto":
            raise
        return decoders.build_decoder("pillow", size, batch, threads, world.device), "pillow", str(error)
