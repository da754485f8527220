"""Keeps passwords out of errors and logs.

`HF_ENDPOINT` may hold one, `https://user:password@host`, and the hub's client puts the whole
address into its errors and its log.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import traceback
import urllib.parse
from typing import Any

_HIDDEN = "***"
# An attribute of the log record factory that `_hiding` makes.
_MARK = "hides_passwords"
# All before the last @ of an address's host, because a password may contain that character.
_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s'\"]*@")


def hide(text: str) -> str:
    """Returns a text without the passwords in it.

    Args:
        text: anything, perhaps with addresses in it.

    Returns:
        The text, with `***` for the user and the password of each address, and for the password of
        `HF_ENDPOINT` wherever it stands.

    Example:
        >>> hide("no answer from https://me:secret@example.org/models")
        'no answer from https://***@example.org/models'
    """
    text = _IN_ADDRESS.sub(f"{_HIDDEN}@", text)
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    return text


def hide_in_error(error: ValueError) -> ValueError:
    """Returns an error without passwords in its message and in the errors behind it.

    Args:
        error: the error.

    Returns:
        The same error if there is no password in it, else a new one.
    """
    shown = "".join(traceback.format_exception_only(error))
    behind: BaseException | None = error
    while behind := (behind.__cause__ or behind.__context__):
        shown += "".join(traceback.format_exception_only(behind))
    if hide(shown) == shown:
        return error
    hidden, cause = ValueError(hide(str(error))), error.__cause__
    if cause is not None:
        hidden.__cause__ = RuntimeError(hide(f"{type(cause).__name__}: {cause}"))
    return hidden


def hide_in_logs() -> None:
    """Hides passwords in every line that is logged from now on, if `HF_ENDPOINT` has one."""
    make = logging.getLogRecordFactory()
    if _secrets() and not getattr(make, _MARK, False):
        logging.setLogRecordFactory(_hiding(make))


def _hiding(make: Any) -> Any:
    @functools.wraps(make)
    def make_hidden(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # the format does not fit the values
            record.msg, record.args = hide(record.getMessage()), None
        if record.exc_info:
            record.exc_text = hide(logging.Formatter().formatException(record.exc_info))
        return record

    setattr(make_hidden, _MARK, True)
    return make_hidden


def _secrets() -> set[str]:
    """Returns the password of `HF_ENDPOINT` as given, percent-decoded and percent-encoded."""
    addresses = {os.environ.get("HF_ENDPOINT", "")}
    client = sys.modules.get("huggingface_hub.constants")
    if client is not None:  # it read the variable when it was imported
        addresses.add(str(client.ENDPOINT))
    found = set()
    for address in addresses:
        access = address.partition("://")[2].rpartition("@")[0]
        user, _, password = access.partition(":")
        secret = password or user  # a token may be given as the user
        unquoted = urllib.parse.unquote(secret)
        found |= {secret, unquoted, urllib.parse.quote(unquoted, safe="")}
    return {secret for secret in found if len(secret) > 2}  # shorter ones are parts of words
