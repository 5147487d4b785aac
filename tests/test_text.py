"""Prompts to embeddings: windows, what is encoded once, what a caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BadRequest
from ldmrt.request import Defaults, Job, Request, resolve
from ldmrt.text import Embedding, Given, PromptEncoder, TextModel
from ldmrt.tokenizer import Tokenizer

WIDTH, LAYERS, POOLED = 3, 2, 5
NOTHING = Given()
CPU = torch.device("cpu")


class FakeEncoder:
    """Hidden states that say which ids they are of: id + 1000 per layer, in every channel; pooled: how many windows follow."""

    def __init__(self, *, pooled: bool = False, rows: int | str = "rows") -> None:
        self.inputs: Mapping[str, TensorSpec] = {"input_ids": TensorSpec("input_ids", (rows, 77), torch.int64)}
        self.outputs = {"hidden_states": TensorSpec("hidden_states", (LAYERS, "rows", 77, WIDTH), torch.float32)}
        if pooled:
            self.outputs["text_embeds"] = TensorSpec("text_embeds", ("rows", POOLED), torch.float32)
        self.runs = 0

    def bind(self, buffers: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def enqueue(self) -> None:
        raise NotImplementedError

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.runs += 1
        ids = inputs["input_ids"].float()[..., None].expand(-1, -1, WIDTH)
        states = torch.stack([ids + 1000 * layer for layer in range(LAYERS)])
        left = torch.arange(len(ids), 0, -1.0)[:, None].expand(-1, POOLED)
        return (
            {"hidden_states": states, "text_embeds": left}
            if "text_embeds" in self.outputs
            else {"hidden_states": states}
        )


@pytest.fixture
def engine() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def encoder(tiny_model: Path, engine: FakeEncoder) -> PromptEncoder:
    return PromptEncoder([TextModel(Tokenizer.from_folder(tiny_model / "tokenizer"), engine)], CPU)


@pytest.fixture
def encoder_xl(tiny_model: Path, engine: FakeEncoder) -> PromptEncoder:
    """Two text encoders, the second with a pooled embedding."""
    tokenizer = Tokenizer.from_folder(tiny_model / "tokenizer")
    models = [TextModel(tokenizer, engine), TextModel(tokenizer, FakeEncoder(pooled=True))]
    return PromptEncoder(models, CPU, zero_empty_negative=True)


def job(prompt: str | list[str], **fields: object) -> Job:
    defaults = Defaults(width=64, height=64, num_inference_steps=2, guidance_scale=5.0, sizes=((64, 64),))
    return resolve(Request(prompt=prompt, seed=0, **fields), defaults)  # type: ignore[arg-type]


def test_a_prompt_and_its_negative_have_as_many_windows(encoder: PromptEncoder) -> None:
    long = "a b c " * 60
    (((ours,), (theirs,)),) = encoder.tokenize(job(long, negative_prompt="x"))
    assert len(ours.ids) == len(theirs.ids) > 1
    (((ours,), (theirs,)),) = encoder.tokenize(job("x", negative_prompt=long))
    assert len(ours.ids) == len(theirs.ids) > 1


def test_cutting_warns(encoder: PromptEncoder) -> None:
    with pytest.warns(UserWarning, match="the prompt is longer than the text encoder"):
        (((ours,), _),) = encoder.tokenize(job("a b c " * 60, long_prompt="cut"))
    assert len(ours.ids) == 1


def test_windows_follow_one_another(encoder: PromptEncoder) -> None:
    asked = job("a b c " * 60)
    windows = encoder.tokenize(asked)
    ((cond, uncond),) = encoder.embed(asked, windows, NOTHING)
    assert cond.states[:, 0].tolist() == windows[0][0][0].ids.flatten().tolist()
    assert uncond is not None
    assert uncond.states.shape == cond.states.shape


def test_an_engine_of_one_row_takes_the_windows_one_by_one(tiny_model: Path, encoder: PromptEncoder) -> None:
    engine = FakeEncoder(rows=1)
    narrow = PromptEncoder([TextModel(Tokenizer.from_folder(tiny_model / "tokenizer"), engine)], CPU)
    asked = job("a b c " * 60)
    windows = narrow.tokenize(asked)
    (one,), (all_at_once,) = (each.embed(asked, windows, NOTHING) for each in (narrow, encoder))
    assert torch.equal(one[0].states, all_at_once[0].states)
    assert engine.runs == sum(len(one.ids) for one in (windows[0][0][0], windows[0][1][0]))


def test_clip_skip_is_a_layer(encoder: PromptEncoder) -> None:
    (plain,), (skipped,) = (
        encoder.embed(asked, encoder.tokenize(asked), NOTHING) for asked in (job("x"), job("x", clip_skip=1))
    )
    assert torch.equal(plain[0].states + 1000, skipped[0].states)


def test_equal_prompts_are_encoded_once(encoder: PromptEncoder, engine: FakeEncoder) -> None:
    asked = job(["x", "x", "y"], num_images_per_prompt=2)
    texts = encoder.embed(asked, encoder.tokenize(asked), NOTHING)
    assert len(texts) == 6
    assert engine.runs == 3  # x, y, and the empty negative prompt


def test_without_guidance_there_is_no_negative(encoder: PromptEncoder, engine: FakeEncoder) -> None:
    asked = job("x", guidance_scale=1.0)
    ((_, uncond),) = encoder.embed(asked, encoder.tokenize(asked), NOTHING)
    assert uncond is None
    assert engine.runs == 1


def test_given_embeddings_are_taken(encoder: PromptEncoder) -> None:
    asked = job(["", ""], num_images_per_prompt=2)
    ours, theirs = torch.randn(2, 77, WIDTH), torch.randn(1, 77, WIDTH)
    texts = encoder.embed(asked, encoder.tokenize(asked), Given(ours, theirs))
    assert [torch.equal(cond.states, ours[i // 2]) for i, (cond, _) in enumerate(texts)] == [True] * 4
    assert all(uncond is not None and torch.equal(uncond.states, theirs[0]) for _, uncond in texts)


@pytest.mark.parametrize("shape", [(77, WIDTH), (3, 77, WIDTH), (1, 77, WIDTH + 1)])
def test_embeddings_of_another_shape_are_refused(encoder: PromptEncoder, shape: tuple[int, ...]) -> None:
    asked = job("")
    with pytest.raises(BadRequest, match="prompt_embeds has the shape") as caught:
        encoder.embed(asked, encoder.tokenize(asked), Given(torch.zeros(shape)))
    assert caught.value.param == "prompt_embeds"


def test_embeddings_of_other_lengths_are_refused(encoder: PromptEncoder) -> None:
    asked = job("")
    with pytest.raises(BadRequest, match="154 tokens and the negative prompt's 77"):
        encoder.embed(asked, encoder.tokenize(asked), Given(torch.zeros(1, 154, WIDTH)))


def test_two_encoders_stand_side_by_side(encoder_xl: PromptEncoder) -> None:
    asked = job("a b c " * 60, negative_prompt="x")
    ((cond, uncond),) = encoder_xl.embed(asked, encoder_xl.tokenize(asked), NOTHING)
    assert uncond is not None
    for one in (cond, uncond):
        assert one.states.shape[1] == 2 * WIDTH == encoder_xl.width
        assert torch.equal(one.states[:, :WIDTH], one.states[:, WIDTH:])
        windows = len(one.states) // 77
        assert one.pooled is not None
        assert one.pooled.tolist() == [windows] * POOLED  # of the first window


def test_an_empty_negative_prompt_may_mean_zeros(encoder_xl: PromptEncoder, engine: FakeEncoder) -> None:
    asked = job("x")
    ((cond, uncond),) = encoder_xl.embed(asked, encoder_xl.tokenize(asked), NOTHING)
    assert uncond is not None
    assert uncond.pooled is not None
    assert uncond.states.shape == cond.states.shape
    assert not uncond.states.any()
    assert not uncond.pooled.any()
    assert engine.runs == 1


def test_given_embeddings_need_their_pooled_ones(encoder_xl: PromptEncoder) -> None:
    asked, states = job("", guidance_scale=1.0), torch.randn(1, 77, 2 * WIDTH)
    with pytest.raises(BadRequest, match="needs pooled_prompt_embeds with this model"):
        encoder_xl.embed(asked, encoder_xl.tokenize(asked), Given(states))
    pooled = torch.randn(1, POOLED)
    given = Given(states, pooled_prompt_embeds=pooled)
    ((cond, _),) = encoder_xl.embed(asked, encoder_xl.tokenize(asked), given)
    assert isinstance(cond, Embedding)
    assert cond.pooled is not None
    assert torch.equal(cond.pooled, pooled[0])


# ---------------------------------------------------------------------------------------------------- several requests


def test_prompts_of_several_requests_are_encoded_together(encoder: PromptEncoder, engine: FakeEncoder) -> None:
    """In one run, each distinct prompt once, whatever layers they ask for and however many windows they have; as one by one."""
    jobs = [
        job("a red circle"),
        job("a b c " * 60, negative_prompt="x"),
        job("a red circle", guidance_scale=1.0, clip_skip=1),
        job("blue"),
    ]
    images = [(one, encoder.tokenize(one)[0]) for one in jobs]
    found = encoder.embed_together(images)
    assert engine.runs == 2  # eight windows at a time; the long prompt and its negative have three each
    for (one, windows), (cond, uncond) in zip(images, found, strict=True):
        ((expected, negative),) = encoder.embed(one, [windows], NOTHING)
        assert torch.equal(cond.states, expected.states)
        assert (uncond is None) == (negative is None)
        if uncond is not None and negative is not None:
            assert torch.equal(uncond.states, negative.states)


def test_emphasis_is_each_requests_own(encoder: PromptEncoder) -> None:
    """Of the same tokens; the mean that a window is scaled to is of its own prompt."""
    jobs = [
        job("a (red:1.5) circle", emphasis=True),
        job("a red circle"),
        job("a (red:0.5) circle", negative_prompt="[blue]", emphasis=True),
    ]
    images = [(one, encoder.tokenize(one)[0]) for one in jobs]
    assert len({windows[0][0].ids.tobytes() for _, windows in images}) == 1
    found = encoder.embed_together(images)
    for (one, windows), pair in zip(images, found, strict=True):
        for state, expected in zip(pair, encoder.embed(one, [windows], NOTHING)[0], strict=True):
            assert state is not None
            assert expected is not None
            assert torch.equal(state.states, expected.states)
    assert len({cond.states.numpy().tobytes() for cond, _ in found}) == 3


def test_an_empty_negative_prompt_is_zeros_for_several_too(encoder_xl: PromptEncoder) -> None:
    jobs = [job("a"), job("a", negative_prompt="b")]
    (cond, uncond), (_, other) = encoder_xl.embed_together([(one, encoder_xl.tokenize(one)[0]) for one in jobs])
    assert uncond is not None
    assert other is not None
    assert not uncond.states.any()
    assert uncond.pooled is not None
    assert not uncond.pooled.any()
    assert other.states.any()
    assert cond.pooled is not None


def test_a_model_without_text_encoders_has_nothing_to_encode() -> None:
    bare = PromptEncoder([], CPU)
    one = job("", guidance_scale=1.0)
    ((cond, uncond),) = bare.embed_together([(one, bare.tokenize(one)[0])])
    assert cond.states.shape == (0, 0)
    assert uncond is None
