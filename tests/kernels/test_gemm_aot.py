"""Every tile in the table compiles for an H100 within its means, and its products run on the tensor cores.

T tokens, K top-k, D model dim, F hidden dim, s slots.
"""

import re
from functools import partial
from unittest import mock

import pytest
import torch

from swiftmoe_lightning.kernels import fused
from tests.kernels.aot import MAX_SHARED, compile_all, launched_by

pytest.importorskip("triton")

meta = partial(torch.empty, device="meta")
GEMMS = ("up_kernel", "grouped_kernel", "hidden_gradient_kernel", "weight_gradient_kernel")

# (T, K, D, F, s), activation, bias, dtype, what float32 is multiplied as. gelu needs the most registers, a size that
# no tile divides the most predicates.
CASES = [
    ((32768, 8, 2048, 1024, 64), "swiglu", False, torch.bfloat16, "highest"),
    ((32768, 8, 2056, 1000, 64), "swiglu", True, torch.float16, "highest"),
    ((32768, 1, 768, 3072, 16), "gelu", True, torch.bfloat16, "highest"),
    ((512, 8, 2048, 768, 128), "swiglu", True, torch.bfloat16, "highest"),
    ((512, 2, 768, 3072, 16), "gelu", True, torch.bfloat16, "highest"),
    ((4096, 2, 1024, 1024, 8), "swiglu", False, torch.float32, "highest"),
    ((4096, 2, 1024, 1024, 8), "swiglu", False, torch.float32, "high"),
]


def forward_and_backward(sizes, activation, bias, dtype):
    tokens, top_k, dim, hidden_dim, slots = sizes
    first, rows = ("gate_up_proj", 2 * hidden_dim) if activation == "swiglu" else ("up_proj", hidden_dim)
    shapes = {first: (rows, dim), "down_proj": (dim, hidden_dim)}
    if bias:
        shapes |= {f"{first}_bias": (rows,), "down_proj_bias": (dim,)}
    weights = {name: meta(slots, *shape, dtype=dtype) for name, shape in shapes.items()}
    first_bias, second_bias = weights.get(f"{first}_bias"), weights.get("down_proj_bias")
    x_TD, scores_TK = meta(tokens, dim, dtype=dtype), meta(tokens, top_k)
    routing = [meta(tokens * top_k), meta(tokens, top_k), meta(slots)]
    inputs = [x_TD, scores_TK, *(t.to(torch.int32) for t in routing)]
    # The operators' bodies: given a meta tensor, an operator runs its fake.
    forward, backward = fused._fused_mlp._init_fn, fused._fused_mlp_backward._init_fn
    out, z_RO = forward(*inputs, weights[first], first_bias, weights["down_proj"], second_bias, activation, True)
    saved = (*inputs, weights[first], weights["down_proj"], second_bias, z_RO)
    backward(torch.empty_like(out), *saved, activation, [True, True, True, bias, True, bias])


def all_builds():
    """What the cases launch, each once."""
    builds = {}
    for *call, precision in CASES:
        with mock.patch.object(torch, "get_float32_matmul_precision", lambda precision=precision: precision):
            for build in launched_by(partial(forward_and_backward, *call)):
                # Beside these two, no kernel knows which activation it is.
                if call[1] == "swiglu" or build.kernel.endswith((".up_kernel", ".hidden_gradient_kernel")):
                    builds[str(vars(build))] = build
    return list(builds.values())


def test_the_experts_fit_an_h100_without_spilling_and_use_its_tensor_cores():
    builds = all_builds()
    names = [build.kernel.rpartition(".")[2] for build in builds]
    assert set(GEMMS) < set(names)
    for name, build, report in zip(names, builds, compile_all(builds), strict=True):
        assert report.spills == 0, (str(build), report.spills)
        assert report.shared <= MAX_SHARED, (str(build), report.shared)
        if name in GEMMS and "*fp32" not in build.signature["p_weight" if "p_weight" in build.signature else "p_left"]:
            assert "wgmma.mma_async" in report.ptx, str(build)
            # Tiles go to shared memory 16 bytes at a time, past the registers.
            assert re.search(r"cp\.async\.c[ag]\.shared\.global.*0x10", report.ptx), str(build)
