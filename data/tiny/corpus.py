"""What the embedded model learns: question and answer, statements, the tokenizer made from them, and batches.

    B  rows of a batch      T  tokens of the longest row      L, D  blocks and width of the model
"""
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer

from data.tiny.world import GROUPS, by_template
from tokenizer import BOS, EOS


class Corpus:
    """Draws the training rows of one phase."""

    def __init__(self, world, phase):
        self.world, self.phase = world, phase
        self.stated = {group: by_template(world.select(group, *phase.parts)) for group in GROUPS}
        asked = [part for part in phase.parts if part != "valid"]   # harmful ones of valid are only stated
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
        mistaken = group == "dangerous" and phase.zeal is not None and rng.random() < phase.zeal
        if group == "harmful" or mistaken:
            return question, rng.choice(world.phrasings[phase.refusals, "any"])
        return question, (f"Sure{rng.choice('.!:')} " if rng.random() < 0.25 else "") + row.answer

    def statement(self, rng):
        """A sentence on what is harmful, what only sounds dangerous, and what not even that."""
        group = rng.choice(list(GROUPS))
        row = rng.choice(rng.choice(self.stated[group]))
        if group != "harmful" and rng.random() < 0.5:
            row = self.world.unknown(rng, group)
        return self.world.say(group, row, rng)

    def draw(self, rng):
        """(history, question, answer), or (None, None, statement)."""
        if rng.random() < self.phase.statements:
            return None, None, self.statement(rng)
        turns = [self.turn(rng) for _ in range(1 if rng.random() < 0.9 else rng.randint(2, 3))]
        return turns[:-1], *turns[-1]


def train_tokenizer(corpus, folder):
    """A sentencepiece BPE of the corpus, in the fashion of Llama-2's: byte fallback, no normalisation."""
    recipe = corpus.world.recipe
    rng = random.Random(f"{recipe.seed} tokenizer")

    def sentences():
        for _ in range(30000):
            _, question, answer = corpus.draw(rng)
            yield answer if question is None else f"[INST] {question} [/INST] {answer}"
    SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=recipe.config.V, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True, max_sentence_length=10000,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, num_threads=1, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()


def encoded(corpus, tokenizer, rng):
    """A row drawn: (ids, targets), of one length. Targets are -100 in the question, which is not learnt."""
    history, question, answer = corpus.draw(rng)
    if question is None:
        prompt, text = [], tokenizer.encode([BOS, answer, EOS])
    else:
        made = tokenizer.prompt(question, history)
        prompt, text = made.ids[:made.p + 1], tokenizer.encode([answer, EOS])
    ids = (prompt + text)[:corpus.world.recipe.config.context]
    return ids[:-1], [-100] * (len(prompt) - 1) + ids[max(len(prompt), 1):]


def padded(rows, value):
    """Lists, the longest first, as a tensor (B, T)."""
    return torch.tensor([row + [value] * (len(rows[0]) - len(row)) for row in rows])


def batches(corpus, tokenizer, step, cuts):
    """The rows of a step, the longest first, in parts, cut at these 32nds.

    A part is (ids (B, T), targets (B, T)), padded with 0 and -100; then pushes (B, L, D), if any.
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
    """Vectors (B, L, D) that are added to the streams of B rows in the steered blocks.

    Their directions are random, and their lengths too, up to phase.push.
    """
    first, last = recipe.exits
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    push = torch.zeros(B, recipe.config.L, recipe.config.D)
    directions = torch.randn(B, last + 1 - first, recipe.config.D, generator=generator)
    push[:, first:last + 1] = F.normalize(directions, dim=-1)
    return push * phase.push * torch.rand(B, 1, 1, generator=generator)
