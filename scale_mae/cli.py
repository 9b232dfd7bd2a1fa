"""The ``scale-mae`` command. Each package declares its own subcommands; this module joins them and reports errors."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

from scale_mae.config import UserError, json_schema, load_config, recipe_names, recipe_path
from scale_mae.config.recipes import read_header
from scale_mae.data.command import DATA_COMMANDS
from scale_mae.evaluation.command import EVALUATION_COMMANDS
from scale_mae.preflight.command import PREFLIGHT_COMMAND
from scale_mae.report.command import REPORT_COMMANDS
from scale_mae.slurm.command import SLURM_COMMANDS
from scale_mae.system.command_line import Command, add_command, add_recipe_arguments, list_commands
from scale_mae.system.completion import complete, completion_script
from scale_mae.weights.command import WEIGHT_COMMANDS

DESCRIPTION = "Pre-train masked autoencoders at scale, and use the result."
EPILOG = """\
`scale-mae COMMAND --help` shows the options of a command and an example.
To train with several processes: torchrun --nproc-per-node N -m scale_mae pretrain RECIPE"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="scale-mae",
        usage="scale-mae COMMAND ...",
        description=f"{DESCRIPTION}\n\n{list_commands(COMMANDS)}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="scale-mae", help=argparse.SUPPRESS
    )
    for command in COMMANDS:
        add_command(subparsers, command)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, or answer a shell that requests completions. Overrides may also follow options."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the completion script
        complete(parser)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse accepts no positional arguments after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words of the command line without the program's name. ``None`` reads them from ``sys.argv``.

    Returns:
        The exit code: 0 for success, 2 for an error that the user can correct, or a code that the command documents.
    """
    args = parse_arguments(argv)
    try:
        return int(args.run_command(args) or 0)
    except UserError as error:
        _print_error(error)
        return 2
    except BrokenPipeError:  # the reader of our output has ended, as in `scale-mae schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("scale-mae: interrupted", file=sys.stderr)
        return 130


def _print_error(error: UserError) -> None:
    """Print one line from rank 0 only, because all processes of a job fail with the same error."""
    from scale_mae.distributed.launcher import get_rank_and_world_size

    try:
        rank, _ = get_rank_and_world_size()
    except UserError:
        rank = 0
    if rank == 0:
        print(f"scale-mae: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # a launcher that ends the job with its first failed process must not silence rank 0


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, "train.global_batch=1024")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")


def train(args: argparse.Namespace) -> int:
    """``scale-mae pretrain``, ``finetune`` and ``linprobe``."""
    config = load_config(args.recipe, args.overrides)
    if config.run.task != args.command:
        task = config.run.task
        raise UserError(f"{args.recipe}: has run.task={task}. Run scale-mae {task} instead of scale-mae {args.command}.")
    if args.dry_run:
        from scale_mae.distributed.launcher import get_rank_and_world_size

        _, processes = get_rank_and_world_size()
        accumulation = config.accumulation(processes)
        config.deepspeed_json()
        print(config.to_yaml(), end="")
        print(
            f"# processes: {processes}, gradient accumulation steps: {accumulation}, peak learning rate: {config.peak_lr:.6g}"
        )
        return 0
    import scale_mae

    getattr(scale_mae, args.command)(config)
    return 0


def _add_recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", choices=recipe_names(), help="print the file of this recipe")


def recipes(args: argparse.Namespace) -> int:
    """``scale-mae recipes``."""
    if args.name:
        print(recipe_path(args.name).read_text(), end="")
        return 0
    print(f"{'NAME':19}{'TASK':10}{'MODEL':7}SUMMARY / HARDWARE / TIME")
    for name in recipe_names():
        config, header = load_config(name), read_header(name)
        print(f"{name:19}{config.run.task:10}{config.model.size:7}{header.summary}")
        print(f"{'':36}{header.hardware} / {header.time}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """``scale-mae doctor``."""
    from scale_mae.doctor import check_machine

    return check_machine()


def schema(args: argparse.Namespace) -> int:
    """``scale-mae schema``."""
    print(json.dumps(json_schema(), indent=2))
    return 0


def _add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"], help="the shell that runs the script")


def completion(args: argparse.Namespace) -> int:
    """``scale-mae completion``."""
    print(completion_script(args.shell))
    return 0


RESUME = "If the run directory has a checkpoint, training resumes from the newest intact one."
COMMANDS = (
    Command(
        name="pretrain",
        group="train",
        summary="Pre-train a masked autoencoder.",
        description=RESUME,
        example="scale-mae pretrain demo log.interval=20",
        add_arguments=_add_training_arguments,
        run=train,
    ),
    Command(
        name="finetune",
        group="train",
        summary="Train a classifier, from the weights of an encoder or from scratch.",
        description=RESUME,
        example="scale-mae finetune finetune_demo model.init_from=runs/demo",
        add_arguments=_add_training_arguments,
        run=train,
    ),
    Command(
        name="linprobe",
        group="train",
        summary="Train a linear classifier on a frozen encoder.",
        description=RESUME,
        example="scale-mae linprobe linprobe_demo model.init_from=runs/demo",
        add_arguments=_add_training_arguments,
        run=train,
    ),
    Command(
        name="recipes",
        group="train",
        summary="List the shipped recipes, or print one.",
        description="A recipe is a YAML file with the configuration of a run.",
        example="scale-mae recipes vit_base",
        add_arguments=_add_recipes_arguments,
        run=recipes,
    ),
    Command(
        name="schema",
        group="train",
        summary="Print the JSON Schema of a recipe, for completion and checks in editors.",
        description=(
            "Put `# yaml-language-server: $schema=recipe.schema.json` on the first line of a recipe to use it in an editor."
        ),
        example="scale-mae schema > recipe.schema.json",
        run=schema,
    ),
    *DATA_COMMANDS,
    *WEIGHT_COMMANDS,
    *EVALUATION_COMMANDS,
    *SLURM_COMMANDS,
    PREFLIGHT_COMMAND,
    *REPORT_COMMANDS,
    Command(
        name="doctor",
        group="machine",
        summary="Check versions, accelerators, DALI, DeepSpeed, disk and memory.",
        description="For each problem it prints what to do.",
        example="scale-mae doctor",
        run=doctor,
    ),
    Command(
        name="completion",
        group="machine",
        summary="Print a script that enables completion in bash or zsh.",
        description=(
            "It completes commands, options, files, recipes, and config keys with their values. To enable it in every shell, "
            "add the line of the example to ~/.bashrc, or with zsh instead of bash to ~/.zshrc after compinit."
        ),
        example="source <(scale-mae completion bash)",
        add_arguments=_add_completion_arguments,
        run=completion,
    ),
)
