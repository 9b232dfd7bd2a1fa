"""``scale-mae status`` without Slurm: the status of a run from the files in its directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scale_mae.cli import main
from scale_mae.config import load_config
from scale_mae.runs import history
from scale_mae.slurm.status import find_runs, get_run_status, print_status
from scale_mae.system.durations import format_duration


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_long_error_is_shortened_in_the_table_of_several_runs_only(folder, capsys):
    error = "failed: " + "gradients diverged in steps and samples " * 20
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(load_config("debug", {}).to_yaml())
        (folder / name / "exit_status").write_text(error + "\n")
    assert main(["status", str(folder)]) == 0
    assert "failed: gradients diverged in steps and samples gradients diverged" in (out := capsys.readouterr().out)
    assert out.count("samples") <= 4
    assert main(["status", str(folder / "one")]) == 0
    assert error.strip() in capsys.readouterr().out


def test_table_of_several_runs(folder, capsys):
    for name in ("one", "two"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.yaml").write_text("")
    line = '{"step": 30, "total_steps": 60, "loss": 0.25, "images_per_s": 99.6, "eta_s": 7300.0}'
    (folder / "runs" / "one" / "log.jsonl").write_text(line + '\n{"step": 3')  # a kill cut the last line short
    (folder / "runs" / "one" / "exit_status").write_text("failed: loss is not finite at step 31\n")
    print_status([get_run_status(run) for run in find_runs(Path("runs"))])
    one, two = capsys.readouterr().out.splitlines()[1:3]
    for expected in ("runs/one", "failed: loss is not finite at step 31", "30 of 60 (50%)", "0.2500", "100", "2 h 1 min"):
        assert expected in one
    assert "not started" in two


def test_run_with_metrics_but_without_exit_status_has_crashed(folder):
    (folder / "log.jsonl").write_text('{"step": 3}\n')
    assert get_run_status(folder).state == "crashed or killed (no exit status)"


def test_restarts_come_from_the_history(folder, capsys):
    """Not every restart resumes. A run that has saved nothing starts from step 0 again, and this counts as a restart too."""
    (folder / "config.yaml").write_text("")
    assert get_run_status(folder).restarts == 0
    (folder / "log.jsonl").write_text('{"step": 3}\n')
    (folder / "log.txt").write_text("Resumed from a.pth\n")
    print_status([get_run_status(folder)])
    assert re.search(r"restarts +-\n", capsys.readouterr().out)  # there is no history
    for number in range(3):
        history.append(folder, "start", step=0, restarts=number)
    history.append(folder, "start", step=0, restarts="many")
    history.append(folder, "stop", step=4)
    assert get_run_status(folder).restarts == 2
    (folder / history.FILE).unlink()
    (folder / history.FILE).mkdir()  # cannot be read
    assert get_run_status(folder).restarts is None


def test_durations_have_at_most_two_units():
    assert [format_duration(s) for s in (12, 300, 12000, 183600)] == ["12 s", "5 min", "3 h 20 min", "2 d 3 h"]
