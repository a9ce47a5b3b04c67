"""Checks that the sections of a configuration share."""

import re
from dataclasses import fields
from typing import Any

from davir_ray.errors import ConfigError


def check(condition: bool, field_name: str, value: object, need: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field_name} is {value!r}; it must be {need}")


def not_default(section: str, settings: Any) -> list[str]:
    """Dotted names of a section's fields that have another value than their default."""
    default = type(settings)()
    names = (field.name for field in fields(settings))
    return [f"{section}.{name}" for name in names if getattr(settings, name) != getattr(default, name)]


def check_no_secret(field_name: str, uri: str | None) -> None:
    """Refuse credentials in a URI: it is written to config.yaml and to messages."""
    if uri and re.match(r"\w+://[^/]*:[^/]*@", uri):
        shown = re.sub(r"//.*@", "//…@", uri)
        raise ConfigError(f"{field_name} is {shown!r}, with a password in it; give credentials by the environment")
