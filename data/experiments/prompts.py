"""Labelled prompts from the files in which the public data sets come."""
import csv
import io
import json
import math
from pathlib import Path

from llama import regular_file
from scans import say

# The first of these columns that a row has is its prompt.
COLUMNS = ("prompt", "goal", "Goal", "Question", "question", "forbidden_prompt", "Behavior", "instruction",
           "text", "sentence")
READERS = {     # suffix: the rows of a text
    ".txt": lambda text: [line for line in text.split("\n") if line.strip()],
    ".csv": lambda text: list(csv.DictReader(io.StringIO(text, newline=""), strict=True)),
    ".tsv": lambda text: list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", strict=True)),
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()]}


def read_prompts(path, given=None):
    """The prompts of a file: a dict each with file, row (from 1), label, type, prompt, and its scores.

    given: the label that the user gives to the whole file. Raises ValueError.
    """
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected one of {', '.join(READERS)}; pandas turns parquet into csv: "
                         "read_parquet(FILE).explode(['sentence', 'label']).to_csv(FILE)")
    csv.field_size_limit(2**31 - 1)     # documents to summarize are longer than csv's own limit
    file = regular_file(path)
    try:
        rows = reader(file.read_text(encoding="utf-8-sig"))     # -sig: a byte-order mark may lead
        if not isinstance(rows, list):
            raise ValueError("expected a list")
        items = [read_row(row, given) | {"file": str(path), "row": n} for n, row in enumerate(rows, 1)]
    except (OSError, csv.Error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return [item for item in items if item["prompt"]]


def read_row(row, given):
    """One row of a file, a dict or a text alone, as a prompt."""
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


def read_all(names, anchors=frozenset()):
    """The prompts of FILE, safe:FILE or unsafe:FILE, without those whose text is that of an anchor."""
    items = []
    for name in names:
        given, colon, path = name.partition(":")
        items += read_prompts(path, given) if colon and given in ("safe", "unsafe") else read_prompts(name)
    kept = [item for item in items if item["prompt"] not in anchors]
    say(f"prompts   {len(kept)} from {len(names)} files; {len(items) - len(kept)} dropped that are anchors")
    if not kept:
        raise ValueError(f"{', '.join(names)}: no prompts but anchors")
    return kept
