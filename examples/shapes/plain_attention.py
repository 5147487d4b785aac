"""Attention for training, out of separate products."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor


class PlainAttention:
    """A diffusers attention processor of two batched products and a softmax.

    The networks attend over 64 latents at most.  At that size the backward pass of torch's fused attention takes six times
    as long on a CPU, a third of a training step.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Attend from hidden_states (N, tokens, width) to encoder_hidden_states, or to itself without them.

        Raises:
            ValueError: a mask is given; the shapes model has none.
        """
        if attention_mask is not None:
            raise ValueError("an attention mask was given, which PlainAttention does not take")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:-1], attn.heads, -1).transpose(1, 2)

        query: Tensor = heads(attn.to_q(hidden_states)) * attn.scale
        weights = (query @ heads(attn.to_k(context)).transpose(-1, -2)).softmax(-1)
        mixed = (weights @ heads(attn.to_v(context))).transpose(1, 2).flatten(2)
        result: Tensor = attn.to_out[0](mixed)
        return result
