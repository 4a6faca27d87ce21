"""Errors against float64: of every tile configuration that ships, and of whole layers as they are timed.

T tokens, D model dim, F hidden dim, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.candidates import candidates, on_triton, ours_fused, ours_grouped
from benchmarks.gpu.shapes import Case, Shape, activated, make_case

# Norm of the error over the norm of the result, for every output and gradient.
TOLERANCE: Final = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5, "tf32": 3e-3}
# Triton's interpreter cuts bfloat16 off instead of rounding it.
INTERPRETED_TOLERANCE: Final = TOLERANCE | {"bfloat16": 2e-2}


@dataclass(frozen=True)
class Check:
    """One run of our layer against float64.

    Attributes:
        tiles: the name in `ops.triton.tiles` that must be chosen, or "" for the layer around `F.grouped_mm`.
        dtype: "tf32" is float32 under `torch.set_float32_matmul_precision("high")`.
    """

    tiles: str
    dtype: str
    shape: Shape
    routing: str


def checks(tiny: bool) -> list[Check]:
    """All checks; if tiny, on sizes for Triton's interpreter."""
    # Features that no tile divides, more rows than a tile, slots that end within one; few rows a slot, and many.
    few = Shape("few rows", *((40, 40, 24, 5, 2) if tiny else (300, 392, 200, 12, 3)))
    many = Shape("many rows", *((100, 40, 24, 2, 2) if tiny else (1111, 392, 200, 5, 3)))
    odd = Shape("odd features", *((21, 33, 17, 3, 2) if tiny else (257, 301, 65, 7, 2)))
    every = []
    for tiles, dtype, shape in (
        ("HALF_MANY", "bfloat16", many),
        ("HALF_FEW", "bfloat16", few),
        ("HALF_MANY", "float16", many),
        ("HALF_FEW", "float16", odd),
        ("HALF_FEW", "bfloat16", odd),
        ("SINGLE", "float32", odd),
        ("TENSOR_FLOAT", "tf32", few),
    ):
        for activation in ("swiglu", "gelu", "relu2"):
            activated_shape = replace(shape, activation=activation)
            routings = ("zipf", "drops", "empty", "one") if activation == "swiglu" else ("drops",)
            if tiny:
                routings = ("drops", "one") if activation == "swiglu" else ("empty",) if tiles == "HALF_FEW" else ()
            every += [Check(tiles, dtype, activated_shape, routing) for routing in routings]
    every += [Check("", "bfloat16", shape, routing) for shape in (few, many) for routing in ("drops", "empty", "one")]
    return every


def run_checks(group: Iterable[Check], device: str) -> list[dict[str, Any]]:
    """`run_check` of each."""
    return [run_check(check, device) for check in group]


def run_check(check: Check, device: str) -> dict[str, Any]:
    """JSON-able: the check, "errors" of each output and gradient, whether two runs gave the "same_bits", "passed"."""
    failed = asdict(check) | {"passed": False}
    dtype = torch.float32 if check.dtype == "tf32" else getattr(torch, check.dtype)
    run = on_triton(ours_fused) if check.tiles else ours_grouped
    try:
        with _precision("high" if check.dtype == "tf32" else "highest"):
            if check.tiles and (chosen := _tiles_of(check.shape, dtype, device)) != check.tiles:
                return failed | {"error": f"the kernels choose {chosen} for this"}
            case = make_case(check.shape, check.routing, device, dtype)
            first, second = (outputs_and_gradients(case, run, case.weights) for _ in range(2))
        errors = errors_of(first, reference(case, range(check.shape.experts)))
    except Exception as error:  # a kernel that does not compile is a failed check
        return failed | {"error": f"{type(error).__name__}: {str(error)[:500]}", "lost_gpu": lost_gpu(device)}
    same_bits = all(torch.equal(first[name], second[name]) for name in first)
    tolerance = (INTERPRETED_TOLERANCE if device == "cpu" else TOLERANCE)[check.dtype]
    is_close = all(error <= tolerance for error in errors.values())
    return failed | {"errors": errors, "same_bits": same_bits, "passed": same_bits and is_close}


def lost_gpu(device: str) -> bool:
    """Whether an error before left this process without its GPU, as a read out of bounds does, whatever it said."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def warm_up(shape: Shape, names: Collection[str], device: str = "cuda") -> None:
    """Compile on a GPU, into caches on disk, what `names` need for a layer of this shape, with as few rows and experts
    as take the same kernels. Candidates that are not installed, or refuse the shape, are passed over."""
    # Triton specializes on whether a number is a multiple of 16, so that stays as in the full shape.
    experts = 16 if shape.experts % 16 == 0 else 8
    few = shape.tokens * shape.top_k < 96 * shape.experts
    tokens = (1024 if few else 2048) // shape.top_k
    small = replace(shape, experts=experts, tokens=tokens)
    if (chosen := _tiles_of(small, torch.bfloat16, device)) != _tiles_of(shape, torch.bfloat16, device):
        raise ValueError(f"the small shape takes other tiles: {chosen}")
    case = make_case(small, "balanced", device, torch.bfloat16)
    for name, candidate in candidates()[0].items():
        if name in names and candidate.refuses(shape) is None:
            weights = candidate.prepare(case.weights)
            outputs_and_gradients(case, candidate.run, weights, candidate.restore)
    if device != "cpu":
        torch.cuda.synchronize()


def _tiles_of(shape: Shape, dtype: torch.dtype, device: str) -> str:
    from swiftmoe_lightning.ops.triton.fused import tiles

    chosen = tiles.choose_tiles(torch.empty(0, dtype=dtype, device=device), shape.tokens * shape.top_k, shape.experts)
    names = ("HALF_MANY", "HALF_FEW", "SINGLE", "TENSOR_FLOAT")
    return next(name for name in names if getattr(tiles, name) is chosen)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def outputs_and_gradients(
    case: Case, run: Callable[..., Tensor], weights: dict[str, Tensor], restore: Callable[..., Any] = dict
) -> dict[str, Tensor]:
    """ "out", and the gradients of "x", "scores" and each weight."""
    leaves = {"x": case.x, "scores": case.scores} | weights
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    out = run(case.shape, leaves["x"], case.ids, leaves["scores"], {name: leaves[name] for name in weights})
    grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), case.grad), strict=True))
    weight_grads = restore({name: grads[name] for name in weights})
    return {"out": out.detach(), "x": grads["x"], "scores": grads["scores"]} | weight_grads


def reference(case: Case, kept_experts: Collection[int]) -> dict[str, Tensor]:
    """The same in float64, expert by expert, by autograd.

    Weights' gradients [E', ...] of `kept_experts` alone: all of a large layer's would not fit.
    """
    names = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in case.weights]
    out_TD, dx_TD = (torch.zeros_like(case.x, dtype=torch.float64) for _ in range(2))
    dscores_TK = torch.zeros_like(case.scores, dtype=torch.float64)
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for expert in range(case.shape.experts):
        token, k = (case.ids == expert).nonzero(as_tuple=True)
        inputs = [case.x[token], case.scores[token, k], *(case.weights[name][expert] for name in names)]
        x, scores, *weights = inputs = [value.double().requires_grad_() for value in inputs]
        hidden = activated(x @ weights[0].T, case.shape.activation)
        y = (hidden @ weights[1].T) * scores.unsqueeze(-1)
        dx, dscores, *dweights = torch.autograd.grad(y, inputs, case.grad[token].double())
        # A token's K experts differ, so no two rows of one expert add to the same token.
        out_TD[token] += y.detach()
        dx_TD[token] += dx
        dscores_TK[token, k] = dscores
        if expert in kept_experts:
            for name, value in zip(names, dweights, strict=True):
                kept[name].append(value)
    return {"out": out_TD, "x": dx_TD, "scores": dscores_TK} | {n: torch.stack(v) for n, v in kept.items()}


def errors_of(
    actual: dict[str, Tensor], expected: dict[str, Tensor], kept_experts: Collection[int] | None = None
) -> dict[str, float]:
    """Name -> norm of the error over the norm of the result; nan where something is not finite."""
    errors = {}
    for name, right in expected.items():
        value = actual[name]
        if kept_experts is not None and name not in ("out", "x", "scores"):
            value = value[list(kept_experts)]
        norm = float(right.norm())
        errors[name] = float((value.double() - right).norm()) / (norm or 1.0)
    return errors
