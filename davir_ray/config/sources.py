"""Sources of instruction data: where a source is, and how its records become prompt and response."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal

from davir_ray.config.checks import check, check_no_secret
from davir_ray.errors import ConfigError

Format = Literal[
    "alpaca", "gsm8k", "prompt_response", "messages", "preference", "sharegpt", "lima", "orca", "dolly", "flan",
    "self_instruct", "prompt_completion", "alpaca_preference", "sharegpt_preference", "swift_preference",
]  # fmt: skip
"""Formats of a record; the table in data/formats.py says what each of them reads and writes."""

FormatOption = Literal["auto", Format]
"""A format, or auto: it is found in the data before the job begins (data/detection.py)."""

DEFAULT_SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One named source of instruction data."""

    name: str
    """Name of the source; part of every example_id and the value of the column `source`."""
    path: str | list[str]
    """A file, folder, glob or list of these (local, s3://, hf://), a folder written by `datasets`, or a hub name, with
    its configuration and revision if it needs them (openai/gsm8k:main@REVISION)."""
    format: FormatOption = "auto"
    """How a record becomes prompt and response. auto: found from the columns and the first records."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns in the data where they differ from the format's, such as {instruction: question}."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns of the data that are not read although they may change the prompt, such as [tools]."""
    prompt_column: str = "prompt"
    """Column of the prompt, for formats that have one; the same as columns: {prompt: …}."""
    response_column: str = "response"
    """Column of the response; the same as columns: {response: …}."""
    chosen_column: str = "chosen"
    """Column of the preferred response, for pairs; the same as columns: {chosen: …}."""
    rejected_column: str = "rejected"
    """Column of the other response, for pairs; the same as columns: {rejected: …}."""
    messages_column: str = "messages"
    """Column of the list of {role, content}; the same as columns: {messages: …}."""
    split: str = DEFAULT_SPLIT
    """Split to read, for a hub name or a folder written by `datasets` that has several."""

    def __post_init__(self) -> None:
        check(bool(self.name.strip()), "source name", self.name, "a non-empty name")
        option = f"path of source {self.name!r}"
        check(bool(self.paths) and all(path.strip() for path in self.paths), option, self.path, "a path")
        check_no_secret(option, self.paths)
        for name in self.columns:
            if f"{name}_column" in self.renamed_by_option:
                raise ConfigError(
                    f"source {self.name!r} has both {name}_column and {name} in columns; give one of the two"
                )

    @property
    def renamed_by_option(self) -> list[str]:
        """The options of one column each, such as prompt_column, that are not at their default."""
        options = [field for field in fields(self) if field.name.endswith("_column")]
        return [option.name for option in options if getattr(self, option.name) != option.default]

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Names of columns in the data by the format's own name, where the source gives them."""
        by_option = {name.removesuffix("_column"): getattr(self, name) for name in self.renamed_by_option}
        return {**by_option, **self.columns}

    @property
    def paths(self) -> list[str]:
        """The paths as a list, also where there is one."""
        return [self.path] if isinstance(self.path, str) else self.path
