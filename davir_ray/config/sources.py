"""Sources of instruction data: where a source lies, and how its records become prompt and response."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from davir_ray.config.checks import check, check_no_secret
from davir_ray.errors import ConfigError

Format = Literal["alpaca", "gsm8k", "prompt_response", "messages", "preference"]


def check_chat_template(chat_template: str | None, formats: Iterable[Format]) -> None:
    """ConfigError where a chat template is given but nothing is rendered with one."""
    if chat_template is not None and not {"messages", "preference"} & set(formats):
        raise ConfigError(
            "chat_template is given, but only the format messages is rendered with one, and preference where its "
            "columns hold messages; leave it out, or choose that format"
        )


_COLUMNS_OF: dict[Format, tuple[str, ...]] = {
    "prompt_response": ("prompt_column", "response_column"),
    "messages": ("messages_column",),
    "preference": ("prompt_column", "chosen_column", "rejected_column"),
}
"""Fields of a source that its format reads; the other formats have columns of fixed names."""

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
    """Split to read, for a hub name or a folder written by `datasets` that holds several."""

    def __post_init__(self) -> None:
        check(bool(self.name.strip()), "source name", self.name, "a non-empty name")
        named = f"path of source {self.name!r}"
        check(bool(self.paths) and all(path.strip() for path in self.paths), named, self.path, "a path")
        for path in self.paths:
            check_no_secret(named, path)

    def check_columns(self) -> None:
        """ConfigError for a column that is named, but is not of this format."""
        defaults = {field.name: field.default for field in fields(self) if field.name.endswith("_column")}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default and name not in _COLUMNS_OF.get(self.format, ()):
                raise ConfigError(
                    f"{name} of source {self.name!r} is {value!r}, but the format {self.format} does not read it; "
                    "leave it out, or choose another format"
                )

    @property
    def paths(self) -> list[str]:
        """The path, or the list of them."""
        return [self.path] if isinstance(self.path, str) else self.path
