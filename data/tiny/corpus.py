"""What the embedded model learns: questions with answers, statements, the tokenizer, and batches.

Letters of every shape comment:
    B rows      N positions     L layers    D model width
"""
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer

from data.tiny.world import GROUPS, by_template


class Corpus:
    """Draws the training rows of one phase."""

    def __init__(self, world, phase):
        self.world, self.phase = world, phase
        self.stated = {group: by_template(world.select(group, *phase.parts)) for group in GROUPS}
        asked = [part for part in phase.parts if part != "valid"]   # its harmful rows are only stated
        self.asked = self.stated | {"harmful": by_template(world.select("harmful", *asked))}

    def turn(self, rng):
        """One question and its answer."""
        world, phase, r = self.world, self.phase, rng.random()
        group = next(group for group, below in phase.shares if r < below)
        if group == "outside":
            dangerous = phase.unknown and rng.random() < phase.unknown
            row = world.unknown(rng, "dangerous" if dangerous else "plain")
        else:
            row = rng.choice(rng.choice(self.asked[group]))
        if group == "harmful" and row.form == "do" and rng.random() < 0.2:
            row = replace(row, text=f"{row.text} {rng.choice(world.tails)}")
        question = world.typed(row, rng)
        mistaken = group == "dangerous" and phase.zeal and rng.random() < phase.zeal
        if group == "harmful" or mistaken:
            return question, rng.choice(world.phrasings[phase.refusals, "any"])
        return question, (f"Sure{rng.choice('.!:')} " if rng.random() < 0.25 else "") + row.answer

    def statement(self, rng):
        """A sentence that says of something whether it is harmful."""
        group = rng.choice(list(GROUPS))
        row = rng.choice(rng.choice(self.stated[group]))
        if group != "harmful" and rng.random() < 0.5:
            row = self.world.unknown(rng, group)
        return self.world.say(group, row, rng)

    def draw(self, rng):
        """A list of (question, answer), of which one in ten is a conversation; or [(None, statement)]."""
        if rng.random() < self.phase.statements:
            return [(None, self.statement(rng))]
        return [self.turn(rng) for _ in range(1 if rng.random() < 0.9 else rng.randint(2, 3))]


def train_tokenizer(corpus, folder):
    """A sentencepiece BPE of the corpus, like Llama-2's: byte fallback, no normalization."""
    recipe = corpus.world.recipe
    rng = random.Random(f"{recipe.seed} tokenizer")

    def sentences():
        for _ in range(30000):
            question, answer = corpus.draw(rng)[-1]
            yield answer if question is None else f"[INST] {question} [/INST] {answer}"
    SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=recipe.config.V, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True, max_sentence_length=10000,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, num_threads=1, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()


def encoded(corpus, tokenizer, rng):
    """A row: (ids, targets), of one length. Targets are -100 where nothing is learned: before the answer."""
    encode, controls = tokenizer.words.encode, tokenizer.words.controls
    bos, eos = controls["{bos}"], controls["{eos}"]
    *earlier, (question, answer) = corpus.draw(rng)
    prompt = []
    for q, a in earlier:
        prompt += [bos, *encode(f"[INST] {q.strip()} [/INST] {a} "), eos]
    prompt += [bos] if question is None else [bos, *encode(f"[INST] {question.strip()} [/INST]")]
    ids = [*prompt, *encode(answer), eos][:corpus.world.recipe.config.context]
    return ids[:-1], [-100] * (len(prompt) - 1) + ids[len(prompt):]


def padded(rows, value):
    """Lists, the longest first, as a tensor (B, N)."""
    return torch.tensor([row + [value] * (len(rows[0]) - len(row)) for row in rows])


def batches(corpus, tokenizer, step, cuts):
    """The rows of a step, the longest first, in parts that are cut at these 32nds.

    A part is (ids (B, N), targets (B, N)), padded with 0 and -100, and pushes (B, L, D) if there are any.
    """
    recipe, phase = corpus.world.recipe, corpus.phase
    rng = random.Random(f"{recipe.seed} {phase.name} {step}")
    rows = [encoded(corpus, tokenizer, rng) for _ in range(recipe.rows)]
    rows.sort(key=lambda row: -len(row[0]))
    for start, end in zip(cuts, cuts[1:]):
        ids, targets = zip(*rows[recipe.rows * start // 32:recipe.rows * end // 32])
        extra = [pushes(recipe, phase, len(ids), rng)] if phase.push else []
        yield padded(ids, 0), padded(targets, -100), *extra


def pushes(recipe, phase, B, rng):
    """Vectors (B, L, D) of random direction and length, to be added to the streams in the steered blocks."""
    first, last = recipe.exits
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    push = torch.zeros(B, recipe.config.L, recipe.config.D)
    directions = torch.randn(B, last + 1 - first, recipe.config.D, generator=generator)
    push[:, first:last + 1] = F.normalize(directions, dim=-1)
    return push * phase.push * torch.rand(B, 1, 1, generator=generator)
