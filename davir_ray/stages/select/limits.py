"""How much the rule takes from each group, and how much of that comes from each file of ranked/."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from davir_ray.config.selection import Part, SelectConfig, count_from_fraction
from davir_ray.errors import ConfigError
from davir_ray.formulas.shares import Limit, by_file, proportional

Limits = dict[str, Limit]
"""A limit for each group."""


class GroupCount(NamedTuple):
    """The rows of one group, in one file of ranked/, that may be selected."""

    file: str
    group: str
    rows: int
    tokens: int
    """Scored tokens."""


def limits_by_file(counts: Iterable[GroupCount], config: SelectConfig) -> dict[str, Limits]:
    """The limit of each group in each file that it is taken from, from the counts in rank order.

    Raises ConfigError if the rule asks for more rows than there are, or leaves none.
    """
    by_group: dict[str, list[GroupCount]] = defaultdict(list)
    for count in counts:
        by_group[count.group].append(count)
    rows = {group: sum(count.rows for count in found) for group, found in by_group.items()}
    tokens = {group: sum(count.tokens for count in found) for group, found in by_group.items()}
    limits: dict[str, Limits] = defaultdict(dict)
    for group, limit in _limits_by_group(rows, tokens, config).items():
        found = by_group[group]
        parts = by_file(limit, [count.rows for count in found], [count.tokens for count in found])
        for count, part in zip(found, parts, strict=True):
            if 0 not in (part.rows, part.tokens):  # else nothing is taken: every row has a token
                limits[count.file][group] = part
    return dict(limits)


def _limits_by_group(rows: dict[str, int], tokens: dict[str, int], config: SelectConfig) -> Limits:
    """How much the rule takes from each group, given the rows and scored tokens of each that may be selected."""
    if config.quotas:
        for group, quota in config.quotas.items():
            _check_enough(f"select.quotas of {group!r}", quota, rows.get(group, 0))
        return {group: Limit(rows=quota) for group, quota in config.quotas.items()}
    if config.mixture:
        return {part.source: _limit_of_part(part, rows.get(part.source, 0)) for part in config.mixture}
    num_rows = sum(rows.values())
    if not num_rows:
        raise ConfigError("select leaves no row; loosen its filters or select.min_score")
    if config.min_score is not None:
        return dict.fromkeys(rows, Limit())
    if config.top_tokens is not None:
        shares = proportional(min(config.top_tokens, sum(tokens.values())), tokens)
        return {group: Limit(tokens=share) for group, share in shares.items()}
    total = config.top_k
    if total is None:
        total = count_from_fraction(config.top_fraction or 1.0, num_rows)
    if total > num_rows:
        raise ConfigError(f"select.top_k is {total}, but only {num_rows} rows may be selected; ask for fewer")
    return {group: Limit(rows=share) for group, share in proportional(total, rows).items()}


def _limit_of_part(part: Part, num_rows: int) -> Limit:
    """How much a part of a mixture takes from the rows of its source that may be selected."""
    rule = f"select.mixture of {part.source!r}:"
    if not num_rows:
        raise ConfigError(
            f"{rule} no row of this source may be selected; name one of the sources, or loosen the filters"
        )
    if part.top_k is not None:
        _check_enough(f"{rule} top_k", part.top_k, num_rows)
        return Limit(rows=part.top_k)
    if part.top_fraction is not None:
        return Limit(rows=count_from_fraction(part.top_fraction, num_rows))
    return Limit(tokens=part.top_tokens)


def _check_enough(rule: str, wanted: int, num_rows: int) -> None:
    if wanted > num_rows:
        raise ConfigError(f"{rule} is {wanted}, but only {num_rows} rows of it may be selected; ask for fewer")
