"""``offprin mask``: make weight masks of a checkpoint's linear layers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import COMPLETE, PARTIAL, fail, pick_device, progress_bar

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
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
    mask.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from .._backend import BackendUnavailable
    from ..analysis import weight_masks
    from ..checkpoint import Checkpoint

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
