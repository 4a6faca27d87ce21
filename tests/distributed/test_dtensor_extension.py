"""Stock code that knows plain tensors alone, on spread experts: draws, writes, penalties, copies, files."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import rank_errors, run_ranks


def parts(*tensors: Tensor) -> list[Tensor]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [models.my_part(tensor, rank, world_size) for tensor in tensors]


def spread(model: nn.Module) -> sml.SwiftMoEEngine:
    return sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4))


# -- draws ------------------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[nn.Parameter], Any]] = {
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "truncated normal": nn.init.trunc_normal_,
    "kaiming uniform": nn.init.kaiming_uniform_,
    "xavier normal": nn.init.xavier_normal_,
    "through data": lambda p: p.data.normal_(0, 0.02),
    "own generator": lambda p: p.normal_(generator=torch.Generator().manual_seed(3)),
    "exponential": lambda p: p.exponential_(),
    "bernoulli": lambda p: p.bernoulli_(0.5),
    "random": lambda p: p.random_(7),
    "noise": lambda p: p.add_(torch.randn_like(p), alpha=0.1),
    "uniform noise": lambda p: p.mul_(torch.rand_like(p)),
    "mask": lambda p: p.mul_(torch.bernoulli(torch.sigmoid(p))),
    "dropout": lambda p: p.copy_(F.dropout(p, 0.5)),
    "one expert": lambda p: p[1].mul_(3).add_(1),
    "reset": lambda p: None,
}


def draw(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a draw leaves in experts, what the generator gives next, and what the model then computes."""
    model = models.build()
    engine = spread(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, sml.Experts):
                for parameter in module.expert_parameters().values():
                    # At least 2-dim., as kaiming's and its like need.
                    DRAWS[name](parameter)
                if name == "reset":
                    module.reset_parameters()
    state = engine.full_state_dict()
    after = torch.rand(3)
    return torch.cat([v.flatten() for v in state.values()]), after, model(dense.batch(0, 0, torch.float32)[0])


def draw_all() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {name: draw(name) for name in DRAWS}


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_draw_is_that_of_one_process(world_size: int) -> None:
    (expected,) = run_ranks(draw_all, 1)
    for actual in run_ranks(draw_all, world_size):
        for name in DRAWS:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def reset_between_steps() -> Tensor:
    model = models.build(torch.float64)
    engine = spread(model)
    (x,) = parts(dense.batch(0, 0, torch.float64)[0])
    model(x)
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, sml.Experts):
            module.reset_parameters()
    out: Tensor = model(x)
    assert engine.layers or not dist.is_initialized()
    return out


def test_experts_that_are_reset_compute_with_what_they_drew() -> None:
    (expected,) = run_ranks(reset_between_steps, 1)
    torch.testing.assert_close(torch.cat(run_ranks(reset_between_steps, 2)), expected, rtol=1e-9, atol=1e-12)


# -- writes -----------------------------------------------------------------------------------------------------------


def to_data(p: nn.Parameter, value: Tensor) -> None:
    p.data = value


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda p: p.mul_(2),
    "through data": lambda p: p.data.mul_(2),
    "a copy through data": lambda p: p.data.copy_(2 * p),
    "a part through data": lambda p: p.data[1:3].mul_(2),
    "to data": lambda p: to_data(p, p.data * 2),
    "a whole tensor to data": lambda p: to_data(p, torch.ones(p.shape)),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "foreach through data": lambda p: torch._foreach_lerp_([p.data], [p.data * 0], 0.5),
}


def write(name: str, tells: bool) -> Tensor:
    model = models.build()
    engine = spread(model)
    (x,) = parts(dense.batch(0, 0, torch.float32)[0])
    model(x)
    with torch.no_grad():
        WRITES[name](model[1].experts.down_proj)  # type: ignore[union-attr, arg-type]
    if tells:
        engine.mark_stale()
    out: Tensor = model(x)
    return out


def write_all() -> dict[str, tuple[str, Tensor]]:
    """For each write the error without `mark_stale()`, and what the model computes with it."""
    seen = {}
    for name in WRITES:
        message = ""
        try:
            write(name, tells=False)
        except RuntimeError as error:
            message = str(error)
        seen[name] = message, write(name, tells=True)
    return seen


def test_a_write_is_seen_and_counts_once_it_is_told() -> None:
    (expected,) = run_ranks(write_all, 1)
    ranks = run_ranks(write_all, 2)
    for name in WRITES:
        for rank in ranks:
            assert "after a write by hand call engine.mark_stale()" in rank[name][0], name
        actual = torch.cat([rank[name][1] for rank in ranks])
        torch.testing.assert_close(actual, expected[name][1], msg=lambda text, name=name: f"{name}: {text}")


def teach(by_data: bool) -> Tensor:
    """A student follows a momentum teacher; returns the teacher's last outputs and weights."""
    both = nn.ModuleDict({"student": models.build(torch.float64), "teacher": models.build(torch.float64)})
    both["teacher"].requires_grad_(False)
    engine = spread(both)
    optimizer = engine.prepare_optimizer(torch.optim.SGD(both["student"].parameters(), lr=0.5))
    dense_part = [p for name, p in both["student"].named_parameters() if "experts" not in name]
    for step in range(3):
        (x,) = parts(dense.batch(step, 0, torch.float64)[0])
        target = both["teacher"](x)
        F.mse_loss(both["student"](x), target + 1).backward()
        for p in dense_part:
            if dist.is_initialized() and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for s, t in zip(both["student"].parameters(), both["teacher"].parameters(), strict=True):
                if by_data:
                    t.data = 0.5 * t.data + 0.5 * s.data
                else:
                    t.data.mul_(0.5).add_(s.data, alpha=0.5)
        engine.mark_stale()
    state = engine.full_state_dict()
    return torch.cat([v.flatten() for name, v in sorted(state.items()) if "teacher" in name])


@pytest.mark.parametrize("by_data", [True, False])
def test_a_momentum_teacher_follows_as_in_one_process(by_data: bool) -> None:
    (expected,) = run_ranks(teach, 1, by_data)
    for actual in run_ranks(teach, 2, by_data):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def give_nonsense_to_data() -> None:
    model = models.build()
    spread(model)
    model[1].experts.down_proj.data = torch.ones(2, 2)  # type: ignore[union-attr]


def test_data_that_does_not_fit_is_refused() -> None:
    for error in rank_errors(give_nonsense_to_data, 2):
        assert "`.data` of a tensor of shape [5, 10, 7] that is cut over the ranks was given a Tensor[2, 2]" in error


# -- copies -----------------------------------------------------------------------------------------------------------


def run_a_copy(average: bool) -> None:
    model = models.build()
    engine = spread(model)
    copied = AveragedModel(engine.data_parallel()) if average else copy.deepcopy(model)
    copied(dense.batch(0, 0, torch.float32)[0])


@pytest.mark.parametrize("average", [True, False])
def test_a_copy_says_how_to_run_it(average: bool) -> None:
    for error in rank_errors(run_a_copy, 2, average):
        assert "Spread the copy, too, on all ranks: SwiftMoEEngine(copy)" in error


def average_and_run() -> tuple[Tensor, dict[str, Tensor]]:
    """An average that is spread like the model, run, and loaded into a model of its own."""
    model = models.build(torch.float64)
    engine = spread(model)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average_engine = spread(average)
    for step in range(3):
        x, target = parts(*dense.batch(step, 0, torch.float64))
        F.mse_loss(wrapped(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        average_engine.mark_stale()
    (x,) = parts(dense.batch(9, 0, torch.float64)[0])
    with torch.no_grad():
        return average(x), average_engine.full_state_dict()


def test_an_average_that_is_spread_runs_as_in_one_process() -> None:
    ((expected, state),) = run_ranks(average_and_run, 1)
    actual = run_ranks(average_and_run, 2)
    torch.testing.assert_close(torch.cat([out for out, _ in actual]), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual[0][1], state, rtol=1e-9, atol=1e-12)


# -- penalties --------------------------------------------------------------------------------------------------------

PENALTIES: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "squares": lambda loss, weights: loss + 0.1 * sum(w.square().sum() for w in weights),
    "norms": lambda loss, weights: loss + 0.1 * sum(w.norm() for w in weights),
    "in place": lambda loss, weights: sum((w.abs().mean() for w in weights), start=loss.clone()),
    "a factor": lambda loss, weights: loss * (1 + weights[-1].square().mean()) - weights[0].abs().sum() / 50,
}


def penalise(name: str) -> dict[str, Tensor]:
    model = models.build(torch.float64)
    engine = spread(model)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):
        x, target = parts(*dense.batch(step, 0, torch.float64))
        loss = F.mse_loss(wrapped(x), target)
        weights = [p for name, p in model.named_parameters() if "proj" in name or "weight" in name]
        PENALTIES[name](loss, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_on_weights_trains_as_in_one_process(name: str) -> None:
    (expected,) = run_ranks(penalise, 1, name)
    for actual in run_ranks(penalise, 2, name):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# -- files ------------------------------------------------------------------------------------------------------------


def pickle_it(of: str) -> None:
    model = models.build()
    spread(model)
    objects = {"state": model.state_dict(), "module": model, "part": model[1].experts}
    torch.save(objects[of], io.BytesIO())


def reduce_by_hand(of: str) -> None:
    model = models.build()
    engine = spread(model)
    engine.data_parallel()(dense.batch(0, 0, torch.float32)[0]).sum().backward()
    for parameter in model.parameters():
        tensor = parameter.grad if of == "gradients" else parameter.data
        assert tensor is not None
        dist.all_reduce(tensor) if of == "gradients" else dist.broadcast(tensor, 0)


@pytest.mark.parametrize("of", ["gradients", "weights"])
def test_a_collective_on_a_part_is_refused(of: str) -> None:
    for error in rank_errors(reduce_by_hand, 2, of):
        assert "was called on a tensor that is cut over the ranks, of which each holds rows of its own" in error


@pytest.mark.parametrize("of", ["state", "module", "part"])
def test_a_file_of_a_part_is_refused(of: str) -> None:
    for error in rank_errors(pickle_it, 2, of):
        assert "would hold this rank's [5, 7, 10] alone. Gather on all ranks, then save on one" in error


# -- local steps ------------------------------------------------------------------------------------------------------


def step_inside_no_sync() -> None:
    model = models.build()
    engine = spread(model)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with wrapped.no_sync():
        wrapped(dense.batch(0, 0, torch.float32)[0]).sum().backward()
        optimizer.step()


def local_sgd() -> None:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    model = models.build()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = sml.accelerate.prepare(accelerator, model, optimizer)
    with LocalSGD(accelerator, wrapped, local_sgd_steps=2) as local:
        accelerator.backward(wrapped(dense.batch(0, 0, torch.float32)[0]).sum())
        optimizer.step()
        local.step()


@pytest.mark.parametrize("steps", [step_inside_no_sync, local_sgd])
def test_ranks_do_not_step_each_for_itself(steps: Callable[[], None]) -> None:
    for error in rank_errors(steps, 2, init=steps is step_inside_no_sync):
        assert "LocalSGD, in which ranks step each for itself, cannot be combined with spread experts." in error
