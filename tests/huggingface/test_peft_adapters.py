"""PEFT's LoRA on experts: converted models compute, train, save and load as PEFT's own do."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint import load_model, load_optimizers, save_directory
from swiftmoe_lightning.placement import plan_collection, plan_distribution
from tests import hf_models
from tests.engine.models import RandomPolicy, my_part
from tests.helpers import nightly, run_ranks
from tests.huggingface.test_trainer import rows

peft = pytest.importorskip("peft")

STEPS, RESUMED = 6, 3
# Plain; biases, [in, out], interleaved gates.
FAMILIES = ["mixtral", "gpt_oss"]
# No gates; every token for each expert, [in, out]. The first sums experts in float32 itself, whatever its dtype.
MORE_FAMILIES = ["nemotron_h", "llama4_text"]


def lora(**options: Any) -> Any:
    """r below and above the number of ranks, and random factors: PEFT's B of zeros would hide A."""
    defaults = {
        "r": 3,
        "rank_pattern": {"down_proj": 1},
        "lora_alpha": 5,
        "init_lora_weights": False,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"],
    }
    return peft.LoraConfig(**(defaults | options))


def base(family: str) -> Any:
    model = hf_models.build(family)
    if family != "llama4_text":
        # The default one takes no float64.
        model.set_experts_implementation("eager")
    return model.double()


def of_peft(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call PEFT, which uses a deprecated name of transformers 5.24, and asks the hub for models without a name.

    From 0.21 on it says that a rank_pattern of parameters is ignored, and does not ignore it.
    """
    with warnings.catch_warnings():
        for known in ("`is_gradient_checkpointing`", "Could not find a config file", ".* rank_pattern keys"):
            warnings.filterwarnings("ignore", known)
        return make(*args, **options)


def adapted(family: str, seed: int = 0, **options: Any) -> Any:
    model = of_peft(peft.get_peft_model, base(family), lora(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def experts_of(model: nn.Module) -> list[sml.Experts]:
    return [module for module in model.modules() if isinstance(module, sml.Experts)]


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=hf_models.tokens(99)).logits.detach()
    return out


class Run:
    """A model with its engine and optimizer on each rank."""

    def __init__(self, family: str, seed: int, frees_slots: bool = False) -> None:
        self.model = sml.convert(adapted(family, seed))
        config = sml.SwiftMoEConfig(slots_per_rank=4, placement="balanced", reshard_after_forward=frees_slots)
        self.engine = sml.SwiftMoEEngine(self.model, config)
        self.wrapped = self.engine.data_parallel()
        self.optimizer = self.engine.prepare_optimizer(torch.optim.AdamW(trained(self.model), lr=1e-2))
        self.placements: set[tuple[int, ...]] = set()

    def step(self, number: int) -> float:
        ids = my_part(hf_models.tokens(number), dist.get_rank(), dist.get_world_size())
        loss = self.wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        for layer in self.engine.layers:
            self.placements.add(tuple(layer.placement.slot_to_expert_S.tolist()))
            assert all(weight.grad is None for weight in layer.slots.weights.values())
            for parameter in layer.experts.parameters():
                assert (parameter.grad is not None) == parameter.requires_grad
        self.engine.clip_grad_norm_(0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def train_ranks(families: list[str], folder: str, frees_slots: bool) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Train each family, stop in the middle and resume in another model, and save. Losses, and placements seen."""
    losses, num_placements = {}, {}
    for family in families:
        # Only rank 0's values may count.
        run, saved = Run(family, dist.get_rank(), frees_slots), Path(folder, f"{family}-checkpoint")
        losses[family] = [run.step(number) for number in range(RESUMED)]
        save_directory(saved, run.model, [run.optimizer], {})
        state = run.engine.state_dict()
        seen, run = run.placements, Run(family, 7, frees_slots)
        load_model(saved, run.model)
        load_optimizers(saved, run.model, [run.optimizer])
        run.engine.load_state_dict(state)
        losses[family] += [run.step(number) for number in range(RESUMED, STEPS)]
        num_placements[family] = len(seen | run.placements)
        of_peft(run.model.save_pretrained, Path(folder, family))
        whole = run.engine.full_state_dict()
        if dist.get_rank() == 0:
            of_peft(run.model.save_pretrained, Path(folder, f"{family}-whole"), state_dict=whole)
    return losses, num_placements


def train_alone(family: str, world_size: int) -> tuple[Any, list[list[float]]]:
    """The same in one process, by PEFT. Returns the model, and the losses of each rank's parts."""
    model = adapted(family)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses: list[list[float]] = [[] for _ in range(world_size)]
    for step in range(STEPS):
        for rank in range(world_size):
            ids = my_part(hf_models.tokens(step), rank, world_size)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / world_size).backward()
            losses[rank].append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


@pytest.mark.parametrize(
    ("world_size", "families", "frees_slots"),
    [(2, FAMILIES, False), (4, ["mixtral"], True), *nightly((4, ["mixtral"], False), (2, FAMILIES, True))],
)
def test_steps_on_ranks_equal_steps_of_peft_alone(
    world_size: int, families: list[str], frees_slots: bool, tmp_path: Path
) -> None:
    outcomes = run_ranks(train_ranks, world_size, families, str(tmp_path), frees_slots)
    for family in families:
        expected, expected_losses = train_alone(family, world_size)
        for (losses, num_placements), alone in zip(outcomes, expected_losses, strict=True):
            assert losses[family] == pytest.approx(alone, rel=1e-9)
            assert num_placements[family] > 2
        for name in (family, f"{family}-whole"):
            # PEFT's own, without this package.
            loaded = of_peft(peft.PeftModel.from_pretrained, base(family), tmp_path / name)
            torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(expected), rtol=1e-9, atol=1e-9)


def named(module: nn.Module, of: str) -> dict[str, Tensor]:
    """PEFT's names -> values, or gradients in PEFT's layout."""
    if of == "gradients":
        gradients = [parameter.grad for parameter in trained(module)]
        module = copy.deepcopy(module)
        with torch.no_grad():
            for parameter, gradient in zip(trained(module), gradients, strict=True):
                assert gradient is not None
                parameter.copy_(gradient)
    return dict(of_peft(peft.get_peft_model_state_dict, module))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_converted_model_computes_saves_and_loads_as_peft_on_one_device(family: str) -> None:
    close = {"rtol": 1e-4, "atol": 1e-6} if family == "nemotron_h" else {"rtol": 1e-9, "atol": 1e-11}
    model = adapted(family, use_rslora=True)
    expected_state = named(model, "values")
    model(input_ids=hf_models.tokens(0), labels=hf_models.tokens(0)).loss.backward()
    expected_gradients = named(model, "gradients")
    with model.disable_adapter():
        expected_base = logits(model)
    expected = logits(model)
    model.zero_grad()

    sml.convert(model)
    assert all(experts.adapters.scales for experts in experts_of(model))
    torch.testing.assert_close(named(model, "values"), expected_state, rtol=0, atol=0)
    model(input_ids=hf_models.tokens(0), labels=hf_models.tokens(0)).loss.backward()
    torch.testing.assert_close(named(model, "gradients"), expected_gradients, **close)
    torch.testing.assert_close(logits(model), expected, **close)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected_base, **close)

    # Experts converted before PEFT wraps them have the same layout; they are converted once more.
    other = of_peft(peft.get_peft_model, sml.convert(base(family)), lora(use_rslora=True))
    sml.convert(other)
    assert not torch.allclose(logits(other), expected)
    peft.set_peft_model_state_dict(other, expected_state)
    torch.testing.assert_close(logits(other), expected, **close)
    # By the keys that PEFT before 0.21 passes on, and by those of the file, which 0.21 does.
    for adapter in (".default.weight", ".weight"):
        state = {key.replace(".weight", adapter): torch.full_like(value, 0.1) for key, value in expected_state.items()}
        other.load_state_dict(state, strict=False)
        assert all((experts.down_proj_lora_A == 0.1).all() for experts in experts_of(other))
        other.load_state_dict({key.replace(".weight", adapter): value for key, value in expected_state.items()}, False)
        assert not any((experts.down_proj_lora_A == 0.1).any() for experts in experts_of(other))

    for experts in experts_of(model):
        weights = {name: getattr(experts, name).clone() for name in ("down_proj", "down_proj_lora_A")}
        experts.reset_parameters()
        assert not experts.down_proj_lora_B.any()
        assert not any(torch.equal(getattr(experts, name), value) for name, value in weights.items())


def with_two_adapters(family: str = "mixtral", seed: int = 0) -> Any:
    """Another adapter besides, of another rank and scale."""
    model = adapted(family, seed)
    second = lora(r=2, lora_alpha=7)
    try:
        of_peft(model.add_adapter, "second", second)
    except ValueError:
        pytest.skip("PEFT before 0.20 has no second adapter of parameters")
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def states_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    names = ("default", "second")
    states = {name: of_peft(peft.get_peft_model_state_dict, model, adapter_name=name) for name in names}
    # Not the model's own memory.
    return {name: {key: value.clone() for key, value in state.items()} for name, state in states.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_several_adapters_is_computed_and_each_saves_and_loads_as_pefts(family: str) -> None:
    close = {"rtol": 1e-9, "atol": 1e-11}
    model = with_two_adapters(family)
    expected_states, expected, num_trained = states_of(model), {}, {}
    for name in ("second", "default"):
        model.set_adapter(name)
        expected[name], num_trained[name] = logits(model), sum(p.numel() for p in trained(model))
    sml.convert(model)
    torch.testing.assert_close(logits(model), expected["default"], **close)
    torch.testing.assert_close(states_of(model), expected_states, rtol=0, atol=0)
    for name in ("second", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], **close)
        assert sum(p.numel() for p in trained(model)) == num_trained[name]
    # A file does not say whose it is: the second adapter takes it, the first stays.
    second = {key: value + 1 for key, value in expected_states["second"].items()}
    peft.set_peft_model_state_dict(model, second, adapter_name="second")
    expected_states["second"] = second
    torch.testing.assert_close(states_of(model), expected_states, rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"\['default', 'second'\] are active, and experts compute one.*lora-on-experts"
    ):
        model.base_model.set_adapter(["default", "second"])


def loss_beside_reference(model: Any, forward: Any, ids: Tensor) -> Tensor:
    """The second adapter is the reference, forwarded between forward and backward of the one that is trained."""
    policy = forward(input_ids=ids).logits
    model.set_adapter("second")
    with torch.no_grad():
        reference = model(input_ids=ids).logits
    model.set_adapter("default")
    return (policy - reference).square().mean()


def train_beside_reference(folder: str) -> None:
    model = sml.convert(with_two_adapters(seed=10 * dist.get_rank()))
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(slots_per_rank=4, placement=RandomPolicy))
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(trained(model), lr=1e-2))
    for step in range(STEPS):
        ids = my_part(hf_models.tokens(step), dist.get_rank(), dist.get_world_size())
        loss_beside_reference(model, wrapped, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    of_peft(model.save_pretrained, folder)


def test_an_adapter_trains_beside_a_reference_adapter_as_in_peft_alone(tmp_path: Path) -> None:
    model = with_two_adapters()
    run_ranks(train_beside_reference, 2, str(tmp_path))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for step in range(STEPS):
        loss_beside_reference(model, model, hf_models.tokens(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = of_peft(peft.PeftModel.from_pretrained, base("mixtral"), tmp_path)
    of_peft(loaded.load_adapter, tmp_path / "second", "second")
    torch.testing.assert_close(states_of(loaded), states_of(model), rtol=1e-9, atol=1e-9)


DIM, HIDDEN, E = 8, 12, 5
# Rows and elements of a row of each tensor of an expert: the frozen ones, and factors of ranks 3 and 1.
BASE = ((2 * HIDDEN, DIM), (DIM, HIDDEN))
ADAPTER = ((3, DIM), (2 * HIDDEN, 3), (1, HIDDEN), (DIM, 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.moe = nn.Linear(DIM, DIM), sml.MoE(DIM, HIDDEN, E, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(self.q_proj(x))
        return out


def adapted_block() -> Any:
    return sml.convert(of_peft(peft.get_peft_model, Block(), lora()))


def count_bytes(placement: Any) -> tuple[dict[str, int], dict[str, int], str]:
    """Bytes that this rank has sent in four steps, what the plans say, and what a write to frozen weights ends in."""
    model, rank = adapted_block(), dist.get_rank()
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(slots_per_rank=4, placement=placement))
    optimizer = engine.prepare_optimizer(torch.optim.SGD(trained(model), lr=0.1))
    (layer,) = engine.layers

    def backward(step: int) -> None:
        model(torch.randn(16, DIM, generator=torch.Generator().manual_seed(2 * step + rank))).square().mean().backward()

    # The first forward fetches all weights.
    expected = {"collect": 0, "distribute": 4 * plan_distribution(layer.placement, BASE + ADAPTER).elements_sent(rank)}
    for step in range(4):
        before = layer.placement
        expected["collect"] += 4 * plan_collection(before, ADAPTER).elements_sent(rank)
        backward(step)
        optimizer.step()
        for sent, arrives_P in ((ADAPTER, None), (BASE, before.arrivals(layer.placement))):
            expected["distribute"] += 4 * plan_distribution(layer.placement, sent, arrives_P).elements_sent(rank)
    engine.wait_for_weights()
    actual = {phase: engine.traffic[phase] for phase in expected}

    x = torch.ones(3, DIM)
    for announced in (True, False):
        backward(9)
        with torch.no_grad():
            layer.experts.down_proj.mul_(2)
        if announced:
            engine.mark_stale()
        optimizer.step()
        try:
            out = model(x)
        except RuntimeError as error:
            return actual, expected, str(error)
        whole = adapted_block()
        whole.load_state_dict(engine.full_state_dict())
        torch.testing.assert_close(out, whole(x))
    return actual, expected, ""


def test_only_factors_travel_while_the_placement_stays() -> None:
    assert sum(rows * width for rows, width in ADAPTER) == 116
    for rank, (actual, expected, error) in enumerate(run_ranks(count_bytes, 2, "static")):
        assert actual == expected
        # Rank 0 owns 2, 12, 1 and 4 rows of 8, 3, 12 and 1 elements, 68 of the 116, and has 2 of the 5 experts.
        assert actual["collect"] == 4 * 4 * (2 * 48, 3 * 68)[rank]
        assert "FAQ: stale-weights" in error


def test_frozen_weights_travel_to_ranks_that_did_not_have_them() -> None:
    for actual, expected, error in run_ranks(count_bytes, 2, RandomPolicy):
        assert actual == expected
        assert "FAQ: stale-weights" in error


def with_two_active() -> Any:
    model = with_two_adapters()
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> Any:
    model = adapted("mixtral")
    model.merge_adapter()
    return model


def of_a_bias() -> Any:
    return adapted("gpt_oss", target_parameters=["experts.gate_up_proj_bias"])


def twice() -> Any:
    model = sml.convert(adapted("mixtral"))
    try:
        of_peft(model.add_adapter, "second", lora())
    except ValueError:
        pytest.skip("PEFT before 0.20 has no second adapter of parameters")
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_two_active, r"the adapters \['default', 'second'\] are active, and experts compute one"),
        (merged, r"their adapter is merged: model.unmerge_adapter\(\) before convert\(\)"),
        (of_a_bias, "gate_up_proj_bias has an adapter: target_parameters can be gate_up_proj, up_proj, down_proj"),
        (twice, "they have adapters already, which convert"),
    ],
)
def test_what_cannot_be_taken_over_is_named_with_the_reason(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sml.convert(make())


def test_an_older_peft_is_refused_with_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("mixtral")
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.raises(ValueError, match=r"PEFT 0\.18\.1 lays .* another way: pip install 'peft>=0\.20'"):
        sml.convert(model)


def test_merging_beside_the_experts_is_refused_with_the_fix() -> None:
    model = sml.convert(adapted("mixtral"))
    with pytest.raises(ValueError, match=r"Save it by model.save_pretrained\(folder\).*\(FAQ: lora-on-experts\)"):
        model.merge_and_unload()


def test_an_adapter_for_each_row_is_refused_with_the_fix() -> None:
    model = sml.convert(with_two_adapters("mixtral")).eval()
    with pytest.raises(ValueError, match=r"one adapter for all rows.*Call model.set_adapter\(\).*\(FAQ: lora-on-"):
        model(input_ids=hf_models.tokens(0, 2), adapter_names=["default", "second"])


def train_by_trainer(folder: str) -> list[dict[str, Tensor]]:
    """The adapter after four steps of the Trainer, and after two more from its checkpoint of step 2."""
    from transformers import TrainingArguments

    states = []
    for seed, resumed in ((int(os.environ["RANK"]), None), (7, str(Path(folder, "checkpoint-2")))):
        args = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = sml.SwiftMoETrainer(adapted("mixtral", seed).float(), args, train_dataset=rows(0, 40))
        of_peft(trainer.train, resume_from_checkpoint=resumed)
        assert trainer.engine is not None
        assert len(trainer.engine.layers) == 2
        states.append(trainer.engine.full_state_dict())
    return states


def test_the_trainer_resumes_an_adapter_of_experts(tmp_path: Path) -> None:
    for through, resumed in run_ranks(train_by_trainer, 2, str(tmp_path), init=False):
        torch.testing.assert_close(resumed, through, rtol=1e-5, atol=1e-6)
    assert {"adapter_config.json", "adapter_model.safetensors"} < {
        p.name for p in (tmp_path / "checkpoint-4").iterdir()
    }
