"""What every sub-command reports, and how: exit statuses, and lines on the error stream."""

from __future__ import annotations

import sys

# Exit statuses.
FINE, SOME_SKIPPED, CANNOT_CONTINUE, MISTAKE, INTERRUPTED = 0, 1, 1, 2, 130


def say(message: str) -> None:
    """Prints one line on the error stream, even if the message has several.

    Args:
        message: the text, without the command's name.
    """
    print(f"keras-coatnet: {' '.join(message.split())}", file=sys.stderr)


def format_warning(message: Warning | str, *source: object) -> str:
    """Formats a warning as one line, without the line of code that it comes from.

    Args:
        message: the warning.
        *source: the category, file name and line, which are left out.

    Returns:
        The line, for `warnings.formatwarning`.
    """
    return f"keras-coatnet: warning: {' '.join(str(message).split())}\n"
