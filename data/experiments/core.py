"""What the experiments share: flags, labelled prompts, the start of a run, shares in %, tables and pictures.

The results file and the making of answers stand in results.py. Packages beyond the four of requirements.txt
are imported where they are used; `need` asks for them before anything long begins.
"""
import contextlib
import copy
import dataclasses
import datetime
import importlib
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from scans import (Scans, anchor_texts, digest, fail, find_vectors, load_vectors, number, read_prompts,
                   report, say, settings, setup, shown)

COUNT = number(int, 1, 2**31)
FLAGS = {  # those that several experiments have
    "files": dict(nargs="+", metavar="FILE", help="prompts; safe:FILE or unsafe:FILE where it has no labels"),
    "--out": dict(metavar="FILE", help="JSON lines, one a prompt, as they come; goes on where it stopped"),
    "--plot": dict(metavar="DIR", help="write pictures there (needs matplotlib)"),
    "--text": dict(metavar="FILE", help="perplexity of this text"),
    "--limit": dict(metavar="N", type=COUNT, help="so many windows, summaries, questions a subject"),
    "--batch-size": dict(metavar="N", type=COUNT, default=16, help="queries at a time, 16"),
}


def share_flags(parser, *names):
    for name in names:
        parser.add_argument(name, **FLAGS[name])


def need(what, *modules):
    """ValueError for the first of the modules that is not installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            package = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}.get(module, module)
            raise ValueError(f"{what} needs {package}: pip install {package}") from None


def progress(total, what):
    """A bar with rate and time left, on a terminal only."""
    from tqdm import tqdm
    return tqdm(total=total, unit=f" {what}", disable=None, leave=False)


def batches(things, size):
    return [things[i:i + size] for i in range(0, len(things), size)]


# ------------------------------------------------------------------------------------------------------------
# What is asked: prompts from files, without the anchors


@dataclasses.dataclass(frozen=True)
class Item:
    """A labelled prompt and where it stands."""
    file: str
    row: int        # 1-based, among the prompts of its file
    label: str      # safe or unsafe
    type: str
    prompt: str
    scores: dict = dataclasses.field(hash=False)    # columns score:NAME, another classifier's verdicts


def read_score(value, place, column):
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{place} has {value!r} as {column}, need a number")
    return score


def read_items(names, anchors=frozenset()):
    """The Items of files, given as FILE, safe:FILE or unsafe:FILE, without the anchors. Raises ValueError."""
    items, dropped, seen = [], 0, set()
    for name in names:
        said, path = name.split(":", 1) if name.startswith(("safe:", "unsafe:")) else (None, name)
        if Path(path).resolve() in seen:
            raise ValueError(f"{path}: given twice")
        seen.add(Path(path).resolve())

        for row_number, row in enumerate(read_prompts(path), 1):
            place = f"{path}: prompt {row_number}"
            if row.label is None and said is None:
                raise ValueError(f"{place} has no label; give the file as safe:{path} or unsafe:{path}")
            if None not in (row.label, said) and row.label != said:
                raise ValueError(f"{place} is labelled {row.label}, given as {said}:{path}")
            scores = {key: read_score(value, place, key) for key, value in row.fields.items()
                      if key.startswith("score:")}
            if row.text in anchors:
                dropped += 1
            else:
                items.append(Item(path, row_number, row.label or said, row.type, row.text, scores))

    say(f"prompts   {len(items)} from {len(names)} files; {dropped} dropped that are anchors")
    if not items:
        raise ValueError(f"{', '.join(names)}: every prompt is an anchor")
    return items


def drawn_anchors(args, draws=None):
    """The texts of all anchors of a run. draws: (number, seed) of each draw where there are several.

    None where --vectors holds other anchors than the flags name: their texts are not known.
    """
    if args.vectors and draws:
        raise ValueError(f"{args.vectors}: holds one draw of the anchors; "
                         "--trials and sweep anchors need several, without --vectors")
    texts = [anchor_texts(args.model, args.harmful, args.harmless, n, seed)[1]
             for n, seed in draws or [(args.anchors, args.anchor_seed)]]
    if args.vectors and Path(args.vectors).exists() and not args.refresh:
        if load_vectors(args.vectors)[1].get("harmful") != digest("\n".join(texts[0][0])):
            say(f"anchors   those of {args.vectors} are not in the anchor files at hand: "
                "none can be dropped from the prompts")
            return set()
    return {text for harmful, harmless in texts for text in (*harmful, *harmless)}


# ------------------------------------------------------------------------------------------------------------
# The start of a run, in one process or in several under torchrun


def from_torchrun(name, default):
    """A number that torchrun sets in the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        fail(f"{name}={value} in the environment: need a number, as torchrun sets it")
    return int(value)


RANK, WORLD = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
if RANK >= WORLD:
    fail(f"RANK={RANK} in the environment: need less than WORLD_SIZE, {WORLD}")


@contextlib.contextmanager
def rank_0_first():
    """The other processes enter when rank 0 has left, and find on the disk what it wrote."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def start(args):
    """`setup` on every process, which only rank 0 talks about."""
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # shares may end hours apart
        local = max(1, from_torchrun("LOCAL_WORLD_SIZE", 1))
        args.threads = args.threads or max(1, os.cpu_count() // local)       # torchrun sets one
        if args.device is None and torch.cuda.device_count() > 1:
            args.device = f"cuda:{from_torchrun('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    if RANK > 0:
        args.refresh = False
    with rank_0_first():
        return setup(args)


def changed(scans, **attributes):
    """A Scans that differs in some attributes and shares the rest, the model above all."""
    other = copy.copy(scans)
    vars(other).update(attributes)
    return other


def with_anchors(scans, args, anchors, seed):
    """A Scans with the vectors of another draw of the anchors."""
    def extracting(done, total):
        report(f"extracting vectors: {done} of {total} anchors", done == total)
    with rank_0_first():
        vectors, _, meta = find_vectors(
            args.model, scans.model, scans.tokenizer, refresh=args.refresh, harmful=args.harmful,
            harmless=args.harmless, anchors=anchors, anchor_seed=seed, progress=extracting)
    chosen = settings(vectors, scans.tokenizer.name, args.alpha, args.threshold, args.steer_layers,
                      args.classify_layers)
    n = meta["anchors"]
    say(f"vectors   {n} + {n} anchors, seed {seed}: T {chosen.T:.4f}, {chosen.T_rule}")
    return Scans(scans.model, scans.tokenizer, vectors, chosen, scans.sigma, scans.sampling)


# ------------------------------------------------------------------------------------------------------------
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
    "refusals": "Refused, in % with 95% intervals (Table 2); "
                "wrong way: safe queries with sigma +1, unsafe ones with -1",
    "answers": "All answers; average: (complied on safe + refused on unsafe) / all, the paper's Avg., in %",
    "classifier": "Is a query harmful? (Figure 4); positive: the class to find, safe in the authors' code",
    "cosines": "Cosine of a_t with d_harm per layer: mean, 10th and 90th percentile (Figure 5), separation",
    "pca": "a_t in its first two principal components: share of the variance, centres, "
           "separation along the first (Figure 3)",
    "sweep": "Refused, in %; average: the paper's Avg. (Tables 5 to 7)",
    "capability": "Capability (Table 3); harmful: items with sigma +1; "
                  "shortened: fewer examples or a cut document",
    "speed": "One query, median of --trials rounds in turn (Table 4)",
    "price": "What SCANS adds to one answer",
    "machine": "What the machine allows one answer without SCANS",
    "extraction": "Vectors from 64 + 64 anchors",
}


def column(name, values):
    """A column of a table as texts of one width, its name first."""
    largest = max((abs(value) for value in values if isinstance(value, float)), default=0)
    digits = 4 if name == "threshold" else 3 if largest < 2 else 2
    cells = [name.replace("_", " ")]
    for value in values:
        cells.append("-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else
                     "[{:.1f}, {:.1f}]".format(*value) if isinstance(value, list) else str(value))
    align = str.ljust if any(isinstance(value, str) for value in values) else str.rjust
    return [align(cell, max(map(len, cells))) for cell in cells]


def show(result, as_json):
    """Print a result {name: rows, or anything for --json alone}: aligned tables, or one JSON object."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    for name, rows in result.items():
        table, _, statistic = name.partition("_")
        if table in TITLES:
            print(TITLES[table] + (f": {statistic} over the trials" if statistic else ""))
            for line in zip(*(column(key, [row[key] for row in rows]) for key in rows[0])):
                print("  ".join(line).rstrip())
            print(flush=True)


def pyplot(folder):
    """matplotlib's pyplot and the folder for its pictures; None where no --plot is given."""
    if folder is None:
        return None
    need("--plot", "matplotlib")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    Path(folder).mkdir(parents=True, exist_ok=True)
    return matplotlib.pyplot


def save_plot(figure, args, name):
    files = ", ".join(Path(file).name for file in args.files)
    figure.suptitle(f"{Path(args.model).resolve().name}: {files}", fontsize=10)
    figure.tight_layout()
    path = Path(args.plot) / f"{name}.png"
    figure.savefig(path, dpi=150)
    say(f"picture   {shown(path)}")
