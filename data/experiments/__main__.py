"""The paper's tables and figures as commands, for any model and any prompt files; see README.md.

Tables go to standard output, as one object with --json; everything else goes to standard error. "default" is
the answer without SCANS, "steered" the one with it. Rates are in %.

eval and sweep also run under torchrun (--nproc-per-node N -m data.experiments eval ... --out FILE): each
process takes its share of the prompts, on its own GPU where there are several.
"""
import contextlib
import datetime
import importlib.metadata
import os
from pathlib import Path

import torch.distributed as dist

from data.experiments import layers, speed, table2_refusals, table3_capability, tables567_sweep
from data.experiments import figure3_figure5 as figures
from data.experiments.core import PARALLEL, RANK
from scans import Parser, run

COMMANDS = {    # each with its flags(parser) and run(args)
    "eval": (table2_refusals.flags, table2_refusals.run),
    "figures": (figures.flags, figures.run),
    "capability": (table3_capability.flags, table3_capability.run),
    "bench": (speed.bench_flags, speed.bench),
    "sweep": (tables567_sweep.flags, tables567_sweep.run),
    "layers": (layers.flags, layers.run),
    "versus": (speed.versus_flags, speed.versus)}


def command(args):
    """One of COMMANDS. Under torchrun only rank 0 talks."""
    try:
        for package in Path(__file__).with_name("requirements.txt").read_text().split():
            importlib.metadata.version(package)
    except ImportError as error:
        raise ValueError(f"{error}: pip install -r data/experiments/requirements.txt") from None
    if args.command not in ("eval", "sweep") and (PARALLEL or getattr(args, "no_default", False)):
        raise ValueError(f"{args.command}: torchrun and --no-default are for eval and sweep")
    if PARALLEL:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))     # shares may end hours apart
    with contextlib.redirect_stderr(open(os.devnull, "w")) if RANK else contextlib.nullcontext():
        COMMANDS[args.command][1](args)


def main():
    parser = Parser(prog="python -m data.experiments", description="The paper's tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (flags, run_it) in COMMANDS.items():
        about = run_it.__doc__.partition("\n")[0]
        flags(commands.add_parser(name, help=about, description=about))
    run(parser, command)


if __name__ == "__main__":
    main()
