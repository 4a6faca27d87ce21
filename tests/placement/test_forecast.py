import numpy as np
import pytest

from swiftmoe_lightning.placement.forecast import DEFAULT_SPREAD, Forecaster


def after(steps, num_experts=2):
    forecaster = Forecaster(num_experts)
    for step in steps:
        forecaster.update(np.array(step))
    return forecaster


def test_without_a_step_nothing_is_expected_and_the_spread_is_a_guess():
    forecaster = after([])
    assert forecaster.expected_E.tolist() == [0, 0]
    assert forecaster.spread(16) == pytest.approx(DEFAULT_SPREAD)


def test_the_last_step_is_expected_again():
    assert after([[30, 10], [10, 30]]).expected_E.tolist() == [10, 30]


def test_a_step_without_tokens_changes_nothing():
    before, now = after([[30, 10], [20, 20]]), after([[30, 10], [20, 20], [0, 0]])
    assert now.expected_E.tolist() == before.expected_E.tolist()
    assert now.spread(4) == before.spread(4)


def test_the_spread_is_the_variance_over_the_load_in_mean_loads_of_a_rank():
    # Half of (10^2 + 10^2) over 40 assignments is 2.5; one of 4 ranks has 10 on average. The guess weighs as
    # much as 4.5 steps.
    assert after([[30, 10], [20, 20]]).spread(4) == pytest.approx((0.9 * 5 * DEFAULT_SPREAD + 0.25) / (0.9 * 5 + 1))


def test_the_spread_of_steady_loads_falls_and_of_jumping_ones_rises():
    steady, jumping = after([[30, 10]] * 40), after([[30, 10], [0, 40]] * 20)
    assert steady.spread(8) < 0.02 < DEFAULT_SPREAD < 1.0 < jumping.spread(8)


def test_twice_the_batch_has_the_same_spread():
    assert after([[3, 1], [2, 2]]).spread(4) == pytest.approx(after([[300, 100], [200, 200]]).spread(4))


def test_a_restored_forecaster_goes_on_as_the_first_would_have():
    first, second = after([[30, 10], [20, 20]]), Forecaster(2)
    second.load_state_dict(first.state_dict())
    for forecaster in (first, second):
        forecaster.update(np.array([7, 9]))
    assert first.expected_E.tolist() == second.expected_E.tolist()
    assert first.spread(3) == second.spread(3)
