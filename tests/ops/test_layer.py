"""The whole layer, by fused kernels and by single operations: one result, whichever path is taken.

T tokens, K top-k, D model dim, F hidden dim, s slots.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from swiftmoe_lightning.ops import backend, expert_layer, expert_rows, fused, moe_layer, sort_choices
from tests.ops.cases import DEVICE, assert_close, gradients, leaves, loop_mlp, make_weights


def values(num_tokens, top_k, num_slots, activation, bias, dtype=torch.float32):
    """(floating inputs by name, ids [T, K] of which one in seven is unassigned)."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.randint(num_slots, (num_tokens, top_k), generator=generator, device="cpu")
    ids_TK.view(-1)[3::7] = num_slots
    inputs = {"x": torch.randn(num_tokens, 16, generator=generator, device="cpu")}
    inputs |= {"scores": torch.rand(num_tokens, top_k, generator=generator, device="cpu")}
    inputs |= make_weights(num_slots, 16, 8, activation, bias, dtype)
    return {name: value.to(DEVICE, dtype) for name, value in inputs.items()}, ids_TK.to(DEVICE)


def run_layer(inputs, ids_TK, num_slots, activation):
    order = sort_choices(ids_TK.flatten(), num_slots)
    weights = {name: value for name, value in inputs.items() if name not in ("x", "scores")}
    rows_TK = order.row_N.view(ids_TK.shape)
    return expert_layer(inputs["x"], inputs["scores"], order.choice_N, rows_TK, order.ends_G, weights, activation)


def loop_layer(inputs, ids_TK, num_slots, activation):
    """Choice by choice."""
    out = torch.zeros_like(inputs["x"])
    for t, k in torch.cartesian_prod(*map(torch.arange, ids_TK.shape)).tolist():
        if int(ids_TK[t, k]) < num_slots:
            row = loop_mlp(inputs["x"][t : t + 1], inputs, [int(ids_TK[t, k])], activation)
            out = out + torch.zeros_like(out).index_put((torch.tensor([t]),), inputs["scores"][t, k] * row)
    return out


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True)])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_layer_and_its_gradients_equal_a_loop_over_choices(name, activation, bias):
    if name == "triton":
        pytest.importorskip("triton")
    inputs, ids_TK = values(9, 2, 3, activation, bias)
    slow = leaves({key: value.cpu() for key, value in inputs.items()}, torch.float64)
    expected = loop_layer(slow, ids_TK.cpu(), 3, activation)
    fast = leaves(inputs)
    with backend.force_backend(name):
        out = run_layer(fast, ids_TK, 3, activation)
        found = gradients(out, fast)
    assert_close(out.cpu(), expected)
    for key, gradient in gradients(expected, slow).items():
        assert_close(found[key].cpu(), gradient)


def test_rows_come_by_slot_and_those_that_are_unassigned_are_left_out_on_a_cpu():
    inputs, ids_TK = values(9, 2, 3, "swiglu", False)
    order = sort_choices(ids_TK.flatten(), 3)
    weights = {name: value for name, value in inputs.items() if name not in ("x", "scores")}
    with backend.force_backend("torch"):
        y_RD = expert_rows(inputs["x"], order.choice_N, order.row_N.view(9, 2), order.ends_G, weights, "swiglu")
    choices = order.choice_N[: int(order.ends_G[-1])].tolist()
    assert len(y_RD) == len(choices) if DEVICE == "cpu" else 18
    for row, choice in enumerate(choices):
        slot = int(ids_TK.view(-1)[choice])
        expected = loop_mlp(
            inputs["x"][choice // 2 : choice // 2 + 1].double(), leaves(weights, torch.float64), [slot], "swiglu"
        )
        assert_close(y_RD[row : row + 1], expected)


def fuses(inputs, **changed):
    """Whether the layer would take the fused kernels for these weights."""
    weights = {name: value for name, value in inputs.items() if name not in ("x", "scores")} | changed
    with backend.force_backend("triton"):
        return moe_layer._fuses(inputs["x"], weights, 18, 2)


def test_transposed_views_and_other_dtypes_are_not_fused():
    inputs, _ = values(9, 2, 3, "swiglu", False)
    assert fuses(inputs)
    assert not fuses(inputs, down_proj=inputs["down_proj"].transpose(1, 2).contiguous().transpose(1, 2))
    assert not fuses(inputs, down_proj=inputs["down_proj"].bfloat16())


@pytest.mark.parametrize(
    ("dtype", "rows_per_slot", "hidden_dim", "top_k", "expected"),
    [
        (torch.bfloat16, 512, 1024, 8, "triton"),
        (torch.bfloat16, 2048, 14336, 2, "torch"),
        (torch.bfloat16, 4096, 1024, 2, "torch"),
        (torch.bfloat16, 4096, 1024, 8, "triton"),
        (torch.float32, 2048, 14336, 2, "triton"),
        (torch.float64, 512, 1024, 8, "torch"),
    ],
)
def test_a_small_table_picks_the_layers_path_on_a_gpu(dtype, rows_per_slot, hidden_dim, top_k, expected):
    gpu = backend.Backend("triton", "Triton kernels on a test.")
    with mock.patch.object(backend, "_backend_on", return_value=gpu):
        found = backend.choose_layer(torch.device("cuda"), dtype, rows_per_slot, hidden_dim, top_k)
    assert found.name == expected
    assert found.reason.endswith(".")


def fused_arguments(bias):
    inputs, ids_TK = values(5, 2, 3, "swiglu", bias)
    # Without unassigned rows, for which Z is left as it lies in memory: two calls are compared bit by bit.
    ids_TK = ids_TK.clamp(max=2)
    order = sort_choices(ids_TK.flatten(), 3)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    weights = [inputs[name].requires_grad_() if name in inputs else None for name in names]
    x, scores = inputs["x"].requires_grad_(), inputs["scores"].requires_grad_()
    return (x, scores, order.choice_N, order.row_N.view(5, 2), order.ends_G, *weights, "swiglu", True)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_operators_keep_torchs_contract(bias):
    pytest.importorskip("triton")
    arguments = fused_arguments(bias)
    torch.library.opcheck(torch.ops.swiftmoe.fused_mlp.default, arguments)
    x, scores, *routing, first, first_bias, second, second_bias = [
        t if t is None else t.detach() for t in arguments[:9]
    ]
    with torch.no_grad():
        out, z_RO = torch.ops.swiftmoe.fused_mlp(*arguments)
    down = (torch.ones_like(out), scores, *routing, second, second_bias, z_RO, "swiglu", [True, False, bias])
    torch.library.opcheck(torch.ops.swiftmoe.fused_down_backward.default, down)
    up = (torch.ones_like(z_RO), x, *routing, first, first_bias, [True, True, bias])
    torch.library.opcheck(torch.ops.swiftmoe.fused_up_backward.default, up)


def test_backward_lets_go_of_z_before_the_inputs_gradient_comes_unless_the_graph_is_kept(monkeypatch):
    pytest.importorskip("triton")
    arguments = fused_arguments(bias=False)
    inputs = [t for t in arguments[:9] if t is not None and t.requires_grad]
    out, z_RO = torch.ops.swiftmoe.fused_mlp(*arguments)
    z, up_backward, is_gone = StorageWeakRef(z_RO.untyped_storage()), fused._up_backward, []
    del z_RO
    monkeypatch.setattr(fused, "_up_backward", lambda *args: is_gone.append(z.expired()) or up_backward(*args))
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(out.sum(), inputs)
    assert is_gone == [False, True]
    for found, wanted in zip(again, first, strict=True):
        assert torch.equal(found, wanted)


def test_the_fused_layer_compiles_in_one_graph_and_refuses_a_second_derivative():
    pytest.importorskip("triton")
    inputs, ids_TK = values(9, 2, 3, "swiglu", False)
    with backend.force_backend("triton"):
        eager, compiled = leaves(inputs), leaves(inputs)
        expected = run_layer(eager, ids_TK, 3, "swiglu")
        layer_graph = torch.compile(run_layer, backend="aot_eager", fullgraph=True)
        found = layer_graph(compiled, ids_TK, 3, "swiglu")
        assert torch.equal(found, expected)
        wanted, got = gradients(expected, eager), gradients(found, compiled)
        assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())
        (first,) = torch.autograd.grad(run_layer(eager, ids_TK, 3, "swiglu").sum(), [eager["x"]], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()
