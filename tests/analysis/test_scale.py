from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning.analysis import Advice, Cluster, GroupCost, ModelSizes, Workload, model_of, scale
from swiftmoe_lightning.analysis.cluster import BYTES_OF
from swiftmoe_lightning.analysis.scale_advice import candidate_sizes
from swiftmoe_lightning.config import DTYPES, SwiftMoEConfig
from swiftmoe_lightning.engine.handshake_rows import Header
from swiftmoe_lightning.placement import Forecast, Placement, make_policy, plan_collection

# An expert has 3 * 8 * 4 = 96 parameters, 192 bytes in bfloat16; its tensors have 8 rows each.
SMALL = ModelSizes(num_layers=2, num_experts=4, top_k=2, dim=8, hidden_dim=4, dense_parameters=1000)
SLOW: dict[str, Any] = {
    "ranks_per_node": 2,
    "node_bytes": 100.0,
    "node_latency": 0.5,
    "network_bytes": 10.0,
    "network_latency": 2.0,
}
WORK = Workload(tokens=16)


def cost(group_size: int, num_ranks: int = 8, work: Workload = WORK, model: ModelSizes = SMALL, **options: Any) -> Any:
    return GroupCost(model, Cluster(num_ranks=num_ranks, **{**SLOW, **options}), work, group_size)


def test_the_header_of_counts_is_the_engines() -> None:
    assert len(Header) == scale._HEADER


def test_two_groups_of_four_send_what_is_worked_out_by_hand() -> None:
    actual = cost(4)
    # max(ceil(1.25 * 4 / 4), ceil(4 / 4) + 1) slots.
    assert (actual.num_groups, actual.slots_per_rank) == (2, 2)
    # 2 layers, 2 phases: 2 experts of 192 bytes, of which 3 of 4 parts leave the rank.
    assert actual.group_bytes == 2 * 2 * 2 * 192 * 3 / 4
    # A rank has a quarter of 4 experts' rows, and keeps half of that.
    assert actual.across_bytes == 2 * 2 * (4 * 192 / 4) / 2
    assert actual.messages == 2 * 2 * (3 + 1)


def test_two_groups_of_four_take_the_seconds_that_are_worked_out_by_hand() -> None:
    actual = cost(4)
    # Collect: 2 * 192 / 4 = 96 bytes to each of 1 neighbour and 2 others; sum: 4 * 192 / 8 = 96 to 1 in another node.
    collect, across = 2 * (2 + 9.6), 2 + 9.6
    assert actual.weight_seconds == pytest.approx(2 * 2 * (collect + across))
    # 16 tokens go to 2 experts as 8 numbers of 2 bytes: 512 bytes, a quarter to each rank; 4 times a layer.
    assert actual.token_seconds == pytest.approx(4 * 2 * 2 * (2 + 12.8))
    # 4 counts and a header of 11, 4 bytes each.
    assert actual.count_seconds == pytest.approx(2 * 2 * (2 + 6))
    assert actual.step_seconds == pytest.approx(92.8 + 46.4 + 236.8 + 32)
    twice = cost(4, work=Workload(tokens=16, micro_batches=2))
    assert twice.step_seconds == pytest.approx(92.8 + 46.4 + 2 * (236.8 + 32))


def test_two_groups_of_four_need_the_memory_that_is_worked_out_by_hand() -> None:
    actual = cost(4)
    assert actual.slot_bytes == 2 * 2 * 192
    # A parameter, its gradient and two moments, 4 bytes each, of an eighth of 2 * 4 experts.
    assert actual.state_bytes == 16 * 2 * 4 * 96 / 8
    # Of 2 layers the gradients of 2 slots, and 2 + 4 / 4 experts sent and received; tokens sent and received.
    assert actual.buffer_bytes == 2 * 2 * 192 + 2 * 2 * (2 + 1) * 192 + 2 * 512
    assert [actual.dense_bytes(dense) for dense in ("ddp", "hsdp", "fsdp2")] == [16000, 4000, 2000]


def test_gradients_of_all_layers_wait_where_micro_batches_are_accumulated() -> None:
    deep = ModelSizes(num_layers=5, num_experts=4, top_k=2, dim=8, hidden_dim=4)
    once, twice = (cost(4, model=deep, work=Workload(tokens=16, micro_batches=n)) for n in (1, 2))
    assert twice.buffer_bytes - once.buffer_bytes == (5 - 2) * 2 * 192


@pytest.mark.parametrize(("gpu_bytes", "dense"), [(28010, "ddp"), (27990, "hsdp"), (13010, "hsdp"), (12990, "fsdp2")])
def test_the_dense_part_is_cut_no_further_than_memory_asks(gpu_bytes: float, dense: str) -> None:
    # All the rest takes 6400 bytes, and a fifth of the memory stays free.
    actual = cost(4, gpu_bytes=gpu_bytes)
    assert actual.dense == dense
    assert actual.resident_bytes == 6400 + actual.dense_bytes(dense)
    assert actual.fits


def test_what_does_not_fit_says_so() -> None:
    assert not cost(4, gpu_bytes=8400 / 0.8 - 1).fits
    assert cost(4, gpu_bytes=8400 / 0.8 + 1).fits


def test_one_group_sends_nothing_across_and_groups_of_one_nothing_within() -> None:
    assert cost(8).across_bytes == 0
    alone = cost(1)
    assert (alone.group_bytes, alone.token_seconds, alone.count_seconds, alone.slots_per_rank) == (0, 0, 0, 4)
    single = cost(1, num_ranks=1)
    assert (single.messages, single.step_seconds) == (0, 0)
    # It computes with the parameters, whose gradients are counted with them.
    assert (single.slot_bytes, single.buffer_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("param_dtype", "token_dtype", "there", "back"),
    [
        ("bfloat16", None, 16, 16),
        ("bfloat16", "bfloat16", 16, 16),
        ("bfloat16", "float8_e4m3fn", 12, 16),
        ("float32", None, 32, 32),
        ("float32", "bfloat16", 16, 16),
        ("float32", "float8_e4m3fn", 12, 16),
    ],
)
def test_tokens_take_the_bytes_of_their_own_dtype(
    param_dtype: str, token_dtype: str | None, there: int, back: int
) -> None:
    # 8 numbers; of fp8 and a scale one way, and of bfloat16 the others: their results, and both gradients.
    actual = cost(4, work=Workload(tokens=16, param_dtype=param_dtype, token_dtype=token_dtype))
    assert actual.token_bytes == 32 * (there + 3 * back) / 4
    as_is = cost(4, work=Workload(tokens=16, param_dtype=param_dtype))
    # In memory they are as experts take them.
    assert (actual.buffer_bytes, actual.group_bytes) == (as_is.buffer_bytes, as_is.group_bytes)


def test_the_advice_keeps_the_dtype_of_tokens() -> None:
    cluster = Cluster(num_ranks=4)
    assert Advice(SMALL, cluster, Workload(token_dtype="float8_e4m3fn")).settings["token_dtype"] == "float8_e4m3fn"
    assert "token_dtype" not in Advice(SMALL, cluster, Workload()).settings


def test_dtypes_and_gradients_count_apart() -> None:
    wide = cost(4, work=Workload(tokens=16, param_dtype="bfloat16", reduce_dtype="float32", state_dtype="bfloat16"))
    assert wide.group_bytes == 2 * 2 * (192 + 384) * 3 / 4
    assert wide.state_bytes == 768
    assert set(BYTES_OF) == set(DTYPES)


def test_links_of_both_kinds_work_at_once() -> None:
    # 3 neighbours: 3 * (0.5 + 1); 4 others: 4 * (2 + 10).
    assert Cluster(num_ranks=8, **SLOW).exchange_seconds(3, 4, 100) == 48
    assert Cluster(num_ranks=8, **SLOW).exchange_seconds(3, 0, 100) == 4.5


@pytest.mark.parametrize(
    ("num_ranks", "node", "g", "near", "siblings"),
    # A group of 6 over nodes of 8 is, at worst, 2 ranks of one node and 4 of another.
    [(16, 8, 4, 3, 1), (16, 8, 2, 1, 3), (16, 8, 16, 7, 0), (24, 8, 6, 1, 0), (6, 8, 6, 5, 0), (6, 8, 2, 1, 2)],
)
def test_neighbours_are_counted_for_the_rank_that_has_fewest(
    num_ranks: int, node: int, g: int, near: int, siblings: int
) -> None:
    free = {"ranks_per_node": node, "node_latency": 0.0, "node_bytes": 1e30, "network_bytes": 1e30}
    actual = cost(g, num_ranks, network_latency=1.0, **free)
    groups = num_ranks // g
    assert actual.count_seconds == pytest.approx(2 * (g - 1 - near))
    assert actual.weight_seconds == pytest.approx(2 * 2 * (g - 1 - near + groups - 1 - siblings))
    # The least over all ranks, counted one by one.
    peers = [[p for p in range(r // g * g, r // g * g + g) if p // node == r // node] for r in range(num_ranks)]
    assert min(map(len, peers)) - 1 == near
    alike = [[p for p in range(r % g, num_ranks, g) if p // node == r // node] for r in range(num_ranks)]
    assert min(map(len, alike)) - 1 == siblings


def test_bytes_within_a_group_are_those_that_a_full_placement_sends() -> None:
    placement = Placement([0, 1, 1, 2, 2, 3, 3, 0], 4, 4)
    plan = plan_collection(placement, SMALL.row_elements)
    # 2 layers and 2 phases, 2 bytes each.
    assert [2 * 2 * 2 * plan.elements_sent(rank) for rank in range(4)] == [cost(4).group_bytes] * 4


def test_rows_that_the_ranks_do_not_divide_leave_a_fullest_rank() -> None:
    assert cost(4).fullest == 1
    qwen = model_of("qwen3-30b-a3b", {})
    # 1,536 and 2,048 rows, over 128 ranks 12 and 16, over 80 groups one at the most: 2,048 + 768 of 4,718,592 numbers.
    fullest = cost(128, 10240, model=qwen)
    assert fullest.fullest == pytest.approx((2048 + 768) * 10240 / 4718592)
    assert fullest.state_bytes == pytest.approx(16 * 48 * 128 * 2816)
    # The bytes are means over ranks.
    assert fullest.across_bytes == pytest.approx(2 * 48 * (128 * 9437184 / 128) * 79 / 80)


def test_two_public_models_send_what_the_formulas_say() -> None:
    deepseek = cost(64, 10240, model=model_of("deepseek-v3", {}))
    expert = 3 * 7168 * 2048 * 2
    assert deepseek.slots_per_rank == 5
    assert deepseek.group_bytes == pytest.approx(2 * 58 * 5 * expert * 63 / 64)
    assert deepseek.across_bytes == pytest.approx(2 * 58 * 256 * expert / 64 * 159 / 160)
    assert deepseek.slot_bytes == 58 * 5 * expert
    assert deepseek.messages == 2 * 58 * (63 + 159)


def test_the_default_policy_has_as_many_pairs_as_slots_in_large_groups() -> None:
    slots = SwiftMoEConfig().resolve_slots_per_rank(256, 64)
    shares_E = 1 / np.arange(1, 257) ** 0.6
    popularity_E = np.random.default_rng(0).multinomial(4096 * 8 * 64, shares_E / shares_E.sum())
    (placement,) = make_policy("balanced", 64, slots).place(Forecast.of(popularity_E[None]))
    assert placement.num_pairs_W.sum() == slots * 64


@pytest.mark.parametrize(
    ("num_ranks", "node", "sizes"),
    [
        (8, 8, [1, 2, 4, 8]),
        (1024, 8, [1, 2, 4, 8, 16, 32, 64, 128, 1024]),
        # 60 does not nest with nodes of 8, but is what a run would take.
        (120, 8, [1, 2, 4, 8, 24, 40, 60, 120]),
        (144, 72, [1, 2, 3, 4, 6, 8, 9, 12, 18, 24, 36, 48, 72, 144]),
    ],
)
def test_candidates_nest_with_nodes(num_ranks: int, node: int, sizes: list[int]) -> None:
    assert candidate_sizes(Cluster(num_ranks=num_ranks, ranks_per_node=node)) == sizes


def advice(model: str, num_ranks: int, **options: Any) -> Advice:
    return Advice(model_of(model, {}), Cluster(num_ranks=num_ranks, **options), Workload())


def test_the_advised_group_has_the_least_seconds_of_those_that_fit() -> None:
    actual = advice("deepseek-v3", 1024)
    fitting = {c.group_size: c.step_seconds for c in actual.costs if c.fits and c.group_size <= 128}
    assert list(fitting) == [64, 128]
    assert fitting[actual.best.group_size] == min(fitting.values())
    assert actual.settings == {
        "expert_parallel_size": 128,
        "slots_per_rank": 3,
        "dense": "hsdp",
        "param_dtype": "bfloat16",
        "reduce_dtype": "bfloat16",
    }
    settings, why, dense = actual.sentences()
    assert settings.startswith('1,024 ranks: expert_parallel_size=128, slots_per_rank=3, dense="hsdp", ')
    assert "against 4.01 s with the default of 64" in why
    assert "274 GB with its optimizer state; cut over a group 2.14 GB" in dense


def test_advice_tells_other_cases_apart() -> None:
    assert "it is also the default" in advice("qwen3-30b-a3b", 8, gpu_bytes=141e9).sentences()[1]
    small_gpu = advice("deepseek-v3", 1024, gpu_bytes=50e9)
    assert "the default of 64 needs 41 GB" in small_gpu.sentences()[1]
    assert "fits whole on each rank" in advice("qwen3-30b-a3b", 64).sentences()[2]
    assert "cut over all ranks" in advice("mixtral-8x7b", 60, gpu_bytes=70e9).sentences()[2]
    assert "has 6.1 times the mean" in advice("qwen3-30b-a3b", 10240).sentences()[3]


@pytest.mark.parametrize(
    ("model", "num_ranks", "part"),
    [("deepseek-v3", 8, "1.308 TB of experts' state"), ("mixtral-8x7b", 1024, "22.5 GB of slots")],
)
def test_where_nothing_fits_the_largest_part_is_named(model: str, num_ranks: int, part: str) -> None:
    actual = advice(model, num_ranks, gpu_bytes=30e9)
    assert not any(c.fits for c in actual.costs if c.group_size <= 128)
    assert actual.best.resident_bytes == min(c.resident_bytes for c in actual.costs if c.group_size <= 128)
    assert "No group fits: this one needs least" in actual.sentences()[1]
    assert part in actual.sentences()[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cost(3), "group_size must divide the 8 ranks, got 3"),
        (lambda: cost(0), "group_size must be a whole number of 1 or more, got 0"),
        (lambda: Cluster(num_ranks=2**21), "num_ranks must be at most 131072, got 2097152"),
        (lambda: Cluster(num_ranks=8, ranks_per_node=0), "ranks_per_node must be a whole number of 1 or more, got 0"),
        (lambda: Cluster(num_ranks=8, node_bytes=0), "node_bytes must be a number above 0, got 0"),
        (lambda: Cluster(num_ranks=8, network_latency=-1), "network_latency must be a number of 0 or more, got -1"),
        (lambda: Cluster(num_ranks=8).of_sizes("8,a"), "--ranks must be whole numbers with commas between, got '8,a'"),
        (lambda: Workload(tokens=0), "tokens must be a whole number of 1 or more, got 0"),
        (lambda: Workload(micro_batches=2**21), "micro_batches must be at most 1048576, got 2097152"),
        (lambda: Workload(state_dtype="int8"), "state_dtype must be one of .*, got 'int8'"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
