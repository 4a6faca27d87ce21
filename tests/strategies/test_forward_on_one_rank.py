"""A forward on one rank alone, in a hook between epochs: an error on every rank that says so, and no abort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import rank_errors
from tests.strategies import cases


class Peeks(cases.Model):
    """Looks at its outputs after an epoch, on rank 0, as one would under DDP."""

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 0:
            with torch.no_grad():
                self(cases.Noise().x[:4])


def fit(limit: Any) -> None:
    cases.trainer(2, limit_val_batches=limit).fit(Peeks(), cases.loader(2), cases.loader(2, cases.GLOBAL_BATCH))


@pytest.mark.parametrize("limit", [0, None])
def test_a_forward_on_rank_0_after_an_epoch_is_named_on_every_rank(limit: Any) -> None:
    for error in rank_errors(fit, 2, limit, init=False):
        assert "rank 0 evaluates layer 'moe.experts' in torch.float32; rank 1 begins a training epoch" in error
        assert "no forward under `if rank == 0:`" in error
