"""Tables 5, 6 and 7: the rates over a range of the steering layers, of alpha, or of T. Two controls are ours.

`sweep random` puts random unit vectors in place of v_r, in the same layers, with the same sigma. `sweep alpha
--sigma -1` adds the method without its decision: the same vector subtracted from every query, one knob.
"""
import argparse
import dataclasses

import torch
import torch.nn.functional as F

from data.experiments.core import percent, picture, share_flags, show, start, varied
from data.experiments.prompts import read_all
from data.experiments.results import collect
from data.experiments.table2_refusals import WRONG, average, defects, grouped, refused
from data.experiments.table3_capability import perplexity
from scans import FLAGS, Scans, add_flags, segments, show_layers


def by_alpha(method, args):
    alphas = args.values or [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]      # Table 6
    variants = {f"{alpha:g}": varied(method, alpha=alpha, sigma=None) for alpha in alphas}
    if args.sigma is not None:
        variants |= {f"{alpha:g}, sigma {args.sigma}": varied(method, alpha=alpha) for alpha in alphas}
    return variants


def by_threshold(method, args):
    """Both answers that SCANS can give. Eq. 5 chooses between them at any T, see `at_thresholds`."""
    return {"sigma -1": varied(method, sigma=-1), "sigma 1": varied(method, sigma=1)}


def by_layers(method, args):
    names = {layers: show_layers(layers) for layers in args.values or []} or {
        layers: f"{show_layers(layers)} {name}"
        for name, layers in segments(method.model.config.L).items() if layers}      # Table 5
    names.setdefault(method.settings.steer_layers, f"{show_layers(method.settings.steer_layers)} as set")
    if not all(layers.start < layers.stop <= method.model.config.L for layers in names):
        raise ValueError(f"--values {' '.join(names.values())}: the model has {method.model.config.L} layers")
    return {name: varied(method, steer_layers=layers) for layers, name in names.items()}


def by_random(method, args):
    variants = {"v_r": method}
    for seed in args.values or range(5):
        noise = torch.randn(method.vectors.v_r.shape, generator=torch.Generator().manual_seed(seed))
        vectors = dataclasses.replace(method.vectors, v_r=F.normalize(noise, dim=-1))
        variants[f"seed {seed}"] = Scans(method.model, method.tokenizer, vectors, method.settings)
    return variants


SETTINGS = {    # the flag whose type --values has, and the function that gives {name of a row: its Scans}
    "alpha": ("alpha", by_alpha), "threshold": ("T", by_threshold), "layers": ("steer_layers", by_layers),
    "random": ("anchor_seed", by_random)}


def at_thresholds(benign, harmful, values, T):
    """{row's name: records} under each T (Table 7), from those steered against refusal and towards it."""
    scores = [record["score"] for record in benign]
    values = values or sorted({T, *torch.linspace(min(scores), max(scores), 9).tolist()})
    return {f"{value:.4f}{' as set' * (value == T)}":
            [minus if minus["score"] < value else plus for minus, plus in zip(benign, harmful)]     # Eq. 5
            for value in values}


def sweep_row(setting, value, records, kind):
    """One row: the rates of the answers of one kind, default or steered."""
    row = {setting: value}
    for (file, label), group in grouped(records, "file", "label").items():
        row[f"{file} {label}"], _ = percent(refused(group, kind))
    wrong = sum(record["sigma"] == WRONG[record["label"]] for record in records)
    return {**row, "average": average(records, kind)[0],
            "wrong_way": wrong if kind == "steered" else None, **defects(records, kind)}


def flags(parser):
    parser.add_argument("setting", choices=list(SETTINGS))
    share_flags(parser, "files")
    parser.add_argument("--values", nargs="+", metavar="X",
                        help="of the setting; for random: seeds; default: the paper's, or a range")
    share_flags(parser, "--out", "--plot", "--text", "--limit", "--batch-size")
    add_flags(parser)


def run(args):
    """Refusal rates over a range of one setting."""
    flag, by = SETTINGS[args.setting]
    try:
        args.values = args.values and [FLAGS[flag][0](value) for value in args.values]
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"--values: {error}") from None
    if args.setting == "threshold" and (args.text or args.sigma is not None):
        raise ValueError("sweep threshold chooses between answers that are there: no --text, no --sigma")
    items = read_all(args)
    method = start(args)
    variants = by(method, args)
    first = next(iter(variants))    # the answers without SCANS are the same under all variants
    asked = {name: (some, name == first and not args.no_default) for name, some in variants.items()}
    records = collect(asked, items, args)
    rows = [] if args.no_default else [sweep_row(args.setting, "without SCANS", records[first], "default")]
    if args.setting == "threshold":
        records = at_thresholds(*records.values(), args.values, method.settings.T)
    rows += [sweep_row(args.setting, name, some, "steered") for name, some in records.items()]
    if args.text:
        variants["without SCANS"] = varied(method, sigma=0)
        for row in rows:
            row["perplexity"] = perplexity(variants[row[args.setting]], args.text, args.limit)["steered"]
    show({"sweep": rows}, args.json)
    if args.plot:
        plot_rates(records, args)


def plot_rates(records, args):
    """A line for each label, of the refused queries; dashed: with the same sigma for every query."""
    curves, ticks = {}, [name for name in records if ", " not in name]
    for name, some in records.items():
        knob = name.partition(", ")[2] or "SCANS"
        for label, group in grouped(some, "label").items():
            curves.setdefault((*label, knob), []).append(percent(refused(group, "steered"))[0])
    with picture(args, f"sweep_{args.setting}") as axes:
        for (label, knob), shares in curves.items():
            axes.plot(shares, color="black", mfc="none", marker={"safe": "o", "unsafe": "x"}[label],
                      linestyle="-" if knob == "SCANS" else "--", label=f"{label}, {knob}")
        axes.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
        axes.set(xlabel=args.setting, ylabel="refused, in %", ylim=(-3, 103))
        axes.legend(fontsize=8)
