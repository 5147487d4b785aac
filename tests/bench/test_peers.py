"""Other programs: the same pictures, or no times."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldmrt.bench import peers
from ldmrt.bench.peer import PROGRAMS, Task, serve
from ldmrt.bench.peers import beside, check_peers, in_turn, process, psnr
from ldmrt.bench.pictures import control_picture
from ldmrt.errors import BadRequest, LdmrtError
from ldmrt.pipeline import Pipeline

REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 3, "guidance_scale": 5.0}
REQUEST |= {"num_images_per_prompt": 2, "width": 64, "height": 64, "sampler": "ddim"}  # not its model's own


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, "cpu")


def test_psnr_is_of_the_worst_picture() -> None:
    expected = np.zeros((2, 4, 4, 3))
    found = expected.copy()
    found[1] += 0.1
    assert psnr(found, expected) == pytest.approx(20.0)
    assert psnr(expected, expected) == 120.0


def test_rounds_are_in_turn_and_the_first_does_not_count() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    ours, theirs = in_turn(lambda: run("a"), lambda: run("b"), runs=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert (ours, theirs) == ((3.0, 6.0, 7.0), (4.0, 5.0, 8.0))


def test_diffusers_draws_the_same_in_its_own_process(pipe: Pipeline, tiny_model: Path) -> None:
    found = beside("diffusers", tiny_model, pipe, REQUEST, "a case", runs=2)
    assert found.psnr > 60  # float32 twice, 3 steps
    assert len(found.ours_seconds.samples) == len(found.theirs_seconds.samples) == 2
    assert found.times_faster.low <= found.times_faster.value <= found.times_faster.high
    assert found.setup_seconds > found.theirs_seconds.median > 0
    assert found.peak_resident_bytes is not None
    assert found.peak_resident_bytes > 50e6  # of a process with torch in it


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch.compile"])
def test_the_others_draw_the_same(name: str, pipe: Pipeline, tiny_model: Path) -> None:
    pytest.importorskip("torch" if name == "torch.compile" else name)
    task = task_of(name, tiny_model, pipe)
    with ExitStack() as stack, torch.inference_mode():
        found = PROGRAMS[name](task, stack)()
    assert psnr(found, pipe(**REQUEST, output_type="np").images) > 60  # float32 twice, 3 steps


@pytest.mark.slow
def test_diffusers_follows_the_same_control_image(
    tiny_model: Path, tiny_bundle_controlled: Path, tiny_controlnets: list[Path]
) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle_controlled, "cpu")
    task = task_of("diffusers", tiny_model, pipe).model_copy(update={"controlnet": tiny_controlnets[0]})
    with ExitStack() as stack, torch.inference_mode():
        found = PROGRAMS["diffusers"](task, stack)()
    # The bundle has two ControlNets.
    ours = pipe(**REQUEST, control_image=[control_picture(64, 64), None], output_type="np").images
    assert psnr(found, ours) > 60  # float32 twice, 3 steps
    assert psnr(pipe(**REQUEST, output_type="np").images, ours) < 50
    with pytest.raises(BadRequest, match="without ControlNets"):
        check_peers(["onnxruntime"], tiny_model, pipe, controlled=True)


def task_of(name: str, model: Path, pipe: Pipeline) -> Task:
    shape = (1, pipe.bundle.manifest.model.latent_channels, 8, 8)
    return Task(name=name, model=model, device="cpu", dtype="float32", threads=1, latent_shape=shape, **REQUEST)


def test_a_process_answers_every_line(tmp_path: Path) -> None:
    replies = io.StringIO()
    serve(lambda: np.arange(3), io.StringIO(f"draw\nwrite {tmp_path / 'a.npy'}\n"), replies)
    answers = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert len(answers) == 3  # the first says that it is ready
    assert all(answer["peak_resident_bytes"] > 0 <= answer["seconds"] for answer in answers)
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_times_of_other_pictures_are_not_compared(
    pipe: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another_seed = pipe(**REQUEST | {"seed": 77}, output_type="np").images

    class Other:
        def ask(self, command: str) -> float:
            assert command.startswith("write "), "timed"
            np.save(command.removeprefix("write "), of_another_seed)
            return 1.0

    @contextmanager
    def other(*_: Any, **__: Any) -> Iterator[Other]:
        yield Other()

    monkeypatch.setattr(peers, "process", other)
    with pytest.raises(LdmrtError, match="PSNR"):
        beside("diffusers", tiny_model, pipe, REQUEST, "a case", runs=2)


def test_a_process_that_ends_is_named_with_its_last_word(pipe: Pipeline, tmp_path: Path) -> None:
    failing = process("diffusers", tmp_path / "none", pipe, REQUEST, tmp_path)
    with pytest.raises(LdmrtError, match=r"diffusers stopped with exit code 1: .*none"):
        failing.__enter__()


@pytest.mark.parametrize(
    ("names", "words"), [(["other"], "expected diffusers, torch.compile"), (["diffusers"], "built from")]
)
def test_what_cannot_be_compared_is_refused(names: list[str], words: str, pipe: Pipeline) -> None:
    with pytest.raises(BadRequest, match=words):
        check_peers(names, None, pipe)


def test_a_package_that_is_missing_is_named(pipe: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else sys)
    check_peers(["diffusers"], tiny_model, pipe)
    with pytest.raises(BadRequest, match=r"needs openvino, .*: pip install"):
        check_peers(["openvino"], tiny_model, pipe)
