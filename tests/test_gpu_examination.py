"""benchmarks/gpu.py: a whole rehearsal, and stages that hang, fail, run out of memory or are killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its modules import each other as scripts do

import gpu  # noqa: E402
import report  # noqa: E402
from gpu_stages import STAGES, pytest_lines, tests  # noqa: E402
from gpu_stages.stage import OutOfTime, Stage  # noqa: E402

GOOD = """
import time
def run(stage):
    for number in range({cases}):
        with stage.case(str(number)) as case:
            time.sleep({seconds})
            case["number"] = number
def rows(result):
    return [{{"number": case["number"]}} for case in result["cases"]]
"""
HANGS = """
import subprocess, sys, time
def run(stage):
    with stage.case("before") as case:
        case["child"] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", str(stage.out)]).pid
    with stage.case("hangs"):
        hang_here()
def hang_here():
    time.sleep(1000)
def rows(result):
    return result["cases"]
"""
RUNS_OUT = """
import os, signal, torch
def run(stage):
    with stage.case("too large"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with stage.case("small") as case:
        case["batch"] = 1
    {then}
def rows(result):
    return [{{"case": case["case"], "wrong": case["missing"]}} for case in result["cases"]]
"""
KILLED = RUNS_OUT.format(then="os.kill(os.getpid(), signal.SIGKILL)")  # what the kernel does on a host without memory
RAISES = """
def run(stage):
    with stage.case("fine"):
        pass
    raise ValueError("no such luck")
def rows(result):
    return []
"""


@pytest.fixture
def tree(tmp_path):
    """``tree({name: (seconds, source)})``: the command of a copy of gpu.py with other stages."""

    def make(stages):
        folder = tmp_path / "benchmarks"
        (folder / "gpu_stages").mkdir(parents=True)
        for name in ("gpu.py", "report.py", "gpu_stages/stage.py", "gpu_stages/child.py"):
            shutil.copy(BENCHMARKS / name, folder / name)
        limits = {name: (seconds, "?") for name, (seconds, _) in stages.items()}
        (folder / "gpu_stages/__init__.py").write_text(f"STAGES = {limits}\n")
        for name, (_, source) in stages.items():
            (folder / f"gpu_stages/{name}.py").write_text(source)
        return [sys.executable, str(folder / "gpu.py"), "--rehearse", "--out", str(tmp_path / "out"), "--minutes"]

    return make


def results(out):
    """Every stage file, each of which must be readable."""
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json") if not path.stem.startswith("gpu_")}


def wait_until_gone(word, seconds=10):
    """Wait until no process has the word in its command."""
    until = time.monotonic() + seconds
    while left := [p for p in psutil.process_iter(["cmdline"]) if any(word in part for part in p.info["cmdline"] or [])]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_and_prints_one_screen(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--minutes", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    log = (tmp_path / "log.txt").read_text()[-5000:]
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert done.stderr == ""
    found = results(tmp_path)
    assert found.keys() == STAGES.keys()
    for name, result in found.items():
        assert (result["status"], result["exit_code"]) == ("done", 0), name
        assert result["cases"], name
        assert result["table"], name
        assert "Error" not in str(result["table"]), name
    assert len(list(tmp_path.iterdir())) <= 8
    table = done.stdout[done.stdout.index("overview:") :].splitlines()
    assert len(table) <= 60
    assert [line.split()[1] for line in table[2:8]] == ["done"] * 6
    assert {f"{name}:" for name in STAGES} <= set(table)
    smoke = {case["case"]: case for case in found["smoke"]["cases"]}
    assert smoke["resume"]["steps"] == [5, 6, 7, 8]
    assert smoke["convert"]["features"][0] == 2
    markdown = report.tables(tmp_path / "gpu_rehearsal.json")
    assert "| resume |" in markdown
    assert "not measured yet" not in markdown
    wait_until_gone(str(tmp_path))


@pytest.mark.slow
def test_a_bad_stage_is_told_and_the_next_one_runs(tree, tmp_path):
    stages = {
        "hangs": (12, HANGS),
        "killed": (60, KILLED),
        "raises": (60, RAISES),
        "broken": (60, "import not_there"),
        "runs_out": (60, RUNS_OUT.format(then="")),
        "good": (60, GOOD.format(cases=2, seconds=0)),
    }
    done = subprocess.run([*tree(stages), "4"], check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    found = results(tmp_path / "out")
    statuses = {name: result["status"] for name, result in found.items()}
    assert statuses == {
        "hangs": "timed out", "killed": "failed", "raises": "failed", "broken": "failed", "runs_out": "done", "good": "done"
    }  # fmt: skip
    assert found["killed"]["exit_code"] == -signal.SIGKILL
    assert any("in hang_here" in line for line in found["hangs"]["output"])
    assert found["raises"]["output"][-1] == "ValueError: no such luck"
    assert found["raises"]["output"][-2].strip() == 'raise ValueError("no such luck")'
    assert found["broken"]["output"][-1] == "ModuleNotFoundError: No module named 'not_there'"
    for name in ("killed", "runs_out"):
        assert [case.get("error", "")[:17] for case in found[name]["cases"]] == ["OutOfMemoryError:", ""]
        assert found[name]["table"] == [{"table": "KeyError: 'missing'"}]  # the table reports a mistake in a table
    assert found["good"]["table"] == [{"number": "0"}, {"number": "1"}]
    for line in ("timed out: ", "ValueError: no such luck", "OutOfMemoryError: CUDA out of memory", "not_there"):
        assert line in done.stdout
    assert not psutil.pid_exists(found["hangs"]["cases"][0]["child"])
    wait_until_gone(str(tmp_path))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_a_random_moment_it_loses_nothing_and_leaves_no_process(tree, tmp_path, sent):
    steady = GOOD.format(cases=1000, seconds=0.02)
    command = [
        *tree({"first": (60, GOOD.format(cases=3, seconds=0)), "steady": (60, steady), "last": (60, steady)}),
        "4",
    ]
    process, out = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), tmp_path / "out"
    while len(results(out).get("steady", {"cases": []})["cases"]) < 3:
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(random.uniform(0, 1))
    before = len(results(out)["steady"]["cases"])
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=10)
    wait_until_gone(str(tmp_path))
    found = results(out)
    assert (found["first"]["status"], len(found["first"]["cases"])) == ("done", 3)
    assert [case["number"] for case in found["steady"]["cases"]][:before] == list(range(before))
    assert json.loads((out / "gpu_rehearsal.json").read_text())["samples"]["first"] == found["first"]
    assert "last" not in found
    if sent == signal.SIGTERM:
        assert process.returncode == 1
        assert found["steady"]["status"] == "stopped"
        table = printed[printed.index("overview:") :]
        assert "stopped: " in table
        assert len(table.splitlines()) <= 60


def test_it_ends_in_time_and_a_second_call_keeps_other_stages(tree, tmp_path):
    command = tree(
        {"first": (60, GOOD.format(cases=1, seconds=0)), "slow": (600, GOOD.format(cases=1, seconds=300)), "late": (60, RAISES)}
    )
    subprocess.run([*command, "0.5", "--stages", "first"], check=True, timeout=60)
    began = time.monotonic()
    done = subprocess.run([*command, "0.5", "--stages", "late,slow"], check=False, capture_output=True, text=True, timeout=90)
    assert time.monotonic() - began < 30
    assert done.returncode == 1
    statuses = {name: result["status"] for name, result in results(tmp_path / "out").items()}
    assert statuses == {"first": "done", "slow": "timed out", "late": "cut"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--stages", "smoke,steps"],
            "gpu.py: --stages: there is no stage 'steps'; there are smoke,tests,step,feed,host,profile",
        ),
        (["--stages", ""], "gpu.py: --stages: there is no stage ''; there are smoke,tests,step,feed,host,profile"),
        (["--minutes", "0.4"], "gpu.py: --minutes 0.4: at least 0.5"),
        (["--minutes", "nan"], "gpu.py: --minutes nan: at least 0.5"),
        (["--out", __file__], f"gpu.py: --out {__file__}: is not a folder"),
        (["--rehearse", "--out", f"{__file__}/x"], f"gpu.py: --out {__file__}/x: cannot be written (Not a directory)"),
        (["--rehearse", "--out", "/proc/x"], "gpu.py: --out /proc/x: cannot be written (No such file or directory)"),
        *((["--stages", name], "gpu.py: torch finds no GPU; --rehearse runs the examination on a CPU") for name in STAGES),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == line + "\n"
    assert not (tmp_path / "out").exists()


TESTS = """
import os, signal, time
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_hangs(): time.sleep(100)
def test_hangs_where_no_signal_helps():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(100)
def test_is_left_out(): pytest.skip("nothing to test")
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.fixture
def spoilt():
    yield
    raise OSError("cannot clean up")
def test_ends_badly(spoilt): pass
def test_passes_at_last(): pass
"""


def test_a_test_that_hangs_or_crashes_stops_no_other(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_not.py").write_text("import not_there\n")
    (tmp_path / "data").mkdir()
    stage = Stage("tests", tmp_path / "tests.json", tmp_path / "data", seconds=120, rehearse=True)
    tests.examine(stage, [str(tmp_path)], limit=2, grace=2)
    cases = {case["case"].rpartition("::")[2]: case for case in json.loads((tmp_path / "tests.json").read_text())["cases"]}
    assert {name: case["outcome"] for name, case in cases.items() if not name.endswith(".py")} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_hangs": "failed",
        "test_hangs_where_no_signal_helps": "failed",
        "test_is_left_out": "skipped",
        "test_crashes": "failed",
        "test_ends_badly": "failed",
        "test_passes_at_last": "passed",
    }
    assert cases["test_fails"]["error"] == "assert 1 == 2"
    assert "Timeout" in cases["test_hangs"]["error"]
    assert cases["test_hangs_where_no_signal_helps"]["error"] == "pytest hangs for 4 s in this test"
    assert cases["test_is_left_out"]["reason"] == "Skipped: nothing to test"
    assert cases["test_crashes"]["error"] == f"pytest ends with exit code {-signal.SIGSEGV} in this test"
    assert cases["test_ends_badly"]["error"] == "OSError: cannot clean up"
    assert [case["error"] for name, case in cases.items() if name.endswith("test_not.py")] == [
        "ModuleNotFoundError: No module named 'not_there'"
    ]
    table = tests.rows(stage.result)
    assert [(row["passed"], row["failed"], row["skipped"]) for row in table if row["file"] == "test_it.py"] == [("2", "5", "1")]


def test_tests_without_time_are_named(tmp_path):
    (tmp_path / "test_it.py").write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(100)\n")
    stage = Stage("tests", tmp_path / "tests.json", tmp_path, seconds=8, rehearse=True)
    with pytest.raises(OutOfTime, match="1 tests did not run"):
        tests.examine(stage, [str(tmp_path / "test_it.py")])
    assert [case["outcome"] for case in stage.result["cases"]] == ["passed"]
    assert tests.rows(stage.result)[0]["not run"] == "1"
    wait_until_gone(str(tmp_path))


def test_no_tests_are_no_success(tmp_path):
    stage = Stage("tests", tmp_path / "tests.json", tmp_path, seconds=60, rehearse=True)
    with pytest.raises(RuntimeError, match="there are no tests to run"):
        tests.examine(stage, [str(tmp_path)])


def test_the_order_names_tests_that_exist():
    """A test of another name would run last."""
    for beginning in pytest_lines.ORDER:
        file, _, test = beginning.partition("::")
        assert f"def {test or 'test_'}" in (BENCHMARKS.parent / file).read_text(), beginning


def test_results_of_a_rehearsal_are_not_those_of_a_gpu(tmp_path):
    for name, rehearse in (("smoke", True), ("tests", False)):
        result = {"stage": name, "status": "done", "seconds": 1.0, "cases": [], "rehearse": rehearse}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    for rehearse, name in ((True, "smoke"), (False, "tests")):
        assert list(gpu.read_results(tmp_path, rehearse=rehearse)) == [name]


def test_the_printed_tables_lose_rows_and_not_each_other():
    many = [{"case": str(number), "value": "1"} for number in range(100)]
    found = {name: {"status": "done", "cases": [], "table": many} for name in STAGES}
    found["step"] |= {"table": many[:3], "cases": [{"case": "large", "error": "OutOfMemoryError: " + 200 * "x"}]}
    lines = gpu.as_lines(found).splitlines()
    assert len(lines) == 60
    assert {"overview:", "errors:", *(f"{name}:" for name in STAGES)} <= set(lines)
    assert lines[lines.index("step:") + 2 : lines.index("step:") + 5] == ["0     1", "1     1", "2     1"]
    assert lines.count("  more in the result file") == 5


def test_what_was_not_examined_is_not_measured_yet(tmp_path):
    text = report.tables(tmp_path / "gpu_NVIDIA_H100_80GB_HBM3.json")
    assert text.count("not measured yet") == len(STAGES)
    with pytest.raises(FileNotFoundError):
        report.tables(tmp_path / "loader.json")


def test_a_result_is_named_after_the_device(tmp_path):
    result = {
        "status": "done",
        "seconds": 3.0,
        "cases": [{"case": "a"}],
        "table": [{"x": "1"}],
        "machine": {"gpu": "NVIDIA H100 80GB HBM3"},
    }
    (tmp_path / "smoke.json").write_text(json.dumps(result))
    gpu.save_result(tmp_path, rehearse=False)
    text = report.tables(tmp_path / "gpu_NVIDIA_H100_80GB_HBM3.json")
    assert "GPU examination, NVIDIA H100 80GB HBM3." in text
    assert "| done | 3 | 1 | 0 |" in text
    assert "`smoke`:\n\n| x |\n| --- |\n| 1 |" in text
    assert text.count("not measured yet") == len(STAGES) - 1
