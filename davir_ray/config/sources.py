"""Sources of instruction data: where a source is, and how its records become prompt and response."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from davir_ray.config.checks import check, check_no_secret
from davir_ray.errors import ConfigError

Format = Literal["alpaca", "gsm8k", "prompt_response", "messages", "preference"]
"""Formats of a record; data/formats.py defines what each of them does."""

COLUMN_OPTIONS: dict[Format, tuple[str, ...]] = {
    "prompt_response": ("prompt_column", "response_column"),
    "messages": ("messages_column",),
    "preference": ("prompt_column", "chosen_column", "rejected_column"),
}
"""Fields of a source that name its columns, by the format that reads them; other formats have fixed column names."""

DEFAULT_SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One named source of instruction data."""

    name: str
    """Name of the source; part of every example_id and the value of the column `source`."""
    path: str | list[str]
    """A file, folder, glob or list of these (local, s3://, hf://), a folder written by `datasets`, or a hub name."""
    format: Format
    """How a record becomes prompt and response."""
    prompt_column: str = "prompt"
    """Column of the prompt, for the format prompt_response."""
    response_column: str = "response"
    """Column of the response, for the format prompt_response."""
    chosen_column: str = "chosen"
    """Column of the preferred response, for the format preference; its prompt may be in prompt_column."""
    rejected_column: str = "rejected"
    """Column of the other response, for the format preference."""
    messages_column: str = "messages"
    """Column of the list of {role, content}, for the format messages."""
    split: str = DEFAULT_SPLIT
    """Split to read, for a hub name or a folder written by `datasets` that has several."""

    def __post_init__(self) -> None:
        check(bool(self.name.strip()), "source name", self.name, "a non-empty name")
        option = f"path of source {self.name!r}"
        check(bool(self.paths) and all(path.strip() for path in self.paths), option, self.path, "a path")
        check_no_secret(option, self.paths)

    def check_columns(self) -> None:
        """Raise ConfigError if a column is named that the format does not read."""
        defaults = {field.name: field.default for field in fields(self) if field.name.endswith("_column")}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default and name not in COLUMN_OPTIONS.get(self.format, ()):
                raise ConfigError(
                    f"{name} of source {self.name!r} is {value!r}, but the format {self.format} does not read it; "
                    "leave it out, or choose another format"
                )

    @property
    def paths(self) -> list[str]:
        """The paths as a list, also where there is one."""
        return [self.path] if isinstance(self.path, str) else self.path


def check_chat_template(chat_template: str | None, formats: Iterable[Format]) -> None:
    """Raise ConfigError if a chat template is given but none of the formats uses one."""
    if chat_template is not None and not {"messages", "preference"} & set(formats):
        raise ConfigError(
            "chat_template is given, but only the format messages is rendered with one, and preference where its "
            "columns hold messages; leave it out, or choose that format"
        )
