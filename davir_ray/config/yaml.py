"""Settings as YAML and as command-line options: parsing files strictly, and writing the resolved configuration."""

import argparse
import dataclasses
import os
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import path_type

from davir_ray.config.run import OutputConfig
from davir_ray.errors import ConfigError
from davir_ray.text import decoded, one_line

T = TypeVar("T")
"""The settings of a job: a frozen dataclass, validated when it is made."""

_COMMON_OPTIONS = ("help", "config", "print_config", "debug")


def dump(config: Any) -> str:
    """The resolved configuration as YAML that --config accepts."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def load(settings: type[T], text: str) -> T:
    """The configuration that `dump` wrote."""
    parser = new_parser(settings, "")
    try:
        return instantiate(settings, parser, parser.parse_string(text))
    except argparse.ArgumentError as error:
        raise ConfigError(one_line(error)) from error


class _Parser(ArgumentParser):
    """A parser that reads configuration files in UTF-8 or UTF-16; jsonargparse's would use the terminal's encoding."""

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """The settings of a configuration file: local, in a store, or standard input (-)."""
        place: Any = path_type("fsr")(path)  # a file, or a URI that fsspec can read
        with place.relative_path_context(), place.open("rb") as file:
            content = file.read()
            try:
                text = content if isinstance(content, str) else decoded(content)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
            values: Namespace = self.parse_string(text, os.path.basename(path), *args, **kwargs)
            return values


def new_parser(settings: type[Any], description: str, shown: Collection[str] = ()) -> ArgumentParser:
    """A parser whose options are the fields of the settings; a job with an output also takes them from --config.

    With `shown`, --help lists only those fields.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    set_loader("yaml", _load_yaml, (yaml.YAMLError,))
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    if issubclass(settings, OutputConfig):
        parser.add_argument("--config", action="config", help="YAML file with these fields; options override it.")
    parser.add_argument(
        "--debug",
        type=bool,
        default=False,
        help="Show debug messages and what Ray and its workers print, which otherwise goes to Ray's log files.",
    )
    parser.add_class_arguments(settings, as_group=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # let `--overwrite` mean `--overwrite true`
            action.nargs, action.const = "?", True
        if isinstance(action.metavar, str):  # jsonargparse puts a backspace in front of it
            action.metavar = action.metavar.lstrip("\b")
        if shown and action.dest.split(".")[0] not in (*shown, *_COMMON_OPTIONS):
            action.help = argparse.SUPPRESS
    return parser


_PLAIN_YAML = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """Parse a file or an option's value; raises ConfigError if a key is repeated, as only the last would count."""
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "", {})
    except RecursionError as error:
        raise ConfigError("the YAML contains itself by an alias, or has too many levels; write it out flat") from error
    return _PLAIN_YAML(text)


def _refuse_repeated_keys(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    """Refuse a repeated key, also one written both as `a.b` and as `b` within `a`; `lines`: where each key was seen."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, "", {})
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in lines:
                where = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
                raise ConfigError(
                    f"the key {name!r} is given twice in the YAML ({where}); only the last would count, so keep one"
                )
            lines[name] = line
            _refuse_repeated_keys(value, f"{name}.", lines)


def instantiate(settings: type[T], parser: ArgumentParser, values: Namespace) -> T:
    """The settings that parsed values describe; raises ConfigError if a section is left empty."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    for field in fields:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if values[field.name] is None and dataclasses.is_dataclass(default):
            raise ConfigError(f"{field.name} is empty; give it fields, or leave it out")
    filled = parser.instantiate(values)
    return settings(**{field.name: filled[field.name] for field in fields})


def refuse_without_effect(config: OutputConfig, given: Iterable[str]) -> None:
    """Refuse an option of the command line that has no effect; for fields of a file, the job logs a warning."""
    unused = config.without_effect()
    for name in given:
        if name in unused and not name.startswith("estimate."):  # a run that follows a dry run may keep these
            raise ConfigError(f"--{name} has no effect: {unused[name]}; leave it out")


def flat(values: Namespace) -> dict[str, Any]:
    """The values of settings by dotted name, nested ones as plain dictionaries."""
    return {name: _plain(value) for name, value in values.items(branches=False) if name not in _COMMON_OPTIONS}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.as_dict() if isinstance(value, Namespace) else value
