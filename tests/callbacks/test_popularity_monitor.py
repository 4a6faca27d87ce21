from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from lightning.pytorch.loggers.logger import Logger

import swiftmoe_lightning as sml
from tests.helpers import run_ranks
from tests.strategies.cases import GLOBAL_BATCH, NUM_BATCHES, Model, loader, trainer


class Memory(Logger):
    """Keeps what is logged: key -> {step: value}."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = defaultdict(dict)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.values[key][step or 0] = value

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(world_size: int, strategy: Any, moe: dict[str, Any], max_keys: int, **options: Any) -> dict[str, Any]:
    """What the monitor logs, and what a reader of our own adds up to over the same fit."""
    model, logger = Model(**moe), Memory()
    runner = trainer(world_size, strategy, logger=logger, callbacks=[sml.ExpertPopularityMonitor(max_keys)], **options)
    reader = sml.LoadReader(model)
    runner.fit(model, loader(world_size), loader(world_size, GLOBAL_BATCH))
    load = reader.read()["moe.experts"]
    return {
        "logged": {k: v for k, v in logger.values.items() if k.startswith("moe/")},
        "callback_metrics": {k: float(v) for k, v in runner.callback_metrics.items() if k.startswith("moe/")},
        "popularity": load.popularity_E.tolist(),
        "num_dropped_tokens": load.num_dropped_tokens,
        "steps": runner.global_step,
        "token_bytes": reader.token_bytes,
    }


def run(world_size: int, strategy: Any = "swiftmoe", max_keys: int = 500, moe: Any = None, **options: Any) -> Any:
    fit_with_options = _Fit(world_size, strategy, moe or {}, max_keys, options)
    return run_ranks(fit_with_options, world_size, init=False)


class _Fit:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __call__(self) -> dict[str, Any]:
        return fit(*self.args[:-1], **self.args[-1])


def test_every_key_is_logged_with_its_unit_and_adds_up_over_the_steps_between() -> None:
    run_of_rank_0 = run(2, moe={"capacity_factor": 1.0}, log_every_n_steps=3)[0]
    logged, steps = run_of_rank_0["logged"], run_of_rank_0["steps"]
    assert steps == 2 * NUM_BATCHES == 8
    totals = ["imbalance", "imbalance_max", "token_survival_rate", "num_dropped_tokens", "num_replicas_moved"]
    experts = [f"moe.experts/{column}/{e}" for column in ("popularity", "replicas") for e in range(5)]
    lost = [f"lost/{cause}" for cause in ("split", "placement", "prediction", "floor", "rounding")]
    links = ["token_bytes_inside_nodes", "token_bytes_between_nodes"]
    expected_keys = [*totals, *lost, *links, *(f"moe.experts/{key}" for key in totals), *experts]
    assert sorted(logged) == sorted(f"moe/{key}" for key in expected_keys)
    assert all(sorted(by_step) == [3, 6, 8] for by_step in logged.values())

    assignments = [3 * GLOBAL_BATCH * 2, 3 * GLOBAL_BATCH * 2, 2 * GLOBAL_BATCH * 2]
    dropped = list(logged["moe/num_dropped_tokens"].values())
    assert sum(dropped) == run_of_rank_0["num_dropped_tokens"] > 0
    survival = list(logged["moe/token_survival_rate"].values())
    assert survival == pytest.approx([1 - d / n for d, n in zip(dropped, assignments, strict=True)])
    for e, popularity in enumerate(run_of_rank_0["popularity"]):
        shares = logged[f"moe/moe.experts/popularity/{e}"].values()
        assert sum(s * n for s, n in zip(shares, assignments, strict=True)) == pytest.approx(popularity)
    for step in (3, 6, 8):
        # 2 ranks of 4 slots: max(ceil(1.25 * 5 / 2), ceil(5 / 2) + 1).
        assert sum(logged[f"moe/moe.experts/replicas/{e}"][step] for e in range(5)) == 8
        assert 1 <= logged["moe/imbalance"][step] <= logged["moe/imbalance_max"][step] <= 2
        assert all(0 <= logged[f"moe/{key}"][step] < 1 for key in lost)
    assert run_of_rank_0["callback_metrics"].keys() == {f"moe/{key}" for key in totals}


def test_logged_bytes_of_tokens_add_up_to_all_that_were_sent() -> None:
    run_of_rank_0 = run(2, log_every_n_steps=3, limit_val_batches=0)[0]
    inside, between = (run_of_rank_0["logged"][f"moe/token_bytes_{link}_nodes"] for link in ("inside", "between"))
    # Both ranks are on one node.
    assert set(between.values()) == {0.0}
    assert all(sent > 0 for sent in inside.values())
    assert sum(inside.values()) == run_of_rank_0["token_bytes"]["inside"]


@pytest.mark.parametrize("strategy", ["auto", "swiftmoe"])
def test_one_device_is_always_balanced_and_drops_nothing(strategy: str) -> None:
    (run_of_rank_0,) = run(1, strategy, log_every_n_steps=1)
    assert set(run_of_rank_0["logged"]["moe/imbalance"].values()) == {1.0}
    assert set(run_of_rank_0["logged"]["moe/num_dropped_tokens"].values()) == {0.0}
    assert sorted(run_of_rank_0["logged"]["moe/imbalance"]) == list(range(1, 9))


def test_accumulated_batches_count_as_one_step() -> None:
    (run_of_rank_0,) = run(1, "auto", log_every_n_steps=1, accumulate_grad_batches=NUM_BATCHES)
    assert sorted(run_of_rank_0["logged"]["moe/imbalance"]) == [1, 2]
    assert sum(run_of_rank_0["popularity"]) == 2 * NUM_BATCHES * GLOBAL_BATCH * 2


def test_the_number_of_keys_is_bounded_and_a_warning_says_what_is_missing() -> None:
    with pytest.raises(AssertionError, match=r"single experts of 0 and totals of 1 of the 1 MoE layers.*max_keys=26"):
        run(1, "auto", max_keys=26, log_every_n_steps=1)
    with pytest.raises(AssertionError, match=r"single experts of 0 and totals of 0 of the 1 MoE layers.*max_keys=16"):
        run(1, "auto", max_keys=16, log_every_n_steps=1)
    (run_of_rank_0,) = run(1, "auto", max_keys=27, log_every_n_steps=1)
    assert len(run_of_rank_0["logged"]) == 27


@pytest.mark.parametrize("max_keys", [11, "500", True, float("nan"), None])
def test_too_few_keys_are_refused(max_keys: Any) -> None:
    with pytest.raises(ValueError, match=f"max_keys must be 12 or more, got {max_keys!r}"):
        sml.ExpertPopularityMonitor(max_keys)
