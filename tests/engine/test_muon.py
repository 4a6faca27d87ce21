"""Muon on experts: equal to torch's on each matrix by itself, on one process to the bit, on ranks to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.distributed import full_tensor, shard_of, sharded_like
from swiftmoe_lightning.engine import checkpoint
from tests.engine import dense, models
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import run_ranks

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.8}
ADAMW = {"lr": 1e-2, "betas": (0.8, 0.9)}


def matrices(tensor: Tensor, layout: str, transposed: bool) -> list[Tensor]:
    """Views of each matrix of experts, [out, in]."""
    pairs = [e.mT if transposed else e for e in tensor]
    if layout == "matrix":
        return pairs
    halves = [e.chunk(2) if layout == "halves" else (e[0::2], e[1::2]) for e in pairs]
    return [half for both in halves for half in both]


def copies(tensor: Tensor, layout: str, transposed: bool) -> list[Tensor]:
    """The same as tensors of their own, whose memory has the order of the tensor's: sums round alike."""
    views = matrices(tensor, layout, transposed)
    return [view.mT.clone(memory_format=torch.contiguous_format).mT if transposed else view.clone() for view in views]


@pytest.mark.parametrize("layout", ["matrix", "halves", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_of_an_expert_is_updated_as_by_torch(layout: str, transposed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # In bfloat16 without nesterov, torch divides the momentum that it keeps, in place.
    for options in ({}, {"adjust_lr_fn": "match_rms_adamw", "nesterov": dtype == torch.bfloat16, "ns_steps": 3}):
        # Out is larger than in for the first, and smaller for the second, so one of them has a larger learning rate.
        for shape in ((3, 24, 10), (3, 10, 24)):
            start = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
            ours = nn.Parameter(start.clone())
            group = {"params": [ours], "experts": layout, "transposed": transposed}
            optimizer = sml.Muon([group], lr=0.1, **options)
            theirs = [nn.Parameter(m) for m in copies(start, layout, transposed)]
            expected = torch.optim.Muon(theirs, lr=0.1, **options)
            for _ in range(3):
                ours.grad = torch.randn(shape, generator=generator).to(dtype)
                for parameter, gradient in zip(theirs, copies(ours.grad, layout, transposed), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                expected.step()
            for actual, parameter in zip(matrices(ours.detach(), layout, transposed), theirs, strict=True):
                if dtype == torch.float32 and not transposed:
                    assert torch.equal(actual, parameter), (shape, options)
                else:
                    # One rounding of bfloat16 in an update: strided memory has other kernels.
                    torch.testing.assert_close(actual, parameter.detach(), rtol=1.6e-2, atol=1e-3)


def test_other_groups_are_updated_as_by_torchs_adamw_and_muon() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    theirs = copy.deepcopy(ours)
    groups = sml.muon_groups(ours, adamw="1", **ADAMW)
    assert [len(group["params"]) for group in groups] == [1, 3]
    optimizer = sml.Muon(groups, lr=0.1)
    others = [p for name, p in theirs.named_parameters() if name != "0.weight"]
    expected = [torch.optim.Muon([theirs[0].weight], lr=0.1), torch.optim.AdamW(others, **ADAMW)]
    for step in range(4):

        def closure() -> Tensor:
            loss = ours(torch.ones(4, 5) * step).square().sum()  # noqa: B023 - called in this turn of the loop
            ours.zero_grad()
            loss.backward()
            return loss.detach()

        loss = optimizer.step(closure)
        expected_loss = theirs(torch.ones(4, 5) * step).square().sum()
        theirs.zero_grad()
        expected_loss.backward()
        for other in expected:
            other.step()
        assert torch.equal(loss, expected_loss.detach())
    for actual, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(actual, parameter)


def reference_groups(weights: dict[str, Tensor], chosen: list[str]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Name of a tensor -> the matrices in it as parameters that share its memory."""
    for name in chosen:
        views = [weights[name]]
        if weights[name].dim() == 3:
            views = matrices(weights[name], "halves" if "gate_up" in name else "matrix", False)
        yield name, [nn.Parameter(view.detach()) for view in views]


def is_matrix(name: str) -> bool:
    return not name.endswith("bias")


def train_reference(chosen: list[str]) -> dict[str, Tensor]:
    """A dense model on one process, without the package: torch's Muon for the matrices in `chosen`, AdamW for the rest.

    Of layer "1" the learning rate is another.
    """
    weights = {n: v.to(torch.float64).clone().requires_grad_() for n, v in models.build().state_dict().items()}
    parts = dict(reference_groups(weights, chosen))
    muon = torch.optim.Muon([{"params": p, "lr": rate_of(name)} for name, p in parts.items()], **OPTIONS)
    adamw = torch.optim.AdamW([w for name, w in weights.items() if name not in chosen], **ADAMW)
    for step in range(STEPS):
        for micro_batch in range(dense.MICRO_BATCHES):
            x, target = dense.batch(step, micro_batch, torch.float64)
            (F.mse_loss(dense.dense_forward(weights, x), target) / dense.MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        gradients = {name: w.grad for name, w in weights.items() if w.grad is not None}
        for name, parameters in reference_groups(gradients, chosen):
            for matrix, gradient in zip(parts[name], parameters, strict=True):
                matrix.grad = gradient.detach()
        muon.step()
        adamw.step()
        for weight in weights.values():
            weight.grad = None
    return {name: weight.detach() for name, weight in weights.items()}


def is_dense_matrix(name: str) -> bool:
    return name.endswith("weight")


def rate_of(name: str) -> float:
    return 0.02 if name.startswith("1.") else 0.05


def with_rates(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Muon's groups cut in two where layer "1" has another learning rate."""
    names = {p: name for name, p in module.named_parameters()}
    split = [
        {**group, "params": [p for p in group["params"] if rate_of(names[p]) == rate], "lr": rate}
        for group in groups
        for rate in (0.02, 0.05)
    ]
    return [group for group in split if group["params"]]


def build(size: int, in_three: bool = False, **options: Any) -> tuple[sml.SwiftMoEEngine, Any, list[Any]]:
    """The engine, the model to run, and its optimizer.

    in_three: torch's own Muon for the dense matrices, AdamW for the second layer's experts.
    """
    module = models.build(torch.float64)
    config = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=5, expert_parallel_size=size, **options)
    engine = sml.SwiftMoEEngine(module, config)
    model = engine.data_parallel()
    optimizers: list[Any]
    if in_three:
        *muon, _ = sml.muon_groups(module[1].experts)
        dense_matrices = [{"params": [p for name, p in module.named_parameters() if is_dense_matrix(name)]}]
        rest = [p for name, p in module.named_parameters() if not is_dense_matrix(name) and "1.experts" not in name]
        optimizers = [
            sml.Muon(with_rates(module, muon), **OPTIONS),
            torch.optim.Muon(with_rates(module, dense_matrices), **OPTIONS),
            torch.optim.AdamW(rest, **ADAMW),
        ]
    else:
        *muon, rest = sml.muon_groups(module, **ADAMW)
        optimizers = [sml.Muon([*with_rates(module, muon), rest], **OPTIONS)]
    return engine, model, [engine.prepare_optimizer(optimizer) for optimizer in optimizers]


def train(engine: Any, model: Any, optimizers: list[Any], steps: range) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        for micro_batch in range(dense.MICRO_BATCHES):
            last = micro_batch == dense.MICRO_BATCHES - 1
            x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, micro_batch, torch.float64))
            with nullcontext() if last else model.no_sync():
                (F.mse_loss(model(x), target) / dense.MICRO_BATCHES).backward()
        engine.clip_grad_norm_(0.5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train_cases(cases: list[tuple[int, dict[str, Any]]]) -> list[tuple[dict[str, Tensor], int]]:
    outcomes = []
    for size, options in cases:
        engine, model, optimizers = build(size, **options)
        train(engine, model, optimizers, range(STEPS))
        outcomes.append((engine.full_state_dict(), engine.traffic["update"]))
    return outcomes


CASES: dict[int, list[tuple[int, dict[str, Any]]]] = {
    2: [(2, {}), (2, {"dense": "fsdp2", "offload_optimizer": True}), (2, {"in_three": True})],
    4: [(2, {}), (2, {"dense": "fsdp2"}), (2, {"dense": "hsdp"}), (4, {"offload_optimizer": True})],
}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_torchs_muon_on_one_process(world_size: int) -> None:
    names = [name for name in models.build().state_dict() if is_matrix(name)]
    chosen = {False: names, True: [name for name in names if is_dense_matrix(name) or "1.experts" in name]}
    expected = {only: train_reference(chosen[only]) for only in chosen}
    start = models.build(torch.float64).state_dict()
    assert all(relative_error(expected[False][name], value) > 0.05 for name, value in start.items())
    cases = CASES[world_size]
    for rank in run_ranks(train_cases, world_size, cases):
        for (size, options), (state, _) in zip(cases, rank, strict=True):
            reference = expected[options.get("in_three", False)]
            errors = {name: relative_error(state[name], reference[name]) for name in reference}
            assert max(errors.values()) <= 1e-12, (size, options, errors)


def step_with_given_gradients(
    dtype: torch.dtype, activation: str, size: int, most_elements: int
) -> tuple[dict[str, Tensor], int]:
    """Two steps of gradients that are the same on any number of ranks."""
    torch.manual_seed(0)
    module = sml.MoE(dim=8, hidden_dim=16, num_experts=6, top_k=1, activation=activation, dtype=dtype)
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(expert_parallel_size=size or None, slots_per_rank=6))
    groups = sml.muon_groups(module.experts)
    optimizer = engine.prepare_optimizer(sml.Muon([g for g in groups if g["params"]], **OPTIONS))
    with patch("swiftmoe_lightning.distributed.matrix_exchange.MOST_ELEMENTS", most_elements):
        for _ in range(2):
            for parameter in module.experts.parameters():
                gradient = torch.randn(parameter.shape).to(dtype)
                if size:
                    gradient = sharded_like(shard_of(gradient, parameter).clone(), parameter)
                parameter.grad = gradient
            optimizer.step()
    engine.wait_for_weights()
    state = {name: full_tensor(p).detach() for name, p in module.experts.named_parameters()}
    return state, engine.traffic["update"]


# In buckets of a matrix for each rank, or in one.
GIVEN = [(torch.float32, "swiglu", 1), (torch.bfloat16, "swiglu", 1 << 20), (torch.float32, "relu2", 1)]


def steps_with_given_gradients(size: int) -> list[tuple[dict[str, Tensor], int]]:
    return [step_with_given_gradients(dtype, activation, size, most) for dtype, activation, most in GIVEN]


def test_ranks_equal_one_process_to_the_bit_given_the_gradients() -> None:
    expected = steps_with_given_gradients(0)
    assert [sent for _, sent in expected] == [0, 0, 0]
    for rank in run_ranks(steps_with_given_gradients, 4, 2):
        for (dtype, _, _), (state, _), (reference, _) in zip(GIVEN, rank, expected, strict=True):
            # torch's kernels round the last few of a bfloat16 tensor's elements otherwise than the rest.
            tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-3}
            torch.testing.assert_close(state, reference, **tolerance)
        # N = 6 * 2 * 128 elements, W = 4, two steps: 4 N (W - 1) / W**2 each.
        assert rank[-1][1] == 2 * 4 * 1536 * 3 // 16


def save_or_resume(folder: str, resumes: bool) -> dict[str, Tensor]:
    """Half of the steps and a checkpoint; or, on other ranks, the rest from it."""
    engine, model, optimizers = build(dist.get_world_size(), dense="fsdp2")
    half = STEPS // 2
    if resumes:
        saved = torch.load(Path(folder, "half.pt"), weights_only=True)
        engine.module.load_state_dict(saved["model"])
        optimizers[0].load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["engine"])
    else:
        train(engine, model, optimizers, range(half))
        whole = checkpoint.full_state(
            {"model": engine.module.state_dict(), "optimizer": optimizers[0].state_dict()}, keep=dist.get_rank() == 0
        )
        if dist.get_rank() == 0:
            torch.save({**whole, "engine": engine.state_dict()}, Path(folder, "half.pt"))
        return {}
    train(engine, model, optimizers, range(half, STEPS))
    return engine.full_state_dict()


def test_a_run_resumes_on_other_ranks(tmp_path: Path) -> None:
    expected = train_reference([name for name in models.build().state_dict() if is_matrix(name)])
    run_ranks(save_or_resume, 2, str(tmp_path), False)
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    states = saved["optimizer"]["state"].values()
    assert (5, 14, 10) in [tuple(state["momentum_buffer"].shape) for state in states if "momentum_buffer" in state]
    for state in run_ranks(save_or_resume, 3, str(tmp_path), True):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors


def different_gradients() -> None:
    engine, model, (optimizer,) = build(2)
    x, target = (models.my_part(t, dist.get_rank(), 2) for t in dense.batch(0, 0, torch.float64))
    F.mse_loss(model(x), target).backward()
    if dist.get_rank() == 1:
        engine.module[1].experts.down_proj.grad = None
    optimizer.step()


def prepare(groups: Callable[[nn.Module], Any], kind: Any = sml.Muon) -> Any:
    module = models.build(torch.float64)
    return sml.SwiftMoEEngine(module).prepare_optimizer(kind(groups(module)))


def added_later() -> None:
    module = models.build(torch.float64)
    muon = sml.SwiftMoEEngine(module).prepare_optimizer(sml.Muon(sml.muon_groups(module[2])))
    muon.add_param_group({"params": [module[1].experts.gate_up_proj], "experts": "interleaved"})


BIASES: Callable[[], Any] = partial(prepare, lambda module: [module[2].experts.up_proj_bias])
MISUSES: dict[str, Callable[[], Any]] = {
    "have gradients of [5, 4] stacks of them, by rank": different_gradients,
    "sml.Muon(sml.muon_groups(model)) updates experts and": partial(
        prepare, lambda module: [module[2].experts.up_proj_bias], torch.optim.Muon
    ),
    "'1.experts.gate_up_proj', of shape [5, 14, 10], is in a group of Muon's with experts='matrix', ": partial(
        prepare, lambda module: [{"params": [*module[1].experts.parameters()], "experts": "matrix"}]
    ),
    "is cut as (Shard(dim=1),) over (2,) ranks (biases of experts, and": BIASES,
    "needs experts='halves', transposed=False": added_later,
}


def misuses() -> list[str]:
    said = []
    for misuse in MISUSES.values():
        try:
            misuse()
            said.append("nothing was wrong")
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_what_would_be_wrong_is_refused_on_every_rank() -> None:
    for said in run_ranks(misuses, 2):
        for message, error in zip(MISUSES, said, strict=True):
            assert message in error
            assert "(FAQ: " in error


def test_what_would_be_wrong_is_refused_on_one_process() -> None:
    with pytest.raises(ValueError, match="'2.experts.up_proj_bias', of .* needs use_muon=False"):
        BIASES()
    with pytest.raises(ValueError, match="needs experts='halves', transposed=False"):
        added_later()
    three = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="with experts=None has 2-D parameters, got one of shape \\[2, 3, 4\\]"):
        sml.Muon([three])
    with pytest.raises(ValueError, match="transposed is for experts"):
        sml.Muon([{"params": [three[0].detach()], "transposed": True}])
    with pytest.raises(ValueError, match="experts must be one of 'matrix', 'halves', 'interleaved', got 'two'"):
        sml.Muon([{"params": [three], "experts": "two"}])
    with pytest.raises(ValueError, match="adjust_lr_fn must be one of"):
        sml.Muon([three[0].detach()], adjust_lr_fn="rms")
    with pytest.raises(ValueError, match="momentum must be 0 or more, got -1"):
        sml.Muon([three[0].detach()], momentum=-1)
    with pytest.raises(ValueError, match="ns_coefficients must be three numbers"):
        sml.Muon([three[0].detach()], ns_coefficients=(1.0, 2.0))


def scaled_steps() -> dict[str, Tensor]:
    """Steps under a loss scaler, of which one is skipped: its gradients overflow on one rank."""
    engine, model, (optimizer,) = build(2)
    scaler = engine.grad_scaler("cpu", init_scale=4.0)
    for step in range(3):
        x, target = (models.my_part(t, dist.get_rank(), 2) for t in dense.batch(step, 0, torch.float64))
        loss = F.mse_loss(model(x), target)
        scaler.scale(loss * (float("inf") if step == 1 and dist.get_rank() == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return engine.full_state_dict()


def plain_steps() -> dict[str, Tensor]:
    engine, model, (optimizer,) = build(2)
    for step in (0, 2):
        x, target = (models.my_part(t, dist.get_rank(), 2) for t in dense.batch(step, 0, torch.float64))
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


def both_steps() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return scaled_steps(), plain_steps()


def test_a_loss_scaler_skips_a_step_on_all_ranks() -> None:
    for scaled, plain in run_ranks(both_steps, 2):
        assert all(relative_error(scaled[name], value) <= 1e-12 for name, value in plain.items())
