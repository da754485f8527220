"""The command line: `keras-coatnet COMMAND`.

Each sub-command is a module with two functions: `add_parser` describes its options, and `run` takes
the parsed arguments and returns the exit status. The answer of a command goes to the standard
output. Everything else (progress, skipped images, errors) goes to the error stream.

At their top, the modules here import only those parts of the package that do without Keras. `run`
first checks all that can be checked without it, and then calls `start.load_package`. So help, lists
and mistakes take a fraction of a second.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from keras_coatnet.cli import benchmark, evaluate, export, models, predict, train
from keras_coatnet.cli.messages import FINE, INTERRUPTED, MISTAKE, format_warning, say
from keras_coatnet.version import __version__

_EXAMPLES = """\
examples:
  keras-coatnet predict cat.jpg
  keras-coatnet predict holiday/ more/*.png --top 3
  keras-coatnet models
  keras-coatnet train transfer --weights coatnet_0_rw_224.sw_in1k --data flowers/
  keras-coatnet evaluate --weights coatnet_0_rw_224.sw_in1k --data imagenet/val
  keras-coatnet export coatnet_0_rw_224.sw_in1k coatnet.tflite
  keras-coatnet benchmark

`keras-coatnet COMMAND --help` explains a command and its options.

exit status: 0 success; 1 some images were skipped, or a training run cannot continue; 2 a mistake
in the call
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after the command's name. None takes those of this process.

    Returns:
        The exit status: 0 for success, 1 if some images were skipped or a training run cannot
        continue, 2 for a mistake in the call, 130 after Ctrl-C.

    Raises:
        SystemExit: after `--help` and `--version`, and for arguments that cannot be parsed.

    Example:
        >>> main(["predict", "no_such_image.jpg"])
        2
    """
    # File names can contain characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    formatted, warnings.formatwarning = warnings.formatwarning, format_warning
    try:
        parsed = _parser().parse_args(arguments)
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {error}")
        return MISTAKE
    finally:
        warnings.formatwarning = formatted


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"keras-coatnet: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="keras-coatnet",
        description="CoAtNet for Keras 3: classify images; train, evaluate, export, time networks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-coatnet {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (predict, models, train, evaluate, export, benchmark):
        command.add_parser(commands)
    return parser
