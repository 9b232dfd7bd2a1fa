"""One page that holds everything it needs: style, script, charting library, numbers and pictures."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

import scale_mae
from scale_mae.config import UserError
from scale_mae.report import sections
from scale_mae.report.charts import POINTS, Chart, script_data
from scale_mae.report.incidents import marks, when
from scale_mae.report.markup import Markup, tag, text
from scale_mae.report.reconstructions import Picture
from scale_mae.report.record import Record


def report_page(
    record: Record,
    pictures: Sequence[Picture] | None = None,
    problems: Sequence[str] = (),
    price: float | None = None,
    version: str = "",
) -> str:
    """The report of a run as one HTML page.

    Args:
        record: the run.
        pictures: reconstructions; None: left out.
        problems: with drawing them.
        price: of a GPU hour.
        version: of what is shown, for a page that follows the run; empty for one that stays as it is.
    """
    found, pretraining = marks(record), record.config is None or record.config.run.task == "pretrain"
    drawn, charts = sections.chart_sections(record, found)
    parts = [
        sections.summary(record),
        sections.what_ran(record),
        *drawn,
        sections.incidents(record, found),
        sections.reconstructions(pictures, problems) if pretraining else sections.evaluations(record),
        sections.files(record),
        sections.cost(record, price),
    ]
    thinned = len(record.log) > POINTS
    footer = f"{len(record.log):,} log lines"
    if thinned:
        footer += f"; a curve has at most {POINTS:,} points here: of each stretch the smallest and the largest value"
    subtitle = f"{record.dir.resolve()}; made {when(time.time())} UTC by scale-mae {scale_mae.__version__}"
    return render(f"Run {record.name}", subtitle, parts, charts, f"{footer}.", version)


def render(
    title: str, subtitle: str, parts: Sequence[Markup], charts: Sequence[Chart], footer: str = "", version: str = ""
) -> str:
    """Sections and charts as one HTML page that loads nothing; its policy forbids it to."""
    from plotly.offline import get_plotlyjs

    library, script = (_inline(source) for source in (get_plotlyjs(), _file("page.js")))
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in (library, script))
    # charts style themselves; their pictures, when asked for, are made from blobs; a served page asks its own server only
    asks = "'self'" if version else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {asks}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = Template(_file("page.html")).substitute(
        policy=policy,
        title=text(title),
        subtitle=text(subtitle),
        style=_file("page.css"),
        version=text(version),
        navigation=_navigation(parts),
        controls=_controls(charts),
        sections="\n".join(parts),
        footer=text(footer),
        charts=script_data([chart.data() for chart in charts]),
        library=library,
        script=script,
    )
    return page.encode("utf-8", "replace").decode()  # a damaged name is no reason for none


def _navigation(parts: Sequence[Markup]) -> Markup:
    found = [re.search(r'<h2 id="([^"]*)-title">([^<]*)</h2>', part) for part in parts]
    links = [tag("li", tag("a", Markup(heading[2]), href=f"#{heading[1]}")) for heading in found if heading]
    return tag("ul", *links)


def _controls(charts: Sequence[Chart]) -> Markup:
    if not charts:
        return Markup("")

    def choice(value: str, words: str) -> Markup:
        return tag("label", tag("input", type="radio", name="axis", value=value, checked=value == "images"), words)

    axis = tag("fieldset", tag("legend", "Charts over"), choice("images", "images seen"), choice("steps", "steps"))
    logarithmic = tag("label", tag("input", type="checkbox", id="logarithmic"), "logarithmic loss")
    return tag("form", axis, logarithmic, class_="controls", aria_label="How charts are drawn")


def _file(name: str) -> str:
    return files("scale_mae.report").joinpath(name).read_text(encoding="utf-8")


def _inline(source: str) -> str:
    """A script as it can stand inside a page, with no end tag in it and line ends as a browser reads them."""
    return re.sub(r"</(script)", r"<\\/\1", source.replace("\r\n", "\n").replace("\r", "\n"), flags=re.IGNORECASE)


def _sha256(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def write(page: str, out: Path) -> None:
    """Write a page; whoever has it open sees a whole one.

    Raises:
        UserError: it cannot be written.
    """
    staging = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(page, encoding="utf-8")
        staging.replace(out)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
