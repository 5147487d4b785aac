"""Which denoiser a batch gets. What the batches make of each other: test_pipeline.py."""

from __future__ import annotations

import pytest
import torch

from ldmrt.denoisers import check_tokens
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BadRequest


def test_a_prompt_that_is_too_long_for_an_engine_of_fixed_shapes() -> None:
    class Step:
        def __init__(self, tokens: int | str) -> None:
            spec = TensorSpec("to_k", (2, tokens, 32), torch.float16)
            self.inputs = {"latents": TensorSpec("latents", (2, 4, 8, 8), torch.float16), "to_k": spec}

    check_tokens(Step("tokens"), 154)  # type: ignore[arg-type]
    check_tokens(Step(77), 77)  # type: ignore[arg-type]
    with pytest.raises(
        BadRequest, match=r'takes 154 tokens, and this engine is made for 77: shorten it, use long_prompt="cut"'
    ):
        check_tokens(Step(77), 154)  # type: ignore[arg-type]
