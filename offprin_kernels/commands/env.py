"""``offprin env``: what a bug report needs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .common import COMPLETE

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
    env = commands.add_parser("env", help="print versions, backends and devices, for bug reports")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from .._env import environment

    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return COMPLETE
    for title, value in found.items():
        print(f"{title.replace('_', ' ')}: {plain(value)}")
    return COMPLETE


def plain(value: object) -> str:
    """A value of ``offprin env`` as lines a person reads."""
    if isinstance(value, dict):
        return "".join(
            f"\n  {name}: {plain(item) if item is not None else 'not installed'}" for name, item in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return "none" if value is None else str(value)
