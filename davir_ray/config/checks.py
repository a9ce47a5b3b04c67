"""Checks that the sections of a configuration share."""

import re
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from davir_ray.errors import ConfigError


def check(condition: bool, field_name: str, value: object, need: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field_name} is {value!r}; it must be {need}")


def check_fields(settings: Any, section: str, names: Iterable[str], holds: Callable[[Any], bool], need: str) -> None:
    """Raise ConfigError unless each of these fields is None or has a value for which the condition holds."""
    for name in names:
        value = getattr(settings, name)
        check(value is None or holds(value), f"{section}{name}", value, need)


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


def check_no_secret(field_name: str, uris: str | Iterable[str] | None) -> None:
    """Refuse credentials in a URI or in one of several: URIs are written to config.yaml and to messages."""
    for uri in [uris] if isinstance(uris, str) else uris or []:
        if re.match(r"\w+://[^/]*:[^/]*@", uri):
            hidden = re.sub(r"//.*@", "//…@", uri)
            raise ConfigError(f"{field_name} is {hidden!r}, with a password in it; give credentials in the environment")
