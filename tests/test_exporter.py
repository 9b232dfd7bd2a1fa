"""The Prometheus exporter of real runs, scraped over HTTP: values, target files, and errors."""

import json
import math
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from ranks import collect, run_ranks, start_ranks
from test_trainer import log, make_config, train, train_until

from scale_mae.metrics.counters import Counters
from scale_mae.metrics.exporter import Exporter, RunInfo
from scale_mae.metrics.log_keys import LOG_KEYS
from scale_mae.metrics.node import Node
from scale_mae.metrics.nvml import THROTTLE_REASONS, GpuReading
from scale_mae.metrics.prometheus_metrics import INFO_LABELS, METRICS, NODE_METRICS, PREFIX, RUN_METRICS
from scale_mae.metrics.sinks import Log
from scale_mae.metrics.step_timer import StepTimer
from scale_mae.runs import history
from scale_mae.slurm.status import get_run_status

LONG = {"train.duration": "100000 steps", "checkpoint.interval": "100000 steps"}


def entries(run_dir):
    return sorted((run_dir.parent / "prometheus").glob("*.json"))


def wait_for(condition, seconds=150):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def target(run_dir):
    (entry,) = wait_for(lambda: entries(run_dir))
    (group,) = json.loads(entry.read_text())
    return group["targets"][0]


def scrape(address):
    """Return the value of each (name, labels)."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(series, name, **labels):
    return series[f"scale_mae_{name}", tuple(sorted(labels.items()))]


def counters_of(series):
    return {key: v for key, v in series.items() if key[0].endswith(("_total", "_bucket", "_sum", "_count")) and v == v}


def last_line(run_dir):
    return json.loads((run_dir / "log.jsonl").read_text().rpartition("\n")[0].rpartition("\n")[2])


def logged(run_dir, steps):
    return (run_dir / "log.jsonl").exists() and len(log(run_dir, "loss")) >= steps


def scrape_a_line(run_dir, address):
    """Return a scrape of a live run, and the log line that the scrape shows."""
    for _ in range(200):
        before, series, after = last_line(run_dir), scrape(address), last_line(run_dir)
        if before == after and value(series, "step") == before["step"]:
            return series, before
    raise AssertionError("no scrape fell between two log lines")


def start(ranks, run_dir, **setting):
    return start_ranks(ranks, train, make_config(run_dir, **LONG | setting))


def stop(processes, pipes):
    os.kill(processes[0].pid, signal.SIGTERM)
    return collect(processes, pipes, timeout=100)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Return a scrape of a run of two ranks, its log line and target file, and the run directory after the stop."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    running = start(2, run_dir, **{"checkpoint.interval": "3 steps"})
    try:
        wait_for(lambda: logged(run_dir, 5))
        entry = json.loads(entries(run_dir)[0].read_text())
        series, line = scrape_a_line(run_dir, target(run_dir))
    finally:
        stop(*running)
    return series, line, entry, run_dir


def test_a_scrape_contains_the_values_of_the_log_line(two_ranks):
    series, line, _, _ = two_ranks
    keys = {"images": "images_processed", "steps": "steps_done"}  # log keys of counters with another name
    for name, spec in RUN_METRICS.items():
        if spec.type == "gauge" and spec.source:
            if line.get(spec.source) is None:
                assert (f"scale_mae_{name}", ()) not in series
            else:
                assert value(series, name) == line[spec.source], name
        elif spec.type == "counter" and spec.source:
            assert value(series, f"{name}_total") == line[keys.get(name, name)], name
    assert value(series, "host_rss_bytes") == line["host_rss_gib"] * 2**30
    assert value(series, "checkpoint_timestamp_seconds") == pytest.approx(line["time"] - line["checkpoint_age_s"])
    assert value(series, "estimated_end_timestamp_seconds") == pytest.approx(line["time"] + line["eta_s"])
    assert value(series, "finished") == 0
    assert value(series, "step_seconds_count", phase="step") == line["steps_done"]
    assert value(series, "step_seconds_count", phase="checkpoint") == line["checkpoints"]
    assert 0 < value(series, "disk_free_bytes") < value(series, "disk_size_bytes")


def test_every_log_key_and_every_metric_is_in_its_table(two_ranks, make_exporter):
    optional = {key for key in LOG_KEYS if key.startswith(("val_", "decode_failures_"))}
    assert {key for key in two_ranks[1] if not key.startswith("decode_failures_")} == LOG_KEYS.keys() - optional
    assert {spec.source for spec in RUN_METRICS.values() if spec.type == "gauge" and spec.source} <= LOG_KEYS.keys()
    families = {family.name.removeprefix(PREFIX): family for family in make_exporter().collect()}
    families["info"] = families.pop(PREFIX.rstrip("_"))
    assert families.keys() == METRICS.keys()
    for name, family in families.items():
        assert (family.type, family.documentation) == (METRICS[name].type, METRICS[name].help)
        for sample in family.samples if name != "info" else ():
            assert set(sample.labels) - {"le"} == set(METRICS[name].labels), name
    assert not NODE_METRICS.keys() & RUN_METRICS.keys()


def test_the_phases_of_a_log_line_sum_to_the_time_of_a_step(two_ranks):
    _, line, _, run_dir = two_ranks
    parts = ("data_loading_s", "forward_backward_s", "optimizer_s", "other_s")
    for step, values in log(run_dir, "step_time_s", "checkpoint_s", *parts).items():
        assert values[0] == pytest.approx(sum(values[2:]))
        assert (values[1] > 0) == (step % 3 == 1 and step > 1)  # a save follows the log line of its step
    assert line["fastest_rank_s"] <= line["slowest_rank_s"]
    assert line["mfu"] is line["energy_j"] is None


def test_the_info_metric_describes_the_run_and_the_target_file_names_it(two_ranks):
    series, _, entry, run_dir = two_ranks
    (labels,) = [dict(labels) for name, labels in series if name == "scale_mae_info"]
    run = json.loads((run_dir / "run.id").read_text())["id"]
    assert labels.keys() == set(INFO_LABELS)
    assert (labels["run"], labels["restart"], labels["model"], labels["target"]) == (run, "0", "nano", "norm_pixel")
    assert [group["labels"] for group in entry] == [{"run": run, "node": "0", "instance": f"{run}/node0"}]
    assert all("run" not in dict(labels) for name, labels in series if name != "scale_mae_info")


def test_the_target_file_is_removed_at_exit_and_the_history_has_the_reason(two_ranks):
    _, _, _, run_dir = two_ranks
    assert list((run_dir.parent / "prometheus").iterdir()) == []
    events = history.read(run_dir)
    assert events[0]["event"] == "start"
    assert events[0].items() >= {"step": 0, "restarts": 0, "world_size": 2, "zero_stage": 2, "device": "cpu"}.items()
    assert events[0].keys() >= {"host", "job_id", "versions", "command"}
    saves = [e for e in events if e["event"] == "checkpoint"]
    assert [e["step"] for e in saves[:2]] == [3, 6][: len(saves)]
    newest = run_dir / "checkpoints" / f"step-{saves[-1]['step']:08d}"
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert saves[-1]["bytes"] == sum(file["bytes"] for file in files.values())
    assert events[-1].items() >= {"event": "stop", "step": saves[-1]["step"]}.items()
    assert events[-1]["reason"].startswith("stopped by")


def test_the_number_of_series_is_the_same_for_one_rank_and_two(two_ranks, tmp_path):
    running = start(1, tmp_path / "run", **{"train.micro_batch": 16, "checkpoint.interval": "3 steps"})
    try:
        wait_for(lambda: logged(tmp_path / "run", 5))
        series, _ = scrape_a_line(tmp_path / "run", target(tmp_path / "run"))
    finally:
        stop(*running)
    assert {key for key in series if key[0] != "scale_mae_info"} == {key for key in two_ranks[0] if key[0] != "scale_mae_info"}


@pytest.mark.parametrize("damage", [False, True])
def test_counters_do_not_decrease_when_a_killed_run_resumes(tmp_path, damage):
    run_dir = tmp_path / "run"
    setting = {"checkpoint.interval": "3 steps", "train.micro_batch": 8}
    processes, _ = start(2, run_dir, **setting)
    wait_for(lambda: logged(run_dir, 5))
    before, line = scrape_a_line(run_dir, target(run_dir))
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    saved = max(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-*"))
    lines = len((run_dir / "log.jsonl").read_text().splitlines())
    (left,) = entries(run_dir)  # a killed run does not remove it
    if damage:
        (run_dir / "counters.json").write_text('{"steps": 3, "ima')
    running = start(2, run_dir, **setting)
    try:
        wait_for(lambda: entries(run_dir)[0].read_text() != left.read_text() or logged(run_dir, saved + 1))
        wait_for(lambda: len((run_dir / "log.jsonl").read_text().splitlines()) > lines)
        after, _ = scrape_a_line(run_dir, target(run_dir))
    finally:
        stop(*running)
    assert entries(run_dir) == []
    assert value(after, "restarts_total") == get_run_status(run_dir).restarts == 1
    if damage:  # counters of the checkpoint remain; later steps are not counted
        assert value(after, "steps_total") > saved
        return
    old, new = counters_of(before), counters_of(after)
    assert all(new[key] >= old[key] for key in old)
    repeated = line["step"] - saved
    assert value(after, "steps_total") >= value(after, "step") + repeated
    assert value(after, "images_total") == 16 * value(after, "steps_total")
    assert [e["event"] for e in history.read(run_dir)].count("start") == 2


def test_the_history_of_a_finished_run_ends_with_finished(tmp_path):
    assert run_ranks(1, train, make_config(tmp_path / "run", **{"train.micro_batch": 16}))[0].finished
    assert history.read(tmp_path / "run")[-1].items() >= {"event": "stop", "step": 10, "reason": "finished"}.items()
    counted = json.loads((tmp_path / "run" / "counters.json").read_text())
    assert (counted["steps"], counted["images"], counted["checkpoints"]) == (10, 160, 3)  # including the last save


def test_a_port_in_use_and_an_unwritable_discovery_dir_do_not_stop_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        setting = {"log.metrics_port": port, "log.discovery_dir": str(tmp_path / "file" / "folder"), "train.micro_batch": 16}
        assert run_ranks(1, train, make_config(tmp_path / "run", **setting))[0].finished
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count(f"log.metrics_port={port}: not available (Address already in use)") == 1
    assert text.count("not writable (Not a directory). Prometheus cannot discover the exporter at") == 1


def train_inside(folder, config):
    os.chdir(folder)
    return train(config)


def test_the_discovery_dir_is_next_to_the_run_directory_also_when_that_is_the_current_directory(tmp_path):
    (tmp_path / "run").mkdir()
    config = make_config(".", **{"train.micro_batch": 16, "log.metrics_port": 0})
    assert run_ranks(1, train_inside, tmp_path / "run", config)[0].finished
    assert (tmp_path / "prometheus").is_dir()
    assert not (tmp_path / "run" / "prometheus").exists()


def test_without_a_port_there_is_no_exporter(tmp_path):
    assert run_ranks(1, train, make_config(tmp_path / "run", **{"log.metrics_port": None, "train.micro_batch": 16}))[0].finished
    assert not (tmp_path / "prometheus").exists()


# An exporter without a run


class TwoGpus:
    """A replacement for NVML, which this machine may not have."""

    def read(self, index):
        return GpuReading(index, 300.5 + index, None if index else 61.0, frozenset({"power_cap"}) if index == 0 else None)


@pytest.fixture
def make_exporter(tmp_path):
    made = []

    def make(number=0, count=1, run_id="r-1", **more):
        node = Node(number, count, [(number, 0), (number, 3), (number, 3)])
        counters = Counters({f"gpu_energy/{number}/0": 7.0, "gpu_energy/9/0": 99.0})
        is_first = more.get("is_first", number == 0)
        made.append(
            Exporter(
                RunInfo(run_id, tmp_path, {}),
                node,
                TwoGpus(),
                counters,
                StepTimer(torch.device("cpu")),
                more.get("port", 0),
                tmp_path / "sd",
                is_first=is_first,
            )
        )
        return made[-1]

    yield make
    for exporter in made:
        exporter.close()


def test_an_exporter_serves_the_gpu_values_that_nvml_provides(make_exporter):
    series = scrape(f"127.0.0.1:{make_exporter().port}")
    assert value(series, "gpu_power_watts", gpu="0") == 300.5
    assert value(series, "gpu_power_watts", gpu="3") == 303.5
    assert [dict(labels)["gpu"] for name, labels in series if name == "scale_mae_gpu_temperature_celsius"] == ["0"]
    throttled = {dict(labels)["reason"]: v for (name, labels), v in series.items() if name == "scale_mae_gpu_throttled"}
    assert throttled == {reason: float(reason == "power_cap") for reason in THROTTLE_REASONS.values()}
    assert value(series, "gpu_energy_joules_total", gpu="0") == 7
    assert len([name for name, _ in series if name == "scale_mae_gpu_energy_joules_total"]) == 1


def test_other_nodes_serve_their_own_hardware_only(make_exporter):
    series = scrape(f"127.0.0.1:{make_exporter(number=1, count=2).port}")
    names = {name for name, _ in series}
    assert "scale_mae_gpu_power_watts" in names
    assert "scale_mae_disk_free_bytes" in names
    assert not {"scale_mae_info", "scale_mae_loss", "scale_mae_steps_total", "scale_mae_step_seconds_count"} & names


def test_a_loss_that_is_not_finite_is_served_as_nan(make_exporter):
    exporter = make_exporter()
    assert ("scale_mae_loss", ()) not in scrape(f"127.0.0.1:{exporter.port}")
    exporter.write_metrics({"step": 3, "total_steps": 3, "loss": None, "energy_j": 50.0, "images_processed": 100})
    series = scrape(f"127.0.0.1:{exporter.port}")
    assert math.isnan(value(series, "loss"))
    assert value(series, "finished") == 1
    assert value(series, "joules_per_million_images") == 500_000


def test_target_files_of_removed_nodes_are_removed_and_that_of_a_successor_is_kept(make_exporter, tmp_path):
    def names():
        return sorted(p.name for p in (tmp_path / "sd").iterdir())

    make_exporter(1, 2)
    make_exporter(2, 3)
    make_exporter(4, 5, "r-10")
    first = make_exporter(0, 2)
    assert names() == ["r-1-node0.json", "r-1-node1.json", "r-10-node4.json"]
    successor = make_exporter(0, 2)
    first.close()
    assert "r-1-node0.json" in names()
    successor.close()
    assert "r-1-node0.json" not in names()


def test_target_files_of_a_killed_run_at_the_same_address_are_removed(make_exporter, tmp_path):
    folder = tmp_path / "sd"
    killed = make_exporter(1, 2, "killed")
    entry = folder / "killed-node1.json"
    left = entry.read_text()
    killed.close()
    entry.write_text(left)
    elsewhere, by_hand, more = (folder / f"{name}-node0.json" for name in ("elsewhere", "by-hand", "more"))
    labels = {"run": "elsewhere", "node": "0"}
    elsewhere.write_text(json.dumps([{"targets": ["elsewhere:1"], "labels": labels}]))
    (target,) = json.loads(left)[0]["targets"]
    by_hand.write_text(json.dumps([{"targets": [target], "labels": {"run": "mine"}}]))
    more.write_text('{"')
    make_exporter(0, 1, "r-1", port=killed.port)
    assert json.loads((folder / "r-1-node0.json").read_text())[0]["targets"] == [target]
    assert sorted(folder.glob("*-node0.json")) == sorted([by_hand, elsewhere, more, folder / "r-1-node0.json"])
    assert not entry.exists()


def test_a_run_stopped_between_log_lines_counts_all_of_its_steps(tmp_path):
    config = make_config(tmp_path / "run", **{"log.interval": 4, "train.micro_batch": 16})
    result = run_ranks(1, train_until, config, 4)[0]
    counted = json.loads((Path(config.run.dir) / "counters.json").read_text())
    assert counted["steps"] == result.step


def test_the_time_of_the_last_step_is_served_between_log_steps(tmp_path):
    running = start(1, tmp_path / "run", **{"log.interval": 1_000_000})
    try:
        address = target(tmp_path / "run")
        key = ("scale_mae_last_step_timestamp_seconds", ())
        first = wait_for(lambda: scrape(address).get(key))
        assert 0 <= time.time() - first < 60
        assert wait_for(lambda: scrape(address)[key] > first)
        assert not (tmp_path / "run/log.jsonl").read_text()
    finally:
        stop(*running)


def test_the_target_file_of_a_failed_run_remains_for_the_alert(make_exporter, tmp_path):
    entry = tmp_path / "sd" / "r-1-node0.json"
    with pytest.raises(RuntimeError), Log([make_exporter()]):
        raise RuntimeError("disk full")
    assert entry.exists()
    with Log([make_exporter()]):
        pass
    assert not entry.exists()
