"""``offprin train``: the reference loop's stages, and experiments made of them."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.names import EXPERIMENTS
from ..training.settings import STAGES
from ..training.tasks import MIXTURE, parse_mixture
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
    experiment = stages.add_parser(
        "experiment",
        help="runs, analysis, table and figure after the paper's",
        description="Carry out an experiment, or what is left of it: "
        + "; ".join(f"{name}: {text}" for name, text in EXPERIMENTS.items()) + ".",
    )  # fmt: skip
    experiment.add_argument("name", metavar="NAME", choices=tuple(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    experiment.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="of runs and results; experiments in one DIR share runs"
    )
    experiment.add_argument("--base", default="", metavar="DIR", help="a checkpoint to tune instead of one made here")
    experiment.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once, a thread each (default: 2)")
    experiment.add_argument("--quick", action="store_true", help="tiny runs: shows that it works, and nothing else")
    experiment.add_argument("--quiet", action="store_true", help="no progress")
    experiment.set_defaults(call=run_experiment)


def add_setting(stage: argparse.ArgumentParser, field: Field) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
    default = field.default
    if default is MISSING:
        shown = ",".join(f"{family}:{sizes[0]}-{sizes[-1]}" for family, sizes in MIXTURE.items())
        stage.add_argument(flag, metavar="TASKS", help=f"{text} (default: {shown})")
    elif field.name == "base":
        stage.add_argument(flag, metavar="DIR", help=f"{text} (needed)")
    elif field.metadata["choices"]:
        # refused by the settings, in one sentence
        shown = f" (default: {default})" if default else ""
        stage.add_argument(flag, metavar=f"{{{','.join(field.metadata['choices'])}}}", help=text + shown)
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
    if importlib.util.find_spec("transformers") is None:
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


def run_experiment(arguments: argparse.Namespace) -> int:
    for module in ("transformers", "pyarrow", "peft"):
        if importlib.util.find_spec(module) is None:
            return fail(f"experiments need {module}; pip install 'offprin-kernels[train]'")
    from .. import experiments
    from ..experiments.lab import Lab

    try:
        lab = Lab(
            arguments.out, quick=arguments.quick, workers=arguments.jobs, base=arguments.base, quiet=arguments.quiet
        )
        result = experiments.run(arguments.name, lab)
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error} ({error.filename or arguments.out}); the same command goes on")
    print(result.markdown())
    print(f"complete; results in {arguments.out / arguments.name}")
    return COMPLETE
