"""Biases added to rows by slot, on both backends, against a loop over rows."""

from __future__ import annotations

import pytest
import torch

from swiftmoe_lightning.ops.bias import add_bias, eager_add_bias, eager_bias_gradient, slots_of
from tests.ops.cases import DEVICE, assert_close

# Rows of each slot, and rows that are unassigned behind them.
COUNTS = [([2, 0, 3], 0), ([0, 0], 4), ([1], 2), ([0, 7, 0, 150], 1), ([0], 0)]


def test_literal_biases_and_sums() -> None:
    y_RO, bias_sO = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    ends_s = torch.tensor([1, 3], dtype=torch.int32)
    assert eager_add_bias(y_RO, bias_sO, ends_s).tolist() == [[11, 22], [33, 44], [35, 46]]
    assert eager_bias_gradient(y_RO, ends_s).tolist() == [[1, 2], [8, 10]]
    assert slots_of(ends_s, 4).tolist() == [0, 1, 1, 2]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 5, 96])
@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_rows_and_gradients_equal_a_loop(case, features, dtype) -> None:
    counts, unassigned = case
    generator = torch.Generator().manual_seed(sum(counts))
    num_rows = sum(counts) + unassigned
    y_RO, bias_sO, grad_RO = (
        torch.randn(n, features, generator=generator).to(DEVICE, dtype) for n in (num_rows, len(counts), num_rows)
    )
    ends_s = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    slot_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    # What unassigned rows hold reaches nobody. Memory may hold anything, also a nan that numpy warns of.
    signaling_nan = torch.tensor([0x7FA00000], dtype=torch.int32).view(torch.float32)
    y_RO[sum(counts) :], grad_RO[sum(counts) :] = signaling_nan.to(y_RO), float("inf")
    y_RO.requires_grad_()
    bias_sO.requires_grad_()
    out_RO = add_bias(y_RO, bias_sO, ends_s)
    out_RO.backward(grad_RO)
    expected_sO = torch.zeros(len(counts), features, dtype=torch.float64)
    for row, slot in enumerate(slot_R.tolist()):
        assert_close(out_RO[row].cpu(), y_RO[row].double().cpu() + bias_sO[slot].double().cpu())
        expected_sO[slot] += grad_RO[row].double().cpu()
    assert_close(bias_sO.grad.cpu(), expected_sO)
    assert torch.equal(y_RO.grad[: sum(counts)], grad_RO[: sum(counts)])
