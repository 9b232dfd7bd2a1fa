"""Fill the generated parts of the documentation from the code.

    python docs/generate.py            write them
    python docs/generate.py --check    write nothing; name the stale pages and exit with 1

A page holds a generated part between ``<!-- generated: NAME -->`` and ``<!-- end -->``. :data:`PARTS` maps each name to the
function that writes its content.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Fill all pages, or check them."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        filled = PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]().strip()}\n\n{found[3]}", text)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                path.write_text(filled)
                print(f"wrote {stale[-1]}")
    if stale and "--check" in sys.argv[1:]:
        print(f"stale: {', '.join(stale)}. Run python docs/generate.py", file=sys.stderr)
        return 1
    return 0


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines)


def code(text: str) -> str:
    """Return text in code font, safe inside a table."""
    if "`" in text:
        return f"`` {text} ``"
    if "|" in text:
        return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"
    return f"`{text}`"


def fence(language: str, lines: Iterable[str]) -> str:
    """Return a fenced block."""
    return "\n".join([f"```{language}", *lines, "```"])


def prose(text: str) -> str:
    """Return a docstring or help text as Markdown that is safe inside a table."""
    plain = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text.replace("``", "`")).replace("%%", "%")
    parts = re.split(r"(`[^`]*`)", plain)
    return "".join(
        code(part[1:-1]) if part.startswith("`") else html.escape(part, quote=False).replace("|", "&#124;") for part in parts
    )


# Configuration


def config() -> str:
    """Return all sections of the configuration."""
    from scale_mae.config import Config

    found = []
    for name, field in Config.model_fields.items():
        section: Any = field.annotation
        found.append(f"## {name}\n\n{prose(' '.join((section.__doc__ or '').split()))}\n\n{keys(section, f'{name}.')}")
    return "\n\n".join(found)


def site() -> str:
    """Return the keys of a Slurm site file."""
    from scale_mae.slurm.site_config import ContainerConfig, SiteConfig

    rows = [*key_rows(SiteConfig, ""), *key_rows(ContainerConfig, "container.")]
    return table(["key", "type", "default", "meaning"], [row[:3] + row[4:] for row in rows if row[0] != "`container`"])


def keys(section: Any, prefix: str) -> str:
    """Return a table of the keys of a section."""
    return table(["key", "type", "default", "may change on resume", "meaning"], key_rows(section, prefix))


def key_rows(section: Any, prefix: str) -> Iterator[list[str]]:
    """Yield key, type, default, whether it may change on resume, and meaning."""
    from scale_mae.config.field_types import may_change_on_resume

    for name, field in section.model_fields.items():
        free = may_change_on_resume(field) or prefix + name == "run.dir"
        default = code(as_yaml(field.get_default(call_default_factory=True)))
        limits = bounds(field.metadata)
        yield [
            code(prefix + name),
            (named_type(field) or type_name(field.annotation)) + (f", {limits}" if limits else ""),
            default,
            "yes" if free else "no",
            prose(field.description or ""),
        ]


def as_yaml(value: Any) -> str:
    """Return a value as one line of YAML, as a user writes it on the command line."""
    plain = json.loads(json.dumps(value, default=str))
    if isinstance(plain, float):
        return f"{plain:g}"
    if plain == [3 / 4, 4 / 3]:
        return "[3/4, 4/3]"
    return str(yaml.safe_dump(plain, default_flow_style=True, width=200)).removesuffix("...\n").strip() if plain != "" else '""'


def named_type(field: Any) -> str | None:
    """Return the name of a type that the page explains; ``None`` for any other."""
    from scale_mae.config.field_types import DURATION, Pixels

    if any(getattr(item, "pattern", None) == DURATION for item in field.metadata):
        return "duration"
    return "pixels" if any(item in get_args(Pixels) for item in field.metadata) else None


def type_name(annotation: Any) -> str:
    """Return the type of a key in words."""
    from scale_mae.config.field_types import Duration, Pixels

    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return {Duration: "duration", Pixels: "pixels"}.get(annotation) or type_name(args[0])
    if origin is Literal:
        return "one of " + ", ".join(code(str(arg)) for arg in args)
    if origin is tuple:
        count = "any number" if args[-1] is Ellipsis else str(len(args))
        return f"list of {count}: {type_name(args[0])}"
    if args and origin is not dict:  # a union
        return " or ".join(dict.fromkeys(type_name(arg) for arg in args))
    words = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "`null`"}
    return "mapping" if origin is dict else words.get(annotation, "mapping")


def bounds(metadata: Iterable[Any]) -> str:
    """Return the limits of a number in words."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f"{sign} {getattr(item, name)}" for item in metadata for name, sign in signs.items() if hasattr(item, name)]
    found += [f"multiple of {item.multiple_of}" for item in metadata if hasattr(item, "multiple_of")]
    return ", ".join(found).replace(f"< {2**63}", "< 2^63")


# Commands


def commands() -> str:
    """Return every subcommand with its arguments and its example."""
    from scale_mae.cli import build_parser

    return "\n\n".join(f"## {name}\n\n{command(name, parser)}" for name, parser in subcommands(build_parser()))


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the subcommands of a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def command(name: str, parser: argparse.ArgumentParser) -> str:
    """Return one subcommand."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    words = [word(action) for action in actions if not action.option_strings or action.required]
    usage = " ".join(["scale-mae", name, *words, *(["[options]"] if len(words) < len(actions) else [])])
    found = [prose(" ".join((parser.description or "").split())), fence("text", [usage])]
    if actions:
        found.append(table(["argument", "default", "meaning"], map(argument, actions)))
    if example := re.search(r"[Ee]xamples?:\n(.*)", parser.epilog or "", re.DOTALL):
        lines = [line.strip() for line in example[1].splitlines()]
        found.append(fence("bash", filter(None, lines)))
    return "\n\n".join(found)


def word(action: argparse.Action) -> str:
    """Return an argument as it stands in the usage line."""
    value = value_of(action)
    if action.option_strings:
        return f"{action.option_strings[-1]} {value}".strip()
    return {"*": f"[{value} ...]", "+": f"{value} [{value} ...]", "?": f"[{value}]"}.get(str(action.nargs), value)


def value_of(action: argparse.Action) -> str:
    """Return the placeholder of an argument's value; empty for a switch."""
    if action.nargs == 0:
        return ""
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return str(name if not isinstance(name, tuple) else name[0])


def argument(action: argparse.Action) -> list[str]:
    """Return the row of an argument."""
    meaning = (action.help or "") % vars(action) if "%(" in (action.help or "") else action.help or ""
    meaning = re.sub(r"\s*\(default: [^)]*\)", "", meaning) if action.default is not None else meaning
    choices = f" One of {', '.join(code(str(choice)) for choice in action.choices)}." if action.choices else ""
    shown = action.default not in (None, False, argparse.SUPPRESS, []) and action.option_strings
    default = action.default if not isinstance(action.default, list) else " ".join(map(str, action.default))
    if action.required and action.option_strings:
        default, shown = "(required)", False
    return [
        code(word(action)),
        code(str(default)) if shown else "(required)" * (default == "(required)"),
        prose(meaning) + choices,
    ]


# Recipes


def recipes() -> str:
    """Return the shipped recipes with the facts in their headers."""
    from scale_mae.config import load_config
    from scale_mae.config.recipes import read_header, recipe_names, recipe_path

    tasks = {name: load_config(name).run.task for name in recipe_names()}
    rows, found = [], []
    for name in sorted(tasks, key=lambda name: (tasks[name] != "pretrain", name)):
        header = read_header(name)
        rows.append([f"[`{name}`](#{name})", f"`{tasks[name]}`", prose(header.summary)])
        facts = [["command", code(header.command)]]
        facts += [[key, prose(getattr(header, key))] for key in ("hardware", "time", "result")]
        settings = [line for line in recipe_path(name).read_text().splitlines() if not line.startswith("#")]
        found.append(f"## {name}\n\n{prose(header.summary)}\n\n{table(['', ''], facts)}\n\n" + fence("yaml", settings))
    return "\n\n".join([table(["recipe", "task", "what it trains"], rows), *found])


def sizes() -> str:
    """Return the encoder sizes with their parameters and their cost."""
    import torch

    from scale_mae.config.schema import ModelConfig
    from scale_mae.model.mae import build_mae
    from scale_mae.model.sizes import SIZES

    rows = []
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = build_mae(name, image_size=(224, 224))
        parameters = sum(p.numel() for p in model.parameters())
        decoder = sum(p.numel() for key, p in model.named_parameters() if key.startswith(("decoder", "mask_token")))
        flops = model.flops()
        rows.append(
            [
                code(name),
                f"{size.width} x {size.depth}, {size.heads} heads",
                str(ModelConfig(size=name).patch[0]),
                f"{(parameters - decoder) / 1e6:.1f}",
                f"{decoder / 1e6:.1f}",
                f"{flops.train / 1e9:.1f}",
            ]
        )
    header = [
        "`model.size`",
        "width x depth",
        "patch",
        "encoder, M parameters",
        "decoder, M parameters",
        "training, GFLOP per image",
    ]
    return table(header, rows)


# Metrics and events


def log_keys() -> str:
    """Return the keys of log.jsonl."""
    from scale_mae.metrics.log_keys import LOG_KEYS

    return table(["key", "meaning"], [[code(key), prose(meaning)] for key, meaning in LOG_KEYS.items()])


def prometheus() -> str:
    """Return the Prometheus metrics that a run serves."""
    from scale_mae.metrics.prometheus_metrics import NODE_METRICS, PREFIX, RUN_METRICS

    rows = []
    for server, metrics in (("every node", NODE_METRICS), ("first node", RUN_METRICS)):
        for name, spec in metrics.items():
            labels = f"{{{', '.join(spec.labels)}}}" if spec.labels else ""
            suffix = "_total" if spec.type == "counter" else ""
            rows.append([code(f"{PREFIX}{name}{suffix}{labels}"), spec.type, server, prose(spec.help)])
    return table(["series", "type", "served by", "meaning"], rows)


def events() -> str:
    """Return the events of history.jsonl."""
    from scale_mae.runs.history import EVENTS

    found = []
    for event, (meaning, fields) in EVENTS.items():
        rows = [[code(name), prose(text)] for name, text in fields.items()]
        found.append(f"## {event}\n\n{prose(meaning)}\n\n{table(['field', 'meaning'], rows)}")
    return "\n\n".join(found)


# File formats


def attributes(documented: Any) -> str:
    """Return the ``Attributes:`` section of a docstring as a table."""
    text = (documented.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return table(["key", "meaning"], [[code(name), prose(meaning)] for name, meaning in found])


def manifest() -> str:
    """Return the keys of a checkpoint's manifest."""
    from scale_mae.checkpoint.manifest import Manifest

    return attributes(Manifest)


def result() -> str:
    """Return the keys of a result file."""
    from scale_mae.evaluation.results import Result

    return attributes(Result)


def index_entry() -> str:
    """Return the fields of a row of an index."""
    from scale_mae.data.index import ENTRY_DTYPE

    fields: Any = ENTRY_DTYPE.fields
    rows = [[code(name), code(str(fields[name][0])), str(fields[name][1])] for name in ENTRY_DTYPE.names or () if name]
    return table(["field", "numpy type", "byte"], rows)


def export_metadata() -> str:
    """Return the keys of the metadata of an exported encoder."""
    from scale_mae.config import load_config
    from scale_mae.weights.metadata import build_metadata

    content = build_metadata(load_config("vit_base"), 250_000)
    rows = []
    for name, value in content.items():
        text = "the whole configuration" if name == "config" else code(json.dumps(value))
        rows.append([code(name), text])
    return table(["key", "example"], rows)


# The map of the code


def layers() -> str:
    """Return the layers of the architecture test, lowest first."""
    from tests.test_architecture import LAYERS

    return " → ".join(code(name) for name in LAYERS)


def packages() -> str:
    """Return one sentence for every module: the first sentence of its docstring."""
    folder, rows = ROOT / "scale_mae", {}
    for path in sorted(folder.rglob("*.py"), key=lambda path: (len(path.relative_to(folder).parts) > 1, path)):
        package = path.parent.relative_to(folder).as_posix()
        rows.setdefault("" if package == "." else package, []).append([code(path.name), prose(summary(path))])
    found = []
    for package, lines in rows.items():
        name = f"scale_mae/{package}/" if package else "scale_mae/"
        found.append(f"### `{name}`\n\n{table(['file', 'content'], lines)}")
    return "\n\n".join(found)


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.]) (?=[A-Z])", text)[0]


# Benchmarks


def benchmark(name: str) -> Callable[[], str]:
    """Return a function that returns the table of a committed result file."""

    def fill() -> str:
        content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        rows = [[prose(cell) for cell in row.values()] for row in content["table"]]
        return f"{prose(content['title'])}\n\n" + table(map(prose, content["table"][0]), rows)

    return fill


PARTS: dict[str, Callable[[], str]] = {
    "config": config,
    "site": site,
    "commands": commands,
    "recipes": recipes,
    "sizes": sizes,
    "log keys": log_keys,
    "prometheus": prometheus,
    "events": events,
    "manifest": manifest,
    "result": result,
    "index entry": index_entry,
    "export metadata": export_metadata,
    "layers": layers,
    "packages": packages,
    **{f"benchmark {path.stem}": benchmark(path.stem) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))},
}

if __name__ == "__main__":
    sys.exit(main())
