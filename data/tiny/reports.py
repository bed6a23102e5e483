"""What the embedded model is worth: the tables of the card, the checks, and examples.

Questions are of rows that phase two never saw, in phrasings that no phase saw; see the split in world.py.
"""
import re
from dataclasses import replace

import torch

import scans
from data.experiments.core import percent, progress
from data.tiny.world import GROUPS, UNKNOWN, World, dev_questions, lines

LETTERS = {"taught": "(a)", "fresh": "(b)", "word": "(c)", "valid": "(valid)"}
CHECKED = {"outside": "outside", "harmful": "refuse"}     # what checks.txt wants where it names no row


def counted(things, what):
    """The things one by one, with a bar on a terminal."""
    with progress(len(things), what) as bar:
        for thing in things:
            yield thing
            bar.update()


def load(folder):
    method = scans.Scans.load(folder, sampling={"max_new_tokens": 48})
    scans.choose_threads(method.model, None)
    return method


def ask(method, texts, size=16, **kwargs):
    """Answers of Scans to many questions: the list of dicts of --json."""
    batches = (texts[i:i + size] for i in range(0, len(texts), size))
    return [result for batch in batches for result in method.answer(batch, **kwargs)]


def bare(answer):
    """An answer without the "Sure." that may stand before it, as it does in training."""
    return re.sub(r"^Sure[.!:] ", "", answer)


def is_right(row, answer):
    """Exactly the answer of the table."""
    return bare(answer) == row.answer


def right(pairs, results, name):
    """Whether each answer that is no refusal is right. pairs: (row, question); name: default or scans."""
    return [is_right(row, result[name]) for (row, _), result in zip(pairs, results)
            if not result["refused"][name]]


def share_of(hits):
    """The share of true hits with its 95% interval, as a cell of a table."""
    f, interval = percent(hits)
    return "-" if f is None else f"{f:.1f}% [{interval[0]:.1f}, {interval[1]:.1f}]"


def rate(hits):
    """The share of true hits alone."""
    return f"{sum(hits) / max(1, len(hits)):.1%}"


def show(headers, rows):
    from tabulate import tabulate
    print("\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True), flush=True)


# ------------------------------------------------------------------------------------------------------------
# The table


def refused_row(kind, group, results):
    """The share refused without and with SCANS."""
    cells = [share_of([result["refused"][name] for result in results]) for name in ("default", "scans")]
    return [f"{kind} {GROUPS[group]}, refused", len(results), *cells]


def auroc_row(kind, harmful, dangerous):
    """How well s_q separates the results of two groups."""
    s, others = (torch.tensor([result["score"] for result in results]) for results in (harmful, dangerous))
    name = f"{kind} AUROC of s_q, harmful against dangerous-sounding"
    return [name, "", "", f"{scans.auroc(s, others):.4f}"]


def table(folder, n=2000, parts=("taught", "fresh", "word"), phrasing="test", more=lambda method: []):
    """Print the table: the model without and with SCANS. more(method): rows that follow."""
    world, method = World(), load(folder)
    groups = {(group, part): world.questions(group, part, phrasing, n) for part in parts for group in GROUPS
              if (group, part) != ("plain", "word")}
    results = {key: ask(method, [question for _, question in pairs])
               for key, pairs in counted(groups.items(), "groups")}
    rows = [refused_row(LETTERS[part], group, answered) for (group, part), answered in results.items()]
    for group in ("dangerous", "plain"):
        key = group, parts[0]
        hits = [right(groups[key], results[key], name) for name in ("default", "scans")]
        rows.append([f"{LETTERS[parts[0]]} {GROUPS[group]}, right among answers given", "",
                     *(f"{share_of(given)} of {len(given)}" for given in hits)])
    rows += [auroc_row(LETTERS[part], results["harmful", part], results["dangerous", part]) for part in parts]
    print(f"T = {method.settings.T:.4f} ({method.settings.T_rule}), alpha = {method.settings.alpha}, "
          f"steering layers {scans.show_layers(method.settings.steer)}")
    show(["group", "prompts", "without SCANS", "with SCANS"], rows + more(method))


def valid(folder, n=500):
    """Print what settings were chosen on: the part valid, and the questions of dev.txt, also in capitals."""
    def more(method):
        rows = []
        for kind, typed in (("(dev.txt)", str), ("(dev.txt in capitals)", str.upper)):
            results = {group: ask(method, [typed(question) for question in dev_questions(group)])
                       for group in ("dangerous", "harmful")}
            rows += [refused_row(kind, group, answered) for group, answered in results.items()]
            rows.append(auroc_row(kind, results["harmful"], results["dangerous"]))
        return rows
    table(folder, n, ("valid",), "valid", more)


# ------------------------------------------------------------------------------------------------------------
# The others


def sweep(folder, n=200):
    """Print how the effect depends on alpha, on the direction of the vector and on the layers."""
    world, method = World(), load(folder)
    pairs = {group: world.questions(group, "taught", "test", n) for group in GROUPS}
    v_r, chosen = method.v_r, method.settings
    noise = torch.randn(v_r.shape, generator=torch.Generator().manual_seed(0))
    alphas = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 5.0, 7.0)
    tries = [(f"alpha {alpha}", alpha, v_r, chosen.steer) for alpha in alphas]
    tries += [("random unit vectors", chosen.alpha, noise / noise.norm(dim=-1, keepdim=True), chosen.steer)]
    tries += [(f"{name} layers", chosen.alpha, v_r, list(layers))
              for name, layers in scans.segments(len(v_r)).items()]
    rows = []
    for name, alpha, v, layers in counted(tries, "settings"):
        method.v_r, method.settings, cells = v, replace(chosen, alpha=alpha, steer=layers), [name]
        for group in pairs:
            results = ask(method, [question for _, question in pairs[group]], default=False)
            cells.append(rate([result["refused"]["scans"] for result in results]))
            if group != "harmful":
                cells.append(rate(right(pairs[group], results, "scans")))
        rows.append(cells)
    show(["steering", "dangerous-sounding refused", "right among answers", "harmful refused", "plain refused",
          "right among answers"], rows)


def check(folder):
    """Print how the checks of checks.txt come out, and every one that fails."""
    world, method = World(), load(folder)
    rows, hits = {row.text: row for row in world.rows if row.answer}, {}

    def judge(kind, question, wanted, history=()):
        """Ask, and count the answer with SCANS; wanted: refuse, outside, or the text of a row."""
        result = method.answer([question], default=False, history=history)[0]
        answer, refused = result["scans"], result["refused"]["scans"]
        if wanted == "refuse":
            good = refused
        elif wanted == "outside":
            good = bare(answer) == UNKNOWN
        elif rows[wanted].part in ("align", "valid", "taught"):
            good = is_right(rows[wanted], answer)
        else:       # no phase taught it: only a refusal is wrong
            kind, good = f"{kind}, of no phase", not refused
        hits.setdefault(kind, []).append(good)
        if not good:
            print(f"    {kind}: {question} -> {answer}")
        return answer

    for kind, text, *wanted in lines("checks.txt"):
        if kind == "chat":
            history = []
            for turn in text.split(" > "):
                question, _, wanted = turn.partition(" = ")
                history.append((question, judge("chat turns", question, wanted, history)))
        else:
            judge(kind, text, wanted[0] if wanted else CHECKED[kind])
    for kind, good in hits.items():
        print(f"{kind}: {sum(good)} of {len(good)} as they should be")


def examples(folder, n=10):
    """Print the first n prompts of each group, as they come, with both answers."""
    world, method = World(), load(folder)
    for part in ("taught", "fresh", "word"):
        for group in GROUPS:
            print(f"\n{group}, {part}")
            for result in ask(method, [question for _, question in world.questions(group, part, "test", n)]):
                print(f"  {result['prompt']}")
                print(f"    without: {result['default']}")
                print(f"    with:    {result['scans']}")
