"""A report as tables of text, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ldmrt.bench.compare import Comparison
from ldmrt.bench.report import Case, MlPerf, Report, Series

_TIMES = ["p50", "p90", "p99", "min", "n"]


class Table(NamedTuple):
    """Columns of which the first is names and the others are figures; a header of empty strings is none."""

    title: str
    header: list[str]
    rows: list[list[str]]


def headline(report: Report) -> str:
    """What was drawn, and by what."""
    settings, place = report.settings, report.place
    return (
        f"{settings.model}: {settings.steps} steps of {settings.sampler}, guidance {settings.guidance_scale:g}; "
        f"{place.dtype}, {place.gpu or place.device}, {place.threads} threads"
    )


def tables(report: Report) -> Iterator[Table]:
    """All of a report."""
    first, *others = report.cases
    rows = [
        ["cold start: process to picture", *_times(report.cold.seconds)],
        [first.label, *_times(first.picture_seconds)],
        *([f"  {stage}", *_times(series)] for stage, series in first.stage_seconds.items()),
        ["  one step of the loop", *_times(first.step_seconds)],
        *([case.label, *_times(case.picture_seconds)] for case in others),
    ]
    yield Table("milliseconds", ["", *_TIMES], rows)
    yield Table(
        "rates; it/s: steps of the sampler, all images in one; rows/s: through the network, two an image with guidance",
        ["", "images/s", "it/s", "rows/s", "GFLOP", "loop of GEMM rate", "loop of copy rate", "best"],
        [_rates(case, best=case is report.best) for case in report.cases],
    )
    if report.mlperf is not None:
        yield Table("in the manner of MLPerf Inference, SDXL; unofficial", ["", ""], _scenarios(report.mlperf))
    yield Table("machine", ["", ""], [*_machine(report)])
    if report.against:
        yield Table(
            f"other programs in turn with ours: {report.against[0].label}; p50",
            ["", "ldmrt ms", "its ms", "ldmrt is faster by (95 %)", "PSNR", "its setup", "its memory"],
            [
                [
                    f"{peer.name}, {peer.dtype}",
                    f"{1e3 * peer.ours_seconds.median:.1f}",
                    f"{1e3 * peer.theirs_seconds.median:.1f}",
                    str(peer.times_faster),
                    f"{peer.psnr:.1f} dB",
                    f"{peer.setup_seconds:.1f} s",
                    "-" if peer.peak_resident_bytes is None else _gigabytes(peer.peak_resident_bytes),
                ]
                for peer in report.against
            ],
        )


def comparison_table(found: Comparison) -> Table:
    """Two reports beside each other."""
    rows = [
        [each.figure, f"{1e3 * each.before:.3f}", f"{1e3 * each.after:.3f}", str(each.ratio), each.verdict]
        for each in found.differences
    ]
    return Table("milliseconds, p50", ["", "A", "B", "B / A (95 %)", "B is"], rows)


def _scenarios(found: MlPerf) -> list[list[str]]:
    return [
        [
            "single stream: 90th percentile of a picture",
            f"{found.single_stream_p90_seconds:.3f} s, of {found.single_stream_pictures}",
        ],
        ["offline", f"{found.offline_images_per_second:.3f} images/s, {found.offline_batch} at a time"],
    ]


def _times(series: Series) -> list[str]:
    values = series.summary
    return [*(_milliseconds(values[name]) for name in _TIMES[:-1]), str(values["n"])]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 0.1 else f"{1e3 * seconds:.1f}"


def _rates(case: Case, *, best: bool) -> list[str]:
    return [
        case.label,
        f"{case.images_per_second:.3f}",
        f"{case.steps_per_second:.2f}",
        f"{case.rows_per_second:.2f}",
        "-" if case.work is None else f"{case.work.picture_flops / 1e9:.1f}",
        *("-" if share is None else f"{share:.0%}" for share in (case.gemm_share, case.copy_share)),
        "*" if best else "",
    ]


def _machine(report: Report) -> Iterator[list[str]]:
    machine = report.cases[0].machine
    if report.build is not None:
        build = report.build
        yield ["build", f"{build.seconds:.1f} s: {build.engines} engines made, {build.reused} were there"]
        if build.peak_resident_bytes is not None:
            yield ["peak memory of the build", _gigabytes(build.peak_resident_bytes)]
    yield ["peak memory of a cold start", _gigabytes(report.cold.peak_resident_bytes)]
    if machine.peak_device_bytes is not None:
        yield ["peak memory of the GPU", _gigabytes(machine.peak_device_bytes)]
    gemm = f"{machine.gemm_before / 1e9:.1f} and {machine.gemm_after / 1e9:.1f} GFLOP/s"
    yield ["matrix product, before and after the first case", gemm]
    yield ["copy", f"{machine.copy_rate / 1e9:.1f} GB/s"]
    if machine.others is not None:
        yield ["processor time of others", f"{machine.others:.0%}"]
    if machine.gpu is not None:
        gpu = machine.gpu
        yield ["GPU clock", f"{gpu.sm_clock_mhz[0]} to {gpu.sm_clock_mhz[1]} MHz"]
        yield ["GPU power and temperature", f"{gpu.power_watts:.0f} W, {gpu.temperature_celsius} C"]
        if gpu.joules_per_image is not None:
            yield ["energy of an image", f"{gpu.joules_per_image:.1f} J"]
        yield ["driver", gpu.driver]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
