"""A real Prometheus scrapes a real run of two processes. Its rules and alerts run 60 times as fast."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from images import demo_index
from prometheus_server import PrometheusServer
from ranks import start_ranks
from test_monitoring import MONITORING, alerts, dashboard, expressions, names_in, panels, recorded

from scale_mae.config import load_config

pytestmark = [pytest.mark.service("prometheus"), pytest.mark.long]
LOG_KEYS = {  # series -> log key
    "scale_mae_step": "step",
    "scale_mae_total_steps": "total_steps",
    "scale_mae_epoch": "epoch",
    "scale_mae_schedule_images": "images",
    "scale_mae_images_total": "images_processed",
    "scale_mae_steps_total": "steps_done",
    "scale_mae_loss": "loss",
    "scale_mae_loss_smoothed": "loss_smoothed",
    "scale_mae_learning_rate": "lr",
    "scale_mae_gradient_norm": "grad_norm",
    "scale_mae_images_per_second": "images_per_s",
    "scale_mae_slowest_rank_seconds": "slowest_rank_s",
    "scale_mae_fastest_rank": "fastest_rank",
    "scale_mae_checkpoints_total": "checkpoints",
}


def needs_gpu(name):
    """Return whether a series requires a GPU, or a device with a known peak."""
    return "_gpu_" in name or "joule" in name or name in ("scale_mae_mfu", "scale_mae_hfu")


def may_be_absent(name):
    """Return whether a series may have no sample in a pre-training run on this machine."""
    return "_validation_" in name or (needs_gpu(name) and not torch.cuda.is_available())


def train_with_faults(config, faults):
    """Train. A file ``nan`` in ``faults`` makes the losses of rank 1 NaN; a file ``full`` simulates a full disk."""
    from scale_mae import pretrain
    from scale_mae.engine.deepspeed import Engine

    forward_backward, save = Engine.forward_backward, torch.save

    def bad(self, images, noise):
        loss = forward_backward(self, images, noise)
        return loss * float("nan") if self.world.rank == 1 and (faults / "nan").exists() else loss

    def full(state, path, *args, **kwargs):
        if (faults / "full").exists():
            raise OSError(28, "No space left on device")
        return save(state, path, *args, **kwargs)

    Engine.forward_backward, torch.save = bad, full
    return pretrain(config)


class MonitoredRun:
    """A run that continues until it is killed, and the Prometheus that scrapes it."""

    def __init__(self, folder):
        self.dir, self.faults, self.processes = folder / "runs" / "nano", folder / "faults", []
        for path in (folder / "prometheus", self.faults):
            path.mkdir()
        overrides = {"run.dir": str(self.dir), "data.source": demo_index(), "train.duration": "1000000 steps"}
        overrides |= {"checkpoint.interval": "40 steps", "log.interval": "5", "train.micro_batch": "8"}
        overrides |= {"rollback.max_skipped_steps": "1000000"}  # so that bad losses do not cause a rollback
        self.config = load_config("debug", overrides)
        self.server = PrometheusServer(folder / "prometheus", folder / "runs" / "prometheus")

    def start(self):
        """Start the run, and wait until Prometheus has scraped ten steps and a checkpoint of it."""
        before = self.log()[-1]["steps_done"] if self.log() else 0
        self.processes, self.pipes = start_ranks(2, train_with_faults, self.config, self.faults)
        self.until(lambda: (self.server.value("scale_mae_steps_total") or 0) >= before + 10, 120)
        self.until(lambda: self.server.value("scale_mae_checkpoint_timestamp_seconds > scale_mae_start_timestamp_seconds"), 60)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def log(self):
        path = self.dir / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition, seconds):
        """Wait for a condition. Fail if the run ends."""

        def holds():
            assert all(process.is_alive() for process in self.processes), "the run has ended"
            return condition()

        return self.server.wait(holds, seconds)

    def wait_until_firing(self, *names):
        self.until(lambda: set(names) <= self.server.firing(), 90)

    def wait_until_silent(self, *names):
        self.until(lambda: not set(names) & self.server.firing(), 60)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    run = MonitoredRun(tmp_path_factory.mktemp("watched"))
    try:
        run.start()
        yield run
    finally:
        run.kill()
        run.server.stop()


def test_queries_return_the_values_of_the_log(watched):
    """All series of a scrape come from the same log line."""
    server = watched.server
    server.wait(lambda: len(set(server.samples("scale_mae_step").values())) > 20, 60)
    steps = server.samples("scale_mae_step", 20)
    lines = watched.server.wait(
        lambda: {line["step"]: line for line in watched.log() if line["step"] >= max(steps.values())}, 5
    )
    lines = {line["step"]: line for line in watched.log()}
    for series, key in LOG_KEYS.items():
        scraped = server.samples(series, 20)
        assert len(scraped) > 5, series
        for at, value in scraped.items():
            if at in steps:
                assert value == lines[steps[at]][key], (series, at)
    (sample,) = server.query("scale_mae_info")
    run = json.loads((watched.dir / "run.id").read_text())["id"]
    assert sample["metric"]["run"] == run
    assert sample["metric"]["instance"] == f"{run}/node0"
    assert sample["metric"]["model"] == "nano"
    assert "exported_run" not in sample["metric"]


def test_rates_match_the_log(watched):
    # on a fast machine the run may be younger than the ten seconds of the rate
    watched.until(lambda: min(watched.server.samples("scale_mae_images_total", 60)) < time.time() - 13, 30)
    now = time.time()
    rate = watched.server.value("run:scale_mae_images:rate10m", now)
    lines = [line for line in watched.log() if now - 10 <= line["time"] <= now]
    expected = (lines[-1]["images_processed"] - lines[0]["images_processed"]) / (lines[-1]["time"] - lines[0]["time"])
    assert rate == pytest.approx(expected, rel=0.3)
    shares = {
        found["metric"]["phase"]: float(found["value"][1])
        for found in watched.server.query("run_phase:scale_mae_step_seconds:share10m")
    }
    assert set(shares) == {"data_loading", "forward_backward", "optimizer", "evaluation", "checkpoint"}
    assert 0.3 < sum(shares.values()) <= 1.05
    p50, p95 = (watched.server.value(f"run:scale_mae_step_seconds:p{q}_10m") for q in (50, 95))
    assert 0 < p50 <= p95


def exported_series(text):
    """Return the series of an exporter, also those without a sample on this machine."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


def test_every_queried_metric_exists_and_every_metric_is_on_the_dashboard(watched):
    texts = [alert["expr"] for alert in alerts().values()] + list(recorded().values()) + expressions()
    queried = {name for text in texts for name in names_in(text)}
    exported = exported_series(watched.server.scrape())
    assert len(exported) > 40
    (documented,) = re.findall(
        r"(\d+) samples per scrape", (MONITORING.parents[1] / "docs" / "guides" / "monitoring.md").read_text()
    )
    without_gpu = (
        len({name for name in exported if needs_gpu(name) and "_gpu_" not in name}) + 2
    )  # and the two series of GPU memory
    assert watched.server.value("scrape_samples_scraped") == int(documented) - without_gpu
    assert queried - set(recorded()) - exported == set()
    assert {name for name in queried - watched.server.names() if not may_be_absent(name)} == set()
    shown = {name for text in expressions() for name in names_in(text)}
    assert exported - shown == {f"scale_mae_step_seconds_{part}" for part in ("count", "sum")}  # used by rules


def test_every_query_of_the_dashboard_is_valid_and_returns_data(watched):
    """Queries that require a GPU, a failure or an evaluation may return nothing."""
    empty = {query for query in expressions() if not watched.server.query(query)}
    allowed = {query for query in expressions() if "ALERTS" in query or any(map(may_be_absent, names_in(query)))}
    allowed |= {dashboard()["annotations"]["list"][1]["expr"].replace("$run", ".+")}  # there is no rollback
    assert empty <= allowed
    assert len(expressions()) > len(panels()) > 40


def test_the_series_of_a_killed_run_continue_when_it_resumes_and_no_counter_decreases(watched):
    server = watched.server
    restarts = server.value("scale_mae_restarts_total")
    before = server.samples("scale_mae_images_total", 600)
    began = min(before)
    address = server.targets()[0]["address"]
    # kill it some steps after a checkpoint, so that it repeats steps
    watched.until(lambda: server.query("10 < scale_mae_step - scale_mae_checkpoint_step < 25"), 60)
    watched.kill()
    killed = time.time()
    server.wait(lambda: server.value("up") == 0, 10)
    server.wait(lambda: "ScaleMaeTargetDown" in server.firing(), 60)
    done = watched.log()[-1]
    watched.start()
    watched.wait_until_silent("ScaleMaeTargetDown", "ScaleMaeRestartsWithoutProgress")
    assert [target["instance"] for target in server.targets()] == [f"{server.targets()[0]['run']}/node0"]
    assert server.targets()[0]["address"] != address
    assert server.value("scale_mae_restarts_total") == restarts + 1
    window = math.ceil(time.time() - began)
    images = server.samples("scale_mae_images_total", window)  # one series across the restart
    assert min(images) <= killed < max(images)
    assert list(images.values()) == sorted(images.values())
    resumed = min(value for at, value in images.items() if at > killed)
    assert done["images_processed"] <= resumed
    counters = [name for name in server.names() if re.fullmatch(r"scale_mae_.+_(total|count|sum|bucket)", name)]
    assert len(counters) > 10
    for name in counters:
        assert server.query(f"resets({name}[{window}s]) > 0") == [], name
    grown = max(images.values()) - min(images.values())
    assert server.value(f"increase(scale_mae_images_total[{window}s])") == pytest.approx(grown, rel=0.05)
    rates = server.range("rate(scale_mae_images_total[3s])", began, time.time())
    speed = max(line["images_per_s"] for line in watched.log())
    assert 0 <= min(rates) <= max(rates) < 2 * speed
    # repeated images count as processed, but not as progress
    line = watched.log()[-1]
    assert line["images_processed"] > line["images"]


def test_a_stalled_run_fires_its_alert_until_it_continues(watched):
    watched.wait_until_silent("ScaleMaeNoProgress")
    second = watched.processes[1].pid
    os.kill(second, signal.SIGSTOP)
    try:
        watched.wait_until_firing("ScaleMaeNoProgress")
        assert "ScaleMaeTargetDown" not in watched.server.firing()
    finally:
        os.kill(second, signal.SIGCONT)
    watched.wait_until_silent("ScaleMaeNoProgress")


def test_a_nan_loss_fires_its_alert_until_it_is_finite(watched):
    watched.wait_until_silent("ScaleMaeLossNotFinite")
    (watched.faults / "nan").touch()
    try:
        watched.wait_until_firing("ScaleMaeLossNotFinite")
        assert math.isnan(watched.server.value("scale_mae_loss"))
        assert watched.log()[-1]["loss"] is None
    finally:
        (watched.faults / "nan").unlink()
    watched.wait_until_silent("ScaleMaeLossNotFinite")


def test_an_old_checkpoint_fires_its_alert_until_there_is_a_new_one(watched):
    watched.wait_until_silent("ScaleMaeCheckpointTooOld")
    (watched.faults / "full").touch()
    try:
        watched.wait_until_firing("ScaleMaeCheckpointTooOld", "ScaleMaeCheckpointFailed")
        assert watched.server.value("time() - scale_mae_checkpoint_timestamp_seconds") > 10
    finally:
        (watched.faults / "full").unlink()
    watched.wait_until_silent("ScaleMaeCheckpointTooOld")


def test_a_run_that_stops_normally_removes_its_target(watched):
    server = watched.server
    os.kill(watched.processes[0].pid, signal.SIGTERM)
    for process in watched.processes:
        process.join(60)
    server.wait(lambda: server.targets() == [], 20)
    assert not list(Path(watched.dir.parent / "prometheus").glob("*.json"))
    time.sleep(12)  # longer than a target may be down before its alert fires
    assert "ScaleMaeTargetDown" not in server.firing()
