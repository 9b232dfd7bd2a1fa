"""The commands ``report`` and ``compare``. This module does not import torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from scale_mae.config import UserError
from scale_mae.system.command_line import Command, warn

EXIT_OUTSIDE = 3  # exit code of compare if a run is outside its band


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    add("--out", metavar="FILE.html", help="file to write (default: RUN/report.html)")
    add("--serve", action="store_true", help="serve the page over HTTP until Ctrl-C; it reloads when the run advances")
    add("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    add("--port", type=int, default=0, metavar="N", help="port to serve on (default: a free port)")
    add("--price-per-gpu-hour", type=_price, metavar="X", help="price of a GPU hour in any currency, for the cost section")
    add("--images", nargs="+", default=[], metavar="IMAGE", help="images to reconstruct (default: 4 images of the run's data)")
    add("--no-reconstructions", action="store_true", help="omit the reconstructions")


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories")
    add("--out", metavar="FILE", help="write a page (.html) or a picture (.png) as well")
    add("--reference", metavar="PATH", help="reference curve for all runs, or a folder of reference curves")
    add("--json", action="store_true", help="print JSON")


def _price(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (price := float(text)) < float("inf"):
            return price
    raise argparse.ArgumentTypeError(f"{text} is not a price. Pass a number of at least 0.")


def report(args: argparse.Namespace) -> int:
    """Run ``scale-mae report``."""
    run = Path(args.run)
    if not args.serve:
        from scale_mae.report.page import write_page

        page, out = _render(args, warn=warn), Path(args.out or run / "report.html")
        write_page(page, out)
        print(out)
        return 0
    from scale_mae.report.live_server import LiveServer, serve

    if args.out:
        raise UserError("--serve and --out cannot be combined: --serve does not write a file")
    _render(args, warn=warn)  # report problems now, not at the first request
    serve(LiveServer(run, partial(_render, args, warn=lambda _: None), args.host, args.port))
    return 0


def _render(args: argparse.Namespace, version: str = "", *, warn: Callable[[str], None]) -> str:
    from scale_mae.report.page import report_page
    from scale_mae.report.reconstructions import draw_missing
    from scale_mae.report.run_record import read_run_record

    record, problems, pictures = read_run_record(Path(args.run)), list[str](), None
    if not args.no_reconstructions:
        pictures = draw_missing(record.dir, record.config, args.images, problems.append)
    for problem in problems:
        warn(problem)
    return report_page(record, pictures, problems, args.price_per_gpu_hour, version)


def compare(args: argparse.Namespace) -> int:
    """Run ``scale-mae compare``."""
    from scale_mae.report.compare import compare_runs
    from scale_mae.report.page import write_page

    out = Path(args.out) if args.out else None
    if out and out.suffix not in (".html", ".png"):
        raise UserError(f"--out {out}: unsupported file type. Pass a .html or a .png file.")
    comparison = compare_runs([Path(run) for run in args.runs], Path(args.reference) if args.reference else None)
    if out and out.suffix == ".html":
        write_page(comparison.page(), out)
    elif out:
        comparison.draw(out)
    if args.json:
        print(json.dumps(comparison.to_json(), indent=2))
    else:
        comparison.show()
    return EXIT_OUTSIDE if comparison.outside else 0


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
