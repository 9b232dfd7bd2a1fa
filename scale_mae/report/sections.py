"""The sections of the report page of a run. Each section states what the run directory does not contain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scale_mae.checkpoint.paths import get_step, list_checkpoints
from scale_mae.config import Config
from scale_mae.report.chart import Chart, EventMarker, format_number
from scale_mae.report.html_elements import Markup, description_list, details, note, section, table, tag
from scale_mae.report.incidents import find_attempts, format_time, select_markers, total_step_seconds
from scale_mae.report.reconstructions import Picture, select_steps
from scale_mae.report.run_charts import RunCharts, failure_causes, phase_times
from scale_mae.report.run_record import RunRecord
from scale_mae.system.durations import format_duration

JOULES_PER_KILOWATT_HOUR = 3.6e6


def summary(record: RunRecord) -> Markup:
    """Return the section with the state, the progress and the newest metrics."""
    log = record.log
    last = log.lines[-1] if len(log) else {}
    pairs: dict[str, object] = {"state": record.run_status.state}
    parts: list[object] = []
    if not len(log):
        parts.append(note("The run has not logged any step yet."))
    else:
        total = last.get("total_steps")
        smoothed = log.smoothed[0][-1]
        pairs |= {
            "step": f"{last['step']:,} of {total:,} ({last['step'] / total:.1%})" if total else f"{last['step']:,}",
            "images": format_number(float(record.images(log.lines)[-1])),
            "epoch": _format(last.get("epoch"), "{:.2f}"),
            "loss": _format(last.get("loss"), "{:.4f}"),
            "smoothed loss": _format(float(smoothed) if np.isfinite(smoothed) else None, "{:.4f}"),
            "images/s": _format(last.get("images_per_s"), "{:,.0f}"),
            "estimated time left": format_duration(last["eta_s"]) if last.get("eta_s") else None,
            "last log line": f"{format_time(last.get('time'))} UTC" if last.get("time") else None,
        }
        if total:
            text = f"{last['step']} of {total} steps"
            parts.append(tag("progress", text, value=str(last["step"]), max=str(total), aria_label="progress of the schedule"))
    if log.unreadable:
        lines = "1 damaged line is" if log.unreadable == 1 else f"{log.unreadable} damaged lines are"
        parts.append(note(f"{lines} omitted from log.jsonl."))
    return section("summary", "State", description_list(pairs), *parts)


def _format(value: object, form: str) -> str | None:
    return form.format(value) if isinstance(value, (int, float)) else None


def configuration(record: RunRecord) -> Markup:
    """Return the section with the configuration, versions, hardware and command."""
    config, starts = record.config, record.events("start")
    parts: list[object] = []
    if config:
        model, train = config.model, config.train
        pairs: dict[str, object] = {
            "task": config.run.task,
            "encoder": f"ViT {model.size}, patch size {_sides(model.patch)}, image size {_sides(model.image_size)} pixels",
            **(_pretraining(config) if config.run.task == "pretrain" else _classifier(config)),
            "data source": config.data.source,
            "schedule": f"{train.duration}, warm-up {config.optim.warmup}, peak learning rate {config.peak_lr:.4g}",
            "batch": f"{train.global_batch:,} images per step, micro-batch {train.micro_batch}",
            "precision": train.precision,
            "DeepSpeed": config.engine.deepspeed,
            "activation checkpointing": train.activation_checkpointing,
            "seed": config.run.seed,
        }
        parts += [description_list(pairs), details("Full configuration", tag("pre", config.to_yaml(), tabindex="0"))]
    else:
        parts.append(note(f"The configuration is unknown: {record.config_problem.rstrip('.')}."))
    if starts:
        last = starts[-1]
        versions = last.get("versions")
        pairs = {
            "processes": last.get("world_size"),
            "device": last.get("device"),
            "host": last.get("host"),
            "Slurm job": last.get("job_id"),
            "ZeRO stage": last.get("zero_stage"),
            "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions,
            "command": tag("code", _command(last.get("command"))) if last.get("command") else None,
        }
        parts += [tag("h3", "Last start"), description_list(pairs)]
    else:
        parts.append(note("Hardware, versions and command are unknown: history.jsonl contains no start."))
    return section("configuration", "Configuration", *parts)


def _pretraining(config: Config) -> dict[str, object]:
    model = config.model
    return {
        "target": f"{model.target}, mask ratio {model.mask_ratio:.0%}",
        "decoder": f"width {model.decoder_width}, depth {model.decoder_depth}, {model.decoder_heads} heads",
    }


def _classifier(config: Config) -> dict[str, object]:
    c, blocks = config.classify, config.classify.trainable_blocks
    pairs: dict[str, object] = {
        "initialized from": config.model.init_from or "random weights",
        "validation": f"{c.val_source}, every {c.eval_interval}" if c.val_source else "none",
    }
    if config.run.task == "linprobe":
        return pairs | {"learning-rate multipliers": ", ".join(f"{rate:g}" for rate in c.lr_multipliers)}
    return pairs | {
        "trainable blocks": "all blocks" if blocks is None else f"the last {blocks:g} blocks",
        "layer decay": config.optim.layer_decay,
        "regularization": f"drop path {c.drop_path}, label smoothing {c.label_smoothing}, mixup {c.mixup}, CutMix {c.cutmix}, "
        f"random erasing {c.random_erasing}, RandAugment {config.data.randaugment or 'none'}",
    }


def _command(command: object) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command)


def _sides(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def chart_sections(record: RunRecord, markers: Sequence[EventMarker]) -> tuple[list[Markup], list[Chart]]:
    """Return the sections with charts (loss, speed, memory, decode failures), and their thinned charts."""
    if not len(record.log):
        return [], []
    builder = RunCharts(record, select_markers(markers)[0])
    groups = {("loss", "Loss"): builder.loss(), ("speed", "Speed"): builder.speed(), ("memory", "Memory"): builder.memory()}
    groups["decoding", "Decode failures"] = builder.failures()
    groups = {heading: [chart.thinned() for chart in charts] for heading, charts in groups.items()}
    parts: dict[tuple[str, str], list[object]] = {heading: [c.figure() for c in charts] for heading, charts in groups.items()}
    parts["speed", "Speed"].append(_phase_shares(record))
    parts["decoding", "Decode failures"].append(_failures(record))
    if builder.missing:
        parts["memory", "Memory"].append(note(f"The log of this run has no values for: {', '.join(builder.missing)}."))
    sections = [section(name, title, *content) for (name, title), content in parts.items()]
    return sections, [chart for charts in groups.values() for chart in charts]


def _phase_shares(record: RunRecord) -> Markup:
    times = phase_times(record.log)
    if not times:
        return note("The log of this run has no times by phase.")
    steps = np.diff(record.log.column("step"), prepend=0.0)
    sums = {name: float(np.nansum(values * steps)) for name, values in times.items()}
    total = sum(sums.values()) or 1.0
    rows = [[name, format_duration(seconds), f"{seconds / total:.1%}"] for name, seconds in sums.items()]
    return table("Time by phase over all logged steps", ["phase", "time", "share"], rows)


def _failures(record: RunRecord) -> Markup:
    log = record.log
    total = log.last("decode_failures")
    if total is None:
        return note("The log of this run has no decode failures.")
    if not total:
        return note("No image was replaced.")
    rows = [[cause, format_number(log.last(key) or 0)] for cause, key in failure_causes(log).items()]
    return table("Replaced images", ["cause", "images"], [*rows, ["all", format_number(total)]])


def incidents(record: RunRecord, markers: Sequence[EventMarker]) -> Markup:
    """Return the section with starts, rollbacks, skipped steps and stops."""
    parts: list[object] = []
    starts = record.events("start")
    if starts:
        header = ["start", "time (UTC)", "step", "processes", "device", "host", "Slurm job"]
        keys = ("step", "world_size", "device", "host", "job_id")
        rows = [[n + 1, format_time(e.get("time")), *(e.get(key) for key in keys)] for n, e in enumerate(starts)]
        parts.append(table("Starts", header, rows))
    elif record.run_status.restarts is None:
        parts.append(note("The number of restarts is unknown: history.jsonl contains no start."))
    shown, omitted = select_markers(markers)
    if shown:
        rows = [[marker.kind, f"{marker.steps:,.0f}", marker.text] for marker in shown]
        parts.append(table("Incidents by step", ["kind", "step", "description"], rows))
        for event in record.events("rollback"):
            if event.get("samples"):
                samples = ", ".join(map(str, event["samples"]))
                parts.append(details(f"Samples skipped by rollback {event.get('number', '')}", tag("p", samples)))
        for event in record.events("rollback_failed"):
            samples = ", ".join(map(str, event.get("samples", [])))
            parts.append(details("Samples that led to the failed rollback", tag("p", samples)))
    else:
        parts.append(note("There is no restart, rollback or skipped step."))
    if omitted:
        parts.append(note(f"The table omits {omitted} more."))
    return section("incidents", "Incidents", *parts)


def reconstructions(pictures: Sequence[Picture] | None, problems: Sequence[str]) -> Markup:
    """Return the section with reconstructions of the same images at several steps. ``None`` states that they are disabled."""
    parts: list[object] = []
    if pictures is None:
        parts.append(note("Reconstructions are disabled in this report."))
    elif not pictures:
        parts.append(note("There are no reconstructions, because no checkpoint of this run has been drawn yet."))
    for step, group in select_steps(pictures or ()).items():
        figures = []
        for picture in group:
            caption = f"{picture.mask_percent} % of the patches masked"
            alt = f"Step {step}, {caption}: rows of masked image, reconstruction and original"
            image = tag("img", src=picture.data_uri(), alt=alt)
            figures.append(tag("figure", image, tag("figcaption", caption)))
        parts += [tag("h3", f"Step {step:,}"), tag("div", *figures, class_="pictures")]
    return section("reconstructions", "Reconstructions", *parts, *(note(problem) for problem in problems))


def evaluations(record: RunRecord) -> Markup:
    """Return the section with the evaluations of a classifier."""
    titles = {"val_top1": "top-1", "val_top5": "top-5", "val_ema_top1": "top-1 of the EMA weights", "val_loss": "loss"}
    events = record.events("evaluation")
    keys = [key for key in titles if any(key in event for event in events)]
    rows = []
    for event in events:
        values = [event.get(key) for key in keys]
        cells = ["-" if v is None else f"{v:.4f}" if "loss" in key else f"{v:.2%}" for key, v in zip(keys, values, strict=True)]
        rows.append([format_number(event.get("step", 0)), format_number(event.get("val_images", 0)), *cells])
    header = ["step", "images", *(titles[key] for key in keys)]
    failed = [note(f"Step {event.get('step', 0):,}: {event.get('error', '')}") for event in record.events("evaluation_failed")]
    results = table("Evaluations on classify.val_source", header, rows) if rows else note("There is no evaluation yet.")
    return section("evaluations", "Evaluations", results, *failed)


def files(record: RunRecord) -> Markup:
    """Return the section with checkpoints and exports."""
    events = [event for event in record.events("checkpoint") if not event.get("error")]
    event_of_step = {event.get("step"): event for event in events}
    rows = []
    for path in list_checkpoints(record.dir):
        step = get_step(path)
        try:
            size, written = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()), path.stat().st_mtime
        except FileNotFoundError:  # the run has just deleted it
            continue
        seconds = event_of_step.get(step, {}).get("seconds")
        save_time = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else "-"
        rows.append([path.name, f"{step:,}", format_time(written), f"{size / 2**20:,.1f} MiB", save_time])
    header = ["name", "step", "written (UTC)", "size", "save time"]
    parts: list[object] = [table("Checkpoints", header, rows) if rows else note("There is no checkpoint.")]
    if events:  # a step that was repeated may have been saved again
        count = "1 checkpoint was" if len(events) == 1 else f"{len(events)} checkpoints were"
        parts.append(note(f"{count} written in total."))
    exports = record.events("export")
    if exports:
        header = ["path", "format", "step", "time (UTC)"]
        exported = [[e.get("path"), e.get("format"), e.get("step"), format_time(e.get("time"))] for e in exports]
        parts.append(table("Exports", header, exported))
    else:
        parts.append(note("There is no export."))
    return section("files", "Checkpoints and exports", *parts)


def cost(record: RunRecord, price: float | None) -> Markup:
    """Return the section with process hours, energy and price."""
    attempts, joules = find_attempts(record), record.log.last("energy_j")
    images = record.log.last("images_processed") or record.log.last("images")
    pairs: dict[str, object] = {}
    parts: list[object] = []
    if attempts:
        seconds = sum(attempt.seconds for attempt in attempts)
        hours = sum(attempt.world_size * attempt.seconds for attempt in attempts) / 3600
        pairs |= {"time": format_duration(seconds), "process hours (GPU hours on GPUs)": f"{hours:,.4g}"}
        if price is not None:
            pairs["price"] = f"{hours * price:,.2f} at {price:,.4g} per hour"
    else:
        pairs["time of the steps"] = format_duration(total_step_seconds(record))
        parts.append(note("Process hours are unknown: history.jsonl contains no start with the number of processes."))
    if joules:
        pairs["energy"] = f"{joules / JOULES_PER_KILOWATT_HOUR:,.4g} kWh"
        if images:
            pairs["energy per million images"] = f"{joules / images * 1e6 / JOULES_PER_KILOWATT_HOUR:,.4g} kWh"
    else:
        parts.append(note("The log of this run has no energy. Only NVIDIA GPUs report it."))
    return section("cost", "Cost", description_list(pairs), *parts)
