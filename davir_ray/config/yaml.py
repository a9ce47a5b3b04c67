"""Configurations as YAML: what a file may say, how it is read strictly, how the resolved one is written."""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import path_type

from davir_ray.config.run import OutputConfig
from davir_ray.config.selection import SELECT_RULES
from davir_ray.errors import ConfigError
from davir_ray.text import decoded

NO_RULE: dict[str, Any] = {**dict.fromkeys(SELECT_RULES), "quotas": {}, "mixture": []}
"""Fields of a selection without any rule."""

T = TypeVar("T", bound=OutputConfig)
"""The configuration of a job: a frozen dataclass, validated when it is made."""

DEBUG_HELP = "Show what Ray and its workers print, too, which otherwise goes to Ray's log files."


def dump(config: Any) -> str:
    """The resolved configuration as YAML that --config accepts."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def load(settings: type[T], text: str) -> T:
    """The configuration that `dump` wrote."""
    parser = new_parser(settings, "")
    try:
        return configuration(settings, parser, parser.parse_string(text))
    except argparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error


class _Parser(ArgumentParser):
    """jsonargparse's, which would read a configuration file in the terminal's encoding."""

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """The settings of a configuration file: local, in a store, or standard input (-)."""
        place: Any = path_type("fsr")(path)  # a file or whatever fsspec reads
        with place.relative_path_context(), place.open("rb") as file:
            content = file.read()
            try:
                text = content if isinstance(content, str) else decoded(content)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
            values: Namespace = self.parse_string(text, os.path.basename(path), *args, **kwargs)
            return values


def new_parser(settings: type[Any], description: str) -> ArgumentParser:
    """A parser whose options, and the keys of its --config, are the fields of the settings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    load_yaml_strictly()
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these fields; options override it.")
    parser.add_argument("--debug", type=bool, default=False, help=DEBUG_HELP)
    parser.add_class_arguments(settings, as_group=False)
    _let_flags_stand_alone(parser)
    for action in parser._actions:
        if isinstance(action.metavar, str):  # jsonargparse takes back a space of its help by a control character
            action.metavar = action.metavar.lstrip("\b")
    return parser


_PLAIN_YAML = get_loader("yaml")


def load_yaml_strictly() -> None:
    """Let jsonargparse refuse what repeats a key, in a file or in the value of an option; the last would count."""
    set_loader("yaml", _load_yaml, (yaml.YAMLError,))


def _load_yaml(text: str) -> Any:
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "", {})
    except RecursionError as error:
        raise ConfigError("the YAML holds itself by an alias, or too many levels; write it out flat") from error
    return _PLAIN_YAML(text)


def _refuse_repeated_keys(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    """Refuse a key that stands twice, also as `a.b` and as `b` of `a`; `lines` are those of the keys by dotted name."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, "", {})
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in lines:
                where = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
                raise ConfigError(
                    f"the key {name!r} stands twice in the YAML ({where}); only the last would count, so keep one"
                )
            lines[name] = line
            _refuse_repeated_keys(value, f"{name}.", lines)


def configuration(settings: type[T], parser: ArgumentParser, values: Namespace) -> T:
    """The settings that parsed values make; ConfigError where a section is left empty."""
    for name in _field_names(settings):
        if values[name] is None and dataclasses.is_dataclass(getattr(settings(), name)):
            raise ConfigError(f"{name} is empty; give it fields, or leave it out")
    filled = parser.instantiate(values)
    return settings(**{name: filled[name] for name in _field_names(settings)})


def _field_names(settings: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


def _let_flags_stand_alone(parser: ArgumentParser) -> None:
    """Let `--overwrite` mean `--overwrite true`: jsonargparse wants the value spelt out."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True


def refuse_without_effect(config: OutputConfig, given: Iterable[str]) -> None:
    """Refuse an option of the command line that changes nothing; of a file's fields the job tells."""
    unused = config.without_effect()
    for name in given:
        if name in unused and not name.startswith("estimate."):  # a run that follows a dry run may still have these
            raise ConfigError(f"--{name} has no effect: {unused[name]}; leave it out")


def flat(values: Namespace) -> dict[str, Any]:
    """Values by dotted name, nested settings as plain dictionaries."""
    own = ("config", "debug")  # options of the command line that no settings have
    return {name: _plain(value) for name, value in values.items(branches=False) if name not in own}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.as_dict() if isinstance(value, Namespace) else value


def rules_in(given: Mapping[str, Any]) -> set[str]:
    """Names of the selection rules that are set, of values by dotted name."""
    return {rule for rule in SELECT_RULES if given.get(f"select.{rule}") not in (None, {}, [])}
