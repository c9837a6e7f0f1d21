"""``offprin analyze``: compare tuned checkpoints with their base."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .common import COMPLETE, PARTIAL, end, explain, fail, hindrance, parse_rule, pick_device, progress_bar

if TYPE_CHECKING:
    from ..analysis import Outcome, Plan
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
        default=["eta:1e-3", "atol:1e-5", "atol:1e-8"],
        help="further rules to count beside (default: eta:1e-3 atol:1e-5 atol:1e-8)",
    )
    analyze.add_argument("--include", metavar="GLOB", nargs="+", default=[], help="compare only tensors of these names")
    analyze.add_argument("--exclude", metavar="GLOB", nargs="+", default=[], help="leave out tensors of these names")
    analyze.add_argument(
        "--metrics",
        metavar="LIST",
        default="update",
        help="update (counts and agreement, always there) and, for linear layers, some of spectrum,masks,energy: "
        "angles and spectral shift, overlap with principal and small weights, energy in principal subspaces",
    )
    analyze.add_argument("--k", type=int, default=128, help="dimension of principal subspaces (default: 128)")
    analyze.add_argument("--alpha", type=float, default=0.5, help="share of weights in a weight mask (default: 0.5)")
    analyze.add_argument(
        "--tol-degrees", type=float, default=0.05, help="certificate asked of every subspace (default: 0.05)"
    )
    analyze.add_argument(
        "--nss",
        choices=("full", "top"),
        default="full",
        help="spectral shift over full spectra, exactly (default), or over the top k values alone: far cheaper where "
        "matrices are large",
    )
    analyze.add_argument(
        "--shard",
        metavar="I/N",
        help="make only the I-th of N shares, as a task of a job array; offprin merge finishes",
    )
    analyze.add_argument("--save-masks", action="store_true", help="write masks/RUN.safetensors, one bit per weight")
    analyze.add_argument("--figures", action="store_true", help="also PNG and PDF figures, into DIR/figures")
    analyze.add_argument("--no-report", action="store_true", help="tables and summary only, no report.html")
    analyze.add_argument("--dry-run", action="store_true", help="print the plan, its bytes, memory and time, and stop")
    analyze.add_argument("--bandwidth", type=float, help="for --dry-run: GB/s that one process reads")
    analyze.add_argument("--gemm-rate", type=float, help="for --dry-run: TFLOP/s of fp32 products of one process")
    analyze.add_argument("--ranks", type=int, default=1, help="for --dry-run: how many processes share the work")
    analyze.add_argument("--overwrite", action="store_true", help="start anew, whatever analysis DIR holds")
    analyze.add_argument(
        "--json", action="store_true", help="print summary.json instead of tables; of a shard, what is missing"
    )
    analyze.add_argument("--quiet", action="store_true", help="no progress bar")
    analyze.add_argument("--io", choices=("auto", "mmap", "read"), default="auto", help="how files are read")
    analyze.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    analyze.add_argument("--download", action="store_true", help="fetch hub ids that are not in the local cache")
    analyze.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from .._backend import BackendUnavailable
    from ..analysis import run as running
    from ..analysis.scaleout import Group, Shard

    if why := hindrance(arguments):
        return fail(why)
    if arguments.out is None and not arguments.dry_run:
        return fail("--out DIR is needed: where should the results go?")
    group = None
    with contextlib.ExitStack() as together:
        try:
            shard = Shard.parse(arguments.shard) if arguments.shard else None
            if not arguments.dry_run and (group := Group.from_environment()):
                together.enter_context(group)
            device = pick_device(arguments.device)
            plan = make_plan(arguments)
            if arguments.dry_run:
                return show_plan(plan, arguments)
            total, label = running.nbytes(plan, shard or running.alone), "weights"
            if group:
                label = f"weights, {group.world} processes"
                if device.type == "cuda" and device.index is None:
                    device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            quiet = arguments.quiet or (group is not None and not group.first)
            with progress_bar(total, quiet, label) as advance:
                outcome = running.analyze(
                    plan,
                    arguments.out,
                    command=arguments.command,
                    device=device,
                    overwrite=arguments.overwrite,
                    progress=advance,
                    shard=shard,
                    group=group,
                )
        except (ValueError, BackendUnavailable, OSError) as error:
            if group:
                group.fail(error)
            return explain(error, arguments.out)
        if outcome.summary is not None:
            return end(outcome, arguments)
        if group:
            return COMPLETE  # what rank 0 returns is the analysis' exit code; this process has done its own
        return end_shard(outcome, plan, arguments)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Raises ValueError where options or checkpoints are bad."""
    from ..analysis import plan as planning
    from ..checkpoint import Checkpoint
    from ..ops.update_scan import MAX_RULES, Rule

    first = Rule.parse(arguments.rule, arguments.threshold)
    rules = tuple(dict.fromkeys([first, *map(parse_rule, arguments.also)]))
    if len(rules) > MAX_RULES:
        raise ValueError(f"--also: at most {MAX_RULES - 1} rules beside --rule, got {len(rules) - 1}")
    options = planning.Options(
        rules,
        tuple(arguments.include),
        tuple(arguments.exclude),
        arguments.save_masks,
        metrics=tuple(dict.fromkeys(m for m in arguments.metrics.split(",") if m not in ("", "update"))),
        k=arguments.k,
        alpha=arguments.alpha,
        tol_degrees=arguments.tol_degrees,
        nss=arguments.nss,
    )
    base = Checkpoint.open(arguments.base, io=arguments.io, download=arguments.download)
    tuned = [
        Checkpoint.open(source, io=arguments.io, download=arguments.download, base=base) for source in arguments.tuned
    ]
    return planning.make_plan(base, tuned, options, arguments.names)


def show_plan(plan: Plan, arguments: argparse.Namespace) -> int:
    from ..analysis import report

    forecast = report.forecast(plan, arguments.bandwidth, arguments.gemm_rate, arguments.ranks)
    found = report.plan_dict(plan) | forecast
    print(json.dumps(found, indent=1) if arguments.json else report.render_plan(plan, forecast))
    return COMPLETE if plan.complete else PARTIAL


def end_shard(outcome: Outcome, plan: Plan, arguments: argparse.Namespace) -> int:
    """What a shard says that does not finish the analysis."""
    missing, parts = outcome.missing_parts, len(plan.parts)
    if arguments.json:
        told = {"finished": False, "shard": arguments.shard, "parts": parts, "missing_parts": missing}
        print(json.dumps({**told, "directory": str(outcome.root)}, indent=1))
    elif missing:
        print(
            f"shard {arguments.shard} is done; {missing} of {parts} parts are missing: "
            f"when all shards are done, offprin merge {outcome.root}"
        )
    else:
        print(f"shard {arguments.shard} is done, the others are at work: offprin merge {outcome.root} finishes")
    return COMPLETE if plan.complete else PARTIAL
