"""The GPU's ceilings (copy, cuBLAS), and the share of them that each kernel of the layer reaches.

T tokens, R = T * K rows, D model dim, F hidden dim, O features of the first matrix, s = E slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import Clock
from benchmarks.gpu.shapes import Shape, make_case, up_weight
from swiftmoe_lightning.ops import activate, backend, combine, permute, sort_assignments

_COPIED_ELEMENTS: Final = 2**29
_SQUARE: Final = 8192


def ceilings(clock: Clock, elements: int = _COPIED_ELEMENTS, square: int = _SQUARE) -> dict[str, Any]:
    """A copy's GB/s, read and written, and cuBLAS's TFLOP/s on square matrices; bfloat16, random."""
    source = torch.randn(elements, device=clock.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = clock.spread_of(lambda: target.copy_(source))
    left, right = (torch.randn(square, square, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = clock.spread_of(lambda: left @ right)
    return {
        "copy": _rate(copy_ms, num_bytes=4 * elements),
        "cublas": _rate(product_ms, flops=2 * square**3),
    }


def _rate(ms: dict[str, float], num_bytes: int = 0, flops: int = 0, copy: float | None = None) -> dict[str, Any]:
    """ms with "gb_per_s" of `num_bytes` and its share of the copy's, or with "tflops"."""
    if flops:
        return {"ms": ms, "tflops": flops / ms["median"] / 1e9}
    rate: dict[str, Any] = {"ms": ms, "gb_per_s": num_bytes / ms["median"] / 1e6}
    return rate if copy is None else rate | {"share_of_copy": rate["gb_per_s"] / copy}


def measure_stages(shape: Shape, clock: Clock, copy_gb_per_s: float | None) -> dict[str, Any]:
    """Stage -> its rate, each alone, on balanced random routing. Bytes are those that a stage cannot do without."""
    with backend.force_backend("triton"), torch.no_grad():
        memory = {
            name: _rate(clock.spread_of(call), num_bytes, copy=copy_gb_per_s)
            for name, (call, num_bytes) in _memory_stages(shape, clock).items()
        }
        products = {
            name: _rate(clock.spread_of(call), flops=flops) for name, (call, flops) in _products(shape, clock).items()
        }
    return memory | products


def _memory_stages(shape: Shape, clock: Clock) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (call, bytes)."""
    from swiftmoe_lightning.ops.triton import activation

    case = make_case(shape, "balanced", clock.device, torch.bfloat16)
    by_expert, num_rows = sort_assignments(case.ids, shape.experts), case.ids.numel()
    y_RD = torch.randn(num_rows, shape.dim, device=clock.device, dtype=torch.bfloat16)
    z_RO = torch.randn(num_rows, up_weight(case.weights).shape[1], device=clock.device, dtype=torch.bfloat16)
    a_RF = activate(z_RO, shape.activation)
    rows, tokens = y_RD.nbytes + 4 * num_rows, case.x.nbytes + 4 * num_rows
    return {
        "sort": (lambda: sort_assignments(case.ids, shape.experts), (8 + 4 + 4) * num_rows),
        "permute": (lambda: permute(case.x, by_expert), rows + tokens),
        "combine": (lambda: combine(y_RD, case.scores, by_expert), rows + tokens),
        "activate": (lambda: activate(z_RO, shape.activation), z_RO.nbytes + a_RF.nbytes),
        "activate, backward": (
            lambda: activation.activate_backward(a_RF, z_RO, shape.activation),
            2 * z_RO.nbytes + a_RF.nbytes,
        ),
    }


def _products(shape: Shape, clock: Clock) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (call, floating-point operations): our kernels, and torch's grouped product on rows that lie sorted."""
    from swiftmoe_lightning.ops.triton.fused.hidden_gradient import hidden_gradient
    from swiftmoe_lightning.ops.triton.fused.product import grouped_product
    from swiftmoe_lightning.ops.triton.fused.tiles import choose_tiles, cut_rows
    from swiftmoe_lightning.ops.triton.fused.up import up
    from swiftmoe_lightning.ops.triton.fused.weight_gradient import weight_gradient

    case = make_case(shape, "balanced", clock.device, torch.bfloat16)
    first, second = up_weight(case.weights), case.weights["down_proj"]
    by_expert, num_rows = sort_assignments(case.ids, shape.experts), case.ids.numel()
    ends_s, sizes = by_expert.ends_G, choose_tiles(case.x, num_rows, shape.experts)
    tiles = cut_rows(by_expert.assignment_R, shape.top_k, ends_s, sizes)
    x_RD = permute(case.x, by_expert)
    z_RO, a_RF = up(case.x, first, None, tiles, shape.activation, True)
    assert z_RO is not None

    def dz() -> tuple[Tensor, Tensor, Tensor | None]:
        return hidden_gradient(case.grad, case.scores, second, z_RO, tiles, shape.activation)

    dz_RO = dz()[0]
    of_first, of_second = (2 * num_rows * weight[0].numel() for weight in (first, second))
    ours: dict[str, tuple[Callable[[], object], int]] = {
        "up": (lambda: up(case.x, first, None, tiles, shape.activation, True), of_first),
        "down": (lambda: grouped_product(a_RF, second, None, tiles, sizes.down), of_second),
        "dz": (dz, of_second),
        "dx": (lambda: grouped_product(dz_RO, first, None, tiles, sizes.grad_rows, transposed=True), of_first),
        "dW up": (lambda: weight_gradient(dz_RO, case.x, tiles, gathered="right"), of_first),
        "dW down": (lambda: weight_gradient(case.grad, a_RF, tiles, gathered="left"), of_second),
    }
    torchs: dict[str, tuple[Callable[[], object], int]] = {
        "grouped_mm, up": (lambda: F.grouped_mm(x_RD, first.transpose(1, 2), offs=ends_s), of_first),
        "grouped_mm, down": (lambda: F.grouped_mm(a_RF, second.transpose(1, 2), offs=ends_s), of_second),
        "grouped_mm, dx": (lambda: F.grouped_mm(dz_RO, first, offs=ends_s), of_first),
        "grouped_mm, dW up": (lambda: F.grouped_mm(dz_RO.T, x_RD, offs=ends_s), of_first),
    }
    return ours | torchs
