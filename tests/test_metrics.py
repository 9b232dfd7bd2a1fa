"""Metrics: step timer, counters, utilization, GPU sensors, run ID, and experiment trackers."""

import json
import math
import shutil
import time

import pytest
import torch
from test_engine import batch, small_mae

from scale_mae.config import UserError, load_config
from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing, count_recomputed_flops
from scale_mae.metrics import counters, trackers
from scale_mae.metrics.calculator import SMOOTHING_STEPS, MetricsCalculator, ProcessStats, local_seconds
from scale_mae.metrics.counters import Counters, restore_counters
from scale_mae.metrics.log_keys import LOG_KEYS
from scale_mae.metrics.memory import MemoryUsage
from scale_mae.metrics.nvml import GpuReading, Nvml
from scale_mae.metrics.peak_flops import PEAK_TFLOPS, peak_flops
from scale_mae.metrics.sinks import Log
from scale_mae.metrics.step_timer import StepTimer, group_phases
from scale_mae.metrics.trackers import Tracker, build_trackers, check_packages
from scale_mae.runs.run_id import get_run_id

CPU = torch.device("cpu")


def test_phases_account_for_all_of_the_time():
    started = time.perf_counter()
    timer = StepTimer(CPU)
    for phase, seconds in {"data": 0.02, "forward": 0.03, "checkpoint": 0.04}.items():
        time.sleep(seconds)
        timer.mark(phase)
    timer.end_step()
    timer.mark("vote")
    (times,) = timer.read_steps()
    assert sum(times.values()) == pytest.approx(time.perf_counter() - started, abs=0.01)
    groups = group_phases(times)
    assert groups["data_loading"] >= 0.02
    assert groups["forward_backward"] >= 0.03
    assert groups["checkpoint"] >= 0.04
    assert groups["step"] == pytest.approx(sum(times.values()) - groups["checkpoint"])
    assert local_seconds([times]) == times["data"] + times["forward"]
    timer.end_step()
    assert timer.read_steps()[0].keys() == {"vote", "other"}  # a mark before the reading is not lost
    assert timer.read_steps() == []


@pytest.mark.gpu
def test_marks_on_a_gpu_do_not_synchronize_before_they_are_compute():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    a @ a
    torch.cuda.synchronize()
    timer = StepTimer(device)
    torch.cuda.set_sync_debug_mode("error")
    started = time.perf_counter()
    for _ in range(50):
        for _ in range(20):
            a @ a
        timer.mark("forward")
        timer.end_step()
    queued = time.perf_counter() - started
    torch.cuda.set_sync_debug_mode("default")
    step_times = timer.read_steps()
    total = time.perf_counter() - started
    assert len(step_times) == 50
    assert queued < total / 2
    assert sum(step["forward"] for step in step_times) == pytest.approx(total, rel=0.2)


@pytest.mark.gpu
def test_the_number_of_pending_events_is_bounded():
    timer = StepTimer(torch.device("cuda"))
    for _ in range(20_000):
        timer.end_step()
    assert len(timer._pending) < 10_000
    assert len(timer.read_steps()) == 20_000


def test_counters_resume_from_the_larger_value_of_file_and_checkpoint(tmp_path):
    Counters({"steps": 12, "step_seconds/step/0.5": 3, "checkpoints": 1}).save(tmp_path)
    values = restore_counters(tmp_path, {"steps": 10, "checkpoints": 2, "decode_failures/damaged": 4}).values
    assert values == {"steps": 12, "step_seconds/step/0.5": 3, "checkpoints": 2, "decode_failures/damaged": 4}
    assert [p.name for p in tmp_path.iterdir()] == [counters.FILE]


@pytest.mark.parametrize(
    "content", [b"", b'{"steps": 1', b"[1, 2]", b"\xff\xfe\x00", b'{"steps": NaN}', b'{"steps": "9"}', b"9"]
)
def test_a_damaged_counter_file_is_ignored(tmp_path, content):
    (tmp_path / counters.FILE).write_bytes(content)
    assert restore_counters(tmp_path, {"steps": 10}).values == {"steps": 10}
    assert restore_counters(tmp_path, None).values == {}


def test_a_counter_keeps_its_value_when_the_followed_total_decreases():
    followed = Counters({"skipped_steps": 7})
    for total in (2, 3, 5, 1, 2):  # 2 after a restart; 1 after a rollback
        followed.follow_total("skipped_steps", total)
    assert followed["skipped_steps"] == 7 + 1 + 2 + 0 + 1


def test_a_histogram_is_cumulative_and_never_decreases_when_merged(tmp_path):
    one = Counters()
    for seconds in (0.0005, 0.3, 0.5, 0.50001, 7, 1e6):
        one.observe("step_seconds/step", seconds)
    buckets, total = one.histogram("step_seconds/step")
    assert dict(buckets) | {"0.5": 3, "1.0": 4, "0.001": 1, "+Inf": 6} == dict(buckets)
    assert total == pytest.approx(1000008.30051, abs=1e-3)
    assert [n for _, n in buckets] == sorted(n for _, n in buckets)
    before = Counters(one.values)
    one.observe("step_seconds/step", 2)
    before.save(tmp_path)
    merged = restore_counters(tmp_path, one.values).histogram("step_seconds/step")[0]
    assert all(new >= old for (_, new), (_, old) in zip(merged, buckets, strict=True))


def process_stats(local_s, rss=2**30):
    return ProcessStats(local_s, MemoryUsage(None, None, rss), None)


def compute(calculator, step, loss, step_times=({"forward": 0.5, "checkpoint": 9.0},), processes=None):
    return calculator.compute(step, loss, 1e-3, 1.0, 1.0, step_times, processes or [process_stats(0.5)])


def test_utilization_is_the_share_of_the_peak():
    calculator = MetricsCalculator(100, 1000, 2, 3_000_000, 1_000_000, 1000, peak_flops=1e9)
    metrics = compute(calculator, 10, 1.0)
    assert metrics["step_time_s"] == 0.5
    assert metrics["images_per_s"] == 200
    assert metrics["mfu"] == pytest.approx(200 / 2 * 3e6 / 1e9)
    assert metrics["hfu"] == pytest.approx(200 / 2 * 4e6 / 1e9)
    assert metrics["checkpoint_s"] == 9
    assert metrics["eta_s"] == 990 * 0.5
    without_peak = compute(MetricsCalculator(100, 1000, 2, 3_000_000, 1_000_000, 1000), 10, 1.0)
    assert without_peak["mfu"] is without_peak["hfu"] is None
    assert metrics.keys() <= LOG_KEYS.keys()


def test_the_smoothed_loss_does_not_depend_on_the_log_interval():
    often, seldom = (MetricsCalculator(1, 1, 1, 1, 0, 1000) for _ in range(2))
    for calculator in (often, seldom):
        compute(calculator, 0, 2.0)
    for step in range(1, 101):
        every = compute(often, step, 1.0)
    once = compute(seldom, 100, 1.0)
    assert every["loss_smoothed"] == pytest.approx(once["loss_smoothed"]) == pytest.approx(1 + math.exp(-100 / SMOOTHING_STEPS))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_and_does_not_enter_the_average(bad):
    calculator = MetricsCalculator(1, 1, 1, 1, 0, 1000)
    compute(calculator, 1, 2.0)
    line = compute(calculator, 2, bad)
    assert line["loss"] is None
    assert line["loss_smoothed"] == 2.0
    json.dumps(line, allow_nan=False)


def test_the_slowest_rank_the_fastest_rank_and_the_largest_memory_are_reported():
    processes = (process_stats(0.2), process_stats(0.1, 3 * 2**30), process_stats(0.4))
    line = compute(MetricsCalculator(1, 1, 3, 1, 0, 10), 1, 1.0, processes=processes)
    assert (line["slowest_rank"], line["slowest_rank_s"]) == (2, 0.4)
    assert (line["fastest_rank"], line["fastest_rank_s"]) == (1, 0.1)
    assert line["host_rss_gib"] == 3
    assert line["gpu_memory_allocated_gib"] is None


@pytest.mark.parametrize(("policy", "every"), [("full", 1), ("every_k", 2), ("every_k", 3), ("selective", 1), ("offload", 1)])
def test_recomputed_operations_equal_what_pytorch_executes(policy, every):
    from torch.utils.flop_counter import FlopCounterMode

    def executed(policy):
        model = small_mae()
        apply_activation_checkpointing([*model.blocks, *model.decoder_blocks], policy, every)
        with FlopCounterMode(display=False) as counter:
            model(*batch(0)).loss.backward()
        return counter.get_total_flops(), len(batch(0)[0]), model.flops()

    plain, _, flops = executed("none")
    again, images, _ = executed(policy)
    assert again - plain == images * count_recomputed_flops(flops, policy, every)
    assert count_recomputed_flops(flops, "none", every) == 0


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756.5),
        ("NVIDIA H100 80GB HBM2e", "bf16", 756.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA B300 SXM6 AC", "fp32", 75),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A100-SXM-64GB", "bf16", None),  # has more cores than the GPU in NVIDIA's data sheet
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100S-PCIE-32GB", "fp16", 130),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-DGXS-32GB", "fp16", None),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4080 SUPER", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("Quadro K620", "fp32", None),
    ],
)
def test_peak_flops_match_the_data_sheets(name, precision, teraflops):
    peak = peak_flops(name, precision)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_every_row_of_the_peak_table_is_reachable():
    for name, *peaks in PEAK_TFLOPS:
        for precision, peak in zip(("fp32", "bf16", "fp16"), peaks, strict=True):
            assert peak_flops(f"NVIDIA {name}", precision) == (None if peak is None else peak * 1e12), name


def test_without_nvml_all_values_are_none():
    nvml = Nvml()
    assert nvml.gpu_index(CPU) is None
    assert nvml.energy_joules(None) is None
    assert nvml.read(999) == GpuReading(999, None, None, None)


@pytest.mark.gpu
def test_nvml_reads_the_gpu_that_torch_uses():
    nvml = Nvml()
    number = nvml.gpu_index(torch.device("cuda", 0))
    gpu = nvml.read(number)
    assert 10 < gpu.power < 2000
    assert 5 < gpu.temperature < 110
    assert gpu.throttle_reasons is not None
    before = nvml.energy_joules(number)
    time.sleep(1)
    assert 5 < nvml.energy_joules(number) - before < 2000


def test_a_run_keeps_its_id_and_a_copy_gets_another(tmp_path):
    (tmp_path / "my run").mkdir()
    run_id = get_run_id(tmp_path / "my run")
    assert run_id.startswith("my-run-")
    assert get_run_id(tmp_path / "my run") == run_id
    shutil.copytree(tmp_path / "my run", tmp_path / "copy")
    assert get_run_id(tmp_path / "copy") != run_id
    (tmp_path / "my run").rename(tmp_path / "moved")
    assert get_run_id(tmp_path / "moved") == run_id
    shutil.copytree(tmp_path / "moved", tmp_path / "my run")  # a copy at the old path of the renamed directory
    assert get_run_id(tmp_path / "my run") != run_id
    assert get_run_id(tmp_path / "moved") == run_id
    shutil.copytree(tmp_path / "moved", tmp_path / "backup")
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(tmp_path / "backup", tmp_path / "moved")
    assert get_run_id(tmp_path / "moved") == run_id  # restored from a backup
    (tmp_path / "moved" / "run.id").write_text("{")
    assert get_run_id(tmp_path / "moved") != run_id


# Trackers


def line(step, **more):
    return {"step": step, "total_steps": 8, "time": 1.8e9 + step, "loss": 1 / step, "mfu": None, **more}


def track(name, run_dir, first, steps, more=lambda number: {}):
    config = load_config("debug", {"run.dir": str(run_dir), "log.trackers": [name]})
    with Log(build_trackers(config, "a-run", first)) as log:
        for number, step in enumerate(steps):
            log.write_metrics(line(step, **more(number)))


def test_tensorboard_contains_the_log_and_hides_steps_that_a_crash_reverted(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path, 0, range(1, 7))
    track("tensorboard", tmp_path, 4, range(5, 9))  # the crash reverted steps 5 and 6
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(1 / s)) for s in range(1, 9)]
    assert events.Scalars("loss")[0].wall_time == 1.8e9 + 1
    assert "mfu" not in events.Tags()["scalars"]


def test_tensorboard_hides_steps_that_a_rollback_reverted(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = [3, 4, 5, *range(2, 6), *range(4, 9)]  # rolls back to before this start, and once more
    track("tensorboard", tmp_path, 2, steps, lambda number: {"loss": float(number)})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 3), (3, 4), *((s, s + 3) for s in range(4, 9))]


def wandb_records(path):
    """Yield the records of an offline run: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, data = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


def wandb_rows(path):
    rows = []
    for record in wandb_records(path):
        if record.HasField("run"):
            assert record.run.run_id == "a-run"
        if record.HasField("history"):
            row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            rows.append((row["step"], row["loss"]))
    return rows


def test_wandb_continues_the_same_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = []
    for first, steps in ((0, range(1, 4)), (2, range(3, 6))):
        track("wandb", tmp_path, first, steps)
        (folder,) = set((tmp_path / "wandb").glob("offline-run-*")) - {f for f, _ in found}
        deadline = time.monotonic() + 20  # a separate process of wandb writes, and may be slow on a busy machine
        while len(rows := wandb_rows(next(folder.glob("*.wandb")))) < len(steps) and time.monotonic() < deadline:
            time.sleep(0.1)
        found.append((folder, rows))
        time.sleep(1.1)  # wandb names its folders by time, to the second
    assert [rows for _, rows in found] == [[(s, 1 / s) for s in range(1, 4)], [(s, 1 / s) for s in range(3, 6)]]


def test_mlflow_continues_the_same_run(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    ends = []
    for first, steps in ((0, range(1, 4)), (3, range(4, 9))):
        track("mlflow", tmp_path, first, steps)
        client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
        experiment = client.get_experiment_by_name("scale-mae").experiment_id
        (run,) = client.search_runs([experiment])
        ends.append(run.info.status)
    assert ends == ["KILLED", "FINISHED"]
    assert run.data.params["train.global_batch"] == "16"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 1 / s) for s in range(1, 9)]


def test_a_missing_tracker_package_is_reported_before_training(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.trackers=wandb: the package wandb is not installed.*scale-mae\[trackers\]"):
        check_packages(("wandb",))


class Broken(Tracker):
    """Fails on open or on write, or hangs."""

    how = "open"

    def open(self):
        if self.how == "open":
            raise OSError("no server")

    def write(self, step, timestamp, values):
        if self.how == "write":
            raise OSError("no server")
        time.sleep(100 if self.how == "hang" else 0)

    def finish(self, *, finished):
        pass


@pytest.mark.parametrize("how", ["open", "write", "hang"])
def test_a_failing_tracker_is_reported_once_and_delays_nothing(tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(Broken, "how", how)
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.5)
    broken, seen = Broken(load_config("debug", {"run.dir": str(tmp_path)}), "a-run", 0), []

    class Good:
        def write_message(self, message): ...
        def close(self, *, failed=False): ...
        def write_metrics(self, metrics):
            seen.append(metrics["step"])

    started = time.monotonic()
    with Log([broken, Good()]) as log:
        for step in range(1, 6):
            log.write_metrics(line(step))
            time.sleep(0.05)
    assert time.monotonic() - started < 5
    assert seen == [1, 2, 3, 4, 5]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    error = "not finished after 0.5 s" if how == "hang" else "no server"
    assert printed[0] == f"Broken failed and receives no more logs: {error}"
