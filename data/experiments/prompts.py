"""Labelled prompts from the files in which the public data sets come."""
import csv
import io
import json
import math
from pathlib import Path

from llama import regular_file
from scans import draw_anchors, say

# The first of these columns that a row has is its prompt.
COLUMNS = ("prompt", "goal", "Goal", "Question", "question", "forbidden_prompt", "Behavior", "instruction",
           "text", "sentence")
READERS = {     # suffix: the rows of a text
    ".txt": lambda text: [line for line in text.split("\n") if line.strip()],
    ".csv": lambda text, **how: list(csv.DictReader(io.StringIO(text, newline=""), strict=True, **how)),
    ".tsv": lambda text: READERS[".csv"](text, delimiter="\t"),
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()]}


def read_rows(path, make, limit=None, **how):
    """[make(row)] for the first rows of a file, dicts or texts alone. Raises ValueError that names the file.

    how: further arguments of csv.DictReader.
    """
    reader, file = READERS.get(Path(path).suffix.lower()), regular_file(path)
    csv.field_size_limit(2**31 - 1)     # documents to summarize are longer than csv's own limit
    try:
        if reader is None:
            raise ValueError(f"expected one of {', '.join(READERS)}")
        rows = reader(file.read_text(encoding="utf-8-sig"), **how)      # -sig: a byte-order mark may lead
        if not isinstance(rows, list):
            raise ValueError("expected a list")
        return [make(row) for row in rows[:limit]]
    except (OSError, csv.Error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_prompts(path, given=None):
    """The prompts of a file: a dict each with file, row (from 1), label, type, prompt, and its scores.

    given: the label that the user gives to the whole file.
    """
    items = read_rows(path, lambda row: read_row(row, given))
    items = [item | {"file": str(path), "row": n} for n, item in enumerate(items, 1)]
    return [item for item in items if item["prompt"]]


def read_row(row, given):
    """One row of a file as a prompt."""
    row = row if isinstance(row, dict) else {"text": row}
    column = next((name for name in COLUMNS if name in row), None)
    if column is None or None in row:       # None: csv puts the cells there for which the header has no name
        raise ValueError(f"a row without a prompt, or with more cells than the header: {row!r:.200}; "
                         f"expected one of the columns {', '.join(COLUMNS)}")
    kind, label = str(row.get("type") or ""), str(row.get("label", ""))
    label = {"None": "", "True": "safe", "False": "unsafe"}.get(label, label)   # RepE-Data: true is harmless
    if not label and kind and "focus" in row:                                   # XSTest v2
        label = "unsafe" if kind.startswith("contrast_") else "safe"
    label = label or given
    if label not in ("safe", "unsafe") or given not in (None, label):
        raise ValueError(f"the label of {row[column]!r:.60} is {label!r}, the file's is {given!r}; "
                         "expected one label: give the file as safe:FILE or unsafe:FILE")
    scores = {name: float(str(value)) for name, value in row.items() if name.startswith("score:")}
    if not all(map(math.isfinite, scores.values())):
        raise ValueError(f"the scores of {row[column]!r:.60} are {scores}, expected finite numbers")
    return {"label": label, "type": kind, "prompt": (row[column] or "").strip(), **scores}


def read_all(args):
    """The prompts of args.files, each FILE, safe:FILE or unsafe:FILE, without those that are anchors.

    The anchors are named in args from here on: a vectors file made with others is refused.
    """
    args.anchors, args.anchor_seed, items = args.anchors or 64, args.anchor_seed or 0, []
    harmful, harmless = draw_anchors(args.model, args.harmful, args.harmless, args.anchors, args.anchor_seed)
    for name in args.files:
        given, colon, path = name.partition(":")
        items += read_prompts(path, given) if colon and given in ("safe", "unsafe") else read_prompts(name)
    kept = [item for item in items if item["prompt"] not in harmful + harmless]
    say(f"prompts   {len(kept)} from {len(args.files)} files; "
        f"{len(items) - len(kept)} dropped that are anchors")
    if not kept:
        raise ValueError(f"{', '.join(args.files)}: no prompts but anchors")
    return kept
