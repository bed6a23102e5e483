"""Figure 4: how well s_q tells harmful queries from safe ones, beside other classifiers whose scores a prompt
file has.

Each classifier gives two rows. `positive` names the class that precision, recall, F1 and AUPRC are of. The
paper's numbers come from code that takes *safe* as the positive class: compare those of its figure with the
rows `safe`. (Its AUPRC is a sum of trapezoids; here it is scikit-learn's average precision, which does not
interpolate.)

Also run by `eval` and `figures`; there is no command of its own.
"""
import math


def classifier_metrics(name, scores, harmful, threshold):
    """Two rows on `score >= threshold means harmful`, one for each class taken as positive; None where a
    number is not defined.

    scores: n floats, higher means more harmful; harmful: n bools.
    """
    from sklearn import metrics
    found = [score >= threshold for score in scores]
    wrong = sum(a != b for a, b in zip(found, harmful))
    both = 0 < sum(harmful) < len(harmful)
    auroc = float(metrics.roc_auc_score(harmful, scores)) if both else None     # of either class

    rows = []
    for positive, kind, sign in (("harmful", True, 1), ("safe", False, -1)):
        truth, guess = [h == kind for h in harmful], [f == kind for f in found]
        some = metrics.precision_recall_fscore_support(truth, guess, average="binary", zero_division=math.nan)
        precision, recall, f1 = (None if math.isnan(value) else float(value) for value in some[:3])
        ranked = [sign * score for score in scores]
        rows.append({"classifier": name, "positive": positive, "threshold": threshold, "n": len(scores),
                     "wrong": wrong, "precision": precision, "recall": recall, "f1": f1,
                     "accuracy": 1 - wrong / len(scores), "auroc": auroc,
                     "auprc": float(metrics.average_precision_score(truth, ranked)) if both else None})
    return rows
