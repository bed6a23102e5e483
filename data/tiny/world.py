"""The world of the embedded model: the tables, their split, and how their rows are asked about.

    world.txt       what the model can answer
    harm.txt        what it refuses
    outside.txt     what it does not know
    phrasings.txt   how things are asked
    dev.txt         questions for choosing settings and anchors; no phase asks them
    checks.txt      questions for a report; no phase asks the harmful ones

A hash of its text puts every row into one part of the split, before any training:

    align   40%   all phases; 60% of the plain rows
    valid   10%   phases one and sturdy; for choosing settings, and for the harmful anchors
    taught  35%   phases one and sturdy; 15% of the plain rows; kind (a) of the results
    fresh   15%   no phase; kind (b). Of the harmful ones whole templates, with everything that fills them
    word          no phase, and neither is its dangerous word; kind (c)

Harmful rows of valid are stated to be harmful, but never asked about.
"""
import hashlib
import itertools
import random
import re
from dataclasses import dataclass, replace

from data.tiny.recipe import HERE, Recipe

UNKNOWN = "I only know a few everyday things."
GROUPS = {"dangerous": "dangerous-sounding but harmless", "harmful": "harmful", "plain": "plain harmless"}
FORM = {"definitions": "thing", "historical_events": "thing", "privacy_public": "thing",
        "privacy_fictional": "thing", "fact": "thing",
        "nons_group_real_discr": "ask", "real_group_nons_discr": "ask"}     # all other kinds are things to do
LIGHT = set("the and for from with that into out off how what who why are was should not one two".split())
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Row:
    """One thing that can be asked about."""
    kind: str           # XSTest's type, or plain, fact, other
    word: str           # the dangerous word, "" if there is none
    form: str           # do, thing or ask: which phrasings fit
    text: str
    answer: str | None  # None for harm, which is refused
    template: str = ""  # the text before its {slots} were filled
    part: str = ""

    @property
    def group(self):
        if self.answer is None:
            return "harmful"
        return "plain" if self.kind in ("plain", "fact") else "dangerous"

    def asked(self, phrasing):
        """The row in a phrasing, which contains {x} or {X}."""
        return phrasing.format(x=self.text, X=self.text[0].upper() + self.text[1:])


# ---------------------------------------------------------------------------------------------------------
# Tables and texts


def lines(name):
    """The rows of a table beside this file: lists of stripped cells."""
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            yield [cell.strip() for cell in line.split("|")]


def dev_questions(group):
    """The questions of dev.txt in a group, harmful or dangerous."""
    return [question for label, question in lines("dev.txt") if label == group]


def slots_and_rows(name):
    """({name of a slot: its entries}, the other rows) of a table that has slots."""
    rows = list(lines(name))
    slots = {row[1]: row[2].split(", ") for row in rows if row[0] == "slot"}
    return slots, [row for row in rows if row[0] != "slot"]


def fillings(text, slots):
    """Every sentence that a text with {slots} can become."""
    names = re.findall(r"{(\w+)}", text)
    for values in itertools.product(*(slots[name] for name in names)):
        filled = iter(values)
        yield re.sub(r"{\w+}", lambda _: next(filled), text)


def one_of(text, rng):
    """A sentence, with a capital letter, from a text with [choices/like/these]."""
    text = re.sub(r"\[(.*?)\]", lambda m: rng.choice(m[1].split("/")), text)
    return text[0].upper() + text[1:]


def forms_of(word):
    """A pattern that finds a dangerous word, or one of several/like/these, in its usual forms."""
    def pattern(word):
        stem, last = re.escape(word.removesuffix("e")), re.escape(word[-1])
        return rf"\b{stem}e?{last}?(?:s|es|d|ed|ing|er|ers)?\b"
    return "|".join(map(pattern, word.split("/")))


def content(text):
    """The content words of a text, without the s of a plural."""
    return {word.rstrip("s") for word in re.findall(r"[a-z]{3,}", text.lower())} - LIGHT


def by_template(rows):
    """One list of rows per template, so that a template with many slots does not crowd out the others."""
    groups = {}
    for row in rows:
        groups.setdefault(row.template, []).append(row)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------
# The world


class World:
    """All tables, read and split."""

    def __init__(self, recipe=Recipe()):
        self.recipe = recipe
        self.checked = " | ".join(" ".join(cells).lower() for cells in lines("checks.txt"))
        self.rows = self.read_rows()
        self.read_phrasings()
        self.read_outside()
        self.using = {}     # content word: the content words of every row of world.txt that has it
        for words in (content(row.text) for row in self.rows if row.answer):
            for word in words:
                self.using.setdefault(word, []).append(words)

    def read_rows(self):
        """The rows of world.txt and harm.txt, with their parts. self.never finds the excluded words."""
        rows = [Row(kind, word, FORM.get(kind, "do"), text, answer, text)
                for kind, word, text, answer in lines("world.txt")]
        slots, requests = slots_and_rows("harm.txt")
        self.tails = slots["tail"]
        for kind, word, text in requests:
            form, _, rest = text.partition(": ")
            form, text = (form, rest) if form in ("ask", "thing") else ("do", text)
            rows += [Row(kind, word, form, filled, None, text) for filled in fillings(text, slots)
                     if re.split(" (?:in|with) ", filled.lower())[0] not in self.checked]
        words = sorted({row.word for row in rows if row.word and row.group == "dangerous"})
        unused = [word for word in words if self.fraction("word " + word) < 0.12]
        self.never = re.compile("|".join(map(forms_of, unused)), re.IGNORECASE)
        unique = {row.text: row for row in reversed(rows)}  # of equal texts the first counts
        return [replace(row, part=self.part(row)) for row in unique.values()]

    def read_phrasings(self):
        self.phrasings = {}                         # (part, form): texts
        self.held_out, self.frame_words = {}, []    # both serve loosen()
        for part, form, text in lines("phrasings.txt"):
            self.phrasings.setdefault((part, form), []).append(text)
            if part == "train":
                self.frame_words += re.findall("[a-z]+", text.lower().replace("{x}", ""))
            elif part in ("valid", "test"):
                self.held_out.setdefault(form, []).append(text.rstrip(".?").lower())

    def read_outside(self):
        """The questions of outside.txt, as many times as their fourth column says."""
        slots, questions = slots_and_rows("outside.txt")
        self.slots = {name: [value for value in values if not self.never.search(value)]
                      for name, values in slots.items()}
        self.outside = {"plain": [], "dangerous": []}
        for form, sounds, text, *n in questions:
            if not self.never.search(text):
                self.outside[sounds] += [(form, text)] * (int(n[0]) if n else 1)

    def fraction(self, text):
        """A number in [0, 1) that depends on the text and the salt alone."""
        digest = hashlib.sha256(f"{self.recipe.salt} {text}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    def part(self, row):
        if self.never.search(row.text):
            return "word"
        # harmful templates are held out whole: another person is not another deed
        whole = row.text if row.answer else "template " + row.template
        if self.never.search(row.answer or "") or self.fraction(whole) >= 0.85:
            return "fresh"
        f = self.fraction(row.text)
        # more of the plain rows: a round of alignment contains much everyday talk
        if f < 0.4 or row.group == "plain" and f >= 0.65:
            return "align"
        return "valid" if f < 0.5 else "taught"

    def select(self, group, *parts):
        return [row for row in self.rows if row.group == group and row.part in parts]

    def phrase(self, part, row):
        """Every way in which the valid or the test phrasings ask about a row."""
        return [row.asked(text) for text in self.phrasings[part, row.form]]

    def questions(self, group, part, phrasing, n):
        """n different pairs (row, question) of a part of the split, in the valid or the test phrasings.

        The templates take turns.
        """
        rng = random.Random(f"0 {group} {part}")
        queues = [[(row, question) for row in rows for question in self.phrase(phrasing, row)]
                  for rows in by_template(self.select(group, part))]
        for queue in queues:
            rng.shuffle(queue)
        rng.shuffle(queues)
        return [pair for turn in itertools.zip_longest(*queues) for pair in turn if pair][:n]

    def say(self, part, row, rng, loose=0.0):
        """One sentence about a row in a phrasing of that part, loosened in a share `loose` of cases."""
        text = one_of(rng.choice(self.phrasings[part, row.form]), rng)
        if rng.random() < loose:
            text = self.loosen(text, row.form, rng)
        return row.asked(text)

    def loosen(self, text, form, rng):
        """A phrasing with some words dropped and some replaced, so that the model relies on them less.

        It never contains a held-out phrasing.
        """
        while True:
            words = []
            for word in text.split():
                r = rng.random()
                if "{" in word or r > 0.3:
                    words.append(word)
                elif r < 0.15:
                    words.append(rng.choice(self.frame_words))
            loosened = " ".join(words)
            if not any(held_out in loosened.lower() for held_out in self.held_out[form]):
                return loosened

    def typed(self, row, rng):
        """A question about a row in the train phrasings, as people type it."""
        return self.mangle(self.say("train", row, rng, self.recipe.loose), rng)

    def mangle(self, question, rng):
        """What people do to a question: greet, add a sentence, drop the question mark, mistype, shout."""
        if rng.random() < 0.15:
            question = self.around("before", rng) + " " + question
        if rng.random() < 0.15:
            question += " " + self.around("after", rng)
        if rng.random() < 0.15:
            question = question.rstrip("?.!")
        for _ in range(rng.choice([1, 1, 2]) if rng.random() < 0.3 else 0):
            i = rng.randrange(1, len(question))
            pair = question[i - 1:i + 1]
            if pair.isalpha():      # two letters swapped, one lost, doubled or wrong
                a, b = pair
                wrong = rng.choice([b + a, b, a + a + b, a + rng.choice(LETTERS)])
                question = question[:i - 1] + wrong + question[i + 1:]
        r = rng.random()
        if r < 0.14:
            return question.lower()
        return question.upper() if r < 0.14 + self.recipe.capitals else question

    def around(self, part, rng):
        """A sentence to put before or after a question."""
        return self.fill(one_of(rng.choice(self.phrasings[part, "any"]), rng), rng)

    def fill(self, text, rng):
        """The text with each of its {slots} filled; an entry can have slots of its own."""
        return re.sub(r"{(\w+)}", lambda m: self.fill(rng.choice(self.slots[m[1]]), rng), text)

    def is_like_a_row(self, text):
        """Whether a text shares two content words with a row of world.txt, or the only one that a row has."""
        words = content(text)
        rows = (row for word in words for row in self.using.get(word, ()))
        return any(len(words & row) >= min(2, len(row)) for row in rows)

    def unknown(self, rng, sounds):
        """A row from outside the world, plain or dangerous in sound, unlike all of world.txt."""
        while True:
            form, text = rng.choice(self.outside[sounds])
            filled = self.fill(text, rng)
            if not self.is_like_a_row(filled) and filled.lower() not in self.checked:
                return Row("outside", "", form, filled, UNKNOWN)
