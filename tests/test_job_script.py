"""Job scripts for each kind of cluster, and the checks of ``scale-mae submit``. These tests need no Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scale_mae.cli import main
from scale_mae.config import UserError, load_config
from scale_mae.runs import history
from scale_mae.slurm.job_script import CLUSTER_DIR, get_warning_lead_seconds
from scale_mae.slurm.site_config import SiteConfig, load_site_config
from scale_mae.slurm.submit import find_missing_paths, get_valid_node_counts, prepare_job, write_job_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def render(folder, **site):
    """Return a job script that bash parses and in which all placeholders are filled."""
    job = prepare_job(load_config("debug", {"run.dir": str(folder / "my run"), "train.global_batch": 64}), SiteConfig(**site))
    assert subprocess.run(["bash", "-n"], input=job.script, text=True, capture_output=True, check=False).stderr == ""
    assert not re.search(r"@\w+@", job.script)
    return job.script


def launched_words(text, folder, *programs):
    """Return the words of the command line that the script's ``launch`` runs. ``programs`` are replaced by fake ones."""
    for name in programs:
        fake = folder / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text('#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@"\n')
        fake.chmod(0o755)
    function = text[text.index("launch() {") : text.index("\n}\n", text.index("launch() {")) + 3]
    before = f"PATH={folder}/bin:$PATH nodes=2 run='{folder}/my run'\nexit_if_cancelled() {{ :; }}\n"
    program = f'{before}{function}\nlaunch pretrain "$run/slurm/config.yaml"\n'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("task", ["pretrain", "finetune", "linprobe"])
def test_job_runs_the_subcommand_of_its_recipe(tmp_path, task):
    recipe = "debug" if task == "pretrain" else f"{task}_demo"
    job = prepare_job(load_config(recipe, {"run.dir": str(tmp_path / "run"), "engine.deepspeed": "zero0"}), SiteConfig())
    assert f'\nlaunch {task} "$run/slurm/config.yaml"\n' in job.script


def test_without_a_container_the_current_python_runs(folder):
    code = f"{folder}/my run/slurm/code"
    text = render(folder, gpus_per_node=4, cpus_per_task=7, partition="gpu", account="me", sbatch=["--constraint=h100"])
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    for expected in (
        "--nodes=1",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=7",
        "--partition=gpu",
        "--requeue",
    ):
        assert expected in directives
    assert "--constraint=h100" in directives
    assert f"--output='{folder}/my run/slurm/job-%j.log'" in directives
    words = launched_words(text, folder, "srun")
    assert words[:5] == ["srun", "--export=ALL", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]
    assert "--kill-on-bad-exit=1" in words
    assert {"--export=ALL", "--cpus-per-task=7"} <= set(words)
    assert words[-4:] == [sys.executable, f"{code}/run.py", "pretrain", f"{folder}/my run/slurm/config.yaml"]


def test_pyxis_gets_options_of_srun_and_apptainer_wraps_python(folder):
    mounts, code = ["/data", "/a:/b"], f"{folder}/my run/slurm/code"
    (folder / "mae.sif").touch()
    text = render(folder, gpus_per_node=8, container={"image": "site#scale-mae:1", "mounts": mounts})
    words = launched_words(text, folder, "srun")
    own = f"{folder}/my run:{folder}/my run,{folder}:{folder},/data:/data,/a:/b"
    assert "--container-image=site#scale-mae:1" in words
    assert f"--container-mounts={own}" in words
    assert words[-4:-1] == ["python3", f"{code}/run.py", "pretrain"]
    assert "--container" not in "".join(line for line in text.splitlines() if line.startswith("#SBATCH"))

    text = render(folder, gpus_per_node=8, container={"image": "mae.sif", "mounts": mounts})
    words = launched_words(text, folder, "srun")
    inside = words[words.index("apptainer") :]
    assert inside[:3] == ["apptainer", "exec", "--nv"]
    assert inside[3:11:2] == ["--bind"] * 4
    assert inside[-5:-1] == [f"{folder}/mae.sif", "python3", f"{code}/run.py", "pretrain"]
    assert "unset PYTHONPATH" in text
    assert "cache=/tmp/scale-mae-" in text


def test_environment_and_site_file_take_precedence_over_defaults(folder):
    text = render(folder, env={"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib 0"}, setup="module load cuda")
    assert "export NCCL_DEBUG=INFO" in text
    assert "export NCCL_SOCKET_IFNAME='ib 0'" in text
    assert 'export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"' in text
    assert text.index("module load cuda") < text.index("export NCCL_DEBUG")


def test_shipped_example_of_a_site_file_renders(folder):
    (folder / "site.yaml").write_text((CLUSTER_DIR / "site.example.yaml").read_text())
    (folder / "x.sif").touch()
    render(folder, **load_site_config(folder / "run", {"image": "x.sif"}).model_dump())


def test_valid_node_counts_are_those_over_which_the_batch_divides():
    config = load_config("debug", {"train.global_batch": 96, "train.micro_batch": 4})
    assert get_valid_node_counts(config, SiteConfig(nodes="1-8", gpus_per_node=4)) == [6, 3, 2, 1]
    with pytest.raises(UserError, match="not divisible"):
        get_valid_node_counts(config, SiteConfig(nodes="5", gpus_per_node=4))
    with pytest.raises(UserError, match="not divisible"):
        get_valid_node_counts(config, SiteConfig(nodes="4-5", gpus_per_node=4))


def test_slurm_warns_earlier_if_saves_take_long(tmp_path):
    assert get_warning_lead_seconds(tmp_path, "24:00:00") == 120
    history.append(tmp_path, "checkpoint", step=1, error="disk full")
    for seconds in (200.0, 100.0):
        history.append(tmp_path, "checkpoint", step=2, seconds=seconds, stalled=1.0, bytes=10)
    history.append(tmp_path, "stop", step=3, reason="finished", seconds=1000.0)
    assert get_warning_lead_seconds(tmp_path, "24:00:00") == 460
    assert get_warning_lead_seconds(tmp_path, "10") == 150


def test_job_uses_copies_of_code_config_and_deepspeed_file(folder):
    own = folder / "mine.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    config = load_config("debug", {"run.dir": "runs/one", "engine.deepspeed": str(own)})
    path = write_job_files(prepare_job(config, SiteConfig()))
    own.unlink()
    (folder / "elsewhere" / "scale_mae").mkdir(parents=True)
    (folder / "elsewhere" / "scale_mae" / "__init__.py").write_text(
        "raise SystemExit('this is not the code of the submission')"
    )
    command = [
        sys.executable,
        str(path.with_name("code") / "run.py"),
        "pretrain",
        str(path.with_name("config.yaml")),
        "--dry-run",
    ]
    done = subprocess.run(
        command, cwd=folder / "elsewhere", env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"deepspeed: {path.with_name('deepspeed.json')}" in done.stdout
    assert f"dir: {folder}/runs/one" in done.stdout
    assert (path.with_name("code") / "scale_mae" / "cluster" / "job.sh").is_file()


def test_missing_image_and_special_characters_in_run_dir_are_errors(folder):
    for site, run, message in (
        (SiteConfig(container={"image": "absent.sqsh"}), "run", "container.image=absent.sqsh: no such file"),
        (SiteConfig(), "100% run", "Slurm treats '%' in file names specially"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_job(load_config("debug", {"run.dir": run}), site)


NAMED = "imagenet1k:train:data"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ""),
        (["data.source=absent"], "data.source: absent: no such folder or file"),
        (["data.source=absent.index"], "data.source: absent.index: no such folder or file"),
        (["data.source=data"], ""),
        (["data.source=data/{00..01}.tar"], ""),
        (["data.source=data/{00..02}.tar"], "data.source: data/02.tar: no such shard"),
        (["data.source=demo:absent"], "data.source: demo:absent: no such shard"),
        ([f"data.source={NAMED}"], ""),
        ([f"data.source={NAMED}/train"], "data.source: data/train: training images are missing"),
        (["data.source=imagenet1k:train:absent"], "data.source: absent: no such folder"),
        (["data.source=imagenet2k:train:data"], "no data set layout imagenet2k"),
        (["model.init_from=data/00.tar"], ""),
        (["model.init_from=two\nlines.pth"], r"model.init_from=two\nlines.pth: no such file or folder"),
        (["model.init_from=absent.pth", "run.dir=begun"], ""),  # the checkpoint replaces these weights
    ],
)
def test_missing_path_is_a_one_line_warning_and_no_error(folder, capsys, words, message):
    (folder / "data" / "train").mkdir(parents=True)
    for name in ("00.tar", "01.tar"):
        (folder / "data" / name).touch()
    (folder / "begun" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert main(["submit", "debug", "run.dir=run", "--dry-run", *words]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("#!/bin/bash")
    assert output.err.count("\n") == bool(message)
    if message:
        assert output.err.startswith("scale-mae: warning: ")
        assert message in output.err
        assert "The nodes may see it although this host does not." in output.err


def test_missing_validation_images_cause_a_warning(tmp_path):
    config = load_config("finetune_demo", {"run.dir": str(tmp_path / "run"), "classify.val_source": str(tmp_path / "absent")})
    assert any(line.startswith("classify.val_source") for line in find_missing_paths(config))


def test_job_requests_only_valid_node_counts(folder):
    config = load_config("debug", {"run.dir": "run", "train.global_batch": 96})
    assert "#SBATCH --nodes=1-6\n" in prepare_job(config, SiteConfig(nodes="1-8", gpus_per_node=4)).script


def test_run_directory_of_another_configuration_is_an_error(folder):
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(load_config("debug", {"run.seed": 7}).to_yaml())
    with pytest.raises(UserError, match="contains a run with another configuration"):
        prepare_job(load_config("debug", {"run.dir": str(run)}), SiteConfig())


def test_without_slurm_submit_and_cancel_fail_and_status_works(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "debug", "run.dir=run"]) == 2
    assert "squeue is not on the PATH" in capsys.readouterr().err
    assert main(["status", "absent"]) == 2
    assert "absent: not a run directory, and contains none" in capsys.readouterr().err
    write_job_files(prepare_job(load_config("debug", {"run.dir": "run"}), SiteConfig()))
    assert main(["status", "run"]) == 0
    assert "not started" in capsys.readouterr().out
    assert main(["cancel", "run"]) == 2
    assert "no job and no process of this run exists" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["submit", "debug", "--dry-run"], ["submit", "debug", "bad.key=1"], ["status", "/absent"]])
def test_submit_and_status_work_without_torch(folder, words):
    program = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'numpy', 'deepspeed')); sys.argv[0] = 'scale-mae'; "
        "from scale_mae.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if "--dry-run" in words else 2), done.stderr
    assert "Traceback" not in done.stderr
