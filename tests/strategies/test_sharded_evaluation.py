"""`evaluate="sharded"` under Lightning: validation inside a fit, averaged weights, uneven prediction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import swiftmoe_lightning as sml
from tests.helpers import run_ranks
from tests.strategies.cases import trainer
from tests.strategies.test_evaluation import Plain, Uneven, validate_averaged


def evaluate_sharded() -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Validation losses of a fit, and what the plain module and the strategy give for this rank's rows."""
    losses = validate_averaged(2, sml.SwiftMoEStrategy(evaluate="sharded"))
    model = Plain()
    with torch.no_grad():
        expected = [model(batch) for batch in DataLoader(Uneven(0), batch_size=3)]
    strategy = sml.SwiftMoEStrategy(evaluate="sharded")
    actual = trainer(2, strategy).predict(model, DataLoader(Uneven(0), batch_size=3)) or []
    assert all(layer.slots.is_cut for layer in strategy.engine.layers)
    return losses, list(zip(actual, expected, strict=True))


def test_validation_of_averaged_weights_and_uneven_prediction_are_those_of_one_process() -> None:
    (expected,) = run_ranks(validate_averaged, 1, 1, "auto", init=False)
    for rank, (losses, predictions) in enumerate(run_ranks(evaluate_sharded, 2, init=False)):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert len(predictions) == rank
        for actual, plain in predictions:
            torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5)
