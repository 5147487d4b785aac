"""Emphasis in prompts: how it is read, and what it does to embeddings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ldmrt.emphasis import Fragment, emphasized, parse
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request, resolve
from ldmrt.text import Given
from ldmrt.tokenizer import Tokenizer

plain = st.text().filter(lambda text: not set(text) & set("()[]\\"))
brackets = st.lists(st.sampled_from([*"()[]:\\", "1.3", ".", "a", " ", "(b:0.5)", "-", "\n"])).map("".join)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a [faint] word", [("a ", 1), ("faint", 1 / 1.1), (" word", 1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 ), blue", [("red", 1.3), (", blue", 1)]),
        ("(none:0) (less:-.5)", [("none", 0), (" ", 1), ("less", -0.5)]),
        ("((red))", [("red", 1.21)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a) b] c:2)", [("a) b] c:2)", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"(a\)b)", [("a)b", 1.1)]),
        (r"back\\slash", [(r"back\slash", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[red:1.3]", [("red:1.3", 1 / 1.1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("()", [("", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_prompts_as_the_web_ui_reads_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    """The long ones and those that are not closed are the web UI's own examples."""
    found = parse(prompt)
    assert [fragment.text for fragment in found] == [text for text, _ in expected]
    assert [fragment.weight for fragment in found] == pytest.approx([weight for _, weight in expected])


@given(plain)
def test_plain_text_stays(text: str) -> None:
    assert parse(text) == [Fragment(text, 1.0)]


@given(st.text())
def test_every_text_can_be_written_with_escapes(text: str) -> None:
    escaped = "".join(f"\\{character}" if character in "()[]\\" else character for character in text)
    assert parse(escaped) == [Fragment(text, 1.0)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [("a", 1, False), ("b", 1, True)]),
        ("a\n BREAK\nb", [("a", 1, False), ("b", 1, True)]),
        ("a,BREAK,b", [("a,", 1, False), (",b", 1, True)]),
        ("BREAK a", [("", 1, False), ("a", 1, True)]),
        ("a BREAK", [("a", 1, False), ("", 1, True)]),
        ("a BREAK BREAK b", [("a", 1, False), ("", 1, True), ("b", 1, True)]),
        ("a BREAK (b:2) c", [("a", 1, False), ("", 1, True), ("b", 2, False), (" c", 1, False)]),
        ("(a BREAK b:2)", [("a", 2, False), ("b", 2, True)]),
        ("BREAKFAST in a break, NBREAK", [("BREAKFAST in a break, NBREAK", 1, False)]),
    ],
)
def test_breaks(prompt: str, expected: list[tuple[str, float, bool]]) -> None:
    assert [tuple(fragment) for fragment in parse(prompt)] == expected


@given(brackets)
def test_nothing_is_an_error_and_no_word_is_lost(prompt: str) -> None:
    found = parse(prompt)
    assert found
    assert all(np.isfinite(fragment.weight) for fragment in found)
    assert sum(fragment.text.count("a") for fragment in found) == prompt.count("a")
    assert all(first.weight != second.weight or second.begins for first, second in pairwise(found))


def test_weights_of_one_change_nothing() -> None:
    states = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(emphasized(states, torch.ones(2, 7)), states)
    zeros = torch.zeros(1, 7, 5)
    assert torch.equal(emphasized(zeros, torch.full((1, 7), 2.0)), zeros)


FRAGMENTS = [
    ("a ", 1.0),
    ("red circle", 1.3),
    (" on white ", 1.0),
    ("background", 1 / 1.1),
    (", ", 1.0),
    ("photo", 0.0),
]
PROMPT = "a (red circle:1.3) on white [background], (photo:0)"


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_embeddings_are_scaled_to_the_mean_they_had(tiny_model: Path, tiny_bundle: Path, clip_skip: int) -> None:
    """Against transformers, the weights applied in float64 by hand."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    model: Any = CLIPTextModel.from_pretrained(tiny_model / "text_encoder").eval()
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in FRAGMENTS:
        found = tokenizer(text, add_special_tokens=False).input_ids
        ids, weights = ids + found, weights + [weight] * len(found)
    length = tokenizer.model_max_length
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - len(ids) - 1)
    weights += [1.0] * (length - len(weights))
    with torch.inference_mode():
        made = model(torch.tensor([ids]), output_hidden_states=True)
        layer = made.hidden_states[-1 - clip_skip]
        states = (model.text_model if hasattr(model, "text_model") else model).final_layer_norm(layer)[0].double()
    expected = states * torch.tensor(weights, dtype=torch.float64)[:, None]
    expected *= states.mean() / expected.mean()

    pipe = Pipeline.from_bundle(tiny_bundle)
    job = resolve(Request(prompt=PROMPT, emphasis=True, clip_skip=clip_skip, seed=0), pipe.defaults)
    ((cond, _),) = pipe._prompts.embed(job, pipe._prompts.tokenize(job), Given())
    # float32 engines against float32 modules; the mean of many states of both signs is small, which magnifies what they differ by.
    assert float((cond.states.double() - expected).norm() / expected.norm()) < 1e-4
    job = resolve(Request(prompt=PROMPT, clip_skip=clip_skip, seed=0), pipe.defaults)
    ((cond, _),) = pipe._prompts.embed(job, pipe._prompts.tokenize(job), Given())
    assert float((cond.states.double() - expected).norm() / expected.norm()) > 0.05


def test_weights_lie_where_their_tokens_are(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_model / "tokenizer")
    fragments = parse("a (" + "red circle, " * 50 + ":1.3) b")
    windows = tokenizer.windows(fragments)
    assert len(windows.ids) > 1
    assert windows.weights.shape == windows.ids.shape
    assert (windows.weights[:, 0] == 1).all()
    count = sum(len(tokenizer.encode(fragment.text)) for fragment in fragments if fragment.weight != 1)
    assert np.count_nonzero(windows.weights != 1) == count
    cut = tokenizer.windows(fragments, 1)
    assert cut.dropped.endswith("red circle,  b")
    assert np.array_equal(tokenizer.windows(parse("a red circle")).ids, tokenizer.windows("a red circle").ids)


def test_pictures_without_brackets_are_the_same(tiny_bundle: Path) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    without, with_it = (pipe("a red: circle", "blue", emphasis=on, **arguments).latents for on in (False, True))
    assert torch.equal(without, with_it)
    assert not torch.equal(pipe("a (red: circle)", "blue", emphasis=True, **arguments).latents, with_it)
