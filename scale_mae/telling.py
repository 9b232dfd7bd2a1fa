"""What a run tells of itself: images that had to be replaced, saves, and the metrics of a log step."""

from __future__ import annotations

from collections.abc import Sequence

from scale_mae.checkpoint.commit import Saver
from scale_mae.data.decoders import Decoder
from scale_mae.data.failures import Failure, Tally
from scale_mae.engine.distributed import World
from scale_mae.metrics.meter import Meter, Metrics
from scale_mae.metrics.sinks import Log
from scale_mae.pace import Pace


class Teller:
    """Gathers from all processes and tells on the first one. All processes call the same methods at the same steps.

    Args:
        log: where it is told.
        ranks: the processes.
        meter: of speed.
        tally: of replaced images.
        saver: asked how its saves ended.
        pace: told how long they took.
        decoder: asked for its fallbacks.
        global_batch: images of one step.
    """

    def __init__(
        self, log: Log, ranks: World, meter: Meter, tally: Tally, saver: Saver, pace: Pace, decoder: Decoder, global_batch: int
    ) -> None:
        self.log, self.meter, self.tally, self.saver, self.pace = log, meter, tally, saver, pace
        self._ranks, self.decoder, self._global_batch = ranks, decoder, global_batch
        self._failures: list[Failure] = []
        self._failure_metrics: Metrics = {}

    def add(self, failures: Sequence[Failure]) -> None:
        """Remember what this process had to replace."""
        self._failures += failures

    def failures(self, step: int) -> list[Failure]:
        """Name and count the images of all processes that had to be replaced since the last call."""
        found = self._ranks.gather((self._failures, self.decoder.fallbacks))
        self._failures = []
        failures = [failure for failures, _ in found for failure in failures]
        for failure in failures:
            self.log.say(str(failure))
        self.tally.add(step * self._global_batch, failures)
        self._failure_metrics = {
            "decode_failures": sum(self.tally.causes.values()),
            **{f"decode_failures_{cause.name.lower()}": number for cause, number in self.tally.causes.items()},
            "decoder_fallbacks": sum(fallbacks for _, fallbacks in found),
        }
        return failures

    def saves(self) -> None:
        """Tell of the saves that have ended since the last call."""
        for saved in self.saver.ended():
            self.meter.pause(saved.stalled)
            self.pace.saved(saved.seconds)
            stall = f"; training stood still for {saved.stalled:.1f} s of it" if saved.stalled < saved.seconds else ""
            told = f"saved {saved.path} in {saved.seconds:.1f} s{stall}"
            self.log.say(f"checkpoint lost, {self.saver.failures} so far: {saved.error}" if saved.error else told)
            for note in saved.notes:
                self.log.say(note)

    def step(
        self, step: int, loss: float, lr: float, norm: float | None, loss_scale: float, skipped_steps: int, rollbacks: int
    ) -> None:
        """The metrics of a log step; see :meth:`Meter.read`. ``rollbacks``: times that the run has gone back.

        Raises:
            DataError: more images were replaced than ``data.max_failures`` allows.
        """
        metrics = self.meter.read(step, loss, lr, norm, loss_scale, skipped_steps)
        failures = self.failures(step)
        self.saves()
        counts = {"checkpoint_failures": self.saver.failures, "rollbacks": rollbacks}
        self.log.metrics(metrics | self._failure_metrics | counts)
        self.tally.check(step * self._global_batch, failures)
