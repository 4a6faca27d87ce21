"""The expert layer on a CPU: `experts_implementation="swiftmoe"` against transformers' own "grouped_mm".

One module, one routing, one thread; forward and backward, the two in turns. python -m benchmarks.bench_cpu_layer
"""

from __future__ import annotations

import time
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.provenance import birth_certificate, write_result
from benchmarks.spread import paired_ratio, spread
from swiftmoe_lightning import register_hf_experts

# tokens, model dim, hidden dim, experts, top-k, dtype
_CASES: Final = (
    (512, 256, 128, 16, 2, torch.float32),
    (2048, 256, 256, 16, 4, torch.float32),
    (512, 256, 128, 64, 8, torch.float32),
    (1024, 256, 128, 16, 2, torch.bfloat16),
)
_PAIRS: Final = 60


def build(dim: int, hidden_dim: int, num_experts: int, top_k: int, dtype: torch.dtype) -> nn.Module:
    """Qwen3-MoE's experts, weights from N(0, 0.02)."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=dim, moe_intermediate_size=hidden_dim, num_experts=num_experts, num_experts_per_tok=top_k
    )
    experts: nn.Module = Qwen3MoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def step(experts: Any, implementation: str, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, Tensor]:
    """Seconds of one forward and backward, and its output."""
    experts.config._experts_implementation = implementation
    start = time.perf_counter()
    out: Tensor = experts(*inputs)
    out.square().sum().backward()
    seconds = time.perf_counter() - start
    experts.zero_grad()
    inputs[0].grad = None
    return seconds, out.detach()


def measure(case: tuple[int, int, int, int, int, torch.dtype]) -> dict[str, Any]:
    """Milliseconds of both, and the ratio of ours to theirs."""
    num_tokens, dim, hidden_dim, num_experts, top_k, dtype = case
    experts = build(dim, hidden_dim, num_experts, top_k, dtype)
    x_TD = torch.randn(num_tokens, dim, dtype=dtype).requires_grad_()
    ids_TK = torch.rand(num_tokens, num_experts).topk(top_k).indices
    inputs = (x_TD, ids_TK, torch.rand(num_tokens, top_k, dtype=dtype))
    (_, ours), (_, theirs) = (step(experts, name, inputs) for name in ("swiftmoe", "grouped_mm"))
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), error
    seconds: dict[str, list[float]] = {"swiftmoe": [], "grouped_mm": []}
    for i in range(2 * _PAIRS + 8):
        order = ("swiftmoe", "grouped_mm") if i % 2 else ("grouped_mm", "swiftmoe")
        for name in order:
            seconds[name].append(step(experts, name, inputs)[0])
    kept = {name: [1e3 * s for s in values[8:]] for name, values in seconds.items()}
    names = ("tokens", "dim", "hidden_dim", "experts", "top_k")
    return {
        **dict(zip(names, case[:5], strict=True)),
        "dtype": str(dtype).removeprefix("torch."),
        "relative_difference": error,
        "ms": {name: spread(values) for name, values in kept.items()},
        "ratio": paired_ratio(kept["swiftmoe"], kept["grouped_mm"]),
    }


def main() -> None:
    torch.set_num_threads(1)
    certificate = birth_certificate()
    register_hf_experts()
    rows = []
    for case in _CASES:
        rows.append(measure(case))
        print({key: value for key, value in rows[-1].items() if key != "ms"})
    print(write_result("cpu_layer", certificate, {"layers": rows}))


if __name__ == "__main__":
    main()
