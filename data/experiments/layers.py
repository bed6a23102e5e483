"""Which layers? Per layer the length of v_r before it is scaled, the length of the stream, the separation of
the anchors, and the words that v_r points to; then ranges of layers that may classify."""
from data.experiments.core import show, start
from scans import add_flags, estimate_threshold, score, segments, show_layers, top_tokens


def auroc(positive, negative):
    """Area under the ROC curve of two tensors of scores."""
    from sklearn.metrics import roc_auc_score
    return float(roc_auc_score([1] * len(positive) + [0] * len(negative), [*positive, *negative]))


def run(args):
    """Lengths, words and separation of the anchors per layer, and per range of classification layers."""
    method = start(args)
    vectors, L = method.vectors, method.model.config.L
    words = top_tokens(method.model, method.tokenizer, vectors.v_r, 6)
    rows = [{"layer": l, "v_r": float(vectors.v_norm[l]), "a": float(vectors.a_norm[l]),
             "auroc": auroc(vectors.cos_harmful[:, l], vectors.cos_harmless[:, l]),
             "v_r_points_to": " ".join(words[l])} for l in range(L)]
    parts, ranges = [layers for layers in segments(L).values() if layers], []
    for layers in [range(first.start, last.stop) for i, first in enumerate(parts) for last in parts[i:]]:
        harmful, harmless = score(vectors.cos_harmful, layers), score(vectors.cos_harmless, layers)
        T = estimate_threshold(harmful)
        ranges.append({"layers": show_layers(layers), "auroc": auroc(harmful, harmless), "T": T,
                       "above": int((harmless >= T).sum())})
    show({"layers": rows, "ranges": ranges}, args.json)


flags = add_flags
