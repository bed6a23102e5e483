"""What the experiments share: flags, the start of a run, shares in %, tables and pictures.

Packages beyond requirements.txt of the project are imported where they are used.
"""
import contextlib
import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from scans import COUNT, Scans, say, setup

FLAGS = {  # those that several experiments have
    "files": dict(nargs="+", metavar="FILE", help="prompts; safe:FILE or unsafe:FILE where it has no labels"),
    "--out": dict(metavar="FILE", help="the answers as JSON lines, as they come; resumes what is there"),
    "--plot": dict(metavar="DIR", help="write pictures there"),
    "--text": dict(metavar="FILE", help="perplexity of this text"),
    "--limit": dict(metavar="N", type=COUNT, help="at most N windows, summaries, questions per subject"),
    "--batch-size": dict(metavar="N", type=COUNT, default=16, help="queries at a time, 16"),
}


def share_flags(parser, *names):
    for name in names:
        parser.add_argument(name, **FLAGS[name])


def batches(things, size, what="batches"):
    """The things of a list, `size` at a time, with rate and time left on a terminal."""
    from tqdm import tqdm
    return tqdm([things[i:i + size] for i in range(0, len(things), size)],
                unit=f" {what}", disable=None, leave=False)


# ---------------------------------------------------------------------------------------------------------
# The start of a run, in one process or in several under torchrun

PARALLEL = dist.is_torchelastic_launched()
RANK, PROCESSES = map(int, (os.environ["RANK"], os.environ["WORLD_SIZE"]) if PARALLEL else (0, 1))


def wait_for_all():
    if PARALLEL:
        dist.barrier()


@contextlib.contextmanager
def rank_0_first():
    """The other processes enter when rank 0 has left, and find on the disk what it wrote."""
    if RANK > 0:
        wait_for_all()
    yield
    if RANK == 0:
        wait_for_all()


def start(args):
    """`setup` in every process."""
    if PARALLEL:        # torchrun limits each process to one thread
        args.threads = args.threads or max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"]))
        if args.device is None and torch.cuda.device_count() > 1:
            args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    with rank_0_first():
        return setup(args)


def varied(method, **fields):
    """A Scans that differs in some of its Settings."""
    settings = dataclasses.replace(method.settings, **fields)
    return Scans(method.model, method.tokenizer, method.vectors, settings)


# ---------------------------------------------------------------------------------------------------------
# Shares, tables, pictures


def percent(hits):
    """Share of true hits in %, and its 95% interval by Wilson (1927). Hits that are None are not counted."""
    from scipy.stats import binomtest
    hits = [hit for hit in hits if hit is not None]
    if not hits:
        return None, None
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return 100 * sum(hits) / len(hits), [100 * float(interval.low), 100 * float(interval.high)]


TITLES = {
    "refusals": "Refused, in %, with 95% intervals (Table 2); ours: by the opening of the answer",
    "answers": "All answers. Average: (complied on safe + refused on unsafe) / all, in %, the paper's Avg.",
    "classifier": "Is a query harmful? (Figure 4) Positive: the class to find; safe in the authors' code",
    "cosines": "Cosine of a_t with d_harm: mean, 10th and 90th percentile (Figure 5)",
    "pca": "a_t in its first two principal components: share of the variance, centres (Figure 3)",
    "sweep": "Refused, in %. Average: the paper's Avg. (Tables 5 to 7)",
    "capability": "Capability (Table 3). Harmful: sigma +1; shortened: fewer examples, a document cut",
    "layers": "Lengths of v_r, before scaling, and of the stream at p; AUROC of the anchors",
    "ranges": "Classification layers: AUROC of the anchors, the estimated T, harmless anchors above it",
    "speed": "Median seconds of both, and the median ratio of the second to the first (Table 4)",
}


def show(result, as_json):
    """Print a result {name: rows} as tables, or as JSON. What has no title is for --json alone."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    import tabulate
    tabulate.MIN_PADDING = 0
    for name in filter(TITLES.get, result):
        rows = [{key.replace("_", " "): "{:.1f} to {:.1f}".format(*value) if type(value) is list else value
                 for key, value in row.items()} for row in result[name]]
        print(TITLES[name])
        print(tabulate.tabulate(rows, "keys", "plain", floatfmt=".4g", missingval="-"), end="\n\n")


@contextlib.contextmanager
def picture(args, name, columns=1, size=(6.4, 4)):
    """The axes of a picture, which is written at the end."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="tight")
    yield figure.subplots(1, columns)
    files = ", ".join(Path(file).name for file in args.files)
    figure.suptitle(f"{Path(args.model).resolve().name}: {files}", fontsize=10)
    path = Path(args.plot) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    say(f"picture   {path}")
