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
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import (
    NO_RULE,
    T,
    configuration,
    flat,
    new_parser,
    refuse_without_effect,
    rules_in,
)
from davir_ray.errors import ConfigError, DavirError, UserError
from davir_ray.terminal import LogHandler
from davir_ray.text import PrintableStream, printable

log = logging.getLogger(__name__)


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
    config = configuration(settings, parser, values)
    refuse_without_effect(config, given)
    return config


def show_debug() -> None:
    """Show, from here on, what Ray and the workers print, too: the option --debug."""
    logging.getLogger("davir_ray").setLevel(logging.DEBUG)


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
    from davir_ray.run.access import check_readable  # late: only here does the command line need a store
    from davir_ray.run.storage_errors import user_errors

    check_readable([(file, ConfigError)])
    with user_errors(file, ConfigError):
        yield


def refuse_repeated(argv: list[str]) -> None:
    """Of a repeated option only the last would count, silently."""
    options = (word.split("=")[0] for word in argv if word.startswith("--"))
    for name, count in Counter(name for name in options if not name.endswith("+")).items():
        if count > 1:
            raise ConfigError(f"{name} is given {count} times; give it once (a list: {name} '[a, b]')")


_TAKEN = ("output", "output_is_shared", "trust_remote_code", "rank", "select")


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
