"""Every tile in the table compiles for an H100 within its means, and its products run on the tensor cores.

T tokens, K top-k, D model dim, F hidden dim, s slots.
"""

import re
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch

from swiftmoe_lightning.ops import fused
from tests.ops.aot import MAX_SHARED, compile_all, launched_by

pytest.importorskip("triton")
launch = pytest.importorskip("swiftmoe_lightning.ops.triton.launch")

meta = partial(torch.empty, device="meta")
GEMMS = ("up_kernel", "grouped_kernel", "streamed_kernel", "hidden_gradient_kernel", "weight_gradient_kernel")

ASYNC_COPY = r"cp\.async\.bulk\.tensor|cp\.async\.c[ag]\.shared\.global.*0x10"

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
    forward, down, up = (op._init_fn for op in (fused._fused, fused._down_backward, fused._up_backward))
    second = (weights["down_proj"], second_bias)
    out, z_RO = forward(*inputs, weights[first], first_bias, *second, activation, True)
    down(torch.empty_like(out), *inputs[1:], *second, z_RO, activation, [True, True, bias])
    up(z_RO, x_TD, *inputs[2:], weights[first], first_bias, [True, True, bias])


def all_builds():
    """What the cases launch, each once, with the copy engine (TMA) and without."""
    builds = {}
    for (*call, precision), has_tma in product(CASES, (True, False)):
        with (
            mock.patch.object(torch, "get_float32_matmul_precision", lambda precision=precision: precision),
            mock.patch.object(launch, "_has_tma", lambda device, has_tma=has_tma: has_tma),
        ):
            for build in launched_by(partial(forward_and_backward, *call)):
                # Beside these two, no kernel knows which activation it is.
                if call[1] == "swiglu" or build.kernel.endswith((".up_kernel", ".hidden_gradient_kernel")):
                    builds[str(vars(build))] = build
    return list(builds.values())


@pytest.mark.nightly
def test_the_experts_fit_an_h100_without_spilling_and_use_its_tensor_cores():
    builds = all_builds()
    names = [build.kernel.rpartition(".")[2] for build in builds]
    assert set(GEMMS) < set(names)
    for name, build, report in zip(names, builds, compile_all(builds), strict=True):
        assert report.spills == 0, (str(build), report.spills)
        assert report.shared <= MAX_SHARED, (str(build), report.shared)
        if name in GEMMS and any("16" in kind for kind in build.signature.values()):
            assert "wgmma.mma_async" in report.ptx, str(build)
            # Tiles go to shared memory past the registers, whole or 16 bytes at a time.
            assert re.search(ASYNC_COPY, report.ptx), str(build)
