"""The sections of a report, each made from what the run directory holds; what it lacks is said in a line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scale_mae.checkpoint.paths import list_checkpoints, step_of
from scale_mae.config import Config
from scale_mae.report.charts import Chart, Mark, number
from scale_mae.report.curves import Curves, failure_causes, phase_times
from scale_mae.report.incidents import logged_seconds, shown, stretches, when
from scale_mae.report.markup import Markup, disclosure, facts, note, section, table, tag
from scale_mae.report.reconstructions import Picture, chosen
from scale_mae.report.record import Record
from scale_mae.system.durations import format_duration

KILOWATT_HOUR = 3.6e6  # joules


def summary(record: Record) -> Markup:
    """State, progress and the newest numbers."""
    log, s = record.log, record.run_status
    last = log.lines[-1] if len(log) else {}
    pairs: dict[str, object] = {"state": s.state}
    parts: list[object] = []
    if not len(log):
        parts.append(note("Nothing has been logged yet: this run has no steps to show."))
    else:
        total = last.get("total_steps")
        smoothed = log.smoothed[0][-1]
        pairs |= {
            "step": f"{last['step']:,} of {total:,} ({last['step'] / total:.1%})" if total else f"{last['step']:,}",
            "images": number(float(record.images(log.lines)[-1])),
            "epoch": _figure(last.get("epoch"), "{:.2f}"),
            "loss": _figure(last.get("loss"), "{:.4f}"),
            "loss, smoothed": _figure(float(smoothed) if np.isfinite(smoothed) else None, "{:.4f}"),
            "images/s": _figure(last.get("images_per_s"), "{:,.0f}"),
            "time left": format_duration(last["eta_s"]) if last.get("eta_s") else None,
            "newest log line": f"{when(last.get('time'))} UTC" if last.get("time") else None,
        }
        if total:
            words = f"{last['step']} of {total} steps"
            parts.append(tag("progress", words, value=str(last["step"]), max=str(total), aria_label="progress of the schedule"))
    if log.unreadable:
        parts.append(note(f"Left out of log.jsonl, cut short or damaged: {log.unreadable} lines."))
    return section("summary", "State", facts(pairs), *parts)


def _figure(value: object, form: str) -> str | None:
    return form.format(value) if isinstance(value, (int, float)) else None


def what_ran(record: Record) -> Markup:
    """Config, versions, hardware, command."""
    config, starts = record.config, record.events("start")
    parts: list[object] = []
    if config:
        model, train = config.model, config.train
        pairs: dict[str, object] = {
            "task": config.run.task,
            "encoder": f"{model.size}, patches of {_sides(model.patch)}, images of {_sides(model.image_size)} pixels",
            **(_pretraining(config) if config.run.task == "pretrain" else _classifier(config)),
            "images": config.data.source,
            "schedule": f"{train.duration}, warm-up {config.optim.warmup}, peak learning rate {config.peak_lr:.4g}",
            "batch": f"{train.global_batch:,} images, {train.micro_batch} at once on a process",
            "arithmetic": f"{train.precision}, {config.engine.deepspeed}, recomputation: {train.activation_checkpointing}",
            "seed": config.run.seed,
        }
        parts += [facts(pairs), disclosure("The whole config", tag("pre", config.to_yaml(), tabindex="0"))]
    else:
        parts.append(note(f"The config is not known: {record.config_problem}."))
    if starts:
        last = starts[-1]
        versions = last.get("versions")
        pairs = {
            "processes": last.get("world_size"),
            "device": last.get("device"),
            "host": last.get("host"),
            "job": last.get("job_id"),
            "ZeRO stage": last.get("zero_stage"),
            "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions,
            "command": tag("code", _command(last.get("command"))) if last.get("command") else None,
        }
        parts += [tag("h3", "Newest start"), facts(pairs)]
    else:
        parts.append(note("Hardware, versions and command are not known: history.jsonl tells of no start."))
    return section("what-ran", "What ran", *parts)


def _pretraining(config: Config) -> dict[str, object]:
    model = config.model
    return {
        "target": f"{model.target}, {model.mask_ratio:.0%} of the patches hidden",
        "decoder": f"width {model.decoder_width}, depth {model.decoder_depth}, {model.decoder_heads} heads",
    }


def _classifier(config: Config) -> dict[str, object]:
    c, blocks = config.classify, config.classify.trainable_blocks
    found: dict[str, object] = {
        "begins with": config.model.init_from or "random weights",
        "evaluated on": f"{c.val_source}, every {c.eval_interval}" if c.val_source else "nothing",
    }
    if config.run.task == "linprobe":
        return found | {"learning rates": ", ".join(f"x {rate:g}" for rate in c.lr_multipliers)}
    return found | {
        "trained": "all blocks" if blocks is None else f"the last {blocks:g} blocks",
        "layer decay": config.optim.layer_decay,
        "regularisation": f"drop path {c.drop_path}, smoothing {c.label_smoothing}, mixup {c.mixup}, CutMix {c.cutmix}, "
        f"erasing {c.random_erasing}, RandAugment {config.data.randaugment or 'none'}",
    }


def _command(command: object) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command)


def _sides(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def chart_sections(record: Record, marks: Sequence[Mark]) -> tuple[list[Markup], list[Chart]]:
    """Loss, speed, memory; the sections and the charts in them, thinned."""
    if not len(record.log):
        return [], []
    curves = Curves(record, shown(marks)[0])
    groups = {("loss", "Loss"): curves.loss(), ("speed", "Speed"): curves.speed(), ("memory", "Memory"): curves.memory()}
    groups[("decoding", "Decode failures")] = curves.failures()
    groups = {heading: [chart.thinned() for chart in charts] for heading, charts in groups.items()}
    parts: dict[tuple[str, str], list[object]] = {heading: [c.figure() for c in charts] for heading, charts in groups.items()}
    parts["speed", "Speed"].append(_shares(record))
    parts["decoding", "Decode failures"].append(_failures(record))
    if curves.missing:
        parts["memory", "Memory"].append(note(f"The log of this run has no numbers for: {', '.join(curves.missing)}."))
    made = [section(name, title, *content) for (name, title), content in parts.items()]
    return made, [chart for charts in groups.values() for chart in charts]


def _shares(record: Record) -> Markup:
    times = phase_times(record.log)
    if not times:
        return note("Where time went is not in this log.")
    steps = np.diff(record.log.column("step"), prepend=0.0)
    sums = {name: float(np.nansum(values * steps)) for name, values in times.items()}
    whole = sum(sums.values()) or 1.0
    rows = [[name, format_duration(total), f"{total / whole:.1%}"] for name, total in sums.items()]
    return table("Where time went, over all logged steps", ["part", "time", "share"], rows)


def _failures(record: Record) -> Markup:
    log = record.log
    total = log.last("decode_failures")
    if total is None:
        return note("Decode failures are not in this log.")
    if not total:
        return note("No image had to be replaced.")
    rows = [[cause, number(log.last(key) or 0)] for cause, key in failure_causes(log).items()]
    return table("Images that were replaced", ["cause", "images"], [*rows, ["all", number(total)]])


def incidents(record: Record, marks: Sequence[Mark]) -> Markup:
    """Starts, rollbacks, skips and stops."""
    parts: list[object] = []
    starts = record.events("start")
    if starts:
        header = ["start", "time (UTC)", "step", "processes", "device", "host", "job"]
        keys = ("step", "world_size", "device", "host", "job_id")
        rows = [[n + 1, when(e.get("time")), *(e.get(key) for key in keys)] for n, e in enumerate(starts)]
        parts.append(table("Starts", header, rows))
    elif record.run_status.restarts is None:
        parts.append(note("history.jsonl tells of no start, so how often the run was started again is not known."))
    kept, left = shown(marks)
    if kept:
        rows = [[mark.kind, f"{mark.steps:,.0f}", mark.text] for mark in kept]
        parts.append(table("What happened, by step", ["kind", "step", "what"], rows))
        for event in record.events("rollback"):
            if event.get("samples"):
                listed = ", ".join(map(str, event["samples"]))
                parts.append(disclosure(f"Samples left out by rollback {event.get('number', '')}", tag("p", listed)))
        for event in record.events("rollback_failed"):
            parts.append(disclosure("Samples that led to giving up", tag("p", ", ".join(map(str, event.get("samples", []))))))
    else:
        parts.append(note("No restart, no rollback and no skipped step is recorded."))
    return section("incidents", "Incidents", *parts, note(left) if left else "")


def reconstructions(pictures: Sequence[Picture] | None, problems: Sequence[str]) -> Markup:
    """What the model made of the same images at points of training; None: left out on request."""
    parts: list[object] = []
    if pictures is None:
        parts.append(note("Left out of this report."))
    elif not pictures:
        parts.append(note("No pictures: no checkpoint of this run has been drawn yet."))
    for step, group in chosen(pictures or ()).items():
        figures = []
        for picture in group:
            words = f"{picture.hidden} % of the patches hidden"
            alt = f"Step {step}, {words}: rows of masked image, reconstruction and original"
            image = tag("img", src=picture.data_uri(), alt=alt)
            figures.append(tag("figure", image, tag("figcaption", words)))
        parts += [tag("h3", f"Step {step:,}"), tag("div", *figures, class_="pictures")]
    return section("reconstructions", "Reconstructions", *parts, *(note(problem) for problem in problems))


def evaluations(record: Record) -> Markup:
    """Accuracies of a classifier on the images it was evaluated on."""
    names = {"val_top1": "top-1", "val_top5": "top-5", "val_ema_top1": "top-1 of the moving average", "val_loss": "loss"}
    found = record.events("evaluation")
    shown = [key for key in names if any(key in event for event in found)]
    rows = []
    for event in found:
        values = [event.get(key) for key in shown]
        told = ["-" if v is None else f"{v:.4f}" if "loss" in key else f"{v:.2%}" for key, v in zip(shown, values, strict=True)]
        rows.append([number(event.get("step", 0)), number(event.get("val_images", 0)), *told])
    header = ["step", "images", *(names[key] for key in shown)]
    failed = [note(f"Step {event.get('step', 0):,}: {event.get('why', '')}") for event in record.events("evaluation_failed")]
    shown_rows = table("On classify.val_source", header, rows) if rows else note("None so far.")
    return section("evaluations", "Evaluations", shown_rows, *failed)


def files(record: Record) -> Markup:
    """Checkpoints and exports."""
    written = [event for event in record.events("checkpoint") if not event.get("error")]
    saved = {event.get("step"): event for event in written}
    rows = []
    for path in list_checkpoints(record.dir):
        step = step_of(path)
        event = saved.get(step, {})
        try:
            size, written_at = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()), path.stat().st_mtime
        except FileNotFoundError:  # it made room for a newer one just now
            continue
        seconds = event.get("seconds")
        took = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else "-"
        rows.append([path.name, f"{step:,}", when(written_at), f"{size / 2**20:,.1f} MiB", took])
    parts: list[object] = [
        table("Checkpoints kept", ["name", "step", "written (UTC)", "size", "took"], rows)
        if rows
        else note("No checkpoint is kept.")
    ]
    if written:  # a step that was done again was also saved again
        parts.append(note(f"{len(written)} checkpoints were written in all."))
    exports = record.events("export")
    if exports:
        header = ["path", "format", "step", "time (UTC)"]
        told = [[e.get("path"), e.get("format"), e.get("step"), when(e.get("time"))] for e in exports]
        parts.append(table("Exports", header, told))
    else:
        parts.append(note("Nothing has been exported."))
    return section("files", "Checkpoints and exports", *parts)


def cost(record: Record, price: float | None) -> Markup:
    """Processes times hours, energy, and what that comes to."""
    lives, joules = stretches(record), record.log.last("energy_j")
    images = record.log.last("images_processed") or record.log.last("images")
    pairs: dict[str, object] = {}
    parts: list[object] = []
    if lives:
        seconds = sum(life.seconds for life in lives)
        hours = sum(life.processes * life.seconds for life in lives) / 3600
        pairs |= {"time": format_duration(seconds), "process hours (GPU hours on GPUs)": f"{hours:,.4g}"}
        if price is not None:
            pairs["price"] = f"{hours * price:,.2f} at {price:,.4g} an hour"
    else:
        pairs["time of the steps"] = format_duration(logged_seconds(record))
        parts.append(note("No process hours: history.jsonl tells of no start, so the number of processes is not known."))
    if joules:
        pairs["energy"] = f"{joules / KILOWATT_HOUR:,.4g} kWh"
        if images:
            pairs["energy of a million images"] = f"{joules / images * 1e6 / KILOWATT_HOUR:,.4g} kWh"
    else:
        parts.append(note("Energy is not in this log; NVIDIA devices tell it."))
    return section("cost", "Cost", facts(pairs), *parts)
