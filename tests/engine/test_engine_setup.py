"""Engines over modules of every kind: on meta, on one process, copied, adapted; and those that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import swiftmoe_lightning as sml
from tests.helpers import rank_errors, run_ranks

E, DIM, HIDDEN = 3, 8, 70


class Largest(TorchDispatchMode):
    """The most elements that any operation's result with real storage has had on this rank."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and not value.is_meta:
                self.numel = max(self.numel, value.numel())
        return out


def build_on_meta() -> tuple[dict[str, Tensor], int]:
    """A block made on the meta device: its state after the engine took it over, and the largest tensor on the way."""
    torch.manual_seed(11 + dist.get_rank())
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(DIM, DIM), sml.MoE(DIM, HIDDEN, E, bias=True))
    with Largest() as largest:
        engine = sml.SwiftMoEEngine(model)
    engine.data_parallel()(torch.randn(5, DIM))
    return engine.full_state_dict(), largest.numel


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_meta_experts_get_their_shards_without_the_whole_ever_being_anywhere(world_size: int) -> None:
    outcomes = run_ranks(build_on_meta, world_size)
    whole = E * 2 * HIDDEN * DIM
    # A generator's block of 64 rows is the least that is drawn at once; a shard is the most that is kept.
    assert max(numel for _, numel in outcomes) <= max(whole // world_size + E * DIM, 64 * HIDDEN)
    # Rank 0's seed decides, and the values are those of a plain module of that seed.
    torch.manual_seed(11)
    seed = int(torch.randint(2**31, ()).item())
    expected = sml.Experts(E, DIM, HIDDEN, bias=True)
    for name, parameter in expected.expert_parameters().items():
        expected.initialize_rows(name, parameter.data, 0, seed)
    for state, _ in outcomes:
        for name, parameter in expected.named_parameters():
            assert torch.equal(state[f"1.experts.{name}"], parameter.detach()), name
        assert torch.equal(state["0.weight"], outcomes[0][0]["0.weight"])
        assert float(state["0.weight"].std()) > 0


def without_ranks() -> tuple[bool, Tensor]:
    """An engine where there is no process group."""
    torch.manual_seed(0)
    model = sml.MoE(DIM, 4, E)
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(slots_per_rank=2))
    optimizer = engine.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped = engine.data_parallel()
    x = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        wrapped(x).square().sum().backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    engine.join()
    return wrapped is model, model(x).detach()


def test_without_a_process_group_the_module_stays_a_plain_one() -> None:
    is_same, actual = without_ranks()
    assert is_same
    torch.manual_seed(0)
    model = sml.MoE(DIM, 4, E)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(actual, model(x).detach())


def layers_of_two_sizes() -> dict[str, tuple[int, int]]:
    model = nn.ModuleDict({"a": sml.MoE(DIM, 4, 6), "b": sml.MoE(DIM, 4, 3)})
    engine = sml.SwiftMoEEngine(model)
    engine.attach(model)
    return {name: (p.num_experts, p.slots_per_rank) for name, p in engine.placements.items()}


def test_every_layer_has_slots_of_its_own() -> None:
    assert run_ranks(layers_of_two_sizes, 2)[0] == {"a.experts": (6, 4), "b.experts": (3, 3)}


def old_optimizer() -> None:
    model = sml.MoE(DIM, 4, E)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sml.SwiftMoEEngine(model).prepare_optimizer(optimizer)


def test_an_optimizer_of_the_parameters_from_before_is_refused() -> None:
    for error in rank_errors(old_optimizer, 2):
        assert "the optimizer holds parameters of ['experts'] from before the engine took them over" in error
        assert "Make the engine first, then the optimizer from module.parameters()" in error


def too_few_slots() -> None:
    sml.SwiftMoEEngine(sml.MoE(DIM, 4, 7), sml.SwiftMoEConfig(slots_per_rank=3))


def test_too_few_slots_are_refused() -> None:
    for error in rank_errors(too_few_slots, 2):
        assert "2 ranks x 3 slots = 6 slots cannot hold 7 experts" in error
        assert "Set slots_per_rank to 4 or more" in error


def meta_without_reset() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, device="meta"))

    sml.SwiftMoEEngine(nn.Sequential(Scale(), sml.MoE(DIM, 4, E)))


def test_a_meta_module_that_cannot_draw_its_values_is_named() -> None:
    for error in rank_errors(meta_without_reset, 2):
        assert "'0' (Scale) is on the meta device and has no reset_parameters()" in error


def different_steps() -> None:
    model = sml.MoE(DIM, 4, E)
    engine = sml.SwiftMoEEngine(model)
    x = torch.randn(4, DIM)
    if dist.get_rank() == 0:
        model(x).sum().backward()
        engine.join()
    else:
        for _ in range(2):
            model(x).sum().backward()


def other_layer() -> None:
    model = nn.ModuleList([sml.MoE(DIM, 4, E), sml.MoE(DIM, 4, E)])
    sml.SwiftMoEEngine(model)
    model[dist.get_rank()](torch.randn(4, DIM))


def training_beside_evaluation() -> None:
    model = sml.MoE(DIM, 4, E)
    sml.SwiftMoEEngine(model)
    with torch.set_grad_enabled(dist.get_rank() == 0):
        model(torch.randn(4, DIM))


@pytest.mark.parametrize(
    ("fn", "messages"),
    [
        (different_steps, ["rank 0 has no more batches", "rank 1 trains layer 'experts'"]),
        (other_layer, ["rank 0 trains layer '0.experts'", "rank 1 trains layer '1.experts'"]),
        (training_beside_evaluation, ["rank 0 trains layer 'experts'", "rank 1 evaluates layer 'experts'"]),
    ],
)
def test_ranks_in_different_calls_are_an_error_on_all_that_says_who_does_what(fn: Any, messages: list[str]) -> None:
    for error in rank_errors(fn, 2):
        assert all(message in error for message in messages), error
        assert "every rank must run the same MoE layers in the same order, as many times" in error


def alone_while_others_wait() -> None:
    model = sml.MoE(DIM, 4, E)
    sml.SwiftMoEEngine(model)
    if dist.get_rank() == 1:
        model(torch.randn(4, DIM))
    else:
        raise KeyError("a mistake of the user's")


def test_a_rank_that_died_is_an_error_on_the_others_that_points_there() -> None:
    errors = rank_errors(alone_while_others_wait, 2, timeout_s=5)
    assert "a mistake of the user's" in errors[0]
    assert "If another rank raised an error of its own, that one comes first" in errors[1]


def copied() -> tuple[Tensor, Tensor]:
    """A deep copy under an engine holds sharded parameters, and loads and gathers like the original."""
    torch.manual_seed(0)
    model = sml.MoE(DIM, 4, E)
    engine = sml.SwiftMoEEngine(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    model.load_state_dict(
        {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in other.state_dict().items()}
    )
    out = model(torch.ones(1, DIM))
    return out.detach(), engine.full_state_dict()["experts.down_proj"]


def test_copies_hold_shards_and_their_whole_state_loads_back() -> None:
    torch.manual_seed(0)
    model = sml.MoE(DIM, 4, E)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for out, weight in run_ranks(copied, 2):
        torch.testing.assert_close(out, model(torch.ones(1, DIM)).detach())
        assert torch.equal(weight, model.experts.down_proj)


class LowRank(nn.Module):
    """An adapter as PEFT builds it: the layer it wraps is its `base_layer`."""

    def __init__(self, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = nn.Linear(dim, 2, bias=False), nn.Linear(2, dim, bias=False)

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.base_layer(*args) + self.lora_B(self.lora_A(args[0]))
        return out


def adapt_experts() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), LowRank(sml.Experts(E, DIM, HIDDEN), DIM))
    sml.SwiftMoEEngine(model)


def test_experts_inside_an_adapter_are_refused_with_the_fix() -> None:
    for error in rank_errors(adapt_experts, 2):
        assert "the experts '1.base_layer' are wrapped (an adapter)" in error
        assert "becomes part of the experts by sml.convert(model), before the engine" in error


class Scaled(Tensor):
    """As a quantizing package's tensor: float on the outside."""


def quantize_experts(kind: str) -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), sml.MoE(DIM, HIDDEN, E))
    experts = model[1].experts
    for name, p in experts.expert_parameters().items():
        values = {"int8": p.data.char(), "float8": p.data.to(torch.float8_e4m3fn), "tensor": p.data.as_subclass(Scaled)}
        experts.register_parameter(name, nn.Parameter(values[kind], requires_grad=False))
    sml.SwiftMoEEngine(model)


@pytest.mark.parametrize(("kind", "named"), [("int8", "int8"), ("float8", "float8_e4m3fn"), ("tensor", "Scaled")])
def test_quantized_experts_are_refused_with_the_fix(kind: str, named: str) -> None:
    for error in rank_errors(quantize_experts, 2, kind):
        assert f"gate_up_proj of the experts '1.experts' is quantized ({named}" in error.replace("torch.", "")
        assert "leave them out of quantization" in error


def train_adapter() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three steps of a dense layer's adapter over frozen experts: the state before and after."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(nn.Linear(DIM, DIM), DIM), sml.MoE(DIM, HIDDEN, E)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    engine = sml.SwiftMoEEngine(model)
    wrapped = engine.data_parallel()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(trained, lr=1e-2))
    before = {name: value.clone() for name, value in engine.full_state_dict().items()}
    for step in range(3):
        x = torch.randn(12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        wrapped(x[rank * 12 // world_size : (rank + 1) * 12 // world_size]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, engine.full_state_dict()


def test_an_adapter_of_a_dense_layer_trains_over_frozen_experts() -> None:
    ((_, expected),) = run_ranks(train_adapter, 1)
    for before, after in run_ranks(train_adapter, 2):
        for name, value in expected.items():
            torch.testing.assert_close(after[name], value, rtol=1e-10, atol=1e-12, msg=name)
            assert torch.equal(after[name], before[name]) == ("lora" not in name), name
