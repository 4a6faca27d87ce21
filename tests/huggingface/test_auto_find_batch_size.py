"""`auto_find_batch_size`: a backward that runs out of memory is tried again with a smaller batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import run_ranks
from tests.huggingface.test_trainer import Regression, result, trainer

pytest.importorskip("transformers")


class OutOfMemory(torch.autograd.Function):
    """Backward fails for batches of more than `limit` sequences, once what comes after it has its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: int) -> Tensor:
        ctx.fails = len(x) > limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise RuntimeError("CUDA out of memory.")
        return gradient, None


def train(folder: str, limit: int, batch_size: int) -> dict[str, Any]:
    made = trainer(folder, family="module", auto_find_batch_size=True, per_device_train_batch_size=batch_size)
    assert isinstance(made.model, Regression)
    made.model.embed.register_forward_hook(lambda _, __, out: OutOfMemory.apply(out, limit))
    made.train()
    return result(made)


@pytest.mark.nightly
def test_a_batch_that_did_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    retried = run_ranks(train, 2, str(tmp_path), 2, 4, init=False)
    fitting = run_ranks(train, 2, str(tmp_path), 2, 2, init=False)
    for actual, expected in zip(retried, fitting, strict=True):
        assert actual["loss"][-3:] == pytest.approx(expected["loss"][-3:], rel=1e-4)
        for name, value in expected["state"].items():
            torch.testing.assert_close(actual["state"][name], value, rtol=1e-4, atol=1e-4)
