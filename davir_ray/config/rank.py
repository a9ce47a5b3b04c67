"""Changes of a finished run's own rank and select settings: what jobs/rank.py is asked for."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

from davir_ray.config.checks import check_no_secret
from davir_ray.config.run import RunConfig
from davir_ray.config.sources import Source
from davir_ray.config.yaml import (
    NO_RULE,
    load,
    refuse_without_effect,
    rules_in,
)
from davir_ray.errors import ConfigError

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
