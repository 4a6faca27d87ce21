"""On one device the layer counts without waiting for the device, until its load is read."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import swiftmoe_lightning as sml
from swiftmoe_lightning.modules.load import LoadCursor, TrainedLoad
from swiftmoe_lightning.ops import backend
from swiftmoe_lightning.placement import Placement


def experts(**options: object) -> sml.Experts:
    torch.manual_seed(0)
    return sml.Experts(4, 8, 16, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 8), torch.randint(4, (6, 2)), torch.rand(6, 2)


def test_ids_of_other_ranks_experts_are_unassigned_and_not_counted() -> None:
    layer, (x, ids, weights) = experts(bias=True), batch()
    # Hugging Face marks them by -1, or by the number of experts.
    ids[0], ids[3, 1] = torch.tensor([4, -1]), 4
    reader = sml.LoadReader(layer)
    out = layer(x, ids, weights)
    out.sum().backward()
    assert torch.equal(out[0], torch.zeros(8))
    zeroed = weights.masked_fill((ids >= 4) | (ids < 0), 0.0)
    torch.testing.assert_close(out, layer(x, ids.clamp(0, 3), zeroed))
    assert reader.read()[""].popularity_E.tolist() == [int((ids == e).sum()) for e in range(4)]


def test_the_fused_layer_is_the_plain_one() -> None:
    pytest.importorskip("triton")
    layer, (x, ids, weights) = experts(), batch()
    actual = []
    for name in ("torch", "triton"):
        layer.zero_grad()
        x_TD = x.clone().requires_grad_()
        with backend.force_backend(name):
            out = layer(x_TD, ids, weights)
            out.square().sum().backward()
        actual.append([out.detach(), x_TD.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    for plain, fused in zip(*actual, strict=True):
        torch.testing.assert_close(fused, plain)


def test_forward_and_backward_never_read_what_the_device_counts() -> None:
    layer, (x, ids, weights) = experts(), batch()
    with mock.patch.object(TrainedLoad, "total", property(lambda self: pytest.fail("read"))):
        layer(x, ids, weights).sum().backward()
        layer(x, ids, weights).sum().backward()
    assert layer.trained_load.total.num_assignments == 24


def test_scores_that_were_not_finite_are_reported_when_the_load_is_read() -> None:
    load = TrainedLoad(Placement([0, 1], 2, 1))
    load.add_on_device(torch.tensor([3, 1]), torch.tensor(True))
    load.add_on_device(torch.tensor([0, 4]), torch.tensor(False))
    with pytest.raises(FloatingPointError, match="non-finite scores in an Experts layer"):
        _ = load.total


def test_counts_of_the_device_add_up() -> None:
    load = TrainedLoad(Placement([0, 1], 2, 1))
    cursor = LoadCursor(lambda: load)
    load.add_on_device(torch.tensor([3, 1], dtype=torch.int32), torch.tensor(True))
    load.add_on_device(torch.tensor([0, 4], dtype=torch.int32), torch.tensor(True))
    actual = cursor.read()
    assert actual.counts_WE.tolist() == [[3, 5]]
    assert (actual.load_W.tolist(), actual.num_dropped_tokens, actual.imbalance) == ([8], 0, 1.0)
