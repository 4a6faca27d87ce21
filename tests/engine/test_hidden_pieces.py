"""Experts cut by their hidden dim compute what whole ones do, of every kind, in the memory that the formula says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.placement import Capacity
from tests.engine import models
from tests.helpers import nightly, rank_errors, run_ranks

E, D, K = 5, 6, 2


def interleaved(z_RF: Tensor) -> Tensor:
    """A gate beside each up, as in gpt-oss."""
    return torch.sigmoid(z_RF[..., ::2].clamp(max=7)) * (z_RF[..., 1::2] + 1)


def normed(z_RF: Tensor) -> Tensor:
    """No hidden unit of it can be computed alone."""
    return torch.softmax(z_RF, -1)


def kinds() -> Iterator[tuple[str, sml.Experts]]:
    """Experts of each kind, in float64; hidden dims that no number of ranks divides, and ones smaller than it."""
    torch.manual_seed(0)
    for hidden_dim in (7, 3, 1):
        yield f"swiglu {hidden_dim}", sml.Experts(E, D, hidden_dim)
        yield f"gelu with biases {hidden_dim}", sml.Experts(E, D, hidden_dim, activation="gelu", bias=True)
    adapted = sml.Experts(E, D, 7, activation="swiglu", bias=True)
    for name in ("gate_up_proj", "down_proj"):
        _, rows, columns = getattr(adapted, name).shape
        adapted.register_parameter(f"{name}_lora_A", nn.Parameter(torch.randn(E, 3, columns)))
        adapted.register_parameter(f"{name}_lora_B", nn.Parameter(torch.randn(E, rows, 3)))
        adapted.adapters.scales[name] = 0.5
    yield "adapted", adapted
    for hidden_dim in (7, 2):
        shapes = {
            "gate_up_proj": (E, D, 2 * hidden_dim),
            "gate_up_proj_bias": (E, 2 * hidden_dim),
            "down_proj": (E, hidden_dim, D),
            "down_proj_bias": (E, D),
        }
        parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        yield f"transposed, interleaved {hidden_dim}", sml.Experts.from_parameters(parameters, interleaved, True)
    capped = sml.Experts(E, D, 7, activation="relu2", capacity=Capacity(0.25))
    yield "with a capacity", capped


def routings(rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, ids and weights of a rank: uneven, none on some rank, all to one expert, unassigned, no tokens at all."""
    generator = torch.Generator().manual_seed(rank)
    for numbers, choose in (
        ((5, 2, 9, 1), lambda n: torch.rand(n, E, generator=generator).topk(K).indices),
        ((0, 3, 0, 8), lambda n: torch.full((n, K), 2)),
        ((4, 0, 1, 2), lambda n: torch.randint(-1, E + 1, (n, K), generator=generator)),
        ((0, 0, 0, 0), lambda n: torch.zeros(n, K, dtype=torch.long)),
    ):
        num = numbers[rank]
        x_TD = torch.randn(num, D, generator=generator, dtype=torch.float64)
        yield x_TD, choose(num), torch.rand(num, K, generator=generator, dtype=torch.float64)


def compare_kinds(param_dtypes: list[str | None]) -> None:
    """Outputs with sharded experts against those of the same whole experts before they were spread."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for param_dtype, (name, experts) in ((dtype, kind) for dtype in param_dtypes for kind in kinds()):
        experts.double().eval()
        capacity, experts.capacity = experts.capacity, None
        if param_dtype is not None:
            for parameter in experts.parameters():
                parameter.data = parameter.to(getattr(torch, param_dtype)).double()
        with torch.inference_mode():
            expected = [experts(*routing) for routing in routings(rank)]
        experts.capacity = capacity
        slots = -(-E // size) + 1
        config = sml.SwiftMoEConfig(
            evaluate="sharded", placement=models.RandomPolicy, slots_per_rank=slots, param_dtype=param_dtype
        )
        engine = sml.SwiftMoEEngine(experts, config)
        (layer,) = engine.layers
        with torch.inference_mode():
            for routing, out_TD in zip(routings(rank), expected, strict=True):
                got_TD = experts(*routing)
                assert got_TD.shape == out_TD.shape
                assert (got_TD - out_TD).norm() <= 1e-14 * out_TD.norm(), name
        assert layer.slots.is_cut
        pieces = layer.slots.pieces.weights
        element = 8 if param_dtype is None else 2
        assert sum(p.nbytes for p in pieces.values()) == element * num_elements(experts, rank, size), name
        assert all(slot.untyped_storage().nbytes() == 0 for slot in layer.slots.weights.values())
        # Whole again, to the bit.
        before = {n: p.detach().full_tensor().to(layer.slots.weights[n].dtype) for n, p in experts.named_parameters()}
        layer.slots.make_whole()
        mine = layer.slots.placement.experts_of(rank)
        for n, slot in layer.slots.weights.items():
            assert torch.equal(slot[: len(mine)], before[n][torch.from_numpy(mine)]), (name, n)
        assert not layer.slots.is_cut


def num_elements(experts: sml.Experts, rank: int, size: int) -> int:
    """Elements of a rank's pieces: its part of the hidden dim of every expert; all of the down projection's bias and of
    the factors on the other side of it."""
    part = (rank + 1) * experts.hidden_dim // size - rank * experts.hidden_dim // size
    total = 0
    for name in experts.expert_parameters():
        ups = 2 if name.startswith("gate_up") else 1
        rows = {
            "gate_up_proj": ups * part * D,
            "up_proj": part * D,
            "gate_up_proj_bias": ups * part,
            "up_proj_bias": part,
            "down_proj": D * part,
            "down_proj_bias": D,
            "gate_up_proj_lora_A": 3 * D,
            "gate_up_proj_lora_B": ups * part * 3,
            "down_proj_lora_A": 3 * part,
            "down_proj_lora_B": D * 3,
        }
        total += E * rows[name]
    return total


@pytest.mark.parametrize("world_size", [2, *nightly(3, 4)])
def test_every_kind_of_experts_computes_in_pieces_what_it_does_whole(world_size: int) -> None:
    run_ranks(compare_kinds, world_size, [None, "bfloat16"])


def bytes_of_a_cut() -> list[int]:
    """What this rank has sent of weights, then of tokens: at first, cut, cut and evaluated once more, and whole."""
    experts = sml.Experts(4, 8, 8, activation="relu2").eval()
    engine = sml.SwiftMoEEngine(experts, sml.SwiftMoEConfig(evaluate="sharded", placement="static", slots_per_rank=2))
    (layer,) = engine.layers
    sent = []
    routing = torch.zeros(3, 8), torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1)
    for _ in range(2):
        with torch.no_grad():
            experts(*routing)
        sent += [engine.traffic["recut"], sum(engine.group.token_bytes.values())]
    experts(*routing)
    return [*sent, engine.traffic["recut"]]


def test_literal_bytes() -> None:
    # Of each of its 2 experts of 128 elements a rank sends one half in 4 bytes, and so it gets them back. A token is 8
    # elements, a weight and an id, and comes back as 8 elements.
    assert run_ranks(bytes_of_a_cut, 2) == [[512, 3 * 18 * 4, 512, 2 * 3 * 18 * 4, 1024]] * 2


def build_with(activation: Callable[[Tensor], Tensor]) -> None:
    parameters = {"up_proj": nn.Parameter(torch.randn(E, 7, D)), "down_proj": nn.Parameter(torch.randn(E, D, 7))}
    experts = sml.Experts.from_parameters(parameters, activation)
    sml.SwiftMoEEngine(experts, sml.SwiftMoEConfig(evaluate="sharded"))


def test_an_activation_over_all_hidden_units_is_refused() -> None:
    for error in rank_errors(build_with, 2, normed):
        assert "the activation normed does not compute the hidden units of an expert one by one" in error
        assert "Evaluate with whole experts (evaluate='placed'). (FAQ: sharded-evaluation)" in error
