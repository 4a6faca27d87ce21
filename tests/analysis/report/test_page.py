from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning.analysis.report.page import PageData, PolicySeries, write_page
from swiftmoe_lightning.analysis.report.page_numbers import Columns, lines, maps, pack
from swiftmoe_lightning.analysis.report.page_text import bytes_text, loss_terms, seconds_text, summary

HOSTILE = "</script><script>alert(1)</script>{{data}}<!--\"'&"


def policy(counts_ULE: np.ndarray, name: str, drop: float = 0.0, load_W: tuple[int, ...] = (1, 1)) -> PolicySeries:
    """A policy that drops that share of everything, and whose ranks always carry the same loads."""
    steps_and_layers = counts_ULE.shape[:2]
    return PolicySeries(
        name=name,
        label="slot budget",
        replicas_ULE=np.full(counts_ULE.shape, 2),
        dropped_UL=drop * counts_ULE.sum(-1),
        load_ULW=np.broadcast_to(np.array(load_W), (*steps_and_layers, len(load_W))),
        moved_UL=np.ones(steps_and_layers, dtype=int),
        bytes_gradients=2e6,
        bytes_weights=None,
        bytes_paper=5e9,
        bytes_state_moved=0.0,
        losses={"floor": 0.01, "split": 0.02},
    )


def page(steps: int = 5, layers: int = 2, experts: int = 4, capacity_factor: float | None = 1.0) -> PageData:
    counts_ULE = np.random.default_rng(0).integers(1, 99, (steps, layers, experts))
    policies = (policy(counts_ULE, "symi", 0.214, (3, 1)), policy(counts_ULE, "balanced", 0.0123))
    names = tuple(f"blocks.{i}.experts" for i in range(layers))
    return PageData("A run", "on 2 ranks", counts_ULE, np.arange(steps), names, policies, capacity_factor)


def written(data: PageData, folder: Path) -> str:
    write_page(folder / "page.html", data)
    return (folder / "page.html").read_text(encoding="utf-8")


def embedded(html: str) -> dict[str, Any]:
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert script is not None
    return json.loads(script[1])


def unpack(packed: dict[str, Any]) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(packed["data"]), dtype=f"<u{packed['bytes']}")
    return packed["low"] + packed["unit"] * whole


class Tags(HTMLParser):
    """The tags of a page, each with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_sentence_names_what_is_dropped_best_policy_first() -> None:
    expected = "balanced drops 1.2 % of assignments; symi 21 % (5 steps, 2 layers, 4 experts)."
    assert summary(page()) == expected


def test_the_sentence_of_a_dropless_run_is_about_imbalance() -> None:
    expected = (
        "The busiest rank's load is 1.00 x the mean with balanced; 1.50 x with symi (5 steps, 2 layers, 4 experts)."
    )
    assert summary(page(capacity_factor=None)) == expected


def test_the_sentence_of_a_single_policy_and_of_none() -> None:
    data = page(steps=1, layers=1, experts=1)
    alone = replace(data, policies=data.policies[:1])
    assert summary(alone) == "symi drops 21 % of assignments (1 step, 1 layer, 1 expert)."
    assert summary(replace(data, policies=())) == "Popularity over 1 step, 1 layer, 1 expert."


def test_small_drops_are_not_called_none() -> None:
    data = page()
    few = replace(data, policies=(policy(data.counts_ULE, "balanced", 1e-5), policy(data.counts_ULE, "packed")))
    assert summary(few).startswith("packed drops 0.0 % of assignments; balanced less than 0.1 %")


def test_the_table_has_every_policys_numbers(tmp_path: Path) -> None:
    html = written(page(), tmp_path)
    rows = [
        re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<th scope=\"row\" data-policy.*?)</tr>", html)
    ]
    assert rows[0] == ["21.40", "78.60", "1.500", "1.50", "2 MB", "–", "5 GB", "0 B", "2.0"]
    assert rows[1][:4] == ["1.23", "98.77", "1.000", "1.00"]


def test_loss_terms_stand_in_their_order_and_unknown_ones_last(tmp_path: Path) -> None:
    data = page()
    odd = replace(data.policies[0], losses={"zeal": 0.1, "rounding": 0.0, **data.policies[0].losses})
    data = replace(data, policies=(odd, data.policies[1]))
    assert loss_terms(data) == ["split", "floor", "rounding", "zeal"]
    assert embedded(written(data, tmp_path))["policies"][1]["losses"] == [0.02, 0.01, 0.0, 0.0]


def test_bytes_are_read_in_fitting_units() -> None:
    assert [bytes_text(v) for v in (0, 999, 1000, 62_900_000, 5e9, 2e15)] == [
        *("0 B", "999 B", "1 kB", "62.9 MB", "5 GB", "2000 TB")
    ]


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    html = written(page(), tmp_path)
    assert set(re.findall(r"https?://[^\"'\s]*", html)) == {"http://www.w3.org/2000/svg"}
    for tag, attributes in Tags(html).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "data"} & attributes.keys()
    for loader in ("@import", "url(http", "fetch(", "XMLHttpRequest", "import("):
        assert loader not in html
    assert "default-src 'none'" in html


def test_names_cannot_add_elements_or_fill_gaps_of_the_template(tmp_path: Path) -> None:
    data = page()
    hostile = tuple(replace(p, name=HOSTILE, label=HOSTILE, losses={HOSTILE: 0.1}) for p in data.policies)
    named = replace(data, title=HOSTILE, subtitle=HOSTILE, layers=(HOSTILE, HOSTILE), policies=hostile)
    html = written(named, tmp_path)
    tame = tuple(replace(p, losses={"x": 0.1}) for p in data.policies)
    plain = Tags(written(replace(data, policies=tame), tmp_path))
    assert [tag for tag, _ in Tags(html).tags] == [tag for tag, _ in plain.tags]
    assert embedded(html)["layers"] == [HOSTILE, HOSTILE]
    assert html.count("<title>&lt;/script&gt;") == 1


def test_no_gap_of_the_template_stays_open(tmp_path: Path) -> None:
    assert "{{" not in re.sub(r"\$\{\{", "", written(page(), tmp_path))


def test_a_long_run_of_a_large_model_stays_below_5_mb(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shape = (2000, 24, 64)
    counts_ULE = random.integers(0, 5000, shape)
    noisy = PolicySeries(
        name="balanced",
        label="",
        replicas_ULE=random.integers(1, 9, shape, dtype=np.int16),
        dropped_UL=random.integers(0, 999, shape[:2]),
        load_ULW=random.integers(1, 999, (*shape[:2], 16), dtype=np.int32),
        moved_UL=random.integers(0, 9, shape[:2]),
        bytes_gradients=1.0,
        bytes_weights=1.0,
        bytes_paper=1.0,
        bytes_state_moved=1.0,
        losses={},
    )
    policies = tuple(replace(noisy, name=f"policy {i}") for i in range(5))
    data = PageData("t", "s", counts_ULE, np.arange(2000), tuple(map(str, range(24))), policies, 1.0)
    write_page(tmp_path / "page.html", data)
    assert (tmp_path / "page.html").stat().st_size < 5_000_000


def test_columns_cut_steps_evenly_and_keep_totals_and_means() -> None:
    columns = Columns.of(5, most=2)
    assert columns.edges(np.array([10, 20, 30, 40, 50])) == {"first": [10, 30], "last": [20, 50], "widest": 3}
    values_S = np.array([1, 3, 2, 4, 9])
    assert columns.sum(values_S).tolist() == [4, 15]
    assert columns.mean(values_S).tolist() == [2, 5]
    assert columns.most(values_S).tolist() == [3, 9]
    assert Columns.of(3, most=400).starts_C.tolist() == [0, 1, 2]


def test_packed_values_come_back_within_half_a_unit() -> None:
    values = np.array([0.0, 0.1, 2.0, 7.3, 8.0])
    for num_bytes in (1, 2):
        packed = pack(values, 0.0, 8.0, num_bytes)
        assert np.abs(unpack(packed) - values).max() <= packed["unit"] / 2
    assert unpack(pack(np.array([1.0, 1.0]), 1.0, 1.0, 2)).tolist() == [1.0, 1.0]


def test_averaged_lines_weigh_steps_by_their_tokens() -> None:
    # 801 steps in 400 columns: the last column holds the last 3 steps.
    counts_ULE = np.full((801, 1, 2), 5)
    counts_ULE[-3:] = np.array([100, 300, 100])[:, None, None]
    dropped_UL = np.zeros((801, 1), dtype=int)
    dropped_UL[-2] = 300
    load_ULW = np.full((801, 1, 2), 5)
    load_ULW[-1, 0] = [30, 10]
    one = replace(policy(counts_ULE, "symi"), dropped_UL=dropped_UL, load_ULW=load_ULW)
    series = lines(PageData("", "", counts_ULE, np.arange(801), ("a",), (one,), 1.0))
    assert (len(series["first"]), series["first"][-1], series["last"][-1]) == (400, 798, 800)
    for layer in (0, 400):
        column = layer + 399
        assert unpack(series["survival"][0]["mean"])[column] == pytest.approx(0.7, abs=1e-4)
        assert unpack(series["survival"][0]["worst"])[column] == pytest.approx(0.5, abs=1e-4)
        assert unpack(series["imbalance"][0]["mean"])[column] == pytest.approx((1 + 1 + 1.5) / 3, abs=1e-4)
        assert unpack(series["imbalance"][0]["worst"])[column] == pytest.approx(1.5, abs=1e-4)


def test_whole_replicas_stay_whole_and_popularity_is_relative_to_the_mean() -> None:
    counts_ULE = np.array([[[30, 10]], [[5, 15]]])
    replicas_ULE = np.array([[[5, 2]], [[1, 6]]])
    one = replace(policy(counts_ULE, "symi"), replicas_ULE=replicas_ULE)
    heat_maps = maps(PageData("", "", counts_ULE, np.arange(2), ("a",), (one,), 1.0))
    assert np.allclose(unpack(heat_maps["popularity"]), [1.5, 0.5, 0.5, 1.5], atol=1e-4)
    assert np.allclose(unpack(heat_maps["replicas"][0]), [5, 1, 2, 6], atol=1e-9)
    assert heat_maps["replicas"][0]["slots"] == 7


def test_more_replicas_than_a_byte_counts_are_shown_rounded() -> None:
    counts_ULE = np.ones((1, 1, 2), dtype=int)
    one = replace(policy(counts_ULE, "symi"), replicas_ULE=np.array([[[1000, 24]]]))
    heat_maps = maps(PageData("", "", counts_ULE, np.arange(1), ("a",), (one,), 1.0))
    assert np.allclose(unpack(heat_maps["replicas"][0]), [1000, 24], atol=2)


def test_of_too_many_experts_fewer_layers_are_shown() -> None:
    heat_maps = maps(page(steps=250, layers=40, experts=512))
    assert 1 < len(heat_maps["layers"]) < 40
    assert (heat_maps["layers"][0], heat_maps["layers"][-1]) == (0, 39)
    assert len(heat_maps["first"]) >= 200


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 4), (7, 1, 1), (401, 2, 3)])
@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_runs_of_all_sizes_make_a_page(
    sizes: tuple[int, int, int], capacity_factor: float | None, tmp_path: Path
) -> None:
    data = page(*sizes, capacity_factor)
    chart_data = embedded(written(data, tmp_path))
    assert chart_data["dropless"] is (capacity_factor is None)
    num_columns = min(sizes[0], 400)
    assert unpack(chart_data["maps"]["popularity"]).size == num_columns * sizes[1] * sizes[2]
    assert unpack(chart_data["lines"]["survival"][0]["mean"]).size == num_columns * (sizes[1] + 1)


def test_policies_without_replicas_bytes_or_losses_make_a_page(tmp_path: Path) -> None:
    data = page()
    bare = replace(data.policies[0], replicas_ULE=None, bytes_gradients=None, bytes_paper=None, losses={})
    html = written(replace(data, policies=(bare,)), tmp_path)
    assert embedded(html)["maps"]["replicas"] == [None]
    assert embedded(html)["policies"][0]["losses"] is None
    assert "Not computed for these policies." in html


def test_a_trace_without_policies_makes_a_page(tmp_path: Path) -> None:
    html = written(replace(page(), policies=()), tmp_path)
    assert embedded(html)["policies"] == []
    assert "No policy was compared." in html


def test_steps_without_tokens_count_as_even_and_complete(tmp_path: Path) -> None:
    data = page()
    nothing_ULE = np.zeros_like(data.counts_ULE)
    empty = replace(data, counts_ULE=nothing_ULE, policies=(policy(nothing_ULE, "symi", 0.0, (0, 0)),))
    series = embedded(written(empty, tmp_path))["lines"]
    assert unpack(series["survival"][0]["mean"]).min() == 1
    assert unpack(series["imbalance"][0]["worst"]).tolist() == [1.0] * 15


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    assert written(page(), tmp_path) == written(page(), tmp_path)


def test_series_of_another_length_are_refused() -> None:
    data = page()
    short = replace(data.policies[0], dropped_UL=np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"dropped_UL of symi has shape \(4, 2\).*must be \(5, 2\).*same steps"):
        replace(data, policies=(short,))
    with pytest.raises(ValueError, match=r"layers has shape \(1,\).*must be \(2,\)"):
        replace(data, layers=("a",))
    with pytest.raises(ValueError, match=r"at least one of each, got \(0, 2, 4\).*Record at least one step"):
        replace(data, counts_ULE=data.counts_ULE[:0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (1.5e-6, "1.5 us"), (0.9996e-3, "1 ms"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (1234.5, "1,234 s")],
)
def test_seconds_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
