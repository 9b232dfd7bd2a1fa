"""DeepSpeed behind one small class: forward and backward of a micro-batch, an optimizer step, save, load."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from scale_mae.checkpoint import resume
from scale_mae.checkpoint.store import DEEPSPEED_TAG
from scale_mae.config import Config, ConfigError
from scale_mae.distributed.process_group import World
from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing
from scale_mae.engine.deepspeed_config import build_deepspeed_config
from scale_mae.engine.ema import EMA_KEY, WeightEMA
from scale_mae.engine.optimizer import build_optimizer, optimizer_state_keys, parameter_groups, set_lr
from scale_mae.engine.step_skipper import StepSkipper
from scale_mae.engine.trainable import TrainableModule


class Engine:
    """A model under DeepSpeed ZeRO.

    Args:
        model: on the host; moved to the device and sharded here.
        config: precision, clipping, optimizer, sharding, recomputation.
        world: the processes.

    Attributes:
        model: the same module, for use in :meth:`evaluation_mode`; ZeRO-3 gathers weights where modules are called.

    Raises:
        ConfigError: a precision that the device lacks, or a DeepSpeed file that it refuses.
    """

    def __init__(self, model: TrainableModule, config: Config, world: World) -> None:
        self.config, self.world = config, world
        if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError(f"train.precision=fp16 is not supported by this {world.device.type}; use bf16 or fp32")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed would compile a shared-memory collective at every start on a CPU; gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        blocks = model.transformer_blocks
        apply_activation_checkpointing(
            blocks,
            config.train.activation_checkpointing,
            config.train.activation_checkpointing_every,
            uses_rng=model.uses_rng,
        )
        if config.engine.compile:
            for block in blocks:
                block.compile()
        self.model: TrainableModule = model.to(world.device)
        self._names = [group.names for group in parameter_groups(self.model, config.optim)]  # DeepSpeed cuts them up
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._engine, self._optimizer, _, _ = deepspeed.initialize(
                    model=self.model,
                    optimizer=build_optimizer(self.model, config.optim),
                    config=build_deepspeed_config(config, world.size),
                    dist_init_required=False,
                )
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split("For further information")[0].split())
            raise ConfigError(f"engine.deepspeed={config.engine.deepspeed} is refused by DeepSpeed: {reason}") from error

        # Without ZeRO, bf16 and fp16 go through a wrapper of DeepSpeed that needs two corrections (both tested against
        # plain PyTorch). It makes a trial step on zero gradients and leaves AdamW counting it, which spoils the bias
        # correction of the first real steps. And its step divides fp16 gradients by a loss scale that nothing multiplied
        # the loss by.
        unsharded = self.zero_stage == 0 and config.train.precision != "fp32"
        if unsharded:
            self._optimizer.optimizer.state.clear()
        self._scales_loss = unsharded and config.train.precision == "fp16"
        # Plain fp32 without ZeRO knows no norm of its own, and clips before AdamW is called: it is taken before.
        self._plain = self.zero_stage == 0 and config.train.precision == "fp32"
        self._own_norm = torch.zeros(())
        norm = (lambda: self._own_norm) if self._plain else (lambda: self._optimizer._global_grad_norm)
        self._guard = StepSkipper(self._engine.basic_optimizer, norm, world.device)
        if config.optim.ema_decay:
            WeightEMA(self._engine.basic_optimizer, config.optim.ema_decay)
        resume.clear_padding(self._engine, world.rank)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage."""
        return int(self._engine.zero_optimization_stage())

    @property
    def loss_scale(self) -> float:
        """Present loss scale; 1 but for fp16."""
        return float(getattr(self._optimizer, "cur_scale", getattr(self._optimizer, "loss_scale", 1.0)))

    @property
    def last_step_skipped(self) -> Tensor:
        """1 when the last step had gradients that were not finite and was left out, else 0; a float on the device."""
        return self._guard.skipped

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far; those of fp16 overflows too. Reading it waits for the accelerator."""
        return int(self._guard.total)

    def forward_backward(self, *inputs: Tensor) -> Tensor:
        """Add the gradients of one micro-batch; its loss, a scalar on the device, not waited for."""
        loss: Tensor = self._engine(*inputs).loss
        self._engine.backward(loss * self.loss_scale if self._scales_loss else loss)
        return loss.detach()

    def step(self, lr: float, *, return_norm: bool = False) -> float | None:
        """After each micro-batch: DeepSpeed applies the update when the last one of the batch is in, unless gradients are not
        finite.

        Args:
            lr: learning rate of this update, of which each group of parameters has its multiple.
            want_norm: return the global norm of the unclipped gradients (this waits for the accelerator); only with the
                last micro-batch. None when it is not finite.
        """
        set_lr(self._optimizer, lr)
        last = self._engine.is_gradient_accumulation_boundary()
        if last and self._plain:
            self._own_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        scale = self.loss_scale if self._scales_loss else 1.0  # the step may change it
        self._engine.step()
        if last:
            self._guard.stepped(bool(getattr(self._optimizer, "overflow", False)))
        if not return_norm:
            return None
        norm = float(self._own_norm if self._plain else self._engine.get_global_grad_norm())
        return norm / scale if 0 <= norm < float("inf") else None

    @contextmanager
    def evaluation_mode(self, ema: bool = False) -> Iterator[None]:
        """``model`` in evaluation mode, without gradients, between two steps. All processes enter and leave it.

        Args:
            ema: with the moving average in place of the trained weights, which come back bit for bit at the end. Nothing can be
                saved meanwhile. Before the first step the average is the weights.

        Raises:
            ValueError: ``optim.ema_decay`` keeps no average.
        """
        if ema and not self.config.optim.ema_decay:
            raise ValueError("there is no moving average of the weights without optim.ema_decay")
        with ExitStack() as back, torch.no_grad():
            back.callback(self.model.train, self.model.training)
            self.model.eval()
            if ema:
                # values change places, so that no memory is taken and what DeepSpeed points to stays where it is
                resume.exchange(self._engine, self.world.rank, EMA_KEY)
                back.callback(resume.exchange, self._engine, self.world.rank, EMA_KEY)
            yield

    def weights_are_finite(self) -> bool:
        """Whether this process's weights hold no NaN and no infinity."""
        shards = [getattr(p, "ds_tensor", p).detach() for p in self.model.parameters()]
        return bool(torch.stack([s.isfinite().all() for s in shards]).all())

    def save(self, folder: Path, state: dict[str, Any]) -> list[Path]:
        """Write model, optimizer and ``state`` to ``folder`` in DeepSpeed's layout. All processes call it.

        Args:
            folder: the same for all processes, or each process's own.
            state: whatever is to be found again in ``ZeroReader.state``.

        Returns:
            The files that this process wrote.

        Raises:
            OSError: this process could not write; raised after all have passed DeepSpeed's barriers.
        """
        problems: list[Exception] = []
        written: list[Path] = []
        engine, files = self._engine, self._engine.checkpoint_engine
        write = files.save

        # An error on one process must not leave the others waiting in DeepSpeed's barriers: keep it until the end.
        def attempt(action: Callable[[], object]) -> None:
            try:
                action()
            except (OSError, RuntimeError) as error:  # torch's writer calls a full disk a RuntimeError
                problems.append(error)

        def save(state_dict: Any, path: str) -> None:
            written.append(Path(path))
            attempt(lambda: write(state_dict, path))

        attempt(lambda: (folder / DEEPSPEED_TAG).mkdir(parents=True, exist_ok=True))
        with (
            patch.object(files, "save", save),
            patch.object(files, "makedirs"),  # the first process would make the folder, on its own node
            patch.object(engine, "_copy_recovery_script"),  # scale-mae convert does that work
        ):
            engine.skipped_steps = self.skipped_steps
            client = {"scale_mae": state | {"engine": resume.counters(engine), "parameter_groups": self._names}}
            engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, client_state=client, save_latest=False)
        for problem in problems:
            raise problem if isinstance(problem, OSError) else OSError(_what_it_is(problem)) from problem
        if self.world.is_main:
            (folder / "latest").write_text(DEEPSPEED_TAG)  # for DeepSpeed's own tools
            written.append(folder / "latest")
        return written

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what :meth:`save` wrote, on any number of processes and at any stage; its ``state``.

        Hyper-parameters stay those of the Config. All processes call it.

        Raises:
            CheckpointError: it cannot be read, or is not of this model; raised on all processes.
        """
        engine, rank, keys = self._engine, self.world.rank, optimizer_state_keys(self.config.optim)
        reader = self.world.run_on_all(lambda: resume.open_for(engine, folder / DEEPSPEED_TAG, keys))
        self.world.run_on_all(lambda: resume.fill(engine, reader, rank, keys))
        resume.publish(engine, rank)
        self._guard.total.fill_(max(self.skipped_steps, engine.skipped_steps))  # going back does not undo what was counted
        return reader.state


def _what_it_is(error: Exception) -> str:
    """Torch's writer of files knows no reasons: ``[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0``."""
    ended_early = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter"))
    return "a file could not be written to its end: the disk is full or not writable" if ended_early else str(error)
