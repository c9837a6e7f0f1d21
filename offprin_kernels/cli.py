"""The ``offprin`` command: parse, call, print."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    import torch

    from .ops.update_scan import Rule

COMPLETE, BAD_INPUT, PARTIAL = 0, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 complete, 3 partial, 2 bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = parser().parse_args(argv)
        arguments.command = ["offprin", *argv]
        return arguments.call(arguments)
    except KeyboardInterrupt:
        exec("")  # or Python ends by SIGINT where the interrupt came inside an exec of text, as imports do many
        print("offprin: interrupted; the same command continues where it stopped", file=sys.stderr)
        return PARTIAL
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return COMPLETE


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="offprin", description="Where post-training moves a model's weights.")
    top.add_argument("--version", action="version", version=f"offprin-kernels {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

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
    analyze.set_defaults(call=run_analyze)

    mask = commands.add_parser(
        "mask",
        help="make weight masks of a checkpoint's linear layers",
        description="Write one mask per linear layer, decided by the weights alone, into a safetensors file that "
        "BitMask.load reads. Exit code 0: complete; 3: some factors missed the tolerance, or the run was cut short; "
        "2: bad input.",
    )
    mask.add_argument("model", metavar="MODEL", help="directory, file, or hub id org/name[@revision]")
    mask.add_argument("--kind", required=True, help="principal, non-principal, low, safe or random")
    mask.add_argument("--out", metavar="FILE", type=Path, required=True, help="the masks, such as masks.safetensors")
    mask.add_argument("--k", type=int, default=128, help="rank of the principal reconstruction (default: 128)")
    mask.add_argument("--alpha", type=float, default=0.5, help="share of weights selected (default: 0.5)")
    mask.add_argument("--seed", type=int, default=0, help="of random masks (default: 0)")
    mask.add_argument("--tol-degrees", type=float, default=0.05, help="certificate asked of factors (default: 0.05)")
    mask.add_argument("--include", metavar="GLOB", nargs="+", default=[], help="only layers of these names")
    mask.add_argument("--exclude", metavar="GLOB", nargs="+", default=[], help="no layers of these names")
    mask.add_argument("--quiet", action="store_true", help="no progress bar")
    mask.add_argument("--io", choices=("auto", "mmap", "read"), default="auto", help="how files are read")
    mask.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    mask.add_argument("--download", action="store_true", help="fetch a hub id that is not in the local cache")
    mask.set_defaults(call=run_mask)

    env = commands.add_parser("env", help="print versions, backends and devices, for bug reports")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(call=run_env)
    return top


def run_analyze(arguments: argparse.Namespace) -> int:
    from ._backend import BackendUnavailable
    from .analysis import plan as planning
    from .analysis import report, run
    from .checkpoint import Checkpoint
    from .ops.update_scan import MAX_RULES, Rule

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
            outcome = run.analyze(
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


def run_mask(arguments: argparse.Namespace) -> int:
    from ._backend import BackendUnavailable
    from .analysis import weight_masks
    from .checkpoint import Checkpoint

    try:
        options = weight_masks.MaskOptions(
            arguments.kind,
            arguments.alpha,
            arguments.k,
            arguments.seed,
            arguments.tol_degrees,
            tuple(arguments.include),
            tuple(arguments.exclude),
        )
        device = pick_device(arguments.device)
        model = Checkpoint.open(arguments.model, io=arguments.io, download=arguments.download)
        size = sum(info.nbytes for info in weight_masks.chosen(model, options))
        with progress_bar(size, arguments.quiet) as advance:
            report = weight_masks.write_masks(model, options, arguments.out, device=device, progress=advance)
    except (ValueError, BackendUnavailable) as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error} ({error.filename or arguments.out}); nothing was written there")
    share = report.inside / report.total if report.total else 0.0
    print(
        f"{options.kind} masks of {report.tensors} linear layers: {report.inside:,} of {report.total:,} weights "
        f"({100 * share:.3f} %) in {arguments.out}"
    )
    for name, degrees in report.not_converged:
        print(f"offprin: warning: {name}: its factors are certified to {degrees:.3f} degrees only", file=sys.stderr)
    return PARTIAL if report.not_converged else COMPLETE


def fail(sentence: str) -> int:
    print(f"offprin: error: {sentence}", file=sys.stderr)
    return BAD_INPUT


def parse_rule(text: str) -> Rule:
    """``name`` or ``name:threshold``."""
    from .ops.update_scan import Rule

    name, _, threshold = text.partition(":")
    try:
        return Rule.parse(name, float(threshold) if threshold else None)
    except ValueError as error:
        raise ValueError(f"--also {text}: {error}") from None


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,9}))?", name, re.ASCII)
    if not found:
        raise ValueError(f"--device {name}: not a device to analyze on; use auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    if found[1] and int(found[1]) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: the last of {torch.cuda.device_count()} is cuda:{torch.cuda.device_count() - 1}"
        )
    return torch.device(name)


@contextlib.contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Bytes of weights on stderr, with bytes per second; every ten seconds where stderr is no terminal."""
    if quiet:
        yield None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print("offprin: no progress bar without tqdm; pip install 'offprin-kernels[analysis]'", file=sys.stderr)
        yield None
        return
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", file=sys.stderr, mininterval=interval) as bar:
        yield bar.update


def run_env(arguments: argparse.Namespace) -> int:
    from ._env import environment

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
