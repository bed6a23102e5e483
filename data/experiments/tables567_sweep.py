"""Tables 5, 6 and 7: the rates over a range of the steering layers, of alpha, or of T; and two sweeps that
the paper has not.

`anchors` varies how many anchors there are. `random` is the control: unit vectors that mean nothing in place
of v_r, in the same layers, with the same sigma.
"""
import argparse
import dataclasses
import itertools

import torch
import torch.nn.functional as F

from data.experiments.core import (RANK, changed, drawn_anchors, need, percent, pyplot, read_items, save_plot,
                                   share_flags, show, start, with_anchors)
from data.experiments.results import collect, results
from data.experiments.table2_refusals import average, by_file, defects, rates, texts_of
from data.experiments.table3_capability import perplexity
from scans import LIMITS, add_flags, number, parse_layers, segments, show_layers

VALUES = {  # what --values holds
    "alpha": number(*LIMITS["alpha"]), "threshold": number(*LIMITS["threshold"]), "layers": parse_layers,
    "anchors": number(*LIMITS["anchors"]), "random": number(*LIMITS["seed"])}


def by_alpha(scans, args):
    return {f"{alpha:g}": changed(scans, settings=dataclasses.replace(scans.settings, alpha=alpha))
            for alpha in args.values or [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]}     # Table 6


def by_layers(scans, args):
    chosen, L = scans.settings, scans.model.config.L
    named = {show_layers(layers): layers for layers in args.values or []} or {
        f"{show_layers(list(layers))} {name}": list(layers)
        for name, layers in segments(L).items() if layers}      # Table 5
    for layers in named.values():
        if max(layers) >= L:
            raise ValueError(f"--values: layers {show_layers(layers)}, the model has 0-{L - 1}")
    if chosen.steer not in named.values():
        named[f"{show_layers(chosen.steer)} as set"] = chosen.steer
    return {name: changed(scans, settings=dataclasses.replace(chosen, steer=layers))
            for name, layers in named.items()}


def by_random(scans, args):
    variants = {"v_r": scans}
    for seed in args.values or range(5):
        noise = torch.randn(scans.v_r.shape, generator=torch.Generator().manual_seed(seed))
        variants[f"seed {seed}"] = changed(scans, v_r=F.normalize(noise, dim=-1).to(scans.v_r.device))
    return variants


def by_anchors(scans, args):
    return {str(n): with_anchors(scans, args, n, args.anchor_seed or 0) for n in args.values}


def by_threshold(scans, args):
    """Both answers that SCANS can give. Eq. 5 chooses between them at any T, see `at_thresholds`."""
    return {"sigma -1": changed(scans, sigma=-1), "sigma 1": changed(scans, sigma=1)}


VARIANTS = {  # functions that give {row's name: its Scans}
    "alpha": by_alpha, "threshold": by_threshold, "layers": by_layers, "anchors": by_anchors,
    "random": by_random}


def at_thresholds(benign, harmful, values, T):
    """{row's name: records} under each T (Table 7), from those steered against refusal and towards it."""
    scores = [record["score"] for record in benign]
    values = values or sorted({T, *torch.linspace(min(scores), max(scores), 9).tolist()})
    return {f"{value:.4f}{' as set' * (value == T)}":
            [{**(minus if minus["score"] < value else plus), "threshold": value}        # Eq. 5
             for minus, plus in zip(benign, harmful)] for value in values}


def sweep_row(setting, value, records, name):
    """One row: the rates of the answers called `name`, default or scans."""
    row = {setting: value}
    for (file, label), group in by_file(records).items():
        row[f"{file} {label}"], _ = percent([record["refused"][name] for record in group])
    row["average"], _ = average(records, name)
    wrong = rates(records)["wrong_way"] if name == "scans" else None
    return {**row, "wrong_way": wrong, **defects(texts_of(records, name))}


def flags(parser):
    parser.add_argument("setting", choices=list(VALUES))
    share_flags(parser, "files")
    parser.add_argument("--values", nargs="+", metavar="X",
                        help="of the setting; for random: seeds; default: the paper's, or a range")
    share_flags(parser, "--out", "--plot", "--text", "--limit", "--batch-size")
    add_flags(parser)


def run(args):
    """Refusal rates over a range of one setting."""
    need("sweep", "scipy", "tqdm")
    try:
        args.values = args.values and [VALUES[args.setting](value) for value in args.values]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--values: {error}") from None
    if args.setting == "threshold" and (args.sigma is not None or args.text):
        unused = "--text" if args.text else "--sigma"
        raise ValueError(f"sweep threshold chooses between known answers: no {unused}")
    draws = None
    if args.setting == "anchors":
        most = args.anchors or 64
        args.values = args.values or [max(2, most // 8), max(2, most // 4), max(2, most // 2), most]
        draws = [(n, args.anchor_seed) for n in args.values]
    plt, items = pyplot(args.plot), read_items(args.files, drawn_anchors(args, draws))

    with results(args.out) as held:
        scans = start(args)
        variants = VARIANTS[args.setting](scans, args)
        first = next(iter(variants))  # without SCANS the settings matter nothing: those answers are made once
        asked = {name: (some, name == first and not args.no_default) for name, some in variants.items()}
        records = collect(asked, items, held, args)
    if RANK > 0:
        return

    without = records[first]
    if args.setting == "threshold":
        records = at_thresholds(*records.values(), args.values, scans.settings.T)
    rows = [] if args.no_default else [sweep_row(args.setting, "without SCANS", without, "default")]
    rows += [sweep_row(args.setting, value, some, "scans") for value, some in records.items()]
    if args.text:
        variants["without SCANS"] = changed(scans, sigma=0)
        for row in rows:
            some = variants[row[args.setting]]
            row["perplexity"] = perplexity(some, args.text, args.limit, ("scans",))["scans"]
    show({"setting": args.setting, "sweep": rows}, args.json)
    if plt:
        plot_rows(plt, rows, args)


def plot_rows(plt, rows, args):
    figure, axes = plt.subplots(figsize=(7, 4))
    curves = [key for key in rows[0] if key == "average" or key.endswith((" safe", " unsafe"))]
    styles = zip(itertools.cycle("ox^sDv+*"), itertools.cycle(("-", "--", ":", "-.")))
    for key, (marker, style) in zip(curves, styles):
        axes.plot([row[key] for row in rows], marker=marker, linestyle=style, color="black", mfc="none",
                  linewidth=1, label=key)
    axes.set_xticks(range(len(rows)), [row[args.setting] for row in rows], rotation=30, ha="right")
    axes.set(xlabel=args.setting, ylabel="refused, in % (average: right, in %)", ylim=(-3, 103))
    axes.legend(fontsize=8)
    save_plot(figure, args, f"sweep_{args.setting}")
