"""A report as a picture: stages, latency by batch and size, other programs, the roofline. PNG, or a page that needs nothing else."""

from __future__ import annotations

import html
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldmrt.bench.report import Case, Report
from ldmrt.bench.tables import Table, headline, tables
from ldmrt.errors import BadRequest
from ldmrt.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2563a8", "#d1782d", "#3a8a5f", "#a63d5c", "#7a5aa6", "#5f6b76")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:76rem;margin:2rem auto;padding:0 1rem}"
    "svg{width:100%;height:auto}table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-variant-numeric:tabular-nums}"
    "td,th{padding:.15rem .8rem;text-align:right;border-bottom:1px solid #e3e6ea;white-space:pre}"
    "td:first-child,th:first-child{text-align:left}h2{font-size:1rem;margin:1.5rem 0 0}.warning{color:#a63d00}"
)


def check_plot(path: Path) -> None:
    """Check that a file of this name can be drawn.

    Raises:
        BadRequest: matplotlib is not installed, or the ending is neither .png nor .html.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise BadRequest(f"--plot is {path}, expected a name that ends in .png or .html", param="plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRequest("--plot needs matplotlib: pip install 'ldmrt[bench]'", param="plot")


def write_plot(report: Report, path: Path) -> None:
    """Draw a report.

    Raises:
        BadRequest: see `check_plot`.
    """
    check_plot(path)
    figure = draw(report)
    drawn = io.BytesIO()
    if path.suffix.lower() == ".png":
        figure.savefig(drawn, format="png", dpi=120)
        made = drawn.getvalue()
    else:
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        svg = drawn.getvalue().decode()
        made = _page(report, svg[svg.index("<svg") :]).encode()
    with replacing(path) as file:
        file.write(made)


def draw(report: Report) -> Figure:
    """The figure: a panel for everything that the report has."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes, Report], None]] = [_stages, _latency]
    if report.against:
        panels.append(_ratios)
    if any(case.work for case in report.cases):
        panels.append(_roofline)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(13, 4.6 * rows), layout="constrained")
    figure.suptitle(headline(report), fontsize=11)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
        panel(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _stages(axes: Axes, report: Report) -> None:
    """Each stage from where the one before ends; the first case of every kind of engine."""
    firsts = list({case.engine: case for case in reversed(report.cases)}.values())[::-1]
    height = 0.8 / len(firsts)
    for number, case in enumerate(firsts):
        medians = [1e3 * series.median for series in case.stage_seconds.values()]
        starts = np.cumsum([0.0, *medians[:-1]])
        places = np.arange(len(medians)) + (number - (len(firsts) - 1) / 2) * height
        axes.barh(places, medians, height, left=starts, color=_COLOURS[number], label=case.label)
        for place, start, median in zip(places, starts, medians, strict=True):
            axes.annotate(
                f"{median:.1f} ms, {median / sum(medians):.0%}",
                (start + median, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(firsts[0].stage_seconds)), list(firsts[0].stage_seconds))
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds since the prompt (p50 of each stage)")
    axes.set_title("Stages", loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower left" if len(firsts) == 1 else "best")


def _latency(axes: Axes, report: Report) -> None:
    """Time of a picture against the images drawn together: median, and up to the 90th percentile."""
    lines: dict[str, list[Case]] = {}
    for case in sorted(report.cases, key=lambda case: case.images):
        guided = "guidance" if case.guidance else "no guidance"
        lines.setdefault(f"{case.engine} {case.width}x{case.height}, {guided}", []).append(case)
    for number, (name, cases) in enumerate(lines.items()):
        medians = np.array([case.picture_seconds.median for case in cases])
        highs = np.array([float(case.picture_seconds.summary["p90"]) for case in cases])
        axes.errorbar(
            [case.images for case in cases],
            medians / [case.images for case in cases],
            [np.zeros(len(cases)), np.maximum(highs - medians, 0) / [case.images for case in cases]],
            fmt="o-",
            capsize=3,
            color=_COLOURS[number % len(_COLOURS)],
            label=name,
        )
    axes.set_xticks(sorted({case.images for case in report.cases}))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    axes.set_xlabel("images drawn together")
    axes.set_ylabel("seconds per image, p50 and p90")
    axes.set_title("Latency by batch and size", loc="left")
    axes.legend(fontsize=8, frameon=False)


def _ratios(axes: Axes, report: Report) -> None:
    """How many times ldmrt is faster than each other program."""
    peers = report.against
    values = np.array([peer.times_faster.value for peer in peers])
    errors = [
        np.maximum(values - [peer.times_faster.low for peer in peers], 0),
        np.maximum([peer.times_faster.high for peer in peers] - values, 0),
    ]
    places = np.arange(len(peers))
    axes.barh(places, values, 0.55, xerr=errors, capsize=4, color=_COLOURS[0], ecolor="#1b1f24")
    for place, peer in zip(places, peers, strict=True):
        axes.annotate(
            f"{peer.times_faster.value:.2f}",
            (peer.times_faster.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color="#1b1f24", linewidth=1, linestyle="--")
    axes.set_yticks(places, [f"{peer.name}\n{peer.dtype}" for peer in peers])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("its time over that of ldmrt, with 95 % intervals; right of 1 ldmrt is faster")
    axes.set_title(f"Other programs: {peers[0].label}", loc="left")


def _roofline(axes: Axes, report: Report) -> None:
    """The loop of every case below what the machine's own matrix product and copy allow.

    Williams, Waterman & Patterson 2009, Roofline, Communications of the ACM 52 (4).
    """
    from matplotlib.ticker import NullFormatter

    cases = [case for case in report.cases if case.work]
    machine = cases[0].machine
    ridge = machine.gemm / machine.copy_rate
    intensities = [case.work.step_flops / case.work.step_bytes for case in cases if case.work]
    span = np.geomspace(min(ridge, *intensities) / 8, max(ridge, *intensities) * 8, 100)
    axes.plot(span, np.minimum(machine.gemm, span * machine.copy_rate) / 1e9, color="#5f6b76")
    axes.annotate(
        f"matrix product {machine.gemm / 1e9:.0f} GFLOP/s", (span[-1], machine.gemm / 1e9), xytext=(0, 4),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip
    for number, (case, intensity) in enumerate(zip(cases, intensities, strict=True)):
        rate = (case.gemm_share or 0) * case.machine.gemm
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(intensity, rate / 1e9, "o", color=colour, label=f"{case.label}: {case.gemm_share:.0%}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"FLOP for each byte of a step; copy {machine.copy_rate / 1e9:.1f} GB/s")
    axes.set_ylabel("GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_title("Roofline of the loop, by this machine's own rates", loc="left")
    axes.set_ylim(top=4 * machine.gemm / 1e9)
    axes.legend(fontsize=8, frameon=False, loc="upper left")  # above the roof is nothing


def _page(report: Report, svg: str) -> str:
    """A page with the figure, the tables and the document itself; it loads nothing."""
    title = html.escape(headline(report))
    lines = [f'<p class="warning">{html.escape(line)}</p>' for line in (*report.warnings, *report.notes)]
    document = json.dumps(report.document()).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>ldmrt bench: {title}</title><style>{_STYLE}</style>\n'
        f"<h1>ldmrt bench</h1><p>{title}</p>{''.join(lines)}\n{svg}\n"
        f"{''.join(_html_table(table) for table in tables(report))}"
        f"<p>{html.escape(_facts(report.provenance))}</p>\n"
        f'<script type="application/json" id="report">{document}</script></html>\n'
    )


def _html_table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = row(table.header, "th") if any(table.header) else ""
    return (
        f"<h2>{html.escape(table.title)}</h2><table>{head}{''.join(row(cells, 'td') for cells in table.rows)}</table>\n"
    )


def _facts(provenance: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in provenance.items())
