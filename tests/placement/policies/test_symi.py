from tests.placement.policies.cases import table_of


def test_symi_lays_replicas_by_popularity_out_expert_by_expert():
    assert table_of("symi", [40, 20, 10, 10], 4, 2) == [[0, 0], [0, 0], [1, 1], [2, 3]]
