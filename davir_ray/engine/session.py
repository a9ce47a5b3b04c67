"""The output of a job: named, claimed, held by one driver at a time, its end told in progress.json."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from davir_ray.config.run import OutputConfig
from davir_ray.config.yaml import dump
from davir_ray.engine.connect import SUBMITTED_JOB, connected, num_nodes
from davir_ray.errors import ConfigError, DavirError, OutputError
from davir_ray.run.access import translated
from davir_ray.run.lease import Lease
from davir_ray.run.location import Location, remove_leftovers
from davir_ray.run.progress import Progress
from davir_ray.run.stages import check_claim, claim


def place_of(output: str) -> Location:
    """Where an output lies; ConfigError for one that a submitted job would lose."""
    if os.environ.get(SUBMITTED_JOB) and "://" not in output and not Path(output).is_absolute():
        raise ConfigError(
            f"output {output!r} is relative, and would be lost with the submitted job's folder; "
            "give s3://… or an absolute path"
        )
    with translated(output, OutputError):
        return Location.of(output if "://" in output else Path(output).expanduser().resolve())


@contextmanager
def writing(run: Location, config: OutputConfig) -> Iterator[None]:
    """Connect to Ray and hold the output, alone, with what dead attempts left behind cleared away."""
    with connected_to(run, is_shared=config.output_is_shared):
        check_claim(run)
        with Lease(run), _end_told(run):
            claim(run, dump(config))
            remove_leftovers(run)
            yield


@contextmanager
def connected_to(run: Location, *, is_shared: bool) -> Iterator[None]:
    """Connect to Ray; ConfigError if not every node sees the output."""
    with connected():
        if run.is_local and num_nodes() > 1 and not is_shared:
            raise ConfigError(
                f"output {run} is local, but the cluster has {num_nodes()} nodes; give s3://…, or --output_is_shared "
                "if every node sees this path"
            )
        yield


@contextmanager
def _end_told(run: Location) -> Iterator[None]:
    """Leave in progress.json how the run ended; one that is interrupted, or loses its lease, leaves it as it is."""
    try:
        yield
    except OutputError:  # a refusal: the run that is there did not fail
        raise
    except Exception as error:
        Progress.end(run, "failed", _reason(error))
        raise
    Progress.end(run, "complete")


def _reason(error: Exception) -> str:
    """One line. Of an error that is not ours its kind, too, and the end of its text: Ray's hold a whole traceback."""
    if isinstance(error, DavirError):
        return " ".join(str(error).split())
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
