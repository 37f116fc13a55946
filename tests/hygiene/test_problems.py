"""The tools of the tests themselves."""

from itertools import combinations, product

from tests.problems import pairwise


def test_any_two_levels_meet_in_far_fewer_combinations():
    factors = ["abcdefghij", range(5), (True, False), ("x", "y", "z")]
    rows = pairwise(*factors)
    assert 50 <= len(rows) < 70 < 300 and len(set(rows)) == len(rows)
    for a, b in combinations(range(len(factors)), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(factors[a], factors[b]))
    assert pairwise("ab", "c") == [("a", "c"), ("b", "c")]
