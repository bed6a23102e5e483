"""Answers to all prompts, shared among processes, and the results file of --out.

The file holds JSON lines, one for each answer. They are written as they come: rank r of torchrun writes to
FILE.part<r>. A run that was interrupted goes on from all of them, and at the end the file is written anew, in
the order of the prompts.

A file that holds anything else than results of ours is refused and left as it is.
"""
import contextlib
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import torch.distributed as dist

from data.experiments.core import RANK, WORLD, batches, progress
from scans import digest, fingerprint, is_refusal, say, written_whole

try:
    import fcntl
except ImportError:  # on Windows; nothing is locked there
    fcntl = None

BOTH = ("default", "scans")
FIELDS = {  # what a record must have: the types or the values that may stand there
    "variant": (str,), "file": (str,), "row": (int,), "type": (str,), "label": ("safe", "unsafe"),
    "prompt": (str,), "score": (float,), "threshold": (float,), "sigma": (-1, 0, 1),
    "default": (str, None), "scans": (str, None), "refused": dict.fromkeys(BOTH, (bool, None)),
    "stopped": dict.fromkeys(BOTH, ("eos", "length", "context", None)), "settings": {},
}


def check_record(record, place, fields=FIELDS):
    """ValueError for a record that lacks one of the fields or has another kind of value there."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} is no result of this command: {repr(record)[:60]}")
    for name, kinds in fields.items():
        value = record.get(name)
        if name not in record:
            raise ValueError(f"{place} is no result of this command: it has no {name}")
        finite = not isinstance(value, float) or math.isfinite(value)
        if isinstance(kinds, dict):
            check_record(value, place, kinds)
        elif not finite or type(value) not in kinds and value not in kinds:
            raise ValueError(f"{place} is no result of this command: {name} is {repr(value)[:60]}")


def read_records(path):
    """[(place, record)] of a results file, and how many bytes they take. ValueError for any other file.

    A half-written last line counts for nothing, unless it is the first: then it proves nothing.
    """
    data = path.read_bytes()
    *lines, half = data.split(b"\n")
    records = []
    for number, line in enumerate(lines or [half] * bool(half), 1):
        place = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{place} is no result of this command") from None
        check_record(record, place)
        records.append((place, record))
    if half:
        say(f"{path}: line {len(lines) + 1} is half-written and is done again")
    return records[:len(lines)], len(data) - len(half)


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


@dataclasses.dataclass
class Results:
    """The file of --out while it is held. Without --out nothing is written."""
    path: Path | None
    records: list       # [(place, record)] that stood there at first, parts included
    size: int = 0       # bytes of the whole lines in the file

    def parts(self):
        """What other processes wrote beside the file."""
        pattern = re.escape(self.path.name) + r"\.part\d+"
        return [path for path in sorted(self.path.parent.iterdir()) if re.fullmatch(pattern, path.name)]

    def resume(self, want, items):
        """{(variant, file, row): record} of what is done already. want: {variant: its run_settings}.

        Raises ValueError where a record belongs to other settings, prompts, labels, types or scores than
        those of this run.
        """
        asked, done = {(item.file, item.row): item for item in items}, {}
        for place, record in self.records:
            variant, file, row = key = record["variant"], record["file"], record["row"]
            if variant not in want:
                raise ValueError(f"{place} has {variant}, this run {', '.join(want)}; give another --out")
            item = asked.get((file, row))
            if item is None:
                raise ValueError(f"{place} has {record['prompt'][:60]!r} as prompt {row} of {file}, "
                                 "this run has not; give another --out")
            had, now = dict(record["settings"]), {**want[variant], **item.scores}
            for name in ("prompt", "label", "type"):
                had[name], now[name] = record[name], getattr(item, name)
            had["refused"], now["refused"] = record["refused"], {
                kind: None if record[kind] is None else is_refusal(record[kind]) for kind in BOTH}
            had.update({name: value for name, value in record.items() if name.startswith("score:")})
            for name in now | had:
                if json.dumps(had.get(name)) != json.dumps(now.get(name)):      # to ==, true and 1.0 are one
                    raise ValueError(f"{place} has {name} {had.get(name)!r}, this run {now.get(name)!r}; "
                                     "give another --out")
            done[key] = record

        if self.path:
            os.truncate(self.path, self.size)
            if parts := self.parts():
                self.add(done.values())
                for part in parts:
                    part.unlink()
        return done

    def add(self, records):
        """Records at the end of this process's file."""
        if self.path:
            path = self.path if RANK == 0 else f"{self.path}.part{RANK}"
            try:
                with open(path, "ab") as file:
                    file.write(as_lines(records))
            except OSError as error:
                raise ValueError(f"{path}: cannot be written ({error.strerror}); what was done stands there, "
                                 "and the same command goes on from it") from None

    def finish(self, records):
        """The whole file anew; then its parts go."""
        if self.path is None:
            return
        with written_whole(self.path) as temporary:
            temporary.write_bytes(as_lines(records))
        for part in self.parts():
            part.unlink()


@contextlib.contextmanager
def results(name):
    """The Results of --out, locked against a second process. ValueError for a file that is not ours."""
    path = Path(os.path.realpath(name)) if name else None   # what a link points to, so that the link stays
    if path is None or RANK > 0:
        yield Results(path, [])
        return
    if path.exists() and not path.is_file():
        raise ValueError(f"{name}: no regular file; give another --out")
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.close()    # Windows does not replace a file that is open
        except BlockingIOError:
            raise ValueError(f"{name}: another process is writing it; give another --out") from None
        records, size = read_records(path)
        held = Results(path, records, size)
        for part in held.parts():
            records += read_records(part)[0]
        yield held


def run_settings(scans, default, args):
    """What decides an answer, as every record carries it."""
    vectors = b"".join(t.float().cpu().contiguous().numpy().tobytes() for t in (scans.v_r, scans.d_harm))
    tokenizer, chosen = scans.tokenizer, scans.settings
    return {"model": fingerprint(args.model), "format": tokenizer.name, "system": tokenizer.system,
            "dtype": str(scans.model.embed.dtype)[6:], "vectors": digest(vectors), "alpha": chosen.alpha,
            "threshold": chosen.T, "sigma": scans.sigma, "steer_layers": chosen.steer,
            "classify_layers": chosen.classify, "default": default, **dataclasses.asdict(scans.sampling)}


def collect(variants, items, held, args):
    """Answers to all items under all variants: {name: records in the order of items}.

    variants: {name: (Scans, whether to answer without SCANS too)}; held: Results. What stands there is not
    done again.
    """
    some, _ = next(iter(variants.values()))
    lengths = {item: len(some.tokenizer.prompt(item.prompt).ids) for item in items}
    for item, length in lengths.items():
        if length > some.model.config.context:
            raise ValueError(f"{item.file}: prompt {item.row} has {length} tokens, "
                             f"the model's context is {some.model.config.context}")

    want = {name: run_settings(*variant, args) for name, variant in variants.items()}
    box = [held.resume(want, items) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    done, = box
    if done:
        say(f"resuming  {len(done)} of {len(items) * len(variants)} answers stand in {args.out}")

    work, new = [], {}
    for name in variants:  # like lengths together: less padding
        todo = sorted((item for item in items if (name, item.file, item.row) not in done), key=lengths.get)
        work += [(name, batch) for batch in batches(todo[RANK::WORLD], args.batch_size)]
    with progress(sum(len(batch) for _, batch in work), "prompts") as bar:
        for name, batch in work:
            scans, default = variants[name]
            answers = scans.answer([item.prompt for item in batch], default)
            records = {(name, item.file, item.row): {
                "variant": name, "file": item.file, "row": item.row, "type": item.type, "label": item.label,
                **answer, **item.scores, "settings": want[name]} for item, answer in zip(batch, answers)}
            held.add(records.values())
            new.update(records)
            bar.update(len(batch))

    shares = [new]
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, new)
    for share in shares:
        done.update(share)
    found = {name: [done[name, item.file, item.row] for item in items] for name in variants}
    if RANK == 0:
        held.finish(record for records in found.values() for record in records)
    return found
