"""Loss curves beside each other, and the bands of reference curves."""

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
from scale_mae.report.compare import compare
from scale_mae.report.record import read_record
from scale_mae.report.reference import Reference, ReferenceError, band, judge, read_reference, shipped, stretch_means

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "scale_mae" / "reference_curves" / "demo.json"
RESULT = ROOT / "benchmarks" / "results" / "reference_curves_demo.json"


def demo_run(folder, ends, means, **overrides):
    """A run of the demo recipe whose log lines have these mean losses in the stretches that end at ``ends``."""
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
    low, high = band(seeds)
    np.testing.assert_allclose(low, demo["low"], atol=2e-4)
    np.testing.assert_allclose(high, demo["high"], atol=2e-4)


def test_each_seed_lies_inside_the_band_of_the_others(demo, tmp_path):
    reference = read_reference(DEMO)
    seeds = np.array(list(demo["seeds"].values()))
    for number, means in enumerate(seeds):
        low, high = band(np.delete(seeds, number, 0))
        run = demo_run(tmp_path / str(number), demo["images"], means)
        verdict = judge(read_record(run), replace(reference, low=low, high=high))
        assert verdict.judged == len(means)
        assert not verdict.outside, str(verdict)


@pytest.mark.parametrize("wrong", ["optim.base_lr=0.0001", "model.target=pixel"])
def test_real_runs_with_a_wrong_value_lie_outside(wrong, demo, tmp_path):
    result = json.loads(RESULT.read_text())
    assert result["images"] == demo["images"]
    key, _, value = wrong.partition("=")
    run = demo_run(tmp_path / "run", demo["images"], result["wrong"][wrong]["loss"], **{key: value})
    found = judge(read_record(run), read_reference(DEMO))
    assert found.judged >= 3
    assert found.outside


def test_a_reference_is_found_by_size_target_mask_ratio_and_data(demo, tmp_path):
    seed = next(iter(demo["seeds"].values()))
    for number, (key, value) in enumerate(
        [(None, None), ("model.target", "pixel"), ("model.size", "tiny"), ("model.mask_ratio", 0.5), ("data.source", "x.index")]
    ):
        run = demo_run(tmp_path / str(number), demo["images"], seed, **({key: value} if key else {}))
        (verdict,) = compare([run]).verdicts
        assert verdict.reference == {None: "demo", "model.target": "demo_pixel"}.get(key)
        if not verdict.reference:
            assert verdict.nearest == "demo"
            assert {told.split(":")[0] for told in verdict.differences} == {key.replace("data.source", "data")}
        if key:
            (forced,) = compare([run], DEMO).verdicts
            assert forced.reference == "demo"
            assert any(key.startswith(told.split(":")[0]) for told in forced.differences)


def test_the_loss_of_a_classifier_is_no_loss_of_a_pre_training(demo, tmp_path):
    seed = next(iter(demo["seeds"].values()))
    run = demo_run(tmp_path / "run", demo["images"], seed)
    (run / "config.yaml").write_text(load_config("finetune_demo", {"train.duration": "4 epochs"}).to_yaml())
    (verdict,) = compare([run]).verdicts
    assert (verdict.reference, list(verdict.differences)) == (None, ["run.task: finetune, not pretrain"])


def test_exit_codes_and_what_is_printed(demo, tmp_path, capsys):
    seed = np.array(next(iter(demo["seeds"].values())))
    good = demo_run(tmp_path / "good", demo["images"], seed)
    bad = demo_run(tmp_path / "bad", demo["images"], seed + 1.0)
    other = demo_run(tmp_path / "other", demo["images"], seed + 0.5, **{"model.size": "tiny"})
    assert main(["compare", str(good), str(other)]) == 0
    text = capsys.readouterr().out
    assert "good: inside the band of demo" in text
    assert "other: no reference curve for its setting; demo is the nearest, and its setting differs: model.size: tiny" in text
    assert main(["compare", str(good), str(bad)]) == 3
    assert "bad: OUTSIDE the band of demo" in capsys.readouterr().out
    assert main(["compare", str(bad), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert found["verdict"]["outside"]
    assert found["verdict"]["above"] == found["verdict"]["judged"] == len(seed)
    assert main(["compare", str(other), "--json", "--out", str(tmp_path / "page.html")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["verdict"]["reference"], found["verdict"]["nearest"]) == (None, "demo")
    assert [told.split(":")[0] for told in found["verdict"]["differences"]] == ["model.size"]
    assert found["verdict"]["text"] in (tmp_path / "page.html").read_text()
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["compare", str(good), "--out", str(tmp_path / "x.pdf")]) == 2


def test_the_table_has_the_smoothed_losses_at_points_all_runs_have_come_to(tmp_path):
    lines = [{"step": s, "images": s * 16, "loss": float(s)} for s in range(1, 101)]
    whole, half = make_run(tmp_path / "whole", lines), make_run(tmp_path / "half", lines[:50])
    found = compare([whole, half])
    assert found.images[-1] == 50 * 16
    # a straight line stays one when it is smoothed
    np.testing.assert_allclose(found.losses[0], found.images // 16)
    np.testing.assert_allclose(found.losses[0], found.losses[1])


@pytest.mark.service("chromium")
def test_the_page_and_the_picture_show_curves_and_band(demo, tmp_path):
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


def test_stretches_average_the_lines_in_them_and_leave_out_what_is_not_over():
    images, loss = np.array([5.0, 10, 15, 25, 35]), np.array([1.0, 2, 4, np.inf, 5])
    found = stretch_means(images, loss, np.array([10.0, 20, 30, 40]))
    assert found[:2].tolist() == [1.5, 4]
    assert np.isinf(found[2])
    assert np.isnan(found[3])


def test_a_loss_that_is_not_finite_lies_outside(tmp_path):
    run = make_run(tmp_path / "run", [{"step": s, "images": s, "loss": None if s == 3 else 1.0} for s in range(1, 5)])
    reference = Reference("r", {}, np.array([1.0, 2, 3, 4]), np.zeros(4), np.full(4, 2.0))
    verdict = judge(read_record(run), reference)
    assert (verdict.above, verdict.judged, verdict.outside) == (1, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"images": [2, 1]}, "images must rise"),
        ({"low": [3, 3]}, "low lie under high"),
        ({"low": [1]}, "equally long"),
        ({"high": [1, None]}, "equally long"),
        ({"name": ...}, "not a reference curve"),
        ({"setting": {"data": "x"}}, "must be a list"),
        ({"setting": {"data": []}}, "must be a list"),
        ({"setting": {"data": [["x"]]}}, "must be a list"),
        ({"setting": [["model.size", "base"]]}, "setting an object"),
        ({"name": None}, "name must be a text"),
        ({"setting": {"model.sizes": "base"}}, "setting.model.sizes is no section.key"),
        ({"setting": {"modle.size": "base"}}, "setting.modle.size is no section.key"),
    ],
)
def test_a_file_that_is_no_reference_curve_is_refused(tmp_path, change, message):
    content = {"format": 1, "name": "mine", "setting": {}, "images": [1, 2], "low": [1, 1], "high": [2, 2]} | change
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ReferenceError, match=message):
        read_reference(path)


def test_a_folder_of_ones_own_comes_before_the_shipped(demo, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.json").write_text(json.dumps(demo | {"name": "mine"}))
    run = demo_run(tmp_path / "run", demo["images"], next(iter(demo["seeds"].values())))
    assert compare([run], own).verdicts[0].reference == "mine"
    farther = demo["setting"] | {"model.target": "pixel", "model.mask_ratio": 0.5}
    (own / "farther.json").write_text(json.dumps(demo | {"name": "farther", "setting": farther}))
    other = demo_run(tmp_path / "other", demo["images"], demo["low"], **{"train.global_batch": 32})
    (verdict,) = compare([other], own).verdicts
    assert (verdict.reference, verdict.nearest, len(verdict.differences)) == (None, "mine", 1)
    (other / "config.yaml").unlink()
    (verdict,) = compare([other], own).verdicts
    assert str(verdict) == "no reference curve for its setting; the config of other is not known"
    assert [one.name for one in shipped()] == ["demo", "demo_pixel", "fashion_mnist"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReferenceError, match="holds no"):
        compare([run], tmp_path / "empty")
