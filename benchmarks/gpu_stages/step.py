"""Speed and memory of a training step: our engine over sizes, compilation, recomputation and ZeRO stages, and transformers.

The engine trains in bf16 in one process. The peer is transformers' ViTMAEForPreTraining with automatic mixed precision (fp32
weights, fused AdamW), in the same process with the same weights and the same batch; both take turns. Compilation is that of
each transformer block, in both.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from training import TINY_DECODER, Trial, engine_step, engine_world, free, make_inputs, matmul_rate, mixed, peer_of, times_of

from gpu_stages.stage import OutOfTime, Stage
from scale_mae.metrics.peak_flops import peak_flops
from scale_mae.model.mae import MAE, build_mae

BATCHES = (64, 128, 256, 512, 1024, 2048)
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
RESERVE = 0.97  # of the free memory; the rest is lost between the allocator's blocks
ALIKE = 0.97  # of the highest speed: the smallest batch this fast serves the later cases; it takes less time and memory
MOST = 4  # the largest estimate of a batch, in batches that have run: a peak may hardly grow with the batch
SECONDS = 2.0  # of the timed steps of a batch, about
EAGER_NEEDS, COMPILED_NEEDS = 20.0, 75.0  # seconds of a case; of a compiled one until the first has been measured


@dataclass(frozen=True)
class Case:
    """Steps of our engine, and in turns with them of the peer where ``amp`` names its precision."""

    size: str
    compiled: bool = False
    policy: str = "none"
    zero: str = "zero1"
    amp: str | None = None
    search: bool = (
        False  # try all batches and the largest one that fits; else one as fast as the fastest of the size's first case
    )

    @property
    def name(self) -> str:
        mode = "compiled" if self.compiled else "eager"
        peer = f" against AMP {self.amp}" if self.amp else " largest batch" if self.compiled and self.search else ""
        return f"{self.size} {mode} {self.policy} {self.zero}{peer}"


def cases() -> list[Case]:
    """The most valuable first."""
    sizes, policies = ("large", "base", "huge"), ("selective", "full")
    return [
        Case("large", amp="bf16", search=True),
        Case("large", compiled=True, amp="bf16"),
        Case("base", amp="bf16", search=True),
        Case("huge", amp="bf16", search=True),
        Case("base", compiled=True, amp="bf16"),
        Case("huge", compiled=True, amp="bf16"),
        Case("large", amp="fp16"),
        Case("large", compiled=True, amp="fp16"),
        *(Case("large", policy=policy, search=True) for policy in policies),
        *(Case("large", zero=zero) for zero in ("zero0", "zero2", "zero3")),
        *(Case(size, policy=policy, search=True) for size in ("huge", "base") for policy in policies),
        *(Case(size, compiled=True, policy=policy, search=True) for policy in ("none", *policies) for size in sizes),
    ]


def rehearsed() -> list[Case]:
    """Each kind of case once, in what a CPU does in seconds. Compilation comes last; it may need more time than there is."""
    return [
        Case("nano", amp="bf16", search=True),
        Case("nano", amp="fp16"),
        Case("nano", policy="selective", search=True),
        Case("nano", zero="zero3"),
        Case("nano", compiled=True, amp="bf16"),
    ]


def run(stage: Stage) -> None:
    with engine_world(stage.device, rehearse=stage.rehearse) as world:
        with stage.case("peak speed"):
            name = torch.cuda.get_device_name(stage.device) if stage.device.type == "cuda" else "cpu"
            stage.result["peak_flops_per_s"] = peak_flops(name, "bf16")
            stage.result["matmul_flops_per_s"] = matmul_rate(torch.bfloat16, stage.device)
        examination, late = Examination(stage, world), []
        for case in rehearsed() if stage.rehearse else cases():
            try:
                examination.take(case)
            except OutOfTime as error:  # a shorter case may still fit
                late.append(str(error))
        stage.result["left_out"] = late
        if late and not stage.rehearse:
            raise OutOfTime(f"{len(late)} cases are left out")


class Examination:
    """Takes the cases; remembers the fastest batch of each size and how long a compiled case takes."""

    def __init__(self, stage: Stage, world: Any) -> None:
        self.stage, self.world, self.device = stage, world, stage.device
        self.fastest: dict[str, int] = {}
        self.eager_needs, self.compiled_needs = (0.0, 25.0) if stage.rehearse else (EAGER_NEEDS, COMPILED_NEEDS)
        self.rounds = 1 if stage.rehearse else 5

    def take(self, case: Case) -> None:
        """Measure one case. What has been measured before an error stays in the result."""
        needs = self.compiled_needs if case.compiled else self.eager_needs
        before = self.stage.left()
        with self.stage.case(case.name, needs=needs) as found:
            model = self.build(case.size)
            found.update(train_flops_per_image=model.flops().train, batches=[])
            trial = Trial(model, self.world, case.size, case.policy, case.compiled, case.zero)
            try:
                self.measure(case, trial, found)
                if case.amp:
                    self.compare(case, trial, found)
            finally:
                trial.close()
            if case.compiled:
                self.compiled_needs = 1.2 * (before - self.stage.left())

    def build(self, size: str) -> MAE:
        """Made on the device, where random numbers are fast, and kept by the host, so that it takes no memory there."""
        side, decoder = (64, TINY_DECODER) if self.stage.rehearse else (224, {})
        with self.device:
            return build_mae(size, image_size=(side, side), seed=0, **decoder).cpu()

    def measure(self, case: Case, trial: Trial, found: dict[str, Any]) -> None:
        """Speed at one batch or at all that fit, and the largest that fits."""
        static = self.allocated()
        first = self.fastest.get(case.size, self.batches()[0])
        for batch in self.batches() if case.search and not case.compiled else [first]:
            if (found["batches"] and self.limit(found, static) < batch) or not self.tried(trial, batch, found):
                break
        if not found["batches"]:
            raise torch.OutOfMemoryError(f"a batch of {first} does not fit")
        found["fastest_batch"] = max(found["batches"], key=lambda tried: tried["batch"] / median(tried["step_s"]))["batch"]
        if not case.compiled and case.policy == "none" and case.search:
            speeds = {tried["batch"]: tried["batch"] / median(tried["step_s"]) for tried in found["batches"]}
            self.fastest[case.size] = min(batch for batch in speeds if speeds[batch] >= ALIKE * max(speeds.values()))
        if case.search:
            found["largest_batch"] = self.largest(trial, found, static)

    def largest(self, trial: Trial, found: dict[str, Any], static: int) -> int:
        """The largest batch that has run; the estimate is tried, then a few smaller ones."""
        known = max(tried["batch"] for tried in found["batches"])
        if self.device.type != "cuda":
            return known
        found["largest_batch_estimated"] = self.limit(found, static)
        for share in (1.0, 0.96, 0.9):
            batch = int(found["largest_batch_estimated"] * share) // 8 * 8
            if batch <= known:
                break
            if self.tried(trial, batch, found, rounds=1):
                return batch
        return known

    def tried(self, trial: Trial, batch: int, found: dict[str, Any], rounds: int | None = None) -> bool:
        """Whether a batch fits; its speed and memory are added to the result."""
        fits = True
        try:
            found["batches"].append(trial.measure(batch, rounds or self.rounds_of(batch, found["batches"])))
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # outside of the handler, where the traceback still holds the activations
            trial.close()
        self.stage.save()
        return fits

    def rounds_of(self, batch: int, tried: list[dict[str, Any]]) -> int:
        """How often to time a batch, by the speed of the last one: less often where a step is long. A round is four steps."""
        if not tried:
            return self.rounds
        seconds = 4 * median(tried[-1]["step_s"]) * batch / tried[-1]["batch"]
        return min(self.rounds, max(2, round(SECONDS / seconds)))

    def compare(self, case: Case, trial: Trial, found: dict[str, Any]) -> None:
        """Ours and the peer in turns, at our fastest batch, or one about as fast, or the largest half of it that fits both."""
        batch = self.fastest.get(case.size, found["fastest_batch"])
        while batch:
            compared = None
            with suppress(torch.OutOfMemoryError):
                compared = self.compared(case, trial, batch, found["batches"])
            if compared:
                found["peer"] = compared
                self.fastest[case.size] = batch  # a compiled case would compile in vain for one that does not fit
                return
            trial.close()
            batch //= 2

    def compared(self, case: Case, trial: Trial, batch: int, tried: list[dict[str, Any]]) -> dict[str, Any]:
        before = self.allocated()
        with self.device:
            peer = peer_of(trial.model).to(self.device)
        if case.compiled:
            for layer in [*peer.vit.layers, *peer.decoder.decoder_layers]:
                layer.compile()
        if trial.engine is None:
            trial.run(batch, 1)
        steps = {"ours": engine_step(trial.engine), "peer": mixed(peer, AMP[case.amp or "bf16"])}
        images, noise = make_inputs(trial.model, batch, self.device)
        first_loss = steps["peer"](images, noise).item()
        for step in steps.values():  # compiles, makes the optimizer's state, and fills the allocator
            step(images, noise)
            step(images, noise)
        times: dict[str, list[float]] = {name: [] for name in steps}
        peaks = {}
        for turn in range(min(self.rounds, 1 + self.rounds_of(batch, tried))):
            for name in list(steps)[:: -1 if turn % 2 else 1]:
                self.reset_peak()
                times[name] += times_of(partial(steps[name], images, noise), self.device, 1)
                peaks[name] = self.peak()
        ratios = [theirs / mine for mine, theirs in zip(times["ours"], times["peer"], strict=True)]
        return {
            "precision": case.amp,
            "batch": batch,
            "step_s": times,
            "speed_ours_by_peer": median(ratios),
            "speed_ours_by_peer_range": [min(ratios), max(ratios)],
            "first_loss": first_loss,
            "peak_bytes_with_both": peaks,
            "bytes_before_peer": before,
            "graphs_of_both": torch._dynamo.utils.counters["stats"]["unique_graphs"],  # 4 of a compiled case
        }

    def batches(self) -> tuple[int, ...]:
        return (2, 4) if self.stage.rehearse else BATCHES

    def limit(self, found: dict[str, Any], static: int) -> float:
        """The largest batch that should fit, by those that have run. A CPU has no limit."""
        return largest_batch(found["batches"], static, self.memory()) if self.device.type == "cuda" else float("inf")

    def memory(self) -> int:
        """Bytes of the GPU that tensors may use."""
        free(self.device)
        return int(RESERVE * (torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_allocated(self.device)))

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def largest_batch(tried: list[dict[str, Any]], static: int, memory: int) -> int:
    """The largest batch by a straight line through the peaks of the last two batches, or through ``static`` bytes at 0.

    Small batches may all have the peak of the optimizer, so that the line says nothing.
    """
    (low, less), (high, more) = [(0, static), *((each["batch"], each["peak_bytes"]) for each in tried)][-2:]
    slope = (more - less) / (high - low)
    return int(min(MOST * high, high + (memory - more) / slope)) if slope > 0 else MOST * high


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    return [_row(case, result) for case in result["cases"] if "train_flops_per_image" in case or "error" in case]


def _row(case: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    name, flops = case["case"], case.get("train_flops_per_image", 0)
    tried = [each for each in case.get("batches", []) if each["batch"] == case.get("fastest_batch", each["batch"])]
    row = {"case": name.partition(" against")[0]} | ({"batch": "failed"} if "error" in case else {})
    if tried:
        speed = tried[0]["batch"] / median(tried[0]["step_s"])
        row |= {"batch": str(tried[0]["batch"]), "images/s": f"{speed:.1f}"}
        for column, key in (("MFU", "peak_flops_per_s"), ("of matmul speed", "matmul_flops_per_s")):
            row[column] = f"{speed * flops / result[key]:.1%}" if result.get(key) else "-"
        row["peak GiB"] = f"{tried[0]['peak_bytes'] / 2**30:.1f}" if tried[0]["peak_bytes"] else "-"
        row["largest"] = str(case.get("largest_batch", "-"))
    if peer := case.get("peer"):
        low, high = peer["speed_ours_by_peer_range"]
        ratio = f"{peer['speed_ours_by_peer']:.2f} ({low:.2f}-{high:.2f})"
        row["speed / transformers"] = f"{ratio}, AMP {peer['precision']}, batch {peer['batch']}"
    return row
