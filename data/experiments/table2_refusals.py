"""Table 2: refusal rates without SCANS and with it; with Figure 4's metrics of the classifier.

An answer counts as refused by its opening, `scans.is_refusal`. The authors' matcher looks for its phrases in
the whole answer, so that advice which declines one detail counts there as refused.
"""
import re
import statistics

from data.experiments.core import (COUNT, RANK, drawn_anchors, need, percent, read_items, share_flags, show,
                                   start, with_anchors)
from data.experiments.figure4_classifier import classifier_metrics
from data.experiments.results import BOTH, collect, results
from scans import add_flags


def is_repetitive(answer):
    """Does an answer end in one piece of text, up to 80 characters, five times over, 24 in all or more?"""
    loop = re.search(r"(.{1,80}?)\1{4,}$", answer, re.DOTALL)
    return loop is not None and len(loop.group()) >= 24


def rates(records, **first):
    """One row of a table of refusals."""
    row = {**first, "n": len(records)}
    for name in BOTH:
        row[name], row[f"{name}_interval"] = percent([record["refused"][name] for record in records])
    wrong = {"safe": 1, "unsafe": -1}
    row["wrong_way"] = sum(record["sigma"] == wrong[record["label"]] for record in records)
    return row


def average(records, name):
    """The paper's Avg. of the answers `name`, (complied on safe + refused on unsafe) / all; its interval."""
    refused = [(record["refused"][name], record["label"] == "unsafe") for record in records]
    return percent([None if answer is None else answer == unsafe for answer, unsafe in refused])


def defects(texts):
    return {"empty": sum(not text.strip() for text in texts), "repetitive": sum(map(is_repetitive, texts))}


def texts_of(records, name):
    return [record[name] for record in records if record[name] is not None]


def by_file(records):
    """{(file, label): its records}, in their order."""
    groups = {}
    for record in records:
        groups.setdefault((record["file"], record["label"]), []).append(record)
    return groups


def summary(records):
    """The tables of eval from the records of one variant."""
    refusals, answers, classifiers = [], [], []
    for (file, label), group in by_file(records).items():
        refusals.append(rates(group, file=file, label=label, type="all"))
        types = dict.fromkeys(record["type"] for record in group)
        for kind in types if len(types) > 1 else ():
            some = [record for record in group if record["type"] == kind]
            refusals.append(rates(some, file=file, label=label, type=kind))

    for name in BOTH:
        share, interval = average(records, name)
        texts = texts_of(records, name)
        cut = sum(record["stopped"][name] in ("length", "context") for record in records)
        answers.append({"answers": name, "n": len(texts), "average": share, "average_interval": interval,
                        **defects(texts), "cut_off": cut})

    others = dict.fromkeys(key for record in records for key in record if key.startswith("score:"))
    ours = ("score", "s_q", records[0]["settings"]["threshold"])
    for key, name, threshold in (ours, *((key, key.removeprefix("score:"), 0.5) for key in others)):
        scored = [record for record in records if key in record]
        harmful = [record["label"] == "unsafe" for record in scored]
        classifiers += classifier_metrics(name, [record[key] for record in scored], harmful, threshold)
    return {"refusals": refusals, "answers": answers, "classifier": classifiers}


def over_trials(tables, statistic):
    """One table from the same table of several trials: a statistic of every number but those of intervals."""
    rows = []
    for same in zip(*tables):
        columns = {key: [row[key] for row in same] for key in same[0] if not key.endswith("_interval")}
        rows.append({key: None if None in values else values[0] if isinstance(values[0], str) else
                     float(statistic(values)) for key, values in columns.items()})
    return rows


def flags(parser):
    share_flags(parser, "files", "--out", "--batch-size")
    parser.add_argument("--trials", metavar="N", type=COUNT, default=1, help="other draws of the anchors, 1")
    add_flags(parser)


def run(args):
    """Refusal rates and classifier metrics."""
    need("eval", "scipy", "sklearn", "tqdm")
    first = args.anchor_seed or 0
    seeds = range(first, first + args.trials)
    draws = [(args.anchors, seed) for seed in seeds] if args.trials > 1 else None
    items = read_items(args.files, drawn_anchors(args, draws))

    with results(args.out) as held:
        scans = start(args)
        variants = {f"anchor seed {first}": (scans, not args.no_default)}
        for seed in seeds[1:]:  # without SCANS the anchors matter nothing: those answers are made once
            variants[f"anchor seed {seed}"] = with_anchors(scans, args, args.anchors, seed), False
        records = collect(variants, items, held, args)
    if RANK > 0:
        return

    without = records[f"anchor seed {first}"]
    for some in records.values():
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
