"""The ``scale-mae`` command: help, completion, errors, and the commands that no other file tests."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from scale_mae.cli import COMMANDS, main, parse_arguments
from scale_mae.config import json_schema, load_config, recipe_names, recipe_path
from scale_mae.system.command_line import GROUPS
from scale_mae.system.completion import complete_override


def call(*words, cwd=None, **env):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | env
    command = [sys.executable, "-m", "scale_mae", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of ``scale-mae pretrain debug``."""
    folder = tmp_path_factory.mktemp("cli")
    result = call("pretrain", "debug", "train.micro_batch=16", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "debug"


def test_pretrain_writes_config_log_and_checkpoints(run):
    assert (run / "config.yaml").exists()
    assert len((run / "log.jsonl").read_text().splitlines()) == 10
    assert (run / "checkpoints" / "step-00000010").is_dir()
    assert load_config(run / "config.yaml").train.micro_batch == 16


def test_convert_reconstruct_and_knn_through_the_command_line(run, tmp_path, capsys):
    from images import jpeg, make_folders

    assert main(["convert", str(run), "--to", "timm", "--out", str(tmp_path / "e.safetensors"), "--dtype", "bf16"]) == 0
    (tmp_path / "a.jpg").write_bytes(jpeg(64, 64))
    out = tmp_path / "grid.png"
    assert main(["reconstruct", str(run), str(tmp_path / "a.jpg"), "--out", str(out), "--mask-ratio", "0.75", "0.5"]) == 0
    assert out.exists()
    folders = str(make_folders(tmp_path / "data"))
    capsys.readouterr()
    encoder = str(tmp_path / "e.safetensors")
    assert main(["knn", encoder, "--train", folders, "--val", folders, "--k", "1", "--untrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["trained", "untrained"]
    assert "100.00% (12 images, k=1)" in lines[0]
    one_checkpoint = run / "checkpoints" / "step-00000005"
    assert main(["convert", str(one_checkpoint), "--to", "timm", "--out", str(tmp_path / "5.safetensors")]) == 0


def help_text(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command_once_under_a_heading(capsys):
    text = help_text([], capsys)
    assert [heading for heading in GROUPS.values() if f"\n{heading}:\n" not in text] == []
    listed = re.findall(r"^  (\w+) +\S", text, re.MULTILINE)
    assert sorted(listed) == sorted(command.name for command in COMMANDS)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_ends_with_an_example_that_parses(command, capsys):
    text = help_text([command.name], capsys)
    assert text.startswith(f"usage: scale-mae {command.name} ")
    assert text.rstrip().endswith(f"example:\n  {command.example}")
    assert "imagenet21k" not in text  # `scale-mae sources` lists data sets, `scale-mae recipes` lists recipes
    assert "linprobe_huge" not in text
    words = re.search(r"scale-mae ([^|>)]*)", command.example)[1]
    args = parse_arguments(shlex.split(words))
    assert args.command == command.name
    assert args.run_command is command.run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_argument_has_a_help_text(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_recipes_lists_every_recipe_and_prints_one(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines[::2]] == recipe_names()
    assert lines[2 * recipe_names().index("vit_base")].split()[1:4] == ["pretrain", "base", "Pre-train"]
    assert lines[2 * recipe_names().index("vit_base") + 1].split(" / ")[0].strip().startswith("16 GPUs")
    assert main(["recipes", "vit_base"]) == 0
    assert capsys.readouterr().out == recipe_path("vit_base").read_text()


def test_sources_lists_kinds_and_named_data_sets(capsys):
    from scale_mae.data.dataset_layouts import LAYOUTS

    assert main(["sources"]) == 0
    text = capsys.readouterr().out
    for name, (splits, _) in LAYOUTS.items():
        assert re.search(rf"^  {name} +{', '.join(splits)}$", text, re.MULTILINE)
    for example in ("/data/train-{000..146}.tar", "demo:train", "imagenet.index", ".csv", "COCO"):
        assert example in text


# ---------------------------------------------------------------- shell completion


@pytest.fixture
def bash_completions(tmp_path):
    """``bash_completions(line)`` returns what bash offers after ``line`` and TAB."""
    program = tmp_path / "scale-mae"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m scale_mae "$@"\n')
    program.chmod(0o755)
    script = """
        source <(scale-mae completion bash)
        COMP_WORDBREAKS=$' \\t\\n"><=;|&(:' COMP_TYPE=9 COMP_LINE=$1 COMP_POINT=${#1}
        _python_argcomplete scale-mae
        printf '%s\\n' "${COMPREPLY[@]}"
    """

    def complete(line):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", "-c", script, "bash", line]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    return complete


def test_bash_completes_commands_recipes_keys_and_values(bash_completions):
    assert bash_completions("scale-mae recon") == ["reconstruct"]
    assert bash_completions("scale-mae pretrain vit_") == ["vit_base", "vit_huge", "vit_large"]
    assert bash_completions("scale-mae finetune finetune_base --dry") == ["--dry-run"]
    assert bash_completions("scale-mae submit vit_base engine.c") == ["engine.compile="]
    assert bash_completions("scale-mae pretrain demo run.seed=3 train.precision=") == ["fp32", "bf16", "fp16"]


def test_completion_offers_the_values_of_a_key_that_has_few():
    assert complete_override("engine.compile=") == ["engine.compile=true", "engine.compile=false"]
    assert "engine.deepspeed=zero2_offload" in complete_override("engine.deepspeed=")
    assert complete_override("model.init_from=") == ["model.init_from=null"]
    assert complete_override("train.global_batch=") == complete_override("train.nonsense=") == []


def test_the_completion_script_for_zsh_registers_the_command(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef scale-mae\n")


def test_a_terminal_shows_a_bar_with_rate_and_remaining_time(tmp_path):
    import pty

    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "scale_mae", "pretrain", "debug", "train.micro_batch=16"]
    with subprocess.Popen(command, stderr=terminal, stdout=terminal, cwd=tmp_path, env=os.environ | {"COLUMNS": "180"}) as run:
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(main_end, 4096)
            except OSError:  # Linux raises it at the end
                break
    os.close(main_end)
    assert run.returncode == 0
    assert re.search(rb"step 10/10 .* images/s  ETA ", shown)
    assert b"100%" in shown
    assert "step 10/10" in (tmp_path / "runs" / "debug" / "log.txt").read_text()


def test_dry_run_prints_the_resolved_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "vit_base", "--dry-run", "train.global_batch=2048", "run.seed=3"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    again = load_config(tmp_path / "again.yaml")
    assert again == load_config("vit_base", ["train.global_batch=2048", "run.seed=3"])
    assert "# processes: 1, gradient accumulation steps: 8, peak learning rate: 0.0012" in text
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]


BAD = [
    (["pretrain", "dmo"], "dmo: no such recipe or file (did you mean demo?)"),
    (["pretrain", "."], ".: cannot be read (Is a directory). Give the path of a readable YAML file."),
    (["pretrain", sys.executable], "not a text file. Give the path of a YAML file."),
    (["pretrain", "debug", "train.globl_batch=3"], "train.globl_batch: unknown key (did you mean global_batch?)"),
    (["pretrain", "debug", "trian.seed=3"], "trian: unknown section (did you mean train?)"),
    (["pretrain", "debug", "train.micro_batch=many"], "train.micro_batch='many': input should be a valid integer"),
    (["pretrain", "debug", "train.micro_batch=7"], "by train.micro_batch=7 x 1 process = 7. Set train.micro_batch=4."),
    (["pretrain", "debug", "train.micro_batch=7", "--dry-run"], "train.global_batch=16 is not divisible"),
    (["pretrain", "debug", "model.image_size=33"], "model.image_size=[33, 33] is not divisible by model.patch_size=[8, 8]"),
    (["pretrain", "debug", "model.mask_ratio=0.99"], "model.mask_ratio=0.99 keeps all or none of the 16 patches"),
    (["pretrain", "debug", "model.decoder_heads=5"], "model.decoder_width=64 is not divisible by model.decoder_heads=5"),
    (
        ["pretrain", "debug", "engine.compile=true", "train.activation_checkpointing=offload"],
        "engine.compile=true has no effect with train.activation_checkpointing=offload",
    ),
    (["pretrain", "debug", "train.duration=10"], "train.duration='10': not a duration. Set a number and a unit"),
    (["pretrain", "debug", "optim.warmup=11 steps"], "is 11 steps, but train.duration=10 steps is only 10"),
    (["pretrain", "debug", "checkpoint.interval=0 steps"], "checkpoint.interval=0 steps is 0 steps"),
    (
        ["pretrain", "debug", "engine.deepspeed=zero9"],
        "engine.deepspeed=zero9: cannot be read (No such file or directory). Set one of zero0, ",
    ),
    (["pretrain", "debug", "data.source=absent"], "absent: no such folder"),
    (["pretrain", "debug", "data.source=."], "no images found"),
    (["pretrain", "debug", "nonsense"], "nonsense: not an override. Write section.key=value"),
    (["convert", "absent", "--to", "timm", "--out", "x"], "absent: no such run directory or checkpoint"),
    (["reconstruct", "absent", "a.jpg", "--out", "x.png"], "absent: no such run directory or checkpoint"),
    (["knn", "absent", "--train", "demo:train", "--val", "demo:val"], "absent: no such file or folder"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_a_user_error_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("scale-mae: error: ")
    assert message in lines[0]


def test_a_user_error_under_torchrun_is_printed_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "scale_mae", "pretrain", "debug", "train.micro_batch=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)
    assert result.returncode != 0
    assert result.stderr.count("scale-mae: error:") == 1
    assert "Traceback" not in result.stderr.split("scale-mae: error:")[1].split("\n")[0]


def test_convert_of_a_damaged_run_prints_one_error_and_writes_nothing(run, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        next((checkpoint / "deepspeed").glob("*model_states.pt")).write_bytes(b"")
    assert main(["convert", str(copy), "--to", "timm", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "all 2 checkpoints are damaged" in error.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_doctor_finds_no_problem_except_scarce_disk_or_memory(tmp_path):
    result = call("doctor", cwd=tmp_path)
    problems = [line for line in result.stdout.splitlines() if line.startswith("PROBLEM")]
    scarce = [line for line in problems if " free: " in line]  # other processes may use the disk and the memory
    assert problems == scarce, result.stdout
    assert result.returncode == bool(problems)
    for word in ("torch ", "deepspeed 0", "nvidia-dali", "nvidia.dali can be imported", "of disk", "of memory", " problems"):
        assert word in result.stdout


def test_doctor_prints_advice_for_a_problem(monkeypatch, capsys):
    from collections import namedtuple

    from scale_mae import doctor

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(2**30, 0, 5 * 2**20))
    assert doctor.check_machine() == 1
    text = capsys.readouterr().out
    assert (
        "PROBLEM  0.0 GiB of disk space free: a ViT-H checkpoint takes 8 GiB; set run.dir to a folder on a larger disk" in text
    )


def test_overrides_may_follow_options(capsys):
    assert main(["pretrain", "debug", "--dry-run", "run.seed=5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["seed"] == 5
    with pytest.raises(SystemExit):
        main(["pretrain", "debug", "--dry", "--nonsense"])


def test_schema_prints_the_json_schema(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
