"""Models with random weights must train like real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tp2d_helpers.demo import SHAPES, VOCAB_SIZE, build_model

DEEP = {**SHAPES["demo"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24}


def test_gradients_of_a_sample_that_begins_with_the_end_of_text(tmp_path: Path) -> None:
    """Their norm is that of any other sample; with an embedding of zeros it would not be finite."""
    build_model(DEEP, tmp_path, dtype=torch.float32)
    model, norms = AutoModelForCausalLM.from_pretrained(tmp_path), []
    ids = torch.randint(VOCAB_SIZE - 1, (1, 32), generator=torch.Generator().manual_seed(0))
    for first in (VOCAB_SIZE - 1, 5):
        ids[0, 0] = first
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item())
    assert norms[0] == pytest.approx(norms[1], rel=0.5)
