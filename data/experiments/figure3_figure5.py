"""Figure 3: the transitions a_t in two principal components. Figure 5: their cosine with d_harm in every
layer.

Beside the pictures, numbers: how well each layer parts safe queries from harmful ones (AUROC), and Figure 4's
metrics of s_q.
"""
import torch

from data.experiments.core import (drawn_anchors, need, progress, pyplot, read_items, save_plot, share_flags,
                                   show, start)
from data.experiments.figure4_classifier import classifier_metrics
from scans import add_flags, auroc, cosines, read_streams, score, transition

STYLES = {"safe": dict(color="0.6", marker="o", mfc="none", linestyle="-"),
          "unsafe": dict(color="black", marker="x", linestyle="--")}


def pictured_layers(L):
    """A former, a middle and a latter layer: the paper's 9, 20 and 32 of 32, which it counts from 1."""
    return [max(0, L * 9 // 32 - 1), max(0, L * 20 // 32 - 1), L - 1]


def two_components(a_t, harmful):
    """Coordinates (n, 2) of a_t (n, D) in its first two principal components, and shares of the variance.

    A component has no sign of its own: harmful ones lie towards plus.
    """
    from sklearn.decomposition import PCA
    pca = PCA(2, svd_solver="full")
    xy = torch.tensor(pca.fit_transform(a_t.numpy()))                                       # (n, 2)
    return xy * torch.where(xy[harmful].mean(0) < 0, -1, 1), pca.explained_variance_ratio_.tolist()


def read_transitions(scans, items, layers, size):
    """Cosines with d_harm (n, L) of the items, and their a_t in a few layers (n, len(layers), D)."""
    prompts, cos, seen = [scans.tokenizer.prompt(item.prompt) for item in items], [], []
    with progress(len(items), "prompts") as bar:
        for i in range(0, len(items), 256):  # the streams of 256 prompts at a time: half a gigabyte at 7B
            try:
                a_t = transition(read_streams(scans.model, prompts[i:i + 256], size))       # (256, L, D)
            except ValueError as error:
                raise ValueError(f"{error}, counted from prompt {items[i].row} of {items[i].file}") from None
            cos.append(cosines(a_t, scans.vectors.d_harm))
            seen.append(a_t[:, layers])
            bar.update(len(a_t))
    return torch.cat(cos), torch.cat(seen)


def cosine_row(l, cos, kinds):
    """A row of Figure 5's table from the cosines (n) of layer l."""
    row = {"layer": l}
    for name, mask in kinds.items():
        low, high = cos[mask].quantile(torch.tensor([0.1, 0.9])).tolist()
        row.update({name: float(cos[mask].mean()), f"{name}_10": low, f"{name}_90": high})
    return {**row, "auroc": auroc(cos[kinds["unsafe"]], cos[kinds["safe"]])}


def pca_row(l, xy, shares, kinds):
    """A row of Figure 3's table from the coordinates (n, 2) of layer l."""
    centres = {f"{name}_{axis}": float(xy[mask, k].mean()) for name, mask in kinds.items()
               for k, axis in enumerate("xy")}
    return {"layer": l, "share_1": shares[0], "share_2": shares[1], **centres,
            "auroc": auroc(xy[kinds["unsafe"], 0], xy[kinds["safe"], 0])}


def flags(parser):
    share_flags(parser, "files", "--plot", "--batch-size")
    add_flags(parser)


@torch.inference_mode()
def run(args):
    """Cosines and separation per layer, pictures of a_t."""
    need("figures", "sklearn", "tqdm")
    plt, items = pyplot(args.plot), read_items(args.files, drawn_anchors(args))
    harmful = torch.tensor([item.label == "unsafe" for item in items])
    kinds = {"safe": ~harmful, "unsafe": harmful}
    if min(int(mask.sum()) for mask in kinds.values()) < 2:
        raise ValueError(f"{len(items)} prompts, {int(harmful.sum())} of them unsafe: "
                         "figures need two of each kind at least")

    scans = start(args)
    L, T = scans.model.config.L, scans.settings.T
    layers = pictured_layers(L)
    cos, seen = read_transitions(scans, items, layers, args.batch_size)             # (n, L), (n, 3, D)
    s = score(cos, scans.settings.classify)                                         # (n)
    found = [two_components(seen[:, j], harmful) for j in range(len(layers))]
    points = [xy for xy, _ in found]
    rows = [cosine_row(l, cos[:, l], kinds) for l in range(L)]
    pictures = [pca_row(l, xy, shares, kinds) for l, (xy, shares) in zip(layers, found)]
    prompts = [{"file": item.file, "row": item.row, "label": item.label, "score": float(s[i]),
                "cosines": cos[i].tolist(), **{f"layer_{l}": xy[i].tolist() for l, xy in zip(layers, points)}}
               for i, item in enumerate(items)]
    metrics = classifier_metrics("s_q", s.tolist(), harmful.tolist(), T)
    show({"cosines": rows, "pca": pictures, "classifier": metrics, "prompts": prompts}, args.json)

    if plt:
        plot_cosines(plt, rows, args)
        plot_components(plt, layers, points, pictures, kinds, args)
        plot_scores(plt, s, T, kinds, args)


def plot_cosines(plt, rows, args):
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, style in STYLES.items():
        label = f"{name}, mean and 10th to 90th percentile"
        axes.plot([row[name] for row in rows], label=label, markersize=4, **style)
        low, high = ([row[f"{name}_{q}"] for row in rows] for q in (10, 90))
        axes.fill_between(range(len(rows)), low, high, color=style["color"], alpha=0.2)
    axes.set(xlabel="layer", ylabel="cosine of a_t with d_harm")
    axes.legend(fontsize=8)
    save_plot(figure, args, "cosines")


def plot_components(plt, layers, points, pictures, kinds, args):
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6))
    for axes, l, xy, row in zip(panels, layers, points, pictures):
        for name, mask in kinds.items():
            axes.plot(*xy[mask].T.tolist(), label=name, **{**STYLES[name], "linestyle": "", "markersize": 4})
        axes.set(title=f"layer {l}", xlabel=f"component 1 ({row['share_1']:.0%} of the variance)",
                 ylabel=f"component 2 ({row['share_2']:.0%})")
    panels[0].legend(fontsize=8)
    save_plot(figure, args, "pca")


def plot_scores(plt, s, T, kinds, args):
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.hist([s[mask].tolist() for mask in kinds.values()], bins=30, histtype="stepfilled", alpha=0.7,
              color=["0.8", "0.3"], edgecolor="black", label=list(kinds))
    axes.axvline(T, color="black", linestyle=":", label=f"T = {T:.3f}")
    axes.set(xlabel="score s_q", ylabel="prompts")
    axes.legend(fontsize=8)
    save_plot(figure, args, "scores")
