"""The paper's tables and figures as commands, for any model and any prompt files:

    python -m data.experiments eval FILE...           refusal rates, metrics of sigma       Table 2, Figure 4
    python -m data.experiments figures FILE...        cosines, separation, pictures of a_t  Figures 3, 5
    python -m data.experiments capability ...         perplexity, MMLU, ROUGE               Table 3
    python -m data.experiments bench                  speed, memory, the price of SCANS     Table 4
    python -m data.experiments sweep SETTING FILE...  the rates over a range of a setting   Tables 5, 6, 7
    python -m data.experiments versus                 speed against transformers

FILE is a .csv, .json or .txt of prompts; safe:FILE or unsafe:FILE where it has no labels of its own. All
flags of scans.py about the model and the method hold. Tables go to standard output, as one object with
--json; everything else to standard error. "default" is the answer without SCANS, "scans" the one with it,
here and in every file written. Rates are in %.

eval and sweep also run under torchrun (--nproc-per-node N -m data.experiments eval ...): each process takes
its share of the prompts, on its own GPU where there are several. torchrun's own exit status is 1 whatever
failed.
"""
import contextlib
import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during slow imports: no traceback; see scans.run

import torch
import torch.distributed as dist

from data.experiments import (figure3_figure5, table2_refusals, table3_capability, table4_speed,
                              tables567_sweep, versus)
from data.experiments.core import RANK, WORLD
from scans import Parser, run, say

COMMANDS = {  # each has flags(parser) and run(args)
    "eval": table2_refusals, "figures": figure3_figure5, "capability": table3_capability,
    "bench": table4_speed, "sweep": tables567_sweep, "versus": versus}


def command(args):
    """One of COMMANDS; memory that does not suffice becomes one line that says what to try."""
    if WORLD > 1 and args.command not in ("eval", "sweep"):
        raise ValueError(f"{args.command} runs in one process; torchrun serves eval and sweep")
    size, out = getattr(args, "batch_size", 1), getattr(args, "out", None)
    kept = f"what was done stands in {out}, and the same command goes on from there" if out else ""
    try:
        with contextlib.redirect_stderr(open(os.devnull, "w")) if RANK > 0 else contextlib.nullcontext():
            COMMANDS[args.command].run(args)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        advice = f"--batch-size {size // 2}" if size > 1 else "--dtype bfloat16"
        raise ValueError(f"out of memory: try {advice}{'; ' * bool(out)}{kept}") from None
    except KeyboardInterrupt:
        if out:
            say(f"stopped   {kept}")
        raise
    if WORLD > 1:
        dist.destroy_process_group()


def main():
    parser = Parser(prog="python -m data.experiments", description="The paper's tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, experiment in COMMANDS.items():
        about = experiment.run.__doc__
        experiment.flags(commands.add_parser(name, help=about.splitlines()[0], description=about))
    run(parser, command)


if __name__ == "__main__":
    main()
