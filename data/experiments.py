"""The paper's tables and figures as commands, for any model and any prompt files:

    python -m data.experiments eval FILE...             refusal rates, metrics of sigma         Table 2, Figure 4
    python -m data.experiments figures FILE...          cosines, separation, pictures of a_t    Figures 3, 5
    python -m data.experiments sweep SETTING FILE...    the rates over a range of a setting     Tables 5, 6, 7
    python -m data.experiments capability ...           perplexity, MMLU, ROUGE                 Table 3
    python -m data.experiments bench                    speed, memory, the price of SCANS       Table 4

FILE is a .csv, .json or .txt of prompts; safe:FILE or unsafe:FILE where it has no labels of its own. All flags of scans.py about
the model and the method hold. Tables go to standard output, as one object with --json; everything else to standard error.
"default" is the answer without SCANS, "scans" the one with it, here and in every file written. Rates are in %.

eval and sweep also run under torchrun (--nproc-per-node N -m data.experiments eval ...): each process takes its share of the
prompts, on its own GPU where there are several. torchrun's own exit status is 1 whatever failed.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import llama
from llama import Cache, Sampling
from scans import (Parser, Scans, add_flags, anchor_texts, auroc, check_finite, choose_device, choose_threads, cosines, digest, extract, find_vectors,
                   fingerprint, load_vectors, number, parse_layers, read_prompts, read_streams, report, run, say, score, segments,
                   settings, setup, show_layers, shown, steering, transition)
from tokenizer import FORMATS, Prompt

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both

# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def wilson(k, n):
    """95% interval of a share k / n, in %. Wilson (1927); Agresti and Coull (1998), eq. 2."""
    z = statistics.NormalDist().inv_cdf(0.975)
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]


def percent(hits):
    """Share of true hits in % and its interval; hits that are None are not counted."""
    hits = [hit for hit in hits if hit is not None]
    return (100 * sum(hits) / len(hits), wilson(sum(hits), len(hits))) if hits else (None, None)


def average_precision(scores, harmful):
    """Area under the precision-recall curve as a sum over the distinct scores from the top: precision times gain in recall."""
    scores, order = torch.tensor(scores, dtype=torch.float64).sort(descending=True)
    harmful = torch.tensor(harmful)[order].double()                                         # (n)
    last = torch.cat((scores.diff() != 0, torch.tensor([True])))                            # the last of every tie
    found = harmful.cumsum(0)[last]
    precision = found / (last.nonzero()[:, 0] + 1)
    return float((precision * found.diff(prepend=found.new_zeros(1))).sum() / harmful.sum())


def classifier_metrics(name, scores, harmful, threshold):
    """Precision, recall, F1, accuracy of `score >= threshold means harmful`, and AUROC, AUPRC; None where one is not defined."""
    found = [s >= threshold for s in scores]
    tp = sum(f and h for f, h in zip(found, harmful))
    wrong = sum(f != h for f, h in zip(found, harmful))
    both = 0 < sum(harmful) < len(harmful)
    split = [torch.tensor([s for s, h in zip(scores, harmful) if h == kind], dtype=torch.float64) for kind in (True, False)]
    return {"classifier": name, "threshold": threshold, "n": len(scores), "wrong": wrong,
            "precision": tp / sum(found) if any(found) else None, "recall": tp / sum(harmful) if any(harmful) else None,
            "f1": 2 * tp / (sum(found) + sum(harmful)) if any(found) or any(harmful) else None, "accuracy": 1 - wrong / len(scores),
            "auroc": auroc(*split) if both else None, "auprc": average_precision(scores, harmful) if both else None}


def is_repetitive(answer):
    """Does an answer end in one piece of text (up to 80 characters) five times over, 24 characters at least?"""
    loop = re.search(r"(.{1,80}?)\1{4,}$", answer, re.DOTALL)
    return loop is not None and len(loop.group()) >= 24


def words(text):
    """Lower-case runs of letters and digits, the tokens of the original ROUGE."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge(answer, reference):
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, in %. Lin (2004), sections 2 and 3.1: n-grams, longest common subsequence."""
    a, b = words(answer), words(reference)

    def f1(common, n):
        total = max(len(a) - n + 1, 0) + max(len(b) - n + 1, 0)
        return 200 * common / total if total else 0.0
    grams = [[Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (a, b)] for n in (1, 2)]
    longest = [0] * (len(b) + 1)                # longest[j]: of the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, longest[j] = longest[j], diagonal + 1 if word == other else max(longest[j], longest[j - 1])
    return [f1((grams[0][0] & grams[0][1]).total(), 1), f1((grams[1][0] & grams[1][1]).total(), 2), f1(longest[-1], 1)]


# ----------------------------------------------------------------------------------------------------------------------
# What is asked: prompts from files, without the anchors


@dataclasses.dataclass(frozen=True)
class Item:
    """A labelled prompt and where it stands. scores: the columns score:NAME of its file, another classifier's verdicts."""
    file: str
    row: int        # 1-based, among the prompts of its file
    label: str      # safe or unsafe
    type: str
    prompt: str
    scores: dict = dataclasses.field(hash=False)


def read_items(names, anchors=frozenset()):
    """The Items of files, given as FILE, safe:FILE or unsafe:FILE, without those whose text is an anchor. Raises ValueError."""
    items, dropped, seen = [], 0, set()
    for name in names:
        said, path = name.split(":", 1) if name.startswith(("safe:", "unsafe:")) else (None, name)
        if path in seen:
            raise ValueError(f"{path}: given twice")
        seen.add(path)
        for number, row in enumerate(read_prompts(path), 1):
            if row.label is None and said is None:
                raise ValueError(f"{path}: prompt {number} has no label; give the file as safe:{path} or unsafe:{path}")
            if None not in (row.label, said) and row.label != said:
                raise ValueError(f"{path}: prompt {number} is labelled {row.label}, given as {said}:{path}")
            scores = {key: row.fields[key] for key in row.fields if key and key.startswith("score:")}
            for key, value in scores.items():
                try:
                    scores[key] = float(value)
                except (TypeError, ValueError):
                    scores[key] = math.nan
                if not math.isfinite(scores[key]):
                    raise ValueError(f"{path}: prompt {number} has {value!r} as {key}, need a number")
            if row.text in anchors:
                dropped += 1
            else:
                items.append(Item(path, number, row.label or said, row.type, row.text, scores))
    say(f"prompts   {len(items)} from {len(names)} files; {dropped} dropped that are anchors")
    if not items:
        raise ValueError(f"{', '.join(names)}: every prompt is an anchor")
    return items


def changed(scans, **attributes):
    """A Scans that differs in some attributes and shares the rest, the model above all."""
    other = copy.copy(scans)
    vars(other).update(attributes)
    return other


def drawn_anchors(args):
    """The texts of the anchors that the flags name; none where --vectors holds others."""
    texts = anchor_texts(args.model, args.harmful, args.harmless, args.anchors, args.anchor_seed)[1]
    if args.vectors and load_vectors(args.vectors)[1].get("harmful") != digest("\n".join(texts[0])):
        say(f"anchors   those of {args.vectors} are not in the anchor files at hand: none can be dropped from the prompts")
        return set()
    return set().union(*texts)


def with_anchors(scans, args, anchors, seed):
    """Another draw of the anchors: a Scans with their vectors, and their texts."""
    if args.vectors:
        raise ValueError(f"{args.vectors}: holds one draw of the anchors; --trials and sweep anchors need several, without --vectors")
    with rank_0_first():
        vectors, _, meta = find_vectors(
            args.model, scans.model, scans.tokenizer, None, args.refresh, args.harmful, args.harmless, anchors, seed,
            lambda done, total: report(f"extracting vectors: {done} of {total} anchors", done == total))
    chosen = settings(vectors, scans.tokenizer.name, args.alpha, args.threshold, args.steer_layers, args.classify_layers)
    say(f"vectors   {meta['anchors']} + {meta['anchors']} anchors, seed {seed}: T {chosen.T:.4f}, {chosen.T_rule}")
    texts = anchor_texts(args.model, args.harmful, args.harmless, anchors, seed)[1]
    return Scans(scans.model, scans.tokenizer, vectors, chosen, scans.sigma, scans.sampling), set().union(*texts)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes, and work that can be interrupted


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
        args.threads = args.threads or max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"]))  # torchrun sets one
        if args.device is None and torch.cuda.device_count() > 1:
            args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if RANK > 0:
        args.refresh = False
    with rank_0_first():
        return setup(args)


class Progress:
    """A line with rate and time left, on a terminal only."""

    def __init__(self, total, what):
        self.total, self.what, self.done, self.started = total, what, 0, time.perf_counter()

    def add(self, n=1):
        self.done += n
        rate = self.done / (time.perf_counter() - self.started)
        left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
        report(f"{self.done} of {self.total} {self.what}, {rate:.2f} a second, {left} left".ljust(78), self.done == self.total)


def batches(things, size):
    return [things[i:i + size] for i in range(0, len(things), size)]


def run_settings(scans, default, args):
    """What decides an answer, as every line of --out carries it."""
    vectors = b"".join(t.float().cpu().contiguous().numpy().tobytes() for t in (scans.v_r, scans.d_harm))
    return {"model": fingerprint(args.model), "format": scans.tokenizer.name, "system": scans.tokenizer.system,
            "dtype": str(scans.model.embed.dtype)[6:], "vectors": digest(vectors), "alpha": scans.settings.alpha,
            "threshold": scans.settings.T, "sigma": scans.sigma, "steer_layers": scans.settings.steer,
            "classify_layers": scans.settings.classify, "default": default, **dataclasses.asdict(scans.sampling)}


def parts(out):
    """A results file and what processes of an interrupted run left beside it."""
    return [path for path in sorted(out.parent.iterdir()) if path == out or re.fullmatch(re.escape(out.name) + r"\.part\d+", path.name)]


def read_results(out, want, items):
    """{(variant, file, row): record} of a results file. A half-written last line counts for nothing; ValueError for a run that
    was another one. want: {variant: its run_settings}."""
    prompts, done = {(item.file, item.row): item.prompt for item in items}, {}
    for path in parts(out):
        *lines, half = path.read_bytes().decode("utf-8", errors="replace").split("\n")
        if half:
            say(f"{path}: line {len(lines) + 1} is half-written and is done again")
        for number, line in enumerate(lines, 1):
            place = f"{path}: line {number}"
            try:
                record = json.loads(line)
                variant, file, row, had = record["variant"], record["file"], record["row"], record["settings"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{place} is no result of this command") from None
            if variant not in want:
                raise ValueError(f"{place} has {variant}, this run {', '.join(want)}; give another --out")
            for key, value in want[variant].items():
                if had.get(key) != value:
                    raise ValueError(f"{place} has {key} {had.get(key)!r}, this run {value!r}; give another --out")
            if prompts.get((file, row)) != record["prompt"]:
                raise ValueError(f"{place} has {record['prompt'][:60]!r} as prompt {row} of {file}, this run has not; give another --out")
            done[variant, file, row] = record
    return done


def write_results(out, records):
    """The results file, whole: under a temporary name first, then moved into place; then its parts go."""
    temporary = out.with_name(f"{out.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(temporary, out)
    for path in parts(out):
        if path != out:
            path.unlink()


def collect(variants, items, args):
    """Answers to all items under all variants: {name: records in the order of items}. variants: {name: (Scans, default too)}.

    With --out every record is written as it comes, and what stands there already is not done again.
    """
    want = {name: run_settings(*variant, args) for name, variant in variants.items()}
    out, box = args.out and Path(args.out), [{}]
    if out and RANK == 0:
        out.touch()
        box = [read_results(out, want, items)]
        write_results(out, box[0].values())
    if WORLD > 1:
        dist.broadcast_object_list(box)
    done, work, (some, _) = box[0], [], next(iter(variants.values()))
    lengths = {item: len(some.tokenizer.prompt(item.prompt).ids) for item in items}
    for item, length in lengths.items():
        if length > some.model.config.context:
            raise ValueError(f"{item.file}: prompt {item.row} has {length} tokens, the model's context is {some.model.config.context}")
    for name in variants:  # like lengths together
        todo = sorted((item for item in items if (name, item.file, item.row) not in done), key=lengths.get)
        work += [(name, batch) for batch in batches(todo[RANK::WORLD], args.batch_size)]
    if done:
        say(f"resuming  {len(done)} of {len(items) * len(variants)} answers stand in {out}")
    progress, new = Progress(sum(len(batch) for _, batch in work), "prompts"), {}
    with open(os.devnull if out is None else out if RANK == 0 else f"{out}.part{RANK}", "a", encoding="utf-8") as file:
        for name, batch in work:
            scans, default = variants[name]
            for item, result in zip(batch, scans.answer([item.prompt for item in batch], default)):
                record = {"variant": name, "file": item.file, "row": item.row, "type": item.type, "label": item.label, **result,
                          **item.scores, "settings": want[name]}
                new[name, item.file, item.row] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            progress.add(len(batch))
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, new)
        new = {key: record for share in shares for key, record in share.items()}
    done = {**done, **new}
    records = {name: [done[name, item.file, item.row] for item in items] for name in variants}
    if out and RANK == 0:
        write_results(out, itertools.chain(*records.values()))
    return records


# ----------------------------------------------------------------------------------------------------------------------
# Output

TITLES = {
    "refusals": "Refused, in % with 95% intervals (Table 2); wrong way: safe queries with sigma +1, unsafe ones with -1",
    "answers": "All answers; average: (complied on safe + refused on unsafe) / all, the paper's Avg., in %",
    "classifier": "Is a query harmful? (Figure 4)",
    "cosines": "Cosine of a_t with d_harm per layer: mean, 10th and 90th percentile (Figure 5), and separation",
    "pca": "a_t in its first two principal components: share of the variance, centres, separation along the first (Figure 3)",
    "sweep": "Refused, in %; average: the paper's Avg. (Tables 5 to 7)",
    "capability": "Capability (Table 3); harmful: items with sigma +1; shortened: fewer examples or a cut document",
    "speed": "One query, median of --trials rounds in turn (Table 4)",
    "price": "What SCANS adds to one answer",
    "machine": "What the machine allows one answer without SCANS",
    "extraction": "Vectors from 64 + 64 anchors",
}


def show(result, as_json):
    """A result {name: rows, or anything for --json alone} on standard output: aligned tables, or one JSON object."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    for name, rows in result.items():
        table, _, statistic = name.partition("_")
        if table not in TITLES:
            continue
        columns = {}
        for key in rows[0]:
            values = [row[key] for row in rows]
            largest = max((abs(value) for value in values if isinstance(value, float)), default=0)
            digits = 4 if key == "threshold" else 3 if largest < 2 else 2
            cells = [key.replace("_", " ")]
            for value in values:
                cells.append("-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else
                             f"[{value[0]:.1f}, {value[1]:.1f}]" if isinstance(value, list) else str(value))
            width = max(map(len, cells))
            text = any(isinstance(value, str) for value in values)
            columns[key] = [cell.ljust(width) if text else cell.rjust(width) for cell in cells]
        print(TITLES[table] + (f": {statistic} over the trials" if statistic else ""))
        for line in zip(*columns.values()):
            print("  ".join(line).rstrip())
        print(flush=True)


def pyplot(folder):
    """matplotlib's pyplot and the folder for its pictures; None where no --plot is given."""
    if folder is None:
        return None
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    Path(folder).mkdir(parents=True, exist_ok=True)
    return matplotlib.pyplot


def save_plot(figure, args, name):
    figure.suptitle(f"{Path(args.model).resolve().name}: {', '.join(Path(file).name for file in args.files)}", fontsize=10)
    figure.tight_layout()
    path = Path(args.plot) / f"{name}.png"
    figure.savefig(path, dpi=150)
    say(f"picture   {shown(path)}")


# ----------------------------------------------------------------------------------------------------------------------
# eval: Table 2, Figure 4


def rates(records, **first):
    """One row of a table of refusals."""
    row = {**first, "n": len(records)}
    for name in ("default", "scans"):
        row[name], row[f"{name}_interval"] = percent([record["refused"][name] for record in records])
    row["wrong_way"] = sum(record["sigma"] == {"safe": 1, "unsafe": -1}[record["label"]] for record in records)
    return row


def right(record, name):
    """Complied on safe, refused on unsafe? None without an answer."""
    refused = record["refused"][name]
    return None if refused is None else refused == (record["label"] == "unsafe")


def by_file(records):
    """{(file, label): its records}, in their order."""
    groups = {}
    for record in records:
        groups.setdefault((record["file"], record["label"]), []).append(record)
    return groups


def summary(records):
    """The tables of eval from the records of one variant."""
    refusals, answers = [], []
    for (file, label), group in by_file(records).items():
        refusals.append(rates(group, file=file, label=label, type="all"))
        types = dict.fromkeys(record["type"] for record in group)
        if len(types) > 1:
            refusals += [rates([record for record in group if record["type"] == kind], file=file, label=label, type=kind) for kind in types]
    for name in ("default", "scans"):
        average, interval = percent([right(record, name) for record in records])
        texts = [record[name] for record in records if record[name] is not None]
        answers.append({"answers": name, "n": len(texts), "average": average, "average_interval": interval,
                        "empty": sum(not text.strip() for text in texts), "repetitive": sum(map(is_repetitive, texts)),
                        "cut_off": sum(record["stopped"][name] in ("length", "context") for record in records)})
    harmful = [record["label"] == "unsafe" for record in records]
    classifiers = [classifier_metrics("s_q", [record["score"] for record in records], harmful, records[0]["threshold"])]
    for key in dict.fromkeys(key for record in records for key in record if key.startswith("score:")):
        scored = [record for record in records if key in record]
        classifiers.append(classifier_metrics(key[6:], [record[key] for record in scored],
                                              [record["label"] == "unsafe" for record in scored], 0.5))
    return {"refusals": refusals, "answers": answers, "classifier": classifiers}


def over_trials(tables, statistic):
    """One table from the same table of several trials: a statistic of every number in it. Intervals are of one trial."""
    rows = []
    for same in zip(*tables):
        columns = {key: [row[key] for row in same] for key in same[0] if not key.endswith("_interval")}
        rows.append({key: None if None in values else values[0] if isinstance(values[0], str) else float(statistic(values))
                     for key, values in columns.items()})
    return rows


def evaluate(args):
    """Refusal rates and classifier metrics."""
    scans = start(args)
    first = args.anchor_seed or 0
    variants, anchors = {f"anchor seed {first}": (scans, not args.no_default)}, drawn_anchors(args)
    for seed in range(first + 1, first + args.trials):
        scans, texts = with_anchors(scans, args, args.anchors, seed)
        variants[f"anchor seed {seed}"] = scans, False      # without SCANS the anchors matter nothing
        anchors |= texts
    records = collect(variants, read_items(args.files, anchors), args)
    if RANK > 0:
        return
    without = records[f"anchor seed {first}"]
    for some in records.values():  # of all trials, only the first answered without SCANS
        for record, other in zip(some, without):
            record["default"] = other["default"]
            for key in ("refused", "stopped"):
                record[key] = {**record[key], "default": other[key]["default"]}
    summaries = [summary(some) for some in records.values()]
    result = {"variants": list(records), "settings": without[0]["settings"], **summaries[0]}
    if args.trials > 1:
        for table in summaries[0]:
            result[f"{table}_mean"] = over_trials([one[table] for one in summaries], statistics.mean)
            result[f"{table}_deviation"] = over_trials([one[table] for one in summaries], statistics.stdev)
    show(result, args.json)


# ----------------------------------------------------------------------------------------------------------------------
# figures: Figures 3 and 5


def pictured_layers(L):
    """A former, a middle and a latter layer: the paper's 9, 20 and 32 of 32, which it counts from 1."""
    return [max(0, L * 9 // 32 - 1), max(0, L * 20 // 32 - 1), L - 1]


def two_components(a_t, harmful):
    """Coordinates (n, 2) of a_t (n, D) in its first two principal components, harmful ones towards plus; shares of the variance."""
    centred = a_t - a_t.mean(0)
    _, size, Vh = torch.linalg.svd(centred, full_matrices=False)
    xy = centred @ Vh[:2].T                                                                 # (n, 2)
    return xy * torch.where(xy[harmful].mean(0) < 0, -1, 1), (size.square() / size.square().sum())[:2].tolist()


@torch.inference_mode()
def figures(args):
    """Cosines and separation per layer, pictures of a_t."""
    plt = pyplot(args.plot)
    scans = start(args)
    items, L = read_items(args.files, drawn_anchors(args)), scans.model.config.L
    harmful = torch.tensor([item.label == "unsafe" for item in items])
    if min(int(harmful.sum()), int((~harmful).sum())) < 2:
        raise ValueError(f"{len(items)} prompts, {int(harmful.sum())} of them unsafe: figures need two of each kind at least")
    prompts, layers = [scans.tokenizer.prompt(item.prompt) for item in items], pictured_layers(L)
    progress, cos, seen = Progress(len(items), "prompts"), [], []
    for i in range(0, len(items), 256):  # the streams of 256 prompts at a time: half a gigabyte at 7B
        try:
            a_t = transition(read_streams(scans.model, prompts[i:i + 256], args.batch_size))    # (256, L, D)
        except ValueError as error:
            raise ValueError(f"{error}, counted from prompt {items[i].row} of {items[i].file}") from None
        cos.append(cosines(a_t, scans.vectors.d_harm))
        seen.append(a_t[:, layers])
        progress.add(len(a_t))
    cos, seen = torch.cat(cos), torch.cat(seen)                                             # (n, L), (n, 3, D)
    s, T = score(cos, scans.settings.classify), scans.settings.T
    rows, pictures, points = [], [], []
    for l in range(L):
        row = {"layer": l}
        for name, some in (("safe", cos[~harmful, l]), ("unsafe", cos[harmful, l])):
            low, high = some.quantile(torch.tensor([0.1, 0.9])).tolist()
            row.update({name: float(some.mean()), f"{name}_10": low, f"{name}_90": high})
        rows.append({**row, "auroc": auroc(cos[harmful, l], cos[~harmful, l])})
    for j, l in enumerate(layers):
        xy, shares = two_components(seen[:, j], harmful)
        points.append(xy)
        centres = {f"{name}_{axis}": float(xy[mask, k].mean()) for name, mask in (("safe", ~harmful), ("unsafe", harmful))
                   for k, axis in enumerate("xy")}
        pictures.append({"layer": l, "share_1": shares[0], "share_2": shares[1], **centres,
                         "auroc": auroc(xy[harmful, 0], xy[~harmful, 0])})
    show({"cosines": rows, "pca": pictures,
          "classifier": [classifier_metrics("s_q", s.tolist(), harmful.tolist(), T)],
          "prompts": [{"file": item.file, "row": item.row, "label": item.label, "score": float(s[i]), "cosines": cos[i].tolist(),
                       **{f"layer_{l}": points[j][i].tolist() for j, l in enumerate(layers)}} for i, item in enumerate(items)]}, args.json)
    if plt is None:
        return
    styles = {"safe": dict(color="0.6", marker="o", mfc="none", linestyle="-"), "unsafe": dict(color="black", marker="x", linestyle="--")}
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, style in styles.items():
        axes.plot([row[name] for row in rows], label=f"{name}, mean and 10th to 90th percentile", markersize=4, **style)
        low, high = ([row[f"{name}_{q}"] for row in rows] for q in (10, 90))
        axes.fill_between(range(L), low, high, color=style["color"], alpha=0.2)
    axes.set(xlabel="layer", ylabel="cosine of a_t with d_harm")
    axes.legend(fontsize=8)
    save_plot(figure, args, "cosines")
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6))
    for axes, l, xy, row in zip(panels, layers, points, pictures):
        for name, mask in (("safe", ~harmful), ("unsafe", harmful)):
            axes.plot(*xy[mask].T.tolist(), label=name, **{**styles[name], "linestyle": "", "markersize": 4})
        axes.set(title=f"layer {l}", xlabel=f"component 1 ({row['share_1']:.0%} of the variance)",
                 ylabel=f"component 2 ({row['share_2']:.0%})")
    panels[0].legend(fontsize=8)
    save_plot(figure, args, "pca")
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.hist([s[~harmful].tolist(), s[harmful].tolist()], bins=30, histtype="stepfilled", alpha=0.7, color=["0.8", "0.3"],
              edgecolor="black", label=["safe", "unsafe"])
    axes.axvline(T, color="black", linestyle=":", label=f"T = {T:.3f}")
    axes.set(xlabel="score s_q", ylabel="prompts")
    axes.legend(fontsize=8)
    save_plot(figure, args, "scores")


# ----------------------------------------------------------------------------------------------------------------------
# sweep: Tables 5, 6, 7

VALUES = {"alpha": number(float, 0), "threshold": number(float, -2, 2), "layers": parse_layers, "anchors": number(int, 2),
          "random": number(int, 0)}     # what --values holds


def swept(scans, args):
    """{what a row of the table is called: its Scans}, and the texts of all anchors in use; the threshold is another matter."""
    chosen, L, anchors = scans.settings, scans.model.config.L, drawn_anchors(args)
    if args.setting == "alpha":
        return {f"{alpha:g}": changed(scans, settings=dataclasses.replace(chosen, alpha=alpha))
                for alpha in args.values or [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]}, anchors        # Table 6
    if args.setting == "layers":
        named = {show_layers(layers): layers for layers in args.values or []} or {
            f"{show_layers(list(layers))} {name}": list(layers) for name, layers in segments(L).items() if layers}  # Table 5
        for layers in named.values():
            if max(layers) >= L:
                raise ValueError(f"--values: layers {show_layers(layers)}, the model has 0-{L - 1}")
        if chosen.steer not in named.values():
            named[f"{show_layers(chosen.steer)} as set"] = chosen.steer
        return {name: changed(scans, settings=dataclasses.replace(chosen, steer=layers)) for name, layers in named.items()}, anchors
    if args.setting == "random":  # the control: directions that mean nothing, same length, layers and sigma
        variants = {"v_r": scans}
        for seed in args.values or range(5):
            noise = torch.randn(scans.v_r.shape, generator=torch.Generator().manual_seed(seed))
            variants[f"seed {seed}"] = changed(scans, v_r=F.normalize(noise, dim=-1).to(scans.v_r.device))
        return variants, anchors
    variants, anchors, most = {}, set(), args.anchors or 64
    for n in args.values or [max(2, most // 8), max(2, most // 4), max(2, most // 2), most]:
        variants[str(n)], texts = with_anchors(scans, args, n, args.anchor_seed or 0)
        anchors |= texts
    return variants, anchors


def at_threshold(benign, harmful, T):
    """Records under the threshold T, from those steered away from refusal and those towards it: Eq. 5 picks one of the two."""
    return [{**(minus if minus["score"] < T else plus), "threshold": T} for minus, plus in zip(benign, harmful)]


def sweep_row(setting, value, records, name):
    """One row: the rates of the answers called `name`, default or scans."""
    row = {setting: value}
    for (file, label), group in by_file(records).items():
        row[f"{file} {label}"], _ = percent([record["refused"][name] for record in group])
    row["average"], _ = percent([right(record, name) for record in records])
    texts = [record[name] for record in records if record[name] is not None]
    return {**row, "wrong_way": rates(records)["wrong_way"] if name == "scans" else None,
            "empty": sum(not text.strip() for text in texts), "repetitive": sum(map(is_repetitive, texts))}


def sweep(args):
    """Refusal rates over a range of one setting."""
    try:
        args.values = args.values and [VALUES[args.setting](value) for value in args.values]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--values: {error}") from None
    plt = pyplot(args.plot)
    scans = start(args)
    if args.setting == "threshold":
        if args.sigma is not None or args.text:
            raise ValueError(f"sweep threshold chooses between known answers: no {'--text' if args.text else '--sigma'}")
        variants, anchors = {"sigma -1": changed(scans, sigma=-1), "sigma 1": changed(scans, sigma=1)}, drawn_anchors(args)
    else:
        variants, anchors = swept(scans, args)
    items = read_items(args.files, anchors)
    first = next(iter(variants))
    records = collect({name: (some, name == first and not args.no_default) for name, some in variants.items()}, items, args)
    if RANK > 0:
        return
    without = records[first]
    if args.setting == "threshold":
        benign, harmful = records.values()
        scores = [record["score"] for record in benign]
        values = args.values or sorted({scans.settings.T, *torch.linspace(min(scores), max(scores), 9).tolist()})
        records = {f"{T:.4f}{' as set' * (T == scans.settings.T)}": at_threshold(benign, harmful, T) for T in values}
    rows = [] if args.no_default else [sweep_row(args.setting, "without SCANS", without, "default")]
    rows += [sweep_row(args.setting, value, some, "scans") for value, some in records.items()]
    if args.text:
        for row in rows:
            variant = changed(scans, sigma=0) if row[args.setting] == "without SCANS" else variants[row[args.setting]]
            row["perplexity"] = perplexity(variant, args.text, args.limit, ("scans",))["scans"]
    show({"setting": args.setting, "sweep": rows}, args.json)
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    curves = [key for key in rows[0] if key == "average" or key.endswith((" safe", " unsafe"))]
    for key, marker, style in zip(curves, itertools.cycle("ox^sDv+*"), itertools.cycle(("-", "--", ":", "-."))):
        axes.plot([row[key] for row in rows], marker=marker, linestyle=style, color="black", mfc="none", linewidth=1, label=key)
    axes.set_xticks(range(len(rows)), [row[args.setting] for row in rows], rotation=30, ha="right")
    axes.set(xlabel=args.setting, ylabel="refused, in % (average: right, in %)", ylim=(-3, 103))
    axes.legend(fontsize=8)
    save_plot(figure, args, f"sweep_{args.setting}")


# ----------------------------------------------------------------------------------------------------------------------
# capability: Table 3

STEM = """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics college_physics
    computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
    high_school_computer_science high_school_mathematics high_school_physics high_school_statistics machine_learning"""
HUMANITIES = """formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
    jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"""
SOCIAL = """econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
    high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations security_studies
    sociology us_foreign_policy"""
GROUP = {subject: name for name, subjects in (("STEM", STEM), ("humanities", HUMANITIES), ("social sciences", SOCIAL))
         for subject in subjects.split()}       # any other subject is of MMLU's group "other"


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None


def read_csv(path):
    """All rows of a .csv as lists of cells."""
    csv.field_size_limit(2**31 - 1)  # documents are longer than csv's own limit
    try:
        return list(csv.reader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None


def from_p(scans, decision, ids, name):
    """Logits (B, T, V) of ids (B, T), the first of which is the token at p.

    Goes on from the unsteered cache of `decision`, steered by each row's sigma if `name` is scans (Eq. 6).
    """
    p = torch.tensor([prompt.p for prompt in decision.prompts])
    strength = torch.tensor([result["sigma"] * scans.settings.alpha * (name == "scans") for result in decision.results])
    steer = steering(scans.v_r, strength.to(scans.v_r.device), scans.settings.steer).to(scans.model.embed.dtype)
    ids = torch.tensor(ids, device=scans.model.embed.device)
    decision.cache.length = p
    x, _ = scans.model.forward(ids, decision.cache, steer)                                  # (B, T, D)
    if not x.isfinite().all():  # once more, to say where
        decision.cache.length = p
        _, streams = scans.model.forward(ids, decision.cache, steer, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
        check_finite(streams, [repr(result["prompt"][:60]) for result in decision.results])
    return scans.model.unembed(x)                                                           # (B, T, V)


@torch.inference_mode()
def perplexity(scans, path, limit, names=("default", "scans")):
    """exp of the mean loss of a text: {"n": windows, name: perplexity, "harmful": windows with sigma +1}.

    The first half of a window is the query, in the chat format; sigma is decided on it; the loss is that of the second half,
    as the answer, steered from p. (The public code puts [/INST] in the middle of the window and averages over both halves.)
    """
    window = min(scans.model.config.context, 2048)
    half = (window - len(scans.tokenizer.prompt("a").ids)) // 2
    ids = scans.tokenizer.encode([read_text(path)])
    starts = range(0, len(ids) - 2 * half + 1, 2 * half)[:limit]
    if not starts:
        raise ValueError(f"{path}: {len(ids)} tokens, one window needs {2 * half}")
    reader = changed(scans, sampling=dataclasses.replace(scans.sampling, max_new_tokens=half))
    loss, tokens, harmful, progress = dict.fromkeys(names, 0.0), 0, 0, Progress(len(starts), "windows")
    for start in starts:
        decision = reader.decide([scans.tokenizer.decode(ids[start:start + half])])
        prompt = decision.prompts[0]
        answer = ids[start + half:start + 2 * half][:window - prompt.p - 1]  # encoded again, a query may have grown by a token
        for name in names:
            logits = from_p(scans, decision, [[prompt.ids[prompt.p], *answer[:-1]]], name)  # (1, T, V)
            loss[name] += float(F.cross_entropy(logits[0], torch.tensor(answer, device=logits.device), reduction="sum"))
        tokens += len(answer)
        harmful += decision.results[0]["sigma"] == 1
        progress.add()
    return {"n": len(starts), **{name: math.exp(loss[name] / tokens) for name in names}, "harmful": harmful}


def read_mmlu(folder, limit):
    """[(subject, question row, example rows)] from folder/test/SUBJECT_test.csv and folder/dev/SUBJECT_dev.csv, without headers."""
    def rows(path, most):
        found = read_csv(path)[:most]
        for number, row in enumerate(found, 1):
            if len(row) != 6 or row[5].strip() not in ("A", "B", "C", "D"):
                raise ValueError(f"{path}: row {number} has {len(row)} cells and ends in {row[-1:]}, "
                                 "need question, A, B, C, D and the letter")
        return found
    asked = []
    for path in sorted((Path(folder) / "test").glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        examples = rows(Path(folder) / "dev" / f"{subject}_dev.csv", 5)
        asked += [(subject, row, examples) for row in rows(path, limit)]
    if not asked:
        raise ValueError(f"{folder}: no questions in test/SUBJECT_test.csv")
    return asked


def mmlu_query(subject, row, examples):
    """Worked examples, then the question, as in Hendrycks et al. (ICLR 2021)."""
    def lines(row, answer):
        return "\n".join([row[0], *(f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5])), f"Answer:{answer}"])
    return "\n\n".join([f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.",
                        *(lines(example, " " + example[5].strip()) for example in examples), lines(row, "")])


def letter_ids(tokenizer):
    """The ids of A, B, C, D where an answer starts: with the format's joint before them, such as the piece "▁A"."""
    joint, ids = tokenizer.format.r_pos.removesuffix("Sure"), []
    for letter in "ABCD":
        prompt = changed(tokenizer, format=dataclasses.replace(tokenizer.format, r_pos=joint + letter)).prompt("a")
        if prompt.e != prompt.p + 1:
            raise ValueError(f"the answer {letter} has {prompt.e - prompt.p} tokens here, need 1")
        ids.append(prompt.ids[prompt.e])
    return ids


@torch.inference_mode()
def mmlu(scans, folder, limit, size, names=("default", "scans")):
    """Rows of the table: % of questions of each group, and of all, where the right letter has the highest logit after p."""
    letters, context, asked = letter_ids(scans.tokenizer), scans.model.config.context, []
    for number, (subject, row, examples) in enumerate(read_mmlu(folder, limit), 1):
        for n in range(len(examples), -1, -1):  # as many examples as the context holds
            prompt = scans.tokenizer.prompt(mmlu_query(subject, row, examples[:n]))
            if len(prompt.ids) <= context:
                break
        else:
            raise ValueError(f"{folder}: question {number}, of {subject}, has {len(prompt.ids)} tokens, the model's context is {context}")
        query = mmlu_query(subject, row, examples[:n])
        asked.append((subject, query, "ABCD".index(row[5].strip()), len(prompt.ids), n < len(examples)))
    reader, progress, groups = changed(scans, sampling=Sampling(max_new_tokens=1)), Progress(len(asked), "questions"), {}
    for batch in batches(sorted(asked, key=lambda question: question[3]), size):
        decision = reader.decide([query for _, query, *_ in batch])
        ids = [[prompt.ids[prompt.p]] for prompt in decision.prompts]
        chosen = {name: from_p(scans, decision, ids, name)[:, 0, letters].argmax(-1).tolist() for name in names}
        for i, (subject, _, answer, _, shortened) in enumerate(batch):
            for group in (GROUP.get(subject, "other"), "average"):
                groups.setdefault(group, []).append({**{name: chosen[name][i] == answer for name in names}, "shortened": shortened,
                                                     "harmful": decision.results[i]["sigma"] == 1})
        progress.add(len(batch))
    rows = []
    for group in ("STEM", "humanities", "social sciences", "other", "average"):
        some = groups.get(group, [])
        if some:
            rows.append({"measure": f"MMLU {group}, % right", "n": len(some), **{name: percent([q[name] for q in some])[0] for name in names},
                         **{key: sum(q[key] for q in some) for key in ("harmful", "shortened")}})
    return rows


def summaries(scans, path, limit, size, names=("default", "scans")):
    """Rows of the table: ROUGE F1 of one-sentence summaries, up to 64 tokens, against those of the file."""
    header, *rows = read_csv(path) or [[]]
    writer, asked = changed(scans, sampling=dataclasses.replace(scans.sampling, max_new_tokens=64)), []
    for number, row in enumerate((dict(zip(header, cells)) for cells in rows[:limit]), 1):
        document, reference = row.get("document") or row.get("dialogue"), row.get("summary")
        if not document or not reference:
            raise ValueError(f"{path}: row {number} has no document (or dialogue) or no summary")

        def query(document):
            return f"Document: {document}\nSummarize the document in one sentence."
        excess = len(scans.tokenizer.prompt(query(document)).ids) + 64 - scans.model.config.context
        if excess > 0:
            document = scans.tokenizer.decode(scans.tokenizer.encode([document])[:-excess - 8])  # 8: the joints may encode otherwise
        asked.append((query(document), reference, excess > 0))
    if not asked:
        raise ValueError(f"{path}: no rows")
    found, harmful, progress = {name: [] for name in names}, 0, Progress(len(asked), "summaries")
    for batch in batches(sorted(asked, key=lambda one: len(one[0])), size):
        for (_, reference, _), result in zip(batch, writer.answer([query for query, *_ in batch], "default" in names)):
            harmful += result["sigma"] == 1
            for name in names:
                found[name].append(rouge(result[name], reference))
        progress.add(len(batch))
    return [{"measure": f"ROUGE-{kind} F1", "n": len(asked),
             **{name: statistics.mean(scores[i] for scores in found[name]) for name in names},
             "harmful": harmful, "shortened": sum(cut for *_, cut in asked)} for i, kind in enumerate("12L")]


def capability(args):
    """Perplexity, MMLU and ROUGE."""
    if not (args.text or args.mmlu or args.summaries):
        raise ValueError("capability needs --text FILE, --mmlu DIR or --summaries FILE")
    scans, names = start(args), ("scans",) if args.no_default else ("default", "scans")
    rows = []
    if args.text:
        rows.append({"measure": f"perplexity, {Path(args.text).name}", **perplexity(scans, args.text, args.limit, names), "shortened": 0})
    if args.mmlu:
        rows += mmlu(scans, args.mmlu, args.limit, args.batch_size, names)
    if args.summaries:
        rows += summaries(scans, args.summaries, args.limit, args.batch_size, names)
    show({"capability": rows}, args.json)


# ----------------------------------------------------------------------------------------------------------------------
# bench: Table 4

SHAPES = {  # D, L, H, K, F of TinyLlama-1.1B, Llama-2-7b, Llama-2-13b
    "1b": (2048, 22, 32, 4, 5632), "7b": (4096, 32, 32, 32, 11008), "13b": (5120, 40, 40, 40, 13824)}


class RandomPrompts:
    """Stands in for a tokenizer: whatever the question, `length` random ids, and one for r_pos."""
    name, format = "llama-2", FORMATS["llama-2"]

    def __init__(self, vocabulary, length):
        self.vocabulary, self.length, self.generator = vocabulary, length, torch.Generator().manual_seed(0)

    def prompt(self, question, history=()):
        return Prompt(torch.randint(self.vocabulary, (self.length + 1,), generator=self.generator).tolist(), self.length - 1, self.length)

    def decode(self, ids):
        return ""


def free_bytes(device):
    """Memory that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        return int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def random_model(shape, device, dtype, packed=True):
    """A Llama of that shape with random weights, made where they stay, packed as `llama.load` does. ValueError if it will not fit."""
    D, L, H, K, width = SHAPES[shape]
    config = llama.Config(D=D, L=L, H=H, K=K, E=D // H, F=width, V=32000, context=4096, norm_eps=1e-5, rope_theta=1e4, rope_factor=1.0,
                          window=None, tied=False, eos=())
    names, tensors = llama.checkpoint_names(config), {}
    need = sum(math.prod(size) for _, _, size in names.values()) * dtype.itemsize
    if need + 2**30 > free_bytes(device):
        raise ValueError(f"--shape {shape}: {need / 1e9:.1f} GB of weights in {str(dtype)[6:]} and 1 GB beside them, "
                         f"{free_bytes(device) / 1e9:.1f} GB are free on {device}")
    noise = (0.02 * torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for name, (_, field, size) in names.items():
        tensor = torch.ones(size, device=device, dtype=dtype)   # as norms are
        if len(size) > 1:
            for piece in tensor.view(-1).split(len(noise)):     # the same noise again and again: quick, and as good here
                piece.copy_(noise[:len(piece)])
        tensors[name] = llama.pack(field, tensor) if packed else tensor
    return llama.assemble(config, tensors)


def peak_bytes(device, work):
    """What work() returns, and the most memory that was held meanwhile: on the GPU, or by this process; None where neither tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return work(), None
    Path("/proc/self/clear_refs").write_text("5")
    return work(), int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def plain(scans):
    """One answer in our own code without SCANS: seconds of the prompt and of the decoding, positions run but for the new ones."""
    prompt, config, started = scans.tokenizer.prompt(""), scans.model.config, time.perf_counter()
    ids = prompt.ids[:prompt.p + 1]
    cache = Cache(config, 1, len(ids) + scans.sampling.max_new_tokens, scans.model.embed)
    x, _ = scans.model.forward(torch.tensor([ids[:-1]], device=scans.model.embed.device), cache)
    x[0, -1, 0].item()  # a GPU has now ended
    middle = time.perf_counter()
    for _ in llama.generate(scans.model, [ids], cache, None, scans.sampling):
        pass
    return {"prompt": middle - started, "decoding": time.perf_counter() - middle, "positions": len(ids)}


def steered(scans, default):
    """The same with SCANS, or of both answers."""
    result, = scans.answer(["x"], default)
    return {"prompt": result["seconds"]["score"], "decoding": result["seconds"]["answers"], "positions": result["positions"]["scans"]}


def bench(args):
    """Speed and memory of one query of 128 tokens: without SCANS, with it, both answers."""
    device, dtype = choose_device(args.device), args.dtype and getattr(torch, args.dtype)
    if args.shape:
        model = random_model(args.shape, device, dtype or llama.working_dtype(torch.bfloat16, device))
    else:
        model = llama.load(args.model, device, dtype)
        model.config = dataclasses.replace(model.config, eos=())  # no answer ends before its length
    choose_threads(model, args.threads)
    config, new = model.config, 64 if args.max_new_tokens is None else max(1, args.max_new_tokens)
    about = {"model": args.shape or str(shown(args.model)), "parameters": model.size(), "dtype": str(model.embed.dtype)[6:],
             "device": str(device), "threads": torch.get_num_threads(), "prompt_tokens": 128, "new_tokens": new}
    say(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items()) + "; prompts of random ids")
    draw, found = RandomPrompts(config.V, 24), []       # 24 tokens: as long as anchors are, mostly
    anchors = [draw.prompt("") for _ in range(128)]
    seconds, extraction = peak_bytes(device, lambda: timed(lambda: found.append(extract(model, anchors[:64], anchors[64:]))))
    chosen = settings(found[0], "llama-2", args.alpha, 0.5, args.steer_layers, args.classify_layers)
    scans = Scans(model, RandomPrompts(config.V, 128), found[0], chosen, args.sigma, Sampling(max_new_tokens=new))
    modes = {"without SCANS": lambda: plain(scans), "with SCANS": lambda: steered(scans, False), "both answers": lambda: steered(scans, True)}
    runs, progress = {name: [] for name in modes}, Progress((args.trials + 1) * len(modes), "runs")
    for trial in range(args.trials + 1):
        for name, work in modes.items():  # in turn, so that what else the machine does hits all alike
            one, peak = peak_bytes(device, work)
            progress.add()
            if trial > 0:  # the first time is slower
                runs[name].append({**one, "seconds": one["prompt"] + one["decoding"], "peak_MB": peak and peak / 1e6})

    def median(some, key):
        return None if some[0][key] is None else statistics.median(one[key] for one in some)
    rows = [{"mode": name, "prompt_per_second": 128 / median(some, "prompt"), "tokens_per_second": new / median(some, "decoding"),
             "seconds": median(some, "seconds"), "least": min(one["seconds"] for one in some), "most": max(one["seconds"] for one in some),
             "positions": some[0]["positions"], "peak_MB": median(some, "peak_MB")} for name, some in runs.items()]
    step = median(runs["without SCANS"], "decoding") / new
    pairs = [{key: b[key] and b[key] - a[key] for key in a} | {"percent": 100 * (b["seconds"] / a["seconds"] - 1)}
             for a, b in zip(runs["without SCANS"], runs["with SCANS"])]
    price = {key: median(pairs, key) for key in ("positions", "seconds", "percent", "peak_MB")}
    block = torch.ones(2**28 if device.type == "cuda" else 2**27, device=device)
    bandwidth = block.nbytes / min(timed(lambda: block.sum().item()) for _ in range(5))
    read = (model.size() - (0 if config.tied else model.embed.numel())) * model.embed.itemsize  # of the input embedding, one row
    show({"about": about, "speed": rows, "price": [{**price, "decoding_steps": price["seconds"] / step}],
          "machine": [{"weights_GB": read / 1e9, "read_GB_per_second": bandwidth / 1e9, "limit_tokens_per_second": bandwidth / read,
                       "share_reached": read / step / bandwidth}],
          "extraction": [{"tokens_each": 24, "seconds": seconds, "prompts_per_second": 128 / seconds,
                          "peak_MB": extraction and extraction / 1e6}]}, args.json)


# ----------------------------------------------------------------------------------------------------------------------
# The command

COMMANDS = {"eval": evaluate, "figures": figures, "sweep": sweep, "capability": capability, "bench": bench}


def command(args):
    """One of COMMANDS; memory that does not suffice becomes one line that says what to try."""
    if WORLD > 1 and args.command not in ("eval", "sweep"):
        raise ValueError(f"{args.command} runs in one process; torchrun serves eval and sweep")
    try:
        with contextlib.redirect_stderr(open(os.devnull, "w")) if RANK > 0 else contextlib.nullcontext():
            COMMANDS[args.command](args)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = getattr(args, "batch_size", 1)
        kept = f"; what was done stands in {args.out}, and the same command goes on from there" if getattr(args, "out", None) else ""
        raise ValueError(f"out of memory: try {f'--batch-size {size // 2}' if size > 1 else '--dtype bfloat16'}{kept}") from None
    if WORLD > 1:
        dist.destroy_process_group()


def main():
    parser = Parser(prog="python -m data.experiments", description="The paper's tables and figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        sub = commands.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        if name == "sweep":
            sub.add_argument("setting", choices=list(VALUES))
        if name in ("eval", "figures", "sweep"):
            sub.add_argument("files", nargs="+", metavar="FILE", help="prompts; safe:FILE or unsafe:FILE where a file has no labels")
        if name == "sweep":
            sub.add_argument("--values", nargs="+", metavar="X", help="of the setting; for random: seeds; default: the paper's, or a range")
        if name in ("eval", "sweep"):
            sub.add_argument("--out", metavar="FILE", help="JSON lines, one a prompt, written as they come; goes on where it stopped")
        if name in ("figures", "sweep"):
            sub.add_argument("--plot", metavar="DIR", help="write pictures there (needs matplotlib)")
        if name in ("sweep", "capability"):
            sub.add_argument("--text", metavar="FILE", help="perplexity of this text")
            sub.add_argument("--limit", metavar="N", type=number(int, 1), help="at most so many windows, summaries, and questions a subject")
        if name == "capability":
            sub.add_argument("--mmlu", metavar="DIR", help="with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv")
            sub.add_argument("--summaries", metavar="FILE", help="a .csv with document (or dialogue) and summary")
        if name == "bench":
            sub.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape in place of --model")
        else:
            sub.add_argument("--batch-size", metavar="N", type=number(int, 1), default=16, help="queries at a time, 16")
        if name in ("eval", "bench"):
            sub.add_argument("--trials", metavar="N", type=number(int, 1), default=1 if name == "eval" else 5,
                             help="other draws of the anchors, 1" if name == "eval" else "rounds, 5")
        add_flags(sub)
    run(parser, command)


if __name__ == "__main__":
    main()
