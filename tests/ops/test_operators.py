"""What torch asks of an operator: its schema, fakes and gradients, compilation, checkpointing, refusals."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swiftmoe_lightning import ops
from swiftmoe_lightning.ops import activate, combine, permute, route, sort_assignments
from tests.ops.cases import DEVICE, assert_close

OPERATORS = torch.ops.swiftmoe


def floats(*shape, grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu").to(DEVICE).requires_grad_(grad)


ROWS = torch.tensor([3, 0, -1, 2], device=DEVICE), torch.tensor([[1, -1], [3, 0]], device=DEVICE)
ENDS = torch.tensor([1, 4], dtype=torch.int32, device=DEVICE)
LOGITS_IDS = floats(3, 5), torch.tensor([[0, 1], [4, 2], [3, 0]], device=DEVICE)
CALLS = {
    "sort": (torch.tensor([[2, 0], [5, 1]], device=DEVICE), 3),
    "regroup": (torch.tensor([[2, 0], [-1, 1]], dtype=torch.int32, device=DEVICE), ENDS - 1, ENDS * 0, 3),
    "quantize_rows": (floats(2, 3, grad=False),),
    "dequantize_rows": (torch.arange(14, dtype=torch.uint8, device=DEVICE).view(2, 7), torch.float16),
    "permute": (floats(2, 3), *ROWS),
    "gather_sum": (floats(4, 3), ROWS[1]),
    "combine": (floats(4, 3), floats(2, 2), *ROWS),
    "combine_backward": (floats(2, 3), floats(4, 3), floats(2, 2), *ROWS),
    "activate": (floats(3, 4), "swiglu"),
    "activate_backward": (floats(3, 2), floats(3, 4), "swiglu"),
    "grouped_linear": (floats(4, 8), floats(2, 4, 8), ENDS),
    "grouped_linear_backward": (floats(4, 4), floats(4, 8), floats(2, 4, 8), ENDS),
    "add_bias": (floats(5, 3), floats(2, 3), ENDS),
    "bias_gradient": (floats(5, 3), ENDS),
    "route": (LOGITS_IDS[0], floats(5, grad=False), 2, "sigmoid", True, LOGITS_IDS[1]),
    "route_backward": (floats(3, 2), floats(5), floats(1).sum().detach(), *LOGITS_IDS, "softmax", True),
}
BACKWARDS = [
    "gather_sum",
    "combine_backward",
    "activate_backward",
    "grouped_linear_backward",
    "bias_gradient",
    "route_backward",
]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("name", CALLS)
def test_every_operator_keeps_torchs_contract(name):
    if name in BACKWARDS:
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in CALLS[name]]
        torch.library.opcheck(getattr(OPERATORS, name).default, tuple(arguments))
    else:
        torch.library.opcheck(getattr(OPERATORS, name).default, CALLS[name])


def test_every_operator_is_checked():
    modules = [
        importlib.import_module(f"{ops.__name__}.{module.name}") for module in pkgutil.iter_modules(ops.__path__)
    ]
    names = {
        value._qualname.split("::")[1]
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }
    # The fused ones, which have no eager version, are checked beside the layer.
    assert names == CALLS.keys() | {"fused", "fused_down_backward", "fused_up_backward"}


def layer(x_TD, logits_TE, weight_DF, weight_FD):
    """An expert layer of one matrix for all experts."""
    routed = route(logits_TE, None, 2, "softmax", True)
    # Expert 3 is unassigned.
    by_expert = sort_assignments(routed.expert_ids_TK, 3)
    y_ND = activate(permute(x_TD, by_expert) @ weight_DF, "swiglu") @ weight_FD
    out_TD = combine(y_ND, routed.weights_TK, by_expert)
    return out_TD, routed.prob_sums_E.square().sum() + routed.square_sum


def run(function):
    inputs = (floats(5, 6), floats(5, 4), floats(6, 8), floats(4, 6))
    out_TD, loss = function(*inputs)
    (out_TD.square().sum() + loss).backward()
    return out_TD, loss, *(x.grad for x in inputs)


@pytest.mark.usefixtures("each_backend")
def test_a_layer_compiles_to_one_graph():
    for actual, expected in zip(
        run(torch.compile(layer, fullgraph=True, backend="aot_eager")), run(layer), strict=True
    ):
        assert_close(actual, expected)


@pytest.mark.usefixtures("each_backend")
def test_sizes_that_change_do_not_recompile_the_graph():
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens, stance in [(3, "default"), (7, "fail_on_recompile")]:
        inputs = (floats(num_tokens, 6), floats(num_tokens, 4), floats(6, 8), floats(4, 6))
        with torch.compiler.set_stance(stance):
            assert_close(compiled(*inputs)[0], layer(*inputs)[0])


@pytest.mark.usefixtures("each_backend")
def test_a_checkpointed_layer_has_the_same_bits():
    for actual, expected in zip(
        run(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)), run(layer), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, and TRITON_INTERPRET=0")
@pytest.mark.usefixtures("each_backend")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu():
    inputs = (floats(5, 6), floats(5, 4), floats(6, 8), floats(4, 6))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out_TD, loss = layer(*inputs)
            (out_TD.square().sum() + loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["permute", "combine", "activate", "grouped_linear", "route"])
def test_a_second_derivative_is_refused(name):
    out = getattr(OPERATORS, name)(*CALLS[name])
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), CALLS[name][0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*create_graph=True"):
        grad.sum().backward()
