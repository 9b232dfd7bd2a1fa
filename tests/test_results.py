"""Result files, their tables, and published figures beside ours."""

import json
from dataclasses import replace

import pytest

from scale_mae.cli import main
from scale_mae.config import UserError
from scale_mae.evaluation.command import SET_NAMES
from scale_mae.evaluation.datasets import DATASETS
from scale_mae.evaluation.published_results import comparison_table, differences
from scale_mae.evaluation.results import Result, find_results, measurement_metadata, tabulate
from scale_mae.evaluation.tables import Table


def result(top1, seed, weights=None, **more):
    model = {"path": f"/x/{seed}.pth", "architecture": "ViT-base/16, 224 px", "sha256": weights or f"w{seed}", "seed": seed}
    protocol = {"name": "evaluate", "set": "imagenet1k", "size": 224, "crop_pct": 0.875} | more
    made = measurement_metadata(1, "cpu", 1.0) | {"time": f"2026-01-0{1 + (seed or 0) % 9}T00:00:00Z"}
    data = {"images": 50_000, "digest": "d"}
    return Result(protocol, model, data, {"top1": top1, "loss": 0.7}, {}, made)


def test_a_file_holds_what_was_written(tmp_path):
    written = result(0.8357, 3)
    written.write(tmp_path / "results" / "a.json")
    assert Result.read(tmp_path / "results" / "a.json") == written
    content = json.loads((tmp_path / "results" / "a.json").read_text())
    assert content["format"] == "scale_mae.result.1"
    assert {"python", "torch", "timm", "pillow"} <= content["environment"]["versions"].keys()
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["a.json"]


def test_seeds_give_mean_and_spread():
    """Four runs of ViT-B by the authors: 83.63, 83.66, 83.52, 83.46; mean 83.5675, sample deviation 0.0943."""
    table = tabulate([result(value, seed) for seed, value in enumerate((0.8363, 0.8366, 0.8352, 0.8346))])
    (row,) = table.rows
    assert row[5] == "83.57 ± 0.09"
    assert row[4] == "0, 1, 2, 3"
    assert row[6] == "0.7000 ± 0.0000"


def test_other_protocols_are_other_rows_and_the_later_measurement_of_the_same_weights_counts():
    table = tabulate([result(0.9, 2, "same"), result(0.8, 1, "same"), result(0.7, 1, crop_pct=1.0)])
    assert sorted(row[5] for row in table.rows) == ["70.00", "90.00"]
    assert not table.note


@pytest.mark.parametrize(
    "others",
    [
        (result(0.9, 0, "a"), result(0.8, 0, "b")),  # the same seed twice
        (result(0.9, None, "a"), result(0.8, None, "b")),
        (result(0.9, 0), replace(result(0.8, 1), model=result(0.8, 1).model | {"training": "other"})),
        (result(0.9, 0), replace(result(0.8, 1), model=result(0.8, 1).model | {"kind": "timm folder"})),
    ],
)
def test_only_other_seeds_of_one_training_are_averaged(others):
    table = tabulate(others)
    assert sorted(row[5] for row in table.rows) == ["80.00", "90.00"]
    assert not table.note
    assert {row[4] for row in table.rows} <= {"0", "1", "?"}


def test_losses_are_in_nats_and_shares_in_per_cent():
    given = replace(result(0.5, 1), scores={"top1": 0.5, "ema_top1": 0.25, "ema_loss": 2.0076, "loss_15": 11.4477})
    assert tabulate([given]).rows[0][5:] == ["50.00", "25.00", "2.0076", "11.4477"]


def test_results_through_the_command_line(tmp_path, capsys):
    for seed, value in enumerate((0.8, 0.9)):
        result(value, seed).write(tmp_path / f"{seed}.json")
    assert main(["results", str(tmp_path), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "| 85.00 ± 7.07 |" in text
    assert text.splitlines()[1].startswith("| ---")
    assert main(["results", str(tmp_path / "0.json"), "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert r"\begin{tabular}{lllllll}" in latex
    assert r"80.00" in latex


def test_latex_and_markdown_escape():
    table = Table(["a_b", "c"], [["1 % & 2", "x ± y"], ["p|q", ""]])
    assert r"a\_b & c \\" in table.render("latex")
    assert r"1 \% \& 2 & x $\pm$ y \\" in table.render("latex")
    assert r"p\|q" in table.render("markdown")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "scale_mae.result.1", "protocol": {}}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="x.json: (not a|damaged) result file"):
        Result.read(tmp_path / "x.json")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="contains no result files"):
        find_results([str(tmp_path)])
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        find_results([str(tmp_path / "absent.json")])


def test_published_figures_stand_beside_a_model_that_may_be_compared():
    unlike = differences("ViT-base/16, 224 px", True, 50_000, True, (1000, 1000))
    assert unlike == []
    table = comparison_table("imagenet_c", "ViT-base/16, 224 px", {"mce": 0.517, "error_19_unnormalized": 0.38}, unlike)
    lines = {(row[0], row[1]): row for row in table.rows}
    assert lines["ours", "mce"][2:6] == ["51.70", "", "", ""]
    assert lines["MAE", "mce"][2:6] == ["51.7", "41.8", "33.8", "36.8"]
    assert lines["MAE measured by a user", "error_19_unnormalized"][2] == "37.98"
    assert not table.note


def test_and_why_another_may_not():
    unlike = differences("ViT-nano/8, 32 px", False, 40, False, (10, 1000))
    assert len(unlike) == 4
    table = comparison_table("imagenet1k", "ViT-nano/8, 32 px", {"top1": 0.5}, unlike)
    assert table.header[-2] == "this model"
    assert table.rows[0][-2] == "50.00"
    assert table.rows[0][2:6] == ["", "", "", ""]
    assert table.note.startswith("not comparable: no published model is a ViT-nano/8, 32 px; 40 images")
    assert comparison_table("folder", "ViT-nano/8, 32 px", {"top1": 0.5}, unlike) is None


def test_the_command_line_knows_the_sets():
    assert set(SET_NAMES) == set(DATASETS)
