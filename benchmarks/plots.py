"""The documents' plots of figures, drawn from the ledger.

    python benchmarks/plots.py [NAME ...] [--check]

Each is docs/images/performance-NAME.png, and holds a digest of the figures that it was drawn from: those are drawn whose figures are others now, and
those that are named. With --check nothing is drawn, and the exit code
is 1 if a digest is not that of the ledger's figures. Needs matplotlib: pip install 'ldmrt[bench]'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tables import ALL, KERNELS, ROOT, Row, contenders, find, gpu, scaling_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = ROOT / "docs" / "images"
_OURS, _THEIRS, _FLOOR = "#2563a8", "#a9b2bc", "#d1782d"
_COLOURS = (_OURS, "#3a8a5f", _FLOOR, "#a63d5c", "#7a5aa6", "#5f6b76", "#c2a83e", "#1b1f24")


@dataclass(frozen=True)
class Plot:
    """Figures, and the panels that show them.

    Attributes:
        figures: all that is drawn, as JSON has it.
        panels: each draws into axes.
    """

    figures: Any
    panels: Sequence[Callable[[Axes], None]]

    @property
    def digest(self) -> str:
        """Of the figures."""
        return hashlib.sha256(json.dumps(self.figures, sort_keys=True).encode()).hexdigest()


def size() -> Plot:
    """What a step costs by the side of the latents, and by the batch."""
    sides, batches = (scaling_rows(by) for by in ("side", "batch"))
    rate = max(row["gemm_flops_per_second"] for row in (*sides, *batches))

    def panel(rows: list[Row], by: str, what: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            xs = [row[by] for row in rows]
            floors = [row["flops"] / rate for row in rows]
            axes.loglog(xs, [row["seconds"]["min"] for row in rows], "o-", color=_OURS, label="least seconds of a step")
            axes.loglog(
                xs, floors, "s--", color=_FLOOR, label="its operations at the run's best rate of a large product"
            )
            axes.set_xticks(xs, [str(x) for x in xs], minor=False)
            axes.set_yticks(ticks := (0.1, 0.2, 0.5, 1, 2, 5), [str(y) for y in ticks])
            axes.minorticks_off()
            axes.grid(axis="y", color="#e3e6ea")
            axes.set_xlabel(what)
            axes.set_ylabel("seconds")
            axes.legend(frameon=False)

        return draw

    return Plot(
        [sides, batches, rate],
        [
            panel(sides, "side", "side of the latents, batch 1 (64: a picture of 512 x 512)"),
            panel(batches, "batch", "batch, 512 x 512"),
        ],
    )


def cpu() -> Plot:
    """Networks on a CPU beside other programs'."""
    found = {
        "U-Net, batch 1": contenders("unet", (ALL[0], *ALL[2:]), "81f3b3ebdd2c+", batch=1),
        "U-Net, batch 2": contenders("unet", (ALL[0], *ALL[2:]), "e258fa8df7ae+", batch=2),
        "decoder": contenders("decoder", ("ldmrt", "torch.compile", "OpenVINO"), "8e0609cdbc90"),
        "text encoder": contenders("text_encoder", (ALL[0], *ALL[2:]), "81f3b3ebdd2c"),
    }

    def panel(title: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            names, rows = zip(*reversed(found[title]), strict=True)
            axes.barh(
                names,
                [row["times_of_ldmrt"] for row in rows],
                color=[_OURS if name == "ldmrt" else _THEIRS for name in names],
            )
            for at, row in enumerate(rows):
                label = f" {row['times_of_ldmrt']:.2f}   ({row['seconds']['p50']:.3g} s)"
                axes.text(row["times_of_ldmrt"], at, label, va="center", fontsize=8)
            axes.set_title(f"{title}: times as long as ldmrt", fontsize=10)
            axes.set_xlim(0, 1.35 * max(row["times_of_ldmrt"] for row in rows))

        return draw

    return Plot(found, [panel(title) for title in found])


def gpu_step() -> Plot:
    """A step of SD1.5 on a GPU, by kernels, first and last; and the step beside diffusers'."""
    commits = ("c3fcc51", "88814ba")
    rows = [gpu("gpu: breakdown.sd15: step", commit) for commit in commits]
    classes = {
        label: [1000 * sum(row["classes"].get(name, {"seconds": 0})["seconds"] for name in names) for row in rows]
        for label, names in KERNELS.items()
    }
    peer = gpu("gpu: peers.sd15: diffusers eager", None)
    steps = {name: 1000 * peer[name]["step_seconds"]["p50"] for name in ("ldmrt", "diffusers eager")}
    titles = [f"{which}, {row['device'].split()[1]}" for which, row in zip(("first", "last"), rows, strict=True)]

    def draw(axes: Axes) -> None:
        left = [0.0, 0.0]
        for colour, (label, values) in zip(_COLOURS, classes.items(), strict=True):
            axes.barh(titles, values, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of kernels in a step (512 x 512, float16, two rows)")
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))

    def beside(axes: Axes) -> None:
        axes.barh(list(steps), list(steps.values()), color=[_OURS, _THEIRS])
        for at, value in enumerate(steps.values()):
            axes.text(value, at, f" {value:.1f}", va="center")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(steps.values()))
        axes.set_xlabel(f"milliseconds of a step, {peer['device'].split()[1]}")

    return Plot([titles, classes, steps], [draw, beside])


def serving() -> Plot:
    """Latencies under a load that the batcher alone can carry."""
    rows = {
        what: find("serving", f"serving: {what}")["latency_seconds"]
        for what in ("batcher", "static batching", "one at a time")
    }
    quantiles = ("p50", "p95", "p99")

    def draw(axes: Axes) -> None:
        for number, (what, row) in enumerate(rows.items()):
            xs = [at + 0.27 * (number - 1) for at in range(len(quantiles))]
            colour = (_OURS, _THEIRS, "#5f6b76")[number]
            bars = axes.bar(xs, [row[each] for each in quantiles], width=0.25, color=colour, label=what)
            axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_xticks(range(len(quantiles)), quantiles)
        axes.set_ylabel("seconds from arrival to picture")
        axes.legend(frameon=False)

    return Plot(rows, [draw])


PLOTS: dict[str, Callable[[], Plot]] = {"size": size, "cpu": cpu, "gpu-step": gpu_step, "serving": serving}


def path_of(name: str) -> Path:
    """Where a plot lies."""
    return IMAGES / f"performance-{name}.png"


def is_current(name: str) -> bool:
    """Whether a plot was drawn from the figures that the ledger has."""
    path = path_of(name)
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get("Source") == PLOTS[name]().digest


def write(name: str) -> None:
    """Draw a plot."""
    from matplotlib.figure import Figure

    plot = PLOTS[name]()
    rows = -(-len(plot.panels) // 2)
    figure = Figure(figsize=(12 if len(plot.panels) > 1 else 7, 3.6 * rows), layout="constrained")
    for number, panel in enumerate(plot.panels):
        axes = figure.add_subplot(rows, min(2, len(plot.panels)), number + 1)
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path_of(name), dpi=110, metadata={"Source": plot.digest, "Software": None})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[[], *PLOTS])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    check, stale = arguments.check, [name for name in PLOTS if not is_current(name)]
    for name in stale if check else dict.fromkeys((*stale, *arguments.names)):
        sys.stdout.write(f"{path_of(name).name} {'is not of the ledger' if check else 'drawn'}\n")
        if not check:
            write(name)
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
