"""The throw-away head that makes the text encoder say what lies where."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import generator
from architecture import TEXT_WIDTH
from corpus import ROLES

CLASSES = (1 + len(generator.COLORS), 1 + len(generator.SHAPES), 1 + len(generator.SIZES))


class Reader(nn.Module):
    """Reads the background and each role's colour, shape and size off the hidden states.

    One learned query for the background and one for each role look over all tokens, so that
    "A right of B" and "B left of A" have to come to the same there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1 + len(ROLES), TEXT_WIDTH))
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, 4, batch_first=True)
        self.background = nn.Linear(TEXT_WIDTH, len(generator.COLORS))
        self.role = nn.Linear(TEXT_WIDTH, sum(CLASSES))

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Hidden states (N, 20, 128) to 16 logits (N, classes), in the order of the labels."""
        queries = self.queries.expand(len(hidden), -1, -1)
        seen, _ = self.attention(queries, hidden, hidden, need_weights=False)
        logits = [self.background(seen[:, 0])]
        for place in range(len(ROLES)):
            logits += self.role(seen[:, 1 + place]).split(CLASSES, dim=-1)
        return logits

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the 16 labels (N, 16)."""
        logits = self(hidden)
        found = [F.cross_entropy(logit.float(), labels[:, i]) for i, logit in enumerate(logits)]
        return torch.stack(found).mean()

    def accuracy(self, hidden: Tensor, labels: Tensor) -> float:
        """The share of captions with all 16 labels right."""
        guesses = torch.stack([logit.argmax(-1) for logit in self(hidden)], dim=1)
        return (guesses == labels).all(dim=1).float().mean().item()
