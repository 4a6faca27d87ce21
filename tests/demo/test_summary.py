from __future__ import annotations

import math

import numpy as np
from rich.console import Console

from swiftmoe_lightning.demo.summary import summary_rows, summary_table


def test_the_rows_equal_a_count_by_hand() -> None:
    # 10 steps of one layer on two ranks: nine with 10 assignments of which 2 are dropped, and a last, balanced one.
    recording = {
        "counts": np.full((10, 2, 1, 5), 1),
        "loads": np.array([[[6, 2]]] * 9 + [[[5, 5]]]),
        "dropped": np.array([[2]] * 9 + [[0]]),
        "moved": np.array([[3]] * 5 + [[0]] * 5),
    }
    rows = summary_rows(recording, [math.log(256), 3.0, math.log(8)], [9.0, *[0.25] * 9])
    assert rows == {
        "validation loss, nats a byte": "5.545 -> 2.079",
        "bits a byte": "8.000 -> 3.000",
        "perplexity of a byte": "256.00 -> 8.00",
        "token survival rate": "82.00%",
        "imbalance (busiest rank / mean rank)": "1.450",
        "imbalance, last 10 % of steps": "1.000",
        "replicas moved per step, all layers": "1.5",
        "step time, median": "250 ms",
    }
    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary_table("two runs", {"one": rows, "other": dict.fromkeys(rows, "x")}))
    lines = [line.strip("│ ").split("│") for line in captured.get().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [[name, value, "x"] for name, value in rows.items()]


def test_a_run_of_one_step_has_a_table() -> None:
    one = {"counts": np.ones((1, 1, 1, 1)), "loads": np.ones((1, 1, 1)), "dropped": np.zeros((1, 1))}
    rows = summary_rows({**one, "moved": np.zeros((1, 1))}, [5.0], [0.1])
    assert summary_table("short", {"one": rows}).row_count == 8
