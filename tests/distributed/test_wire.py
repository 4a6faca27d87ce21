"""Rows arrive as they were, rounded once, wherever they go; their gradients in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup, packed_bytes
from tests.helpers import run_ranks

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16, torch.float64]
INF, NAN = float("inf"), float("nan")
DIM, RANKS = 7, 3
# Rows from each rank (outer) to each: rank 1 sends nothing, rank 2 gets nothing from others.
SPLITS = [[2, 1, 0], [0, 0, 0], [3, 0, 2]]


def rows_of(rank: int, dtype: torch.dtype) -> Tensor:
    """What a rank sends: a row that is not finite first, zeros last."""
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(sum(SPLITS[rank]), DIM, generator=generator, dtype=torch.float64).to(dtype)
    if len(rows):
        rows[0, 2], rows[0, 4], rows[-1] = INF, NAN, 0
    return rows


def rounded(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rounding, written without the package."""
    if dtype is None or (dtype == BF16 and rows.element_size() == 2):
        return rows
    if dtype == BF16:
        return rows.to(BF16).to(rows.dtype)
    largest = rows.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    return ((rows / scale).to(FP8).double() * scale).to(rows.dtype)


def exchange(dtype: torch.dtype, token_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, list[int]]:
    """What arrives, the gradient that comes back for one of many sizes, and the bytes to each rank, there and back."""
    group = RankGroup(dist.group.WORLD)
    rows = rows_of(group.rank, dtype).requires_grad_()
    arrived = group.exchange_rows(rows, SPLITS[group.rank], [splits[group.rank] for splits in SPLITS], token_dtype)
    sent = group.bytes_to_others_n.tolist()
    arrived.backward(torch.linspace(0.1, 1.1, arrived.numel()).view(arrived.shape).to(dtype))
    assert rows.grad is not None
    return arrived.detach(), rows.grad, sent + (group.bytes_to_others_n - sent).tolist()


def all_exchanges() -> list[list[tuple[Tensor, Tensor, list[int]]]]:
    return [[exchange(dtype, token_dtype) for token_dtype in (None, BF16, FP8)] for dtype in DTYPES]


def test_rows_and_gradients_are_rounded_wherever_they_go_and_bytes_are_the_formulas() -> None:
    ranks = run_ranks(all_exchanges, RANKS)
    for i, dtype in enumerate(DTYPES):
        for j, token_dtype in enumerate((None, BF16, FP8)):
            returned = None if token_dtype is None else BF16
            sent = [rounded(rows_of(rank, dtype), token_dtype).split(SPLITS[rank]) for rank in range(RANKS)]
            grads = [rank[i][j][0] for rank in ranks]
            grads = [torch.linspace(0.1, 1.1, g.numel()).view(g.shape).to(dtype) for g in grads]
            received = [[splits[rank] for splits in SPLITS] for rank in range(RANKS)]
            back = [rounded(grad, returned).split(r) for grad, r in zip(grads, received, strict=True)]
            for rank in range(RANKS):
                arrived, gradient, num_bytes = ranks[rank][i][j]
                expected = torch.cat([parts[rank] for parts in sent])
                if token_dtype == FP8:
                    # One number that is not finite makes its row nan.
                    expected[~expected.isfinite().all(1)] = NAN
                assert arrived.dtype == gradient.dtype == dtype
                torch.testing.assert_close(arrived, expected, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(gradient, torch.cat([parts[rank] for parts in back]))
                there, here = packed_bytes(DIM, dtype, token_dtype), packed_bytes(DIM, dtype, returned)
                others = [peer != rank for peer in range(RANKS)]
                assert num_bytes[:RANKS] == [n * there * o for n, o in zip(SPLITS[rank], others, strict=True)]
                assert num_bytes[RANKS:] == [n * here * o for n, o in zip(received[rank], others, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, [8, 2, 1]), (torch.float32, [4, 2, 1]), (BF16, [2, 2, 1]), (torch.float16, [2, 2, 1])],
)
def test_a_row_takes_the_bytes_of_its_numbers_and_of_its_scale(dtype: torch.dtype, expected: list[int]) -> None:
    as_is, half, fp8 = (100 * size for size in expected)
    assert [packed_bytes(100, dtype, d) for d in (None, BF16, FP8)] == [as_is, half, fp8 + 4]
