"""Routing and floating-point operations of the shapes that are measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.shapes import SHAPES, Shape, route


@pytest.mark.parametrize("routing", ["balanced", "zipf", "hot", "one", "empty", "drops"])
def test_a_token_goes_to_different_experts(routing: str) -> None:
    shape = Shape("many tokens", 4000, 8, 8, 16, 2)
    ids_TK = route(shape, routing, torch.Generator().manual_seed(0))
    assert ids_TK.shape == (4000, 2)
    kept_TK = ids_TK < 16
    assert bool(((ids_TK[:, 0] != ids_TK[:, 1]) | ~kept_TK.all(-1)).all())
    counts_E = torch.bincount(ids_TK.flatten(), minlength=17)
    assert counts_E.sum() == 8000
    share = float(counts_E[:16].max() / 500)
    low, high = {"balanced": (1, 1.2), "zipf": (2.5, 8), "hot": (3.8, 4.2), "one": (8, 8)}.get(routing, (0, 3))
    assert low <= share <= high
    assert (counts_E[16] > 0) == (routing == "drops")
    if routing == "empty":
        assert not counts_E[1:16:2].any()


def test_flops_are_those_of_the_products() -> None:
    assert SHAPES["B"].flops_forward == 6 * 32768 * 8 * 2048 * 1024
    assert SHAPES["D"].flops_forward == 4 * 32768 * 768 * 3072
