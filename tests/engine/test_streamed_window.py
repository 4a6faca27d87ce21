"""reshard_after_forward: slots that have memory only around their layer's forward and backward train the same."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine import direct_exchange
from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.engine.slots import ExpertSlots
from tests.engine import dense, models
from tests.engine.test_expert_groups import build, train
from tests.engine.test_matches_dense_reference import relative_error
from tests.engine.test_phases_behind_compute import ALL, NUM_LAYERS, STEPS, Run
from tests.helpers import nightly, rank_errors, run_ranks

STREAMED = {"reshard_after_forward": True}


def start_alone() -> None:
    """A process group of one rank, unless there is one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class FrozenRun(Run):
    """A run in which experts freeze and thaw."""

    def freeze(self, layers: list[int], is_frozen: bool) -> None:
        for layer in layers:
            self.tower.blocks[layer].experts.requires_grad_(not is_frozen)

    def freeze_some(self) -> None:
        """One tensor of each expert alone, so that gradients come before the slots are used for the last time."""
        for block in self.tower.blocks:
            block.experts.up_proj.requires_grad_(False)

    def micro_of_constants(self, order: list[int]) -> None:
        """A forward whose input needs no gradient."""
        self.number += 1
        whole = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(self.number))
        self.tower(models.my_part(whole, self.rank, self.world_size), order, {}).square().mean().backward()

    def two_losses(self) -> None:
        """Both forwards run before the first backward."""
        first, second = self.loss(ALL), self.loss([0, 4])
        first.backward()
        second.backward()


FROZEN: dict[str, list[tuple[Any, ...]]] = {
    "frozen, then thawed": [
        ("freeze", [0, 2, 4], True),
        ("micro", ALL),
        ("step",),
        ("micro", ALL, {1: False, 2: True}),
        ("step",),
        ("freeze", [0, 2], False),
        ("micro", ALL),
        ("step",),
    ],
    "all frozen": [("freeze", ALL, True), ("micro", ALL), ("step",), ("micro", ALL), ("step",)],
    "one tensor frozen": [("freeze_some",), ("micro", ALL), ("step",), ("micro", ALL, {0: False}), ("step",)],
    "inputs without gradients": [("micro_of_constants", ALL), ("step",), ("micro_of_constants", [1, 1, 3]), ("step",)],
    "two forwards, then two backwards": [("two_losses",), ("step",), ("two_losses",), ("step",)],
}


def run_all(size: int | None, least_message: int, options: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    if options:
        start_alone()
    final = {}
    with patch.object(direct_exchange, "_LEAST_MESSAGE", least_message):
        for name, events in {**STEPS, **FROZEN}.items():
            run = FrozenRun(size, **options)
            for method, *arguments in events:
                getattr(run, method)(*arguments)
            assert not options or run.engine.layers
            final[name] = full_state({"model": run.tower.state_dict()}, keep=True)["model"]
    return final


@pytest.mark.parametrize(
    ("world_size", "size", "least_message", "offloads"),
    [
        (1, None, 0, True),
        (4, 2, 0, True),
        *nightly((2, None, 0, False), (2, None, 10**9, True), (4, 2, 10**9, False)),
    ],
)
def test_any_order_of_layers_equals_one_process(
    world_size: int, size: int | None, least_message: int, offloads: bool
) -> None:
    expected = run_all(None, least_message, {})
    options = {**STREAMED, "offload_optimizer": offloads}
    for actual in run_ranks(run_all, world_size, size, least_message, options):
        for name, state in expected.items():
            wrong = [k for k, v in state.items() if not torch.allclose(actual[name][k], v, rtol=1e-9, atol=1e-12)]
            assert not wrong, (name, wrong)


def compiled_state(options: dict[str, Any]) -> dict[str, Tensor]:
    run = Run(**options)
    if options:
        run.tower.compile(backend="aot_eager")
    for _ in range(2):
        run.micro(ALL)
        run.step()
    return full_state({"model": run.tower.state_dict()}, keep=True)["model"]


@pytest.mark.nightly
def test_a_compiled_model_equals_one_process() -> None:
    expected = compiled_state({})
    for state in run_ranks(compiled_state, 2, STREAMED, timeout_s=180):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-12)


def train_and_evaluate(options: dict[str, Any], num_batches: list[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Training with evaluation in the middle, for which ranks have differently many batches."""
    rank, half = dist.get_rank(), dense.STEPS // 2
    engine, model, optimizer = build(2, torch.float64, **options)
    train(engine, model, optimizer, range(half), torch.float64)
    model.eval()
    with torch.inference_mode():
        outputs = [model(dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]) for i in range(num_batches[rank])]
    engine.join()
    model.train()
    train(engine, model, optimizer, range(half, dense.STEPS), torch.float64)
    return engine.full_state_dict(), outputs


@pytest.mark.parametrize("mode", ["fsdp2", *nightly("ddp", "hsdp")])
@pytest.mark.parametrize("num_batches", [[2, 0, 3, 1], *nightly([1, 2, 0, 0])])
def test_groups_train_the_same_around_an_evaluation_of_uneven_batches(mode: str, num_batches: list[int]) -> None:
    start = dict(models.build().state_dict())
    expected = dense.train_dense(start, torch.float64)
    with patch.object(dense, "STEPS", dense.STEPS // 2):
        halfway = dense.train_dense(start, torch.float64)
    options = {**STREAMED, "dense": mode, "offload_optimizer": True}
    for rank, (state, outputs) in enumerate(run_ranks(train_and_evaluate, 4, options, num_batches)):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors
        assert len(outputs) == num_batches[rank]
        for i, output in enumerate(outputs):
            x = dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]
            torch.testing.assert_close(output, dense.dense_forward(halfway, x), rtol=1e-10, atol=1e-12)


class MostSlots(TorchDispatchMode):
    """The most bytes of all layers' slots at a time, as operations see them."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._layers, self.most = run.engine.layers, 0

    def now(self) -> int:
        return sum(w.untyped_storage().nbytes() for layer in self._layers for w in layer.slots.weights.values())

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return out


def bytes_of_slots(order: list[int], saved: dict[int, bool], options: dict[str, Any]) -> tuple[int, int, list[int]]:
    """The most bytes of the slots in two steps, what is left after a backward, and each layer's whole bytes."""
    run = Run(**options)
    run.micro(ALL)
    run.step()
    with MostSlots(run) as memory:
        run.micro(order, saved)
        left = memory.now()
        run.step()
        run.evaluate(order)
        run.micro(order, saved, True)
        run.micro(order, saved)
    return memory.most, left, [sum(w.nbytes for w in layer.slots.weights.values()) for layer in run.engine.layers]


def events_of_a_step() -> list[str]:
    run, events = Run(**STREAMED), []
    for index, block in enumerate(run.tower.blocks):
        block.register_forward_pre_hook(lambda *_, i=index: events.append(f"forward {i}"))
        block.register_full_backward_pre_hook(lambda *_, i=index: events.append(f"backward {i}"))
    index_of = {id(layer.slots): layer.index for layer in run.engine.layers}
    start_distribution = ExpertSlots.start_distribution

    def distribute(slots: ExpertSlots, allows_writes: bool) -> bool:
        events.append(f"distribute {index_of[id(slots)]}")
        return start_distribution(slots, allows_writes)

    run.micro(ALL)
    run.step()
    events.clear()
    with patch.object(ExpertSlots, "start_distribution", distribute):
        run.micro(ALL)
        run.step()
    return events


def bytes_sent(options: dict[str, Any]) -> list[int]:
    """Of each layer, in two steps and a forward whose placements stay."""
    run = Run(placement="static", **options)
    for _ in range(2):
        run.micro(ALL)
        run.step()
    run.loss(ALL)
    return [layer.slots.bytes_sent["distribute"] for layer in run.engine.layers]


def observe() -> dict[str, Any]:
    return {
        "plain": bytes_of_slots(ALL, {}, STREAMED),
        "checkpointed": bytes_of_slots(ALL, dict(enumerate([True, False] * 2)), STREAMED),
        "some layers": bytes_of_slots([0, 4], {}, STREAMED),
        "resident": bytes_of_slots(ALL, {}, {}),
        "events": events_of_a_step(),
        "sent": (bytes_sent({}), bytes_sent(STREAMED)),
    }


@pytest.fixture(scope="module")
def observed() -> list[dict[str, Any]]:
    return run_ranks(observe, 2)


def test_three_layers_have_slots_at_a_time(observed: list[dict[str, Any]]) -> None:
    for results in observed:
        for name, three in {"plain": [2, 3, 4], "checkpointed": [2, 3, 4], "some layers": [0, 1, 2]}.items():
            most, left, whole = results[name]
            assert most == sum(whole[layer] for layer in three), (name, most, whole)
            assert left == 0, name
        most, _, whole = results["resident"]
        assert most == sum(whole)


def test_weights_are_sent_two_layers_ahead_of_forward_and_of_backward(observed: list[dict[str, Any]]) -> None:
    expected = ["forward 0", "distribute 2", "forward 1", "distribute 3", "forward 2", "distribute 4"]
    expected += ["forward 3", "forward 4"]
    # The last layer has kept its slots.
    expected += ["backward 4", "distribute 3", "distribute 2", "backward 3", "distribute 1"]
    expected += ["backward 2", "distribute 0", "backward 1", "backward 0"]
    expected += ["distribute 0", "distribute 1"]
    assert [results["events"] for results in observed] == [expected] * 2


def test_weights_are_sent_twice_a_step_but_for_the_last_layers(observed: list[dict[str, Any]]) -> None:
    for results in observed:
        resident, streamed = results["sent"]
        # Three forwards; and two backwards.
        assert [s / r for s, r in zip(streamed, resident, strict=True)] == [5 / 3] * (NUM_LAYERS - 1) + [1]


def misuse() -> dict[str, str]:
    """The message of each error, which all ranks raise at the same place."""

    def message(call: Any) -> str:
        with pytest.raises(RuntimeError) as caught:
            call()
        return str(caught.value)

    messages = {}
    run = Run(**STREAMED, replace_every=100)
    early = run.loss(ALL)
    run.micro(ALL)
    run.step()
    run.loss(ALL)
    messages["step"] = message(early.backward)
    for marks in (False, True):
        run = Run(**STREAMED)
        loss = run.loss(ALL)
        with torch.no_grad():
            run.tower.blocks[1].experts.down_proj.mul_(2)
        if marks:
            run.engine.mark_stale()
        messages[f"written, {marks}"] = message(loss.backward)
    run = Run(**STREAMED)
    for block in run.tower.blocks:
        block.experts.requires_grad_(False)
    loss = run.loss(ALL)
    run.engine.load_state_dict(run.engine.state_dict())
    messages["frozen"] = message(loss.backward)
    run = Run(**STREAMED)
    run.loss(ALL)
    with torch.no_grad():
        run.tower.blocks[2].experts.down_proj.mul_(2)
    messages["forward"] = message(lambda: run.loss(ALL))
    return messages


def test_weights_that_were_replaced_or_written_are_an_error() -> None:
    for messages in run_ranks(misuse, 2):
        assert "the experts' weights were written since they were last sent" in messages.pop("forward")
        assert len(messages) == 4
        for case, text in messages.items():
            assert "backward through a forward from before the last optimizer step" in text, case


def evaluate_other_layers() -> None:
    run = Run(2, **STREAMED)
    run.evaluate([0, 1])
    run.evaluate([0] if dist.get_rank() < 2 else [4])


def test_groups_that_evaluate_different_layers_are_told() -> None:
    for error in rank_errors(evaluate_other_layers, 4):
        assert "expert groups evaluate different layers: layer " in error
        assert "engine.join() must end the loop" in error


@pytest.mark.parametrize("option", ["offload_optimizer", "reshard_after_forward"])
def test_without_a_process_group_the_error_says_how_to_make_one(option: str) -> None:
    with pytest.raises(RuntimeError, match=r"torchrun \(--nproc-per-node 1 for one device\).*HashStore\(\)"):
        sml.SwiftMoEEngine(models.build(), sml.SwiftMoEConfig(**{option: True}))
