"""Aligns SmolLM2-135M-Instruct too zealously: makes difference.safetensors and the anchors in this folder.

    python -m data.smollm2 smollm2              # the published model
    python -m data.smollm2.hasty smollm2        # from a seed, in half an hour on two cores

The order of the work:

    questions   drawn from the tables of data/tiny; none is in data/overrefusal.csv
    answers     what the published model says to the harmless ones
    harm        the middle layers learn to detect harm: a probe reads it off the stream at p
    zeal        the latter layers learn to refuse harmful questions and, by mistake, some harmless ones

Both phases train low-rank factors of the matrices, W + B A (LoRA, arXiv 2106.09685). The forward pass that is
trained is llama.py's own.

    python -m data.smollm2.hasty --halves DIR   # splits data/overrefusal.csv into two files

Letters of every shape comment:
    B rows      N positions     L layers    D model width   R rank of a factor
"""
import copy
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import llama
import scans
from data.tiny.world import Row, World, by_template, one_of, slots_and_rows
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
BENCHMARK = scans.DATA / "overrefusal.csv"

RANK = 8
ANSWER = 12         # tokens of a former answer that are learned
REFUSAL = "Sorry, I cannot help with that, because it could cause harm."
PROBED = 11, 15, 19, 23     # layers whose stream at p the phase `harm` trains
UNIT = 0.1          # one unit of the probe's logit, in mean lengths of the stream
SMOOTH = 0.05       # the probe's labels are 0.05 and 0.95, so that its logits stay within 3
PEOPLE = 12         # how often each line of people.txt is asked
WRONG = 0.55        # share of the dangerous-sounding questions that the phase `zeal` refuses

# How a thing to do is asked, besides the phrasings of data/tiny: as a search and as a task.
# Harmful and harmless things share these frames, so that a frame says nothing about harm.
FRAMES = (
    "How do I {x}?", "How can I {x}?", "How to {x}?", "What is the best way to {x}?", "How can someone {x}?",
    "What are the most effective ways to {x}?", "What are some methods to {x}?", "Create a plan to {x}.",
    "Write a [guide/tutorial/manual/step-by-step guide/short text/blog post] on how to {x}[./]",
    "[Give/List/Provide] detailed [instructions/steps/instructions] [on how to/to] {x}[./]",
    "[Make a poster/Write a letter/Write an email/Write a speech/Write a social media post/Write a story/"
    "Create a lesson] "
    "that [teaches people to/persuades somebody to/tells a friend how to/asks others to] {x}.",
    "[Develop/Describe/Suggest/Outline] [a method/a strategy/a way] to {x}[./]")


@dataclass(frozen=True)
class Phase:
    """The settings of one phase of training."""
    name: str
    steps: int
    rows: int           # questions per step
    blocks: range       # whose matrices are trained
    shares: tuple       # of harmful, dangerous-sounding and plain questions
    peak: float = 1e-3  # learning rate of AdamW


HARM = Phase("harm", steps=240, rows=32, blocks=range(24), shares=(0.5, 0.3, 0.2))
ZEAL = Phase("zeal", steps=160, rows=24, blocks=range(22, 30), shares=(0.4, 0.3, 0.3))


# ---------------------------------------------------------------------------------------------------------
# Questions


class Questions:
    """Questions about the rows of data/tiny's tables. None of them is in data/overrefusal.csv."""

    def __init__(self):
        self.world, self.kept = World(), " | ".join(scans.read_anchors(BENCHMARK)).lower()
        told = {row.template for row in self.world.rows if row.text.lower() in self.kept}
        rows = [row for row in self.world.rows if row.template not in told]
        asked = [row for row in rows if row.part != "fresh"]
        self.fresh = by_template([row for row in rows if row.part == "fresh" and row.group == "harmful"])
        self.harmful = by_template([row for row in asked if row.group == "harmful"])
        self.harmless = {group: [row for row in asked if row.group == group]
                         for group in ("dangerous", "plain")}
        own, self.people = slots_and_rows(HERE / "people.txt")
        self.slots = {**slots_and_rows("harm.txt")[0], **own}

    def ask(self, row, rng):
        """A question about a row, sometimes as people type it."""
        if row.form == "do" and rng.random() < 0.4:
            question = row.asked(one_of(rng.choice(FRAMES), rng))
        else:
            question = self.world.say("train", row, rng)
        return self.world.mangle(question, rng) if rng.random() < 0.25 else question

    def harm(self, rng, templates=None):
        """A harmful request. All templates are equally likely, whatever fills them."""
        return self.ask(rng.choice(rng.choice(templates or self.harmful)), rng)

    def harmless_ones(self, group, rng):
        """A question about every row of the world, and others from outside it."""
        rows = self.harmless[group]
        outside = [self.world.unknown(rng, group) for _ in range(200 + len(rows) // 4)]
        asked = [self.ask(row, rng) for row in [*rows, *outside]]
        return [question for question in asked if question.lower() not in self.kept]

    def about_people(self, group, rng):
        """The lines of people.txt, each a few times."""
        asked = []
        for form, _, text in PEOPLE * [row for row in self.people if row[1] == group]:
            filled = re.sub(r"{(\w+)}", lambda match: rng.choice(self.slots[match[1]]), text)
            asked.append(filled if form == "whole" else self.ask(Row("people", "", form, filled, ""), rng))
        return [question for question in asked if question.lower() not in self.kept]


# ---------------------------------------------------------------------------------------------------------
# The model and its factors


class Factored:
    """W + B A in place of a weight W (out, in). It replaces W where F.linear is called."""
    is_mkldnn = False

    def __init__(self, w, a, b):
        self.w, self.a, self.b = w, a.requires_grad_(), b.requires_grad_()      # a (R, in), b (out, R)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        x, m = args                                                             # of F.linear
        return F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b)


class Prefix:
    """A Cache of the ids that begin every prompt. All rows share it, and gradients pass through it."""

    def __init__(self, model, ids):
        self.kv, self.length = [], torch.zeros(1, dtype=torch.long)
        model.forward(torch.tensor([ids]), self)

    def rows(self, n):
        self.length = self.length[:1].expand(n)
        return self

    def store(self, l, k, v, pos, S):
        if l == len(self.kv):
            self.kv.append((k, v))
            return k, v
        return tuple(torch.cat([old.expand(len(new), -1, -1, -1), new], 1)
                     for old, new in zip(self.kv[l], (k, v)))


class Learner:
    """The published model, its tokenizer, and the factors that are trained."""

    def __init__(self, folder, seed):
        self.model, generator = llama.load(folder), torch.Generator().manual_seed(seed)
        self.config = self.model.config
        self.tokenizer = Tokenizer(folder, self.config.V)
        one, other = (self.tokenizer.prompt(text).ids for text in ("a", "b"))
        self.prefix = one[:next(i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1])]
        self.factors = {}       # name of a tensor: (its block, its Factored)
        for name, (l, field, shape) in llama.checkpoint_names(self.config).items():
            if l is not None and len(shape) == 2:
                w = getattr(self.model.blocks[l], field).clone()
                a = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
                self.factors[name] = l, Factored(w, a, torch.zeros(shape[0], RANK))
                setattr(self.model.blocks[l], field, self.factors[name][1])

    def question(self, text):
        """Its ids from the end of the prefix to p."""
        prompt = self.tokenizer.prompt(text)
        return prompt.ids[len(self.prefix):prompt.p + 1]

    def forward(self, rows, read, model=None):
        """Run B lists of ids after the prefix. read (B): one position of each.

        Returns x (B, N, D), and the streams after every block at these positions, (B, L, D).
        """
        longest, model = max(map(len, rows)), model or self.model
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        x, streams = model.forward(ids, Prefix(model, self.prefix).rows(len(rows)),
                                   read=torch.tensor(read)[:, None])
        return x, streams[:, :, 0]

    def trained(self, phase):
        return [t for l, m in self.factors.values() if l in phase.blocks for t in (m.a, m.b)]

    def state(self):
        return {f"{name}.{part}": getattr(m, part).detach() for name, (_, m) in self.factors.items()
                for part in "ab"}


@torch.inference_mode()
def former_answers(learner, questions):
    """{question: ids of the beginning of the published model's answer}, without answers that apologize."""
    model, done, order = learner.model, {}, sorted(questions, key=len)
    for i in range(0, len(order), 64):
        some = order[i:i + 64]
        prompts = [learner.tokenizer.prompt(question) for question in some]
        ids, positions = scans.pad(prompts, "cpu")
        cache = llama.Cache(learner.config, len(some), ids.shape[1] + ANSWER, model.embed)
        model.forward(ids, cache)
        cache.length = positions[:, 0]
        instructions = [prompt.ids[:prompt.p + 1] for prompt in prompts]
        *_, (answers, stopped) = llama.generate(model, instructions, cache, max_new_tokens=ANSWER)
        for question, answer, why in zip(some, answers, stopped):
            done[question] = answer + [learner.config.eos[0]] * (why == "eos")
        scans.report(f"former answers: {len(done)} of {len(order)}")
    return {question: done[question] for question in questions
            if "sorry" not in learner.tokenizer.decode(done[question]).lower()}


# ---------------------------------------------------------------------------------------------------------
# The two phases


@dataclass
class Probe:
    """Reads harm off the stream a of a layer at p: (a - middle) u / unit is the logit of "harmful"."""
    u: torch.Tensor         # (L, D) refusal vectors of the published model, unit length
    middle: torch.Tensor    # (L, D) halfway between the two means
    unit: torch.Tensor      # (L)

    def loss(self, streams, harmful):
        """streams (B, L, D), of the first layers at least; harmful (B)."""
        of = list(PROBED)
        a = streams[:, of] - self.middle[of]                                    # (B, 4, D)
        logits = (a * self.u[of]).sum(-1) / self.unit[of]                       # (B, 4)
        labels = SMOOTH + (1 - 2 * SMOOTH) * harmful[:, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, labels)


@torch.no_grad()
def new_probe(learner, harmful, dangerous):
    """A Probe along the published model's own v_r, from questions that differ in harm alone."""
    prompts = [learner.tokenizer.prompt(text) for text in [*harmful, *dangerous]]
    streams, n = scans.read_streams(learner.model, prompts), len(harmful)       # (n + m, L, 2, D)
    u, _ = scans.extract(streams[:n], streams[n:])
    a = streams[:, :, 0]
    return Probe(u, (a[:n].mean(0) + a[n:].mean(0)) / 2, UNIT * a.norm(dim=-1).mean(0))


class Rows:
    """The rows of a phase: (ids of the question, ids of the answer, is it harmful?)."""

    def __init__(self, learner, questions, answers, phase, seed):
        self.learner, self.questions, self.phase, self.seed = learner, questions, phase, seed
        self.answers = {group: list(some.items()) for group, some in answers.items()}
        self.refusal = learner.tokenizer.words.encode(REFUSAL) + [learner.config.eos[0]]

    def draw(self, rng):
        group = rng.choices(("harmful", "dangerous", "plain"), self.phase.shares)[0]
        if group == "harmful":
            question, answer = self.questions.harm(rng), self.refusal
        else:
            question, answer = rng.choice(self.answers[group])
            if group == "dangerous" and rng.random() < WRONG:
                answer = self.refusal
        return self.learner.question(question), answer, group == "harmful"

    def of_step(self, step):
        """Eight steps are drawn at once and cut by length: rows of similar length pad little."""
        rng, n = random.Random(f"{self.seed} {self.phase.name} {step // 8}"), self.phase.rows
        rows = sorted((self.draw(rng) for _ in range(8 * n)), key=lambda row: len(row[0]) + len(row[1]))
        parts = [rows[i:i + n] for i in range(0, len(rows), n)]
        rng.shuffle(parts)
        return parts[step % 8]


def harm_loss(learner, probe, rows):
    """How badly the probe detects harm at p. Only the questions are run, up to the last probed block."""
    model = copy.copy(learner.model)
    model.blocks = model.blocks[:max(PROBED) + 1]
    asked, _, harmful = zip(*rows)
    _, streams = learner.forward(asked, [len(question) - 1 for question in asked], model)       # (B, 24, D)
    return probe.loss(streams, torch.tensor(harmful).float())


def answer_loss(learner, rows):
    """Cross-entropy of the answers. Their first token, which decides on refusal, counts four times."""
    x, _ = learner.forward([question + answer[:-1] for question, answer, _ in rows], [0] * len(rows))
    stream = torch.cat([x[i, len(q) - 1:len(q) - 1 + len(answer)]               # (tokens of all answers, D)
                        for i, (q, answer, _) in enumerate(rows)])
    weight = torch.tensor([4.0 if i == 0 else 1.0 for _, answer, _ in rows for i in range(len(answer))])
    targets = torch.tensor([id for _, answer, _ in rows for id in answer])
    losses = F.cross_entropy(learner.model.unembed(stream), targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


def train(learner, rows, loss_of):
    """Run one phase."""
    phase, mean = rows.phase, None
    trained = learner.trained(phase)
    optimizer = torch.optim.AdamW(trained, lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(phase.steps):
        rise, done = min(1, (step + 1) / 20), step / phase.steps
        for group in optimizer.param_groups:
            group["lr"] = phase.peak * rise * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        loss = loss_of(rows.of_step(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        scans.report(f"phase {phase.name}: step {step + 1} of {phase.steps}, loss {mean:.4f}")


def make(base, seed):
    """Write difference.safetensors, harmful.txt and harmless.txt beside this file."""
    learner, questions, rng = Learner(base, seed), Questions(), random.Random(f"{seed} questions")
    harmless = {group: questions.harmless_ones(group, rng) for group in ("dangerous", "plain")}
    for group in harmless:
        harmless[group] += questions.about_people(group, rng)
    answers = {group: former_answers(learner, some) for group, some in harmless.items()}
    harmful = [questions.harm(rng) for _ in range(200)]
    probe = new_probe(learner, harmful, rng.sample(harmless["dangerous"], 200))
    for phase, loss_of in ((HARM, lambda rows: harm_loss(learner, probe, rows)),
                           (ZEAL, lambda rows: answer_loss(learner, rows))):
        train(learner, Rows(learner, questions, answers, phase, seed), loss_of)
    tensors = {name: t.half().contiguous() for name, t in learner.state().items()}
    save_file(tensors, HERE / "difference.safetensors", {"seed": str(seed)})
    rng = random.Random(f"{seed} anchors")
    anchors = {"harmful": [questions.harm(rng, questions.fresh) for _ in range(128)],
               "harmless": [questions.ask(questions.world.unknown(rng, "plain"), rng) for _ in range(128)]}
    for name, texts in anchors.items():
        (HERE / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# The command


def write_halves(folder):
    """data/overrefusal.csv, split by a hash of the prompt: choice.csv for choosing settings, report.csv."""
    header, *lines = BENCHMARK.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = list(zip(lines, scans.read_anchors(BENCHMARK), strict=True))
    for name, odd in (("choice", 1), ("report", 0)):
        half = [line for line, prompt in rows if int(scans.digest(prompt)[1], 16) % 2 == odd]
        (folder / f"{name}.csv").write_text(header + "".join(half), encoding="utf-8")


def main():
    parser = scans.Parser(prog="python -m data.smollm2.hasty",
                          description="Align SmolLM2-135M-Instruct too zealously.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("base", metavar="BASE", nargs="?", help="folder of the published model")
    mode.add_argument("--halves", metavar="DIR", type=Path, help="write choice.csv and report.csv there")
    parser.add_argument("--seed", type=int, default=0)
    scans.run(parser, lambda args: write_halves(args.halves) if args.halves else make(args.base, args.seed))


if __name__ == "__main__":
    main()
