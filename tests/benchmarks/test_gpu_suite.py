"""The GPU suite: its dry run on the CPU, and that it notices what is wrong, what dies and what takes too long."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
from gpu_suite import ahead, breakdown, candidates, kernel_stages, table
from gpu_suite.models import Model
from gpu_suite.operator import Operator
from gpu_suite.operators import OPERATORS
from gpu_suite.results import Results
from gpu_suite.session import Rates, Session
from ldmrt import choices, tune
from ldmrt.kernels import launch, ops

BENCHMARKS = Path(gpu.__file__).parent
CPU = torch.device("cpu")


def dry_run(out: Path, stages: str) -> dict[str, Any]:
    """Run the suite's own command on the CPU; what it found."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--stages", stages]
    options = ["--out", str(out), "--source", "a test"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN" in done.stdout
    found: dict[str, Any] = json.loads((out / "suite.json").read_text())
    return found


def statuses(data: dict[str, Any]) -> dict[str, str]:
    return {unit: entry["status"] for unit, entry in data["units"].items()}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(CPU, True, Results(tmp_path), time.time() + 100, torch.float32)


# ---------------------------------------------------------------------------------------------------- the dry run


@pytest.mark.slow
def test_dry_run_of_what_needs_no_model(tmp_path: Path) -> None:
    data = dry_run(tmp_path, "probe,compile,correctness,kernels")
    assert set(statuses(data).values()) == {"done"}
    assert data["dry_run"] is True
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["dry_run"] and row["source"] == "a test" and row["commit"] for row in rows)
    checked = next(row for row in rows if row["name"] == "gpu: correctness.attention: all sizes")
    assert (checked["cases"], checked["wrong"]) == (6, [])
    for name in ("add_group_norm_silu", "add_upsample"):
        timed = [row["name"] for row in rows if row["name"].startswith(f"gpu: kernels.{name}: ")]
        assert len(timed) == len(OPERATORS[name].tiny)


@pytest.mark.slow
def test_dry_run_of_the_models(tmp_path: Path) -> None:
    data = dry_run(tmp_path, "sd15,sdxl,decode,breakdown,floors,peers")
    assert set(statuses(data).values()) == {"done"}
    parts = data["units"]["sd15"]["parts"]
    assert parts["right"]["right"]
    assert parts["batch 1"]["step_seconds"]["n"] == 2
    assert parts["end to end"]["text_encoder"] is True
    for name in ("sd15", "sdxl"):
        compiled = data["units"][f"peers.{name}"]["parts"]["diffusers torch.compile max-autotune"]
        # diffusers in float32 on the same weights, through its own scheduler: sums in another order.
        assert max(compiled["relative_difference"].values()) < 1e-4
        assert compiled["times_faster"].keys() == {
            "diffusers eager",
            "diffusers torch.compile reduce-overhead",
            "diffusers torch.compile max-autotune",
        }


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_operator_is_noticed(session: Session, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Off by 5 % everywhere, which is more than any half precision rounds; or one NaN, which no comparison may let pass."""
    operator = OPERATORS[name]
    results = 2 if name in ("add_group_norm_silu", "add_layer_norm") else 1

    def check(change: Any, which: int = 0) -> bool:
        def body(*arguments: Any) -> Any:
            result = operator.body(*arguments)
            if result is None:
                change(arguments[0])
                return None
            assert isinstance(result, tuple) == (results > 1)
            change(result[which] if results > 1 else result)
            return result

        changed = Operator(**{**vars(operator), "body": body})
        monkeypatch.setitem(OPERATORS, name, changed)
        unit = f"correctness.{name}"
        session.results.begin(unit)
        kernel_stages.check_operator(session, unit, name)
        failed = session.results.failed_parts(unit)
        parts = session.results.data["units"][unit]["parts"]
        # Found wrong, not broken.
        assert not any("error" in part for part in parts.values())
        assert len(failed) in (0, len(parts))
        return not failed

    def spoil(result: torch.Tensor) -> None:
        result[(0,) * result.dim()] = torch.nan

    assert check(lambda _result: None)
    for which in range(results):
        assert not check(lambda result: result.mul_(1.05), which)
        assert not check(spoil, which)


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_computes_the_same(name: str) -> None:
    """The rivals are given the same arguments. In float32 they are as right as ours, but where they sum in another order."""
    operator = OPERATORS[name]
    for size in operator.tiny.values():
        arguments = operator.arguments(size, torch.float32, CPU)
        for rival, body in operator.rivals.items():
            if rival not in ("torch flash", "torch cudnn", "torch efficient"):
                ours, theirs = (
                    found if isinstance(found, tuple) else (found,)
                    for found in (operator.body(*arguments), body(*arguments))
                )
                torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_sizes_of_all_names_are_calls_of_the_operator(name: str) -> None:
    """Without values: each is accepted, has work, and asks for kernels."""
    operator = OPERATORS[name]
    with launch.recording(90) as variants:
        for size in operator.sizes.values():
            arguments = operator.arguments(size, torch.float16, torch.device("meta"))
            operator.body(*arguments)
            flops, nbytes = operator.work(arguments)
            # No more is read and written than there are elements, copies of upsampled pixels included.
            tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            assert flops >= 0 < nbytes <= 8 * sum(tensor.nbytes for tensor in tensors)
    assert variants


def test_a_wrong_candidate_is_noticed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU every candidate is the same body, on arguments of the forms that the graphs have."""
    graphs = ahead.graphs_of(session.model("sd15"))
    calls = [call for counter in tune.collect(graphs, 90).values() for call in counter]
    for operator in {call.operator for call in calls}:
        figures: dict[str, Any] = {}
        chosen = [call for call in calls if call.operator == operator]
        candidates._check(chosen, 90, session, figures)
        assert (figures["right"], figures["wrong"]) == (True, []), operator
        assert figures["candidates"] >= len(chosen)

        def off(*arguments: Any, body: Any = ops.OPERATORS[f"ldmrt.{operator}.default"]) -> Any:
            made = body(*arguments)
            return (made[0], made[1] * 1.001) if isinstance(made, tuple) else made * 1.001

        with monkeypatch.context() as patch:
            patch.setitem(ops.OPERATORS, f"ldmrt.{operator}.default", off)
            candidates._check(chosen, 90, session, figures)
        assert not figures["right"]
        assert len(figures["wrong"]) == figures["candidates"]


def test_a_part_that_raises_leaves_its_traceback_and_the_others_run(session: Session) -> None:
    results = session.results
    results.begin("unit")
    with results.part("unit", "first"):
        raise ValueError("what happened")
    with results.part("unit", "second") as figures:
        figures["seconds"] = 1.0
    results.end("unit", "failed")
    kept = Results(results.folder).data["units"]["unit"]["parts"]
    assert "what happened" in kept["first"]["error"]
    assert kept["second"] == {"seconds": 1.0}
    assert results.failed_parts("unit") == ["first"]


def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str, units: list[str], **options: Any) -> Any:
    """The supervisor over a worker of our own: a script that is given `units` and the file of the results."""
    script = tmp_path / "gpu.py"
    header = f"import json, os, sys, time\nsys.path.insert(0, {str(BENCHMARKS)!r})\n"
    script.write_text(
        header
        + "from pathlib import Path\nfrom gpu_suite.results import Results\n"
        + f"results = Results(Path({str(tmp_path)!r}))\nunits = sys.argv[2].split(',')\n"
        + "plain = os.environ.get('LDMRT_KERNELS') == 'reference'\n"
        + worker
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    args = gpu.arguments(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    for name, value in options.items():
        setattr(args, name, value)
    Results(tmp_path).save()
    gpu.Supervisor(args, units).run()
    return Results(tmp_path).data


def test_after_a_death_another_worker_goes_on_and_a_model_is_tried_in_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = """
for unit in units:
    results.begin(unit)
    if unit == "sd15":
        os.abort()
    results.end(unit, "done", "plain" if plain else None)
"""
    data = supervise(tmp_path, monkeypatch, worker, ["probe", "sd15", "floors"])
    assert statuses(data) == {"probe": "done", "sd15": "died", "sd15 (plain torch)": "done", "floors": "done"}
    assert data["units"]["sd15 (plain torch)"]["reason"] == "plain"
    assert "reason" not in data["units"]["floors"]


def test_what_overstays_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = """
for unit in units:
    results.begin(unit)
    if unit == "probe":
        time.sleep(60)
    results.end(unit, "done")
"""
    monkeypatch.setitem(gpu.STAGES, "probe", gpu.Stage(("probe",), 0, 0.1))
    start = time.monotonic()
    data = supervise(tmp_path, monkeypatch, worker, ["probe", "floors"], tiny=False)
    assert time.monotonic() - start < 50
    assert statuses(data) == {"probe": "ended", "floors": "done"}
    assert "more than" in data["units"]["probe"]["reason"]


def test_nothing_begins_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = supervise(tmp_path, monkeypatch, "time.sleep(60)\n", ["probe", "floors"], tiny=False, deadline=time.time())
    assert statuses(data) == {"probe": "not run", "floors": "not run"}


def test_a_worker_that_cannot_begin_is_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = supervise(tmp_path, monkeypatch, "sys.exit(3)\n", ["probe", "floors"])
    assert statuses(data) == {"probe": "not run", "floors": "not run"}
    assert "code 3" in data["units"]["probe"]["reason"]


def test_a_unit_that_no_longer_fits_is_skipped_and_says_so(tmp_path: Path) -> None:
    args = argparse.Namespace(
        out=tmp_path,
        device="cpu",
        dtype=None,
        tiny=False,
        brief=False,
        deadline=time.time() + 3,
        inductor_cache=None,
        kernels=None,
    )
    assert gpu.work(args, ["floors"]) == 0
    entry = Results(tmp_path).data["units"]["floors"]
    assert entry["status"] == "skipped"
    assert "it needs 20 s" in entry["reason"]


def test_wrong_results_and_checks_that_did_not_end_decide_on_the_exit_code() -> None:
    units: dict[str, Any] = {
        "probe": {"status": "failed", "parts": {"tensorrt for rtx": {"error": "none"}}},
        "correctness.geglu": {"status": "done", "parts": {"a": {"right": True}}},
    }
    assert gpu.wrong({"units": units}) == []
    for status in ("died", "ended", "not run"):
        units["correctness.geglu"]["status"] = status
        assert gpu.wrong({"units": units}) == ["correctness.geglu"]
    units["sd15"] = {"status": "failed", "parts": {"right": {"right": False}}}
    assert gpu.wrong({"units": units}) == ["correctness.geglu", "sd15: right"]


def test_unknown_stages_are_named() -> None:
    assert gpu.units_of(["floors", "decode.sdxl", "peers"]) == ["floors", "decode.sdxl", "peers.sd15", "peers.sdxl"]
    for name in ("floor", "decode.sd3"):
        with pytest.raises(ValueError, match="there is no stage"):
            gpu.units_of([name])


# ---------------------------------------------------------------------------------------------------- the breakdown, the floors, the table


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void flash::flash_fwd_kernel<cutlass::half_t>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_f16", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16>", "gemm"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "group norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half>", "layer norm"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>", "elementwise and copies"),
        ("Memcpy DtoD (Device -> Device)", "elementwise and copies"),
        ("something_else_entirely", "other"),
    ],
)
def test_kernels_of_libraries_have_a_class(kernel: str, expected: str) -> None:
    assert breakdown.classify(kernel) == expected


def test_kernels_of_ours_are_named_by_their_launches() -> None:
    """Three files have a function called forward; the order of the launches tells them apart."""
    launched = ["attention.forward", "group_norm.moments", "geglu.forward", "layer_norm.forward"]
    trace = [("forward", 3.0), ("nvjet_gemm", 1.0), ("moments", 2.0), ("forward", 0.5), ("forward", 0.25)]
    found = breakdown.summarize(trace, [*launched, "sampler.step"])
    seconds = {label: total["seconds"] for label, total in found["classes"].items()}
    assert seconds == {"attention": 3.0, "group norm": 2.0, "gemm": 1.0, "geglu": 0.5, "layer norm": 0.25}
    assert (found["launches_of_ours"], found["launches_not_found"]) == (5, 1)
    assert found["largest"][0]["name"] == "attention.forward"


def test_every_kernel_of_ours_has_a_class() -> None:
    files = {operator.source.split(".")[0] for operator in choices.OPERATORS.values()} | {"sampler"}
    launched = [f"{name}.kernel" for name in sorted(files)]
    found = breakdown.summarize([("kernel", 1.0)] * len(launched), launched)
    assert sum(total["kernels"] for total in found["classes"].values()) == len(files) > 4
    assert found["classes"]["sums and upsampling"]["kernels"] == 1


def test_times_and_sizes_name_each_other() -> None:
    assert set(gpu.OPERATORS) == OPERATORS.keys()
    for operator in OPERATORS.values():
        assert set(operator.timed) <= operator.sizes.keys()


def test_the_table_has_a_line_for_every_kind_of_part() -> None:
    units = {
        "sd15": {
            "status": "done",
            "seconds": 12.0,
            "parts": {
                "batch 1": {"step_seconds": {"p50": 5e-3}, "steps_per_second": 200.0, "share_of_flop_floor": 0.4},
                "batch 8": {"error": "Traceback\nRuntimeError: too large"},
                "right": {"right": False, "relative_error": 0.5, "tolerance": 1e-2},
            },
        },
        "peers.sd15": {"status": "ended", "seconds": 1.0, "reason": "the time is over", "parts": {}},
    }
    text = "\n".join(table.lines({"units": units}))
    assert "5.000 ms/step" in text
    assert "FAILED RuntimeError: too large" in text
    assert "WRONG: relative error 5.00e-01" in text
    assert "the time is over" in text
    assert "160 steps/s required" in text
    assert "DRY RUN" not in text


def test_weights_are_the_same_each_time_and_rounded_alike() -> None:
    from ldmrt.engines.protocol import TensorSpec

    half, other = (Model("sd15", tiny=True, dtype=torch.float16, device=CPU) for _ in range(2))
    spec = TensorSpec("module.conv.weight", (320, 64, 3, 3), torch.float16)
    weight = half.weight("unet", spec)
    assert torch.equal(weight, other.weight("unet", spec))
    assert not torch.equal(weight, half.weight("vae", spec))
    wide = half.weight("unet", TensorSpec(spec.name, spec.shape, torch.float32))
    assert torch.equal(wide, weight.float())
    # Sums over 64 x 3 x 3 inputs of unit variance keep it, within the deviation of 184,320 draws.
    assert float(wide.var()) * 64 * 9 == pytest.approx(1, rel=0.02)


def test_rates_turn_work_into_seconds() -> None:
    from gpu_suite.floors import floor_of
    from ldmrt.engines.protocol import TensorSpec
    from ldmrt.graph import Dim, Graph, Node, Ref

    f32 = torch.float32
    nodes = (
        Node("packed", "aten.t.default", (Ref("w"),), {}, (8, 8), f32),
        Node("h", "aten.linear.default", (Ref("x"), Ref("w")), {}, (Dim("rows"), 5, 8), f32),
        Node("y", "ldmrt.attention.default", (Ref("h"), Ref("h"), Ref("h"), 2, 0.5), {}, (Dim("rows"), 5, 8), f32),
    )
    graph = Graph(
        name="step",
        inputs=(TensorSpec("x", ("rows", 5, 8), f32),),
        weights={"w": TensorSpec("w", (8, 8), f32)},
        constants={},
        nodes=nodes,
        outputs={"y": "y"},
    )
    found = floor_of(graph, 3, Rates(gemm=1e3, copy=1e6))
    products = 2 * (3 * 5 * 8) * 8, 4 * 3 * 5 * 5 * 8
    assert found["flops"] == sum(products)
    assert found["bytes"] == 4 * ((3 * 5 * 8 + 8 * 8 + 3 * 5 * 8) + 2 * 3 * 5 * 8)
    assert found["flop_seconds"] == found["node_seconds"] == sum(products) / 1e3
