"""Checkpoints know experts, never slots: any run goes on from any other's, at any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor

import swiftmoe_lightning as sml
from tests.helpers import nightly, rank_errors, run_ranks
from tests.strategies.cases import NUM_BATCHES, Model, assert_close, loader, trainer, whole

FILE, DIRECTORY = "swiftmoe", "swiftmoe-directory"


def strategy_of(name: str) -> Any:
    return sml.SwiftMoEStrategy(save_distributed_checkpoint=True) if name == DIRECTORY else name


class Sgd(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Amsgrad(Model):
    """Two param groups and a schedule; the router's bias is a buffer that moves."""

    def __init__(self) -> None:
        super().__init__(router=sml.TopKRouter(12, 5, 2, bias_update_rate=0.01))

    def configure_optimizers(self) -> Any:
        experts = [p for name, p in self.named_parameters() if "experts" in name]
        rest = [p for name, p in self.named_parameters() if "experts" not in name]
        optimizer = torch.optim.AdamW([{"params": rest}, {"params": experts, "lr": 3e-3}], lr=1e-2, amsgrad=True)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def run(world_size: int, strategy: str, make: Any, path: str, steps: int, save: bool) -> dict[str, Tensor]:
    """Fit until `steps`, from `path` if it is there, which is then written if `save`; the end state."""
    model = make()
    runner = trainer(world_size, strategy_of(strategy), max_steps=steps, max_epochs=-1)
    start = path if Path(path).exists() else None
    runner.fit(model, loader(world_size), loader(world_size), ckpt_path=start)
    assert runner.global_step == steps
    if save:
        runner.save_checkpoint(path)
    return whole(model)


def go_on(first: tuple[int, str], second: tuple[int, str], make: Any, folder: Path) -> list[dict[str, Tensor]]:
    """One epoch by one, the next two by the other."""
    path = str(folder / "run.ckpt")
    run_ranks(run, first[0], *first, make, path, NUM_BATCHES, True, init=False)
    return run_ranks(run, second[0], *second, make, path, 3 * NUM_BATCHES, False, init=False)


OURS = [
    ((2, FILE), (2, FILE)),
    ((2, FILE), (3, FILE)),
    ((2, DIRECTORY), (2, DIRECTORY)),
    ((3, DIRECTORY), (2, FILE)),
    ((2, FILE), (3, DIRECTORY)),
    ((2, DIRECTORY), (1, FILE)),
]
OTHERS = [((2, FILE), (1, "auto")), ((1, "auto"), (2, FILE)), ((2, FILE), (2, "ddp")), ((2, "ddp"), (2, FILE))]
# Only the engine moves Amsgrad's router bias.
ALL = [(make, *runs) for make in (Model, Sgd, Amsgrad) for runs in (OURS if make is Amsgrad else OURS + OTHERS)]


@pytest.mark.parametrize(
    ("make", "first", "second"), [*ALL[::4], *nightly(*(each for i, each in enumerate(ALL) if i % 4))], ids=str
)
def test_a_run_goes_on_as_if_it_had_not_stopped(first: Any, second: Any, make: Any, tmp_path: Path) -> None:
    alone = FILE if make is Amsgrad else "auto"
    (expected,) = run_ranks(run, 1, 1, alone, make, str(tmp_path / "none"), 3 * NUM_BATCHES, False, init=False)
    for state in go_on(first, second, make, tmp_path):
        assert_close(state, expected)


class SaveAfterFirstEpoch(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, runner: L.Trainer, pl_module: L.LightningModule) -> None:
        if runner.current_epoch == 0:
            runner.save_checkpoint(self.path)


class ReadAfterFirstEpoch(L.Callback):
    def __init__(self, reader: sml.LoadReader) -> None:
        self.reader = reader

    def on_train_epoch_end(self, runner: L.Trainer, pl_module: L.LightningModule) -> None:
        if runner.current_epoch == 0:
            self.reader.read()


def resume_exactly(path: str, strategy: str) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """Bits, placements and loads of a fit, the loads from the second epoch on."""
    model = Model(capacity_factor=1.0)
    runner = trainer(2, strategy_of(strategy), max_epochs=3)
    reader = sml.LoadReader(model)
    runner.callbacks.append(ReadAfterFirstEpoch(reader))  # type: ignore[attr-defined]
    if Path(path).exists():
        runner.fit(model, loader(2), loader(2), ckpt_path=path)
    else:
        runner.callbacks.append(SaveAfterFirstEpoch(path))  # type: ignore[attr-defined]
        runner.fit(model, loader(2), loader(2))
    load = reader.read()["moe.experts"]
    placements = {k: p.slot_to_expert_S.tolist() for k, p in runner.strategy.engine.placements.items()}  # type: ignore[attr-defined]
    return whole(model), placements, (load.counts_WE.tolist(), load.num_dropped_tokens, load.load_W.tolist())


@pytest.mark.parametrize("strategy", [FILE, DIRECTORY])
def test_resuming_is_exact_to_the_bit_placement_and_drops_included(strategy: str, tmp_path: Path) -> None:
    path = str(tmp_path / "run.ckpt")
    runs = [run_ranks(resume_exactly, 2, path, strategy, init=False) for _ in range(2)]
    for (state, placements, load), (again, placements_again, load_again) in zip(*runs, strict=True):
        assert placements == placements_again
        assert load == load_again
        for name, value in state.items():
            assert torch.equal(value, again[name]), name


def save(strategy: str, path: str) -> dict[str, Tensor]:
    model = Model()
    runner = trainer(2, strategy_of(strategy), max_epochs=1)
    runner.fit(model, loader(2), loader(2))
    runner.save_checkpoint(path)
    return whole(model)


def test_a_plain_file_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    (expected, _) = run_ranks(save, 2, FILE, str(path), init=False)
    checkpoint = torch.load(path, weights_only=True)
    model = Model()
    model.load_state_dict(checkpoint["state_dict"])
    assert_close(dict(model.state_dict()), expected, 0)
    assert not [name for name in checkpoint["state_dict"] if "slot" in name]
    # By index, as any torch optimizer of the plain module loads it.
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    shapes = {p.shape for p in model.parameters()}
    assert {s["exp_avg"].shape for s in optimizer.state.values()} == shapes
    assert Model.load_from_checkpoint(path).moe.experts.num_experts == 5


def test_a_directory_becomes_a_plain_file_without_us(tmp_path: Path) -> None:
    from lightning.fabric.utilities.consolidate_checkpoint import _process_cli_args
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    path = tmp_path / "run.ckpt"
    (expected, _) = run_ranks(save, 2, DIRECTORY, str(path), init=False)
    assert path.is_dir()
    assert callable(_process_cli_args)
    checkpoint = _load_distributed_checkpoint(path)
    model = Model()
    model.load_state_dict(checkpoint["model"])
    assert_close(dict(model.state_dict()), expected, 0)


def fit_with_checkpoints(world_size: int, strategy: str, folder: str) -> tuple[list[str], dict[str, Tensor], Any]:
    """The best two of some epochs; then a validation of the best, and a further fit."""
    model = Model()
    keep = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, filename="{epoch}", save_last=True)
    runner = trainer(world_size, strategy_of(strategy), callbacks=[keep], max_epochs=3, enable_checkpointing=True)
    runner.fit(model, loader(world_size), loader(world_size))
    (best,) = runner.validate(model, loader(world_size), ckpt_path="best", verbose=False)
    assert best["val_loss"] == pytest.approx(float(keep.best_model_score), rel=1e-5)  # type: ignore[arg-type]
    (last,) = runner.test(model, loader(world_size), ckpt_path="last", verbose=False)
    names = sorted(p.name for p in Path(folder).iterdir())
    return names, whole(model), last["test_loss"]


@pytest.mark.parametrize("strategy", [FILE, DIRECTORY])
def test_model_checkpoint_keeps_and_reloads_the_best(strategy: str, tmp_path: Path) -> None:
    ((names, expected, loss),) = run_ranks(fit_with_checkpoints, 1, 1, "auto", str(tmp_path / "a"), init=False)
    outcomes = run_ranks(fit_with_checkpoints, 2, 2, strategy, str(tmp_path / "b"), init=False)
    for found_names, state, found_loss in outcomes:
        assert found_names == names
        assert_close(state, expected)
        assert found_loss == pytest.approx(loss, rel=1e-5)


class Average(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.5))


def run_averaged(world_size: int, strategy: str, path: str) -> dict[str, Tensor]:
    model = Model()
    start = path if Path(path).exists() else None
    callbacks = [Average(), *([] if start else [SaveAfterFirstEpoch(path)])]
    runner = trainer(world_size, strategy, callbacks=callbacks, max_epochs=3)
    runner.fit(model, loader(world_size), loader(world_size), ckpt_path=start)
    return whole(model)


def test_averaged_weights_are_saved_and_resumed(tmp_path: Path) -> None:
    (expected,) = run_ranks(run_averaged, 1, 1, "auto", str(tmp_path / "alone.ckpt"), init=False)
    path = str(tmp_path / "run.ckpt")
    for _ in ("from the start", "from the checkpoint"):
        for state in run_ranks(run_averaged, 2, 2, "swiftmoe", path, init=False):
            assert_close(state, expected)


def resume_other(path: str, make: Any) -> None:
    trainer(2, max_epochs=3).fit(make(), loader(2), loader(2), ckpt_path=path)


class Wider(Model):
    def __init__(self) -> None:
        super().__init__()
        self.moe = sml.MoE(12, 14, 5, 2)


class More(Model):
    def __init__(self) -> None:
        super().__init__()
        self.moe = sml.MoE(12, 10, 6, 2)


@pytest.mark.parametrize("kind", [FILE, DIRECTORY])
@pytest.mark.parametrize(
    ("make", "saved", "expected"), [(Wider, [5, 20, 12], [5, 28, 12]), (More, [5, 20, 12], [6, 20, 12])]
)
def test_another_models_checkpoint_is_refused_naming_the_key(
    kind: str, make: Any, saved: list[int], expected: list[int], tmp_path: Path
) -> None:
    path = str(tmp_path / "run.ckpt")
    run_ranks(save, 2, kind, path, init=False)
    for error in rank_errors(resume_other, 2, path, make, init=False):
        assert f"'moe.experts.gate_up_proj' has shape {saved} in the checkpoint, and {expected} in this model" in error
        assert "Build the model with the checkpoint's num_experts, dim and hidden_dim" in error


def cut_off(path: Path) -> None:
    target = path if path.is_file() else path / "meta.pt"
    target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])


@pytest.mark.parametrize("kind", [FILE, DIRECTORY])
def test_a_truncated_checkpoint_is_an_error_on_every_rank(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run_ranks(save, 2, kind, str(path), init=False)
    cut_off(path)
    for error in rank_errors(resume_other, 2, str(path), Model, init=False):
        assert f"cannot read the checkpoint '{path}'" in error
        assert "It may be missing, cut off or corrupt" in error


def test_a_directory_with_a_truncated_shard_is_an_error_on_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run_ranks(save, 2, DIRECTORY, str(path), init=False)
    for shard in path.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    for error in rank_errors(resume_other, 2, str(path), Model, init=False):
        assert f"cannot read the checkpoint '{path}'" in error
