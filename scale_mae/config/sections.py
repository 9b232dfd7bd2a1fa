"""The sections of a configuration. Every field says its meaning and unit; those marked free may change when a run resumes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _policy(text: str | None) -> str | None:
    if text and not re.fullmatch(rf"rand(-({RANDAUGMENT}))*", text):  # timm passes over some of what it does not know
        raise ValueError(
            f"data.randaugment={text}: not a policy of timm's; it is rand and any of -m9 (magnitude), -n2 (operations), -p0.5 "
            "(probability of each), -mstd0.5 (deviation of the magnitude), -mmax10 (its limit), -inc1, -tweights, -t3a, -t3aw"
        )
    return text


Side = Annotated[int, Field(gt=0)]
Pixels = Annotated[tuple[Side, Side], BeforeValidator(_pair, json_schema_input_type=int | tuple[int, int])]
DURATION = r"^\d+(\.\d+)?(e\d{1,2})? (steps|epochs|images)$"
RANDAUGMENT = r"(m|mmax)\d+|n[1-9]|p(0|1|0?\.\d+|1\.0+)|mstd\d+(\.\d+)?|inc[01]|t(weights|3a|3aw)"
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
MaybePath = Annotated[str | None, BeforeValidator(lambda text: text or None)]
CHANGEABLE: dict[str, Any] = {"may_change_on_resume": True}  # marks a key that does not change what a run computes
Duration = Annotated[str, BeforeValidator(str, json_schema_input_type=str), Field(pattern=DURATION)]


class Section(BaseModel):
    """Base of all sections: immutable, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def may_change_on_resume(field: FieldInfo) -> bool:
    """Whether a resumed run may have another value of this key, because it does not change what the run computes."""
    return isinstance(field.json_schema_extra, dict) and CHANGEABLE.items() <= field.json_schema_extra.items()


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    dir: str = "runs/{recipe}"
    """Run directory; ``{recipe}`` is the recipe's name. The same command in the same directory resumes."""
    task: Literal["pretrain", "finetune", "linprobe"] = "pretrain"
    """What is trained: a masked autoencoder; a classifier, from the weights of model.init_from or from scratch; a linear
    classifier on a frozen encoder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, sample order, crops, flips and masks."""
    watchdog_minutes: float = Field(15.0, ge=0, json_schema_extra=CHANGEABLE)
    """Minutes without a step or a checkpoint after which every process writes the stacks of its threads and ends. Time before
    the first step does not count. 0: never."""


class ModelConfig(Section):
    """The masked autoencoder; of a classifier its encoder, to which masking, target and decoder mean nothing."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge", "giant", "2b"] = "base"
    """Encoder: base/16, large/16, huge/14, giant/14, 2b/14; tiny and small with patch 16; nano is for demonstrations."""
    image_size: Pixels = (224, 224)
    """Image side, or [height, width], in pixels."""
    patch_size: Pixels | None = None
    """Patch side, or [height, width], in pixels; must divide the image. Empty: the size's own, 14 or 16."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches hidden from the encoder."""
    target: Literal["norm_pixel", "pixel"] = "norm_pixel"
    """What is predicted: pixels normalised by each patch's own mean and deviation, or plain pixels."""
    decoder_width: int = Field(512, gt=0, multiple_of=4)
    """Width of the decoder."""
    decoder_depth: int = Field(8, gt=0)
    """Transformer blocks of the decoder."""
    decoder_heads: int = Field(16, gt=0)
    """Attention heads of the decoder; must divide its width."""
    init_from: MaybePath = None
    """Weights to begin with: a file or folder of ours, the reference, timm or Hugging Face. Empty: random, from run.seed."""

    @property
    def patch(self) -> tuple[int, int]:
        """Patch (height, width) in pixels, the size's own when none is given."""
        return self.patch_size or ((14, 14) if self.size in ("huge", "giant", "2b") else (16, 16))

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if any(side % p for side, p in zip(self.image_size, self.patch, strict=True)):
            raise ValueError(
                f"model.image_size={list(self.image_size)} is not divisible by model.patch_size={list(self.patch)}"
            )
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"model.decoder_width={self.decoder_width} is not divisible by model.decoder_heads={self.decoder_heads}"
            )
        rows, columns = (side // p for side, p in zip(self.image_size, self.patch, strict=True))
        if not 0 < int(rows * columns * (1 - self.mask_ratio)) < rows * columns:
            raise ValueError(
                f"model.mask_ratio={self.mask_ratio} keeps all or none of the {rows * columns} patches of "
                f"model.image_size={list(self.image_size)} at model.patch_size={list(self.patch)}"
            )
        return self


class DataConfig(Section):
    """Images and how they are cut."""

    source: str = "demo:train"
    """An index (scale-mae index), or what one is made of: class folders (root/class/image), a folder or {00..99} brace list
    of tar shards, a list, annotations, a named layout such as imagenet1k:train:/data/imagenet, or the shipped demo:train."""
    decoder: Literal["auto", "pillow", "dali_cpu", "dali_gpu"] = Field("auto", json_schema_extra=CHANGEABLE)
    """What decodes; all give the same images, within 8 of 255. auto: DALI on the GPU if there is one, else DALI on the CPU if
    it can be imported, else Pillow."""
    augmentation: Literal["none", "fixed_crop", "random_crop", "random_crop_once", "random_crop_jitter"] = "random_crop"
    """none: the centre, 7/8 of the short side; fixed_crop: the same size anywhere; random_crop: random size, shape and place,
    drawn again where it does not fit; random_crop_once: likewise, but cut to the image where it does not fit, as the paper's
    linear probe does; random_crop_jitter: random_crop and colour jitter."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and largest share of the image's area that a random crop takes."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width-to-height ratio of a random crop."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    color_jitter: tuple[NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.4)
    """Strength of brightness, contrast and saturation jitter, for augmentation=random_crop_jitter only."""
    randaugment: Annotated[MaybePath, AfterValidator(_policy)] = None
    """RandAugment after crop and flip, in timm's notation, e.g. rand-m9-mstd0.5-inc1. Empty: none."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means (red, green, blue) subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations (red, green, blue) that images are divided by."""
    threads: int | None = Field(None, gt=0, json_schema_extra=CHANGEABLE)
    """Decoding threads of each process. Empty: this machine's cores shared among its processes."""
    prefetch: int | None = Field(None, gt=0, json_schema_extra=CHANGEABLE)
    """Micro-batches decoded ahead of the step that needs them. Empty: enough to keep all threads busy, within an eighth of
    the memory."""
    max_failure_ratio: float = Field(0.001, ge=0, le=1, json_schema_extra=CHANGEABLE)
    """Share of the last 100,000 images that may be unreadable (each is replaced by another) before the run stops."""

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale={[low, high]} must satisfy 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio={[low, high]} must satisfy 0 < low <= high")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={list(self.std)} must be positive")
        return self


class OptimConfig(Section):
    """The optimizer and its learning rate: linear warm-up from 0, then half a cosine."""

    name: Literal["adamw", "lars"] = "adamw"
    """AdamW, or LARS (You et al. 2017) for large batches on few parameters; LARS needs engine.deepspeed=zero0."""
    base_lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate per 256 images of global batch: peak = base_lr * train.global_batch / 256."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule."""
    warmup: Duration = "40 epochs"
    """Length of the linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of all parameters but biases and one-dimensional ones; of a classifier neither class token nor positions decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: Beta = 0.9
    """Momentum of LARS."""
    trust_coefficient: float = Field(0.001, gt=0)
    """Trust coefficient of LARS."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of each block as a share of that of the block above it; the head has the full one. 1: the same for all."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, taken after each step, which is evaluated and exported besides. Empty: none."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it. Empty: no clipping."""


class ClassifyConfig(Section):
    """What makes a classifier of an encoder, for run.task=finetune and linprobe only."""

    val_source: MaybePath = None
    """Labelled images to evaluate on: a source with the classes of data.source. Empty: no evaluation."""
    eval_interval: Duration = Field("1 epochs", json_schema_extra=CHANGEABLE)
    """Time between evaluations; the last step is always followed by one."""
    crop_pct: float | None = Field(None, gt=0, le=1, json_schema_extra=CHANGEABLE)
    """Share of the scaled short side that is evaluated. Empty: as published, 224/256 up to 224 pixels, all of it above."""
    pool: Literal["mean", "token"] = "mean"
    """What the head sees: the mean of the patch tokens, normalised after; or the class token."""
    trainable_blocks: float | None = Field(None, ge=0)
    """Last blocks of the encoder that are trained, with the norm after them and the head; 0.5 is the MLP of the last. Empty:
    everything. Of a linear probe nothing is trained but the head."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: probability of leaving out the last block's branches, from 0 for the first block in equal steps."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup. 0: none."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix. 0: none."""
    mixup_switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix where both are on."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability of random erasing of an image, filled with noise a pixel."""
    lr_multipliers: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Linear probes trained at once on the same features, each at such a multiple of the learning rate; the best is kept."""

    @model_validator(mode="after")
    def _trains(self) -> ClassifyConfig:
        if self.trainable_blocks is not None and self.trainable_blocks % 1 not in (0, 0.5):
            raise ValueError(
                f"classify.trainable_blocks={self.trainable_blocks}: whole blocks, or a half for the MLP of the first of them"
            )
        if not self.lr_multipliers:
            raise ValueError("classify.lr_multipliers is empty; leave it out for one probe")
        return self


class TrainConfig(Section):
    """Length, batch and arithmetic."""

    duration: Duration = "800 epochs"
    """Length of the schedule."""
    global_batch: int = Field(4096, gt=0)
    """Images of one optimizer step, over all processes."""
    micro_batch: int = Field(64, gt=0, json_schema_extra=CHANGEABLE)
    """Images of one forward pass of one process; accumulation = global_batch / (micro_batch * processes)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of forward and backward; weights and moments are kept in fp32, fp16 scales its loss dynamically."""
    activation_checkpointing: Literal["none", "full", "every_k", "selective", "offload"] = Field(
        "none", json_schema_extra=CHANGEABLE
    )
    """Activations recomputed in the backward pass: none, those of every block, of every k-th block, of all but the matrix
    products, or of every block with the block inputs kept in host memory."""
    activation_checkpointing_every: int = Field(2, gt=0, json_schema_extra=CHANGEABLE)
    """k of recompute=every_k."""


class EngineConfig(Section):
    """DeepSpeed and compilation."""

    deepspeed: str = Field("zero2", json_schema_extra=CHANGEABLE)
    """A shipped DeepSpeed file (zero0, zero1, zero2, zero3, zero2_offload, zero3_offload) or a path to a JSON file."""
    compile: bool = Field(False, json_schema_extra=CHANGEABLE)
    """Compile the transformer blocks with torch.compile."""


class CheckpointConfig(Section):
    """When to save and how much to keep."""

    interval: Duration = Field("20 epochs", json_schema_extra=CHANGEABLE)
    """Time between checkpoints; one is also written at the end and on SIGTERM or SIGINT."""
    keep_latest: int = Field(3, gt=0, json_schema_extra=CHANGEABLE)
    """Newest checkpoints kept."""
    keep_interval: Duration | None = Field(None, json_schema_extra=CHANGEABLE)
    """Kept for good besides: the first checkpoint of every such stretch of the schedule. Empty: none."""
    local_dir: MaybePath = Field(None, json_schema_extra=CHANGEABLE)
    """Folder on each node's own disk. A save then waits for that disk only; a thread copies it to the run directory.
    Empty: straight to the run directory."""


class LogConfig(Section):
    """How often to look, and where it is told."""

    interval: int = Field(20, gt=0, json_schema_extra=CHANGEABLE)
    """Steps between log lines; the only moments at which the host waits for the accelerator."""
    metrics_port: int | None = Field(0, ge=0, lt=65536, json_schema_extra=CHANGEABLE)
    """Port of each node's Prometheus exporter. 0: any free one, which Prometheus learns from the discovery folder. Empty: no
    exporter."""
    discovery_dir: MaybePath = Field(None, json_schema_extra=CHANGEABLE)
    """Shared folder that Prometheus' file-based discovery watches. Empty: ``prometheus`` beside the run directory."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), json_schema_extra=CHANGEABLE)
    """Where metrics go besides; the package of that name must be installed."""


class RollbackConfig(Section):
    """When a run goes back to its last good checkpoint and leaves out the images between. Steps with non-finite gradients
    are skipped always."""

    spike_threshold: float | None = Field(12.0, gt=0, json_schema_extra=CHANGEABLE)
    """A loss so many deviations (found from the median absolute one) above the window's median is too high. Empty: never."""
    window: int = Field(200, ge=20, json_schema_extra=CHANGEABLE)
    """Steps of that window; nothing is judged until it is full."""
    max_spikes: int = Field(5, gt=0, json_schema_extra=CHANGEABLE)
    """Steps that are too high before a run goes back; a good step between them takes back one."""
    max_skipped_steps: int = Field(10, gt=0, json_schema_extra=CHANGEABLE)
    """Steps in a row with non-finite gradients before a run goes back."""
    max_rollbacks: int = Field(3, ge=0, json_schema_extra=CHANGEABLE)
    """Times that a run goes back before it stops."""
