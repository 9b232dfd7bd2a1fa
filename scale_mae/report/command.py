"""The commands that show runs: ``report``, ``compare``. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from scale_mae.config import UserError
from scale_mae.weights.command import warn

OUTSIDE = 3  # exit code of compare


def add_report_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Their arguments; ``add`` makes a parser of a name and a text."""
    sub = add("report", "Write what a run did as one page that opens without a network (docs/report.md).")
    sub.add_argument("run", metavar="RUN", help="a run directory")
    sub.add_argument("--out", metavar="FILE.html", help="the page (default: RUN/report.html)")
    sub.add_argument("--serve", action="store_true", help="show it in a browser instead, and follow the run until Ctrl-C")
    sub.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    sub.add_argument("--port", type=int, default=0, metavar="N", help="port to serve on (default: any free one)")
    sub.add_argument("--price-per-gpu-hour", type=_price, metavar="X", help="for the cost, in whatever currency")
    sub.add_argument("--images", nargs="+", default=[], metavar="IMAGE", help="to reconstruct (default: 4 of the run's own)")
    sub.add_argument("--no-reconstructions", action="store_true", help="draw none and show none")

    text = "Lay loss curves of runs over each other, and judge each by the reference curve of its setting; 3: one is outside."
    sub = add("compare", text)
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    sub.add_argument("--out", metavar="FILE", help="also as a page (.html) or a picture (.png)")
    sub.add_argument("--reference", metavar="PATH", help="a reference curve to judge all by, or a folder (docs/report.md)")
    sub.add_argument("--json", action="store_true", help="for programs")


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


REPORT_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"report": report, "compare": compare}
