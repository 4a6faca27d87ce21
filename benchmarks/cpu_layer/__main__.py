"""Milliseconds of an experts module on a CPU: `experts_implementation="swiftmoe"` against transformers' "grouped_mm".

One Qwen3-MoE experts module, one routing, one thread: forward and backward, the two implementations alternately.
`ratio` is our milliseconds over theirs: below 1 we are faster. `relative_difference` is the norm of the difference of
both outputs over the norm of theirs. Writes benchmarks/results/NAME.json, and prints a line for each size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.common.command_line import command_line
from benchmarks.common.interleaved import interleaved
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.common.spread import paired_ratio, spread
from swiftmoe_lightning import register_hf_experts

_WARM_UP: Final = 8


@dataclass(frozen=True)
class Shape:
    """One experts module and its batch of tokens. dtype: a name in torch."""

    tokens: int
    dim: int
    hidden_dim: int
    experts: int
    top_k: int
    dtype: str = "float32"


SHAPES: Final = (
    Shape(512, 256, 128, 16, 2),
    Shape(2048, 256, 256, 16, 4),
    Shape(512, 256, 128, 64, 8),
    Shape(1024, 256, 128, 16, 2, "bfloat16"),
)


def build(shape: Shape) -> nn.Module:
    """Qwen3-MoE's experts, weights from N(0, 0.02)."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.hidden_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    experts: nn.Module = Qwen3MoeExperts(config).to(getattr(torch, shape.dtype))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def step(experts: Any, implementation: str, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, Tensor]:
    """Milliseconds of one forward and backward, and its output."""
    experts.config._experts_implementation = implementation
    start = time.perf_counter()
    out: Tensor = experts(*inputs)
    out.square().sum().backward()
    seconds = time.perf_counter() - start
    experts.zero_grad()
    inputs[0].grad = None
    return 1e3 * seconds, out.detach()


def measure(shape: Shape, pairs: int) -> dict[str, Any]:
    """Milliseconds of both, and the ratio of ours to theirs."""
    experts, dtype = build(shape), getattr(torch, shape.dtype)
    x_TD = torch.randn(shape.tokens, shape.dim, dtype=dtype).requires_grad_()
    ids_TK = torch.rand(shape.tokens, shape.experts).topk(shape.top_k).indices
    inputs = (x_TD, ids_TK, torch.rand(shape.tokens, shape.top_k, dtype=dtype))
    (_, ours), (_, theirs) = (step(experts, name, inputs) for name in ("swiftmoe", "grouped_mm"))
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert difference < (1e-2 if dtype == torch.bfloat16 else 1e-5), difference
    ours_ms, theirs_ms = interleaved(
        lambda: step(experts, "swiftmoe", inputs)[0], lambda: step(experts, "grouped_mm", inputs)[0], pairs, _WARM_UP
    )
    return {
        **asdict(shape),
        "relative_difference": difference,
        "ms": {"swiftmoe": spread(ours_ms), "grouped_mm": spread(theirs_ms)},
        "ratio": paired_ratio(ours_ms, theirs_ms),
    }


def print_layer(layer: dict[str, Any]) -> None:
    """Print one line."""
    sizes = ", ".join(f"{name} {layer[name]}" for name in ("tokens", "dim", "hidden_dim", "experts", "top_k", "dtype"))
    ours, theirs = (layer["ms"][name]["median"] for name in ("swiftmoe", "grouped_mm"))
    ratio = "{median:.2f} ({low:.2f}..{high:.2f})".format(**layer["ratio"])
    print(f"{sizes}: swiftmoe {ours:.2f} ms, grouped_mm {theirs:.2f} ms, ratio {ratio}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("cpu_layer", __doc__)
    parser.add_argument("--pairs", type=int, default=60, help="of a ratio: two measurements of ours over two of theirs")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    provenance = collect_provenance()
    register_hf_experts()
    layers = []
    for shape in SHAPES:
        layers.append(measure(shape, arguments.pairs))
        print_layer(layers[-1])
    print(f"written to {write_result(arguments.name, provenance, {'layers': layers})}")


if __name__ == "__main__":
    main()
