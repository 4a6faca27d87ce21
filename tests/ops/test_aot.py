"""Every kernel, as it is launched for the sizes of real models, compiles for an H100 within its means."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from swiftmoe_lightning.ops import ACTIVATIONS
from swiftmoe_lightning.ops.triton import activation as activations
from swiftmoe_lightning.ops.triton import bias, permute, quantize, regroup, route, sort
from tests.ops.aot import MAX_SHARED, Build, compile_all, launched_by

# T tokens, D model dim, K top-k, dtype.
ROWS = [(32768, 2048, 8, torch.bfloat16), (4096, 768, 1, torch.float32), (8192, 4096, 6, torch.float16)]
# T tokens, E experts, K top-k.
ROUTERS = [(32768, 128, 8, "softmax"), (16384, 256, 8, "sigmoid"), (8192, 16, 1, "softmax"), (4096, 512, 10, "softmax")]

meta = partial(torch.empty, device="meta")


def row_builds() -> list[Build]:
    builds = []
    for tokens, dim, top_k, dtype in ROWS:
        x_TD, y_RD = meta(tokens, dim, dtype=dtype), meta(tokens * top_k, dim, dtype=dtype)
        assignment_R, rows_TK = meta(tokens * top_k, dtype=torch.int32), meta(tokens, top_k, dtype=torch.int32)
        weights_TK = meta(tokens, top_k)
        builds += launched_by(partial(permute.permute, x_TD, assignment_R, rows_TK))
        builds += launched_by(partial(permute.gather_sum, y_RD, rows_TK))
        builds += launched_by(partial(permute.gather_sum, y_RD, rows_TK, weights_TK))
        builds += launched_by(partial(permute.combine_backward, x_TD, y_RD, weights_TK, assignment_R, rows_TK))
    return builds


def activation_builds() -> list[Build]:
    builds = []
    for activation in ACTIVATIONS:
        z_RF = meta(2**18, 2048 if activation == "swiglu" else 1024, dtype=torch.bfloat16)
        builds += launched_by(partial(activations.activate, z_RF, activation))
        grad_RF = meta(2**18, 1024, dtype=torch.bfloat16)
        builds += launched_by(partial(activations.activate_backward, grad_RF, z_RF, activation))
    return builds


def bias_builds() -> list[Build]:
    builds = []
    for tokens, dim, top_k, dtype in ROWS:
        y_RO, ends_s = meta(tokens * top_k, dim, dtype=dtype), meta(64, dtype=torch.int32)
        slot_R = meta(tokens * top_k, dtype=torch.int32)
        builds += launched_by(partial(bias.add_bias, y_RO, meta(64, dim, dtype=dtype), slot_R))
        builds += launched_by(partial(bias.bias_gradient, y_RO, ends_s))
    return builds


def sort_builds() -> list[Build]:
    sizes = [(2**18, 128), (2**15, 16), (2**12, 64), (2**13, 1000)]
    return [b for n, groups in sizes for b in launched_by(partial(sort.sort, meta(n, 1).long(), groups))]


def regroup_builds() -> list[Build]:
    tables = [(num_segments, meta(num_segments, dtype=torch.int32)) for num_segments in (1, 512, 16_384)]
    return [
        b for _, t in tables for b in launched_by(partial(regroup.regroup, meta(2**15, 8, dtype=torch.int32), t, t, 9))
    ]


def quantize_builds() -> list[Build]:
    builds = []
    for rows, dim, _, dtype in ROWS:
        builds += launched_by(partial(quantize.quantize_rows, meta(rows, dim, dtype=dtype)))
        builds += launched_by(partial(quantize.dequantize_rows, meta(rows, dim + 4, dtype=torch.uint8), dtype))
    return builds


def router_builds() -> list[Build]:
    builds = []
    for tokens, experts, top_k, score in ROUTERS:
        logits_TE, bias_E = meta(tokens, experts), meta(experts) if score == "sigmoid" else None
        builds += launched_by(partial(route.route, logits_TE, bias_E, top_k, score, top_k > 1))
        grads = (meta(tokens, top_k), meta(experts), meta(()))
        ids_TK = meta(tokens, top_k, dtype=torch.int64)
        builds += launched_by(partial(route.route_backward, *grads, logits_TE, ids_TK, score, top_k > 1))
    return builds


@pytest.fixture(scope="module")
def reports():
    builds = row_builds() + activation_builds() + bias_builds() + sort_builds() + regroup_builds() + quantize_builds()
    builds += router_builds()
    # The router of 512 experts with all of it in one warp, which is too much.
    builds.append(replace(builds[-2], options={"num_warps": 1}))
    return list(zip(builds, compile_all(builds), strict=True))


def test_every_kernel_fits_an_h100_without_spilling(reports):
    for build, report in reports[:-1]:
        assert report.spills == 0, (str(build), report.spills)
        assert report.shared <= MAX_SHARED, (str(build), report.shared)


def test_a_kernel_that_needs_too_much_is_found(reports):
    assert reports[-1][1].spills > 0


def test_rows_and_activations_move_16_bytes_at_once(reports):
    moving = [(build, report) for build, report in reports if re.search(r"\.(permute|activation)\.", build.kernel)]
    assert len(moving) == len(row_builds()) + len(activation_builds())
    for build, report in moving:
        for access in ("ld.global", "st.global"):
            assert re.search(rf"{access}[.\w:]*\.v4\.b32", report.ptx), (str(build), access)
        # A value of 16 bits on its own.
        assert not re.search(r"(ld|st)\.global[.\w:]*\.b16", report.ptx), str(build)
