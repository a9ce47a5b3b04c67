"""The options of jobs/rank.py: changes to a finished run's own rank and select settings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import yaml

from davir_ray.config.checks import check_no_secret
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import keep_rules, rules_in
from davir_ray.config.sources import Source
from davir_ray.config.yaml import load, refuse_without_effect
from davir_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """The options of jobs/rank.py, from the command line and its --config."""

    OPTIONS: ClassVar = ("output", "output_is_shared", "trust_remote_code", "rank", "select")
    """The fields of RunConfig that are options."""

    output: str
    """Folder of the finished run."""
    output_is_shared: bool = False
    """See OutputConfig."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base. Only the command line can allow it, not --config."""
    changes: dict[str, Any] = field(default_factory=dict)
    """New values of fields of rank and select, by dotted name."""
    stated: dict[str, Any] = field(default_factory=dict)
    """Values that --config has for other fields, by dotted name; they must equal the run's own."""
    on_command_line: tuple[str, ...] = ()
    """Dotted names of the fields given on the command line itself."""

    @classmethod
    def of(cls, given: Mapping[str, Any], on_command_line: Mapping[str, Any]) -> Self:
        """The options from values by dotted name: `given` has those of --config, too."""
        if not given.get("output"):
            raise ConfigError("no output is given; add --output DIR, the folder of a finished run of jobs/score.py")
        changes = {name: value for name, value in given.items() if name.split(".")[0] in ("rank", "select")}
        for section in changes.keys() & {"rank", "select"}:
            raise ConfigError(f"{section} is empty; give it fields, or leave it out")
        if rules := rules_in(on_command_line, "select."):  # a rule on the command line replaces the rule of the file
            for other in set(rules_in(changes, "select.")) - set(rules):
                del changes[f"select.{other}"]
        not_stated = ("output", "output_is_shared", "rank", "select")
        return cls(
            output=given["output"],
            output_is_shared=given.get("output_is_shared", False),
            trust_remote_code=on_command_line.get("trust_remote_code", False),
            changes=changes,
            stated={
                name: value
                for name, value in given.items()
                if name not in on_command_line and name.split(".")[0] not in not_stated
            },
            on_command_line=tuple(on_command_line),
        )

    def applied_to(self, own: RunConfig) -> RunConfig:
        """The run's own configuration with the changes; raises ConfigError if they contradict it."""
        values = dataclasses.asdict(own)
        self._check_stated(values)
        if rules := rules_in(self.changes, "select."):
            keep_rules(values["select"], rules)
        if self.changes.get("rank.repeats", own.rank.repeats) != own.rank.repeats:
            # The order follows from them, unless it is given.
            values["rank"]["order"] = None
        for name, value in self.changes.items():
            section, _, key = name.partition(".")
            values[section][key] = value
        values["output_is_shared"] |= self.output_is_shared
        config = load(RunConfig, yaml.safe_dump(values))
        refuse_without_effect(config, self.on_command_line)
        for name in ("min_score", "max_score"):
            score, own_order = getattr(config.select, name), (own.rank.order, own.rank.lowest)
            if (
                score is not None
                and f"select.{name}" not in self.changes
                and own_order != (config.rank.order, config.rank.lowest)
            ):
                raise ConfigError(
                    f"select.{name} is {score}, which the run has for another order ({own.rank.order}); give one for "
                    f"the order {config.rank.order}"
                )
        return config

    def _check_stated(self, own: dict[str, Any]) -> None:
        """Raise ConfigError if the file and the run differ in a field that ranking again cannot change."""
        for name, value in self.stated.items():
            if name in ("overwrite", "dry_run") and not value:  # switched off, they request nothing
                continue
            check_no_secret(
                name, [uri for uri in (value if isinstance(value, list) else [value]) if isinstance(uri, str)]
            )
            in_run: Any = own
            for part in name.split("."):
                in_run = in_run[part]
            if name == "format" and value in ("auto", None):  # the run knows what was found
                continue
            if name == "sources":
                value = [dataclasses.asdict(Source(**source)) for source in value]
                for source, known in zip(value, in_run, strict=False):
                    source["format"] = known["format"] if source["format"] == "auto" else source["format"]
            if value != in_run:
                raise ConfigError(
                    f"{name} is {value!r} in the configuration file but {in_run!r} in the run {self.output}; ranking "
                    "again can change only rank and select: correct the file, or use it with jobs/score.py"
                )
