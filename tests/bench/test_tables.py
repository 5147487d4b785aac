"""Reports as tables: the figures that they are known to have, in their places."""

from __future__ import annotations

from ldmrt.bench.compare import compare
from ldmrt.bench.nvml import GpuReading
from ldmrt.bench.report import Build
from ldmrt.bench.tables import comparison_table, headline, tables
from tests.bench.reports import PEER, case, machine, report

GPU = GpuReading(
    driver="580.1",
    sm_clock_mhz=(1900, 1980),
    memory_clock_mhz=(1, 1),
    power_watts=512.3,
    temperature_celsius=61,
    used_bytes=7,
    processes=1,
    held_back=(),
    joules_per_image=12.34,
)


def test_every_figure_has_its_place() -> None:
    first, second = case(loop=2.0, images=1), case(loop=3.0, images=2)
    times, rates, about = tables(report(cases=(first, second)))
    assert all(len(row) == len(table.header) for table in (times, rates, about) for row in table.rows)
    by_name = {row[0].strip(): row[1:] for row in times.rows}
    assert by_name["cold start: process to picture"] == ["3000.0", "3000.0", "3000.0", "3000.0", "5"]
    assert by_name["loop"] == ["2000.0", "2012.0", "2019.0", "1980.0", "5"]
    assert by_name["tokenize"][0] == "10.00"
    assert by_name[second.label][0] == "6000.0"
    # 19 evaluations of 2 rows and 10 steps in 2 seconds; an image in 4. The second draws 2 images in 6.
    assert rates.rows[0] == [first.label, "0.250", "5.00", "19.00", "1000.0", "10%", "10%", ""]
    assert rates.rows[1][1] == "0.333"
    assert rates.rows[1][-1] == "*"


def test_what_was_built_and_a_gpu_are_told() -> None:
    on_gpu = case(machine=machine(gpu=GPU, peak_device_bytes=3 * 10**9, others=0.04), work=None)
    made = report(cases=(on_gpu,), build=Build(seconds=12.34, engines=6, reused=2, peak_resident_bytes=4_560_000_000))
    _, rates, about = tables(made)
    assert rates.rows[0][4:7] == ["-", "-", "-"]
    found = {row[0]: row[1] for row in about.rows}
    assert found["build"] == "12.3 s: 6 engines made, 2 were there"
    assert found["peak memory of the build"] == "4.56 GB"
    assert found["peak memory of the GPU"] == "3.00 GB"
    assert found["GPU clock"] == "1900 to 1980 MHz"
    assert found["GPU power and temperature"] == "512 W, 61 C"
    assert found["energy of an image"] == "12.3 J"
    assert found["processor time of others"] == "4%"


def test_other_programs_are_beside_ours() -> None:
    *_, beside = tables(report(against=(PEER,)))
    assert "torch 64x64, 2 images, guidance" in beside.title
    assert beside.rows == [
        ["another <program>, float32", "1000.0", "1500.0", "1.500 (1.400 to 1.700)", "50.0 dB", "2.0 s", "-"]
    ]


def test_two_reports_in_a_table() -> None:
    table = comparison_table(compare(report(), report(cases=(case(loop=1.5),))))
    [loop] = [row for row in table.rows if row[0].endswith("loop")]
    assert loop[1:3] == ["2000.000", "1500.000"]
    assert loop[-1] == "faster"


def test_the_headline_says_what_was_drawn() -> None:
    assert headline(report()) == "m: 10 steps of heun, guidance 5; float32, cpu, 2 threads"
