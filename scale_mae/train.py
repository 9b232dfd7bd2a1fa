"""Pre-training from top to bottom: build everything in visible order, then the loop."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint import store
from scale_mae.checkpoint.commit import Saver, versions
from scale_mae.checkpoint.initial import first_model
from scale_mae.config import Config, UserError, load_config
from scale_mae.data import decoders
from scale_mae.data.failures import Tally
from scale_mae.data.index import Index
from scale_mae.data.loader import Loader, Share, decoding_threads
from scale_mae.data.pixels import normalise
from scale_mae.data.plan import SamplePlan
from scale_mae.data.storage import DataError
from scale_mae.engine.deepspeed import Engine
from scale_mae.engine.distributed import StopRequest, Vote, World, world
from scale_mae.engine.optim import make_schedule, parameter_names
from scale_mae.engine.watchdog import Watchdog
from scale_mae.feed import Feed
from scale_mae.instruments import make_instruments, start_facts
from scale_mae.launcher import rank_and_size
from scale_mae.lock import alone
from scale_mae.metrics.sinks import to_stderr
from scale_mae.metrics.trackers import check_packages
from scale_mae.outcome import Outcome
from scale_mae.pace import Pace
from scale_mae.run_directory import check_same_data, find_index, prepare_directory
from scale_mae.telling import Newest, Teller


class NonFiniteError(UserError):
    """The loss, or a weight, became NaN or infinite."""


@dataclass(frozen=True)
class Result:
    """How a call of :func:`pretrain` ended.

    Attributes:
        run_dir: the run directory.
        step: optimizer steps done.
        finished: whether that is the end of the schedule; if not, the same call continues.
        stopped: what stopped it, such as ``stopped by SIGTERM after step 12``; empty when nothing did.
    """

    run_dir: Path
    step: int
    finished: bool
    stopped: str


def pretrain(recipe: str | Path | Config, **overrides: Any) -> Result:
    """Pre-train a masked autoencoder, or continue where the run directory's newest checkpoint stands.

    Every process of a job calls this; rank and number of processes come from torchrun or Slurm.

    Args:
        recipe: a shipped name (``demo``, ``debug``, ``vit_base``, ``vit_large``, ``vit_huge``), a YAML file, or a Config.
        overrides: sections with the keys to change, e.g. ``train={"global_batch": 256}``.

    Raises:
        UserError: anything that the caller can put right; one line.
    """
    if isinstance(recipe, Config) and overrides:
        raise UserError("overrides go with a recipe's name or file, not with a Config; use load_config(recipe, overrides)")
    config = recipe if isinstance(recipe, Config) else load_config(recipe, overrides)
    config.accumulation(rank_and_size()[1])  # what can be told before the processes meet is told before
    config.deepspeed_json()
    check_packages(config.log.sinks)
    run_dir = Path(config.run.dir)
    with StopRequest() as stop, world() as ranks, ExitStack() as held:
        notes: list[str] = []
        lock = alone(run_dir / "run.lock", f"run.dir={run_dir} is in use", notes.append)
        ranks.on_main(lambda: held.enter_context(lock))
        outcome = Outcome(run_dir)
        if ranks.is_main:
            held.enter_context(outcome.told())
        watchdog = held.enter_context(Watchdog(config.run.watchdog, ranks.rank))
        result = _Run(config, ranks, stop, watchdog, notes).loop()
        if ranks.is_main:
            outcome.tell("finished" if result.finished else result.stopped)
        return result


class _Run:
    """The parts of a run, built in the order in which they depend on each other, and the loop over them."""

    def __init__(self, config: Config, ranks: World, stop: StopRequest, watchdog: Watchdog, said: Sequence[str] = ()) -> None:
        self.config, self.ranks, self.stop, self.watchdog = config, ranks, stop, watchdog
        accumulation = config.accumulation(ranks.size)
        self.dir, notes = Path(config.run.dir), [*said]

        # What there is: the run directory, its newest checkpoint, the images
        checkpoint = ranks.on_main(lambda: prepare_directory(self.dir, config, notes))
        path = ranks.on_main(lambda: find_index(self.dir, config.data.source, notes, stop))
        index = ranks.together(lambda: Index.open(path))
        self.digest = index.digest

        # What comes when
        self.schedule = make_schedule(config, len(index))
        self.save_every = config.steps(config.checkpoint.every, len(index))
        plan = SamplePlan(config.run.seed, len(index), config.train.global_batch)

        # The model and its engine, at the step where the run stands
        model = first_model(config, ranks, notes, resumed=bool(checkpoint))
        parameters = sum(p.numel() for p in model.parameters())
        self.names = parameter_names(model)
        self.engine = Engine(model, config, ranks)
        self.step = self.saved = failed_saves = 0
        recent_saves: list[float] = []
        measured: dict[str, Any] | None = None
        self.tally = Tally(config.data.max_failures)
        if checkpoint:
            state = self.engine.load(checkpoint)
            check_same_data(state["data"], index, checkpoint)
            self.step = self.saved = int(state["step"])
            self.tally = Tally(config.data.max_failures, state["failures"])
            failed_saves, recent_saves = int(state["failed_saves"]), state["recent_saves_s"]
            measured = state.get("metrics")
            notes.append(f"resumed from {checkpoint}")
        self.saver = self._saver(parameters, len(index), failed_saves)
        self.pace = Pace(16 * parameters, recent_saves)

        # Batches, measurements, and where they are told
        pin_memory = ranks.device.type == "cuda"
        share = Share(ranks.rank, ranks.size, config.train.micro_batch, accumulation)
        self.decoder, chosen, why = self._decoder(share.micro_batch)
        image_size = config.model.image_size
        warn = functools.partial(_warn, ranks.rank)
        loader = Loader(index, plan, share, config.data, self.decoder, image_size, model.patches, pin_memory, warn)
        self.batches = loader.batches(self.step, self.schedule.total_steps)
        total_steps = self.schedule.total_steps
        instruments = make_instruments(config, ranks, model, len(index), total_steps, self.step, measured)
        self.watch, self.log = instruments.watch, instruments.log
        told = (instruments, ranks, self.tally, self.saver, self.pace, self.decoder)
        skipped = self.engine.skipped_steps
        self.teller = Teller(*told, save_every=self.save_every, newest=Newest.of(checkpoint), skipped_steps=skipped)
        self.teller.record("start", step=self.step, **start_facts(instruments, ranks, self.engine.stage, versions()))
        notes.append(
            f"{config.model.size} on {len(index)} images, {ranks.size} processes on {ranks.device.type}, "
            f"{config.train.precision}, ZeRO-{self.engine.stage}, data.decoder={chosen} ({why}): "
            f"steps {self.step} to {self.schedule.total_steps} of {config.train.global_batch} images "
            f"({accumulation} x {config.train.micro_batch} a process), "
            f"peak learning rate {config.peak_lr:.3g}; run directory {self.dir}"
        )
        for note in notes:
            self.log.say(note)

    def _saver(self, parameters: int, images: int, failures: int) -> Saver:
        config, stage = self.config, self.engine.stage
        every = config.steps(config.checkpoint.keep_every, images) if config.checkpoint.keep_every else None
        module = parameters * (4 if config.train.precision == "fp32" else 2)
        nbytes = module + parameters * 12  # masters and two moments
        alone = module if stage else nbytes  # by the first process; without ZeRO, that is everything
        sizes = {"nbytes": nbytes, "alone": alone}
        return Saver(self.dir, config, self.ranks, zero_stage=stage, **sizes, keep_every=every, failures=failures)

    def _decoder(self, batch: int) -> tuple[decoders.Decoder, decoders.Name, str]:
        """The same kind on every process, its name and why."""
        config, ranks = self.config, self.ranks
        size, threads = config.model.image_size, decoding_threads(config.data)
        name, why = ranks.on_main(lambda: decoders.choose(config.data.decoder, ranks.device))
        try:
            return ranks.together(lambda: decoders.make(name, size, batch, threads, ranks.device)), name, why
        except DataError as error:
            if config.data.decoder != "auto":
                raise
            return decoders.make("pillow", size, batch, threads, ranks.device), "pillow", str(error)

    def loop(self) -> Result:
        """Step until the schedule ends or a signal comes; a checkpoint is the last thing written."""
        total, stopped = self.schedule.total_steps, ""
        with self.log, ExitStack() as last, self.saver:
            last.push(lambda _, error, __: self.teller.end(self.step, stopped or str(error or "finished")))
            feed = Feed(self.batches, self.ranks, self.stop, self.watch)
            first_bad = torch.full((), math.inf, device=self.ranks.device)
            verdict = Vote.GO_ON
            try:
                while self.step < total and verdict is Vote.GO_ON:
                    self.stop.lead, began = self.pace.lead, time.perf_counter()
                    verdict, first_bad = self._one_step(feed, first_bad)
                    self.pace.stepped(time.perf_counter() - began)
                    if self.step % self.save_every == 0:
                        self._save(first_bad)
            except DataError:
                self._save(first_bad)  # the steps before the bad image are sound
                raise
            self._save(first_bad)
            self.watchdog.beat()
            self.saver.drain()
            self.teller.saves()
            if self.stop.received or verdict is Vote.STOP:
                stopped = f"stopped by {self.stop.received or 'a signal on another process'} after step {self.step}"
                self.log.say(stopped)
            if self.saver.error:
                raise self.saver.error
        return Result(self.dir, self.step, self.step >= total, stopped)

    def _one_step(self, feed: Feed, first_bad: torch.Tensor) -> tuple[Vote, torch.Tensor]:
        """One optimizer step. Nothing here waits for the accelerator unless the step is logged."""
        step, config, ranks = self.step, self.config, self.ranks
        lr = self.schedule.lr(step)
        accumulation = config.accumulation(ranks.size)
        logged = (step + 1) % config.log.every == 0 or step + 1 == self.schedule.total_steps
        loss, norm, verdict = torch.zeros((), device=ranks.device), None, Vote.GO_ON
        for micro_step in range(accumulation):
            batch, vote = feed.take()
            verdict = max(verdict, vote)
            images, noise = (t.to(ranks.device, non_blocking=True) for t in (batch.images, batch.noise))
            jitter = None if batch.jitter is None else batch.jitter.to(ranks.device, non_blocking=True)
            images = normalise(images, config.data.mean, config.data.std, jitter)
            self.teller.add(batch.failures)
            loss += self.engine.forward_backward(images, noise) / accumulation
            self.watch.lap("backward")
            norm = self.engine.step(lr, want_norm=logged and micro_step + 1 == accumulation)
            self.watch.lap("optimizer")
            feed.advance()
        first_bad = torch.minimum(first_bad, torch.where(loss.isfinite(), math.inf, float(step + 1)))
        self.step += 1
        self.watchdog.beat()
        self.watch.stepped()
        if logged:
            self._check_finite(first_bad)
            (mean_loss,) = ranks.reduce(loss[None] / ranks.size, "sum")
            self.teller.step(self.step, mean_loss, lr, norm, self.engine.loss_scale, self.engine.skipped_steps)
        return verdict, first_bad

    def _check_finite(self, first_bad: torch.Tensor) -> None:
        (bad,) = self.ranks.reduce(first_bad[None].clone(), "min")
        if bad < math.inf:
            raise NonFiniteError(self._non_finite(f"loss is not finite at step {int(bad)}"))

    def _non_finite(self, what: str) -> str:
        self.saver.drain()
        whole = store.checkpoints(self.dir)  # saves that were lost are none of them
        return (
            f"{what}; stopped, nothing saved from it (last checkpoint: {whole[-1] if whole else 'none'}); "
            "lower optim.base_lr, set optim.clip_grad_norm, or use train.precision=bf16"
        )

    def _save(self, first_bad: torch.Tensor) -> None:
        """Write a checkpoint of the present step, unless there is one or the run has gone bad."""
        self.teller.failures(self.step)
        if self.step == self.saved:
            return
        self.watch.lap("other")
        self._check_finite(first_bad)
        if not all(self.ranks.gather(self.engine.weights_are_finite())):
            raise NonFiniteError(self._non_finite(f"weights are not finite after step {self.step}"))
        self.saver.drain()  # what the last one came to belongs into this one
        self.teller.saves()
        state = {
            "step": self.step,
            "parameter_groups": self.names,
            "data": self.digest,
            "failures": self.tally.state(),
            "failed_saves": self.saver.failures,
            "recent_saves_s": list(self.pace.saves),
            "metrics": self.teller.state(),
        }
        self.watchdog.beat()  # a save has as long as a step
        self.saver.save(self.step, lambda folder: self.engine.save(folder, state))
        self.saved = self.step
        self.watchdog.beat()
        self.watch.lap("checkpoint")
        self.teller.saves()


def _warn(rank: int, message: str) -> None:
    """From any process and thread, at once."""
    to_stderr(f"rank {rank}: {message}")
