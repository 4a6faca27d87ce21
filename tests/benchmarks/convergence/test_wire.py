"""Every wire trains, and is compared with float32's run of the same seed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.convergence.wire import WIRES, print_table, summary, train_all
from tests.benchmarks.convergence.test_cluster import CORPUS, SETTING
from tests.helpers import run_ranks


@pytest.mark.nightly
def test_every_wire_trains_close_to_float32(capsys: pytest.CaptureFixture[str]) -> None:
    runs, _ = run_ranks(train_all, 2, 1, SETTING.over(2), CORPUS)
    rows = summary(runs)
    assert list(rows) == list(WIRES)
    assert rows["float32"]["difference"] == 0
    assert all(abs(row["difference"]) < 0.05 for row in rows.values())
    # 32 numbers of 4 bytes four times; or of 2; or once of 1 and a scale, and three times of 2. Validation returns
    # nothing backward.
    assert rows["float32, again"]["token_bytes"] != 1
    assert rows["bfloat16"]["token_bytes"] == pytest.approx(0.5, rel=0.02)
    assert rows["fp8"]["token_bytes"] == pytest.approx((36 + 3 * 64) / 512, rel=0.05)
    print_table(rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(WIRES)


def test_differences_are_of_the_same_seed() -> None:
    def run(wire: str, seed: int, loss: float, num_bytes: int) -> dict[str, Any]:
        losses = [9.0, 9.0, 9.0, loss + 1]
        return {
            "wire": wire,
            "seed": seed,
            "validation_loss": [9.0, loss],
            "train_loss": losses,
            "token_bytes": num_bytes,
        }

    runs = [run("float32", 0, 1.0, 8), run("float32", 1, 2.0, 8), run("fp8", 0, 1.25, 2), run("fp8", 1, 2.75, 2)]
    row = summary(runs)["fp8"]
    assert (row["validation_loss"], row["difference"], row["least"], row["most"]) == (2.0, 0.5, 0.25, 0.75)
    assert (row["train_difference"], row["train_least"], row["train_most"]) == (0.5, 0.25, 0.75)
    assert row["token_bytes"] == 0.25
