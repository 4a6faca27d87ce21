from __future__ import annotations

import math

import numpy as np
from rich.console import Console

from swiftmoe_lightning.demo.summary import summary_table


def test_the_table_equals_a_count_by_hand() -> None:
    # 10 steps of one layer on two ranks: nine with 10 assignments of which 2 are dropped, and a last, balanced one.
    recording = {
        "counts": np.full((10, 2, 1, 5), 1),
        "loads": np.array([[[6, 2]]] * 9 + [[[5, 5]]]),
        "dropped": np.array([[2]] * 9 + [[0]]),
        "moved": np.array([[3]] * 5 + [[0]] * 5),
    }
    table = summary_table("a run", recording, [math.log(256), 3.0, math.log(8)], [9.0, *[0.25] * 9])
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    lines = [line.strip("│ ").split("│") for line in captured.get().splitlines() if line.startswith("│")]
    assert {name.strip(): value.strip() for name, value in lines} == {
        "validation loss": "5.545 -> 2.079 nats/byte",
        "bits per byte": "8.000 -> 3.000",
        "perplexity per byte": "256.00 -> 8.00",
        "token survival rate": "82.00%",
        "imbalance, mean of the run": "1.450 (busiest rank / mean rank)",
        "imbalance, last 10 % of steps": "1.000",
        "replicas moved per step": "1.5 (all layers)",
        "step time, median": "250 ms",
    }


def test_a_run_of_one_step_has_a_table() -> None:
    one = {"counts": np.ones((1, 1, 1, 1)), "loads": np.ones((1, 1, 1)), "dropped": np.zeros((1, 1))}
    assert summary_table("short", {**one, "moved": np.zeros((1, 1))}, [5.0], [0.1]).row_count == 8
