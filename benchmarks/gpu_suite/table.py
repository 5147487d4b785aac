"""The short table at the end: what was found, beside what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]

_TUNED = 24  # problems in the table; the results file has all

GOALS = {
    "sd15": "goals: 160 steps/s required, 200 goal, 250 moonshot; 1.7 times diffusers with torch.compile",
    "sdxl": "goal: 1024 x 1024, 20 steps, end to end under 0.6 s",
    "decode.sdxl": "goal: 1024 x 1024 under 25 ms",
}


def lines(data: Figures) -> Iterator[str]:
    """The table, line by line."""
    if data.get("dry_run"):
        yield "DRY RUN on a CPU with tiny architectures: the figures say nothing about any GPU or model."
    for unit, entry in data["units"].items():
        status = entry.get("status", "?")
        reason = f": {entry['reason']}" if "reason" in entry else ""
        yield f"{unit:<28} {status:<8} {entry.get('seconds', 0):>7.1f} s{reason}"
        if unit in GOALS:
            yield f"    {GOALS[unit]}"
        yield from _unit_lines(unit, entry.get("parts", {}))


def _unit_lines(unit: str, parts: Mapping[str, Figures]) -> Iterator[str]:
    if unit.startswith("correctness"):
        wrong = [name for name, figures in parts.items() if not figures.get("right")]
        worst = [
            f["of_bound"] for part in parts.values() for f in part.values() if isinstance(f, dict) and "of_bound" in f
        ]
        yield f"    {len(parts) - len(wrong)} of {len(parts)} right, largest error {max(worst, default=0):.2g} of the bound"
        for name in wrong[:5]:
            yield f"    WRONG {name}: {_last_line(parts[name])}"
        return
    for name, figures in parts.items():
        yield from _part_line(unit, name, figures)


def _part_line(unit: str, name: str, figures: Figures) -> Iterator[str]:  # noqa: C901  (a case for every kind of part)
    if "error" in figures:
        yield f"    {name:<36} FAILED {_last_line(figures)}"
    elif "problems" in figures:
        yield from _tuned_lines(figures)
    elif "skipped" in figures:
        yield f"    {name:<36} skipped: {figures['skipped']}"
    elif "times_faster" in figures:
        ratios = ", ".join(f"{ratio} times {case}" for case, ratio in figures["times_faster"].items())
        yield f"    against {name:<28} {ratios}; outputs differ by {figures['relative_difference']}"
    elif "step_seconds" in figures:
        yield (
            f"    {name:<36} {1e3 * figures['step_seconds']['p50']:9.3f} ms/step {figures['steps_per_second']:8.1f} steps/s "
            f"{figures['share_of_flop_floor']:6.1%} of the FLOP floor"
        )
    elif "cold_seconds" in figures.get("ldmrt", {}):
        rivals = ", ".join(
            f"{key.removeprefix('torch ')} {1e6 * value['cold_seconds']['p50']:.0f}"
            for key, value in figures.items()
            if isinstance(value, dict) and "cold_seconds" in value and key != "ldmrt"
        )
        yield (
            f"    {name:<36} {1e6 * figures['ldmrt']['cold_seconds']['p50']:8.1f} us, {figures['share_of_roof_cold']:6.1%} of "
            f"{figures['roof']}{'; ' + rivals if rivals else ''}"
        )
    elif "right" in figures:
        verdict = "right" if figures["right"] else "WRONG"
        yield f"    {name:<36} {verdict}: relative error {figures['relative_error']:.2e}, at most {figures['tolerance']:.0e}"
    elif "seconds" in figures and isinstance(figures["seconds"], dict):
        yield f"    {name:<36} {1e3 * figures['seconds']['p50']:9.2f} ms"
    elif "classes" in figures and unit.startswith("breakdown"):
        yield f"    {name}: {figures['kernels']} kernels, {1e3 * figures['seconds']:.3f} ms"
        for label, total in figures["classes"].items():
            yield f"        {label:<24} {1e3 * total['seconds']:9.3f} ms  {total['kernels']:5d} kernels"
    elif "flop_seconds" in figures:
        yield (
            f"    {name:<36} {figures['flops'] / 1e12:8.3f} TFLOP: {1e3 * figures['flop_seconds']:8.3f} ms; node by node "
            f"{1e3 * figures['node_seconds']:8.3f} ms"
        )
    elif unit in ("probe", "compile"):
        yield f"    {name}: {', '.join(f'{key} {_short(value)}' for key, value in figures.items())}"


def _tuned_lines(figures: Figures) -> Iterator[str]:
    for name, seconds in figures["graph_seconds"].items():
        yield f"    {name}: tuned operators {1e6 * seconds['default']:.0f} us by default, {1e6 * seconds['choice']:.0f} us as chosen"
    for each in figures["problems"][:_TUNED]:
        times = sorted(each["microseconds"], key=lambda pair: pair[1])
        default = next((time for choice, time in times if choice == each["default"]), float("nan"))
        best = " ".join(f"{_compact(choice)} {time:.1f}" for choice, time in times[:3])
        yield f"      {each['calls']:2d} x {each['operator']} {_compact(each['problem'])}: default {default:.1f}; {best}"


def _compact(fields: Mapping[str, Any]) -> str:
    """The values of a problem or a choice, in brackets."""
    values = (tuple(value.values()) if isinstance(value, Mapping) else value for value in fields.values())
    return "(" + ",".join(str(value).replace(" ", "").strip("()") for value in values) + ")"


def _last_line(figures: Figures) -> str:
    found = [line for line in str(figures.get("error", figures)).strip().splitlines() if line.strip()]
    return found[-1][:160] if found else ""


def _short(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list) and value and isinstance(value[0], dict) else str(value)[:120]
