"""Figure 3: the transitions a_t in two dimensions. Figure 5: their cosine with d_harm in every layer.

The paper's Figure 3 is a t-SNE (--tsne), whose distances and axes mean nothing. The table is always of the
two principal components. Beside the pictures: how well each layer separates safe queries from harmful ones
(AUROC), and Figure 4's metrics of s_q.
"""
import torch

from data.experiments.core import picture, share_flags, show, start
from data.experiments.layers import auroc
from data.experiments.prompts import read_all
from data.experiments.table2_refusals import classifier_metrics
from scans import add_flags, cosines, read_streams, report, score, transition

STYLES = {"safe": dict(color="0.6", marker="o", mfc="none", linestyle="-"),
          "unsafe": dict(color="black", marker="x", linestyle="--")}


def pictured_layers(L):
    """A former, a middle and a latter layer: the paper's 9, 20 and 32 of 32, which it counts from 1."""
    return [max(0, L * 9 // 32 - 1), max(0, L * 20 // 32 - 1), L - 1]


def two_components(a_t, harmful):
    """Coordinates (n, 2) of a_t (n, D) in its first two principal components, and shares of the variance.

    A component has no sign of its own: harmful queries lie towards plus.
    """
    from sklearn.decomposition import PCA
    pca = PCA(2, svd_solver="full")
    xy = torch.tensor(pca.fit_transform(a_t.numpy()))                                       # (n, 2)
    return xy * torch.where(xy[harmful].mean(0) < 0, -1, 1), pca.explained_variance_ratio_.tolist()


def tsne(a_t):
    """Coordinates (n, 2) of a_t (n, D) by t-SNE."""
    from sklearn.manifold import TSNE
    return TSNE(perplexity=min(30, (len(a_t) - 1) / 3), random_state=0).fit_transform(a_t.numpy())


def cosine_row(l, cos, masks):
    """A row of Figure 5's table from the cosines (n) of layer l."""
    row = {"layer": l}
    for name, mask in masks.items():
        low, high = cos[mask].quantile(torch.tensor([0.1, 0.9])).tolist()
        row.update({name: float(cos[mask].mean()), f"{name}_10": low, f"{name}_90": high})
    return {**row, "auroc": auroc(cos[masks["unsafe"]], cos[masks["safe"]])}


def pca_row(l, xy, shares, masks):
    """A row of Figure 3's table from the coordinates (n, 2) of layer l."""
    centres = {f"{name}_{axis}": float(xy[mask, k].mean()) for name, mask in masks.items()
               for k, axis in enumerate("xy")}
    return {"layer": l, "share_1": shares[0], "share_2": shares[1], **centres,
            "auroc": auroc(xy[masks["unsafe"], 0], xy[masks["safe"], 0])}


def flags(parser):
    share_flags(parser, "files", "--plot", "--batch-size")
    parser.add_argument("--tsne", action="store_true", help="picture a_t by t-SNE, as in the paper")
    add_flags(parser)


@torch.inference_mode()
def run(args):
    """Cosines and separation per layer, pictures of a_t."""
    items = read_all(args)
    harmful = torch.tensor([item["label"] == "unsafe" for item in items])
    masks = {"safe": ~harmful, "unsafe": harmful}
    if min(int(mask.sum()) for mask in masks.values()) < 2:
        raise ValueError(f"{len(items)} prompts, {int(harmful.sum())} of them unsafe: "
                         "figures need at least two of each kind")
    method = start(args)
    prompts = [method.tokenizer.prompt(item["prompt"]) for item in items]
    a_t = transition(read_streams(method.model, prompts, args.batch_size, lambda done: report(
        f"{done} of {len(items)} prompts")))                                        # (n, L, D)
    cos = cosines(a_t, method.vectors.d_harm)                                       # (n, L)
    s = score(cos, method.settings.classify_layers)                                 # (n)
    points = {l: two_components(a_t[:, l], harmful) for l in pictured_layers(cos.shape[1])}
    rows = [cosine_row(l, cos[:, l], masks) for l in range(cos.shape[1])]
    show({"cosines": rows, "pca": [pca_row(l, xy, shares, masks) for l, (xy, shares) in points.items()],
          "classifier": classifier_metrics("s_q", s.tolist(), harmful.tolist(), method.settings.T),
          "prompts": [{**item, "score": float(s[i]), "cosines": cos[i].tolist()}
                      for i, item in enumerate(items)]}, args.json)
    if args.plot:
        plot_cosines(rows, args)
        plot_points({l: tsne(a_t[:, l]) if args.tsne else xy for l, (xy, _) in points.items()}, masks, args)


def plot_cosines(rows, args):
    with picture(args, "cosines") as axes:
        for name, style in STYLES.items():
            mean, low, high = ([row[name + part] for row in rows] for part in ("", "_10", "_90"))
            label = f"{name}, mean and 10th to 90th percentile"
            axes.plot(mean, label=label, markersize=4, **style)
            axes.fill_between(range(len(rows)), low, high, color=style["color"], alpha=0.2)
        axes.set(xlabel="layer", ylabel="cosine of a_t with d_harm")
        axes.legend(fontsize=8)


def plot_points(points, masks, args):
    with picture(args, "tsne" if args.tsne else "pca", 3, size=(10, 3.6)) as panels:
        for axes, (l, xy) in zip(panels, points.items()):
            for name, mask in masks.items():
                axes.plot(*xy[mask].T, label=name, **{**STYLES[name], "linestyle": "", "markersize": 4})
            axes.set(title=f"layer {l}")
        panels[0].legend(fontsize=8)
