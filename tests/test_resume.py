"""Elastic resume: from any number of ranks, ZeRO stage and precision to any other. Tests compare values and later losses."""

import ctypes
import gc
import itertools
import json
import pickle
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from torch import nn

from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config, ConfigError
from scale_mae.engine.schedule import LRSchedule
from scale_mae.model.mae import MAE
from scale_mae.model.sizes import EncoderSize

BATCH, SAVED, STEPS = 12, 2, 4
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
SCHEDULE = LRSchedule(peak_lr=2e-3, min_lr=0.0, warmup_steps=1, total_steps=STEPS)
TINY = EncoderSize(width=20, depth=2, heads=2, patch_size=4)
ZERO = {  # DeepSpeed configurations in addition to the shipped ones
    "robin": {"stage": 2, "round_robin_gradients": True},
    "aligned": {"stage": 1, "parameter_alignment": True},
    "pieces": {"stage": 3, "sub_group_size": 1000, "stage3_param_persistence_threshold": 0},
    "whole": {"stage": 3, "sub_group_size": 3000, "stage3_param_persistence_threshold": 10**6},
    "sums": {"stage": 1},
}


class OddModel(MAE):
    """A model whose tensors cannot be split equally. One of them has fewer values than there are ranks."""

    def __init__(self, size=TINY):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(size, image_size=(16, 16), patch_size=(4, 4), decoder_width=28, decoder_depth=1, decoder_heads=2)
            self.prime, self.three = nn.Parameter(torch.randn(7, 11)), nn.Parameter(torch.randn(3))
            self.register_buffer("seen", torch.zeros(3))

    def forward(self, images, noise):
        self.seen += 1
        out = super().forward(images, noise)
        return out._replace(loss=out.loss + 0.1 * (self.prime.square().mean() + self.three.square().mean()).float())


def make_config(folder, layout, precision="fp32", micro_batch=1):
    path = folder / f"{layout}.json"
    if layout in ZERO and not path.exists():
        extra = {"data_types": {"grad_accum_dtype": "fp32"}} if layout == "sums" else {}
        path.write_text(json.dumps({"zero_optimization": ZERO[layout], **extra}))
    return Config.model_validate(
        {
            "train": {"global_batch": BATCH, "micro_batch": micro_batch, "precision": precision},
            "engine": {"deepspeed": str(path) if layout in ZERO else layout},
        }
    )


def train(engine, ranks, config, steps, overflows=()):
    """Train some steps and return their losses. In the steps of ``overflows`` the fp16 gradients overflow."""
    accumulation, micro = config.accumulation(ranks.size), config.train.micro_batch
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, noise = torch.randn(BATCH, 3, 16, 16, generator=generator), torch.rand(BATCH, 16, generator=generator)
        total = torch.zeros(())
        for number in range(accumulation):
            first = (number * ranks.size + ranks.rank) * micro
            part = slice(first, first + micro)
            total += engine.forward_backward(images[part] * (1e18 if step in overflows else 1), noise[part]) / accumulation
            engine.step(SCHEDULE.lr(step), return_norm=False)
        losses.append(ranks.all_reduce_sum(total[None] / ranks.size)[0])
    return losses


def save(engine, folder, step=SAVED):
    return engine.save(folder, {"step": step})


def build(config, ranks, size=TINY):
    from deepspeed.accelerator import get_accelerator

    from scale_mae.engine.deepspeed import Engine

    get_accelerator().is_fp16_supported = lambda: True  # PyTorch supports fp16 on a CPU, slowly
    return Engine(OddModel(size), config, ranks)


def check_weights(engine, folder):
    """Check that the model's weights, as DeepSpeed gathers them, are the rounded weights of a checkpoint."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    reader = ZeroReader(folder / DEEPSPEED_TAG)
    for name, p in engine.model.named_parameters():
        with GatheredParameters([p], enabled=engine.zero_stage == 3):
            assert torch.equal(p.detach(), reader[name].to(p.dtype)), name
    for name, buffer in engine.model.named_buffers():
        assert torch.equal(buffer, reader[name]), name


def check_padding(engine, ranks):
    """Check that all padding is zero, and that the ranks together hold each value of a parameter once."""
    from scale_mae.checkpoint.partitions import iterate_local_partitions

    held = []
    for partition, slices in iterate_local_partitions(engine._engine, ranks.rank):
        state = engine._engine.basic_optimizer.state[partition]
        for values in (partition, *(state[key] for key in KEYS[1:] if state)):
            padding = values.detach().clone().view(-1)
            for part in slices:
                padding[part.offset : part.offset + part.stop - part.start] = 0
            assert not padding.any()
        held += [(part.name, part.start, part.stop) for part in slices]
    if engine.zero_stage:
        held = sorted(itertools.chain(*ranks.all_gather(held)))
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.model.named_parameters()}
        for name, parts in itertools.groupby(held, key=lambda part: part[0]):
            ranges = list(parts)
            assert [start for _, start, _ in ranges] == [0] + [stop for _, _, stop in ranges[:-1]]
            assert ranges[-1][2] == sizes.pop(name)
        assert not sizes


def assert_same(one, other):
    """Check that two checkpoints are equal, bit for bit."""
    one, other = ZeroReader(one / DEEPSPEED_TAG), ZeroReader(other / DEEPSPEED_TAG)
    assert set(one) == set(other)
    for name in set(one) - set(one.parameters):
        assert torch.equal(one[name], other[name]), name
    for name in one.parameters:
        assert one.optimizer_step(name) == other.optimizer_step(name)
        for key in KEYS if one.optimizer_step(name) else KEYS[:1]:
            assert torch.equal(one.flat(name, key), other.flat(name, key)), (name, key)
    assert one.step == other.step
    scalers = [reader.state["engine"].pop("loss_scaler") for reader in (one, other)]
    shared = scalers[0].keys() & scalers[1].keys()  # some of DeepSpeed's scalers have more attributes
    assert [scalers[0][key] for key in shared] == [scalers[1][key] for key in shared]
    assert one.state == other.state


def freeze_imported_objects():
    """Exclude the objects that the fork server imported from garbage collection, which would otherwise be slow."""
    gc.collect()
    gc.freeze()


# ---------------------------------------------------------------- the same ranks and stage

LAYOUTS = [
    *(("fp32", name) for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    *(("fp32", name) for name in ("robin", "aligned", "pieces", "whole")),
    *(("bf16", name) for name in ("zero0", "zero1", "zero2", "zero3", "sums")),
    *(("fp16", name) for name in ("zero0", "zero2", "zero3")),
]


def write(folder, layouts):
    """For each layout: train, save and continue; then resume from the save.

    Return the losses, loss scales and skipped steps of both, and the files that were written.
    """
    from scale_mae.distributed.process_group import process_group

    freeze_imported_objects()
    results = {}
    with process_group() as ranks:
        for precision, name in layouts:
            config = make_config(folder, name, precision, micro_batch=6)
            here = folder / f"{precision}-{name}"
            engine = build(config, ranks)
            train(engine, ranks, config, range(SAVED), overflows=[1] if precision == "fp16" else [])
            files = save(engine, here / "saved")
            undisturbed = train(engine, ranks, config, range(SAVED, STEPS)), engine.loss_scale, engine.skipped_steps
            save(engine, here / "undisturbed")
            engine = build(config, ranks)
            assert engine.load(here / "saved")["step"] == SAVED
            check_weights(engine, here / "saved")
            check_padding(engine, ranks)
            save(engine, here / "again")
            resumed = train(engine, ranks, config, range(SAVED, STEPS)), engine.loss_scale, engine.skipped_steps
            save(engine, here / "resumed")
            results[precision, name] = undisturbed, resumed, files
    return results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for name in ZERO:
        make_config(folder, name)
    return folder, run_ranks(2, write, folder, LAYOUTS)


@pytest.mark.parametrize(("precision", "name"), LAYOUTS)
def test_same_ranks_and_stage_resume_bit_for_bit(written, precision, name):
    folder, results = written
    undisturbed, resumed, _ = results[0][precision, name]
    assert resumed == undisturbed
    assert undisturbed[2] == (1 if precision == "fp16" else 0)
    here = folder / f"{precision}-{name}"
    assert_same(here / "undisturbed", here / "resumed")
    assert_same(here / "saved", here / "again")


def test_save_returns_the_files_that_each_process_wrote(written):
    folder, results = written
    for precision, name in LAYOUTS:
        here = folder / f"{precision}-{name}" / "saved"
        named = [path for rank in results for path in rank[precision, name][2]]
        assert sorted(named) == sorted(path for path in here.rglob("*") if path.is_file())
        assert here / "latest" in results[0][precision, name][2]


# ---------------------------------------------------------------- other ranks, stages and accumulation


def move(folder, jobs):
    """For each job: load the source, save it at once as the target, and continue. Return the losses."""
    from scale_mae.distributed.process_group import process_group

    freeze_imported_objects()
    results = []
    with process_group() as ranks:
        for source, target, precision, name, micro_batch in jobs:
            config = make_config(folder, name, precision, micro_batch)
            engine = build(config, ranks)
            check_padding(engine, ranks)
            engine.load(folder / source)
            check_weights(engine, folder / source)
            check_padding(engine, ranks)
            groups = [(g["weight_decay"], tuple(g["betas"]), g["eps"]) for g in engine._optimizer.param_groups]
            assert groups == [(0.0, (0.9, 0.95), 1e-8), (0.05, (0.9, 0.95), 1e-8)]
            save(engine, folder / target)
            results.append(train(engine, ranks, config, range(SAVED, STEPS)) if precision == "fp32" else None)
    return results


HOPS = {  # ranks: [(precision, written as, read as, micro-batch)]; "@4" means written by 4 ranks in an earlier hop
    2: [
        ("fp32", "zero0", "zero1", 3),
        ("fp32", "zero1", "zero3", 6),
        ("fp32", "zero2", "zero0", 2),
        ("fp32", "zero3", "zero2", 1),
        ("fp32", "robin", "aligned", 6),
        ("fp32", "aligned", "robin", 6),
        ("fp32", "zero2_offload", "zero3_offload", 6),
        ("fp32", "whole", "zero2_offload", 6),
        ("bf16", "zero0", "zero3", 6),
        ("bf16", "zero3", "sums", 6),
        ("bf16", "sums", "zero2", 6),
        ("fp16", "zero0", "zero2", 6),
        ("fp16", "zero2", "zero3", 6),
        ("fp16", "zero3", "zero0", 6),
    ],
    4: [
        ("fp32", "zero2", "pieces", 1),
        ("fp32", "pieces", "robin", 3),
        ("fp32", "zero3_offload", "aligned", 3),
        ("bf16", "zero1", "whole", 3),
        ("bf16", "zero3", "sums", 3),
    ],
    3: [
        ("fp32", "zero1", "zero3", 4),
        ("fp32", "zero3", "zero2", 2),
        ("fp32", "pieces@4", "robin", 4),
        ("bf16", "whole@4", "zero2", 4),
        ("fp16", "zero2", "zero3", 4),
    ],
    1: [
        ("fp32", "zero2", "zero3", 12),
        ("fp32", "zero3@3", "zero0", 4),
        ("fp32", "robin@4", "zero3_offload", 6),
        ("fp32", "robin@3", "zero2", 12),
        ("bf16", "sums@4", "zero0", 12),
        ("fp16", "zero3@3", "zero2", 12),
    ],
}


def place(precision, name):
    """Return the folder of a checkpoint: of the two ranks that trained, or, with ``@``, of a hop to that many ranks."""
    return f"{precision}-{name}" if "@" in name else f"{precision}-{name}/saved"


@pytest.fixture(scope="module")
def moved(written):
    folder, _ = written
    losses = {}
    for size, hops in HOPS.items():
        jobs = [(place(p, one), place(p, f"{other}@{size}"), p, other, micro) for p, one, other, micro in hops]
        losses[size] = run_ranks(size, move, folder, jobs)[0]
    return losses


@pytest.mark.parametrize("ranks", HOPS)
def test_other_numbers_of_ranks_stages_and_micro_batches_load_the_same_values_and_continue_equally(written, moved, ranks):
    folder, results = written
    for (precision, one, other, _), losses in zip(HOPS[ranks], moved[ranks], strict=True):
        assert_same(folder / place(precision, one), folder / place(precision, f"{other}@{ranks}"))
        if precision == "fp32":
            undisturbed, _, _ = results[0]["fp32", "zero2"]
            np.testing.assert_allclose(losses, undisturbed[0], rtol=1e-5, err_msg=f"{one} -> {other}")


# ---------------------------------------------------------------- before the first update


def resume_before_first_update(folder, hops):
    """Save before the first update, which may follow fp16 steps that overflowed. Load with another stage and continue.

    Return the losses, loss scales and skipped steps without and with the resume.
    """
    from scale_mae.distributed.process_group import process_group

    freeze_imported_objects()
    results = []
    with process_group() as ranks:
        for number, (precision, one, other) in enumerate(hops):
            config = make_config(folder, one, precision, micro_batch=6)
            engine = build(config, ranks)
            steps = range(2) if precision == "fp16" else range(0)
            train(engine, ranks, config, steps, overflows=steps)
            save(engine, folder / f"saved{number}")
            undisturbed = train(engine, ranks, config, range(2, 4)), engine.loss_scale, engine.skipped_steps
            config = make_config(folder, other, precision, micro_batch=6)
            engine = build(config, ranks)
            engine.load(folder / f"saved{number}")
            check_weights(engine, folder / f"saved{number}")
            check_padding(engine, ranks)
            save(engine, folder / f"resaved{number}")
            resumed = train(engine, ranks, config, range(2, 4)), engine.loss_scale, engine.skipped_steps
            results.append((undisturbed, resumed))
    return results


def test_a_run_resumes_from_a_checkpoint_without_moments(tmp_path):
    hops = [("fp32", "zero0", "zero2"), ("fp32", "zero2", "zero3"), ("fp32", "zero3", "zero0"), ("fp32", "zero3", "zero3")]
    hops += [("fp16", "zero0", "zero0"), ("fp16", "zero2", "zero3"), ("fp16", "zero3", "zero2"), ("fp16", "zero2", "zero2")]
    for number, (undisturbed, resumed) in enumerate(run_ranks(2, resume_before_first_update, tmp_path, hops)[0]):
        precision, one, other = hops[number]
        assert_same(tmp_path / f"saved{number}", tmp_path / f"resaved{number}")
        assert undisturbed[1:] == resumed[1:]
        assert resumed[2] == (2 if precision == "fp16" else 0)
        if one == other:
            assert resumed == undisturbed
        np.testing.assert_allclose(resumed[0], undisturbed[0], rtol=1e-5 if precision == "fp32" else 5e-3)


# ---------------------------------------------------------------- memory

BIG = EncoderSize(width=256, depth=12, heads=4, patch_size=4)


class MemoryGrowth:
    """Measures by how much the memory of this process grows, in bytes.

    Attributes:
        anonymous: Largest growth of memory that belongs to no file.
        mapped: Largest growth of memory-mapped files.
        kept_mapped: Growth of memory-mapped files at the end.
    """

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # otherwise free memory of the process would be used first
        before = self._resident()
        self._finished, self._peak = threading.Event(), before
        watch = threading.Thread(target=self._watch)
        watch.start()

        def end():
            self._finished.set()
            watch.join()
            self.anonymous, self.mapped = (peak - start for peak, start in zip(self._peak, before, strict=True))
            self.kept_mapped = self._resident()[1] - before[1]

        self._end = end
        return self

    def __exit__(self, *_):
        self._end()

    def _watch(self):
        while not self._finished.wait(0.001):
            self._peak = tuple(map(max, self._peak, self._resident()))

    @staticmethod
    def _resident():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(1024 * int(status[key].split()[0]) for key in ("RssAnon", "RssFile"))


def measure(folder, hops):
    """For each hop, return the bytes of all moments and of the largest tensor, and the memory growth while loading."""
    from scale_mae.distributed.process_group import process_group

    freeze_imported_objects()
    results = []
    with process_group() as ranks:
        for precision, one, other in hops:
            config = make_config(folder, one, precision, micro_batch=6)
            engine = build(config, ranks, BIG)
            train(engine, ranks, config, range(1))
            save(engine, folder / one)
            del engine
            engine = build(make_config(folder, other, precision), ranks, BIG)
            sizes = [4 * getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters()]
            with MemoryGrowth() as growth:
                engine.load(folder / one)
            results.append((2 * sum(sizes), max(sizes), growth.anonymous, growth.mapped, growth.kept_mapped))
            del engine
            ranks.barrier()
            if ranks.is_main:
                shutil.rmtree(folder / one)
            ranks.barrier()
    return results


def test_loading_needs_memory_for_its_own_partition_and_the_largest_tensor_only(tmp_path):
    hops = [("fp32", "zero2", "zero3"), ("bf16", "zero3", "zero2"), ("fp32", "zero0", "zero2")]
    slack = 8e6
    for results in run_ranks(2, measure, tmp_path, hops):
        for hop, (moments, largest, anonymous, mapped, kept_mapped) in zip(hops, results, strict=True):
            # the engine already has its masters and weights; loading adds the moments
            assert moments > 70e6
            assert moments / 2 - slack < anonymous < moments / 2 + largest + slack, hop
            assert mapped < 30e6, hop  # the files have at least 115 MB; the kernel maps more at once than is requested
            assert kept_mapped < 4e6, hop


# ---------------------------------------------------------------- checkpoints that cannot be loaded or written


def load_damaged(folder, name, damage, rank):
    """Load a checkpoint that is damaged for one rank, or for all ranks (None). Check that the engine does not change."""
    from scale_mae.distributed.process_group import process_group

    freeze_imported_objects()
    with process_group() as ranks:
        source = folder
        if rank in (ranks.rank, None):
            source = shutil.copytree(folder, folder.with_name(f"damaged-{name}-{ranks.rank}"))
            damage(source / DEEPSPEED_TAG)
        engine = build(make_config(folder.parent.parent, name), ranks)
        masters = [p.detach().clone() for group in engine._optimizer.param_groups for p in group["params"]]
        try:
            engine.load(source)
        finally:
            after = [p.detach() for group in engine._optimizer.param_groups for p in group["params"]]
            assert all(torch.equal(one, other) for one, other in zip(masters, after, strict=True))


def change_file(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def rename_parameter(folder):
    def rename(content):
        shapes = content["param_shapes"][1]
        renamed = {("other" if name == "prime" else name): shape for name, shape in shapes.items()}
        content["param_shapes"][1] = renamed
        content["module"]["other"] = content["module"].pop("prime")

    change_file(folder / "mp_rank_00_model_states.pt", rename)


def reshape_parameter(folder):
    def reshape(content):
        content["param_shapes"][1]["prime"] = torch.Size([11, 7])

    change_file(folder / "mp_rank_00_model_states.pt", reshape)


def remove_counters(folder):
    change_file(folder / "mp_rank_00_model_states.pt", lambda content: content["scale_mae"].pop("engine"))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran").resolve(),))


def insert_call(folder):
    torch.save({"optimizer_state_dict": Evil()}, next(folder.glob("*rank_1*optim_states.pt")), pickle_module=pickle)


def delete_file(folder):
    next(folder.glob("*rank_1*optim_states.pt")).unlink()


@pytest.mark.parametrize(
    ("damage", "rank", "message"),
    [
        (rename_parameter, None, r"prime is missing, but the model has it"),
        (reshape_parameter, None, r"prime has shape \[11, 7\], but \[7, 11\] in the model"),
        (remove_counters, None, r"contains no counters"),
        (insert_call, 1, r"optim_states\.pt: cannot be read"),
        (delete_file, 1, r"1 of 2 \*_optim_states\.pt files is missing: rank 1\."),
    ],
)
def test_a_checkpoint_that_does_not_match_is_a_one_line_error_on_every_rank_and_changes_nothing(
    written, tmp_path, monkeypatch, damage, rank, message
):
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(written[0] / "fp32-zero2" / "saved", tmp_path / "run" / "saved")
    with pytest.raises(RankError) as caught:
        run_ranks(2, load_damaged, source, "zero2", damage, rank, timeout=60)
    assert caught.value.kinds == ["CheckpointError"] * 2
    lines = [line for line in str(caught.value).splitlines() if "CheckpointError:" in line]
    assert len(lines) == 2
    assert all(re.search(message, line) for line in lines)
    assert not (tmp_path / "ran").exists()


def save_to_own_folders(folder):
    """Save to a folder of each process. Then repeat it with one process that cannot write."""
    from scale_mae.distributed.process_group import process_group

    freeze_imported_objects()
    with process_group() as ranks:
        engine = build(make_config(folder, "zero3"), ranks)
        files = save(engine, folder / f"node{ranks.rank}")
        (folder / "blocked1").write_text("a file where a folder should be")
        try:
            save(engine, folder / f"blocked{ranks.rank}")
            error = None
        except OSError as failed:
            error = str(failed)
        return files, error


def test_each_process_can_save_to_its_own_folder_and_fail_alone(tmp_path):
    results = run_ranks(2, save_to_own_folders, tmp_path, timeout=60)
    for rank, (files, _) in enumerate(results):
        assert sorted(files) == sorted(p for p in (tmp_path / f"node{rank}").rglob("*") if p.is_file())
        assert len(files) == (3 if rank == 0 else 2)  # model, optimizer; and ``latest``
    shutil.copytree(tmp_path / "node1", tmp_path / "node0", dirs_exist_ok=True)
    assert not ZeroReader(tmp_path / "node0" / DEEPSPEED_TAG).state["engine"]["skipped_steps"]
    assert results[0][1] is None
    assert "blocked1" in results[1][1]


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, "offload_param to NVMe is not supported"),
        ({"stage": 1, "elastic_checkpoint": True}, "elastic_checkpoint is not supported"),
    ],
)
def test_deepspeed_options_that_checkpoints_do_not_support_are_rejected_before_training(tmp_path, zero, message):
    from scale_mae.engine.deepspeed_config import build_deepspeed_config

    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = Config.model_validate({"train": {"global_batch": 8, "micro_batch": 8}, "engine": {"deepspeed": str(path)}})
    with pytest.raises(ConfigError, match=message):
        build_deepspeed_config(config, 1)
