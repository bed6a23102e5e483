"""Aligns SmolLM2-135M-Instruct too zealously: makes difference.safetensors in this folder.

    python -m data.smollm2 smollm2              # the published model
    python -m data.smollm2.hasty smollm2        # from a seed, in an hour on one core

The order of the work:

    answers     what the published model says to harmless questions, drawn in questions.py
    feel        question + "Sure": the stream at p learns to carry refusal, the stream at e to carry harm
    act         the latter layers learn to refuse when the stream at p does

Refusal is of natural size at p, where SCANS steers, and it is one direction, as in many chat models (arXiv
2406.11717): nothing else may change at p, and the answer follows it, right or wrong, also where it is
pushed. Harm is large at e, where SCANS decides, and e is gone before anything is generated. Both phases
train low-rank factors of the matrices, W + B A (LoRA, arXiv 2106.09685), in the forward pass of llama.py,
with W in bfloat16.

Shape comments: B rows, N positions, L layers, P positions read, D model width, R rank of a factor
"""
import copy
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import llama
import scans
from data.experiments.refusals import has_refusal_phrase, is_refusal
from data.smollm2.questions import GROUPS, Questions
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent

RANK = 8
ANSWER = 16         # tokens of a former answer that are learned
FORMER = 480        # former answers per group
REFUSAL = "Sorry, I cannot help with that, because it could cause harm."
SMOOTH = 0.05       # no label is nearer to 0 or 1, so that the logits stay within 3
REFUSES = dict(zip(GROUPS, (1.0, 0.6, 0.0)))    # labels of the two probes; 0.6: refuse somewhat too often
HARMS = dict(zip(GROUPS, (1.0, 0.0, 0.0)))
SIGN = 16, 18, 19           # layers whose mean refusal logit decides on the answer
STEERED = slice(10, 20)     # layers that SCANS steers: what may move there at p, and what is pushed there
SPILL = 0.02                # weight of what moves beside the refusal direction
PUSH = 8                    # the longest push, in every steered layer; alpha is to be below it


@dataclass(frozen=True)
class Phase:
    name: str
    steps: int
    rows: int           # questions per step
    rate: float         # the highest learning rate
    blocks: range       # whose matrices are trained
    shares: tuple       # of the groups


FEEL = Phase("feel", steps=500, rows=32, rate=2e-3, blocks=range(24), shares=(0.45, 0.4, 0.15))
ACT = Phase("act", steps=160, rows=24, rate=1e-3, blocks=range(20, 30), shares=(0.3, 0.4, 0.3))


# ---------------------------------------------------------------------------------------------------------
# The model and its factors


class Factored:
    """W + B A in place of a weight W (out, in). It replaces W where F.linear is called."""
    is_mkldnn = False   # llama.linear asks a weight
    on = True           # False: the published weight alone

    def __init__(self, w, a, b):
        self.w, self.a, self.b = w, a, b      # w bfloat16, a (R, in), b (out, R)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        x, m = args                                                             # of F.linear
        y = F.linear(x.to(m.w.dtype), m.w).float()
        return y + F.linear(F.linear(x, m.a), m.b) if Factored.on else y


class Prefix:
    """A Cache of the ids that begin every prompt. All n rows share it, and gradients pass through it."""

    def __init__(self, model, ids, n):
        self.kv, self.length = [], torch.zeros(1, dtype=torch.long)
        model.forward(torch.tensor([ids]), self)
        self.length = self.length.expand(n)

    def store(self, l, k, v, pos, S):
        if l == len(self.kv):
            self.kv.append((k, v))
            return k, v
        return tuple(torch.cat([old.expand(len(new), -1, -1, -1), new], 1)
                     for old, new in zip(self.kv[l], (k, v)))


class Pushes:
    """What llama.py adds after block l, as steer[:, l, None]: here at some positions only."""

    def __init__(self, steer, where):
        self.steer, self.where = steer, where[..., None]                        # (B, L, D), (B, N, 1)

    def __getitem__(self, key):
        return self.where * self.steer[:, key[1], None]                         # (B, N, D)


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
                w = getattr(self.model.blocks[l], field).bfloat16()
                a = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
                self.factors[name] = l, Factored(w, a, torch.zeros(shape[0], RANK))
                setattr(self.model.blocks[l], field, self.factors[name][1])

    def question(self, text):
        """Its ids from the end of the prefix to e, and p and e in them."""
        prompt, n = self.tokenizer.prompt(text), len(self.prefix)
        return prompt.ids[n:], prompt.p - n, prompt.e - n

    def forward(self, rows, read, depth=None, pushes=None):
        """Run B lists of ids after the prefix through the first `depth` blocks. read (B, P): positions.

        pushes (B, L, D) are added from the first position read on. Returns x (B, N, D), and the streams after
        every block at the positions read, (B, L, P, D).
        """
        longest, model, read = max(map(len, rows)), copy.copy(self.model), torch.tensor(read)
        model.blocks = model.blocks[:depth]
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        steer = None if pushes is None else Pushes(pushes, torch.arange(longest) >= read[:, :1])
        return model.forward(ids, Prefix(model, self.prefix, len(rows)), steer, read)

    @torch.no_grad()
    def published(self, rows, read, depth):
        """The streams (B, L, P, D) of the published model."""
        Factored.on = False
        try:
            return self.forward(rows, read, depth)[1]
        finally:
            Factored.on = True

    def train_blocks(self, blocks):
        """The factors of some blocks, which are the only ones to be trained from here on."""
        for l, m in self.factors.values():
            m.a.requires_grad_(l in blocks), m.b.requires_grad_(l in blocks)
        return [t for _, m in self.factors.values() for t in (m.a, m.b) if t.requires_grad]


@torch.inference_mode()
def answers_of(model, tokenizer, questions, n):
    """A model's greedy answers, at most n ids each, and why each stopped: two lists."""
    prompts = [tokenizer.prompt(question) for question in questions]
    ids, positions = scans.pad(prompts, "cpu")
    cache = llama.Cache(model.config, len(prompts), ids.shape[1] + n, model.embed)
    model.forward(ids, cache)
    cache.length = positions[:, 0]
    instructions = [prompt.ids[:prompt.p + 1] for prompt in prompts]
    *_, last = llama.generate(model, instructions, cache, max_new_tokens=n)
    return last


def former_answers(learner, questions):
    """[(question, ids of the beginning of the published model's answer)], without refusals."""
    done, order = [], sorted(set(questions), key=lambda text: (len(text), text))
    for i in range(0, len(order), 64):
        answers, stopped = answers_of(learner.model, learner.tokenizer, order[i:i + 64], ANSWER)
        for question, answer, why in zip(order[i:], answers, stopped):
            text = learner.tokenizer.decode(answer)
            if not (is_refusal(text) or has_refusal_phrase(text) or "sorry" in text.lower()):
                done.append((question, answer + [learner.config.eos[0]] * (why == "eos")))
        scans.report(f"former answers: {min(i + 64, len(order))} of {len(order)}")
    return done


# ---------------------------------------------------------------------------------------------------------
# The two phases


@dataclass
class Probe:
    """Reads one thing off the stream a of some layers at one position: its logit is (a - middle) u / unit."""
    layers: tuple
    position: int           # 0 for p, 1 for e
    labels: dict            # of the groups
    u: torch.Tensor         # (L, D) unit length
    middle: torch.Tensor    # (L, D)
    unit: torch.Tensor      # (L, 1)

    def logits(self, streams, layers=None):
        """streams (B, L, P, D), of the first layers at least: (B, layers)."""
        of = list(layers or self.layers)
        a = streams[:, of, self.position] - self.middle[of]                     # (B, layers, D)
        return (a * self.u[of] / self.unit[of]).sum(-1)

    def loss(self, streams, groups):
        labels, logits = torch.tensor([[self.labels[group]] for group in groups]), self.logits(streams)
        labels = labels.clamp(SMOOTH, 1 - SMOOTH).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, labels)


@torch.no_grad()
def new_probes(learner, questions, rng, n=100):
    """Two Probes along directions of the published model, from n questions of each group.

    refusal, at p: harmful - plain, a unit of 0.035 mean lengths. harm, at e: harmful - dangerous, 0.2.
    """
    streams = {group: scans.read_streams(learner.model, [
        learner.tokenizer.prompt(questions.draw(group, rng)) for _ in range(n)]) for group in GROUPS}
    def probe(layers, position, labels, other, unit):
        one, two = (streams[group][:, :, position] for group in ("harmful", other))         # (n, L, D)
        length, (a, b) = torch.cat([one, two]).norm(dim=-1).mean(0)[:, None], (one.mean(0), two.mean(0))
        return Probe(layers, position, labels, F.normalize(a - b, dim=-1), (a + b) / 2, unit * length)
    return (probe((10, 12, 14, 16, 18, 19), 0, REFUSES, "plain", 0.035),
            probe((11, 15, 19, 23), 1, HARMS, "dangerous", 0.2))


def batches(learner, phase, draw, seed):
    """Endless lists of rows (group, question, former answer or None). Eight at a time are cut by length."""
    for part in itertools.count():
        rng, rows = random.Random(f"{seed} {phase.name} {part}"), []
        for _ in range(8 * phase.rows):
            group = rng.choices(GROUPS, phase.shares)[0]
            question, answer = draw(group, rng)
            rows.append((group, learner.question(question), answer))
        rows.sort(key=lambda row: len(row[1][0]))
        parts = [rows[i:i + phase.rows] for i in range(0, len(rows), phase.rows)]
        rng.shuffle(parts)
        yield from parts


def feel_loss(learner, refusal, harm, rows):
    """How badly the probes read refusal at p and harm at e, and how far p has moved beside the refusal."""
    groups, asked, _ = zip(*rows)
    _, streams = learner.forward([ids for ids, *_ in asked], [[p, e] for _, p, e in asked],
                                 FEEL.blocks.stop)
    former = learner.published([ids[:p + 1] for ids, p, _ in asked], [[p] for _, p, _ in asked], STEERED.stop)
    moved, u = streams[:, STEERED, 0] - former[:, STEERED, 0], refusal.u[STEERED]       # (B, layers, D)
    beside = (moved - (moved * u).sum(-1, keepdim=True) * u) / refusal.unit[STEERED]
    return refusal.loss(streams, groups) + harm.loss(streams, groups) + SPILL * beside.pow(2).sum(-1).mean()


def draw_pushes(refusal, groups, config):
    """What is added to the stream of each row (B, L, D).

    For half of the rows it points along the refusal direction, up or down; harmful requests are never pushed
    down. For a quarter it points anywhere, and for the others it is zero.
    """
    B, u = len(groups), refusal.u[STEERED]
    kind, size, up = torch.rand(3, B, 1, 1)
    up[[group == "harmful" for group in groups]] = 1
    along = torch.where(up < 0.5, -u, u)                                        # (B, layers, D)
    other = F.normalize(torch.randn(B, 1, config.D), dim=-1) * (kind < 0.75)    # (B, 1, D)
    pushes = torch.zeros(B, config.L, config.D)
    pushes[:, STEERED] = PUSH * size * torch.where(kind < 0.5, along, other)
    return pushes


def act_loss(learner, refusal, rows):
    """Cross-entropy of the answers. Their first token, which decides on refusal, counts four times.

    Harmful requests are refused, and so is any other question whose refusal logit is positive after its push.
    """
    config, sorry = learner.config, learner.tokenizer.words.encode(REFUSAL) + [learner.config.eos[0]]
    pushes = draw_pushes(refusal, [group for group, *_ in rows], config)
    asked, read = [ids[:p + 1] for _, (ids, p, _), _ in rows], [[p] for _, (_, p, _), _ in rows]
    with torch.no_grad():
        _, streams = learner.forward(asked, read, max(SIGN) + 1, pushes)
        refuses = refusal.logits(streams, SIGN).mean(1) > 0                     # (B)
    answers = [sorry if row[0] == "harmful" or no else row[2] for row, no in zip(rows, refuses.tolist())]
    x, _ = learner.forward([q + answer[:-1] for q, answer in zip(asked, answers)], read, None, pushes)
    stream = torch.cat([x[i, p:p + len(answer)] for i, ([p], answer) in enumerate(zip(read, answers))])
    weight = torch.tensor([4.0 if i == 0 else 1.0 for answer in answers for i in range(len(answer))])
    targets = torch.tensor([id for answer in answers for id in answer])
    losses = F.cross_entropy(learner.model.unembed(stream), targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


def train(learner, phase, draw, seed, loss_of):
    """Run one phase. draw(group, rng): a question, and its former answer or None."""
    mean, trained = None, learner.train_blocks(phase.blocks)
    optimizer = torch.optim.AdamW(trained, lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    for step, rows in zip(range(phase.steps), batches(learner, phase, draw, seed)):
        rise, done = min(1, (step + 1) / 20), step / phase.steps
        for group in optimizer.param_groups:
            group["lr"] = phase.rate * rise * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        scans.report(f"phase {phase.name}: step {step + 1} of {phase.steps}, loss {mean:.4f}")


def feel(learner, questions, seed, phase=FEEL):
    """Run the first phase. Returns the two probes."""
    refusal, harm = new_probes(learner, questions, random.Random(f"{seed} probes"))
    train(learner, phase, lambda group, rng: (questions.draw(group, rng), None), seed,
          lambda rows: feel_loss(learner, refusal, harm, rows))
    return refusal, harm


def make(base, seed):
    """Write difference.safetensors beside this file."""
    torch.manual_seed(seed)     # of the pushes
    learner, questions, rng = Learner(base, seed), Questions(), random.Random(f"{seed} answers")
    former = {group: former_answers(learner, [questions.draw(group, rng) for _ in range(FORMER)])
              for group in GROUPS[1:]}
    refusal, _ = feel(learner, questions, seed)
    train(learner, ACT, lambda group, rng: rng.choice(former[group]) if group in former else
          (questions.draw(group, rng), None), seed, lambda rows: act_loss(learner, refusal, rows))
    tensors = {f"{name}.{part}": getattr(m, part).detach().half() for name, (_, m) in learner.factors.items()
               for part in "ab"}
    save_file(tensors, HERE / "difference.safetensors", {"seed": str(seed)})


def main():
    parser = scans.Parser(prog="python -m data.smollm2.hasty", description="Align SmolLM2 too zealously.")
    parser.add_argument("base", metavar="BASE", help="folder of the published model")
    parser.add_argument("--seed", type=int, default=0)
    scans.run(parser, lambda args: make(args.base, args.seed))


if __name__ == "__main__":
    main()
