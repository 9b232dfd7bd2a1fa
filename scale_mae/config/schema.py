"""The sections of a configuration. The docstring of a key is its description in the JSON Schema and the reference page."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scale_mae.config.field_types import (
    CHANGEABLE,
    DecayRate,
    Duration,
    NonNegative,
    OptionalText,
    Pixels,
    RandAugment,
    Section,
)


class RunConfig(Section):
    """Where the run is stored, what it trains, and its seed."""

    dir: str = "runs/{recipe}"
    """Run directory. It contains the logs and checkpoints. `{recipe}` stands for the name of the recipe. The same command with
    the same directory resumes the run from its newest intact checkpoint."""
    task: Literal["pretrain", "finetune", "linprobe"] = "pretrain"
    """What to train. `pretrain`: a masked autoencoder. `finetune`: a classifier, starting from the weights in
    `model.init_from` or from scratch. `linprobe`: a linear classifier on a frozen encoder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the sample order, the crops, the flips and the masks."""
    watchdog_minutes: float = Field(15.0, ge=0, json_schema_extra=CHANGEABLE)
    """Minutes without progress after which every process prints the stacks of its threads and exits. Finished steps,
    checkpoints and evaluated batches are progress. The time before the first step does not count. `0` disables the watchdog."""


class ModelConfig(Section):
    """The masked autoencoder, or the encoder of a classifier. A classifier ignores masking, target and decoder."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge", "giant", "2b"] = "base"
    """Size of the ViT encoder. The default patch side is 14 pixels for `huge`, `giant` and `2b`, and 16 pixels for the others.
    `nano` is for demonstrations and tests."""
    image_size: Pixels = (224, 224)
    """Side of a square image, or `[height, width]`, in pixels. It must be divisible by the patch size."""
    patch_size: Pixels | None = None
    """Side of a square patch, or `[height, width]`, in pixels. `null` means the default of `model.size`, 14 or 16."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Fraction of the patches that the encoder does not see."""
    target: Literal["norm_pixel", "pixel"] = "norm_pixel"
    """What the decoder predicts. `norm_pixel`: the pixels of a patch, normalized by the mean and standard deviation of that
    patch. `pixel`: the pixels as the model receives them."""
    decoder_width: int = Field(512, gt=0, multiple_of=4)
    """Embedding dimension of the decoder. It must be divisible by 4 and by `model.decoder_heads`."""
    decoder_depth: int = Field(8, gt=0)
    """Number of transformer blocks in the decoder."""
    decoder_heads: int = Field(16, gt=0)
    """Number of attention heads in each decoder block."""
    init_from: OptionalText = None
    """Weights to start from: a run directory, a checkpoint or an exported file of scale_mae, or weights from the reference
    repository (facebookresearch/mae), timm or Hugging Face. `null` means random weights, drawn with `run.seed`."""

    @property
    def patch(self) -> tuple[int, int]:
        """Patch (height, width) in pixels: ``patch_size``, or the default of ``size``."""
        return self.patch_size or ((14, 14) if self.size in ("huge", "giant", "2b") else (16, 16))

    @model_validator(mode="after")
    def _check_divisibility(self) -> ModelConfig:
        image, patch = list(self.image_size), list(self.patch)
        if any(side % p for side, p in zip(image, patch, strict=True)):
            raise ValueError(f"model.image_size={image} is not divisible by model.patch_size={patch}. Change one of them.")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"model.decoder_width={self.decoder_width} is not divisible by model.decoder_heads={self.decoder_heads}. "
                "Change one of them."
            )
        rows, columns = (side // p for side, p in zip(image, patch, strict=True))
        if not 0 < int(rows * columns * (1 - self.mask_ratio)) < rows * columns:
            raise ValueError(
                f"model.mask_ratio={self.mask_ratio} keeps all or none of the {rows * columns} patches of "
                f"model.image_size={image} with model.patch_size={patch}. Set a ratio that keeps at least one and hides at "
                "least one."
            )
        return self


class DataConfig(Section):
    """The images, and how they are decoded, cropped and augmented."""

    source: str = "demo:train"
    """Images to train on: an index file (made by `scale-mae index`), class folders (`root/class/image`), tar shards, a list of
    files, an annotation file, a named data set such as `imagenet1k:train:/data/imagenet`, or the shipped `demo:train`.
    `scale-mae sources` lists all kinds with an example of each."""
    decoder: Literal["auto", "pillow", "dali_cpu", "dali_gpu"] = Field("auto", json_schema_extra=CHANGEABLE)
    """Image decoder. The decoders produce the same images, up to a difference of 8 in a pixel value of 0 to 255. `auto` means
    DALI on the GPU if there is one, otherwise DALI on the CPU if it can be imported, otherwise Pillow."""
    augmentation: Literal["none", "fixed_crop", "random_crop", "random_crop_once", "random_crop_jitter"] = "random_crop"
    """How images are cropped. `none`: the center, 7/8 of the short side, without flips. `fixed_crop`: a crop of the same size
    at a random place. `random_crop`: a crop of random area, aspect ratio and place (RandomResizedCrop of torchvision).
    `random_crop_once`: as `random_crop`, but a crop that does not fit is clipped to the image instead of drawn again, as
    for the linear probes of the MAE paper. `random_crop_jitter`: `random_crop` followed by color jitter."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the area of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a random crop."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    color_jitter: tuple[NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.4)
    """Strength of the jitter of brightness, contrast and saturation, as in ColorJitter of torchvision. A strength of 0.4 draws
    a factor from 0.6 to 1.4. It is used only with `data.augmentation=random_crop_jitter`."""
    randaugment: RandAugment = None
    """RandAugment policy in the notation of timm, such as `rand-m9-mstd0.5-inc1`. It is applied after crop and flip. `null`
    disables RandAugment."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channel, for pixel values from 0 to 1. It is subtracted from the images."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channel, for pixel values from 0 to 1. The images are divided by it."""
    threads: int | None = Field(None, gt=0, json_schema_extra=CHANGEABLE)
    """Number of decoding threads of each process. With `null`, the processes of a node share its cores equally."""
    prefetch: int | None = Field(None, gt=0, json_schema_extra=CHANGEABLE)
    """Number of micro-batches that each process decodes in advance. With `null`, it decodes enough to keep all threads busy,
    but the processes of a node together use at most an eighth of its free memory."""
    max_failure_ratio: float = Field(0.001, ge=0, le=1, json_schema_extra=CHANGEABLE)
    """Largest fraction of unreadable images among the last 100,000 images. Each unreadable image is replaced by another one.
    With the default, the run stops with an error if more than 100 of the last 100,000 images are unreadable."""

    @model_validator(mode="after")
    def _check_ranges(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale={[low, high]}: not two ascending fractions. Set 0 < smallest <= largest <= 1.")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio={[low, high]}: not two ascending ratios. Set 0 < smallest <= largest.")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={list(self.std)}: a value is not positive. Set positive values.")
        return self


class OptimConfig(Section):
    """The optimizer and its learning rate: a linear warm-up from 0, then half a cosine."""

    name: Literal["adamw", "lars"] = "adamw"
    """Optimizer. `adamw`: AdamW. `lars`: LARS (You et al. 2017), for large batches and few parameters, such as linear probes.
    It requires `engine.deepspeed=zero0`."""
    base_lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate for a global batch of 256 images. The peak learning rate of the run is
    `optim.base_lr * train.global_batch / 256`."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule."""
    warmup: Duration = "40 epochs"
    """Length of the warm-up: a number and a unit, such as `40 epochs`, `1000 steps` or `5e6 images`."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay. Biases and other one-dimensional parameters have none. In a classifier, the class token and the position
    embeddings have none either."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of the first and second moment of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon of AdamW, a small number that is added to the denominator of the update."""
    momentum: DecayRate = 0.9
    """Momentum of LARS."""
    trust_coefficient: float = Field(0.001, gt=0)
    """Trust coefficient of LARS."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise learning-rate decay of a classifier. Each block has this multiple of the learning rate of the block after it,
    and the head has the full learning rate. `1` means the same learning rate for all layers."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average (EMA) of the weights. It is updated after each step and evaluated in addition to
    the weights, and can be exported. `null` disables the EMA."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest global norm of the gradients. Larger gradients are scaled down to it. `null` disables clipping."""


class ClassifyConfig(Section):
    """The classifier on top of the encoder. It applies to `run.task=finetune` and `run.task=linprobe` only."""

    val_source: OptionalText = None
    """Labeled images to evaluate on, with the same classes as `data.source`. `null` disables evaluation."""
    eval_interval: Duration = Field("1 epochs", json_schema_extra=CHANGEABLE)
    """Interval between evaluations, such as `1 epochs` or `500 steps`. The run also evaluates after its last step."""
    crop_pct: float | None = Field(None, gt=0, le=1, json_schema_extra=CHANGEABLE)
    """Fraction of the short side that the center crop of an evaluation keeps. `null` means the values of the reference
    implementation: 224/256 for images of up to 224 pixels, and 1 for larger images."""
    pool: Literal["mean", "token"] = "mean"
    """Features that the head receives. `mean`: the mean of the patch tokens, followed by a layer norm. `token`: the class
    token."""
    trainable_blocks: float | None = Field(None, ge=0)
    """Number of blocks to train, counted from the last, together with the final layer norm and the head. A half adds the MLP
    of one more block: `0.5` trains the MLP of the last block. `0` trains the head only. `null` trains everything. A linear
    probe always trains the head only."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: the probability that the last block skips a residual branch. The probability grows linearly from 0 in
    the first block."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing: the probability that the target distributes equally over all classes. `0` disables it."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup. `0` disables mixup. Mixup and CutMix require an even `train.micro_batch`."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix. `0` disables CutMix."""
    mixup_switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix instead of mixup when both are enabled."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle of an image is replaced by noise."""
    lr_multipliers: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Multiples of the learning rate, for `run.task=linprobe`. One linear probe is trained for each of them, all on the same
    features. The result is that of the best probe."""

    @model_validator(mode="after")
    def _check_trainable_parts(self) -> ClassifyConfig:
        if self.trainable_blocks is not None and self.trainable_blocks % 1 not in (0, 0.5):
            raise ValueError(
                f"classify.trainable_blocks={self.trainable_blocks}: not a multiple of 0.5. Set a whole or half number."
            )
        if not self.lr_multipliers:
            raise ValueError("classify.lr_multipliers=[]: no value. Set at least one, such as [1.0].")
        return self


class TrainConfig(Section):
    """Length of the run, batch size, precision and activation checkpointing."""

    duration: Duration = "800 epochs"
    """Length of the run: a number and a unit, such as `800 epochs`, `1000 steps` or `5e6 images`."""
    global_batch: int = Field(4096, gt=0)
    """Images per optimizer step, over all processes. It must be divisible by `train.micro_batch` times the number of
    processes. The quotient is the number of gradient accumulation steps."""
    micro_batch: int = Field(64, gt=0, json_schema_extra=CHANGEABLE)
    """Images per forward pass of one process."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward and backward pass. Weights and optimizer state are always kept in fp32. `fp16` uses dynamic
    loss scaling."""
    activation_checkpointing: Literal["none", "full", "every_k", "selective", "offload"] = Field(
        "none", json_schema_extra=CHANGEABLE
    )
    """Activations that the backward pass computes again, which saves memory. `none`: none. `full`: all activations of every
    block. `every_k`: all activations of every k-th block. `selective`: all but the results of matrix products and attention.
    `offload`: as `full`, with the inputs of the blocks in host memory."""
    activation_checkpointing_every: int = Field(2, gt=0, json_schema_extra=CHANGEABLE)
    """The k of `train.activation_checkpointing=every_k`."""


class EngineConfig(Section):
    """DeepSpeed and compilation."""

    deepspeed: str = Field("zero2", json_schema_extra=CHANGEABLE)
    """DeepSpeed configuration: `zero0`, `zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload`, or the path of a JSON
    file. The number is the ZeRO stage. `offload` keeps the optimizer state, and with ZeRO-3 the parameters, in host memory."""
    compile: bool = Field(False, json_schema_extra=CHANGEABLE)
    """Whether to compile the transformer blocks with `torch.compile`."""


class CheckpointConfig(Section):
    """When to save checkpoints and which of them to keep."""

    interval: Duration = Field("20 epochs", json_schema_extra=CHANGEABLE)
    """Interval between checkpoints, such as `20 epochs` or `1000 steps`. The run also saves one after its last step, on
    SIGTERM, SIGINT, SIGUSR1 or SIGHUP, and before the time limit of its Slurm job."""
    keep_latest: int = Field(3, gt=0, json_schema_extra=CHANGEABLE)
    """Number of newest checkpoints to keep."""
    keep_interval: Duration | None = Field(None, json_schema_extra=CHANGEABLE)
    """Interval of checkpoints to keep permanently, such as `200 epochs`: the first checkpoint at or after each multiple of it.
    `null` means that only the newest checkpoints are kept."""
    local_dir: OptionalText = Field(None, json_schema_extra=CHANGEABLE)
    """Folder on a local disk of each node. Training waits only until a checkpoint is on this disk, and a background thread
    copies it to the run directory. `null` means that checkpoints are written directly to the run directory."""


class LogConfig(Section):
    """How often metrics are logged, and where they go."""

    interval: int = Field(20, gt=0, json_schema_extra=CHANGEABLE)
    """Steps between log lines. The host waits for the accelerator only at these steps."""
    metrics_port: int | None = Field(0, ge=0, lt=65536, json_schema_extra=CHANGEABLE)
    """Port of the Prometheus exporter of each node. `0` means any free port, which Prometheus finds through
    `log.discovery_dir`. `null` disables the exporter."""
    discovery_dir: OptionalText = Field(None, json_schema_extra=CHANGEABLE)
    """Shared folder for the file-based service discovery of Prometheus. `null` means the folder `prometheus` next to the run
    directory."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), json_schema_extra=CHANGEABLE)
    """Experiment trackers that receive the metrics as well. The package of each tracker must be installed."""


class RollbackConfig(Section):
    """When a run rolls back to its last good checkpoint and skips the images that led to the anomaly. A single step with
    non-finite gradients is always skipped and needs no rollback."""

    spike_threshold: float | None = Field(12.0, gt=0, json_schema_extra=CHANGEABLE)
    """A loss is a spike if it is more than this number of standard deviations above the median loss of the last good steps.
    The standard deviation is estimated from the median absolute deviation. `null` disables the detection of spikes."""
    window: int = Field(200, ge=20, json_schema_extra=CHANGEABLE)
    """Number of good steps over which the median and the deviation are computed. Before that many steps, no loss is a spike."""
    max_spikes: int = Field(5, gt=0, json_schema_extra=CHANGEABLE)
    """Number of spikes that triggers a rollback. Each good step between them lowers the count by one."""
    max_skipped_steps: int = Field(10, gt=0, json_schema_extra=CHANGEABLE)
    """Number of consecutive steps with non-finite gradients that triggers a rollback."""
    max_rollbacks: int = Field(3, ge=0, json_schema_extra=CHANGEABLE)
    """Largest number of rollbacks in a run. If one more is needed, the run stops with an error."""
