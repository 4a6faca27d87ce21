"""The whole layer, by fused kernels and by single operations: one result, whichever backend runs.

T tokens, K top-k, D model dim, F hidden dim, s slots.
"""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from swiftmoe_lightning.ops import backend, expert_layer, expert_rows, fused, layer, sort_assignments
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
    weights = {name: value for name, value in inputs.items() if name not in ("x", "scores")}
    return expert_layer(inputs["x"], inputs["scores"], sort_assignments(ids_TK, num_slots), weights, activation)


def loop_layer(inputs, ids_TK, num_slots, activation):
    """Assignment by assignment."""
    out = torch.zeros_like(inputs["x"])
    for t, k in torch.cartesian_prod(*map(torch.arange, ids_TK.shape)).tolist():
        if int(ids_TK[t, k]) < num_slots:
            row = loop_mlp(inputs["x"][t : t + 1], inputs, [int(ids_TK[t, k])], activation)
            out = out + torch.zeros_like(out).index_put((torch.tensor([t]),), inputs["scores"][t, k] * row)
    return out


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True)])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_layer_and_its_gradients_equal_a_loop_over_assignments(name, activation, bias):
    if name == "triton":
        pytest.importorskip("triton")
    inputs, ids_TK = values(9, 2, 3, activation, bias)
    slow = leaves({key: value.cpu() for key, value in inputs.items()}, torch.float64)
    expected = loop_layer(slow, ids_TK.cpu(), 3, activation)
    fast = leaves(inputs)
    with backend.force_backend(name):
        out = run_layer(fast, ids_TK, 3, activation)
        actual = gradients(out, fast)
    assert_close(out.cpu(), expected)
    for key, gradient in gradients(expected, slow).items():
        assert_close(actual[key].cpu(), gradient)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_low_rank_adapter_equals_its_product_added_to_the_weights(name):
    if name == "triton":
        pytest.importorskip("triton")
    inputs, ids_TK = values(9, 2, 3, "swiglu", True)
    for key, rank in (("gate_up_proj", 4), ("down_proj", 1)):
        _, rows, columns = inputs[key].shape
        for factor, shape in (("A", (3, rank, columns)), ("B", (3, rows, rank))):
            inputs[f"{key}_lora_{factor}"] = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(
                DEVICE
            )
    slow = leaves({key: value.cpu() for key, value in inputs.items()}, torch.float64)
    merged = {key: slow[key] + slow[f"{key}_lora_B"] @ slow[f"{key}_lora_A"] for key in ("gate_up_proj", "down_proj")}
    expected = loop_layer(slow | merged, ids_TK.cpu(), 3, "swiglu")
    fast = leaves(inputs)
    with backend.force_backend(name):
        out = run_layer(fast, ids_TK, 3, "swiglu")
        actual = gradients(out, fast)
    assert_close(out.cpu(), expected)
    for key, gradient in gradients(expected, slow).items():
        assert_close(actual[key].cpu(), gradient)


def test_rows_come_by_slot_and_those_that_are_unassigned_are_left_out_on_a_cpu():
    inputs, ids_TK = values(9, 2, 3, "swiglu", False)
    by_slot = sort_assignments(ids_TK, 3)
    weights = {name: value for name, value in inputs.items() if name not in ("x", "scores")}
    with backend.force_backend("torch"):
        y_RD = expert_rows(inputs["x"], by_slot, weights, "swiglu")
    assignments = by_slot.assignment_R[: int(by_slot.ends_G[-1])].tolist()
    assert len(y_RD) == len(assignments) if DEVICE == "cpu" else 18
    for row, assignment in enumerate(assignments):
        slot, token = int(ids_TK.view(-1)[assignment]), assignment // 2
        x_1D = inputs["x"][token : token + 1].double()
        expected = loop_mlp(x_1D, leaves(weights, torch.float64), [slot], "swiglu")
        assert_close(y_RD[row : row + 1], expected)


def fuses(inputs, ids_TK, **changed):
    """Whether the layer would take the fused kernels for these weights."""
    weights = {name: value for name, value in inputs.items() if name not in ("x", "scores")} | changed
    with backend.force_backend("triton"):
        return layer._fuses(inputs["x"], sort_assignments(ids_TK, 3), weights)


def test_transposed_views_and_other_dtypes_are_not_fused():
    inputs, ids_TK = values(9, 2, 3, "swiglu", False)
    assert fuses(inputs, ids_TK)
    assert not fuses(inputs, ids_TK, down_proj=inputs["down_proj"].transpose(1, 2).contiguous().transpose(1, 2))
    assert not fuses(inputs, ids_TK, down_proj=inputs["down_proj"].bfloat16())


def fused_arguments(bias):
    inputs, ids_TK = values(5, 2, 3, "swiglu", bias)
    # Without unassigned rows, for which Z is left as it lies in memory: two calls are compared bit by bit.
    ids_TK = ids_TK.clamp(max=2)
    assignment_R, rows_TK, _, ends_s = sort_assignments(ids_TK, 3)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    weights = [inputs[name].requires_grad_() if name in inputs else None for name in names]
    x, scores = inputs["x"].requires_grad_(), inputs["scores"].requires_grad_()
    return (x, scores, assignment_R, rows_TK, ends_s, *weights, "swiglu", True)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_operators_keep_torchs_contract(bias):
    pytest.importorskip("triton")
    arguments = fused_arguments(bias)
    torch.library.opcheck(torch.ops.swiftmoe.fused.default, arguments)
    x, scores, *routing, first, first_bias, second, second_bias = [
        t if t is None else t.detach() for t in arguments[:9]
    ]
    with torch.no_grad():
        out, z_RO = torch.ops.swiftmoe.fused(*arguments)
    down = (torch.ones_like(out), scores, *routing, second, second_bias, z_RO, "swiglu", [True, False, bias])
    torch.library.opcheck(torch.ops.swiftmoe.fused_down_backward.default, down)
    up = (torch.ones_like(z_RO), x, *routing, first, first_bias, [True, True, bias])
    torch.library.opcheck(torch.ops.swiftmoe.fused_up_backward.default, up)


def test_backward_lets_go_of_z_before_the_inputs_gradient_comes_unless_the_graph_is_kept(monkeypatch):
    pytest.importorskip("triton")
    arguments = fused_arguments(bias=False)
    inputs = [t for t in arguments[:9] if t is not None and t.requires_grad]
    out, z_RO = torch.ops.swiftmoe.fused(*arguments)
    z, up_backward, is_gone = StorageWeakRef(z_RO.untyped_storage()), fused._up_backward, []
    del z_RO
    monkeypatch.setattr(fused, "_up_backward", lambda *args: is_gone.append(z.expired()) or up_backward(*args))
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(out.sum(), inputs)
    assert is_gone == [False, True]
    for actual, expected in zip(again, first, strict=True):
        assert torch.equal(actual, expected)


def test_the_fused_layer_compiles_in_one_graph_and_refuses_a_second_derivative():
    pytest.importorskip("triton")
    inputs, ids_TK = values(9, 2, 3, "swiglu", False)
    with backend.force_backend("triton"):
        eager, compiled = leaves(inputs), leaves(inputs)
        expected = run_layer(eager, ids_TK, 3, "swiglu")
        layer_graph = torch.compile(run_layer, backend="aot_eager", fullgraph=True)
        actual = layer_graph(compiled, ids_TK, 3, "swiglu")
        assert torch.equal(actual, expected)
        expected_grads, grads = gradients(expected, eager), gradients(actual, compiled)
        assert all(torch.equal(grads[name], gradient) for name, gradient in expected_grads.items())
        (first,) = torch.autograd.grad(run_layer(eager, ids_TK, 3, "swiglu").sum(), [eager["x"]], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()
