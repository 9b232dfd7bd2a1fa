"""The commands that show runs: ``report``, ``compare``. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from scale_mae.config import UserError
from scale_mae.system.command_line import Command, warn

OUTSIDE = 3  # exit code of compare


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory")
    add("--out", metavar="FILE.html", help="the page (default: RUN/report.html)")
    add("--serve", action="store_true", help="show it in a browser instead, and follow the run until Ctrl-C")
    add("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    add("--port", type=int, default=0, metavar="N", help="port to serve on (default: any free one)")
    add("--price-per-gpu-hour", type=_price, metavar="X", help="for the cost, in any currency")
    add("--images", nargs="+", default=[], metavar="IMAGE", help="images to reconstruct (default: 4 of the run's own)")
    add("--no-reconstructions", action="store_true", help="draw and show no reconstructions")


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories")
    add("--out", metavar="FILE", help="also write a page (.html) or a picture (.png)")
    add("--reference", metavar="PATH", help="a reference curve for all runs, or a folder of them (docs/guides/reports.md)")
    add("--json", action="store_true", help="print JSON")


def _price(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (price := float(text)) < float("inf"):
            return price
    raise argparse.ArgumentTypeError(f"{text} is not a price")


def report(args: argparse.Namespace) -> int:
    """``scale-mae report``."""
    run = Path(args.run)
    if not args.serve:
        from scale_mae.report.page import write

        page, out = _render(args, warn=warn), Path(args.out or run / "report.html")
        write(page, out)
        print(out)
        return 0
    from scale_mae.report.serve import Server, serve

    if args.out:
        raise UserError("--serve writes no file; leave out --out, or --serve")
    _render(args, warn=warn)  # what cannot be shown is told before anybody asks for it
    serve(Server(run, partial(_render, args, warn=lambda _: None), args.host, args.port))
    return 0


def _render(args: argparse.Namespace, version: str = "", *, warn: Callable[[str], None]) -> str:
    from scale_mae.report.page import report_page
    from scale_mae.report.reconstructions import draw_missing
    from scale_mae.report.record import read_record

    record, problems, pictures = read_record(Path(args.run)), list[str](), None
    if not args.no_reconstructions:
        pictures = draw_missing(record.dir, record.config, args.images, problems.append)
    for problem in problems:
        warn(problem)
    return report_page(record, pictures, problems, args.price_per_gpu_hour, version)


def compare(args: argparse.Namespace) -> int:
    """``scale-mae compare``."""
    from scale_mae.report.compare import compare
    from scale_mae.report.page import write

    out = Path(args.out) if args.out else None
    if out and out.suffix not in (".html", ".png"):
        raise UserError(f"--out {out}: name a .html or a .png file")
    found = compare([Path(run) for run in args.runs], Path(args.reference) if args.reference else None)
    if out and out.suffix == ".html":
        write(found.page(), out)
    elif out:
        found.draw(out)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        found.show()
    return OUTSIDE if found.outside else 0


REPORT_COMMANDS = (
    Command(
        name="report",
        group="runs",
        summary="Write a report of a run as one page that opens without a network.",
        description="See docs/guides/reports.md.",
        example="scale-mae report runs/demo --out report.html",
        add_arguments=_add_report_arguments,
        run=report,
    ),
    Command(
        name="compare",
        group="runs",
        summary="Plot the loss curves of runs together and check each against its reference curve.",
        description="The exit code is 3 if a curve lies outside its reference.",
        example="scale-mae compare runs/demo --out curves.html",
        add_arguments=_add_compare_arguments,
        run=compare,
    ),
)
