"""Table 3: what steering costs in capability. Perplexity of a text, MMLU (Hendrycks et al., ICLR 2021), ROUGE
of summaries (Lin, 2004).

The authors' perplexity puts [/INST] in the middle of each window and averages the loss over both halves, of
which one is steered. Their MMLU is asked without the chat format, and its anchors' vectors are extracted
again for each subject while the last steering is still on.
"""
import copy
import csv
import dataclasses
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from data.experiments.core import batches, progress, share_flags, show, start, varied
from data.experiments.table2_refusals import KINDS
from llama import regular_file
from scans import add_flags, steering

def read_csv(path):
    """All rows of a .csv as lists of cells."""
    csv.field_size_limit(2**31 - 1)     # documents are longer than csv's own limit
    try:
        with open(regular_file(path), encoding="utf-8-sig", newline="") as file:
            return list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def from_p(method, decision, ids, kind):
    """Logits (B, N, V) of ids (B, N), the first of which is the token at p.

    Continues from the unsteered cache of `decision`, steered by each row's sigma if kind is steered (Eq. 6).
    """
    model, settings = method.model, method.settings
    alpha = settings.alpha if kind == "steered" else 0.0
    steer = steering(method.vectors.v_r, decision.sigma * alpha, settings.steer_layers).to(model.embed)
    decision.cache.length = torch.tensor([prompt.p for prompt in decision.prompts])
    x, _ = model.forward(torch.tensor(ids, device=model.embed.device), decision.cache, steer)   # (B, N, D)
    return model.unembed(x)


# ---------------------------------------------------------------------------------------------------------
# Perplexity


@torch.inference_mode()
def perplexity(method, path, limit):
    """exp of the mean loss of a text, {"n": windows, kind: perplexity, "harmful": windows with sigma +1}.

    The first half of a window is the query, in the chat format; sigma is decided on it. The loss is that of
    the second half, as the answer, steered from p.
    """
    tokenizer, window = method.tokenizer, min(method.model.config.context, 2048)
    half = (window - len(tokenizer.prompt("a").ids)) // 2
    ids = tokenizer.words.encode(regular_file(path).read_text(encoding="utf-8-sig"))
    starts = range(0, len(ids) - 2 * half + 1, 2 * half)[:limit]
    if not starts:
        raise ValueError(f"{path}: {len(ids)} tokens, one window needs {2 * half}")
    loss, tokens, harmful = dict.fromkeys(KINDS, 0.0), 0, 0
    for first in progress(starts, "windows"):
        decision = varied(method, max_new_tokens=half).decide([tokenizer.decode(ids[first:first + half])])
        prompt = decision.prompts[0]
        answer = ids[first + half:first + 2 * half]
        answer = answer[:window - prompt.p - 1]     # encoded again, a query may have grown by a token
        for kind in KINDS:
            logits, = from_p(method, decision, [[prompt.ids[prompt.p], *answer[:-1]]], kind)    # (N, V)
            target = torch.tensor(answer, device=logits.device)
            loss[kind] += float(F.cross_entropy(logits, target, reduction="sum"))
        tokens += len(answer)
        harmful += int(decision.sigma[0] == 1)
    return {"n": len(starts), **{kind: math.exp(loss[kind] / tokens) for kind in KINDS}, "harmful": harmful}


# ---------------------------------------------------------------------------------------------------------
# MMLU


def read_questions(path, most):
    rows = read_csv(path)[:most]
    for row in rows:
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            raise ValueError(f"{path}: {row!r:.60}, expected question, A, B, C, D and the letter")
    return rows


def read_mmlu(folder, limit):
    """[(subject, question row, example rows)] from test/SUBJECT_test.csv and dev/SUBJECT_dev.csv."""
    subjects = [path.name.removesuffix("_test.csv") for path in sorted(Path(folder).glob("test/*_test.csv"))]
    if not subjects:
        raise ValueError(f"{folder}: no test/SUBJECT_test.csv")
    return [(subject, row, read_questions(Path(folder) / "dev" / f"{subject}_dev.csv", 5))
            for subject in subjects
            for row in read_questions(Path(folder) / "test" / f"{subject}_test.csv", limit)]


def mmlu_query(subject, row, examples):
    """Worked examples, then the question, as in Hendrycks et al."""
    def lines(row, answer):
        choices = (f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5]))
        return "\n".join([row[0], *choices, f"Answer:{answer}"])
    return "\n\n".join(["The following are multiple choice questions (with answers) about "
                        f"{subject.replace('_', ' ')}.",
                        *(lines(example, " " + example[5]) for example in examples), lines(row, "")])


def letter_ids(tokenizer):
    """The ids of A, B, C, D where an answer starts, after the format's joint: of the piece "▁A", say."""
    other, ids = copy.copy(tokenizer), []
    for letter in "ABCD":
        r_pos = tokenizer.format.r_pos.replace("Sure", letter)
        other.format = dataclasses.replace(tokenizer.format, r_pos=r_pos)
        prompt = other.prompt("a")
        ids += prompt.ids[prompt.p + 1:]
    if len(ids) != 4:
        raise ValueError("MMLU: in this vocabulary the letters A to D are more than one token each")
    return ids


def fit_question(method, subject, row, examples):
    """The query with as many examples as the context holds, and whether any was left out."""
    for n in range(len(examples), -1, -1):
        query = mmlu_query(subject, row, examples[:n])
        if len(method.tokenizer.prompt(query).ids) < method.model.config.context:
            break
    return query, n < len(examples)


@torch.inference_mode()
def mmlu(method, folder, limit, size):
    """A row of the table: % of the questions where the right letter has the highest logit after p."""
    letters, marks = letter_ids(method.tokenizer), []
    asked = [(*fit_question(method, subject, row, examples), "ABCD".index(row[5]))
             for subject, row, examples in read_mmlu(folder, limit)]
    asked.sort(key=lambda question: -len(question[0]))
    for batch in progress(batches(asked, size), "batches"):
        decision = varied(method, max_new_tokens=1).decide([query for query, *_ in batch])
        ids = [[prompt.ids[prompt.p]] for prompt in decision.prompts]
        guesses = {kind: from_p(method, decision, ids, kind)[:, 0, letters].argmax(-1) for kind in KINDS}
        marks += [{**{kind: 100 * int(guesses[kind][i] == answer) for kind in KINDS},
                   "harmful": int(decision.sigma[i] == 1), "shortened": int(shortened)}
                  for i, (_, shortened, answer) in enumerate(batch)]
    return row("MMLU, % right", marks)


# ---------------------------------------------------------------------------------------------------------
# Summaries


def read_documents(method, path, limit, new):
    """[(query, reference, whether the document was cut)]; it is cut to leave room for `new` tokens."""
    def query(document):
        return f"Document: {document}\nSummarize the document in one sentence."
    (header, *rows), asked, tokenizer = read_csv(path) or [[]], [], method.tokenizer
    for cells in rows[:limit]:
        row = dict(zip(header, cells))
        document, reference = row.get("document") or row.get("dialogue"), row.get("summary")
        if not document or not reference:
            raise ValueError(f"{path}: {row!r:.60}, expected a document (or dialogue) and a summary")
        excess = len(tokenizer.prompt(query(document)).ids) + new - method.model.config.context
        if excess > 0:      # 8 more: the joints may be encoded differently
            document = tokenizer.decode(tokenizer.words.encode(document)[:-excess - 8])
        asked.append((query(document), reference, excess > 0))
    return asked


def summaries(method, path, limit, size):
    """Rows of the table: ROUGE F1, in %, of summaries of up to 64 tokens against the file's."""
    from rouge_score.rouge_scorer import RougeScorer
    names = ("rouge1", "rouge2", "rougeL")
    scorer, asked = RougeScorer(names), read_documents(method, path, limit, 64)
    asked.sort(key=lambda one: -len(one[0]))
    writer, marks = varied(method, max_new_tokens=64), {name: [] for name in names}
    for batch in progress(batches(asked, size), "batches"):
        for (_, reference, cut), result in zip(batch, writer.answer([query for query, *_ in batch])):
            scores = {kind: scorer.score(reference, result[kind]) for kind in KINDS}
            for name in names:
                marks[name].append({**{kind: 100 * scores[kind][name].fmeasure for kind in KINDS},
                                    "harmful": int(result["sigma"] == 1), "shortened": int(cut)})
    return [row(f"{name} F1", marks[name]) for name in names]


# ---------------------------------------------------------------------------------------------------------
# The command


def row(measure, marks):
    """A row of the table from one dict per item: means of the measure, and counts."""
    return {"measure": measure, "n": len(marks),
            **{kind: statistics.mean(mark[kind] for mark in marks) for kind in KINDS},
            **{key: sum(mark[key] for mark in marks) for key in ("harmful", "shortened")}}


def flags(parser):
    share_flags(parser, "--text", "--limit")
    parser.add_argument("--mmlu", metavar="DIR", help="with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv")
    parser.add_argument("--summaries", metavar="FILE", help="a .csv with document (or dialogue) and summary")
    share_flags(parser, "--batch-size")
    add_flags(parser)


def run(args):
    """Perplexity, MMLU and ROUGE."""
    if not (args.text or args.mmlu or args.summaries):
        raise ValueError("capability needs --text FILE, --mmlu DIR or --summaries FILE")
    method, rows = start(args), []
    if args.text:
        rows.append({"measure": f"perplexity, {Path(args.text).name}",
                     **perplexity(method, args.text, args.limit), "shortened": 0})
    if args.mmlu:
        rows.append(mmlu(method, args.mmlu, args.limit, args.batch_size))
    if args.summaries:
        rows += summaries(method, args.summaries, args.limit, args.batch_size)
    show({"capability": rows}, args.json)
