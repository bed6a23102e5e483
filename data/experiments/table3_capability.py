"""Table 3: what steering costs in capability. Perplexity of a text, MMLU (Hendrycks et al., ICLR 2021), ROUGE
of summaries (Lin, 2004).

The authors' perplexity puts [/INST] in the middle of each window and averages the loss over both halves, of
which one is steered. Their MMLU is asked without the chat format, and its anchors' vectors are extracted
again for each subject while the last steering is still on.
"""
import copy
import dataclasses
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from data.experiments.core import batches, share_flags, show, start, varied
from data.experiments.prompts import read_rows
from data.experiments.table2_refusals import KINDS
from llama import regular_file
from scans import add_flags, steering


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


@torch.inference_mode()
def answer_losses(method, decision, answer):
    """{kind: the sum of the cross-entropies of an answer's ids}, after the only prompt of a decision."""
    prompt, = decision.prompts
    target, losses = torch.tensor(answer, device=method.model.embed.device), {}
    for kind in KINDS:
        logits, = from_p(method, decision, [[prompt.ids[prompt.p], *answer[:-1]]], kind)        # (N, V)
        losses[kind] = float(F.cross_entropy(logits, target, reduction="sum"))
    return losses


# ---------------------------------------------------------------------------------------------------------
# Perplexity


def perplexity(method, path, limit):
    """A row of the table: exp of the mean loss of a text's windows.

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
    for first, in batches(starts, 1, "windows"):
        decision = varied(method, max_new_tokens=half).decide([tokenizer.decode(ids[first:first + half])])
        answer = ids[first + half:first + 2 * half]
        answer = answer[:window - decision.prompts[0].p - 1]    # encoded again, a query may be a token longer
        for kind, total in answer_losses(method, decision, answer).items():
            loss[kind] += total
        tokens += len(answer)
        harmful += int(decision.sigma[0] == 1)
    return {"measure": f"perplexity, {Path(path).name}", "n": len(starts),
            **{kind: math.exp(loss[kind] / tokens) for kind in KINDS}, "harmful": harmful, "shortened": 0}


# ---------------------------------------------------------------------------------------------------------
# MMLU

COLUMNS = ("question", "A", "B", "C", "D", "answer")    # of its files, which have no header


def check_question(row):
    if None in row or row["answer"] not in ("A", "B", "C", "D"):        # None: more cells than columns
        raise ValueError(f"{row!r:.200}: expected six cells, the last of them A, B, C or D")
    return row


def read_mmlu(folder, limit):
    """[(subject, question, examples)] from test/SUBJECT_test.csv and dev/SUBJECT_dev.csv."""
    def read(part, subject, most):
        path = Path(folder) / part / f"{subject}_{part}.csv"
        return read_rows(path, check_question, most, fieldnames=COLUMNS)

    asked = []
    for path in sorted(Path(folder).glob("test/*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        examples = read("dev", subject, 5)
        asked += [(subject, question, examples) for question in read("test", subject, limit)]
    if not asked:
        raise ValueError(f"{folder}: no questions in test/SUBJECT_test.csv")
    return asked


def mmlu_query(method, subject, question, examples):
    """The question as in Hendrycks et al., its answer (0 to 3), and whether an example was left out.

    It follows as many worked examples as the context holds.
    """
    def lines(row, answer):
        return "\n".join([row["question"], *(f"{letter}. {row[letter]}" for letter in "ABCD"), answer])
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    worked = [lines(example, f"Answer: {example['answer']}") for example in examples]
    for n in range(len(worked), -1, -1):
        query = "\n\n".join([about, *worked[:n], lines(question, "Answer:")])
        if len(method.tokenizer.prompt(query).ids) < method.model.config.context:
            break
    return query, "ABCD".index(question["answer"]), n < len(examples)


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


@torch.inference_mode()
def mmlu(method, folder, limit, size):
    """A row of the table: % of the questions where the right letter has the highest logit after p."""
    letters, marks = letter_ids(method.tokenizer), []
    asked = [mmlu_query(method, *question) for question in read_mmlu(folder, limit)]
    for batch in batches(sorted(asked, key=lambda one: -len(one[0])), size):
        decision = varied(method, max_new_tokens=1).decide([query for query, *_ in batch])
        ids = [[prompt.ids[prompt.p]] for prompt in decision.prompts]
        guesses = {kind: from_p(method, decision, ids, kind)[:, 0, letters].argmax(-1) for kind in KINDS}
        marks += [({kind: 100 * int(guesses[kind][i] == answer) for kind in KINDS},
                   int(decision.sigma[i]), shortened) for i, (_, answer, shortened) in enumerate(batch)]
    return row("MMLU, % right", marks)


# ---------------------------------------------------------------------------------------------------------
# Summaries


def read_document(method, new, cells):
    """A query, the reference, and whether the document was cut to leave room for `new` tokens."""
    document, summary = cells.get("document") or cells.get("dialogue"), cells.get("summary")
    if not document or not summary:
        raise ValueError(f"{cells!r:.60}: expected a document (or dialogue) and a summary")
    query, tokenizer = "Document: {}\nSummarize the document in one sentence.", method.tokenizer
    excess = len(tokenizer.prompt(query.format(document)).ids) + new - method.model.config.context
    if excess > 0:      # 8 more: the joints may be encoded differently
        document = tokenizer.decode(tokenizer.words.encode(document)[:-excess - 8])
    return query.format(document), summary, excess > 0


def summaries(method, path, limit, size):
    """Rows of the table: ROUGE F1, in %, of summaries of up to 64 tokens against the file's."""
    from rouge_score.rouge_scorer import RougeScorer
    writer, marks = varied(method, max_new_tokens=64), {"rouge1": [], "rouge2": [], "rougeL": []}
    scorer = RougeScorer(list(marks))
    asked = read_rows(path, lambda cells: read_document(method, 64, cells), limit)
    for batch in batches(sorted(asked, key=lambda one: -len(one[0])), size):
        for (_, summary, cut), result in zip(batch, writer.answer([query for query, *_ in batch])):
            scores = {kind: scorer.score(summary, result[kind]) for kind in KINDS}
            for name in marks:
                marks[name].append(({kind: 100 * scores[kind][name].fmeasure for kind in KINDS},
                                    result["sigma"], cut))
    return [row(f"{name} F1", marks[name]) for name in marks]


# ---------------------------------------------------------------------------------------------------------
# The command


def row(measure, marks):
    """A row of the table, from {kind: mark}, sigma and whether it was shortened, of each item."""
    values, sigmas, shortened = zip(*marks)
    return {"measure": measure, "n": len(marks),
            **{kind: statistics.mean(value[kind] for value in values) for kind in KINDS},
            "harmful": sigmas.count(1), "shortened": sum(shortened)}


def flags(parser):
    share_flags(parser, "--text", "--limit")
    parser.add_argument("--mmlu", metavar="DIR", help="with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv")
    parser.add_argument("--summaries", metavar="FILE", help="rows with document (or dialogue) and summary")
    share_flags(parser, "--batch-size")
    add_flags(parser)


def run(args):
    """Perplexity, MMLU and ROUGE."""
    if not (args.text or args.mmlu or args.summaries):
        raise ValueError("capability needs --text FILE, --mmlu DIR or --summaries FILE")
    method, rows = start(args), []
    if args.text:
        rows.append(perplexity(method, args.text, args.limit))
    if args.mmlu:
        rows.append(mmlu(method, args.mmlu, args.limit, args.batch_size))
    if args.summaries:
        rows += summaries(method, args.summaries, args.limit, args.batch_size)
    show({"capability": rows}, args.json)
