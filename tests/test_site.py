"""Job scripts and site files, without Slurm: what is written for each kind of site."""

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
from scale_mae.slurm.site import Site, SiteError, load_site, seconds
from scale_mae.slurm.status import duration, find_runs, run_status, show
from scale_mae.slurm.submit import CLUSTER, lead_seconds, node_counts, prepare, set_aside, unseen


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(folder, **site):
    """A checked job script."""
    job = prepare(load_config("debug", {"run.dir": str(folder / "my run"), "train.global_batch": 64}), Site(**site))
    assert subprocess.run(["bash", "-n"], input=job.script, text=True, capture_output=True, check=False).stderr == ""
    assert not re.search(r"@\w+@", job.script)
    return job.script


def launched(text, folder, *programs):
    """What the script's ``launch`` would start, a word a line, with programs in place of those that are not here."""
    for name in programs:
        stand_in = folder / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@"\n')
        stand_in.chmod(0o755)
    function = text[text.index("launch() {") : text.index("\n}\n", text.index("launch() {")) + 3]
    before = f"PATH={folder}/bin:$PATH nodes=2 run='{folder}/my run'\ncancelled() {{ :; }}\n"
    program = f'{before}{function}\nlaunch pretrain "$run/slurm/config.yaml"\n'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("task", ["pretrain", "finetune", "linprobe"])
def test_a_job_runs_the_command_of_its_recipe(tmp_path, task):
    recipe = "debug" if task == "pretrain" else f"{task}_demo"
    job = prepare(load_config(recipe, {"run.dir": str(tmp_path / "run"), "engine.deepspeed": "zero0"}), Site())
    assert f'\nlaunch {task} "$run/slurm/config.yaml"\n' in job.script


def test_images_to_evaluate_on_that_are_not_seen_are_told(tmp_path):
    config = load_config("finetune_demo", {"run.dir": str(tmp_path / "run"), "classify.val_source": str(tmp_path / "nowhere")})
    assert [line.partition("(")[0] for line in unseen(config) if line.startswith("classify.val_source")]


def test_without_a_container_this_python_runs(folder):
    code = f"{folder}/my run/slurm/code"
    text = script(folder, gpus_per_node=4, cpus_per_task=7, partition="gpu", account="me", sbatch=["--constraint=h100"])
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--nodes=1",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=7",
        "--partition=gpu",
        "--requeue",
    ):
        assert wanted in directives
    assert "--constraint=h100" in directives
    assert f"--output='{folder}/my run/slurm/job-%j.log'" in directives
    words = launched(text, folder, "srun")
    assert words[:5] == ["srun", "--export=ALL", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]
    assert "--kill-on-bad-exit=1" in words
    assert {"--export=ALL", "--cpus-per-task=7"} <= set(words)
    assert words[-4:] == [sys.executable, f"{code}/run.py", "pretrain", f"{folder}/my run/slurm/config.yaml"]


def test_pyxis_is_told_by_srun_and_apptainer_wraps_the_program(folder):
    mounts, code = ["/data", "/a:/b"], f"{folder}/my run/slurm/code"
    (folder / "mae.sif").touch()
    text = script(folder, gpus_per_node=8, container={"image": "site#scale-mae:1", "mounts": mounts})
    words = launched(text, folder, "srun")
    own = f"{folder}/my run:{folder}/my run,{folder}:{folder},/data:/data,/a:/b"
    assert "--container-image=site#scale-mae:1" in words
    assert f"--container-mounts={own}" in words
    assert words[-4:-1] == ["python3", f"{code}/run.py", "pretrain"]
    assert "--container" not in "".join(line for line in text.splitlines() if line.startswith("#SBATCH"))

    text = script(folder, gpus_per_node=8, container={"image": "mae.sif", "mounts": mounts})
    words = launched(text, folder, "srun")
    inside = words[words.index("apptainer") :]
    assert inside[:3] == ["apptainer", "exec", "--nv"]
    assert inside[3:11:2] == ["--bind"] * 4
    assert inside[-5:-1] == [f"{folder}/mae.sif", "python3", f"{code}/run.py", "pretrain"]
    assert "unset PYTHONPATH" in text
    assert "cache=/tmp/scale-mae-" in text


def test_the_environment_and_the_site_go_before_our_defaults(folder):
    text = script(folder, env={"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib 0"}, setup="module load cuda")
    assert "export NCCL_DEBUG=INFO" in text
    assert "export NCCL_SOCKET_IFNAME='ib 0'" in text
    assert 'export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"' in text
    assert text.index("module load cuda") < text.index("export NCCL_DEBUG")


def test_the_site_file_is_found_where_it_says(folder):
    for place, partition in ((folder / "config" / "scale_mae", "home"), (folder, "here"), (folder / "run", "run")):
        place.mkdir(parents=True, exist_ok=True)
        (place / "site.yaml").write_text(f"partition: {partition}\nqos: null\n")
        assert load_site(folder / "run", {"time": "1:00:00", "qos": None}).partition == partition
    assert load_site(folder / "run", {"partition": "mine"}).partition == "mine"


def test_the_example_is_a_site_file(folder):
    (folder / "site.yaml").write_text((CLUSTER / "site.example.yaml").read_text())
    (folder / "x.sif").touch()
    site = load_site(folder / "run", {"image": "x.sif"})
    assert (site.tasks_per_node, site.container.kind, site.container.mounts) == (8, "apptainer", ("/data",))
    script(folder, **site.model_dump())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("partion: gpu", {}, "site.yaml: partion: unknown key; keys are partition, account"),
        ("time: 24:00:00", {}, 'site.yaml: time 86400: put it in quotes, as in "24:00:00"'),
        ("time: soon", {}, "site.yaml: time soon: not a time limit"),
        ("nodes: 0", {}, "site.yaml: nodes 0: String should match"),
        ("- a", {}, "site.yaml: a site file is a mapping of keys, not list"),
        ("a: [", {}, "site.yaml: cannot be read"),
        ("{}", {"nodes": "3-2"}, "nodes=3-2: the first number must not be the larger one"),
        ("container: x.sqsh", {}, "site.yaml: container x.sqsh: Input should be"),
        ("env: {A B: 1}", {}, "site.yaml: env.A B.[key] A B: String should match"),
        ("{}", {"gpus_per_node": 0}, "--gpus-per-node 0: Input should be greater than 0"),
    ],
)
def test_a_wrong_site_file_is_one_line(folder, text, options, message):
    (folder / "site.yaml").write_text(text)
    with pytest.raises(SiteError) as error:
        load_site(folder / "run", options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("1-6", 108000),
        ("1-06:30", 109800),
        ("2-00:00:05", 172805),
        ("infinite", None),
    ],
)
def test_time_limits(text, wanted):
    assert seconds(text) == wanted


def test_nodes_over_which_the_batch_divides():
    config = load_config("debug", {"train.global_batch": 96, "train.micro_batch": 4})
    assert node_counts(config, Site(nodes="1-8", gpus_per_node=4)) == [6, 3, 2, 1]
    with pytest.raises(UserError, match="not divisible"):
        node_counts(config, Site(nodes="5", gpus_per_node=4))
    with pytest.raises(UserError, match="not divisible"):
        node_counts(config, Site(nodes="4-5", gpus_per_node=4))


def test_slurm_warns_earlier_where_saves_take_long(tmp_path):
    assert lead_seconds(tmp_path, "24:00:00") == 120
    (tmp_path / "log.txt").write_text("x saved a in 200.0 s\nx saved b in 100.0 s; training stood still for 1.0 s of it\n")
    assert lead_seconds(tmp_path, "24:00:00") == 460
    assert lead_seconds(tmp_path, "10") == 150


def test_code_config_and_deepspeed_file_are_set_aside(folder):
    own = folder / "mine.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    config = load_config("debug", {"run.dir": "runs/one", "engine.deepspeed": str(own)})
    path = set_aside(prepare(config, Site()))
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


def test_an_image_or_a_name_that_cannot_be_meant_is_refused(folder):
    for site, run, message in (
        (Site(container={"image": "absent.sqsh"}), "run", "container image absent.sqsh: no such file"),
        (Site(), "100% run", "Slurm gives '%' in the name of a file a meaning"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(load_config("debug", {"run.dir": run}), site)


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
        (["data.source=imagenet2k:train:data"], "no layout imagenet2k"),
        (["model.init_from=data/00.tar"], ""),
        (["model.init_from=two\nlines.pth"], r"model.init_from=two\nlines.pth: no such file or folder"),
        (["model.init_from=absent.pth", "run.dir=begun"], ""),  # what begins it is its checkpoint
    ],
)
def test_what_this_host_does_not_see_is_told_in_a_line_and_no_error(folder, capsys, words, message):
    (folder / "data" / "train").mkdir(parents=True)
    for name in ("00.tar", "01.tar"):
        (folder / "data" / name).touch()
    (folder / "begun" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert main(["submit", "debug", "run.dir=run", "--dry-run", *words]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash")
    assert said.err.count("\n") == bool(message)
    if message:
        assert said.err.startswith("scale-mae: warning: ")
        assert message in said.err
        assert "not seen from this host; if the nodes do not have it either, scale-mae cancel the run" in said.err


def test_only_numbers_of_nodes_that_fit_are_asked_for(folder):
    config = load_config("debug", {"run.dir": "run", "train.global_batch": 96})
    assert "#SBATCH --nodes=1-6\n" in prepare(config, Site(nodes="1-8", gpus_per_node=4)).script


def test_another_config_in_the_run_directory_is_refused(folder):
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(load_config("debug", {"run.seed": 7}).to_yaml())
    with pytest.raises(UserError, match="holds a run of another config"):
        prepare(load_config("debug", {"run.dir": str(run)}), Site())


def test_without_slurm_the_commands_say_so(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "debug", "run.dir=run"]) == 2
    assert "squeue is not on the PATH" in capsys.readouterr().err
    assert main(["status", "absent"]) == 2
    assert "absent: no run directory here" in capsys.readouterr().err
    set_aside(prepare(load_config("debug", {"run.dir": "run"}), Site()))
    assert main(["status", "run"]) == 0
    assert "not started" in capsys.readouterr().out
    assert main(["cancel", "run"]) == 2
    assert "nothing of this run is running" in capsys.readouterr().err


def test_of_several_runs_a_long_error_is_cut(tmp_path, capsys):
    error = "failed: " + "gradients went bad in steps and samples " * 20
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(load_config("debug", {}).to_yaml())
        (tmp_path / name / "exit_status").write_text(error + "\n")
    assert main(["status", str(tmp_path)]) == 0
    assert "failed: gradients went bad in steps and samples gradients went" in (out := capsys.readouterr().out)
    assert out.count("samples") <= 4
    assert main(["status", str(tmp_path / "one")]) == 0
    assert error.strip() in capsys.readouterr().out


@pytest.mark.parametrize("words", [["submit", "debug", "--dry-run"], ["submit", "debug", "bad.key=1"], ["status", "/absent"]])
def test_a_login_node_needs_no_torch(folder, words):
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


def test_a_table_of_runs(folder, capsys):
    for name in ("one", "two"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.yaml").write_text("")
    line = '{"step": 30, "total_steps": 60, "loss": 0.25, "images_per_s": 99.6, "eta_s": 7300.0}'
    (folder / "runs" / "one" / "log.jsonl").write_text(line + '\n{"step": 3')  # killed while it wrote
    (folder / "runs" / "one" / "exit_status").write_text("failed: loss is not finite at step 31\n")
    show([run_status(run) for run in find_runs(Path("runs"))])
    one, two = capsys.readouterr().out.splitlines()[1:3]
    for wanted in ("runs/one", "failed: loss is not finite at step 31", "30 of 60 (50%)", "0.2500", "100", "2 h 1 min"):
        assert wanted in one
    assert "not started" in two


def test_restarts_are_those_of_the_history(folder, capsys):
    """Not every restart resumes: a run that had saved nothing begins anew, and counts all the same."""
    (folder / "config.yaml").write_text("")
    assert run_status(folder).restarts == 0
    (folder / "log.jsonl").write_text('{"step": 3}\n')
    (folder / "log.txt").write_text("resumed from a.pth\n")
    show([run_status(folder)])
    assert re.search(r"restarts +-\n", capsys.readouterr().out)  # nothing that counted them
    for number in range(3):
        history.append(folder, "start", step=0, restarts=number)
    history.append(folder, "start", step=0, restarts="many")
    history.append(folder, "stop", step=4)
    assert run_status(folder).restarts == 2
    (folder / history.FILE).unlink()
    (folder / history.FILE).mkdir()  # cannot be read
    assert run_status(folder).restarts is None


def test_durations():
    assert [duration(s) for s in (12, 300, 12000, 183600)] == ["12 s", "5 min", "3 h 20 min", "2 d 3 h"]
