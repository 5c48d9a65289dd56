"""Secrets: the names of keys and variables that hold them, and texts without their values."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

# The last part of a name that stands for a secret: api_key, HF_TOKEN, PGPASS, MYSQL_PWD, password2.
SECRET = re.compile(
    r"(^|[_.-])(api|access|secret|private|auth|ssh|encryption)?_?key$|(^|[_.-])pat$"
    r"|(secret|token|passw(or)?d|passphrase|pwd|credentials?|(?<!com)(?<!by)(?<!sur)pass|(^|[_.-])auth)(_?\d+)?$"
    r"|(^|[_.-])(secret|passw(or)?d|token|api_?key)[_.-]",
    re.IGNORECASE,
)
# In an address: the password behind a user's name, a token in place of the name, and parameters that hold a secret.
PASSWORD = re.compile(r"(?P<before>[a-z][\w+.-]*://[^\s/:@'\"]*:)[^\s/'\"]*(?=@)", re.IGNORECASE)
USER_TOKEN = re.compile(r"(?P<before>[a-z][\w+.-]*://)[^\s/:@'\"]{20,}(?=@)", re.IGNORECASE)
PARAMETER = re.compile(
    r"(?P<before>[?&]([\w-]*[_-])?(key|token|secret|password|passwd|pwd|sig|signature|apikey)=)[^\s&#'\"]+",
    re.IGNORECASE,
)
SETTING = re.compile(
    r"(?P<before>(?<![\w.])(?P<name>[A-Za-z_][\w.]*) ?= ?)('[^']*'|\"[^\"]*\"|[^\s…]\S*?(?=[:;,.]?(\s|$)))"
)


def is_secret(name: str) -> bool:
    """True if a key or a variable of this name holds a secret."""
    return SECRET.search(name.rsplit(".", 1)[-1]) is not None


def without_passwords(text: str) -> str:
    """``text`` without the passwords and tokens in addresses: ``postgres://me:<redacted>@host``."""
    if "://" in text:
        text = PASSWORD.sub(rf"\g<before>{REDACTED}", text)
        text = USER_TOKEN.sub(rf"\g<before>{REDACTED}", text)
        text = PARAMETER.sub(rf"\g<before>{REDACTED}", text)
    return text


def redact(value: Any, key: str = "") -> Any:
    """``value`` with everything under a key that names a secret replaced, and passwords in addresses."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redact(item, key) for item in value]
    if value is not None and is_secret(key):
        return REDACTED
    return without_passwords(value) if isinstance(value, str) else value


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret keys, and passwords in addresses, replaced."""
    shown = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        within = re.findall(r"([\w.]+)['\"]?\s*:", value) if "{" in value else []  # the keys of a dictionary
        hidden = any(is_secret(name) for name in (key.lstrip("+~"), *within))
        shown.append(f"{key}={REDACTED}" if equals and hidden else without_passwords(argument))
    return shown


def hide(message: str) -> str:
    """A message without the values of secret keys, and without passwords in addresses."""

    def setting(found: re.Match[str]) -> str:
        hidden = is_secret(found["name"]) and found["name"] != "key"
        return f"{found['before']}{REDACTED}" if hidden else found[0]

    return without_passwords(SETTING.sub(setting, message))
