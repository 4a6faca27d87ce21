import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import SwiftMoEConfig
from swiftmoe_lightning.config import PLACEMENTS


@pytest.mark.parametrize(
    ("num_experts", "world_size", "expected"),
    [
        (16, 16, 2),
        (16, 4, 5),
        (32, 16, 3),
        (8, 2, 5),
        (5, 4, 3),
        (64, 2, 40),
        (8, 1, 8),
        (1, 4, 1),
        (2, 4, 2),
        (3, 1, 3),
    ],
)
def test_slots_per_rank_of_none_leaves_room_for_a_quarter_more_replicas(num_experts, world_size, expected):
    assert SwiftMoEConfig().resolve_slots_per_rank(num_experts, world_size) == expected


@pytest.mark.parametrize(
    ("num_ranks", "size"), [(1, 1), (8, 8), (64, 64), (72, 36), (96, 48), (127, 1), (1024, 64), (10000, 50)]
)
def test_the_default_expert_group_is_the_largest_divisor_up_to_64(num_ranks, size):
    assert SwiftMoEConfig().resolve_expert_parallel_size(num_ranks) == size


def test_given_expert_groups_must_divide_the_ranks():
    assert SwiftMoEConfig(expert_parallel_size=128).resolve_expert_parallel_size(1024) == 128
    with pytest.raises(ValueError, match=r"expert_parallel_size=4 does not divide the 6 ranks.*one of 1, 2, 3, 6"):
        SwiftMoEConfig(expert_parallel_size=4).resolve_expert_parallel_size(6)


def test_given_slots_per_rank_are_taken_as_they_are():
    assert SwiftMoEConfig(slots_per_rank=4).resolve_slots_per_rank(8, 2) == 4
    assert SwiftMoEConfig(slots_per_rank=7).resolve_slots_per_rank(3, 2) == 7


@given(num_experts=st.integers(1, 300), world_size=st.integers(1, 1500))
@settings(max_examples=100, deadline=None)
def test_default_slots_hold_every_expert_and_some_replicas(num_experts, world_size):
    slots = SwiftMoEConfig().resolve_slots_per_rank(num_experts, world_size)
    assert slots <= num_experts
    if world_size == 1 or num_experts == 1:
        assert slots == num_experts
        return
    default_slots = max(math.ceil(5 * num_experts / (4 * world_size)), math.ceil(num_experts / world_size) + 1)
    assert slots == min(default_slots, num_experts)
    assert slots * world_size > num_experts


def test_too_few_slots_for_the_experts_say_how_many_it_takes():
    with pytest.raises(ValueError, match=r"2 ranks x 3 slots = 6 slots cannot hold 8 experts.*Set slots_per_rank to 4"):
        SwiftMoEConfig(slots_per_rank=3).resolve_slots_per_rank(8, 2)


@pytest.mark.parametrize("name", ["slots_per_rank", "replace_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_counts_below_one_or_not_whole_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of 1 or more, got "):
        SwiftMoEConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("placement", "'balanced', 'packed', 'symi', 'swap', 'static'"),
        ("token_split", "'balanced', 'local_first', 'uniform'"),
        ("exchange", "'flat', 'two_level', 'auto'"),
        ("dense", "'ddp', 'fsdp2'"),
        ("reduce_dtype", "'float32', 'bfloat16'"),
        ("param_dtype", "'float32', 'bfloat16'"),
        ("token_dtype", "'bfloat16', 'float8_e4m3fn'"),
    ],
)
def test_unknown_choice_lists_the_known_ones(name, choices):
    with pytest.raises(ValueError, match=rf"{name} must be one of {choices}.*, got 'nonsense'"):
        SwiftMoEConfig(**{name: "nonsense"})


def test_replacing_can_be_left_to_the_loads():
    assert SwiftMoEConfig(replace_every="auto").replace_every == "auto"


def test_config_cannot_change_once_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwiftMoEConfig().slots_per_rank = 2


@pytest.mark.parametrize("value", [None, 3, 0.5, ["balanced"]])
def test_a_placement_that_is_neither_a_name_nor_a_class_is_refused(value):
    names = ", ".join(map(repr, PLACEMENTS))
    message = f"placement must be one of {names} or a subclass of PlacementPolicy, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        SwiftMoEConfig(placement=value)


@pytest.mark.parametrize("name", ["offload_optimizer", "reshard_after_forward"])
@pytest.mark.parametrize("value", ["no", "yes", 0, 1, None])
def test_what_saves_memory_is_asked_for_with_true_or_false(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be True or False, got {value!r}\. Leave it out for"):
        SwiftMoEConfig(**{name: value})
    assert SwiftMoEConfig(**{name: True}).spreads_one_rank
    assert not SwiftMoEConfig().spreads_one_rank


def test_freed_slots_are_not_cut_for_evaluation():
    with pytest.raises(ValueError, match=re.escape("evaluate='sharded' cuts slots that stay in memory, and reshard")):
        SwiftMoEConfig(evaluate="sharded", reshard_after_forward=True)
