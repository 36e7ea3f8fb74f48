"""Random documents with what the readable truth says of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.near import relative_difference
from tests.support.random_models import Model, random_embeddings
from vllm_armt.core import Segmentation
from vllm_armt.executor.naive import State, recompute

NUDGES = 2
"""In how many directions: a quotient may happen not to change in one."""


def random_document(model: Model, length: int, segmentation: Segmentation) -> tuple[Tensor, Tensor, list[State]]:
    """Embeddings `[length, d]`, and what `recompute` says of them.

    Drawn again where a memory divides by so little that rounding errors become large.
    """
    while True:
        document = random_embeddings(model, length)
        outputs, states = recompute(model, document, segmentation)
        pairs = []
        for _ in range(NUDGES):
            nudged_outputs, nudged_states = recompute(model, document + 1e-6 * torch.randn_like(document), segmentation)
            pairs.append((outputs, nudged_outputs))
            for state, nudged_state in zip(states, nudged_states, strict=True):
                for left, nudged_left in zip(state, nudged_state, strict=True):
                    pairs += [(tensor, nudged_left[name]) for name, tensor in left.items()]
        if all(relative_difference(nudged, exact) < 2e-5 for exact, nudged in pairs):
            return document, outputs, states
