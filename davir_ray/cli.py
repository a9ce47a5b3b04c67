"""The command line: one YAML file and dotted options → a configuration; errors → one line and an exit status.

Exit status: 0 complete; 2 the user's mistake, in one line; 130 Ctrl-C; 1 anything else.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import path_type

from davir_ray.config import SELECT_RULES, OutputConfig, RunConfig
from davir_ray.errors import ConfigError, DavirError, UserError
from davir_ray.terminal import LogHandler
from davir_ray.text import PrintableStream, decoded, printable

log = logging.getLogger(__name__)

NO_RULE: dict[str, Any] = {**dict.fromkeys(SELECT_RULES), "quotas": {}, "mixture": []}
"""Fields of a selection without any rule."""

T = TypeVar("T", bound=OutputConfig)
"""The configuration of a job: a frozen dataclass, validated when it is made."""

DEBUG_HELP = "Show what Ray and its workers print, too, which otherwise goes to Ray's log files."


def run_job(job: Callable[[T], None], settings: type[T], description: str, argv: list[str] | None = None) -> int:
    """Parse the command line, run the job, and turn errors into an exit status with a line on standard error."""
    return exit_status(lambda: job(parse_as(settings, sys.argv[1:] if argv is None else argv, description)))


def exit_status(job: Callable[[], None]) -> int:
    """Run a job that has its settings already: 0, or 2 after one line that tells the user's mistake.

    1 after one line where storage failed or a file is damaged, 130 after Ctrl-C, as shells have it; any other error is
    a defect, and shows its traceback. What is printed is shown, whatever the encoding of the terminal, and does nothing
    else there, whatever the data hold.
    """
    _keep_standard_error_apart()
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler()])
    logging.getLogger("davir_ray").setLevel(logging.INFO)
    name = os.path.basename(sys.argv[0])
    shown: Any = PrintableStream(sys.stdout)
    try:
        with redirect_stdout(shown):
            job()
    except DavirError as error:
        sys.stderr.write(f"{name}: {printable(' '.join(str(error).split()))}\n")
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return 130
    return 0


def _keep_standard_error_apart() -> None:
    """Let Python write to a copy of file descriptor 2, so that what native code writes there can go elsewhere.

    A job without standard output or error, as a daemon may be, writes to nowhere.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    ours = sys.stderr
    try:
        if ours.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=ours.encoding, errors=ours.errors)
    except (OSError, ValueError):  # it is a notebook's
        return


def parse(argv: list[str], description: str = "") -> RunConfig:
    """The configuration of the main job's command line; see parse_as."""
    return parse_as(RunConfig, argv, description)


def parse_as(settings: type[T], argv: list[str], description: str = "") -> T:
    """The validated configuration of a command line; ConfigError for anything misspelt, out of range or repeated.

    A selection rule on the command line replaces the file's, so that --select.top_k works beside a file with another
    rule. --help and --print_config print and exit with status 0.
    """
    parser = new_parser(settings, description)
    refuse_repeated(argv)
    values = parse_words(parser, argv)
    given = flat(parse_words(parser, split_config(argv)[0], defaults=False))
    if brought := rules_in(given):
        for rule in NO_RULE.keys() - brought:
            values[f"select.{rule}"] = NO_RULE[rule]
    config = _config(settings, parser, values)
    refuse_without_effect(config, given)
    return config


def dump(config: Any) -> str:
    """The resolved configuration as YAML that --config accepts."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def load(settings: type[T], text: str) -> T:
    """The configuration that `dump` wrote."""
    parser = new_parser(settings, "")
    try:
        return _config(settings, parser, parser.parse_string(text))
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


def show_debug() -> None:
    """Show, from here on, what Ray and the workers print, too: the option --debug."""
    logging.getLogger("davir_ray").setLevel(logging.DEBUG)


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


def _config(settings: type[T], parser: ArgumentParser, values: Namespace) -> T:
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


def parse_words(parser: ArgumentParser, argv: list[str], *, defaults: bool = True) -> Namespace:
    """The values of a command line; without defaults only what it and its --config give. ConfigError in one line."""
    try:
        with _readable_config(split_config(argv)[1]):
            values = parser.parse_args(argv, defaults=defaults)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if values.get("debug"):
        show_debug()
    return values


def split_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The command line without its --config, and the file that is named there."""
    rest, file = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            file = next(words, None)
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, file


@contextmanager
def _readable_config(file: str | None) -> Iterator[None]:
    """Tell in one line why a configuration file in a store cannot be read."""
    if file is None or "://" not in file:
        yield
        return
    from davir_ray.access import check_readable, translated  # late: only here does the command line need a store

    check_readable([(file, ConfigError)])
    with translated(file, ConfigError):
        yield


def refuse_repeated(argv: list[str]) -> None:
    """Of a repeated option only the last would count, silently."""
    options = (word.split("=")[0] for word in argv if word.startswith("--"))
    for name, count in Counter(name for name in options if not name.endswith("+")).items():
        if count > 1:
            raise ConfigError(f"{name} is given {count} times; give it once (a list: {name} '[a, b]')")


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
