"""Validation, test and prediction on ranks give what one process gives, also with uneven numbers of batches."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import swiftmoe_lightning as sml
from tests.helpers import nightly, rank_errors, run_ranks
from tests.strategies.cases import GLOBAL_BATCH, Model, Noise, assert_close, loader, trainer, whole


def evaluate(world_size: int, strategy: str) -> dict[str, Any]:
    model = Model()
    runner = trainer(world_size, strategy)
    metrics = runner.validate(model, loader(world_size), verbose=False) + runner.test(
        model, loader(world_size), verbose=False
    )
    return {key: value for actual in metrics for key, value in actual.items()}


def test_validate_and_test_without_a_fit() -> None:
    (expected,) = run_ranks(evaluate, 1, 1, "auto", init=False)
    for actual in run_ranks(evaluate, 2, 2, "swiftmoe", init=False):
        assert actual == pytest.approx(expected, rel=1e-5)


class Uneven(IterableDataset[Tensor]):
    """Rank r has `first` + r batches of 3 rows."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[Tensor]:
        rank = int(os.environ["RANK"])
        yield from Noise().x[10 * rank : 10 * rank + 3 * (rank + self.first)].unbind(0)


class Plain(Model):
    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        out: Tensor = self(batch)
        return out

    def test_step(self, batch: Tensor, _: int) -> None:  # type: ignore[override]
        self.log("mean", self(batch).mean(), on_epoch=True, sync_dist=True)


def evaluate_unevenly() -> tuple[list[Tensor], list[Tensor], float]:
    """What the plain module gives for this rank's rows, what the strategy predicts for them, and the mean it logs."""
    model = Plain()
    loader_of_rank = list(DataLoader(Uneven(1), batch_size=3))
    with torch.no_grad():
        expected = [model(batch) for batch in loader_of_rank]
    runner = trainer(3)
    actual = runner.predict(model, DataLoader(Uneven(1), batch_size=3))
    assert actual is not None
    (metrics,) = runner.test(model, DataLoader(Uneven(1), batch_size=3), verbose=False)
    return expected, list(actual), metrics["mean"]


def test_ranks_may_have_different_numbers_of_batches() -> None:
    outcomes = run_ranks(evaluate_unevenly, 3, init=False)
    mean_of_batches = torch.stack([out.mean() for expected, _, _ in outcomes for out in expected]).mean()
    for rank, (expected, actual, mean) in enumerate(outcomes):
        assert len(actual) == rank + 1
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert mean == pytest.approx(float(mean_of_batches), rel=1e-4)


def predict_without_batches() -> list[int]:
    """How many batches this rank predicts: from a loader of unknown length, then from one of a known length."""
    unknown = DataLoader(Uneven(0), batch_size=3)
    known = DataLoader(Noise().x[:1], sampler=range(int(os.environ["RANK"]), 1, 2))  # type: ignore[arg-type]
    return [len(trainer(2).predict(Plain(), data) or []) for data in (unknown, known)]


def test_a_rank_may_have_no_batch_at_all() -> None:
    assert run_ranks(predict_without_batches, 2, init=False) == [[0, 1], [1, 0]]


class UnevenPairs(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Noise()
        for i in range(4 if os.environ["RANK"] == "0" else 8):
            yield data[i]


class NoValidation(Model):
    validation_step = None  # type: ignore[assignment]


def fit_unevenly(make: Any) -> None:
    strategy = sml.SwiftMoEStrategy(timeout=timedelta(seconds=5))
    runner = trainer(2, strategy, max_epochs=1)
    runner.fit(make(), DataLoader(UnevenPairs(), batch_size=2), loader(2, GLOBAL_BATCH) if make is Model else None)


@pytest.mark.parametrize("make", [Model, *nightly(NoValidation)])
def test_a_rank_with_fewer_training_batches_is_an_error_on_every_rank_within_the_timeout(make: Any) -> None:
    for error in rank_errors(fit_unevenly, 2, make, init=False):
        assert re.search(r"rank \d (has no more batches|trains layer 'moe.experts'|evaluates layer)", error)
        assert "give all ranks equally many training batches (drop_last=True, or limit_train_batches)" in error


def fit_known_unevenly(options: dict[str, Any]) -> None:
    limit = {0: 1.0, 1: options.pop("limit")}[int(os.environ["RANK"])]
    runner = trainer(2, sml.SwiftMoEStrategy(), limit_train_batches=limit, **options)
    runner.fit(Model(), loader(2), loader(2))


@pytest.mark.parametrize("options", [{"limit": 3}, {"limit": 0.5, "accumulate_grad_batches": 2}])
def test_fewer_training_batches_are_an_error_before_the_first_where_their_number_is_known(
    options: dict[str, Any],
) -> None:
    for error in rank_errors(fit_known_unevenly, 2, options, init=False):
        assert re.search(r"different numbers of training batches \(\d+, \d+, by rank\)", error)
        assert "give all ranks equally many training batches (drop_last=True, or limit_train_batches)" in error


class Average(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.5))


def validate_averaged(world_size: int, strategy: Any) -> list[float]:
    """The validation losses of a fit whose validation runs on averaged weights, three times an epoch."""
    losses: list[float] = []

    class Recorder(L.Callback):
        def on_validation_end(self, runner: L.Trainer, _: L.LightningModule) -> None:
            losses.append(float(runner.callback_metrics["val_loss"]))

    runner = trainer(world_size, strategy, callbacks=[Average(), Recorder()], val_check_interval=1)
    runner.fit(Model(), loader(world_size), loader(world_size, GLOBAL_BATCH))
    return losses


def test_validation_sees_averaged_weights_and_training_goes_on_with_its_own() -> None:
    (expected,) = run_ranks(validate_averaged, 1, 1, "auto", init=False)
    for actual in run_ranks(validate_averaged, 2, 2, "swiftmoe", init=False):
        assert len(actual) == 9
        assert actual == pytest.approx(expected, rel=1e-5)


def fit_swa(world_size: int, strategy: str) -> dict[str, Tensor]:
    model = Model()
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    trainer(world_size, strategy, callbacks=[averaging], max_epochs=3).fit(
        model, loader(world_size), loader(world_size)
    )
    return whole(model)


def test_stochastic_weight_averaging_ends_as_on_one_process() -> None:
    (expected,) = run_ranks(fit_swa, 1, 1, "auto", init=False)
    for actual in run_ranks(fit_swa, 2, 2, "swiftmoe", init=False):
        assert_close(actual, expected)


def fit_until_it_stops(world_size: int, strategy: str) -> tuple[int, dict[str, Tensor]]:
    model = Model()
    stop = EarlyStopping("val_loss", patience=0, min_delta=0.01)
    runner = trainer(world_size, strategy, callbacks=[stop], max_epochs=20)
    runner.fit(model, loader(world_size), loader(world_size, GLOBAL_BATCH))
    return runner.current_epoch, whole(model)


def test_early_stopping_stops_all_ranks_at_the_same_epoch() -> None:
    ((epoch, expected),) = run_ranks(fit_until_it_stops, 1, 1, "auto", init=False)
    assert epoch < 20
    for found_epoch, actual in run_ranks(fit_until_it_stops, 2, 2, "swiftmoe", init=False):
        assert found_epoch == epoch
        assert_close(actual, expected)


class Poisoned(Model):
    def training_step(self, batch: tuple[Tensor, Tensor], i: int) -> Tensor:
        x, y = batch
        if os.environ["RANK"] == "1" and i == 2:
            x = x * float("nan")
        return self.loss((x, y))


def fit_poisoned() -> None:
    trainer(2).fit(Poisoned(), loader(2), loader(2, GLOBAL_BATCH))


def test_non_finite_scores_on_one_rank_are_an_error_on_all_that_names_layer_and_rank() -> None:
    for error in rank_errors(fit_poisoned, 2, init=False):
        assert "the router gave non-finite scores in layer 'moe.experts' on rank [1]" in error
        assert "lower the learning rate, clip gradients, or add a z-loss" in error


def wrong_input() -> None:
    model = sml.MoE(8, 8, 4)
    sml.SwiftMoEEngine(model)
    model(torch.zeros(3, 9))


def test_an_input_of_another_width_is_an_error_on_every_rank() -> None:
    for error in rank_errors(wrong_input, 2):
        assert "MoE(dim=8) got an input of shape [3, 9]: its last dim must be dim." in error
