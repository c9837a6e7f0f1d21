"""``offprin train``: the reference loop's stages, and experiments made of them."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.settings import STAGES
from ..training.tasks import parse_mixture
from .common import COMPLETE, fail

if TYPE_CHECKING:
    from .common import Commands

HELP = {
    "pretrain": "make a small base from nothing, on tasks that a program can check",
    "rlvr": "tune a base by reinforcement learning with verifiable rewards",
    "sft": "tune a base on worked solutions of the same tasks",
}


def add(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="the reference loop: pretrain, rlvr, sft, and experiments made of them",
        description="Train a small Qwen3 on tasks made in code, and log the three gates as it trains. Interrupted, the "
        "same command goes on, and ends with the same bits.",
    )
    stages = train.add_subparsers(required=True, metavar="STAGE")
    for name, settings in STAGES.items():
        stage = stages.add_parser(name, help=HELP[name], description=f"{HELP[name].capitalize()}.")
        stage.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the run goes, or goes on")
        stage.add_argument("--quiet", action="store_true", help="no progress")
        for field in fields(settings):
            add_setting(stage, field)
        stage.set_defaults(call=run_stage, stage=name)


def add_setting(stage: argparse.ArgumentParser, field: Field) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
    default = field.default
    if default is MISSING:
        stage.add_argument(flag, metavar="TASKS", help=f"{text} (default: all of them)")
    elif isinstance(default, bool):
        stage.add_argument(flag, action="store_true", default=None, help=text)
    else:
        shown = f" (default: {default})" if default != "" else ""
        stage.add_argument(flag, type=type(default), metavar=field.name.upper(), help=text + shown)


def run_stage(arguments: argparse.Namespace) -> int:
    given: dict[str, Any] = {
        field.name: getattr(arguments, field.name)
        for field in fields(STAGES[arguments.stage])
        if getattr(arguments, field.name) is not None
    }
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        return fail("the reference loop builds on transformers; pip install 'offprin-kernels[hf]'")
    try:
        if "tasks" in given:
            given["tasks"] = parse_mixture(given["tasks"])
        settings = STAGES[arguments.stage](**given)

        from ..training.stages import train

        final = train(arguments.stage, settings, arguments.out, quiet=arguments.quiet)
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(
            f"{error.strerror or error} ({error.filename or arguments.out}); the same command goes on from there"
        )
    print(f"complete; the checkpoint is {final}, the log {arguments.out / 'log.jsonl'}")
    return COMPLETE
