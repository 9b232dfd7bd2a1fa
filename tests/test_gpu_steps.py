"""What the stages ``step``, ``host`` and ``profile`` of the GPU examination compute from what a GPU gives them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # its modules import each other as scripts do

from gpu_stages import host, profile, step, tracing
from gpu_stages.stage import OutOfTime, Stage
from torch.autograd import DeviceType

GIB = 2**30


class SmallGpu(step.Examination):
    """An examination on a GPU of 80 GiB, of which there is no other trace."""

    def __init__(self, stage):
        super().__init__(stage, None)
        self.device, self.rounds = torch.device("cuda", 0), 1

    def memory(self):
        return 80 * GIB

    def allocated(self):
        return 0


class FakeTrial:
    """A training step of 10 GiB and 0.1 GiB an image, slower an image above 256 images."""

    def __init__(self, fits):
        self.fits, self.closed = fits, 0

    def measure(self, batch, rounds):
        if batch > self.fits:
            raise torch.OutOfMemoryError("no memory")
        seconds = batch / (1000 if batch == 256 else 500)
        return {"batch": batch, "step_s": [seconds] * rounds, "peak_bytes": int((10 + 0.1 * batch) * GIB), "graphs": 0}

    def close(self):
        self.closed += 1


def stage(tmp_path, seconds=100.0):
    return Stage("step", tmp_path / "step.json", tmp_path, seconds=seconds, rehearse=True)


@pytest.mark.parametrize(("fits", "largest", "failures"), [(10_000, 696, 0), (680, 672, 1), (600, 512, 3)])
def test_the_largest_and_the_fastest_batch(tmp_path, fits, largest, failures):
    """80 GiB hold (80 - 10) / 0.1 = 700 images; fewer where the estimate is too good."""
    found, trial = {"batches": []}, FakeTrial(fits)
    examination = SmallGpu(stage(tmp_path))
    examination.batches = lambda: step.BATCHES
    examination.measure(step.Case("large", search=True), trial, found)
    tried = [each["batch"] for each in found["batches"]]
    assert tried[:4] == [64, 128, 256, 512]
    assert (found["largest_batch"], trial.closed) == (largest, failures)
    assert found["fastest_batch"] == examination.fastest["large"] == 256


def test_the_estimate_of_the_largest_batch_where_memory_hardly_grows():
    """The peak of small batches may be that of the optimizer."""
    peaks = [{"batch": 64, "peak_bytes": 20 * GIB}, {"batch": 128, "peak_bytes": 20 * GIB}]
    assert step.largest_batch(peaks, 10 * GIB, 80 * GIB) == step.MOST * 128
    peaks[1]["peak_bytes"] += 1
    assert step.largest_batch(peaks, 10 * GIB, 80 * GIB) == step.MOST * 128
    peaks[1]["peak_bytes"] = 30 * GIB
    assert step.largest_batch(peaks, 10 * GIB, 80 * GIB) == 128 + 5 * 64


def test_long_steps_are_timed_less_often(tmp_path):
    examination = SmallGpu(stage(tmp_path))
    examination.rounds = 5
    assert examination.rounds_of(64, []) == 5
    assert examination.rounds_of(128, [{"batch": 64, "step_s": [0.01]}]) == 5
    assert examination.rounds_of(1024, [{"batch": 512, "step_s": [0.08]}]) == 3
    assert examination.rounds_of(2048, [{"batch": 1024, "step_s": [1.0]}]) == 2


def test_a_batch_that_does_not_fit_with_the_peer_is_not_tried_again(tmp_path, monkeypatch):
    def compared(self, case, trial, batch, tried):
        if batch > 64:
            raise torch.OutOfMemoryError("no memory")
        return {"batch": batch}

    monkeypatch.setattr(SmallGpu, "compared", compared)
    examination, found, trial = SmallGpu(stage(tmp_path)), {"fastest_batch": 256, "batches": []}, FakeTrial(10_000)
    examination.fastest["large"] = 256
    examination.compare(step.Case("large", amp="bf16"), trial, found)
    assert (found["peer"], trial.closed, examination.fastest["large"]) == ({"batch": 64}, 2, 64)


def test_a_case_without_search_takes_the_fastest_batch_of_its_size(tmp_path):
    examination = SmallGpu(stage(tmp_path))
    examination.fastest["large"] = 256
    found = {"batches": []}
    examination.measure(step.Case("large", compiled=True), FakeTrial(10_000), found)
    assert [each["batch"] for each in found["batches"]] == [256]
    with pytest.raises(torch.OutOfMemoryError):
        examination.measure(step.Case("large"), FakeTrial(100), {"batches": []})


def test_cases_are_valid_and_named_apart():
    names = [case.name for case in step.cases()]
    assert len(set(names)) == len(names)
    assert names[0] == "large eager none zero1 against AMP bf16"


def test_a_late_case_is_left_out_and_the_others_are_taken(tmp_path, monkeypatch):
    short = stage(tmp_path)
    taken = []

    def take(self, case):
        if case.compiled:
            raise OutOfTime(case.name)
        taken.append(case)

    monkeypatch.setattr(step.Examination, "take", take)
    monkeypatch.setattr(step, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    step.run(short)
    assert taken == [case for case in step.rehearsed() if not case.compiled]
    assert short.result["left_out"] == [case.name for case in step.rehearsed() if case.compiled]


def test_rows_of_a_step():
    case = {
        "case": "large eager none zero1 against AMP bf16",
        "train_flops_per_image": 10**11,
        "batches": [
            {"batch": 64, "step_s": [0.1], "peak_bytes": 10 * GIB},
            {"batch": 128, "step_s": [0.15, 0.16, 0.17], "peak_bytes": 20 * GIB},
        ],
        "fastest_batch": 128,
        "largest_batch": 500,
        "peer": {"precision": "bf16", "batch": 128, "speed_ours_by_peer": 1.25, "speed_ours_by_peer_range": [1.2, 1.3]},
    }
    failed = {"case": "huge eager none zero1", "error": "OutOfMemoryError: no", "train_flops_per_image": 1, "batches": []}
    result = {"cases": [{"case": "peak speed"}, case, failed], "peak_flops_per_s": 1e15, "matmul_flops_per_s": 5e14}
    first, second = step.rows(result)
    assert first == {
        "case": "large eager none zero1",
        "batch": "128",
        "images/s": "800.0",
        "MFU": "8.0%",
        "of matmul speed": "16.0%",
        "peak GiB": "20.0",
        "largest": "500",
        "speed / transformers": "1.25 (1.20-1.30), AMP bf16, batch 128",
    }
    assert second == {"case": "huge eager none zero1", "batch": "failed"}


class Event:
    """What the profiler gives for a call of the host or a kernel."""

    def __init__(self, name, start, end, device=DeviceType.CPU, annotation=False):
        self._values = {"name": name, "start_ns": start, "duration_ns": end - start, "device_type": device}
        self._values["is_user_annotation"] = annotation

    def __getattr__(self, name):
        value = self._values[name]
        return lambda: value


def test_summary_of_a_trace():
    gpu = DeviceType.CUDA
    events = [
        Event(tracing.MARK, 100, 200, annotation=True),
        Event(tracing.MARK, 120, 330, gpu, annotation=True),
        Event("cudaDeviceSynchronize", 90, 99),  # before the steps
        Event("cudaLaunchKernel", 110, 112),
        Event("cudaLaunchKernelExC", 120, 122),
        Event("cuLaunchKernelEx", 130, 132),
        Event("cudaStreamSynchronize", 140, 150),
        Event("cudaDeviceSynchronize", 205, 300),  # after them, at the end of the recording
        Event("aten::mm", 108, 113),
        Event("gemm", 120, 180, gpu),
        Event("add", 170, 200, gpu),  # on another stream
        Event("Memcpy DtoH (Device -> Pinned)", 250, 260, gpu),
        Event("norm", 300, 320, gpu),
    ]
    found = tracing.summary(events, steps=2)
    assert (found["launches"], found["kernels"], found["copies"], found["copies_to_host"]) == (1.5, 1.5, 0.5, 0.5)
    assert found["waits"]["cudaStreamSynchronize"] == 0.5
    assert sum(found["waits"].values()) == 0.5
    assert found["busy_s"] == pytest.approx((80 + 10 + 20) / 2e9)
    assert found["kernel_s"] == pytest.approx((60 + 30 + 10 + 20) / 2e9)
    assert found["idle_s"] == pytest.approx((50 + 40) / 2e9)
    assert found["longest_gaps_s"] == pytest.approx([50e-9, 40e-9])
    assert found["operators"] == 0.5


def test_waits_that_torch_warns_of_are_told_with_their_place(monkeypatch):
    import warnings

    modes = []

    def set_mode(mode):
        modes.append(mode)
        text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        warnings.warn(text, stacklevel=1)  # as torch does

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def training_step():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (found,) = host.waits(training_step, torch.device("cuda", 0))
    assert found["count"] == 3
    assert "in training_step" in found["stack"]
    assert modes == ["warn", "default"]


def test_longest_kernels_and_their_names():
    gpu = DeviceType.CUDA
    events = [Event("a", 0, 3_000, gpu), Event("b", 0, 9_000, gpu), Event("a", 0, 12_000, gpu)]
    found = profile.longest(events)
    assert [(each["name"], each["calls"]) for each in found] == [("a", 2 / profile.STEPS), ("b", 1 / profile.STEPS)]
    case = {"kernels": found, "kernel_s": sum(each["seconds"] for each in found)}
    assert [row["share"] for row in profile.rows({"cases": [case]})] == ["62.5%", "37.5%"]
    long = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >"
    )
    assert profile.shortened(long).startswith("vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16")
    assert len(profile.shortened(long)) == profile.WIDTH
