"""Seeds and draws by hash."""

from davir_ray.formulas.hashing import seed_from


def test_seeds_are_stable_distinct_and_below_two_to_the_63() -> None:
    assert seed_from("dropout", 0, 1, 0) == seed_from("dropout", 0, 1, 0)
    seeds = {seed_from("dropout", seed, step, rank) for seed in range(5) for step in range(20) for rank in range(3)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
