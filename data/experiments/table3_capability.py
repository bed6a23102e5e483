"""Table 3: what steering costs in capability. Perplexity of a text, MMLU (Hendrycks et al., ICLR 2021), ROUGE
of summaries.

Where the authors' scripts differ: their perplexity puts [/INST] in the middle of each window and averages the
loss over both halves, of which one is steered. Their MMLU is asked without the chat format, and its anchors'
vectors are extracted again for each subject while the last steering is still on.
"""
import csv
import dataclasses
import io
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from data.experiments.core import batches, changed, need, progress, share_flags, show, start
from data.experiments.results import BOTH
from llama import Sampling
from scans import add_flags, check_finite, steering

GROUPS = {  # of MMLU's subjects; any other is of the group "other"
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy"""}
GROUP = {subject: name for name, subjects in GROUPS.items() for subject in subjects.split()}


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None


def read_csv(path):
    """All rows of a .csv as lists of cells."""
    csv.field_size_limit(2**31 - 1)  # documents are longer than csv's own limit
    try:
        return list(csv.reader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None


def from_p(scans, decision, ids, name):
    """Logits (B, T, V) of ids (B, T), the first of which is the token at p.

    Goes on from the unsteered cache of `decision`, steered by each row's sigma if `name` is scans (Eq. 6).
    """
    p = torch.tensor([prompt.p for prompt in decision.prompts])
    alpha = scans.settings.alpha if name == "scans" else 0.0
    steer = steering(scans.v_r, decision.sigma * alpha, scans.settings.steer).to(scans.model.embed.dtype)
    ids = torch.tensor(ids, device=scans.model.embed.device)
    decision.cache.length = p
    x, _ = scans.model.forward(ids, decision.cache, steer)                                  # (B, T, D)
    if not x.isfinite().all():  # once more, to say where
        decision.cache.length = p
        everywhere = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        _, streams = scans.model.forward(ids, decision.cache, steer, everywhere)
        check_finite(streams, [repr(question[:60]) for question in decision.questions])
    return scans.model.unembed(x)                                                           # (B, T, V)


# ------------------------------------------------------------------------------------------------------------
# Perplexity


@torch.inference_mode()
def perplexity(scans, path, limit, names=BOTH):
    """exp of the mean loss of a text: {"n": windows, name: perplexity, "harmful": windows with sigma +1}.

    The first half of a window is the query, in the chat format; sigma is decided on it; the loss is that of
    the second half, as the answer, steered from p.
    """
    window = min(scans.model.config.context, 2048)
    half = (window - len(scans.tokenizer.prompt("a").ids)) // 2
    ids = scans.tokenizer.encode([read_text(path)])
    starts = range(0, len(ids) - 2 * half + 1, 2 * half)[:limit]
    if not starts:
        raise ValueError(f"{path}: {len(ids)} tokens, one window needs {2 * half}")
    reader = changed(scans, sampling=dataclasses.replace(scans.sampling, max_new_tokens=half))
    loss, tokens, harmful = dict.fromkeys(names, 0.0), 0, 0
    with progress(len(starts), "windows") as bar:
        for first in starts:
            decision = reader.decide([scans.tokenizer.decode(ids[first:first + half])])
            prompt = decision.prompts[0]
            answer = ids[first + half:first + 2 * half]
            answer = answer[:window - prompt.p - 1]  # encoded again, a query may have grown by a token
            for name in names:
                logits, = from_p(scans, decision, [[prompt.ids[prompt.p], *answer[:-1]]], name)     # (T, V)
                target = torch.tensor(answer, device=logits.device)
                loss[name] += float(F.cross_entropy(logits, target, reduction="sum"))
            tokens += len(answer)
            harmful += int(decision.sigma[0] == 1)
            bar.update()
    return {"n": len(starts), **{name: math.exp(loss[name] / tokens) for name in names}, "harmful": harmful}


# ------------------------------------------------------------------------------------------------------------
# MMLU


def read_questions(path, most):
    rows = read_csv(path)[:most]
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5].strip() not in ("A", "B", "C", "D"):
            raise ValueError(f"{path}: row {number} has {len(row)} cells and ends in {row[-1:]}, "
                             "need question, A, B, C, D and the letter")
    return rows


def read_mmlu(folder, limit):
    """[(subject, question row, example rows)] from folder/test/SUBJECT_test.csv and
    folder/dev/SUBJECT_dev.csv, without headers.

    The folders are also found as mmlu_test and mmlu_dev.
    """
    def part(name):
        plain, prefixed = Path(folder) / name, Path(folder) / f"mmlu_{name}"
        return prefixed if prefixed.is_dir() and not plain.is_dir() else plain

    asked = []
    for path in sorted(part("test").glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        examples = read_questions(part("dev") / f"{subject}_dev.csv", 5)
        asked += [(subject, row, examples) for row in read_questions(path, limit)]
    if not asked:
        raise ValueError(f"{folder}: no questions in test/SUBJECT_test.csv")
    return asked


def mmlu_query(subject, row, examples):
    """Worked examples, then the question, as in Hendrycks et al."""
    def lines(row, answer):
        choices = (f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5]))
        return "\n".join([row[0], *choices, f"Answer:{answer}"])
    subject = subject.replace("_", " ")
    return "\n\n".join([f"The following are multiple choice questions (with answers) about {subject}.",
                        *(lines(example, " " + example[5].strip()) for example in examples), lines(row, "")])


def letter_ids(tokenizer):
    """The ids of A, B, C, D where an answer starts, behind the format's joint: of the piece "▁A", say."""
    joint, ids = tokenizer.format.r_pos.removesuffix("Sure"), []
    for letter in "ABCD":
        format = dataclasses.replace(tokenizer.format, r_pos=joint + letter)
        prompt = changed(tokenizer, format=format).prompt("a")
        if prompt.e != prompt.p + 1:
            raise ValueError(f"the answer {letter} has {prompt.e - prompt.p} tokens here, need 1")
        ids.append(prompt.ids[prompt.e])
    return ids


def fit_question(scans, place, subject, row, examples):
    """The query with as many examples as the context holds, its length, and whether any was left out."""
    for n in range(len(examples), -1, -1):
        query = mmlu_query(subject, row, examples[:n])
        length = len(scans.tokenizer.prompt(query).ids)
        if length <= scans.model.config.context:
            return query, length, n < len(examples)
    raise ValueError(f"{place}, of {subject}, has {length} tokens, "
                     f"the model's context is {scans.model.config.context}")


@torch.inference_mode()
def mmlu(scans, folder, limit, size, names=BOTH):
    """Rows of the table: % of the questions where the right letter has the highest logit after p."""
    letters, asked = letter_ids(scans.tokenizer), []
    for number, (subject, row, examples) in enumerate(read_mmlu(folder, limit), 1):
        query, length, shortened = fit_question(scans, f"{folder}: question {number}", subject, row, examples)
        asked.append((length, query, subject, "ABCD".index(row[5].strip()), shortened))
    reader, groups = changed(scans, sampling=Sampling(max_new_tokens=1)), {}
    with progress(len(asked), "questions") as bar:
        for batch in batches(sorted(asked, key=lambda question: question[0]), size):
            decision = reader.decide([query for _, query, *_ in batch])
            ids = [[prompt.ids[prompt.p]] for prompt in decision.prompts]
            chosen = {name: from_p(scans, decision, ids, name)[:, 0, letters].argmax(-1).tolist()
                      for name in names}
            for i, (_, _, subject, answer, shortened) in enumerate(batch):
                marks = {**{name: chosen[name][i] == answer for name in names}, "shortened": shortened,
                         "harmful": int(decision.sigma[i] == 1)}
                for group in (GROUP.get(subject, "other"), "average"):
                    groups.setdefault(group, []).append(marks)
            bar.update(len(batch))

    def row(group, marks):
        count = {key: sum(mark[key] for mark in marks) for key in marks[0]}
        shares = {name: 100 * count[name] / len(marks) for name in names}
        return {"measure": f"MMLU {group}, % right", "n": len(marks), **shares,
                "harmful": count["harmful"], "shortened": count["shortened"]}
    return [row(group, groups[group]) for group in (*GROUPS, "other", "average") if group in groups]


# ------------------------------------------------------------------------------------------------------------
# Summaries


def read_documents(scans, path, limit, new):
    """[(query, reference, whether the document was cut)]; it is cut to leave room for `new` tokens."""
    def query(document):
        return f"Document: {document}\nSummarize the document in one sentence."

    header, *rows = read_csv(path) or [[]]
    asked = []
    for number, row in enumerate((dict(zip(header, cells)) for cells in rows[:limit]), 1):
        document, reference = row.get("document") or row.get("dialogue"), row.get("summary")
        if not document or not reference:
            raise ValueError(f"{path}: row {number} has no document (or dialogue) or no summary")
        excess = len(scans.tokenizer.prompt(query(document)).ids) + new - scans.model.config.context
        if excess > 0:  # 8 more: the joints may encode otherwise
            document = scans.tokenizer.decode(scans.tokenizer.encode([document])[:-excess - 8])
        asked.append((query(document), reference, excess > 0))
    if not asked:
        raise ValueError(f"{path}: no rows")
    return asked


def summaries(scans, path, limit, size, names=BOTH):
    """Rows of the table: ROUGE F1 (Lin, 2004), in %, of summaries of up to 64 tokens against the file's."""
    from rouge_score.rouge_scorer import RougeScorer
    kinds = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer, asked = RougeScorer(list(kinds)), read_documents(scans, path, limit, 64)
    writer = changed(scans, sampling=dataclasses.replace(scans.sampling, max_new_tokens=64))
    found, harmful = {name: [] for name in names}, 0
    with progress(len(asked), "summaries") as bar:
        for batch in batches(sorted(asked, key=lambda one: len(one[0])), size):
            results = writer.answer([query for query, *_ in batch], "default" in names)
            for (_, reference, _), result in zip(batch, results):
                harmful += result["sigma"] == 1
                for name in names:
                    found[name].append(scorer.score(reference, result[name]))
            bar.update(len(batch))
    return [{"measure": f"{title} F1", "n": len(asked),
             **{name: statistics.mean(100 * score[kind].fmeasure for score in found[name]) for name in names},
             "harmful": harmful, "shortened": sum(cut for *_, cut in asked)} for kind, title in kinds.items()]


# ------------------------------------------------------------------------------------------------------------
# The command


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
    need("capability", "tqdm", *(["rouge_score"] if args.summaries else []))
    scans, names, rows = start(args), ("scans",) if args.no_default else BOTH, []
    if args.text:
        found = perplexity(scans, args.text, args.limit, names)
        rows.append({"measure": f"perplexity, {Path(args.text).name}", **found, "shortened": 0})
    if args.mmlu:
        rows += mmlu(scans, args.mmlu, args.limit, args.batch_size, names)
    if args.summaries:
        rows += summaries(scans, args.summaries, args.limit, args.batch_size, names)
    show({"capability": rows}, args.json)
