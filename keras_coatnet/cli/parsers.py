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
        commands: What `ArgumentParser.add_subparsers` returned.
        name: The sub-command's name.
        summary: What it does, in a few words, without a full stop.
        examples: The text that ends its help, laid out as it is to be shown.
        run: Takes the parsed arguments, and returns the exit status.

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
