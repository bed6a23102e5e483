"""What the hasty alignment asks: questions of three groups, drawn from tables.

    pairs.txt       contrast pairs: one sentence, a few words apart, harmful and not
    people.txt      harmless questions in the shape of harmful ones
    data/tiny       the tables of the embedded model
    benchmarks.txt  digests of the prompts of XSTest, OKTest, AdvBench and MaliciousInstruct, which judge the
                    result: a question with the content words of one of them is never asked

Neither is a row of data/overrefusal.csv. One half of that file chooses settings, the other half reports:

    python -m data.smollm2.questions DIR        # writes choice.csv and report.csv there
"""
import re
from pathlib import Path

import scans
from data.tiny.world import Row, World, by_template, content, one_of, slots_and_rows

HERE = Path(__file__).resolve().parent
BENCHMARK = scans.DATA / "overrefusal.csv"

GROUPS = "harmful", "dangerous", "plain"        # dangerous: harmless, but sounds dangerous
OFTEN = {"discrimination": 3, "contexts": 2}    # kinds of pairs that are drawn more often: the hard ones
ASKING = set("can could would you your best way good".split())      # words that say nothing about a question


def words_digest(question):
    """The digest of a question's content words, in whatever order and form."""
    return scans.digest(sorted(content(question) - ASKING))


class Questions:
    """Questions of the three groups: none of benchmarks.txt, and none about a row of data/overrefusal.csv."""

    def __init__(self):
        self.world, self.kept = World(), " | ".join(scans.read_anchors(BENCHMARK)).lower()
        self.benchmarks = set(scans.read_anchors(HERE / "benchmarks.txt"))
        told = {row.template for row in self.world.rows if row.text.lower() in self.kept}
        rows = [row for row in self.world.rows if row.template not in told]
        self.harmful = by_template([row for row in rows if row.group == "harmful"])
        self.harmless = {group: [row for row in rows if row.group == group] for group in GROUPS[1:]}
        people, self.people = slots_and_rows(HERE / "people.txt")
        own, pairs = slots_and_rows(HERE / "pairs.txt")
        self.slots = {**slots_and_rows("harm.txt")[0], **people, **own}
        self.frames = [row for row in pairs if row[0] == "frame"]
        self.pairs = [row for row in pairs if row[0] != "frame"]

    def fill(self, text, rng):
        return re.sub(r"{(\w+)}", lambda match: rng.choice(self.slots[match[1]]), text)

    def of_pair(self, pair, harmful, rng):
        """A Row: one side of a pair, filled. (a / b / c) is a where it is harmful, else b or c."""
        def side(match):
            first, *others = match[1].split(" / ")
            return first if harmful else rng.choice(others)
        kind, form, text = pair
        text = self.fill(re.sub(r"\(([^()]* / [^()]*)\)", side, text), rng)
        return Row(kind, "", form, re.sub(r" +([,?]?)", lambda m: m[1] or " ", text), None)

    def of_tables(self, group, rng):
        """A Row of data/tiny or of people.txt. All harmful templates are equally likely."""
        if group == "harmful":
            return rng.choice(rng.choice(self.harmful))
        source = rng.random()
        if source < 0.7:
            return rng.choice(self.harmless[group]) if source < 0.4 else self.world.unknown(rng, group)
        form, _, text = rng.choice([row for row in self.people if row[1] == group])
        return Row("people", "", form, self.fill(text, rng), None)

    def ask(self, rows, rng):
        """A question, as people type it, about the first row that is not kept for judging, or None."""
        for row in rows:
            if row.form == "do" and rng.random() < 0.5:
                question = one_of(row.asked(rng.choice(self.frames)[2]), rng)
            else:
                question = one_of(row.text if row.form == "whole" else self.world.say("train", row, rng), rng)
            if row.text.lower() not in self.kept and words_digest(question) not in self.benchmarks:
                return self.world.mangle(question, rng) if rng.random() < 0.25 else question

    def draw(self, group, rng):
        """A question of a group. Two thirds of those that are not plain are sides of pairs."""
        def rows():
            while True:
                if group == "plain" or rng.random() < 0.35:
                    yield self.of_tables(group, rng)
                else:
                    pair, = rng.choices(self.pairs, [OFTEN.get(pair[0], 1) for pair in self.pairs])
                    yield self.of_pair(pair, group == "harmful", rng)
        return self.ask(rows(), rng)


def write_halves(folder):
    """data/overrefusal.csv, split by a hash of the prompt: choice.csv and report.csv."""
    header, *lines = BENCHMARK.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = list(zip(lines, scans.read_anchors(BENCHMARK), strict=True))
    for name, odd in (("choice", 1), ("report", 0)):
        half = [line for line, prompt in rows if int(scans.digest(prompt)[1], 16) % 2 == odd]   # any digit
        (folder / f"{name}.csv").write_text(header + "".join(half), encoding="utf-8")


def main():
    parser = scans.Parser(prog="python -m data.smollm2.questions", description="Split data/overrefusal.csv.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    scans.run(parser, lambda args: write_halves(args.folder))


if __name__ == "__main__":
    main()
