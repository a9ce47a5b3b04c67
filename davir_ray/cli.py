"""The command line: one YAML file and dotted options → a job's settings; errors → one line and an exit status.

Exit status: 0 complete; 2 the user's mistake, in one line; 130 Ctrl-C; 1 anything else.
"""

import argparse
import dataclasses
import gc
import inspect
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar, cast

from jsonargparse import ArgumentParser, Namespace

from davir_ray.config.rank import RankOptions
from davir_ray.config.run import OutputConfig, RunConfig
from davir_ray.config.selection import keep_rules, rules_in
from davir_ray.config.yaml import flat, instantiate, new_parser, refuse_without_effect
from davir_ray.errors import ConfigError, DavirError, UserError
from davir_ray.terminal import LogHandler
from davir_ray.text import PrintableStream, one_line, printable

log = logging.getLogger(__name__)

T = TypeVar("T")
"""The settings of a job: a frozen dataclass, validated when it is made."""


def run_job(
    job: Callable[[T], None],
    settings: type[T] | Mapping[str, type[T]],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run the job with its settings, and return the exit status; see exit_status.

    A job with several commands gives the settings of each by name; the first word of the command line chooses.
    """
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: job(parse_as(settings, words, description or "")))


def exit_status(job: Callable[[], None]) -> int:
    """Run a job and return 0; where it fails, print one line on standard error and return another status.

    2 is for the user's mistake, 1 for storage that failed and for a damaged file, 130 for Ctrl-C, as in shells. Any
    other error is a defect and shows its traceback. In what the job prints, control characters of the data and
    characters that the terminal cannot encode are escaped.
    """
    gc.set_threshold(10_000)  # the imports make a million objects: looking for garbage among them took a sixth of it
    _duplicate_standard_error()
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler()])
    logging.getLogger("davir_ray").setLevel(logging.INFO)
    name = os.path.basename(sys.argv[0])
    printed: Any = PrintableStream(sys.stdout)
    try:
        with redirect_stdout(printed):
            job()
    except DavirError as error:
        sys.stderr.write(f"{name}: {printable(one_line(error))}\n")
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return 130
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`; Python would write to it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        gc.freeze()  # or Python looks through all of torch's objects once more at its end, for a second
    return 0


def _duplicate_standard_error() -> None:
    """Let Python write to a copy of file descriptor 2, so that what native code writes to 2 can be redirected.

    A job without standard output or error, such as a daemon's, writes to the null device.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    ours = sys.stderr
    try:
        if ours.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=ours.encoding, errors=ours.errors)
    except (OSError, ValueError):  # a notebook's stream has no file descriptor
        return


def show_debug() -> None:
    """Log debug messages and what Ray and the workers print, from here on: the option --debug."""
    logging.getLogger("davir_ray").setLevel(logging.DEBUG)


def parse_as(settings: type[T] | Mapping[str, type[T]], argv: Sequence[str], description: str = "") -> T:
    """The validated settings of a command line; raises ConfigError for options misspelt, out of range or repeated.

    A selection rule on the command line replaces the rule of the file. --help and --print_config print and exit with
    status 0.
    """
    program = os.path.basename(sys.argv[0])
    if isinstance(settings, Mapping):
        name = _command(settings, argv[:1], description)
        program, settings, argv = f"{program} {name}", settings[name], argv[1:]
        description = inspect.getdoc(settings) or ""
    if settings is RankOptions:
        return cast(T, parse_rank(argv, description))
    parser = new_parser(settings, description)
    parser.prog = program
    values = _parse_words(parser, argv)
    given = flat(_parse_words(parser, _split_config(argv)[0], defaults=False))
    if rules := rules_in(given, "select."):
        keep_rules(values["select"], rules)
    config = instantiate(settings, parser, values)
    if isinstance(config, OutputConfig):
        refuse_without_effect(config, given)
    return config


def _command(names: Mapping[str, Any], first: Sequence[str], description: str) -> str:
    """The command that a command line begins with."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False
    )
    parser.add_argument("command", choices=names, help="What to run; its own options follow, and --help lists them.")
    if not first:
        raise ConfigError(f"no command is given; give one of {', '.join(names)}")
    try:
        return str(parser.parse_args(first).command)
    except argparse.ArgumentError as error:
        raise ConfigError(one_line(error)) from error


def parse_rank(argv: Sequence[str], description: str = "") -> RankOptions:
    """The options of jobs/rank.py: changes to a finished run's rank and select settings.

    Raises ConfigError for options that are misspelt, repeated, or only of other jobs. --config may be the file that the
    run was scored with.
    """
    words, _ = _split_config(argv)
    _refuse_other_options(words)
    parser = new_parser(RunConfig, description, shown=RankOptions.OPTIONS)
    given = flat(_parse_words(parser, argv, defaults=False))
    on_command_line = flat(_parse_words(parser, words, defaults=False))
    return RankOptions.of(given, on_command_line)


def _refuse_other_options(words: Sequence[str]) -> None:
    """Refuse options that only jobs/score.py has, and those that append to a list, which only the run knows."""
    others = {field.name for field in dataclasses.fields(RunConfig)} - {*RankOptions.OPTIONS}
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if option.removeprefix("--").split(".")[0].rstrip("+") in others:
            raise ConfigError(
                f"jobs/rank.py does not take {option}; it ranks and selects again from the scores of a finished run, "
                "and takes --output, --output_is_shared, --trust_remote_code, --rank.* and --select.*"
            )
        if option.endswith("+"):
            raise ConfigError(f"jobs/rank.py does not take {option}; give the whole list: {option[:-1]} '[a, b]'")


def _parse_words(parser: ArgumentParser, argv: Sequence[str], *, defaults: bool = True) -> Namespace:
    """The values of a command line; without defaults only those that it and its --config give."""
    _refuse_repeated(argv)
    try:
        with _readable_config(_split_config(argv)[1]):
            values = parser.parse_args(list(argv), defaults=defaults)
    except argparse.ArgumentError as error:
        raise ConfigError(one_line(error)) from error
    except UnicodeDecodeError as error:  # a section's file, as in --finetune FILE; it may also be named in --config
        files = [path for path in (word.rpartition("=")[2] for word in argv) if os.path.isfile(path)]
        named = " or ".join([*files, "a file that the command line or its --config names"])
        raise ConfigError(f"{named} is not UTF-8 text ({error}); save it as UTF-8") from error
    if values.get("debug"):
        show_debug()
    return values


def _split_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The command line without --config, and the file that --config names."""
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
    """Turn the errors of a store that holds the configuration file into a ConfigError."""
    if file is None or "://" not in file:
        yield
        return
    from davir_ray.run.access import check_readable  # only here does the command line need a store
    from davir_ray.run.storage_errors import user_errors

    check_readable([(file, ConfigError)])
    with user_errors(file, ConfigError):
        yield


def _refuse_repeated(argv: Sequence[str]) -> None:
    """Refuse a repeated option, of which argparse would silently keep the last."""
    options = (word.split("=")[0] for word in argv if word.startswith("--"))
    for name, count in Counter(name for name in options if not name.endswith("+")).items():
        if count > 1:
            raise ConfigError(f"{name} is given {count} times; give it once (a list: {name} '[a, b]')")
