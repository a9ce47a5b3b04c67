"""The options of jobs/study.py."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The options of this job."""

    data: str
    """Alpaca's rows (instruction, input, output): a file of JSON Lines, plain or gzip."""
    rare: str
    """GSM8K's rows (question, answer), likewise; each pool gets a few as the rare kind."""
    output: str = "davir_study"
    """Folder for the pools, the base, the runs and the tables."""
    base: str | None = None
    """A base to study instead, a folder or a hub name, with LoRA: half a pool, 3 epochs, two replicates. None: a small
    Llama, pre-trained here on 5,000 of the rows."""
