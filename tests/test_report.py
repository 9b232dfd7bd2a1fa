"""The report of a run in a real browser: it shows the values of the log, loads nothing, and is accessible."""

import itertools
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from images import demo_index, jpeg
from PIL import Image
from ranks import run_ranks

from scale_mae import load_config
from scale_mae.cli import main
from scale_mae.report.chart import MAX_POINTS, TABLE_ROWS, thin
from scale_mae.report.incidents import find_incidents
from scale_mae.report.live_server import LiveServer
from scale_mae.report.log_lines import read_log, running_mean
from scale_mae.report.page import page_file, report_page
from scale_mae.report.run_record import read_run_record
from scale_mae.runs import history

PHONE = (390, 844)


def pretrain(config):
    import torch

    from scale_mae import pretrain

    torch.set_num_threads(1)
    return pretrain(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a real run of ten steps with checkpoints at steps 5 and 10, and an export of the last one."""
    folder = tmp_path_factory.mktemp("reports") / "ten steps"
    run_ranks(1, pretrain, load_config("debug", {"run.dir": str(folder), "data.source": demo_index(), "model.patch_size": 4}))
    assert main(["convert", str(folder), "--to", "timm", "--out", str(folder.parent / "encoder.safetensors")]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run):
    out = run.parent / "report.html"
    assert main(["report", str(run), "--out", str(out), "--price-per-gpu-hour", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


def a_line(step, **more):
    base = {"step": step, "total_steps": 1000, "images": step * 16, "epoch": step / 625, "lr": 1e-3, "grad_norm": 0.5}
    speed = {"images_per_s": 100.0, "step_time_s": 0.16, "data_loading_s": 0.01, "peak_memory_gib": 1.5, "time": 1.79e9 + step}
    return base | speed | {"loss": 1 / step} | more


def make_run(folder, lines, events=(), config="debug", tail=""):
    folder.mkdir(parents=True)
    if config:
        (folder / "config.yaml").write_text(load_config(config, {"run.dir": "x"}).to_yaml())
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    for event in events:
        history.append(folder, **event)
    return folder


def make_page(run, **options):
    out = run.parent / f"{run.name}.html"
    out.write_text(report_page(read_run_record(run), **options))
    return out


def drawn(browser, chart):
    """Return the curves that the charting library draws: name -> (x, y)."""
    curves = browser.evaluate(f"document.getElementById('chart-{chart}').data.map(t => [t.name, [...t.x], [...t.y]])")
    return {name: (x, y) for name, x, y in curves}


def logged(run, key):
    return [json.loads(line)[key] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.service("chromium")
def test_the_page_shows_the_log_and_loads_nothing(browser, run, page):
    browser.open(page)
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]
    assert page.stat().st_size < 10e6
    images, losses = drawn(browser, "loss")["loss"]
    assert (images, losses) == (logged(run, "images"), logged(run, "loss"))
    curves = {"learning-rate": "lr", "gradient-norm": "grad_norm", "throughput": "images_per_s"}
    for chart, key in curves.items():
        (_, values), *_ = drawn(browser, chart).values()
        assert values == logged(run, key)
    summary = browser.evaluate("document.getElementById('summary').innerText")
    assert "10 of 10 (100.0%)" in summary
    assert "finished" in summary
    assert f"{logged(run, 'loss')[-1]:.4f}" in summary
    # each curve is drawn as a path
    for chart in ("loss", "learning-rate", "throughput"):
        assert browser.evaluate(f"document.querySelectorAll('#chart-{chart} path.js-line').length") >= 1
    assert browser.evaluate("document.querySelectorAll('#reconstructions img').length") == 6
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
    assert not browser.evaluate(
        "[...document.querySelectorAll('.modebar-btn')].some(b => /share|cloud/i.test(b.dataset.title))"
    )


@pytest.mark.service("chromium")
def test_the_reader_can_choose_the_axis_and_the_scale(browser, run, page):
    browser.open(page)
    browser.evaluate("document.querySelector('input[value=steps]').click()")
    browser.wait_for("document.getElementById('chart-loss').layout.xaxis.title.text === 'step'")
    assert drawn(browser, "loss")["loss"][0] == logged(run, "step")
    browser.evaluate("document.getElementById('logarithmic').click()")
    browser.wait_for("document.getElementById('chart-loss').layout.yaxis.type === 'log'")
    assert browser.evaluate("document.getElementById('chart-throughput').layout.yaxis.type") == "linear"


@pytest.mark.service("chromium")
def test_charts_support_hover_and_zoom_with_mouse_and_keyboard(browser, page):
    browser.open(page)
    browser.evaluate("document.getElementById('chart-loss').scrollIntoView({behavior: 'instant', block: 'center'})")
    box = browser.evaluate(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('#chart-loss .nsewdrag').getBoundingClientRect())"
    )
    x, y, width, height = box
    mouse = "Input.dispatchMouseEvent"
    browser.call(mouse, type="mouseMoved", x=x + width / 2, y=y + height / 2)
    browser.wait_for("document.querySelectorAll('#chart-loss .hoverlayer .legend').length", 10)
    full = browser.evaluate("document.getElementById('chart-loss').layout.xaxis.range")
    browser.call(mouse, type="mousePressed", x=x + width * 0.25, y=y + height * 0.2, button="left", clickCount=1)
    browser.call(mouse, type="mouseMoved", x=x + width * 0.5, y=y + height * 0.5, button="left", buttons=1)
    browser.call(mouse, type="mouseReleased", x=x + width * 0.5, y=y + height * 0.6, button="left", clickCount=1)
    span = "(([a, b]) => b - a)(document.getElementById('chart-loss').layout.xaxis.range)"
    browser.wait_for(f"{span} < {(full[1] - full[0]) * 0.3}", 10)
    browser.evaluate("document.getElementById('chart-loss').focus()")
    browser.press("0")
    browser.wait_for(f"{span} > {(full[1] - full[0]) * 0.9}", 10)
    browser.press("+")
    browser.wait_for(f"{span} < {(full[1] - full[0]) * 0.6}", 10)
    assert browser.problems == []


@pytest.mark.service("chromium")
def test_the_page_fits_a_phone_and_follows_the_color_scheme(browser, page, tmp_path):
    browser.open(page, *PHONE, dark=True)
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    paper = "getComputedStyle(document.querySelector('#chart-loss .main-svg')).backgroundColor"
    assert browser.evaluate(paper) == browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)"
    assert browser.evaluate("document.querySelector('#chart-loss').getBoundingClientRect().right") <= PHONE[0]
    browser.screenshot(tmp_path / "dark.png")
    browser.set_window(*PHONE, dark=False)
    browser.wait_for(f"{paper} === 'rgb(255, 255, 255)'", 10)
    browser.screenshot(tmp_path / "light.png")
    dark, light = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("dark", "light"))
    assert np.median(dark) < 40 < 200 < np.median(light)
    assert browser.problems == []


@pytest.mark.service("chromium")
def test_the_page_is_accessible(browser, page):
    browser.open(page)
    missing = browser.evaluate("""[
      ...[...document.images].filter(i => !i.alt).map(i => 'img without alt'),
      ...[...document.querySelectorAll('figure')].filter(f => !f.querySelector(':scope > figcaption')).map(f => 'no caption'),
      ...[...document.querySelectorAll('table')].filter(t => !t.caption || !t.querySelector('th[scope]')).map(t => 'table'),
      ...[...document.querySelectorAll('input')].filter(i => !i.labels.length).map(i => 'input without label'),
      ...[...document.querySelectorAll('.chart')].filter(c => !c.ariaLabel || c.tabIndex !== 0).map(c => 'chart'),
      ...[...document.querySelectorAll('a[href^="#"]')].filter(a => !document.getElementById(a.hash.slice(1))).map(a => a.hash),
      ...[...document.querySelectorAll('.chart')].filter(c => !c.parentElement.querySelector('tbody tr')).map(c => 'no data'),
    ]""")
    assert missing == []
    assert browser.evaluate("document.documentElement.lang") == "en"
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert browser.evaluate(
        "(ids => ids.length === new Set(ids).size)([...document.querySelectorAll('main [id]:not(svg *)')].map(e => e.id))"
    )
    # the Tab key first focuses the link that skips the navigation; the link becomes visible, with an outline
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    # the name of a chart for a screen reader
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [n["name"]["value"] for n in tree if n.get("role", {}).get("value") in ("image", "img") and "name" in n]
    assert any(name.startswith("Loss, loss. smoothed: first") for name in named)


def luminance(color):
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_meet_the_contrast_of_wcag_aa():
    parts = page_file("page.css").split("@media (prefers-color-scheme")[:2]
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in parts]
    for colors in schemes:
        for ground in ("page", "panel"):
            for name, color in colors.items():
                light, dark = sorted([luminance(color), luminance(colors[ground])], reverse=True)
                contrast = (light + 0.05) / (dark + 0.05)
                if name in ("text", "muted", "link"):
                    assert contrast >= 4.5, (name, ground, contrast)
                elif name in ("focus", "faint", "edge") or name.startswith("series"):
                    assert contrast >= (3 if ground == "page" else 2.8), (name, ground, contrast)


class Nesting(HTMLParser):
    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


HOSTILE = "<!--<script >hacked = 1</script><img src=x onerror='hacked = 1'>\"'&"


@pytest.mark.service("chromium")
def test_text_from_the_run_is_escaped(browser, tmp_path):
    start = {"event": "start", "step": 0, "restarts": 0, "world_size": 2, "device": HOSTILE, "command": HOSTILE}
    start |= {"host": HOSTILE, "job_id": HOSTILE, "zero_stage": 2, "versions": {HOSTILE: HOSTILE}}
    back = {
        "event": "rollback",
        "number": 1,
        "reason": HOSTILE,
        "detected": 3,
        "to": 1,
        "skipped_steps": [2, 3],
        "samples": [HOSTILE],
    }
    export = {"event": "export", "path": HOSTILE, "format": HOSTILE, "step": 3}
    line = a_line(3, **{"decode_failures": 1, f"decode_failures_{HOSTILE}": 1})
    run = make_run(tmp_path / HOSTILE.replace("/", "\u2215"), [a_line(1), line], [start, back, export])
    out = tmp_path / "page.html"
    out.write_text(report_page(read_run_record(run), [], [HOSTILE]))
    nesting = Nesting()
    nesting.feed(out.read_text())
    assert nesting.open == []
    assert nesting.scripts == 3
    browser.open(out)
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.evaluate("document.scripts.length") == 3
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.problems == []
    assert HOSTILE in browser.evaluate("document.querySelector('#configuration code').textContent")


@pytest.mark.service("chromium")
def test_a_long_log_is_thinned_and_keeps_its_extremes(browser, tmp_path):
    rng = np.random.default_rng(0)
    lines = [a_line(20 * i, loss=float(rng.normal(0.5, 0.01)), total_steps=2_000_000) for i in range(1, 100_001)]
    lines[41_234]["loss"], lines[77_777]["loss"], lines[60_000]["loss"] = 9.0, 0.01, None
    page = make_page(make_run(tmp_path / "long", lines))
    assert page.stat().st_size < 10e6
    browser.open(page)
    images, losses = drawn(browser, "loss")["loss"]
    assert len(losses) <= MAX_POINTS
    known = {line["images"]: line["loss"] for line in lines}
    assert all(known[x] == y for x, y in zip(images, losses, strict=True))
    assert {9.0, 0.01, None} <= set(losses)
    assert "at most 2,000 points" in browser.evaluate("document.querySelector('footer').innerText")
    assert browser.evaluate("document.querySelectorAll('#loss details tbody tr').length") == 3 * TABLE_ROWS
    assert browser.problems == []


@pytest.mark.service("chromium")
def test_incidents_are_marked_and_listed(browser, tmp_path):
    start = {"event": "start", "world_size": 2, "device": "cpu", "host": "n1", "job_id": "7", "zero_stage": 2, "versions": {}}
    events = [
        start | {"step": 0, "restarts": 0},
        start | {"step": 40, "restarts": 1},
        {
            "event": "rollback",
            "number": 1,
            "reason": "loss spike",
            "detected": 60,
            "to": 50,
            "skipped_steps": [51, 60],
            "samples": [5],
        },
    ]
    lines = [a_line(s) for s in (10, 20, 30, 40, 50)] + [a_line(s, skipped_steps=2) for s in (50, 55, 60)]
    lines += [a_line(s, skipped_steps=3, loss=2.0) for s in (55, 60, 70)]
    lines[6]["loss"] = 1000.0  # repeated later
    run = make_run(tmp_path / "eventful", lines, events)
    browser.open(make_page(run))
    shown = drawn(browser, "loss")
    assert shown["restart"][0] == [40 * 16]
    assert shown["rollback"][0] == [60 * 16]
    assert shown["skipped step"][0] == [50 * 16, 55 * 16]
    assert shown["loss"][1][-3:] == [2.0] * 3
    assert sorted(shown["repeated later"][1]) == sorted([1 / 50, 1000, 1 / 60])
    text = browser.evaluate("document.getElementById('incidents').innerText")
    for words in ("restart 1 on 2 processes", "loss spike. Back from step 60 to 50", "2 steps skipped", "1 step skipped"):
        assert words in text
    assert browser.evaluate("document.getElementById('chart-loss').layout.shapes.length") == 4
    # the valid steps fill the chart, wherever the repeated steps lie
    span = "document.getElementById('chart-loss').layout.yaxis.range"
    low, high = browser.evaluate(span)
    assert -0.5 < low < 1 / 50
    assert 2 < high < 2.5
    browser.evaluate("document.getElementById('logarithmic').click()")
    browser.wait_for("document.getElementById('chart-loss').layout.yaxis.type === 'log'")
    low, high = browser.evaluate(span)
    assert -2.5 < low < math.log10(1 / 50) < math.log10(2) < high < 1


def listed_incidents(run):
    return re.sub("<[^>]*>", " ", report_page(read_run_record(run)).partition('id="incidents"')[2])


def test_skipped_steps_come_from_the_history(tmp_path):
    events = [
        {"event": "steps_skipped", "steps": [7, 8, 12], "total": 3},
        {"event": "steps_skipped", "steps": [15], "total": 4},
    ]
    run = make_run(tmp_path / "run", [a_line(10, skipped_steps=2), a_line(20, skipped_steps=4)], events)
    skipped = [(marker.kind, marker.steps) for marker in find_incidents(read_run_record(run))]
    assert skipped == [("skipped step", 7), ("skipped step", 12), ("skipped step", 15)]
    text = listed_incidents(run)
    for words in ("steps 7 to 8 skipped", "step 12 skipped", "step 15 skipped (gradients not finite), 4 in total"):
        assert words in text
    assert "up to step" not in text


def test_without_events_skipped_steps_come_from_the_counter_also_in_superseded_lines(tmp_path):
    lines = [a_line(10), a_line(20, skipped_steps=1), a_line(30, skipped_steps=3), a_line(20, skipped_steps=3)]
    run = make_run(tmp_path / "run", [*lines, a_line(30, skipped_steps=4)])
    text = [marker.text for marker in find_incidents(read_run_record(run))]
    assert [words.partition(" ")[0] + words.rpartition(" ")[2] for words in text] == ["120", "230", "130"]


WRONG = ["x", [1], {"a": 1}, True, math.nan, math.inf, 10**400, None, -1e299, "\ud800"]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_values_of_a_wrong_type_count_as_missing(tmp_path, wrong):
    whole = a_line(20, loss_smoothed=1.0, skipped_steps=1, energy_j=1.0, images_processed=9, eta_s=3.0, decode_failures=1)
    whole |= {"decode_failures_truncated": 1, "slowest_rank_s": 1.0, "gpu_memory_allocated_gib": 1.0}
    lines = [whole, *({**whole, "step": 21 + n, key: wrong} for n, key in enumerate(whole) if key != "step")]
    lines += [{key: wrong if key != "step" else 90 for key in whole}, whole | {"step": wrong}]
    fields = {
        "start": ["time", "step", "restarts", "world_size", "zero_stage", "device", "host", "job_id", "versions", "command"],
        "rollback": ["time", "number", "reason", "detected", "to", "skipped_steps", "positions", "samples"],
        "steps_skipped": ["time", "steps", "total"],
        "stop": ["time", "step", "reason"],
        "checkpoint": ["time", "step", "seconds", "blocked_seconds", "bytes", "error"],
        "export": ["time", "step", "path", "format"],
    }
    events = [{"event": kind, key: wrong} for kind, keys in fields.items() for key in keys]
    events += [{"event": kind} | dict.fromkeys(keys, wrong) for kind, keys in fields.items()]
    for number, config in enumerate(["debug", None]):
        run = make_run(tmp_path / f"run {number}", lines, events, config)
        assert main(["report", str(run), "--no-reconstructions", "--price-per-gpu-hour", "1"]) == 0
        assert main(["compare", str(run)]) == 0
    assert len(read_run_record(run).log) == len(lines) - 1


def test_history_lines_that_are_nested_too_deeply_are_ignored(tmp_path):
    run = make_run(tmp_path / "run", [a_line(1)], [{"event": "stop", "step": 1}])
    with open(run / history.FILE, "a") as file:
        file.write("[" * 100_000 + "\n")
    with open(run / "log.jsonl", "a") as file:
        file.write("[" * 30_000 + "\n")
    record = read_run_record(run)
    assert ([event["event"] for event in record.history], record.log.unreadable) == (["stop"], 1)


def test_the_number_of_written_checkpoints_includes_repeated_ones(tmp_path):
    saved = {"event": "checkpoint", "step": 5, "seconds": 1.0}
    run = make_run(tmp_path / "run", [a_line(5)], [saved, saved | {"step": 6, "error": "full"}, saved])
    assert "2 checkpoints were written in total" in report_page(read_run_record(run))


def test_the_charts_of_memory_and_ranks_state_which_processes_they_show(tmp_path):
    lines = [a_line(s, host_rss_gib=1.0, slowest_rank_s=0.1, fastest_rank_s=0.1) for s in (1, 2)]
    text = report_page(read_run_record(make_run(tmp_path / "run", lines)))
    assert "Largest memory of any process" in text
    assert "peak of rank 0" in text
    assert "own work in a step" in text


def test_a_line_supersedes_earlier_lines_of_the_same_and_of_later_steps(tmp_path):
    run = make_run(tmp_path / "r", [a_line(s, lr=n) for n, s in enumerate([10, 20, 30, 40, 25, 40])], tail='{"step": 50, "lo')
    log = read_log(run / "log.jsonl")
    assert [line["step"] for line in log.lines] == [10, 20, 25, 40]
    assert log.column("lr").tolist() == [0, 1, 4, 5]
    assert [line["step"] for line in log.superseded] == [30, 40]
    assert log.unreadable == 0  # the last line is still being written


@pytest.mark.parametrize(
    "junk", ["[]", "3", "null", '{"step": "7"}', '{"loss": 1}', '{"step": 1e400}', "\x00\x00", "{" * 100_000]
)
def test_damaged_lines_are_counted_and_ignored(tmp_path, junk):
    log = read_log(make_run(tmp_path / "r", [a_line(1)], tail=junk + "\n" + json.dumps(a_line(2)) + "\n") / "log.jsonl")
    assert (len(log), log.unreadable) == (2, 1)


@pytest.mark.service("chromium")
@pytest.mark.parametrize("kind", ["empty", "old", "no config"])
def test_the_page_states_what_the_run_does_not_contain(browser, tmp_path, kind):
    lines = {"empty": [], "old": [{"step": s, "loss": 1 / s} for s in (1, 2, 3)], "no config": [a_line(1), a_line(2)]}[kind]
    page = make_page(make_run(tmp_path / "run", lines, config=None if kind == "no config" else "debug"), pictures=[])
    browser.open(page, *PHONE)
    text = browser.evaluate("document.body.innerText")
    expected = {
        "empty": ["has not logged any step yet", "There is no checkpoint", "There is no export"],
        "old": [
            "The number of restarts is unknown",
            "has no times by phase",
            "no values for: Learning rate, Gradient norm, Throughput",
        ],
        "no config": ["The configuration is unknown: config.yaml is missing", "Hardware, versions and command are unknown"],
    }[kind]
    for words in [*expected, "Process hours are unknown", "has no energy", "no restart, rollback or skipped step"]:
        assert words in text
    assert browser.problems == []


def test_the_cost_contains_every_attempt_the_energy_and_the_price(tmp_path):
    run = make_run(tmp_path / "run", [a_line(10, time=4600, energy_j=3.6e6), a_line(20, time=9800, energy_j=7.2e6)])
    start = {"event": "start", "step": 0, "restarts": 0}
    events = [start | {"time": 1000, "world_size": 8}, start | {"time": 8000, "world_size": 4, "step": 10, "restarts": 1}]
    (run / history.FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    text = re.sub("<[^>]*>", " ", report_page(read_run_record(run), price=3.0).partition('id="cost"')[2])
    assert "1 h 30 min" in text  # 1000 to 4600, and 8000 to 9800
    assert "10" in re.search(r"process hours \(GPU hours on GPUs\)\s+(\S+)", text)[1]
    assert "30.00 at 3 per hour" in text
    assert "2 kWh" in text


def test_pictures_are_stored_and_outlive_their_checkpoint(run, page, tmp_path, monkeypatch):
    names = [f"step-{step:08d}-{percent}.png" for step in (5, 10) for percent in (75, 85, 95)]
    kept = sorted((run / "reconstructions").glob("*.png"))
    assert [path.name for path in kept] == names
    before = [path.stat().st_mtime_ns for path in kept]
    from scale_mae.report import reconstructions

    monkeypatch.setattr(reconstructions, "_draw", lambda *a: pytest.fail("drawn again"))
    monkeypatch.setattr(reconstructions, "list_checkpoints", lambda run: [])  # retention deleted them
    assert main(["report", str(run), "--out", str(tmp_path / "again.html")]) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert (tmp_path / "again.html").read_text().count("data:image/webp") == 6


def test_other_images_can_be_reconstructed_and_reconstructions_disabled(run, tmp_path, capsys):
    (tmp_path / "mine.jpg").write_bytes(jpeg())
    out = tmp_path / "mine.html"
    assert main(["report", str(run), "--out", str(out), "--images", str(tmp_path / "mine.jpg")]) == 0
    assert out.read_text().count("data:image/webp") == 6
    assert len(list((run / "reconstructions").glob("of-*/step-*.png"))) == 6
    assert main(["report", str(run), "--out", str(out), "--no-reconstructions"]) == 0
    assert "data:image/webp" not in out.read_text()
    assert main(["report", str(run), "--out", str(out), "--images", str(tmp_path / "none.jpg")]) == 2
    assert "none.jpg: cannot be read" in capsys.readouterr().err
    (tmp_path / "text.jpg").write_text("no image")
    assert main(["report", str(run), "--out", str(tmp_path / "none.html"), "--images", str(tmp_path / "text.jpg")]) == 2
    assert "text.jpg: cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


def test_pictures_that_cannot_be_drawn_do_not_stop_the_report(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(run), str(moved)], check=True)
    for path in (moved / "reconstructions").glob("*-95.png"):
        path.unlink()
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(demo_index(), str(tmp_path / "gone.index")))
    assert main(["report", str(moved), "--out", str(tmp_path / "out.html")]) == 0
    assert "no new reconstructions" in capsys.readouterr().err
    assert (tmp_path / "out.html").read_text().count("data:image/webp") == 4


def test_exports_and_checkpoints_are_listed(run, page):
    text = page.read_text()
    assert str(run.parent / "encoder.safetensors") in text
    assert "step-00000005" in text
    (event,) = [event for event in history.read(run) if event["event"] == "export"]
    assert (event["format"], event["step"]) == ("timm", 10)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["/nowhere"], "not a run directory"), (["{run}", "--out", "/proc/x/y"], "cannot be written")]
)
def test_an_error_is_one_line(run, capsys, arguments, message):
    assert main(["report", *(a.format(run=run) for a in arguments), "--no-reconstructions"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.service("chromium")
def test_a_served_page_reloads_when_the_run_advances_and_keeps_its_scroll_position(browser, tmp_path):
    run = make_run(tmp_path / "live", [a_line(s) for s in range(1, 30)])
    server = LiveServer(run, lambda version: report_page(read_run_record(run), version=version))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(server.url, 800, 600)
        browser.evaluate(
            "scrollTo({top: 900, behavior: 'instant'}); document.querySelector('#configuration details').open = true; stale = 1"
        )
        time.sleep(2.5)
        assert browser.evaluate("stale") == 1  # nothing new, no reload
        browser.evaluate("scrollTo({top: 900, behavior: 'instant'})")
        with open(run / "log.jsonl", "a") as file:
            file.write(json.dumps(a_line(30, loss=0.123)) + "\n")
        browser.wait_for("typeof stale === 'undefined' && document.documentElement?.dataset.drawn", 20)
        assert drawn(browser, "loss")["loss"][1][-1] == 0.123
        assert abs(browser.evaluate("scrollY") - 900) < 5
        assert browser.evaluate("document.querySelector('#configuration details').open")
        assert browser.problems == []
        assert {url.removeprefix(server.url) for url in browser.requests} == {"", "version"}
    finally:
        server.shutdown()
        server.server_close()
    browser.wait_for("document.getElementById('live').textContent.includes('server has stopped')", 20)


def test_ctrl_c_stops_the_server(run):
    command = [sys.executable, "-m", "scale_mae", "report", str(run), "--serve", "--no-reconstructions"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert re.match(r"Serving the report at http://127\.0\.0\.1:\d+/\.", process.stdout.readline())
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("request_line", ["GET /", "HEAD /", "POST /", "GET /nowhere"])
def test_disconnected_clients_and_unknown_requests_are_not_reported(tmp_path, capfd, request_line):
    run = make_run(tmp_path / "run", [a_line(1)])
    server = LiveServer(run, lambda version: "x" * 50_000_000)
    server.daemon_threads = False  # so that server_close() waits for the answer
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(f"{request_line} HTTP/1.1\r\n\r\n".encode())
        server.handle_request()
        client.recv(100)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    server.server_close()
    assert capfd.readouterr() == ("", "")


def test_an_error_while_rendering_is_reported_in_one_line(tmp_path, capfd):
    def render(version):
        raise ZeroDivisionError("of nothing")

    server = LiveServer(make_run(tmp_path / "run", [a_line(1)]), render)
    server.daemon_threads = False
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        server.handle_request()
        server.server_close()
    assert capfd.readouterr().err == "scale-mae: --serve: ZeroDivisionError: of nothing\n"


def test_an_invalid_price_is_reported(run, capsys):
    for price in ("abc", "nan", "-1", "inf"):
        with pytest.raises(SystemExit):
            main(["report", str(run), f"--price-per-gpu-hour={price}"])
        assert f"argument --price-per-gpu-hour: {price} is not a price" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 2, 1999, 2000, 2001, 50_000])
def test_thinning_keeps_ends_extremes_and_gaps(count):
    values = np.random.default_rng(count).normal(size=count)
    values[3:6] = math.nan
    kept = thin(values, 2000)
    assert len(kept) <= 2000
    assert (np.diff(kept) > 0).all()
    if count:
        assert {0, count - 1, int(np.nanargmin(values)) if count > 6 else 0} <= set(kept.tolist())
    if count > 6:
        assert int(np.nanargmax(values)) in kept
        assert np.isnan(values[kept]).any()


def test_the_running_mean_ignores_missing_values_and_shrinks_at_the_ends():
    values = np.array([1.0, 2.0, np.nan, 8.0, 5.0])
    assert running_mean(values, 1).tolist() == [1, 1.5, 5, 6.5, 5]


def test_the_page_references_no_other_file(page: Path):
    text = page.read_text()
    without = text[: text.index('<script type="application/json"')]
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", without)
