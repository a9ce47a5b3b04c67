"""Checks that the sections of a configuration share."""

import re
from dataclasses import fields, is_dataclass
from typing import Any

from davir_ray.errors import ConfigError


def check(condition: bool, field_name: str, value: object, need: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field_name} is {value!r}; it must be {need}")


def changed(settings: Any, default: Any = None, prefix: str = "") -> list[str]:
    """Dotted names of the fields whose value is not the default, sections included."""
    default = type(settings)() if default is None else default
    names = []
    for field in fields(settings):
        value, usual = getattr(settings, field.name), getattr(default, field.name)
        if is_dataclass(value):
            names += changed(value, usual, f"{prefix}{field.name}.")
        elif value != usual:
            names.append(f"{prefix}{field.name}")
    return names


def check_no_secret(field_name: str, uri: str | None) -> None:
    """Refuse credentials in a URI, because URIs are written to config.yaml and to messages."""
    if uri and re.match(r"\w+://[^/]*:[^/]*@", uri):
        without = re.sub(r"//.*@", "//…@", uri)
        raise ConfigError(f"{field_name} is {without!r}, with a password in it; give credentials in the environment")
