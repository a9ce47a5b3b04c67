"""What stands beside exported rows: the data set card, and what a trainer loads them by."""

import json
import posixpath
import shlex
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from davir_ray.data.exported import Form

HISTOGRAM_EDGES = [step / 10 for step in range(-5, 11)]
"""Edges of the bins of davir; what is beyond the first and the last edge counts in the bin next to it."""

_BAR = 40
"""Characters of the longest bar of the histogram."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported, from what, and how it was selected."""

    options: dict[str, Any]
    """Of the command."""
    form: Form | None
    num_rows: int
    rejects: dict[str, int]
    """Number of rows that the form has no place for, by reason."""
    histogram: list[int]
    """Number of rows in each bin of davir."""
    files: list[str]
    counts: dict[str, dict[str, int]]
    """Counts of the run's stages."""
    base: str
    reference: str | None
    num_folds: int
    sources: list[dict[str, Any]]
    rank: dict[str, Any]
    select: dict[str, Any]
    licence: str | None

    def rejected(self) -> str:
        """The rejects as text."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejects.items()))

    @property
    def place(self) -> str:
        """Where a trainer finds the rows: the name on the hub, else the folder."""
        return str(self.options["push_to_hub"] or self.options["output"])

    @property
    def suffix(self) -> str:
        """The files' extension."""
        return "parquet" if self.form is None else "jsonl"


def loader(facts: Exported) -> dict[str, str]:
    """Name and text of the file that a trainer loads the rows by; none for a form that many read."""
    trainer = facts.options["to"]
    if trainer == "trl":
        return {"load.py": f"from datasets import load_dataset\n\nrows = {_load_call(facts)}\n"}
    if trainer == "axolotl":
        return {"axolotl.yaml": yaml.safe_dump({"datasets": _axolotl(facts)}, sort_keys=False)}
    if trainer == "llamafactory":
        return {"dataset_info.json": json.dumps({_name(facts): _llamafactory(facts)}, indent=1) + "\n"}
    return {}


def _load_call(facts: Exported) -> str:
    if "://" in facts.place:
        files = f"{facts.place.rstrip('/')}/data/*.{facts.suffix}"
        kind = "parquet" if facts.form is None else "json"
        return f'load_dataset("{kind}", data_files={json.dumps(files)}, split="train")'
    return f'load_dataset({json.dumps(facts.place)}, split="train")'


def _axolotl(facts: Exported) -> list[dict[str, Any]]:
    """The entries of axolotl's `datasets:`; of object storage it reads files, not folders."""
    kind: dict[str, Any] = {"type": "alpaca"}
    if facts.form != "alpaca":
        properties = {"role": "role", "content": "content"}
        kind = {"type": "chat_template", "field_messages": "messages", "message_property_mappings": properties}
    if "://" in facts.place:
        data = f"{facts.place.rstrip('/')}/data"
        return [{"path": f"{data}/{file}", "ds_type": "json", "split": "train", **kind} for file in facts.files]
    is_local = facts.options["push_to_hub"] is None
    return [{"path": posixpath.join(facts.place, "data") if is_local else facts.place, "split": "train", **kind}]


def _llamafactory(facts: Exported) -> dict[str, Any]:
    """The entry of LLaMA-Factory's dataset_info.json; its dataset_dir is the folder of the export."""
    pushed = facts.options["push_to_hub"]
    place = {"file_name": "data"} if pushed is None else {"hf_hub_url": pushed}
    if facts.form == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        return place | {"formatting": "alpaca", "columns": columns}
    return place | {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}


def _reference(facts: Exported) -> str:
    if facts.reference:
        return f"`{_shown(facts.reference)}`"
    if facts.num_folds > 1:
        return f"for each of {facts.num_folds} folds the base, fine-tuned on the rows outside of it"
    return "the base, fine-tuned on all rows"


def card(facts: Exported) -> str:
    """README.md: the head that the hub and `datasets` read, and what the rows are."""
    head: dict[str, Any] = {} if facts.licence is None else {"license": facts.licence}
    files = [{"split": "train", "path": f"data/*.{facts.suffix}"}]
    head |= {"configs": [{"config_name": "default", "data_files": files}], "tags": ["davir", "data-selection"]}
    scored = facts.options["rows"] == "scored"
    counts = {
        "rows read": facts.counts["prepare"]["read"],
        "rejected while reading": facts.counts["prepare"]["rejected"],
        "scored": facts.counts["score"]["scored"],
        "ranked": facts.counts["rank"]["ranked"],
        "selected": facts.counts["select"]["selected"],
        "rows here": facts.num_rows,
    }
    rejected = f"\n{sum(facts.rejects.values())} rows are left out: {facts.rejected()}.\n" if facts.rejects else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---
# {_name(facts)}

{"Every row" if scored else f"The {_rows(facts)}"} of {_sources(facts)}, with its rank, score and losses by
[DavIR](https://arxiv.org/abs/2310.13008): `davir` = (`base_nll` − `reference_nll`) / `base_nll`.

| | |
|---|---|
| base | `{_shown(facts.base)}` |
| reference | {_reference(facts)} |
| order of the ranking | {_settings(facts.rank)} |
| selection | {"not applied" if scored else _settings(facts.select)} |
| order of the rows | {_order(facts)} |
| licence | {facts.licence or "not known; it is that of the source"} |
{"".join(f"| {name} | {count:,} |{chr(10)}" for name, count in counts.items())}{rejected}
Rows by `davir`:

```
{_histogram(facts.histogram)}
```

```
{_command(facts)}
```
"""


def _rows(facts: Exported) -> str:
    return "mixture" if facts.options["rows"] == "mixture" else "selection"


def _name(facts: Exported) -> str:
    return posixpath.basename(facts.place.rstrip("/"))


def _sources(facts: Exported) -> str:
    return ", ".join(
        " + ".join(f"`{_shown(path)}`" for path in ([paths] if isinstance(paths, str) else paths))
        + f" ({source['format']})"
        for source in facts.sources
        for paths in [source["path"]]
    )


def _shown(path: str) -> str:
    """A URI or a name on the hub; of a path on this machine only the last part, as a card is for others."""
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    return path if "://" in path or not is_path else posixpath.basename(path.rstrip("/"))


def _settings(section: dict[str, Any]) -> str:
    given = {name: value for name, value in section.items() if value not in (None, False, [], {})}
    return ", ".join(f"{name} `{json.dumps(value)}`" for name, value in given.items())


def _order(facts: Exported) -> str:
    if facts.options["rows"] == "mixture":
        return f"random (seed {facts.select['shuffle_seed']})"
    return f"random (seed {facts.options['seed']})" if facts.options["shuffle"] else "by rank, 1 first"


def _histogram(counts: list[int]) -> str:
    lines, most = [], max(1, *counts)
    for number, (count, (low, high)) in enumerate(zip(counts, pairwise(HISTOGRAM_EDGES), strict=True)):
        name = f"{low:+.1f} to {high:+.1f}"
        name = f"below {high:+.1f}" if number == 0 else f"from {low:+.1f}" if number == len(counts) - 1 else name
        lines.append(f"{name:<13} {count:>9,}  {'#' * round(_BAR * count / most)}".rstrip())
    return "\n".join(lines)


def _command(facts: Exported) -> str:
    words = ["python", "jobs/export.py"]
    for name, value in facts.options.items():
        if value is True:
            words.append(f"--{name}")
        elif value not in (None, False, 0):
            words += [f"--{name}", _shown(value) if name in ("run", "output") else str(value)]
    return shlex.join(words)
