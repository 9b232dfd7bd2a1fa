"""The common form of all subcommands: name, help group, description, example, arguments and the function that runs it.

Each package declares its subcommands in its ``command`` module as a tuple of :class:`Command`; ``scale_mae.cli`` joins them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scale_mae.system.completion import complete_override, complete_recipe

GROUPS = {  # key -> heading in `scale-mae --help`, in this order
    "train": "Train",
    "data": "Prepare images",
    "weights": "Convert and inspect weights",
    "evaluate": "Evaluate",
    "slurm": "Run on Slurm",
    "runs": "Inspect runs",
    "machine": "Check and set up this machine",
}
WIDTH = 100  # characters of a line of help
RECIPE_HELP = "name of a shipped recipe (`scale-mae recipes` lists them) or path of a YAML file"
SOURCE_HELP = "an index, a folder, tar shards or another kind of image source (`scale-mae sources` lists them)"
CHECKPOINT_HELP = "a run directory (its newest intact checkpoint) or one checkpoint in it"
WEIGHTS_HELP = "a checkpoint, an exported file, or weights of the reference repository, timm or Hugging Face"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand of ``scale-mae``."""

    name: str
    """The word after ``scale-mae``."""
    group: str
    """Key of :data:`GROUPS`."""
    summary: str
    """One short line for ``scale-mae --help``."""
    description: str = ""
    """Further sentences for the command's own help, after the summary."""
    example: str
    """One shell line that works as it stands, for instance after ``make demo``."""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    """Declares the arguments."""
    run: Callable[[argparse.Namespace], int]
    """Runs the command and returns the exit code. Imports heavy packages only when called."""


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], command: Command) -> None:
    """Add the parser of a command. Parsed arguments carry the function that runs the command as ``run_command``."""
    text = f"{command.summary} {command.description}".strip()
    parser = subparsers.add_parser(
        command.name,
        description=textwrap.fill(text, WIDTH, break_on_hyphens=False),
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(run_command=command.run)


def list_commands(commands: Sequence[Command]) -> str:
    """Return one line per command under the headings of :data:`GROUPS`."""
    width = max(len(command.name) for command in commands) + 2
    blocks = []
    for group, heading in GROUPS.items():
        lines = [f"  {command.name:{width}}{command.summary}" for command in commands if command.group == group]
        blocks.append("\n".join([f"{heading}:", *lines]))
    return "\n\n".join(blocks)


def add_recipe_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Add RECIPE and its overrides.

    Args:
        parser: The parser of the command.
        example: An override to show in the help, such as ``train.global_batch=1024``.
    """
    recipe = parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"config keys to change, for instance {example}"
    )
    vars(recipe)["completer"] = complete_recipe  # argcomplete looks for this attribute
    vars(overrides)["completer"] = complete_override


def positive_int(text: str) -> int:
    """Parse an argument that is a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def warn(message: str) -> None:
    """Print a warning to standard error, as one line."""
    print(f"scale-mae: warning: {message}", file=sys.stderr)
