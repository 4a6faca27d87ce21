"""`TopKRouter` on the fused kernel decides and learns as on torch's operations."""

from typing import Any

import pytest
import torch

import swiftmoe_lightning as sml
from swiftmoe_lightning.ops import backend
from tests.ops.cases import DEVICE


def decide(options: dict[str, Any], name: str) -> tuple[sml.RouterOutput, torch.Tensor, torch.Tensor]:
    """The decision, both losses of two ranks, and the weight's gradient."""
    torch.manual_seed(0)
    router = sml.TopKRouter(8, 6, 2, **options)
    torch.nn.init.normal_(router.weight)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 6))
    x_TD = torch.randn(37, 8).to(DEVICE)
    with backend.force_backend(name):
        out = router.to(DEVICE)(x_TD)
        popularity_E = torch.bincount(out.expert_ids_TK.flatten(), minlength=6)
        losses = [out.load_balancing_loss(popularity_E, 2), out.z_loss(torch.tensor(74.0, device=DEVICE), 2)]
        target_TK = torch.arange(74.0, device=DEVICE).view(37, 2)
        (losses[0] + 0.1 * losses[1] + 0.01 * (out.weights_TK * target_TK).sum()).backward()
    assert router.weight.grad is not None
    return out, torch.stack(losses).detach(), router.weight.grad


@pytest.mark.parametrize(
    "options", [{}, {"score": "sigmoid"}, {"bias_update_rate": 0.1}, {"renormalize": False}], ids=str
)
def test_the_kernel_decides_and_learns_as_torch_does(options: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    expected, losses, gradient = decide(options, "torch")
    actual, found_losses, found_gradient = decide(options, "triton")
    # Of one type on any device, and no [T, E] of shares was made.
    assert actual.probs_TE is expected.probs_TE is None
    assert torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(actual.weights_TK, expected.weights_TK)
    torch.testing.assert_close(found_losses, losses)
    torch.testing.assert_close(found_gradient, gradient)


def test_a_router_that_gives_no_shares_is_told_so_where_a_loss_wants_them() -> None:
    out = sml.RouterOutput(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="aux_loss_coef needs a RouterOutput with probs_TE or prob_sums_E"):
        out.load_balancing_loss(torch.tensor([3, 0, 0, 0]), 1)
