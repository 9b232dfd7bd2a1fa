"""The feed stage of the GPU examination: what a rehearsal, in which everything works, does not show."""

import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scale_mae.data.index_builder import build_index

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def feed():
    sys.path.insert(0, BENCHMARKS)
    try:
        yield importlib.import_module("gpu_stages.feed")
    finally:
        sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def index(feed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    feed.make_jpegs(folder / "jpegs", 12)
    return build_index(str(folder / "jpegs"), folder / "photos.index", verify=False)


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # so that importing it raises ImportError
    monkeypatch.delitem(sys.modules, "scale_mae.data.dali", raising=False)
    monkeypatch.delattr("scale_mae.data.dali", raising=False)


def test_one_wrong_pixel_is_found(feed):
    wanted = np.full((4, 8, 8, 3), 250, np.uint8)
    found = wanted.copy()
    assert set(feed.differences(found, wanted).values()) == {0}
    found[2, 3, 4, 1] = 9
    differences = feed.differences(found, wanted)
    assert differences == {"mean": 241 / 768, "mean_of_image": 241 / 192, "largest": 241, "above_8": 1}
    with pytest.raises(AssertionError, match="differs by 1.255 in the mean"):
        feed.check_limits(differences, 0.5, 8)
    with pytest.raises(AssertionError, match="differs by 241, 8"):
        feed.check_limits(differences, 2.0, 8)
    feed.check_limits(differences, 2.0, 241)


def test_without_dali_the_stage_says_so_and_measures_pillow(feed, index, tmp_path, no_dali):
    from gpu_stages.stage import Stage

    cpu = torch.device("cpu")
    names, missing = feed.available(cpu)
    assert names == ["pillow"]
    assert "DALI cannot be imported" in missing["dali_cpu"]
    stage = Stage("feed", tmp_path / "feed.json", tmp_path, seconds=60, rehearse=True)
    stage.result["not_here"] = missing
    with stage.case("decoders") as case:
        feed.compete(stage, case, index, names)
    table = {row["case"]: row for row in feed.rows(stage.result)}
    assert float(table["pillow"]["images/s"]) > 0
    assert table["dali_cpu"]["images/s"] == "-"
    assert "DALI cannot be imported" in table["dali_cpu"]["finding"]


class Broken:
    """A decoder that says that Pillow had to help."""

    failure = "no JPEG engine"

    def __init__(self, decoder):
        self._decoder, self.prepare_image, self.close = decoder, decoder.prepare_image, decoder.close
        self.fallbacks = 0

    def decode_batch(self, prepared):
        self.fallbacks += len(prepared)
        return self._decoder.decode_batch(prepared)


def test_images_that_pillow_decoded_are_no_result_of_dali(feed, index, tmp_path, monkeypatch):
    from gpu_stages.stage import Stage

    make = feed.decoders.build_decoder
    monkeypatch.setattr(
        feed.decoders,
        "build_decoder",
        lambda name, *rest: make("pillow", *rest) if name == "pillow" else Broken(make("pillow", *rest)),
    )
    with pytest.raises(RuntimeError, match="Pillow decoded 4 images in place of Broken: no JPEG engine"):
        feed.parity(index, "dali_cpu", 4, torch.device("cpu"))
    stage = Stage("feed", tmp_path / "feed.json", tmp_path, seconds=60, rehearse=True)
    case = {}
    feed.compete(stage, case, index, ["dali_cpu", "pillow"])
    assert list(case["turns"]) == ["pillow"]
    assert len(case["turns"]["pillow"]) == 2
    assert "no JPEG engine" in case["failed"]["dali_cpu"]
    assert feed.speed(case, "pillow") > feed.speed(case, "dali_cpu") == 0


def test_nvml_is_sampled_and_what_a_gpu_lacks_is_left_empty(feed, monkeypatch):
    import pynvml

    def missing(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    assert all(hasattr(pynvml, function) for function in feed.COUNTERS.values())
    monkeypatch.setattr(feed, "Nvml", lambda: SimpleNamespace(gpu_index=lambda device: 3))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetJpgUtilization", lambda handle: [40 + handle, 167000])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetDecoderUtilization", missing)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=77, memory=5))
    with feed.sampled(torch.device("cuda", 0)) as samples:
        deadline = time.monotonic() + 10
        while not samples["gpu"] and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(samples["jpeg_engine"]) == {43.0}
    assert set(samples["gpu"]) == {77.0}
    assert samples["video_decoder"] == []
