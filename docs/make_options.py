"""Print docs/options.md, the table of every setting, from the settings themselves.

Usage: python docs/make_options.py > docs/options.md
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from davir_ray.config.align import AlignRunConfig
from davir_ray.config.compare import CompareConfig
from davir_ray.config.export import ExportOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import Part
from davir_ray.config.sources import Source
from davir_ray.config.yaml import new_parser

HEAD = """# Options

Every option is also a field of the YAML file of `--config`: `--select.top_k 3000` is `select: {top_k: 3000}`.
`jobs/finetune.py` takes the options of `jobs/score.py` except `--dry_run` and `--reference`; `jobs/rank.py` takes its
`--output`, `--output_is_shared`, `--trust_remote_code`, `--rank.*` and `--select.*`; `--help` of the other jobs lists
their few. An empty default is an empty list or None, which is `null` in YAML; "None: …" says what happens then.
`python docs/make_options.py` made this page.
"""

MISSING = object()
"""Stands for the default of an option that is not listed yet."""

TABLE = "| option | default | meaning |\n|---|---|---|"

SECTIONS: dict[str, type[Any]] = {
    "jobs/score.py": RunConfig,
    "jobs/align.py: options and defaults of its own": AlignRunConfig,
    "jobs/compare.py: options and defaults of its own": CompareConfig,
    "jobs/export.py: options of its own": ExportOptions,
}
ITEMS: dict[str, type[Any]] = {
    "An item of `sources` or `heldout_sources`": Source,
    "An item of `select.mixture`": Part,
}


def row(name: str, default: Any, meaning: str | None) -> str:
    """One line of a table."""
    shown = "" if default in (None, [], {}) else f"`{str(default).lower()}`"
    text = " ".join((meaning or "").split()).replace("|", "\\|").replace("<", "\\<")
    return f"| `{name}` | {shown} | {text} |"


def options(settings: type[Any]) -> Iterator[tuple[str, argparse.Action]]:
    """The options of a job by the title of their group, in the order of its --help."""
    for group in new_parser(settings, "")._action_groups:
        for action in group._group_actions:
            if action.option_strings and action.default != argparse.SUPPRESS:
                yield "The run" if group.title == "options" else " ".join(str(group.title).split()), action


def page() -> str:
    """The whole page; an option that several jobs have with the same default is listed under the first of them."""
    lines, listed = [HEAD], dict[str, Any]()
    for heading, settings in SECTIONS.items():
        lines.append(f"## {heading}\n")
        found = list(options(settings))
        new = [(title, action) for title, action in found if listed.get(action.dest, MISSING) != action.default]
        for title, group in itertools.groupby(new, key=lambda pair: pair[0]):
            rows = [row(action.option_strings[0], action.default, action.help) for _, action in group]
            lines.append("\n".join([f"{title}:\n", TABLE, *rows, ""]))
        listed |= {action.dest: action.default for _, action in new if action.dest not in listed}
    for heading, item in ITEMS.items():
        fields = [action for _, action in options(item) if action.dest != "debug"]
        rows = [row(action.dest, action.default, action.help) for action in fields]
        lines.append("\n".join([f"## {heading}\n", TABLE.replace("option", "field"), *rows, ""]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
