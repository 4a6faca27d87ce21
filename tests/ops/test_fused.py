"""The fused experts against a loop over rows in float64.

T tokens, K top-k, D model dim, F hidden dim, s slots, R rows, O features of the first matrix.
"""

from unittest import mock

import pytest
import torch

from swiftmoe_lightning.ops import ACTIVATIONS, SortedAssignments, sort_assignments
from swiftmoe_lightning.ops.fused import fused_expert_layer, fused_expert_rows
from tests.ops.cases import (
    DEVICE,
    assert_close,
    fenced,
    fenced_memory,
    gradients,
    leaves,
    loop_mlp,
    make_weights,
)

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# T, K, D, F, s, and whether there are biases. A slot's rows cross tiles of 64 in the last two.
SIZES = [((0, 2, 8, 5, 3), True), ((1, 1, 8, 5, 1), False), ((7, 1, 33, 32, 3), False), ((7, 1, 33, 32, 3), True)]
SIZES += [((90, 1, 8, 5, 1), False), ((65, 2, 100, 65, 9), True)]


def route(sizes, kept="all", slots="some"):
    """(random assignments, sorted by slot; the slot of each row). slots: "some" are used, or "one"."""
    num_tokens, top_k, _, _, num_slots = sizes
    generator = torch.Generator().manual_seed(num_tokens)
    # Every other slot is empty: the loop must skip it, and its gradient is zero.
    slot_N = torch.randint((num_slots + 1) // 2, (num_tokens * top_k,), generator=generator) * 2
    if slots == "one":
        slot_N.fill_(num_slots - 1)
    share = {"all": 2.0, "some": 0.5, "none": -1.0}[kept]
    slot_N[torch.rand(len(slot_N), generator=generator) >= share] = num_slots
    assignment_R = torch.argsort(slot_N, stable=True)[: int((slot_N < num_slots).sum())]
    rows_TK = torch.full((num_tokens, top_k), -1)
    rows_TK.view(-1)[assignment_R] = torch.arange(len(assignment_R))
    counts_s = torch.bincount(slot_N, minlength=num_slots + 1)[:num_slots]
    ends_s = counts_s.cumsum(0).to(torch.int32)
    return SortedAssignments(assignment_R, rows_TK, counts_s, ends_s), slot_N[assignment_R].tolist()


def on_device(assignments):
    return SortedAssignments(*(t.to(DEVICE) for t in assignments))


def make_values(sizes, activation, bias, dtype):
    num_tokens, top_k, dim, hidden_dim, num_slots = sizes
    generator = torch.Generator().manual_seed(5)
    x = {"x": torch.randn(num_tokens, dim, generator=generator).to(dtype)}
    x |= {"scores": torch.rand(num_tokens, top_k, generator=generator)}
    return x | make_weights(num_slots, dim, hidden_dim, activation, bias, dtype)


def loop_moe(values, assignment_R, slot_R, activation):
    num_tokens, top_k = values["scores"].shape
    y_RD = loop_mlp(values["x"][assignment_R // top_k], values, slot_R, activation)
    weighted_RD = y_RD * values["scores"].reshape(-1)[assignment_R].unsqueeze(-1)
    return values["x"].new_zeros(num_tokens, y_RD.shape[1]).index_add(0, assignment_R // top_k, weighted_RD)


def run(operation, values):
    """Outputs and gradients of `operation(inputs, weights)`, twice, to the same bits, in memory fenced by nan."""
    actual = []
    for _ in range(2):
        inputs = {name: fenced(value.to(DEVICE)).requires_grad_() for name, value in values.items()}
        with fenced_memory():
            out = operation(inputs)
            actual.append({"out": out} | gradients(out, inputs))
    for name, first in actual[0].items():
        assert torch.equal(first, actual[1][name]), name
    return actual[0]


def assert_moe_equals_the_loop(sizes, activation, bias, dtype, kept="all", slots="some", tail=0):
    """tail: rows behind the last slot's, as a sort leaves them that does not know how many assignments have a slot."""
    assignments, slot_R = route(sizes, kept, slots)
    values = make_values(sizes, activation, bias, dtype)
    behind = torch.full((tail,), -(10**9))
    with_tail = on_device(assignments._replace(assignment_R=torch.cat([assignments.assignment_R, behind])))

    def fused(inputs):
        return fused_expert_layer(inputs["x"], inputs["scores"], with_tail, weights_of(inputs), activation)

    slow = leaves(values, torch.float64)
    expected = loop_moe(slow, assignments.assignment_R, slot_R, activation)
    expected = {"out": expected} | gradients(expected, slow)
    for name, value in run(fused, values).items():
        assert value.dtype == (torch.float32 if name == "scores" else dtype)
        # The scores are float32, but their gradient is as good as what it is made of.
        assert_close(value.cpu().to(dtype), expected[name])


def weights_of(values):
    return {name: value for name, value in values.items() if "proj" in name}


@pytest.mark.parametrize(("sizes", "bias"), SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients_equal_a_loop_over_rows(sizes, bias, activation):
    assert_moe_equals_the_loop(sizes, activation, bias, torch.float32)


# Few rows per slot, and many: the tiles differ. With rows that begin at 16 bytes, and without: so do the loads.
@pytest.mark.parametrize(
    "sizes", [(7, 2, 33, 32, 3), (65, 2, 100, 65, 1), (7, 2, 40, 24, 3), (65, 2, 104, 72, 1)], ids=str
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_a_loop_over_rows(sizes, activation, dtype):
    assert_moe_equals_the_loop(sizes, activation, True, dtype)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_float32_follows_torchs_precision(precision, monkeypatch):
    from swiftmoe_lightning.ops.triton.fused import tiles

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    expected = {"high": ("tf32", tiles.TENSOR_FLOAT), "highest": ("ieee", tiles.SINGLE)}[precision]
    assert (tiles.dot_precision(torch.float32), tiles.choose_tiles(torch.empty(1), 4096, 4)) == expected
    if DEVICE == "cpu":
        # The interpreter multiplies as float32 either way.
        assert_moe_equals_the_loop((40, 2, 33, 40, 2), "swiglu", True, torch.float32)


@pytest.mark.parametrize("kept", ["some", "none"])
@pytest.mark.parametrize("tail", [0, 5, 130])
def test_dropped_assignments_have_no_row_and_no_gradient(kept, tail):
    assert_moe_equals_the_loop((30, 3, 33, 32, 5), "swiglu", True, torch.float32, kept, tail=tail)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_may_go_to_one_slot(dtype):
    assert_moe_equals_the_loop((65, 2, 20, 12, 3), "swiglu", True, dtype, slots="one")


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_rows_of_tokens_come_out_in_the_order_of_the_slots(integer):
    sizes = (20, 3, 33, 32, 5)
    assignments, slot_R = route(sizes, "some")
    values = make_values(sizes, "swiglu", True, torch.float32)
    del values["scores"]
    assignment_R, rows_TK, counts_s, ends_s = on_device(assignments)
    same = SortedAssignments(assignment_R.to(integer), rows_TK.to(integer), counts_s, ends_s)
    actual = run(lambda v: fused_expert_rows(v["x"], same, weights_of(v), "swiglu"), values)
    slow = leaves(values, torch.float64)
    expected = loop_mlp(slow["x"][assignments.assignment_R // 3], slow, slot_R, "swiglu")
    for name, value in ({"out": expected} | gradients(expected, slow)).items():
        assert_close(actual[name].cpu(), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 0, 70], [0, 0], [0, 9, 0]], ids=str)
def test_unassigned_rows_are_not_read_and_come_out_and_back_as_zero(counts, dtype):
    num_rows, tail = sum(counts), 140
    slot_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    slot_T = torch.cat([slot_R, torch.full((tail,), len(counts))]).to(DEVICE)
    values = make_weights(len(counts), 20, 12, "gelu", True, dtype)
    values |= {"x": torch.randn(num_rows, 20, generator=torch.Generator().manual_seed(1)).to(dtype)}
    seed_RD = torch.randn(num_rows, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    nan = torch.full((tail, 20), float("nan"), dtype=dtype)
    fast, slow = leaves({k: v.to(DEVICE) for k, v in values.items()}), leaves(values, torch.float64)
    fast["x"] = fenced(torch.cat([values["x"], nan]).to(DEVICE)).requires_grad_()
    by_slot = sort_assignments(slot_T.unsqueeze(1), len(counts))
    with fenced_memory():
        out = fused_expert_rows(fast["x"], by_slot, weights_of(fast), "gelu")
        actual = torch.autograd.grad(out, list(fast.values()), torch.cat([seed_RD, nan]).to(DEVICE))
    expected = loop_mlp(slow["x"], slow, slot_R, "gelu")
    expected_grads = torch.autograd.grad(expected, list(slow.values()), seed_RD.double(), allow_unused=True)
    actual = dict(zip(fast, actual, strict=True))
    assert not out[num_rows:].any()
    assert not actual["x"][num_rows:].any()
    actual["x"] = actual["x"][:num_rows]
    assert_close(out[:num_rows].cpu(), expected)
    for (name, value), want in zip(slow.items(), expected_grads, strict=True):
        assert_close(actual[name].cpu(), torch.zeros_like(value) if want is None else want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_poison_in_one_slots_rows_or_weights_shows_there_and_nowhere_else(activation):
    by_slot = sort_assignments(torch.tensor([0, 0, 1, 1, 1, 2], device=DEVICE).unsqueeze(1), 3)
    weights = leaves({k: v.to(DEVICE) for k, v in make_weights(3, 10, 6, activation, True, torch.float32).items()})
    x_TD, scores_TK = torch.randn(6, 10, device=DEVICE), torch.rand(6, 1, device=DEVICE).requires_grad_()
    x_TD[:2] = float("nan")
    with torch.no_grad():
        weights["down_proj"][2] = float("inf")
    # Rows 0-1 (poisoned) belong to slot 0, rows 2-4 to slot 1, row 5 to slot 2, whose weights are poisoned.
    out = fused_expert_layer(x_TD.requires_grad_(), scores_TK, by_slot, weights, activation)
    out.sum().backward()
    for actual in (out, x_TD.grad, scores_TK.grad):
        assert actual[:2].isnan().all()
        assert actual[2:5].isfinite().all()
    for name, weight in weights.items():
        # The last bias gets the outputs' gradient alone.
        assert weight.grad[0].isnan().any() == (name != "down_proj_bias")
        assert weight.grad[1].isfinite().all()


def inputs_of(sizes, dtype=torch.float32):
    values = {k: v.to(DEVICE) for k, v in make_values(sizes, "swiglu", False, dtype).items()}
    return leaves(values), on_device(route(sizes)[0])


def test_without_a_backward_nothing_is_kept_and_the_bits_are_the_same():
    inputs, assignments = inputs_of((9, 2, 20, 12, 3))
    out = fused_expert_layer(inputs["x"], inputs["scores"], assignments, weights_of(inputs), "swiglu")
    with torch.no_grad(), mock.patch.object(torch, "empty", wraps=torch.empty) as empty:
        again = fused_expert_layer(inputs["x"], inputs["scores"], assignments, weights_of(inputs), "swiglu")
    assert torch.equal(out, again)
    # Z is [R, 2F].
    assert (18, 24) not in [call.args for call in empty.call_args_list]


def test_backward_keeps_the_inputs_and_z_alone():
    inputs, assignments = inputs_of((9, 2, 20, 12, 3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_expert_layer(inputs["x"], inputs["scores"], assignments, weights_of(inputs), "swiglu")
    floating = sorted(tuple(t.shape) for t in kept if t.is_floating_point())
    assert floating == sorted([(18, 24), *(tuple(t.shape) for t in inputs.values())])


@pytest.mark.parametrize("trained", ["x", "scores", "gate_up_proj", "down_proj"])
def test_one_gradient_can_be_asked_for_alone(trained):
    inputs, assignments = inputs_of((9, 2, 20, 12, 3))
    out = fused_expert_layer(inputs["x"], inputs["scores"], assignments, weights_of(inputs), "swiglu")
    everything = torch.autograd.grad(out.sum(), inputs.values())
    inputs = {name: t.detach().requires_grad_(name == trained) for name, t in inputs.items()}
    out = fused_expert_layer(inputs["x"], inputs["scores"], assignments, weights_of(inputs), "swiglu")
    out.sum().backward()
    assert torch.equal(inputs[trained].grad, everything[list(inputs).index(trained)])
    assert [name for name, t in inputs.items() if t.grad is not None] == [trained]


def test_a_dtype_or_activation_without_a_kernel_is_refused():
    inputs, assignments = inputs_of((9, 2, 20, 12, 3))
    weights = weights_of(inputs)
    with pytest.raises(ValueError, match=r"one dtype, .* got torch.float32, torch.float64.*Cast the weights"):
        fused_expert_rows(inputs["x"].double(), assignments, weights, "swiglu")
    with pytest.raises(ValueError, match=r"activations .*'swiglu', 'gelu', 'relu2'.* got 'tanh'"):
        fused_expert_rows(inputs["x"], assignments, weights, "tanh")


def test_big_tiles_are_for_many_rows_and_gpus_that_have_room(monkeypatch):
    from swiftmoe_lightning.ops.triton.fused import tiles

    x = torch.empty(1, dtype=torch.bfloat16)
    assert tiles.choose_tiles(x, 960, 10) is tiles.HALF_MANY
    assert tiles.choose_tiles(x, 959, 10) is tiles.HALF_FEW
    # An A100's, in bytes.
    monkeypatch.setattr(tiles, "shared_memory", lambda _: 163 * 1024)
    assert tiles.choose_tiles(x, 960, 10) is tiles.HALF_FEW


def test_no_two_slots_share_a_tile_of_rows():
    from swiftmoe_lightning.ops.triton.fused.tiles import MlpTiles, Tile, cut_rows

    ends_s = torch.tensor([3, 3, 8], dtype=torch.int32, device=DEVICE)
    tiles = cut_rows(torch.arange(10, device=DEVICE), 1, ends_s, MlpTiles(*[Tile(2, 2, 2, 1, 1)] * 5))
    # Slot 1 has no rows, 8 and 9 are unassigned; 3 stands for no tile.
    assert tiles.slot_B.tolist() == [0, 0, 2, 2, 2, 3, 3, 3]
    assert tiles.first_row_B[:5].tolist() == [0, 2, 3, 5, 7]
    assert tiles.num_tiles.tolist() == [5]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 16 GB")
def test_more_than_two_billion_elements_do_not_overflow():
    num_rows, hidden_dim = 2**18 + 5, 4096
    values = make_values((num_rows, 1, 64, hidden_dim, 2), "swiglu", False, torch.bfloat16)
    inputs = leaves({name: value.to(DEVICE) for name, value in values.items()})
    slot_TK = (torch.arange(num_rows, device=DEVICE) >= num_rows - 3).long().unsqueeze(1)
    by_slot = sort_assignments(slot_TK, 2)
    out = fused_expert_layer(inputs["x"], inputs["scores"], by_slot, weights_of(inputs), "swiglu")
    # Squared, so that a score's gradient is no sum of terms that cancel.
    actual = torch.autograd.grad(out[-3:].square().sum(), [inputs["x"], inputs["scores"]])
    slow = leaves(
        {name: value[-3:] if name in ("x", "scores") else value for name, value in values.items()}, torch.float64
    )
    expected = loop_moe(slow, torch.arange(3), [1, 1, 1], "swiglu")
    expected_grads = torch.autograd.grad(expected.square().sum(), [slow["x"], slow["scores"]])
    assert_close(out[-3:].cpu(), expected)
    for gradient, want in zip(actual, expected_grads, strict=True):
        assert_close(gradient[-3:].cpu().to(torch.bfloat16), want)
