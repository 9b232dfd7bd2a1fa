"""DeepSpeed behind one class, :class:`Engine`: forward and backward passes, optimizer steps, save and load."""

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

from scale_mae.checkpoint.elastic_resume import load_local_partitions, open_matching_checkpoint, read_counters
from scale_mae.checkpoint.partitions import clear_padding, copy_masters_to_model, swap_masters_with_state
from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.config import Config, ConfigError
from scale_mae.distributed.process_group import World
from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing
from scale_mae.engine.deepspeed_config import build_deepspeed_config
from scale_mae.engine.ema import EMA_KEY, WeightEMA
from scale_mae.engine.optimizer import build_optimizer, build_parameter_groups, get_optimizer_state_keys, set_lr
from scale_mae.engine.step_skipper import StepSkipper
from scale_mae.engine.trainable import TrainableModule


class Engine:
    """A model that DeepSpeed trains with ZeRO.

    Args:
        model: The model on the host. The engine moves it to the device and shards it.
        config: The configuration of the run.
        world: The process group.

    Attributes:
        model: The same module. Use it inside :meth:`evaluation_mode`. With ZeRO-3, weights are gathered when a module is
            called.

    Raises:
        ConfigError: The device does not support the precision, or DeepSpeed rejects its configuration.
    """

    def __init__(self, model: TrainableModule, config: Config, world: World) -> None:
        self.config, self.world = config, world
        if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError(f"train.precision=fp16: this {world.device.type} does not support it. Use bf16 or fp32.")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed would compile a shared-memory collective at every start on a CPU. gloo does not need it.
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
        # taken before DeepSpeed splits the groups
        self._group_names = [group.names for group in build_parameter_groups(self.model, config.optim)]
        self._engine, self._optimizer = _initialize_deepspeed(self.model, config, world)

        # Without ZeRO, DeepSpeed wraps the optimizer for bf16 and fp16. The wrapper needs two corrections; tests compare
        # both with plain PyTorch. First, it makes a trial step on zero gradients that AdamW counts, which would make the
        # bias correction of the first real steps wrong. Second, its step divides fp16 gradients by a loss scale that was
        # never applied to the loss.
        wrapped = self.zero_stage == 0 and config.train.precision != "fp32"
        if wrapped:
            self._optimizer.optimizer.state.clear()
        self._scales_loss = wrapped and config.train.precision == "fp16"
        # In fp32 without ZeRO, DeepSpeed keeps no gradient norm and clips before it calls AdamW. So the engine computes
        # the norm before the step.
        self._computes_norm = self.zero_stage == 0 and config.train.precision == "fp32"
        self._norm = torch.zeros(())
        norm = (lambda: self._norm) if self._computes_norm else (lambda: self._optimizer._global_grad_norm)
        self._step_skipper = StepSkipper(self._engine.basic_optimizer, norm, world.device)
        if config.optim.ema_decay:
            WeightEMA(self._engine.basic_optimizer, config.optim.ema_decay)
        clear_padding(self._engine, world.rank)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage."""
        return int(self._engine.zero_optimization_stage())

    @property
    def loss_scale(self) -> float:
        """The current loss scale of fp16. It is 1 in other precisions."""
        return float(getattr(self._optimizer, "cur_scale", getattr(self._optimizer, "loss_scale", 1.0)))

    @property
    def last_step_skipped(self) -> Tensor:
        """1 if the last step was skipped because its gradients were not finite, else 0; a float scalar on the device."""
        return self._step_skipper.skipped

    @property
    def skipped_steps(self) -> int:
        """The number of skipped steps so far, including fp16 overflows. Reading it waits for the accelerator."""
        return int(self._step_skipper.total)

    def forward_backward(self, *inputs: Tensor) -> Tensor:
        """Add the gradients of one micro-batch, and return its loss as a scalar on the device, without waiting for it."""
        loss: Tensor = self._engine(*inputs).loss
        self._engine.backward(loss * self.loss_scale if self._scales_loss else loss)
        return loss.detach()

    def step(self, lr: float, *, return_norm: bool = False) -> float | None:
        """Update the weights if this was the last micro-batch of the global batch and its gradients are finite.

        Call this after every :meth:`forward_backward`.

        Args:
            lr: Learning rate of the update. Each parameter group multiplies it by its ``lr_scale``.
            return_norm: Return the global norm of the unclipped gradients, or None if it is not finite. This waits for
                the accelerator. Set it only with the last micro-batch.
        """
        set_lr(self._optimizer, lr)
        is_last = self._engine.is_gradient_accumulation_boundary()
        if is_last and self._computes_norm:
            self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        scale = self.loss_scale if self._scales_loss else 1.0  # read now, because the step may change it
        self._engine.step()
        if is_last:
            self._step_skipper.count_step(bool(getattr(self._optimizer, "overflow", False)))
        if not return_norm:
            return None
        norm = float(self._norm if self._computes_norm else self._engine.get_global_grad_norm())
        return norm / scale if 0 <= norm < float("inf") else None

    @contextmanager
    def evaluation_mode(self, ema: bool = False) -> Iterator[None]:
        """Put :attr:`model` in evaluation mode without gradients. Enter this between two steps, on all processes.

        Args:
            ema: Exchange the weights with their EMA. The weights are restored bit for bit at the end. Do not save
                meanwhile. Before the first step, the EMA equals the weights.

        Raises:
            ValueError: ``ema`` without ``optim.ema_decay``.
        """
        if ema and not self.config.optim.ema_decay:
            raise ValueError("the EMA of the weights needs optim.ema_decay")
        with ExitStack() as restore, torch.no_grad():
            restore.callback(self.model.train, self.model.training)
            self.model.eval()
            if ema:
                # in place: this needs no memory, and DeepSpeed's references to the tensors stay valid
                swap_masters_with_state(self._engine, self.world.rank, EMA_KEY)
                restore.callback(swap_masters_with_state, self._engine, self.world.rank, EMA_KEY)
            yield

    def weights_are_finite(self) -> bool:
        """Return whether this process's weights contain no NaN and no infinity."""
        shards = [getattr(p, "ds_tensor", p).detach() for p in self.model.parameters()]
        return bool(torch.stack([s.isfinite().all() for s in shards]).all())

    def save(self, folder: Path, state: dict[str, Any]) -> list[Path]:
        """Write model, optimizer and ``state`` to ``folder`` in DeepSpeed's layout. All processes call this.

        Args:
            folder: The same folder on all processes, or a folder of each process.
            state: What :meth:`load` and ``ZeroReader.state`` return.

        Returns:
            The files that this process wrote.

        Raises:
            OSError: This process could not write. It is raised after all processes have passed DeepSpeed's barriers.
        """
        errors: list[Exception] = []
        written: list[Path] = []
        engine, writer = self._engine, self._engine.checkpoint_engine
        write = writer.save

        # If one process failed at once, the others would wait in DeepSpeed's barriers. So errors are kept until the end.
        def keep_error(action: Callable[[], object]) -> None:
            try:
                action()
            except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
                errors.append(error)

        def save(state_dict: Any, path: str) -> None:
            written.append(Path(path))
            keep_error(lambda: write(state_dict, path))

        keep_error(lambda: (folder / DEEPSPEED_TAG).mkdir(parents=True, exist_ok=True))
        with (
            patch.object(writer, "save", save),
            patch.object(writer, "makedirs"),  # only rank 0 would make the folder, on its own node
            patch.object(engine, "_copy_recovery_script"),  # scale-mae convert replaces that script
        ):
            engine.skipped_steps = self.skipped_steps
            client = {"scale_mae": state | {"engine": read_counters(engine), "parameter_groups": self._group_names}}
            engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, client_state=client, save_latest=False)
        for error in errors:
            raise error if isinstance(error, OSError) else OSError(_write_error(error)) from error
        if self.world.is_main:
            (folder / "latest").write_text(DEEPSPEED_TAG)  # for DeepSpeed's own tools
            written.append(folder / "latest")
        return written

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what :meth:`save` wrote, on any number of processes and with any ZeRO stage, and return its ``state``.

        Hyper-parameters come from the config, not from the checkpoint. All processes call this.

        Raises:
            CheckpointError: The checkpoint cannot be read, or belongs to another model. Raised on all processes.
        """
        engine, rank, keys = self._engine, self.world.rank, get_optimizer_state_keys(self.config.optim)
        reader = self.world.run_on_all(lambda: open_matching_checkpoint(engine, folder / DEEPSPEED_TAG, keys))
        self.world.run_on_all(lambda: load_local_partitions(engine, reader, rank, keys))
        copy_masters_to_model(engine, rank)
        # a rollback does not reduce the count
        self._step_skipper.total.fill_(max(self.skipped_steps, engine.skipped_steps))
        return reader.state


def _initialize_deepspeed(model: TrainableModule, config: Config, world: World) -> tuple[Any, Any]:
    """Return DeepSpeed's engine and its optimizer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config.optim),
                config=build_deepspeed_config(config, world.size),
                dist_init_required=False,
            )
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split("For further information")[0].split())
        raise ConfigError(f"engine.deepspeed={config.engine.deepspeed}: DeepSpeed rejects it: {reason}") from error
    return engine, optimizer


def _write_error(error: Exception) -> str:
    """Return a readable message for errors of torch's writer.

    An example of such an error is ``[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0``.
    """
    is_truncated = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter"))
    return "a file could not be written completely: the disk is full or not writable" if is_truncated else str(error)
