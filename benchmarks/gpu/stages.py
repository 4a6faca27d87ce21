"""What the GPU can do at most, and how near to it each kernel of the layer comes.

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
from swiftmoe_lightning.ops import activate, backend, combine, permute, sort_choices

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
    key_N = case.ids.flatten()
    order = sort_choices(key_N, shape.experts)
    rows_TK = order.row_N.view(case.ids.shape)
    y_RD = torch.randn(len(key_N), shape.dim, device=clock.device, dtype=torch.bfloat16)
    z_RO = torch.randn(len(key_N), up_weight(case.weights).shape[1], device=clock.device, dtype=torch.bfloat16)
    a_RF = activate(z_RO, shape.activation)
    rows, tokens = y_RD.nbytes + 4 * len(key_N), case.x.nbytes + 4 * len(key_N)
    return {
        "sort_choices": (lambda: sort_choices(key_N, shape.experts), (8 + 4 + 4) * len(key_N)),
        "permute": (lambda: permute(case.x, order.choice_N, rows_TK), rows + tokens),
        "combine": (lambda: combine(y_RD, case.scores, order.choice_N, rows_TK), rows + tokens),
        "activate": (lambda: activate(z_RO, shape.activation), z_RO.nbytes + a_RF.nbytes),
        "activate, backward": (
            lambda: activation.activate_backward(a_RF, z_RO, shape.activation),
            2 * z_RO.nbytes + a_RF.nbytes,
        ),
    }


def _products(shape: Shape, clock: Clock) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (call, floating-point operations): our kernels, and torch's grouped product on rows that lie sorted."""
    from swiftmoe_lightning.ops.triton import gemm_forward, grad_hidden, grad_weight, tiles

    case = make_case(shape, "balanced", clock.device, torch.bfloat16)
    first, second = up_weight(case.weights), case.weights["down_proj"]
    order = sort_choices(case.ids.flatten(), shape.experts)
    choice_R, ends_s, num_rows = order.choice_N, order.ends_G, case.ids.numel()
    chosen = tiles.choose_tiles(case.x, num_rows, shape.experts)
    rows = tiles.map_rows(choice_R, shape.top_k, ends_s, num_rows, chosen)
    x_RD = permute(case.x, choice_R, order.row_N.view(case.ids.shape))
    z_RO, a_RF = gemm_forward.up(case.x, first, None, rows, shape.activation, True)
    assert z_RO is not None

    def hidden_gradient() -> tuple[Tensor, Tensor, Tensor | None]:
        return grad_hidden.hidden_gradient(case.grad, case.scores, second, z_RO, rows, shape.activation)

    dz_RO = hidden_gradient()[0]
    up, down = (2 * num_rows * weight[0].numel() for weight in (first, second))
    ours: dict[str, tuple[Callable[[], object], int]] = {
        "up": (lambda: gemm_forward.up(case.x, first, None, rows, shape.activation, True), up),
        "down": (lambda: gemm_forward.grouped_product(a_RF, second, None, rows, chosen.down), down),
        "dz": (hidden_gradient, down),
        "dx": (lambda: gemm_forward.grouped_product(dz_RO, first, None, rows, chosen.grad_rows, transposed=True), up),
        "dW up": (lambda: grad_weight.weight_gradient(dz_RO, case.x, rows, gathered="right"), up),
        "dW down": (lambda: grad_weight.weight_gradient(case.grad, a_RF, rows, gathered="left"), down),
    }
    torchs: dict[str, tuple[Callable[[], object], int]] = {
        "grouped_mm, up": (lambda: F.grouped_mm(x_RD, first.transpose(1, 2), offs=ends_s), up),
        "grouped_mm, down": (lambda: F.grouped_mm(a_RF, second.transpose(1, 2), offs=ends_s), down),
        "grouped_mm, dx": (lambda: F.grouped_mm(dz_RO, first, offs=ends_s), up),
        "grouped_mm, dW up": (lambda: F.grouped_mm(dz_RO.T, x_RD, offs=ends_s), up),
    }
    return ours | torchs
