"""``offprin analyze``: compare tuned checkpoints with their base."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import COMPLETE, PARTIAL, fail, parse_rule, pick_device, progress_bar

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
    analyze = commands.add_parser(
        "analyze",
        help="compare tuned checkpoints with their base",
        description="Compare tuned checkpoints with their base in bf16 storage: which weights visibly changed, how, "
        "and whether runs agree more than chance. Exit code 0: complete; 3: some tensors could not be compared, or the "
        "run was cut short (the same command continues it); 2: bad input.",
    )
    analyze.add_argument(
        "base", metavar="BASE", help="directory, file, or hub id org/name[@revision] in the local cache"
    )
    analyze.add_argument("tuned", metavar="TUNED", nargs="+", help="one or more tuned checkpoints")
    analyze.add_argument("--out", metavar="DIR", type=Path, help="where results go (needed unless --dry-run)")
    analyze.add_argument(
        "--names", metavar="NAME", nargs="+", help="names of the tuned runs (default: from their paths)"
    )
    analyze.add_argument("--rule", default="bitwise", help="bitwise (default), ulp, eta, atol or storage")
    analyze.add_argument("--threshold", type=float, help="of the rule: ULP, relative or absolute")
    analyze.add_argument(
        "--also",
        metavar="RULE[:THRESHOLD]",
        nargs="*",
        default=["eta:1e-3", "atol:1e-5"],
        help="further rules to count beside (default: eta:1e-3 atol:1e-5)",
    )
    analyze.add_argument("--include", metavar="GLOB", nargs="+", default=[], help="compare only tensors of these names")
    analyze.add_argument("--exclude", metavar="GLOB", nargs="+", default=[], help="leave out tensors of these names")
    analyze.add_argument(
        "--metrics",
        metavar="LIST",
        default="",
        help="also, for linear layers, some of spectrum,masks,energy: angles and spectral shift, overlap with "
        "principal and small weights, energy in principal subspaces",
    )
    analyze.add_argument("--k", type=int, default=128, help="dimension of principal subspaces (default: 128)")
    analyze.add_argument("--alpha", type=float, default=0.5, help="share of weights in a weight mask (default: 0.5)")
    analyze.add_argument(
        "--tol-degrees", type=float, default=0.05, help="certificate asked of every subspace (default: 0.05)"
    )
    analyze.add_argument("--save-masks", action="store_true", help="write masks/RUN.safetensors, one bit per weight")
    analyze.add_argument("--dry-run", action="store_true", help="print the plan, its bytes and memory, and stop")
    analyze.add_argument("--overwrite", action="store_true", help="start anew, whatever analysis DIR holds")
    analyze.add_argument("--json", action="store_true", help="print summary.json instead of tables")
    analyze.add_argument("--quiet", action="store_true", help="no progress bar")
    analyze.add_argument("--io", choices=("auto", "mmap", "read"), default="auto", help="how files are read")
    analyze.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    analyze.add_argument("--download", action="store_true", help="fetch hub ids that are not in the local cache")
    analyze.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from .._backend import BackendUnavailable
    from ..analysis import plan as planning
    from ..analysis import report
    from ..analysis import run as running
    from ..checkpoint import Checkpoint
    from ..ops.update_scan import MAX_RULES, Rule

    try:
        import pyarrow  # noqa: F401  # checked before hours of work, not after
    except ModuleNotFoundError:
        return fail("analysis writes parquet files; pip install 'offprin-kernels[analysis]'")
    if arguments.out is None and not arguments.dry_run:
        return fail("--out DIR is needed: where should the results go?")
    try:
        first = Rule.parse(arguments.rule, arguments.threshold)
        rules = tuple(dict.fromkeys([first, *map(parse_rule, arguments.also)]))
        if len(rules) > MAX_RULES:
            return fail(f"--also: at most {MAX_RULES - 1} rules beside --rule, got {len(rules) - 1}")
        device = pick_device(arguments.device)
        options = planning.Options(
            rules,
            tuple(arguments.include),
            tuple(arguments.exclude),
            arguments.save_masks,
            metrics=tuple(dict.fromkeys(filter(None, arguments.metrics.split(",")))),
            k=arguments.k,
            alpha=arguments.alpha,
            tol_degrees=arguments.tol_degrees,
        )
        base, *tuned = (
            Checkpoint.open(source, io=arguments.io, download=arguments.download)
            for source in (arguments.base, *arguments.tuned)
        )
        plan = planning.make_plan(base, tuned, options, arguments.names)
        if arguments.dry_run:
            print(json.dumps(report.plan_dict(plan), indent=1) if arguments.json else report.render_plan(plan))
            return COMPLETE if plan.complete else PARTIAL
        with progress_bar(plan.nbytes, arguments.quiet) as advance:
            outcome = running.analyze(
                plan,
                arguments.out,
                command=arguments.command,
                device=device,
                overwrite=arguments.overwrite,
                progress=advance,
            )
    except (ValueError, BackendUnavailable) as error:
        # CheckpointError, OutputError and bad options are ValueErrors with one clear sentence
        return fail(str(error))
    except OSError as error:
        print(
            f"offprin: error: {error.strerror or error} ({error.filename or arguments.out}); finished parts are kept: "
            "free space or fix the path, and the same command continues",
            file=sys.stderr,
        )
        return PARTIAL
    print(json.dumps(outcome.summary, indent=1) if arguments.json else report.render(outcome.summary, outcome.root))
    return COMPLETE if outcome.complete else PARTIAL
