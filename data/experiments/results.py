"""Answers to all prompts, and the results file of --out.

The first line says what decides the answers: command, model, vectors, settings, a digest of the prompts. One
JSON line per answer follows, as it comes, each with a digest of itself. A file with the same first line is
resumed. Any other file is refused and left as it is.

Under torchrun each process appends to a file of its own, FILE.rank1 and so on, which rank 0 moves to FILE.
"""
import dataclasses
import glob
import json
import os
import sys
import tempfile
from pathlib import Path

from data.experiments.core import PARALLEL, PROCESSES, RANK, batches, rank_0_first, wait_for_all
from llama import regular_file
from scans import digest, say, show_layers


class Results:
    """The file of this process, and `whole`, that of rank 0."""

    def __init__(self, whole, identity):
        self.whole, self.path = whole, Path(f"{whole}.rank{RANK}" if RANK else whole)
        self.first = json.dumps(identity, default=show_layers).encode() + b"\n"
        if self.path.exists():
            self.read(self.path)
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)     # a line that was cut
        self.add(())        # the first line
        self.gather()

    def add(self, records):
        """Append records. One write: two runs on one file mix whole lines, and both find all answers."""
        texts = [json.dumps(record, ensure_ascii=False)[:-1] for record in records]
        lines = "".join(f'{text}, "check": "{digest(text)}"}}\n' for text in texts).encode()
        with open(self.path, "ab", buffering=2**20) as file:
            file.write((b"" if file.tell() else self.first) + lines)

    def read(self, path):
        """{(variant, item): record} of the whole lines of a file."""
        data = regular_file(path).read_bytes()
        if not data.startswith(self.first) and not self.first.startswith(data):
            raise ValueError(f"{path}: of another command, model, setting or prompt; give another --out")
        records = {}
        for number, line in enumerate(data[len(self.first):].split(b"\n")[:-1], 2):
            text, _, check = line.rpartition(b', "check": ')
            if check != f'"{digest(text)}"}}'.encode():
                raise ValueError(f"{path}: line {number} was changed; remove it to have it answered again")
            record = json.loads(text + b"}")
            records[record["variant"], record["item"]] = record
        return records

    def gather(self):
        """All records of the file of rank 0, to which it moves what the others wrote."""
        done = self.read(self.whole)
        for part in glob.glob(f"{glob.escape(str(self.whole))}.rank*") if RANK == 0 else ():
            self.add(record for key, record in self.read(part).items() if key not in done)
            os.unlink(part)
        return self.read(self.whole)


def collect(variants, items, args):
    """The answers to all items, {name: records}, on rank 0. Other processes end here.

    variants: {name: (Scans, whether to answer without SCANS too)}.
    """
    if PARALLEL and not args.out:
        raise ValueError("torchrun needs --out FILE, where the processes meet")
    identity = {"command": args.command, "prompts": digest(items), "variants": [
        {"name": name, "default": default, **dataclasses.asdict(method.settings), "vectors": digest(
            [method.model.fingerprint, method.vectors.v_r.tolist(), method.vectors.d_harm.tolist()])}
        for name, (method, default) in variants.items()]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.out or f"{folder}/answers")
        with rank_0_first():
            results = Results(path, identity)
        done = results.read(path)
        say(f"answers   {len(done)} of {len(items) * len(variants)} are there already")
        order = sorted(range(len(items)), key=lambda i: -len(items[i]["prompt"]))   # similar lengths pad less
        for name, (method, default) in variants.items():
            mine = [i for i in order[RANK::PROCESSES] if (name, i) not in done]
            for batch in batches(mine, args.batch_size, f"batches, {name}"):
                answers = method.answer([items[i]["prompt"] for i in batch], default)
                results.add({"variant": name, "item": i, **items[i], **answer}
                            for i, answer in zip(batch, answers))
        wait_for_all()
        if RANK > 0:
            sys.exit()
        done = results.gather()
        return {name: [done[name, i] for i in range(len(items))] for name in variants}
