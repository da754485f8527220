"""What the parsers of all sub-commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Commands = argparse._SubParsersAction  # what `add_subparsers` returns; argparse has no other name


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    summary: str,
    examples: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Adds a sub-command, still without options.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        name: the sub-command's name.
        summary: what it does, in a few words, without a full stop.
        examples: the text that ends its help, laid out as it is to be shown.
        run: takes the parsed arguments, and returns the exit status.

    Returns:
        The sub-command's parser.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser
