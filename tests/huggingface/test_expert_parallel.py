"""`ep_implementation="swiftmoe"` trains as one process does, and as transformers' own expert parallelism does."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.distributed import full_tensor
from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.huggingface.sharded_at_load import engine_of
from tests import hf_models
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, rank_errors, run_ranks

transformers = pytest.importorskip("transformers", minversion="5.24")

# Halves and interleaved, transposed, biases, clamps, no gate, shared experts.
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"]
STEPS = 10
NUM_EXPERTS = 7


def save(family: str, folder: Path, num_experts: int = NUM_EXPERTS) -> str:
    """The folder of a random model of this family."""
    model = hf_models.build(family, num_experts=num_experts)
    # Its auxiliary loss is of each rank's tokens, in transformers' own expert parallelism, too.
    model.config.output_router_logits = False
    model.save_pretrained(folder / family)
    return str(folder / family)


def load(path: str, implementation: str = "swiftmoe", placement: Any = RandomPolicy, **sizes: int) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    sml.register_hf_experts(sml.SwiftMoEConfig(placement=placement, slots_per_rank=NUM_EXPERTS - 1))
    sizes = {"fsdp_size": dist.get_world_size(), "ep_size": 2, **sizes}
    distributed_config = DistributedConfig(**sizes, ep_implementation=implementation)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=distributed_config)


def data_rank(tp_size: int) -> tuple[int, int]:
    """Which part of a batch this rank has, of how many."""
    return dist.get_rank() // tp_size, dist.get_world_size() // tp_size


def train(model: Any, part: tuple[int, int] = (0, 1), seen: set[str] | None = None) -> list[float]:
    """A loop as transformers' documentation has it. Returns the losses of the global batches.

    Args:
        model: loaded with or without ranks.
        part: of every batch that this rank has, of how many.
        seen: gets the placement of every step.
    """
    model.train()
    by_mesh = defaultdict(list)
    for parameter in model.parameters():
        by_mesh[getattr(parameter, "device_mesh", None)].append(parameter)
    # A group for each mesh, as the Trainer makes them: the stock optimizer cannot mix them.
    optimizer = torch.optim.AdamW([{"params": group} for group in by_mesh.values()], lr=1e-2, eps=1e-6)
    losses = []
    for step in range(STEPS):
        ids = hf_models.tokens(step).chunk(part[1])[part[0]]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if seen is not None and (engine := engine_of(model)) is not None:
            seen.add(str(engine.placements))
        optimizer.step()
        optimizer.zero_grad()
        loss = full_tensor(loss.detach())
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(float(loss))
    return losses


def train_families(
    paths: list[str], implementation: str, sizes: dict[str, int]
) -> list[tuple[list[float], dict[str, Tensor]]]:
    # torch's, of the views that tensor-parallel modules return.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    trained = []
    for path in paths:
        model = load(path, implementation, **sizes)
        seen: set[str] = set()
        losses = train(model, data_rank(sizes.get("tp_size", 1)), seen)
        assert len(seen) == (STEPS if implementation == "swiftmoe" else 0)
        trained.append((losses, full_state(dict(model.state_dict()), keep=True)))
    return trained


def assert_like_one_process(paths: list[str], world_size: int, sizes: dict[str, int]) -> None:
    ranks = run_ranks(train_families, world_size, paths, "swiftmoe", sizes, timeout_s=120)
    for i, path in enumerate(paths):
        alone = transformers.AutoModelForCausalLM.from_pretrained(path)
        expected = train(alone)
        for losses, state in (trained[i] for trained in ranks):
            assert losses == pytest.approx(expected, rel=1e-4), path
            assert state.keys() == alone.state_dict().keys()
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_six_families_train_like_one_process(tmp_path: Path) -> None:
    assert_like_one_process([save(family, tmp_path) for family in FAMILIES], 2, {})


@pytest.mark.parametrize(
    ("families", "sizes"),
    [
        (FAMILIES, {}),
        # The last rank's part of 5 experts would be none.
        *nightly((["mixtral"], {"ep_size": 4})),
        (["deepseek_v3"], {"fsdp_size": 2, "dp_replicate_size": 2}),
        *nightly((["qwen3_moe", "mixtral"], {"fsdp_size": 2, "tp_size": 2})),
        (["qwen3_moe"], {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
    ],
)
def test_several_groups_train_like_one_process(families: list[str], sizes: dict[str, int], tmp_path: Path) -> None:
    num_experts = 5 if sizes.get("ep_size") == 4 else NUM_EXPERTS
    assert_like_one_process([save(family, tmp_path, num_experts) for family in families], 4, sizes)


def test_ranks_that_all_have_the_same_tokens_train_like_one_process(tmp_path: Path) -> None:
    assert_like_one_process([save("qwen3_moe", tmp_path)], 2, {"fsdp_size": 1, "tp_size": 2})


def test_losses_are_those_of_transformers_own_expert_parallelism(tmp_path: Path) -> None:
    paths = [save(family, tmp_path, num_experts=6) for family in ("qwen3_moe", "gpt_oss")]
    ours, theirs = (run_ranks(train_families, 2, paths, kind, {}) for kind in ("swiftmoe", "all_to_all"))
    for (our_losses, _), (their_losses, _) in zip(ours[0], theirs[0], strict=True):
        assert our_losses == pytest.approx(their_losses, rel=1e-5)


def trainer(model: Any, folder: str, *, ours: bool = False, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    more = {name: options.pop(name) for name in ("swiftmoe_config",) if name in options}

    defaults: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": 0.3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    batches = {f"per_device_{part}_batch_size": 4 // num_ranks for part in ("train", "eval")}
    arguments = TrainingArguments(folder, **{**defaults, **batches, **options})
    rows = [{"input_ids": ids, "labels": ids} for step in range(12) for ids in hf_models.tokens(step)]
    kind: Any = sml.SwiftMoETrainer if ours else Trainer
    return kind(model, arguments, train_dataset=rows, eval_dataset=rows[:8], **more)


def logs(made: Any) -> dict[str, list[float]]:
    history = made.state.log_history
    return {key: [float(e[key]) for e in history if key in e] for key in ("loss", "grad_norm", "eval_loss")}


def same(actual: dict[str, list[float]], expected: dict[str, list[float]], tolerance: float = 1e-4) -> None:
    for key, values in expected.items():
        assert actual[key] == pytest.approx(values, rel=tolerance), key


CASES: dict[str, dict[str, Any]] = {
    # Adam would make whole steps of what rounds to another sign.
    "bf16": {"bf16": True, "optim": "sgd"},
    "plain": {},
    "accumulated, evaluated": {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    "activations checkpointed": {"activation_checkpointing": True},
    "not clipped": {"max_grad_norm": 0.0},
}


def train_under_their_trainer(path: str, folder: str) -> dict[str, Any]:
    outcomes: dict[str, Any] = {}
    for case, options in CASES.items():
        made = trainer(load(path), folder, **options)
        made.train()
        outcomes[case] = logs(made)
    # Lets `save_pretrained` of its classes gather, which transformers does itself for the other model.
    sml.SwiftMoEEngine(sml.convert(hf_models.build("qwen3_moe")))
    made.save_model()
    return outcomes


def test_transformers_own_trainer_trains_and_saves(tmp_path: Path) -> None:
    path = save("qwen3_moe", tmp_path)
    ranks = run_ranks(train_under_their_trainer, 2, path, str(tmp_path / "run"), timeout_s=120)
    for case, options in CASES.items():
        alone = trainer(transformers.AutoModelForCausalLM.from_pretrained(path), str(tmp_path / "alone"), **options)
        alone.train()
        # What 8 bits of a mantissa round.
        same(ranks[0][case], logs(alone), tolerance=2e-2 if case == "bf16" else 1e-4)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def bytes_collected(path: str, folder: str, micro_batches: list[int]) -> list[int]:
    collected = []
    for number in micro_batches:
        model = load(path, placement="static")
        made = trainer(model, folder, max_steps=2, gradient_accumulation_steps=number)
        made.train()
        engine = engine_of(model)
        assert engine is not None
        collected.append(engine.traffic["collect"])
    return collected


def test_gradients_of_experts_travel_once_a_step(tmp_path: Path) -> None:
    path = save("qwen3_moe", tmp_path)
    ((once, thrice), _) = run_ranks(bytes_collected, 2, path, str(tmp_path / "run"), [1, 3])
    assert once == thrice > 0


SAVES = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}


def train_ours(path: str, folder: str, ep_size: int, resume: str | None) -> dict[str, list[float]]:
    made = trainer(load(path, ep_size=ep_size), folder, ours=True, **SAVES)
    if resume is not None:
        # Leaves weights gathered, and slots filled.
        made.evaluate()
    made.train(resume_from_checkpoint=resume)
    return logs(made)


def test_a_run_resumes_with_other_numbers_of_ranks_and_other_groups_and_without_us(tmp_path: Path) -> None:
    path, folder = save("qwen3_moe", tmp_path), tmp_path / "run"
    checkpoint = str(folder / "checkpoint-3")
    expected = run_ranks(train_ours, 4, path, str(folder), 2, None)[0]
    assert len(expected["loss"]) == 6
    for world_size, ep_size in ((2, 2), (4, 4)):
        resumed = run_ranks(train_ours, world_size, path, str(tmp_path / "again"), ep_size, checkpoint)[0]
        same({key: resumed[key] for key in ("loss", "grad_norm")}, {k: expected[k] for k in ("loss", "grad_norm")})
    assert json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] == 3
    alone = trainer(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / "alone"), **SAVES)
    alone.train(resume_from_checkpoint=checkpoint)
    same(logs(alone), expected)


def refuse(path: str, case: str) -> None:
    model = load(path)
    # A rank that has raised would no longer help the others to connect the groups.
    dist.barrier()
    if case == "config":
        trainer(model, path, ours=True, swiftmoe_config=sml.SwiftMoEConfig())
    else:
        trainer(model, path, ours=True, fp16=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("config", r"Call register_hf_experts\(config\) before from_pretrained"),
        ("fp16", "without undoing the loss scale. Use bf16=True"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_fix(case: str, message: str, tmp_path: Path) -> None:
    for error in rank_errors(refuse, 2, save("qwen3_moe", tmp_path), case):
        assert re.search(message, error), error


@pytest.mark.parametrize("options", [{"dense": "fsdp2"}, {"expert_parallel_size": 2}])
def test_settings_of_transformers_are_refused_here(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"are fsdp_size .* and ep_size of transformers' DistributedConfig"):
        sml.register_hf_experts(sml.SwiftMoEConfig(**options))


def test_a_transformers_without_the_names_that_are_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.distributed import expert_parallel

    monkeypatch.delattr(expert_parallel, "MoEParamShard")
    monkeypatch.delitem(sys.modules, "swiftmoe_lightning.huggingface.expert_parallel", raising=False)
    message = (
        r"transformers \S+ lacks .*\.MoEParamShard\. Install one that has them: pip install 'transformers>=5.24,<6'"
    )
    with pytest.raises(ImportError, match=message):
        sml.register_hf_experts()


def save_directory(path: str, folder: str) -> dict[str, Tensor]:
    """The state of a trained model of 2 groups of 2, whose ranks each write their part of it."""
    model = load(path)
    train(model, data_rank(1))
    model.save_pretrained(folder, distributed_checkpoint=True)
    return full_state(dict(model.state_dict()), keep=True)


def load_directory(folder: str) -> dict[str, Tensor]:
    return full_state(dict(load(folder).state_dict()), keep=True)


def test_a_distributed_checkpoint_loads_with_another_number_of_groups(tmp_path: Path) -> None:
    folder = str(tmp_path / "directory")
    saved = run_ranks(save_directory, 4, save("qwen3_moe", tmp_path), folder)[0]
    for loaded in run_ranks(load_directory, 2, folder):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
