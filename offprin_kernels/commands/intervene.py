"""``offprin intervene``: rotate or permute attention heads and keep the function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import COMPLETE, fail, interrupted, progress_bar

if TYPE_CHECKING:
    from ..intervene import Report
    from .common import Commands


def add(commands: Commands) -> None:
    intervene = commands.add_parser(
        "intervene",
        help="rotate or permute attention heads and keep the function",
        description="Write a copy of a model whose attention heads are rotated (V and O, by random orthogonal "
        "matrices) or permuted (losslessly), verify that its function is the same, and record what was done in "
        "intervention.json. Exit code 0: complete; 3: cut short, nothing written; 2: bad input, or the function was "
        "not preserved.",
    )
    intervene.add_argument("kind", choices=("rotate", "permute"), help="what to do")
    intervene.add_argument("model", metavar="MODEL", help="directory, or hub id org/name[@revision]")
    intervene.add_argument("--out", metavar="DIR", type=Path, required=True, help="the new model; must not exist yet")
    intervene.add_argument("--layers", metavar="LIST", default="all", help="all (default), or such as 3,5-7")
    intervene.add_argument("--seed", metavar="N", type=int, default=0, help="of rotations and orders (default: 0)")
    intervene.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare logits before and after with transformers in fp32; auto (default): where it is installed and "
        "the model fits into memory; each layer's attention is compared in any case",
    )
    intervene.add_argument("--quiet", action="store_true", help="no progress bar")
    intervene.add_argument("--io", choices=("auto", "mmap", "read"), default="auto", help="how files are read")
    intervene.add_argument("--download", action="store_true", help="fetch a hub id that is not in the local cache")
    intervene.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from ..intervene import files
    from ..intervene.attention import parse_layers

    try:
        layers = parse_layers(arguments.layers)
        model = Checkpoint.open(arguments.model, io=arguments.io, download=arguments.download)
        with progress_bar(files.size(model), arguments.quiet) as advance:
            report = files.write(
                model,
                arguments.kind,
                arguments.out,
                layers=layers,
                seed=arguments.seed,
                verify=arguments.verify,
                progress=advance,
            )
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error} ({error.filename or arguments.out}); nothing was written there")
    except KeyboardInterrupt:
        return interrupted(f"nothing was written into {arguments.out}")
    print(render(report, arguments.out))
    return COMPLETE


def render(report: Report, out: Path) -> str:
    """The report as lines a person reads."""
    from ..intervene.attention import ranges

    record = report.record
    done = {"rotate": "rotated", "permute": "permuted"}[record.kind]
    worst = max(report.layers, key=lambda one: one.difference)
    noise = max(one.rounding for one in report.layers)
    against = f", at most {noise:.2f} times the noise of rounding" if record.kind == "rotate" else ""
    lines = [
        f"{done} {record.heads.query} query and {record.heads.kv} key/value heads of {record.heads.size} in layers "
        f"{ranges(record.layers)}, seed {record.seed}, in {out}",
        f"attention by layer, fp64: largest relative difference {worst.difference:.2e} (layer {worst.layer}){against}",
    ]
    if report.logits is None:
        lines.append(f"logits: not compared ({report.skipped})")
    else:
        found = report.logits
        lines.append(
            f"logits of {found.tokens} random tokens, fp32: largest difference {found.max_difference:.2e}, "
            f"{found.max_relative:.2e} of their standard deviation; root mean square {found.rms:.2e}, "
            f"{found.control:.2e} for random rounding of the same size"
        )
    return "\n".join(lines)
