"""What jobs/rank.py is asked for: changes of a finished run's own rank and select settings."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from davir_ray.cli import (
    NO_RULE,
    flat,
    load,
    new_parser,
    parse_words,
    refuse_repeated,
    refuse_without_effect,
    rules_in,
    show_debug,
    split_config,
)
from davir_ray.config import RunConfig, Source, check_no_secret
from davir_ray.errors import ConfigError

_TAKEN = ("output", "output_is_shared", "trust_remote_code", "rank", "select")
_SWITCHES = ("overwrite", "dry_run")
"""What they say is for one command: off, they ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """The options of a command line, and what its --config says beside them."""

    output: str
    """Folder of the finished run."""
    output_is_shared: bool = False
    """As in OutputConfig."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base; by the command's own flag, whatever --config says."""
    changes: dict[str, Any] = field(default_factory=dict)
    """New values of fields of rank and select, by dotted name."""
    stated: dict[str, Any] = field(default_factory=dict)
    """Values that --config has for other fields, by dotted name: those of the run, or it is of another run."""
    on_command_line: tuple[str, ...] = ()
    """Names of what stands on the command line itself."""

    def applied_to(self, own: RunConfig) -> RunConfig:
        """The run's configuration with the changes; ConfigError where they contradict it."""
        values = dataclasses.asdict(own)
        self._check_stated(values)
        if rules := rules_in(self.changes):
            values["select"] |= {rule: value for rule, value in NO_RULE.items() if rule not in rules}
        for name, value in self.changes.items():
            section, _, key = name.partition(".")
            values[section][key] = value
        values["output_is_shared"] |= self.output_is_shared
        config = load(RunConfig, yaml.safe_dump(values))
        self._check_effect(own, config)
        return config

    def _check_stated(self, own: dict[str, Any]) -> None:
        """ConfigError where a file has another value than the run, of which nothing else can be changed here."""
        for name, value in self.stated.items():
            if name in _SWITCHES and not value:
                continue
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str):
                    check_no_secret(name, place)
            if name == "sources":
                value = [dataclasses.asdict(Source(**source)) for source in value]
            there: Any = own
            for part in name.split("."):
                there = there[part]
            if value != there:
                raise ConfigError(
                    f"{name} is {value!r} in the configuration file but {there!r} in the run {self.output}; ranking "
                    "again changes rank and select only: correct the file, or score with it by jobs/score.py"
                )

    def _check_effect(self, own: RunConfig, config: RunConfig) -> None:
        """ConfigError for a change without effect, or one that gives another meaning to what stays."""
        refuse_without_effect(config, self.on_command_line)
        least, same = config.select.min_score, ("order", "lowest")
        before, now = (tuple(getattr(one.rank, name) for name in same) for one in (own, config))
        if least is not None and "select.min_score" not in self.changes and before != now:
            raise ConfigError(
                f"select.min_score is {least}, the run's own for another order ({own.rank.order}); give a rule for the "
                f"order {config.rank.order}"
            )


def parse_rank(argv: list[str], description: str = "") -> RankOptions:
    """The options of jobs/rank.py; ConfigError for anything misspelt, repeated, or of another job.

    --config may be the file that the run was scored with.
    """
    refuse_repeated(argv)
    words, _ = split_config(argv)
    _refuse_others(words)
    parser = _parser(description)
    given = flat(parse_words(parser, argv, defaults=False))
    options = flat(parse_words(parser, words, defaults=False))
    if given.get("debug"):
        show_debug()
    if not given.get("output"):
        raise ConfigError("no output is given; add --output DIR, the folder of a finished run of jobs/score.py")
    changes = {name: value for name, value in given.items() if name.split(".")[0] in ("rank", "select")}
    if brought := rules_in(options):  # a rule on the command line replaces the file's
        changes = {name: value for name, value in changes.items() if not rules_in({name: value}) - brought}
    for section in changes.keys() & {"rank", "select"}:
        raise ConfigError(f"{section} is empty; give it fields, or leave it out")
    return RankOptions(
        output=given["output"],
        output_is_shared=given.get("output_is_shared", False),
        trust_remote_code=options.get("trust_remote_code", False),
        changes=changes,
        stated={
            name: value
            for name, value in given.items()
            if name not in options and name.split(".")[0] not in ("output", "output_is_shared", "rank", "select")
        },
        on_command_line=tuple(options),
    )


def _refuse_others(words: list[str]) -> None:
    """Refuse options of jobs/score.py that are not taken, and those that add to a list: the run has the rest of it."""
    known = {field.name for field in dataclasses.fields(RunConfig)} - {*_TAKEN}
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if option.removeprefix("--").split(".")[0].rstrip("+") in known:
            raise ConfigError(
                f"jobs/rank.py does not take {option}; it ranks and selects again from the scores of a finished run, "
                "and takes --output, --output_is_shared, --trust_remote_code, --rank.* and --select.*"
            )
        if option.endswith("+"):
            raise ConfigError(f"jobs/rank.py does not take {option}; give the whole list: {option[:-1]} '[a, b]'")


def _parser(description: str) -> ArgumentParser:
    """The parser of jobs/score.py, so that --config may be its file; --help and --print_config show what is taken."""
    parser = new_parser(RunConfig, description)
    for action in parser._actions:
        if action.dest.split(".")[0] not in (*_TAKEN, "help", "config", "print_config", "debug"):
            action.help = argparse.SUPPRESS
    return parser
