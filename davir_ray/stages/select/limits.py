"""What the rule takes of each group, and so how much of it each file of ranked/ may give."""

from collections import defaultdict
from typing import Any

from davir_ray.config.selection import Part, SelectConfig, count_from_fraction
from davir_ray.errors import ConfigError
from davir_ray.formulas.shares import Limit, by_file, proportional
from davir_ray.stages.select.choice import Limits


def limits_by_file(counted: list[dict[str, Any]], config: SelectConfig) -> dict[str, Limits]:
    """How much each file may give of each group, from rows of (group, name of the file, rows, tokens) in rank order.

    ConfigError if the rule asks for more than there is, or leaves nothing.
    """
    by_group: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in counted:
        by_group[row["group"]][row["name"]] = (row["rows"], row["tokens"])
    pools = {
        group: Limit(sum(rows for rows, _ in files.values()), sum(tokens for _, tokens in files.values()))
        for group, files in by_group.items()
    }
    limits: dict[str, Limits] = defaultdict(dict)
    for group, limit in _group_limits(pools, config).items():
        rows, tokens = zip(*by_group[group].values(), strict=True)
        for name, part in zip(by_group[group], by_file(limit, rows, tokens), strict=True):
            limits[name][group] = part
    return dict(limits)


def _group_limits(pools: Limits, config: SelectConfig) -> Limits:
    """What the rule takes of each group."""
    if config.quotas:
        return {
            group: _at_most(f"select.quotas of {group!r}", rows, pools.get(group))
            for group, rows in config.quotas.items()
        }
    if config.mixture:
        return {part.source: _part_limit(part, pools.get(part.source)) for part in config.mixture}
    num_rows = sum(pool.rows or 0 for pool in pools.values())
    num_tokens = sum(pool.tokens or 0 for pool in pools.values())
    if not num_rows:
        raise ConfigError("select leaves no row; loosen its filters or select.min_score")
    if config.top_tokens is not None:
        shares = proportional(
            min(config.top_tokens, num_tokens), {group: pool.tokens or 0 for group, pool in pools.items()}
        )
        return {group: Limit(tokens=tokens) for group, tokens in shares.items()}
    if config.min_score is not None:
        return dict.fromkeys(pools, Limit())
    total = config.top_k
    if total is None:
        total = count_from_fraction(config.top_fraction or 1.0, num_rows)
    if total > num_rows:
        raise ConfigError(f"select.top_k is {total}, but only {num_rows} rows may be selected; ask for fewer")
    shares = proportional(total, {group: pool.rows or 0 for group, pool in pools.items()})
    return {group: Limit(rows=rows) for group, rows in shares.items()}


def _at_most(rule: str, rows: int, pool: Limit | None) -> Limit:
    there = pool.rows or 0 if pool else 0
    if rows > there:
        raise ConfigError(f"{rule} is {rows}, but only {there} rows of it may be selected; ask for fewer")
    return Limit(rows=rows)


def _part_limit(part: Part, pool: Limit | None) -> Limit:
    """What a part of a mixture takes of its source."""
    rule = f"select.mixture of {part.source!r}:"
    if pool is None or not pool.rows:
        raise ConfigError(
            f"{rule} no row of this source may be selected; name one of the sources, or loosen the filters"
        )
    if part.top_k is not None:
        return _at_most(f"{rule} top_k", part.top_k, pool)
    if part.top_fraction is not None:
        return Limit(rows=count_from_fraction(part.top_fraction, pool.rows))
    return Limit(tokens=part.top_tokens)
