"""Error messages of data sets."""

from __future__ import annotations

import pytest


def error_message(call, *args, **kwargs) -> str:
    """Returns the message of the ValueError that a call raises; it is one line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
