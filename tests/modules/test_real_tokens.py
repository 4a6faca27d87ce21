"""Padding takes no part in a block, and its output is zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import swiftmoe_lightning as sml

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
# Of the sequences 7, 3 and no tokens are real.
MASK = torch.arange(7) < torch.tensor([7, 3, 0]).unsqueeze(1)


def make(**options: Any) -> sml.MoE:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"aux_loss_coef": 0.5, "z_loss_coef": 0.1, "num_shared_experts": 1}
    return sml.MoE(6, 5, 4, 2, **defaults | options).double()


def train(moe: sml.MoE, *inputs: Tensor) -> tuple[Tensor, Tensor, list[int], list[Tensor]]:
    """Output, router losses, popularity, and gradients."""
    reader = sml.LoadReader(moe)
    out = moe(*inputs)
    loss = sml.auxiliary_loss(moe)
    (out.square().sum() + loss).backward()
    gradients = [p.grad for p in moe.parameters() if p.grad is not None]
    return out.detach(), loss.detach(), reader.read()["experts"].popularity_E.tolist(), gradients


@pytest.mark.parametrize("factor", [None, 0.6])
def test_a_block_computes_as_if_padding_were_not_there(factor: float | None) -> None:
    poisoned = X.masked_fill(~MASK.unsqueeze(-1), float("nan"))
    out, *rest = train(make(capacity_factor=factor), poisoned, MASK)
    expected, *expected_rest = train(make(capacity_factor=factor), X[MASK])
    assert torch.equal(out[MASK], expected)
    assert not out[~MASK].any()
    torch.testing.assert_close(rest, expected_rest, rtol=0, atol=0)


def test_a_mask_of_none_and_one_that_hides_all() -> None:
    moe = make()
    assert torch.equal(moe(X, torch.ones(3, 7, dtype=torch.bool)), moe(X))
    moe(X, torch.zeros(3, 7, dtype=torch.bool)).sum().backward()
    assert moe.router.weight.grad is not None
    assert not moe.router.weight.grad.any()
    assert moe(X[0, 0], torch.tensor(True)).shape == (6,)


def test_another_type_or_shape_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mask must be bool, true for tokens, got torch.int64. Pass mask.bool\(\)"):
        make()(X, MASK.long())
    with pytest.raises(ValueError, match=r"mask must have the tokens' shape, \[3, 7\], got \[7\]"):
        make()(X, MASK[0])
    with pytest.raises(ValueError, match=r"got \[3, 7, 1\]"):
        make()(X, MASK.unsqueeze(-1))
    with pytest.raises(
        ValueError, match=r"cluster_ids must have the sequences' shape, \[3\], or the tokens', \[3, 7\], got \[7\]"
    ):
        make()(X, cluster_ids=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_ids must have the tokens' shape, \[3, 7\], got \[21\]"):
        make()(X, token_ids=torch.zeros(21, dtype=torch.int64))


# torch.compile looks at `.grad` of what goes from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_block_takes_masks_with_different_numbers_of_tokens() -> None:
    moe = make()
    compiled = torch.compile(moe, backend="eager")
    for mask in (MASK, ~MASK):
        torch.testing.assert_close(compiled(X, mask), moe(X, mask), rtol=1e-12, atol=1e-14)
