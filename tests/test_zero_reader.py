"""The ZeRO reader returns every value of the live engine, for any DeepSpeed checkpoint, and rejects damaged or mixed files."""

import builtins
import functools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import third_party_checkpoints as others
import torch
from layouts import LAYOUTS
from third_party_checkpoints import TABLE, make_third_party_checkpoints

from scale_mae.checkpoint.deepspeed_files import find_deepspeed_folder
from scale_mae.checkpoint.discovery import locate_checkpoint
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.model.pos_embed import sincos_pos_embed
from scale_mae.weights.convert import convert
from scale_mae.weights.safetensors_io import TensorFiles

# ---------------------------------------------------------------- checkpoints of scale_mae


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reader_returns_every_weight_of_the_live_model(runs, layout):
    run_dir, live = runs[layout]
    reader = ZeroReader(find_deepspeed_folder(locate_checkpoint(run_dir, print)))
    assert (reader.stage, reader.world_size, reader.step) == (int(layout[0][-1]), 2, 3)
    assert reader.state["step"] == 3
    assert set(reader) == set(live) | {"pos_embed", "decoder_pos_embed"}
    assert set(reader.parameters) == set(live)
    assert torch.equal(reader["pos_embed"], sincos_pos_embed(96, (4, 4)))
    for name, expected in live.items():
        got = reader[name]
        assert got.dtype == torch.float32
        assert reader.optimizer_step(name) == 3
        assert reader.flat(name, "exp_avg").any()
        if layout == ("zero0", "bf16"):  # the live weights there are bf16; the reader finds the fp32 masters
            assert torch.equal(got.bfloat16().float(), torch.from_numpy(expected)), name
        else:
            assert torch.equal(got, torch.from_numpy(expected)), name
    if layout[1] == "bf16":
        assert any(not torch.equal(reader[n], reader[n].bfloat16().float()) for n in live)


def test_the_reader_agrees_with_the_conversion_script_of_deepspeed(runs):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for layout in (("zero2", "bf16"), ("zero3", "bf16")):
        checkpoint = locate_checkpoint(runs[layout][0], print)
        converted = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        reader = ZeroReader(checkpoint / "deepspeed")
        for name, tensor in converted.items():
            assert torch.equal(reader[name], tensor.detach()), name


# ---------------------------------------------------------------- third-party checkpoints


def assert_equal(reader, live):
    """Compare keys and their order, dtypes, shapes, values, optimizer states and step counts."""
    assert list(reader) == list(live.state)
    assert reader.parameters == [name for name in live.state if name in live.moments]
    for name, expected in live.state.items():
        got = reader[name]
        assert (got.dtype, reader.dtype(name)) == (expected.dtype, expected.dtype), name
        assert (tuple(got.shape), reader.shape(name)) == (tuple(expected.shape), tuple(expected.shape)), name
        assert torch.equal(got, expected), name
    for name, moments in live.moments.items():
        assert reader.optimizer_step(name) == moments.get("step"), name
        for key in moments.keys() - {"step"}:
            assert torch.equal(reader.flat(name, key), moments[key].float().flatten()), (name, key)


@pytest.mark.parametrize("layout", others.LAYOUTS)
def test_a_third_party_checkpoint_equals_the_live_engine(third_party_checkpoints, layout):
    live = third_party_checkpoints[layout]
    reader = ZeroReader(find_deepspeed_folder(live.folder))
    assert_equal(reader, live)
    assert (reader.stage, reader.world_size, reader.step, reader.state) == (int(layout[4]), 2, others.STEPS, {})
    assert reader["table"].dtype == torch.float32
    assert torch.equal(reader["table"], TABLE)
    assert reader["count"] > 2**40
    tied = {"head.weight": "embed.weight", "again.weight": "first.weight", "again.bias": "first.bias"}
    for name, other in tied.items():
        assert torch.equal(reader[name], reader[other])
    if "overflow" in layout:
        assert {reader.optimizer_step(name) for name in reader.parameters} == {None}
        with pytest.raises(CheckpointError, match=r"its optimizer has no state exp_avg for scale\.$"):
            reader.flat("scale", "exp_avg")
    else:  # the test would prove nothing if all masters were 16-bit numbers, or all moments equal
        assert any(not torch.equal(reader[n], reader[n].bfloat16().float()) for n in live.moments)
        assert len({float(reader.flat(n, "exp_avg_sq").double().sum()) for n in set(live.moments) - set(tied)}) >= 8


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_checkpoints_of_any_number_of_ranks_can_be_read(tmp_path, ranks):
    names = ["zero1-bf16-wrapper", "zero2-fp32", "zero2-round-robin", "zero3-bf16", "zero3-sub-groups"]
    for live in make_third_party_checkpoints(tmp_path, {name: others.LAYOUTS[name] for name in names}, ranks).values():
        reader = ZeroReader(find_deepspeed_folder(live.folder))
        assert reader.world_size == ranks
        assert_equal(reader, live)


@pytest.mark.parametrize("layout", ["zero0-bf16", "zero1-bf16", "zero2-round-robin", "zero3-sub-groups"])
def test_a_slice_equals_the_same_range_of_the_whole_parameter(third_party_checkpoints, layout):
    reader = ZeroReader(find_deepspeed_folder(third_party_checkpoints[layout].folder))
    for name in reader.parameters:
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            values = reader.flat(name, key)
            size = values.numel()
            assert (values.ndim, values.dtype) == (1, torch.float32)
            for start, stop in [(0, 1), (0, size), (size // 3, size // 2 + 1), (size // 2, None), (size - 1, size), (2, 2)]:
                assert torch.equal(reader.flat(name, key, start, stop), values[start:stop]), (name, key, start, stop)
    for name in ("table", "frozen.weight", "nothing"):
        for call in (reader.flat, reader.optimizer_step):
            with pytest.raises(KeyError):
                call(name)
    with pytest.raises(KeyError):
        reader["nothing"]


def edit(path, change):
    """Change the contents of a file of ``torch.save``."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.fixture
def copy(third_party_checkpoints, tmp_path):
    """A function that copies the checkpoint of a layout, so that a test can change it."""

    def copied(layout):
        shutil.rmtree(tmp_path / layout, ignore_errors=True)
        return shutil.copytree(find_deepspeed_folder(third_party_checkpoints[layout].folder), tmp_path / layout)

    return copied


def test_a_scalar_parameter_keeps_its_shape(copy, third_party_checkpoints):
    """DeepSpeed 0.19.8 cannot train scalar parameters, but other versions can have saved one."""
    for layout in ("zero2-bf16", "zero3-bf16"):
        folder = copy(layout)
        for path in folder.glob("*_model_states.pt"):
            edit(path, lambda content: [g.update(scale=torch.Size([])) for g in content["param_shapes"] if "scale" in g])
        reader = ZeroReader(folder)
        assert reader.shape("scale") == tuple(reader["scale"].shape) == ()
        assert reader["scale"] == third_party_checkpoints[layout].state["scale"][0]


def test_step_counts_that_an_optimizer_stores_in_its_groups_are_found(copy):
    def by_group(content):
        base = content["optimizer_state_dict"]["base_optimizer_state"]
        for state in base["state"].values():
            del state["step"]
        for group in base["param_groups"]:
            group["step"] = 7

    folder = copy("zero2-bf16")
    for path in folder.glob("*_optim_states.pt"):
        edit(path, by_group)
    reader = ZeroReader(folder)
    assert {reader.optimizer_step(name) for name in reader.parameters} == {7}


def test_masters_without_names_are_identified_by_their_values_or_rejected(copy):
    """Without ZeRO, equal weights in one group are in the order of the module. In two groups they cannot be identified."""

    def alike(content, group):
        """Add a parameter that equals ``norm.weight`` in 16 bits but not in fp32, and its master in a group."""
        norm = content["module"]["norm.weight"]
        content["module"]["twin"] = norm.clone()
        masters = content["optimizer"]["fp32_groups"]
        master = next(m for m in masters[1] if torch.equal(m.bfloat16(), norm))
        masters[group].append(master.detach() * (1 + 1e-6))

    edit((folder := copy("zero0-bf16")) / MODEL, functools.partial(alike, group=1))
    reader = ZeroReader(folder)
    assert torch.equal(reader["twin"], reader["norm.weight"] * (1 + 1e-6))
    assert not torch.equal(reader["twin"], reader["norm.weight"])
    edit((folder := copy("zero0-bf16")) / MODEL, functools.partial(alike, group=0))
    with pytest.raises(CheckpointError, match="the values do not identify the parameters"):
        ZeroReader(folder)


def test_moments_without_names_are_not_guessed(copy):
    """Without ZeRO in fp32 and with two groups, the weights are known, but not which parameter a moment belongs to."""

    def split(content):
        (group,) = content["optimizer"]["param_groups"]
        content["optimizer"]["param_groups"] = [group | {"params": group["params"][i::2]} for i in (0, 1)]

    folder = copy("zero0-fp32")
    expected = {name: tensor.clone() for name, tensor in ZeroReader(folder).items()}
    edit(folder / MODEL, split)
    reader = ZeroReader(folder)
    assert reader.parameters == []
    assert all(torch.equal(reader[name], tensor) for name, tensor in expected.items())


def test_a_third_party_checkpoint_converts_to_the_same_tensors(third_party_checkpoints, tmp_path):
    folder, state, _ = third_party_checkpoints["zero3-bf16"]
    written = TensorFiles(convert(folder, "state_dict", tmp_path / "out", max_shard_gb=1e-7))
    assert set(written) >= set(state)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    for name, expected in state.items():
        assert torch.equal(written[name], expected), name


@pytest.mark.parametrize("layout", ["zero2-without-frozen", "zero2-bf16", "zero3-bf16", "zero1-bf16", "zero0-bf16"])
def test_missing_frozen_parameters_are_reported(third_party_checkpoints, tmp_path, layout):
    warnings = []
    convert(third_party_checkpoints[layout].folder, "state_dict", tmp_path / "x.safetensors", warn=warnings.append)
    assert bool(warnings) == (layout == "zero2-without-frozen")
    assert all("saved with exclude_frozen_parameters" in line for line in warnings)


# ---------------------------------------------------------------- memory


def memory(of):
    """Return a memory counter of this process in MB: ``RssFile`` or ``RssAnon``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(of))


SIZE = 1 << 25  # values; 134 MB in fp32


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A ZeRO-2 checkpoint of two ranks with one large parameter."""
    folder = tmp_path_factory.mktemp("large")
    weight = (torch.arange(SIZE) % (SIZE // 2)).float()  # both halves count up from 0, so fp32 is exact
    model = {"module": {"w": weight.bfloat16()}, "buffer_names": [], "optimizer": None, "param_shapes": [{"w": (SIZE,)}]}
    counts = {"global_steps": 1, "dp_world_size": 2, "mp_world_size": 1}
    torch.save(model | counts, folder / MODEL)
    for rank, part in enumerate(weight.chunk(2)):
        base = {"state": {0: {"step": 1, "exp_avg": part.clone()}}, "param_groups": [{"params": [0]}]}
        states = {"zero_stage": 2, "partition_count": [2], "group_paddings": [0], "base_optimizer_state": base}
        states["single_partition_of_fp32_groups"] = [part.clone()]
        torch.save({"optimizer_state_dict": states}, folder / OPTIM.format(rank))
    return folder


def test_only_requested_values_are_read_and_memory_is_released(large):
    reader = ZeroReader(large)
    reader.release()
    begin, anonymous = memory("RssFile"), memory("RssAnon")
    assert reader.shape("w") == (SIZE,)
    half = SIZE // 2
    assert reader.flat("w", start=half - 2, stop=half + 2).tolist() == [half - 2, half - 1, 0, 1]
    assert memory("RssFile") - begin < 2
    part = reader.flat("w", "exp_avg", 0, half)  # contiguous, so a view: nothing is copied
    assert part.sum() > 0
    assert memory("RssFile") - begin > 60
    assert memory("RssAnon") - anonymous < 10
    reader.release()
    assert memory("RssFile") - begin < 2
    assert part[-1] == half - 1


def test_importing_the_reader_imports_no_heavy_package():
    heavy = "{'deepspeed', 'timm', 'torchvision', 'transformers', 'torch._inductor'}"
    program = f"import sys, scale_mae.checkpoint.zero_reader; sys.exit(','.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# ---------------------------------------------------------------- hostile files


class Evil:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, path, call):
        self.path, self.call = path, call

    def __reduce__(self):
        return {
            "method": (Path.touch, (self.path,)),
            "system": (os.system, (f"touch {self.path}",)),
            "class": (subprocess.Popen, (["touch", str(self.path)],)),
            "exec": (builtins.exec, (f"open({str(self.path)!r}, 'w')",)),
        }[self.call]


@pytest.mark.parametrize("call", ["method", "system", "class", "exec"])
@pytest.mark.parametrize("place", ["module", "args"])
def test_a_pickle_that_would_run_code_is_rejected_without_running_it(copy, tmp_path, call, place):
    folder, evil = copy("zero2-fp32"), Evil(tmp_path / "ran", call)
    for victim in (MODEL, OPTIM.format(1)):
        content = torch.load(folder / victim, weights_only=False)
        torch.save(content | {place: evil}, folder / victim, pickle_module=pickle)
        with pytest.raises(CheckpointError, match=rf"{victim}: cannot be read \(.*(posix|builtins|subprocess)") as caught:
            ZeroReader(folder)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists()
        torch.save(content, folder / victim)
    ZeroReader(folder)
    torch.save({"x": evil}, tmp_path / "x.pt", pickle_module=pickle)
    torch.load(tmp_path / "x.pt", weights_only=False)  # without the restriction, it does run
    evil.path.exists() or subprocess.run(["sleep", "1"], check=True)
    assert evil.path.exists()


class ByName:
    """Pickled in the way in which Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_stage_that_is_pickled_by_name_is_read(copy, stage):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    folder = copy(f"zero{stage}-fp32")
    named = ByName(ZeroStageEnum, ZeroStageEnum(stage).name)
    for path in folder.glob("*_optim_states.pt"):
        edit(path, lambda content: content["optimizer_state_dict"].update(zero_stage=named))
    assert ZeroReader(folder).stage == stage


def test_getattr_in_a_pickle_is_allowed_for_the_zero_stage_only(copy):
    folder = copy("zero2-fp32")
    edit(folder / OPTIM.format(0), lambda content: content.update(args=ByName(Path, "home")))
    with pytest.raises(CheckpointError, match="it would call builtins.getattr"):
        ZeroReader(folder)


class Config:
    """A class of user code."""


def test_objects_of_unknown_classes_are_ignored_except_in_the_place_of_tensors(copy, third_party_checkpoints):
    folder = copy("zero2-fp32")
    edit(folder / MODEL, lambda content: content.update(config=Config()))
    assert_equal(ZeroReader(folder), third_party_checkpoints["zero2-fp32"])
    edit(folder / MODEL, lambda content: content.update(module=Config()))
    with pytest.raises(CheckpointError, match="not what DeepSpeed writes"):
        ZeroReader(folder)


# ---------------------------------------------------------------- damaged and mixed files

MODEL = "mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
PART = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def put(files, layout=None):
    """Replace files by those of another layout, or by those that the same training saved one step earlier."""
    tag = f"global_step{others.STEPS if layout else others.STEPS - 1}"
    return lambda folder, all_: [shutil.copy(p, folder) for p in (all_ / (layout or folder.name) / tag).glob(files)]


def drop(files):
    return lambda folder, _: [path.unlink() for path in folder.glob(files)]


def again(files, name):
    """Copy one of the files to another name."""
    return lambda folder, _: shutil.copy(next(folder.glob(files)), folder / name)


def change(files, how):
    return lambda folder, _: [edit(path, how) for path in folder.glob(files)]


def optim(**values):
    return lambda content: content["optimizer_state_dict"].update(values)


def forget(content):
    for group in content["param_shapes"]:
        group.pop("scale", None)


SAVES, ABSENT = "different saves", "not supported"
DAMAGE = {
    # missing and superfluous files, files of other numbers of ranks
    "a shard missing": ("zero2-fp32", drop("*rank_1_*"), "1 of 2 .*_optim_states.pt files is missing: rank 1"),
    "a shard of stage 3 missing": ("zero3-fp32", drop("*rank_0_*optim*"), "1 of 2 .*_optim_states.pt .* missing: rank 0"),
    "all shards missing": ("zero1-bf16-wrapper", drop("*optim*"), "2 of 2 .*_optim_states.pt .* are missing: ranks 0, 1"),
    "all shards of stage 3 missing": ("zero3-bf16", drop("*optim*"), "2 of 2 .*_optim_states.pt .* are missing: ranks 0, 1"),
    "a part of the model missing": ("zero3-bf16", drop("*rank_1_*model*"), "1 of 2 .*_model_states.pt .* missing: rank 1"),
    "the model missing": ("zero2-fp32", drop("*model*"), r"contains no \*_model_states.pt"),
    "a shard too many": ("zero2-fp32", again("*rank_1_*", OPTIM.format(2)), "rank_2_.*: 2 processes wrote this"),
    "a part too many": ("zero3-fp32", again("*rank_1_*model*", PART.format(2)), "rank_2_.*: 2 processes wrote this"),
    "a shard of 4": (
        "zero2-fp32",
        change("*rank_1_*", optim(partition_count=[4, 4, 4])),
        f"rank_1_.*by .*4.* processes, but .* by 2. .*{SAVES}",
    ),
    "a part of 4": (
        "zero3-fp32",
        change("*rank_1_*optim*", optim(partition_count=4)),
        f"rank_1_.*by .*4.* processes, but .* by 2. .*{SAVES}",
    ),
    "a model of 4": ("zero2-fp32", change("*model*", lambda c: c.update(dp_world_size=4)), "2 of 4 .* are missing: ranks 2, 3"),
    # files of different steps
    "an earlier shard": ("zero2-fp16", put("*rank_1_*"), f"rank 0 has made 3.0 updates, .* rank 1 has made 2.0. .*{SAVES}"),
    "an earlier shard, wrapped": (
        "zero1-bf16-wrapper",
        put("*rank_1_*"),
        f"rank 0 has made 3.0 updates, .* rank 1 has made 2.0. .*{SAVES}",
    ),
    "an earlier shard of stage 3": (
        "zero3-bf16",
        put("*rank_1_*optim*"),
        f"rank 0 has made 3.0 updates, .* rank 1 has made 2.0. .*{SAVES}",
    ),
    "earlier shards": ("zero2-bf16", put("*optim*"), f"differs from the rounded master weight of rank 0. .*{SAVES}"),
    "earlier shards in fp32": ("zero1-fp32", put("*optim*"), f"differs from the rounded master weight of rank 0. .*{SAVES}"),
    "an earlier model": ("zero2-fp16", put("*model*"), f"differs from the rounded master weight of rank 0. .*{SAVES}"),
    "an earlier part": ("zero3-fp32", put("*rank_1_*model*"), f"global_steps is 3 in .*_0_.*, but 2 in .*_1_.* {SAVES}"),
    # files of different stages, precisions and groups
    "a shard of another stage": ("zero2-fp32", put("*rank_1_*", "zero1-fp32"), f"zero_stage is 2 .*, but 1 in .* {SAVES}"),
    "shards of another stage": ("zero2-fp32", put("*optim*", "zero3-fp32"), "have different ZeRO stages"),
    "a model of another stage": ("zero3-fp32", put("*model*", "zero2-fp32"), f"from {SAVES}"),
    "shards of another precision": ("zero2-fp32", put("*optim*", "zero2-bf16"), f"from {SAVES}"),
    "other sub-groups": (
        "zero3-sub-groups",
        put("*rank_1_*optim*", "zero3-init"),
        r"stores \d+ of \d+ values .*different saves",
    ),
    "other groups": ("zero2-bf16", put("*optim*", "zero2-bf16-accumulate"), f"{SAVES}|not what DeepSpeed"),
    "a name less": ("zero2-bf16", change("*model*", forget), "not what DeepSpeed writes"),
    "a name less in stage 3": ("zero3-bf16", change("*model*", forget), r"stores \d+ of \d+ values .*different saves"),
    # layouts that are not supported
    "universal": ("zero2-fp32", lambda folder, _: (folder / "zero").mkdir(), f"a universal checkpoint, .*{ABSENT}"),
    "experts": ("zero2-fp32", again("*model*", f"layer_0_expert_0_{MODEL}"), f"expert_0_.*{ABSENT}"),
    "experts' states": ("zero2-fp32", again("*_0_*optim*", f"expp_rank_0_{OPTIM[16:]}"), f"expp_rank.*{ABSENT}"),
    "parallel experts": ("zero3-fp32", change("*optim*", optim(ds_zero_partition_groups=[])), f"experts, .*{ABSENT}"),
    "tensor parallel": ("zero2-fp32", again("*model*", MODEL.replace("0_", "1_")), f"mp_rank_01_.*{ABSENT}"),
    "tensor parallel inside": ("zero2-fp32", change("*model*", lambda c: c.update(mp_world_size=2)), f"parallelism .*{ABSENT}"),
    "pipeline": ("zero2-fp32", again("*model*", "layer_00-model_states.pt"), f"layer_00-model.*{ABSENT}"),
    "nvme": ("zero3-fp16", change("*optim*", optim(fp32_flat_groups=[torch.empty(0)])), r"stores 0 of \d+ values .*NVMe"),
    "fused": ("zero0-bf16", change("*", lambda c: c["optimizer"].update(fp32_groups_flat=[])), f"a fused .*{ABSENT}"),
    "not optimized": ("zero3-fp32", change("*model*", lambda c: c["module"].update(x=torch.empty(0))), "no values of x,"),
    # files that DeepSpeed did not write
    "a model's own file": ("zero2-fp32", lambda folder, _: torch.save({"module": {}}, folder / MODEL), "not what DeepSpeed"),
    "no dictionary": ("zero2-fp32", lambda folder, _: torch.save([1], folder / MODEL), f"{MODEL}: cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_belong_together_are_rejected_in_one_line(copy, third_party_checkpoints, damage):
    layout, change_files, message = DAMAGE[damage]
    folder = copy(layout)
    ZeroReader(folder)
    change_files(folder, third_party_checkpoints[layout].folder.parent)
    with pytest.raises(CheckpointError, match=message) as caught:
        ZeroReader(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-30], lambda b: b[: len(b) // 2], lambda b: b"garbage" * 99])
@pytest.mark.parametrize("victim", [MODEL, OPTIM.format(1)])
def test_the_error_names_the_damaged_file(copy, victim, damage):
    folder = copy("zero2-fp32")
    (folder / victim).write_bytes(damage((folder / victim).read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{victim}: cannot be read \(.+\)$") as caught:
        ZeroReader(folder)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("damage", ["a shard missing", "an earlier shard"])
def test_nothing_is_exported_from_such_files(copy, third_party_checkpoints, tmp_path, damage):
    layout, change_files, message = DAMAGE[damage]
    folder = copy(layout)
    change_files(folder, third_party_checkpoints[layout].folder.parent)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, "state_dict", tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_quantized_frozen_weights_are_rejected(copy):
    folder = copy("zero3-bf16")
    for path in folder.glob("*model*"):
        edit(path, lambda c: c["frozen_param_fragments"].update({"frozen.bias": torch.zeros(4, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"frozen\.bias is stored quantized"):
        ZeroReader(folder)["frozen.bias"]


# ---------------------------------------------------------------- finding the folder


def test_the_deepspeed_folder_of_a_path_is_found(third_party_checkpoints, runs, tmp_path):
    folder = third_party_checkpoints["zero2-fp32"].folder
    tag = folder / f"global_step{others.STEPS}"
    assert find_deepspeed_folder(folder) == find_deepspeed_folder(tag) == tag
    checkpoint = locate_checkpoint(runs["zero2", "fp32"][0], print)
    assert find_deepspeed_folder(checkpoint) == checkpoint / "deepspeed"
    for path in (tmp_path / "none", tag / MODEL):
        with pytest.raises(CheckpointError, match="no such folder"):
            find_deepspeed_folder(path)
    with pytest.raises(CheckpointError, match="not a DeepSpeed checkpoint"):
        find_deepspeed_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"contains no \*_model_states.pt"):
        ZeroReader(tmp_path)
    for content in (b"global_step9", b"", b"\0", b"\xff\xfe", b"x" * 5000, b"latest", b"..", str(tag).encode()):
        (tmp_path / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match="latest: names .*, which does not exist"):
            find_deepspeed_folder(tmp_path)
