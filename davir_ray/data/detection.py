"""Which format a source's records have: found from the columns, and from what they hold in the first records."""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data.conversation import MARKS, is_filled
from davir_ray.data.files import Slice, SourceFile
from davir_ray.data.formats import (
    FORMATS,
    MEDIA_COLUMNS,
    FormatSpec,
    Row,
    check_columns,
    is_marked_bad,
    row_of,
    spec_of,
    unread_column,
)
from davir_ray.data.records import Record, read_records
from davir_ray.errors import ConfigError, DataError
from davir_ray.text import shorten

log = logging.getLogger(__name__)

SAMPLED_RECORDS = 300

_MIN_SHARE = 0.5
"""Share of the sampled records that must have a format's columns; the others may be bad rows."""


def with_format(source: Source, files: list[SourceFile], options: PrepareConfig, *, pairs: bool = False) -> Source:
    """The source with its format, after the check that its first records, those of its files, lose nothing by it.

    A format that is found is logged in one line with what was seen. With `pairs` it must be one of pairs. Raises
    ConfigError for a format or a column that does not fit, DataError for data that fit no format or several, and for
    columns that would change the prompt and are not read.
    """
    if source.format != "auto":
        _check_kind(source, pairs)
        check_columns(source)
    rows = chain.from_iterable(read_records(Slice(file)) for file in files)
    records = [row for row in islice(rows, SAMPLED_RECORDS) if isinstance(row, Record)]
    if source.format == "auto":
        source = _found(source, records, pairs)
        log.info("format of %s: %s", shorten(", ".join(source.paths), 200), _seen(source, records))
    for record in records:
        row = row_of(record.fields, source, options=options)
        if name := row.unread():
            where = f"{source.paths[0]}: {record.source_file} row {record.source_row}"
            raise DataError(f"{where}: {unread_column(name, source)}")
    return source


def _check_kind(source: Source, pairs: bool) -> None:
    if spec_of(source).is_pairs and not pairs:
        raise ConfigError(f"source {source.name!r} has the format {source.format}; jobs/align.py trains on pairs")
    if pairs and not spec_of(source).is_pairs:
        names = ", ".join(name for name, spec in FORMATS.items() if spec.is_pairs)
        raise ConfigError(f"source {source.name!r} has the format {source.format}; jobs/align.py needs one of {names}")


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    format: Format
    names: frozenset[str]
    """Names in the data of the columns that every record must have."""


def _found(source: Source, records: list[Record], pairs: bool) -> Source:
    """The source with the only format that its records fit."""
    path = source.paths[0] if len(source.paths) == 1 else f"source {source.name!r}"
    if not records:
        raise DataError(f"{path} has no record to find the format in; correct the data, or give the format")
    candidates = _most_specific(_candidates(source, records))
    fitting = [one.format for one in candidates if FORMATS[one.format].is_pairs == pairs]
    seen = shorten(", ".join(sorted(set(chain.from_iterable(record.fields for record in records)))), 300)
    if len(fitting) == 1:
        return replace(source, format=fitting[0])
    if fitting:
        raise DataError(
            f"the format of {path} is ambiguous: its columns ({seen}) fit {' and '.join(fitting)}; give one of them "
            "(--format, or format of the source)"
        )
    if candidates:
        other = "jobs/align.py trains on pairs" if not pairs else "jobs/align.py needs pairs"
        raise DataError(f"{path} has the format {candidates[0].format}, by its columns ({seen}); {other}")
    needed = "; ".join(
        f"{name}: {', '.join(own for own, one in spec.columns.items() if one.needed)}"
        for name, spec in FORMATS.items()
        if spec.is_pairs == pairs
    )
    raise DataError(
        f"no format fits {path}, which has the columns {seen}. The formats need these columns: {needed}. Name those of "
        "the data, such as --columns '{instruction: question}' with --format alpaca"
    )


def _candidates(source: Source, records: list[Record]) -> list[_Candidate]:
    """The formats whose columns most records have, with what these must hold."""
    found = []
    for form, spec in FORMATS.items():
        if not source.renamed.keys() <= spec.columns.keys():
            continue
        rows = [row_of(record.fields, replace(source, format=form)) for record in records]
        fitting = [row for row in rows if _fits(row, spec)]
        if len(fitting) >= _MIN_SHARE * len(rows):
            names = frozenset(fitting[0].name(own) for own, one in spec.columns.items() if one.needed)
            found.append(_Candidate(format=form, names=names))
    return found


def _fits(row: Row, spec: FormatSpec) -> bool:
    """Whether a record has every column that the format needs, with what it must hold."""
    needed = (own for own, one in spec.columns.items() if one.needed)
    return all((value := row.get(own)) is not None and spec.columns[own].kind.holds(value) for own in needed)


def _most_specific(candidates: list[_Candidate]) -> list[_Candidate]:
    """Without those whose columns are only some of another's: a pair's conversation is also a conversation."""
    return [one for one in candidates if not any(one.names < other.names for other in candidates)]


def _seen(source: Source, records: list[Record]) -> str:
    """What the records hold, in one line: the columns, and how many rows have what changes an example."""
    rows = [row_of(record.fields, source) for record in records]
    spec, parts, counts = spec_of(source), list[str](), Counter[str]()
    for own, one in spec.columns.items():
        filled = [row for row in rows if is_filled(row.get(own))]
        if one.needed:
            parts.append(f"{filled[0].name(own) if filled else own}{one.kind.words}")
        elif own == "label":
            counts["marked bad, left out"] = sum(is_marked_bad(row) for row in rows)
        elif filled:
            counts[f"with {filled[0].name(own)}"] = len(filled)
    for row in rows:
        turns = [turn for own in spec.columns for turn in _turns(row.get(own))]
        counts["with a system turn"] += any("system" in (turn.get("role"), turn.get("from")) for turn in turns)
        counts["with marks of what is scored"] += any(turn.get(mark) is not None for turn in turns for mark in MARKS)
        counts["with images, audio or video (rejects)"] += any(
            is_filled(row.fields.get(name)) for name in MEDIA_COLUMNS
        )
    extras = [f"{count} {what}" for what, count in counts.items() if count]
    return f"{source.format}: {', '.join(parts)}; of {len(rows)} rows {', '.join(extras) or 'none with more'}"


def _turns(value: Any) -> list[dict[str, Any]]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
