"""Builds the HTML report: one page that contains its style, script, charting library, data and pictures."""

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
from scale_mae.report.chart import MAX_POINTS, Chart, script_data
from scale_mae.report.html_elements import Markup, escape, tag
from scale_mae.report.incidents import find_incidents, format_time
from scale_mae.report.reconstructions import Picture
from scale_mae.report.run_record import RunRecord


def report_page(
    record: RunRecord,
    pictures: Sequence[Picture] | None = None,
    problems: Sequence[str] = (),
    price: float | None = None,
    version: str = "",
) -> str:
    """Return the report of a run as an HTML page.

    Args:
        record: The run.
        pictures: Reconstructions; ``None`` if they are disabled.
        problems: Reasons for missing reconstructions.
        price: Price of a GPU hour.
        version: Version of the content, for a page that reloads when the run advances. Empty for a static page.
    """
    markers, pretraining = find_incidents(record), record.config is None or record.config.run.task == "pretrain"
    chart_sections, charts = sections.chart_sections(record, markers)
    parts = [
        sections.summary(record),
        sections.configuration(record),
        *chart_sections,
        sections.incidents(record, markers),
        sections.reconstructions(pictures, problems) if pretraining else sections.evaluations(record),
        sections.files(record),
        sections.cost(record, price),
    ]
    footer = f"The log has {len(record.log):,} lines."
    if len(record.log) > MAX_POINTS:
        footer += f" A curve shows at most {MAX_POINTS:,} points: the smallest and the largest value of each interval."
    subtitle = f"{record.dir.resolve()}; made {format_time(time.time())} UTC by scale-mae {scale_mae.__version__}"
    return render_page(f"Run {record.name}", subtitle, parts, charts, footer, version)


def render_page(
    title: str, subtitle: str, parts: Sequence[Markup], charts: Sequence[Chart], footer: str = "", version: str = ""
) -> str:
    """Return an HTML page with sections and charts. Its content security policy forbids it to load anything."""
    from plotly.offline import get_plotlyjs

    library, script = (_inline(source) for source in (get_plotlyjs(), page_file("page.js")))
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in (library, script))
    # The charting library adds style elements, and downloads charts as blobs. A served page may connect to its own server.
    connections = "'self'" if version else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {connections}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = Template(page_file("page.html")).substitute(
        policy=policy,
        title=escape(title),
        subtitle=escape(subtitle),
        style=page_file("page.css"),
        version=escape(version),
        navigation=_navigation(parts),
        controls=_controls(charts),
        sections="\n".join(parts),
        footer=escape(footer),
        charts=script_data([chart.data() for chart in charts]),
        library=library,
        script=script,
    )
    return page.encode("utf-8", "replace").decode()  # a name with invalid characters must not prevent the page


def _navigation(parts: Sequence[Markup]) -> Markup:
    headings = [re.search(r'<h2 id="([^"]*)-title">([^<]*)</h2>', part) for part in parts]
    links = [tag("li", tag("a", Markup(heading[2]), href=f"#{heading[1]}")) for heading in headings if heading]
    return tag("ul", *links)


def _controls(charts: Sequence[Chart]) -> Markup:
    if not charts:
        return Markup("")

    def choice(value: str, label: str) -> Markup:
        return tag("label", tag("input", type="radio", name="axis", value=value, checked=value == "images"), label)

    axis = tag("fieldset", tag("legend", "Horizontal axis"), choice("images", "images seen"), choice("steps", "steps"))
    logarithmic = tag("label", tag("input", type="checkbox", id="logarithmic"), "logarithmic loss")
    return tag("form", axis, logarithmic, class_="controls", aria_label="Chart settings")


def page_file(name: str) -> str:
    """Return a file of the page: the template, the style sheet or the script."""
    return files("scale_mae.report").joinpath(name).read_text(encoding="utf-8")


def _inline(source: str) -> str:
    """Return a script for a script element: without an end tag, and with the line ends that a browser hashes."""
    return re.sub(r"</(script)", r"<\\/\1", source.replace("\r\n", "\n").replace("\r", "\n"), flags=re.IGNORECASE)


def _sha256(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def write_page(page: str, out: Path) -> None:
    """Write a page atomically.

    Raises:
        UserError: The file cannot be written.
    """
    staging = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(page, encoding="utf-8")
        staging.replace(out)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
