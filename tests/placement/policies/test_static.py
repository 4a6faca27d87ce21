from tests.placement.policies.cases import table_of


def test_static_lays_equal_replicas_out_expert_by_expert_whatever_the_popularity():
    assert table_of("static", [900, 0, 0], 4, 2) == [[0, 0], [0, 1], [1, 1], [2, 2]]
