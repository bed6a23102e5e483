"""The paper's tables and figures as commands, for any model and any prompt files; see README.md.

Tables go to standard output, as one object with --json; everything else goes to standard error. "default" is
the answer without SCANS, "steered" the one with it. Rates are in %.

eval and sweep also run under torchrun (--nproc-per-node N -m data.experiments eval ... --out FILE): each
process takes its share of the prompts, on its own GPU where there are several.
"""
import contextlib
import datetime
import os

import torch.distributed as dist

from data.experiments import layers, speed, table2_refusals, table3_capability, tables567_sweep
from data.experiments import figure3_figure5 as figures
from data.experiments.core import need, rank
from scans import Parser, run

TABLES = ("scipy", "sklearn", "tabulate", "tqdm")
COMMANDS = {  # each with its flags(parser) and run(args), and the packages that it needs
    "eval": (table2_refusals.flags, table2_refusals.run, TABLES),
    "figures": (figures.flags, figures.run, TABLES),
    "capability": (table3_capability.flags, table3_capability.run, (*TABLES, "rouge_score")),
    "bench": (speed.bench_flags, speed.bench, ("tabulate",)),
    "sweep": (tables567_sweep.flags, tables567_sweep.run, TABLES),
    "layers": (layers.flags, layers.run, TABLES),
    "versus": (speed.versus_flags, speed.versus, ("tabulate", "transformers"))}


def command(args):
    """One of COMMANDS. Under torchrun only rank 0 talks."""
    need(args.command, *COMMANDS[args.command][2], *["matplotlib"] * bool(getattr(args, "plot", None)))
    if dist.is_torchelastic_launched():
        if args.command not in ("eval", "sweep"):
            raise ValueError(f"{args.command} runs in one process; torchrun serves eval and sweep")
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))     # shares may end hours apart
    with contextlib.redirect_stderr(open(os.devnull, "w")) if rank() else contextlib.nullcontext():
        COMMANDS[args.command][1](args)


def main():
    parser = Parser(prog="python -m data.experiments", description="The paper's tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (flags, run_it, _) in COMMANDS.items():
        about = run_it.__doc__.partition("\n")[0]
        flags(commands.add_parser(name, help=about, description=about))
    run(parser, command)


if __name__ == "__main__":
    main()
