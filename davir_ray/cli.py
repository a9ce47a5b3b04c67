"""The command line: one YAML file and dotted options → a configuration; errors → one line and an exit status.

Exit status: 0 complete; 2 the user's mistake, in one line; 130 Ctrl-C; 1 anything else.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import path_type

from davir_ray.config import SELECT_RULES, RunConfig
from davir_ray.errors import ConfigError, DavirError, UserError
from davir_ray.terminal import LogHandler
from davir_ray.text import PrintableStream, decoded, printable

log = logging.getLogger(__name__)

T = TypeVar("T")
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
    """Let Python write to a copy of file descriptor 2, so that what native code writes there can go elsewhere."""
    ours = sys.stderr
    try:
        if ours.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=ours.encoding, errors=ours.errors)
    except (OSError, ValueError):  # there is none, or it is a notebook's
        return


def parse(argv: list[str], description: str = "") -> RunConfig:
    """The configuration of the main job's command line; see parse_as."""
    return parse_as(RunConfig, argv, description)


def parse_as(settings: type[T], argv: list[str], description: str = "") -> T:
    """The validated configuration of a command line; ConfigError for anything misspelt, out of range or repeated.

    A selection rule on the command line replaces the file's, so that --select.top_k works beside a file with another
    rule. --help and --print_config print and exit with status 0.
    """
    parser = _parser(settings, description)
    _refuse_repeated(argv)
    try:
        with _readable_config(argv):
            values = parser.parse_args(argv)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if values.debug:
        show_debug()
    _replace_rule(values, argv)
    return _config(settings, parser, values)


def dump(config: Any) -> str:
    """The resolved configuration as YAML that --config accepts."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def load(settings: type[T], text: str) -> T:
    """The configuration that `dump` wrote."""
    parser = _parser(settings, "")
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


def _parser(settings: type[Any], description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
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
    return parser


def show_debug() -> None:
    """Show, from here on, what Ray and the workers print, too: the option --debug."""
    logging.getLogger("davir_ray").setLevel(logging.DEBUG)


def _config(settings: type[T], parser: ArgumentParser, values: Namespace) -> T:
    filled = parser.instantiate(values)
    return settings(**{name: filled[name] for name in _field_names(settings)})


def _field_names(settings: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


def _let_flags_stand_alone(parser: ArgumentParser) -> None:
    """Let `--overwrite` mean `--overwrite true`: jsonargparse wants the value spelt out."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True


@contextmanager
def _readable_config(argv: list[str]) -> Iterator[None]:
    """Tell in one line why a configuration file in a store cannot be read."""
    given = [uri for before, uri in pairwise(argv) if before == "--config"]
    given += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    if not any("://" in uri for uri in given):
        yield
        return
    from davir_ray.access import check_readable, translated  # late: only here does the command line need a store

    check_readable([(uri, ConfigError) for uri in given])
    with translated(given[0], ConfigError):
        yield


def _refuse_repeated(argv: list[str]) -> None:
    """Of a repeated option only the last would count, silently."""
    options = (word.split("=")[0] for word in argv if word.startswith("--"))
    for name, count in Counter(name for name in options if not name.endswith("+")).items():
        if count > 1:
            raise ConfigError(f"{name} is given {count} times; give it once (a list: {name} '[a, b]')")


def _replace_rule(values: Namespace, argv: list[str]) -> None:
    """Unset the file's selection rules where the command line brings one."""
    given = {word.split("=")[0].removeprefix("--select.") for word in argv if word.startswith("--select.")}
    if given & set(SELECT_RULES):
        for rule in set(SELECT_RULES) - given:
            values[f"select.{rule}"] = {"quotas": {}, "mixture": []}.get(rule)
