"""Comparisons of loss curves with each other and with reference curves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from PIL import Image
from test_report import make_run

from scale_mae import load_config
from scale_mae.cli import main
from scale_mae.report.compare import compare_runs
from scale_mae.report.reference_band import (
    ReferenceCurve,
    ReferenceCurveError,
    check_band,
    compute_band,
    interval_means,
    read_curve,
    shipped_curves,
)
from scale_mae.report.run_record import read_run_record

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "scale_mae" / "reference_curves" / "demo.json"
RESULT = ROOT / "benchmarks" / "results" / "reference_curves_demo.json"


def demo_run(folder, ends, means, **overrides):
    """Make a run of the demo recipe whose log lines have these mean losses in the intervals that end at ``ends``."""
    lines, start = [], 0.0
    for end, mean in zip(ends, means, strict=True):
        if mean is not None and not np.isnan(mean):
            places = [start + (end - start) * share for share in (0.3, 0.6, 1.0)]
            lines += [{"images": x, "step": round(x), "loss": mean + d} for x, d in zip(places, (0.01, -0.01, 0), strict=True)]
        start = end
    run = make_run(folder, lines)
    (run / "config.yaml").write_text(load_config("demo", overrides).to_yaml())
    return run


@pytest.fixture
def demo():
    return json.loads(DEMO.read_text())


def test_the_shipped_band_follows_from_its_seeds(demo):
    seeds = np.array(list(demo["seeds"].values()))
    assert len(seeds) >= 4
    low, high = compute_band(seeds)
    np.testing.assert_allclose(low, demo["low"], atol=2e-4)
    np.testing.assert_allclose(high, demo["high"], atol=2e-4)


def test_each_seed_lies_inside_the_band_of_the_others(demo, tmp_path):
    reference = read_curve(DEMO)
    seeds = np.array(list(demo["seeds"].values()))
    for number, means in enumerate(seeds):
        low, high = compute_band(np.delete(seeds, number, 0))
        run = demo_run(tmp_path / str(number), demo["images"], means)
        check = check_band(read_run_record(run), replace(reference, low=low, high=high))
        assert check.intervals == len(means)
        assert not check.outside, str(check)


@pytest.mark.parametrize("wrong", ["optim.base_lr=0.0001", "model.target=pixel"])
def test_real_runs_with_a_wrong_value_lie_outside(wrong, demo, tmp_path):
    result = json.loads(RESULT.read_text())
    assert result["images"] == demo["images"]
    key, _, value = wrong.partition("=")
    run = demo_run(tmp_path / "run", demo["images"], result["wrong"][wrong]["loss"], **{key: value})
    check = check_band(read_run_record(run), read_curve(DEMO))
    assert check.intervals >= 3
    assert check.outside


def test_the_reference_curve_is_selected_by_size_target_mask_ratio_and_data(demo, tmp_path):
    seed = next(iter(demo["seeds"].values()))
    for number, (key, value) in enumerate(
        [(None, None), ("model.target", "pixel"), ("model.size", "tiny"), ("model.mask_ratio", 0.5), ("data.source", "x.index")]
    ):
        run = demo_run(tmp_path / str(number), demo["images"], seed, **({key: value} if key else {}))
        (check,) = compare_runs([run]).checks
        assert check.reference == {None: "demo", "model.target": "demo_pixel"}.get(key)
        if not check.reference:
            assert check.nearest == "demo"
            assert {difference.split(":")[0] for difference in check.differences} == {key.replace("data.source", "data")}
        if key:
            (forced,) = compare_runs([run], DEMO).checks
            assert forced.reference == "demo"
            assert any(key.startswith(difference.split(":")[0]) for difference in forced.differences)


def test_a_classifier_does_not_match_a_curve_of_pre_training(demo, tmp_path):
    seed = next(iter(demo["seeds"].values()))
    run = demo_run(tmp_path / "run", demo["images"], seed)
    (run / "config.yaml").write_text(load_config("finetune_demo", {"train.duration": "4 epochs"}).to_yaml())
    (check,) = compare_runs([run]).checks
    assert (check.reference, list(check.differences)) == (None, ["run.task: finetune, not pretrain"])


def test_exit_codes_and_output(demo, tmp_path, capsys):
    seed = np.array(next(iter(demo["seeds"].values())))
    good = demo_run(tmp_path / "good", demo["images"], seed)
    bad = demo_run(tmp_path / "bad", demo["images"], seed + 1.0)
    other = demo_run(tmp_path / "other", demo["images"], seed + 0.5, **{"model.size": "tiny"})
    assert main(["compare", str(good), str(other)]) == 0
    text = capsys.readouterr().out
    assert "good: inside the band of demo" in text
    assert "other: no reference curve has its setting; the nearest is demo, which differs in model.size: tiny" in text
    assert main(["compare", str(good), str(bad)]) == 3
    assert "bad: OUTSIDE the band of demo" in capsys.readouterr().out
    assert main(["compare", str(bad), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert found["band_check"]["outside"]
    assert found["band_check"]["above"] == found["band_check"]["intervals"] == len(seed)
    assert main(["compare", str(other), "--json", "--out", str(tmp_path / "page.html")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["band_check"]["reference"], found["band_check"]["nearest"]) == (None, "demo")
    assert [difference.split(":")[0] for difference in found["band_check"]["differences"]] == ["model.size"]
    assert found["band_check"]["text"] in (tmp_path / "page.html").read_text()
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["compare", str(good), "--out", str(tmp_path / "x.pdf")]) == 2


def test_the_table_contains_smoothed_losses_at_images_that_all_runs_have_seen(tmp_path):
    lines = [{"step": s, "images": s * 16, "loss": float(s)} for s in range(1, 101)]
    whole, half = make_run(tmp_path / "whole", lines), make_run(tmp_path / "half", lines[:50])
    found = compare_runs([whole, half])
    assert found.images[-1] == 50 * 16
    # smoothing does not change a straight line
    np.testing.assert_allclose(found.losses[0], found.images // 16)
    np.testing.assert_allclose(found.losses[0], found.losses[1])


@pytest.mark.service("chromium")
def test_the_page_and_the_picture_show_the_curves_and_the_band(demo, tmp_path):
    seed = np.array(next(iter(demo["seeds"].values())))
    runs = [demo_run(tmp_path / "a", demo["images"], seed), demo_run(tmp_path / "$b$ <i>", demo["images"], seed + 0.5)]
    out = tmp_path / "curves.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 3
    browser = Browser()
    try:
        browser.open(out)
        assert browser.problems == []
        names = browser.evaluate("document.getElementById('chart-loss').data.map(t => t.name)")
        assert names == ["band of demo, lower edge", "band of demo", "a", "$b$ &lt;i&gt;"]
        assert browser.evaluate("document.getElementById('chart-loss').data[0].y") == demo["low"]
        assert "OUTSIDE" in browser.evaluate("document.getElementById('references').innerText")
    finally:
        browser.close()
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "curves.png")]) == 3
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800


def test_interval_means_average_the_lines_and_omit_incomplete_intervals():
    images, loss = np.array([5.0, 10, 15, 25, 35]), np.array([1.0, 2, 4, np.inf, 5])
    found = interval_means(images, loss, np.array([10.0, 20, 30, 40]))
    assert found[:2].tolist() == [1.5, 4]
    assert np.isinf(found[2])
    assert np.isnan(found[3])


def test_a_loss_that_is_not_finite_lies_outside_the_band(tmp_path):
    run = make_run(tmp_path / "run", [{"step": s, "images": s, "loss": None if s == 3 else 1.0} for s in range(1, 5)])
    reference = ReferenceCurve("r", {}, np.array([1.0, 2, 3, 4]), np.zeros(4), np.full(4, 2.0))
    check = check_band(read_run_record(run), reference)
    assert (check.above, check.intervals, check.outside) == (1, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"images": [2, 1]}, "images must increase"),
        ({"low": [3, 3]}, "low must not exceed high"),
        ({"low": [1]}, "lists of numbers of the same length"),
        ({"high": [1, None]}, "lists of numbers of the same length"),
        ({"name": ...}, "not a reference curve"),
        ({"setting": {"data": "x"}}, "must be a list"),
        ({"setting": {"data": []}}, "must be a list"),
        ({"setting": {"data": [["x"]]}}, "must be a list"),
        ({"setting": [["model.size", "base"]]}, "setting must map"),
        ({"name": None}, "name must be a string"),
        ({"setting": {"model.sizes": "base"}}, "setting.model.sizes is not a configuration key"),
        ({"setting": {"modle.size": "base"}}, "setting.modle.size is not a configuration key"),
    ],
)
def test_an_invalid_reference_curve_is_rejected(tmp_path, change, message):
    content = {"format": 1, "name": "mine", "setting": {}, "images": [1, 2], "low": [1, 1], "high": [2, 2]} | change
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ReferenceCurveError, match=message):
        read_curve(path)


def test_a_folder_of_reference_curves_takes_precedence_over_the_shipped_ones(demo, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.json").write_text(json.dumps(demo | {"name": "mine"}))
    run = demo_run(tmp_path / "run", demo["images"], next(iter(demo["seeds"].values())))
    assert compare_runs([run], own).checks[0].reference == "mine"
    farther = demo["setting"] | {"model.target": "pixel", "model.mask_ratio": 0.5}
    (own / "farther.json").write_text(json.dumps(demo | {"name": "farther", "setting": farther}))
    other = demo_run(tmp_path / "other", demo["images"], demo["low"], **{"train.global_batch": 32})
    (check,) = compare_runs([other], own).checks
    assert (check.reference, check.nearest, len(check.differences)) == (None, "mine", 1)
    (other / "config.yaml").unlink()
    (check,) = compare_runs([other], own).checks
    assert str(check) == "no reference curve has its setting; the configuration of other is unknown"
    assert [curve.name for curve in shipped_curves()] == ["demo", "demo_pixel", "fashion_mnist"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReferenceCurveError, match="contains no"):
        compare_runs([run], tmp_path / "empty")
