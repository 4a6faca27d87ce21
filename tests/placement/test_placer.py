import numpy as np
import pytest

from swiftmoe_lightning import Placement, PlacementPolicy
from swiftmoe_lightning.placement import ExpertLoad, Forecast, Placer, make_policy, plan_dispatch
from swiftmoe_lightning.placement.placer import excess
from swiftmoe_lightning.placement.shares import rank_loads

W, S, E = 4, 3, 6


def observe(popularity, placement):
    """What a layer would have done with these assignments."""
    counts_WE = np.zeros((W, E), dtype=np.int64)
    counts_WE[0] = popularity
    return ExpertLoad.of(counts_WE, plan_dispatch(counts_WE, placement), placement)


def run(placer, steps, name="layer"):
    """Placement after each step."""
    placements = list(placer.planned({name: E}).values())
    for popularity in steps:
        placements.append(placer.next_placements({name: observe(popularity, placements[-1])})[name])
    return placements[1:]


def placer(policy="balanced", **options):
    rule = make_policy(policy, W, S) if isinstance(policy, str) else policy
    return Placer(lambda num_experts: rule, **options)


def test_before_any_step_experts_are_where_the_policy_puts_equal_loads():
    (expected,) = make_policy("packed", W, S).place(Forecast.of(np.zeros((1, E)), spread=0.0))
    assert placer("packed").planned({"layer": E}) == {"layer": expected}


@pytest.mark.parametrize("policy", ["symi", "static"])
def test_the_next_placement_is_the_policys_for_the_last_popularity(policy):
    steps = [[9, 7, 5, 3, 2, 1], [1, 2, 3, 5, 7, 9]]
    expected = [make_policy(policy, W, S).place(Forecast.of(np.array([step])))[0] for step in steps]
    assert run(placer(policy), steps) == expected


def test_balanced_uses_more_pairs_where_loads_have_moved():
    steady = run(placer(), [[40, 20, 20, 10, 5, 5]] * 30)[-1]
    jumping = run(placer(), [[40, 20, 20, 10, 5, 5], [5, 5, 10, 20, 20, 40]] * 15 + [[40, 20, 20, 10, 5, 5]])[-1]
    assert steady.num_pairs < jumping.num_pairs


def test_layers_do_not_touch_each_other():
    steps_a, steps_b = [[9, 7, 5, 3, 2, 1]] * 3, [[1, 1, 1, 1, 1, 50]] * 3
    alone = [run(placer(), steps_a), run(placer(), steps_b)]
    both = placer()
    a, b = both.planned({"a": E, "b": E}).values()
    for i, (step_a, step_b) in enumerate(zip(steps_a, steps_b, strict=True)):
        placements = both.next_placements({"a": observe(step_a, a), "b": observe(step_b, b)})
        a, b = placements["a"], placements["b"]
        assert [a, b] == [alone[0][i], alone[1][i]]


class WrongPolicy(PlacementPolicy):
    """Has all its replicas where the tokens were not."""

    has_uniform_fallback = True

    def place(self, forecast):
        popularity_LE = forecast.popularity_LE
        coldest_L = np.argmin(popularity_LE, axis=1)
        return self.placements_of([np.r_[np.arange(E), [coldest] * 6] for coldest in coldest_L], E)


HOT = [[100 if e == hot else 1 for e in range(E)] for hot in range(E)]


def test_uniform_replicas_take_over_where_they_would_have_done_better_and_the_log_says_so():
    reports = []
    placements = run(placer(WrongPolicy(W, S), report=reports.append), [HOT[1]] * 3)
    uniform = Placement.uniform(E, W, S)
    assert placements == [uniform] * 3
    assert len(reports) == 1
    assert reports[0].startswith("layer: popularity moves so fast")


class LateWisePolicy(PlacementPolicy):
    """Wrong for its first plans, then as good as `packed`."""

    has_uniform_fallback = True
    num_wrong = 3

    def place(self, forecast):
        self.num_wrong -= 1
        rule = WrongPolicy(W, S) if self.num_wrong >= 0 else make_policy("packed", W, S)
        return rule.place(forecast)


def test_the_policy_takes_over_again_once_its_plans_would_have_done_better():
    reports = []
    placements = run(placer(LateWisePolicy(W, S), report=reports.append), [HOT[1]] * 8)
    packed = make_policy("packed", W, S).place(Forecast.of(np.array([HOT[1]])))[0]
    assert placements[0] == Placement.uniform(E, W, S)
    assert placements[-1] == packed
    assert len(reports) == 2
    assert reports[1] == "layer: placements by popularity take over again."


def test_one_bad_step_after_many_good_ones_does_not_fall_back():
    steps = [HOT[0]] * 10 + [[1, 100, 1, 1, 1, 1]] * 2
    reports = []
    run(placer(report=reports.append), steps)
    assert reports == []


def test_a_policy_without_the_uniform_fallback_is_left_alone():
    plain = type("Plain", (WrongPolicy,), {"has_uniform_fallback": False})(W, S)
    assert run(placer(plain), [HOT[0]] * 3) == list(plain.place(Forecast.of(np.array([HOT[0]] * 3))))


def test_even_loads_stay_where_they_are_and_move_at_once_when_they_are_uneven():
    steps = [[30, 20, 20, 10, 10, 10]] * 4 + [[10, 10, 10, 20, 20, 30]] * 2
    moving = run(placer("packed"), steps)
    staying = run(placer("packed", skip_when_balanced=True), steps)
    assert moving[4] != moving[3]
    # The first placement, for equal loads, is not even enough for the first step; the second one is for the next.
    assert staying[1] == staying[2] == staying[3] == moving[0]
    assert staying[4] != staying[3]


def test_an_even_placement_gives_way_to_one_with_fewer_pairs():
    even = [10, 10, 10, 10, 10, 10]
    layer = placer(skip_when_balanced=True)
    layer.planned({"layer": E})
    (everywhere,) = make_policy("packed", W, S).place(Forecast.of(np.array([even])))
    placement = layer.next_placements({"layer": observe(even, everywhere)})["layer"]
    for _ in range(40):
        placement = layer.next_placements({"layer": observe(even, placement)})["layer"]
    assert placement.num_pairs <= everywhere.num_pairs
    assert placement == layer.next_placements({"layer": observe(even, placement)})["layer"]


@pytest.mark.parametrize("policy", ["balanced", WrongPolicy(W, S)])
def test_a_restored_placer_goes_on_as_the_first_would_have(policy):
    first, second = placer(policy), placer(policy)
    last = run(first, [HOT[0], HOT[1], HOT[1]])[-1]
    second.planned({"layer": E})
    second.load_state_dict("layer", first.state_dict("layer"))
    assert second.planned({"layer": E}) == first.planned({"layer": E})
    for step in (HOT[2], HOT[2]):
        one, other = (p.next_placements({"layer": observe(step, last)})["layer"] for p in (first, second))
        assert one == other
        last = one


def test_a_policy_that_forgets_a_layer_is_told_so():
    forgetful = type("Forgetful", (PlacementPolicy,), {"place": lambda self, forecast: []})(W, S)
    with pytest.raises(ValueError, match=r"Forgetful.place gave 0 placements for 1 layers"):
        placer(forgetful).planned({"layer": E})


def test_equal_shares_a_slot_are_added_up_by_rank():
    placement = Placement([0, 0, 0, 1], 2, 2)
    assert rank_loads(np.array([30, 5]), placement.table_Ws).tolist() == [20, 15]


def test_excess_is_the_share_above_the_mean():
    assert excess(np.array([30, 10, 10, 10])) == pytest.approx(15 / 60)
    assert excess(np.array([0, 0])) == 0.0
