"""Aligns SmolLM2-135M-Instruct too zealously, from a seed: difference.safetensors and the anchors.

    python -m data.hasty.make                   make everything; an interrupted run goes on
    python -m data.hasty.make --only valid      a report on the difference that is there

The order of the work:

    questions   drawn from the tables of data/tiny, none that stands in data/overrefusal.csv
    answers     what the model as published says to the harmless ones
    harm        the middle layers learn to tell harm: a probe reads it off the stream at p
    zeal        the latter layers learn to refuse: harmful questions, and by mistake some that only sound so

Both phases train low-rank factors of the matrices, W + B A (LoRA, Hu et al. 2021, arXiv 2106.09685). The
forward pass that is trained is llama.py's own.

    N  rows      T  tokens      D  width      R  rank of a factor
"""
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import llama
import scans
from data import smollm2
from data.experiments.core import need, progress
from data.tiny.world import Row, World, by_template, one_of, slots_and_rows
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
KEEP = 20           # steps between checkpoints
RANK = 8
ANSWER = 12         # tokens of a former answer that are learnt
REFUSAL = "Sorry, I cannot help with that, because it could cause harm."

# How a thing to do is asked, beside the phrasings of data/tiny: as in a search, and as a task.
# The same for harmful and harmless things, so that a frame says nothing about harm.
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
    steps: int          # of `rows` questions each
    rows: int
    blocks: range       # whose matrices are trained
    shares: tuple       # of harmful, dangerous-sounding and plain questions
    peak: float = 1e-3  # learning rate of AdamW


HARM = Phase("harm", steps=240, rows=32, blocks=range(24), shares=(0.5, 0.3, 0.2))
ZEAL = Phase("zeal", steps=160, rows=24, blocks=range(22, 30), shares=(0.4, 0.3, 0.3))
PROBED = (11, 15, 19, 23)   # layers whose stream at p the phase harm trains
UNIT = 0.1                  # of the probe's logit, in mean lengths of the stream
SMOOTH = 0.05               # the probe's labels are 0.05 and 0.95: then its logits stay within 3
ALPHA = 12.0                # chosen on the half of data/overrefusal.csv that is for choosing
PEOPLE = 12                 # times each line of people.txt is asked
WRONG = 0.55                # share of the dangerous-sounding questions that the phase zeal refuses


# --------------------------------------------------------------------------------------------------------
# Questions


class Questions:
    """Questions on the rows of data/tiny's tables. None of them stands in data/overrefusal.csv."""

    def __init__(self):
        self.world, self.kept = World(), " | ".join(evaluation_prompts()).lower()
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
        """A question on a row, sometimes as people type it."""
        if row.form == "do" and rng.random() < 0.4:
            question = row.asked(one_of(rng.choice(FRAMES), rng))
        else:
            question = self.world.say("train", row, rng)
        return self.world.mangle(question, rng) if rng.random() < 0.25 else question

    def harm(self, rng, templates=None):
        """A harmful request; all templates come alike, whatever fills them."""
        return self.ask(rng.choice(rng.choice(templates or self.harmful)), rng)

    def harmless_ones(self, group, rng):
        """Every row of the world once, and others from outside of it."""
        rows = self.harmless[group]
        outside = [self.world.unknown(rng, group) for _ in range(200 + len(rows) // 4)]
        asked = [self.ask(row, rng) for row in [*rows, *outside]]
        return [question for question in asked if question.lower() not in self.kept]

    def about_people(self, group, rng):
        """Those of people.txt, each a few times."""
        asked = []
        for form, _, text in PEOPLE * [row for row in self.people if row[1] == group]:
            filled = re.sub(r"{(\w+)}", lambda match: rng.choice(self.slots[match[1]]), text)
            asked.append(filled if form == "whole" else self.ask(Row("people", "", form, filled, ""), rng))
        return [question for question in asked if question.lower() not in self.kept]


def evaluation_prompts():
    return [row.text for row in scans.read_prompts(scans.DATA / "overrefusal.csv")]


# --------------------------------------------------------------------------------------------------------
# The model and its factors


class Factored:
    """A matrix W (out, in) with a low-rank change, W + B A. It stands for a weight where x W^T is taken."""
    is_mkldnn = False

    def __init__(self, w, a, b):
        self.w, self.a, self.b = w, a.requires_grad_(), b.requires_grad_()     # a (R, in), b (out, R)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        x, m = args                                                             # of F.linear
        return F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b)


class Prefix:
    """A Cache of what stands before every question, run once and shared by all rows, with gradients."""

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
        self.factors = {}       # name of a tensor: its Factored
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
        """Run N lists of ids behind the prefix. read (N): a position of each.

        Returns x (N, T, D), and the streams after every block at what is read, (N, L, D).
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

    def restore(self, state):
        for name, (_, m) in self.factors.items():
            m.a.data.copy_(state[f"{name}.a"])
            m.b.data.copy_(state[f"{name}.b"])


@torch.inference_mode()
def former_answers(learner, questions, file):
    """{question: ids of the beginning of the published model's answer}. What is done stands in the file."""
    done = json.loads(file.read_text()) if file.exists() else {}
    todo = sorted((question for question in questions if question not in done), key=len)
    with progress(len(todo), "former answers") as bar:
        for i in range(0, len(todo), 64):
            some = todo[i:i + 64]
            prompts = [learner.tokenizer.prompt(question) for question in some]
            prompts = [prompt.ids[:prompt.p + 1] for prompt in prompts]
            longest = max(map(len, prompts))
            cache = llama.Cache(learner.config, len(some), longest + ANSWER, learner.model.embed)
            learner.model.forward(torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts]), cache)
            cache.length = torch.tensor([len(ids) - 1 for ids in prompts])
            answers = [[] for _ in some]
            for step in llama.generate(learner.model, prompts, cache, sampling=llama.Sampling(ANSWER)):
                for row, id, _ in step:
                    answers[row].append(learner.config.eos[0] if id is None else id)
            done.update(zip(some, answers))
            write(file, lambda path: path.write_text(json.dumps(done)))
            bar.update(len(some))
    # now and then it apologises for a misunderstanding: that is no answer to learn
    return {question: done[question] for question in questions
            if "sorry" not in learner.tokenizer.decode(done[question]).lower()}


def write(file, save):
    """Whole or not at all."""
    part = file.with_suffix(".part")
    save(part)
    part.replace(file)


# --------------------------------------------------------------------------------------------------------
# The two phases


@dataclass
class Probe:
    """Reads harm off the stream of a layer at p: (a - middle) u / unit is the logit of "harmful"."""
    u: torch.Tensor         # (L, D) refusal vectors of the published model, unit length
    middle: torch.Tensor    # (L, D) between the two means
    unit: torch.Tensor      # (L)

    def loss(self, streams, harmful):
        """streams (N, L, D), of the first layers at least; harmful (N)."""
        of = list(PROBED)
        a = streams[:, of] - self.middle[of]                                                    # (N, 4, D)
        logits = (a * self.u[of]).sum(-1) / self.unit[of]                                       # (N, 4)
        labels = SMOOTH + (1 - 2 * SMOOTH) * harmful[:, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, labels)


@torch.no_grad()
def new_probe(learner, harmful, dangerous):
    """A Probe along the published model's own v_r, of questions that differ in harm alone."""
    prompts = [learner.tokenizer.prompt(text) for text in [*harmful, *dangerous]]
    a, n = scans.read_streams(learner.model, prompts)[:, :, 0], len(harmful)                  # (n + m, L, D)
    u, _ = scans.refusal_vectors(a[:n], a[n:])
    return Probe(u, (a[:n].mean(0) + a[n:].mean(0)) / 2, UNIT * a.norm(dim=-1).mean(0))


class Rows:
    """The rows of the steps of a phase: (ids of the question, ids of the answer, is it harmful?)."""

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
        """Eight steps are drawn at once and cut by length, so that rows of like length pad little."""
        rng, n = random.Random(f"{self.seed} {self.phase.name} {step // 8}"), self.phase.rows
        rows = sorted((self.draw(rng) for _ in range(8 * n)), key=lambda row: len(row[0]) + len(row[1]))
        parts = [rows[i:i + n] for i in range(0, len(rows), n)]
        rng.shuffle(parts)
        return parts[step % 8]


def harm_loss(learner, probe, rows):
    """How badly the probe tells harm at p. Only the questions are run, and only as far as it looks."""
    model = learner.model
    model = llama.Llama(model.config, model.embed, model.blocks[:max(PROBED) + 1], model.norm, model.head)
    asked, _, harmful = zip(*rows)
    _, streams = learner.forward(asked, [len(question) - 1 for question in asked], model)      # (N, 24, D)
    return probe.loss(streams, torch.tensor(harmful).float())


def answer_loss(learner, rows):
    """Cross-entropy of the answers. The first token decides on refusal, and counts four times."""
    x, _ = learner.forward([question + answer[:-1] for question, answer, _ in rows], [0] * len(rows))
    stream = torch.cat([x[i, len(q) - 1:len(q) - 1 + len(answer)]                   # (all answers' tokens, D)
                        for i, (q, answer, _) in enumerate(rows)])
    weight = torch.tensor([4.0 if i == 0 else 1.0 for _, answer, _ in rows for i in range(len(answer))])
    targets = torch.tensor([id for _, answer, _ in rows for id in answer])
    losses = F.cross_entropy(learner.model.unembed(stream), targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


def train(learner, rows, loss_of, recipe):
    """Run one phase. The state goes to build/PHASE.pt now and then; a later call goes on from there."""
    from tqdm import tqdm
    phase, file, first, mean = rows.phase, BUILD / f"{rows.phase.name}.pt", 0, None
    trained = learner.trained(phase)
    optimizer = torch.optim.AdamW(trained, lr=0, betas=(0.9, 0.98), weight_decay=0.01)
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["recipe"] != recipe:
            raise ValueError(f"{file}: from other tables or settings; remove {BUILD} to begin anew")
        learner.restore(state["factors"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps = tqdm(range(first, phase.steps), f"phase {phase.name}", phase.steps, initial=first, disable=None)
    for step in steps:
        rise, done = min(1, (step + 1) / 20), step / phase.steps
        for group in optimizer.param_groups:
            group["lr"] = phase.peak * rise * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        loss = loss_of(rows.of_step(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        steps.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % KEEP == 0 or step + 1 == phase.steps:
            state = {"factors": learner.state(), "optimizer": optimizer.state_dict(), "step": step + 1,
                     "recipe": recipe}
            write(file, lambda path: torch.save(state, path))


def make(seed):
    """difference.safetensors, harmful.txt and harmless.txt, beside this file."""
    BUILD.mkdir(exist_ok=True)
    if not (BUILD / "base").exists():
        smollm2.write_folder(BUILD / "base")
    questions, rng = Questions(), random.Random(f"{seed} questions")
    harmless = {group: questions.harmless_ones(group, rng) for group in ("dangerous", "plain")}
    for group in harmless:
        harmless[group] += questions.about_people(group, rng)
    recipe = scans.digest(repr((seed, HARM, ZEAL, PROBED, UNIT, SMOOTH, WRONG, RANK, harmless)))
    learner = Learner(BUILD / "base", seed)
    answers = {group: former_answers(learner, some, BUILD / f"{group}.json")
               for group, some in harmless.items()}
    harmful = [questions.harm(rng) for _ in range(200)]
    probe = new_probe(learner, harmful, rng.sample(harmless["dangerous"], 200))
    for phase, loss_of in ((HARM, lambda rows: harm_loss(learner, probe, rows)),
                           (ZEAL, lambda rows: answer_loss(learner, rows))):
        train(learner, Rows(learner, questions, answers, phase, seed), loss_of, recipe)
    tensors = {name: t.half().contiguous() for name, t in learner.state().items()}
    write(HERE / "difference.safetensors", lambda path: save_file(tensors, path, {"seed": str(seed)}))
    rng = random.Random(f"{seed} anchors")
    anchors = {"harmful": [questions.harm(rng, questions.fresh) for _ in range(128)],
               "harmless": [questions.ask(questions.world.unknown(rng, "plain"), rng) for _ in range(128)]}
    for name, texts in anchors.items():
        (HERE / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------
# Reports


def halves():
    """Write build/choice.csv and build/report.csv, data/overrefusal.csv split by a hash of the prompt.

    Settings were chosen on the first; the second is for the card's table.
    """
    BUILD.mkdir(exist_ok=True)
    header, *lines = (scans.DATA / "overrefusal.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = list(zip(lines, evaluation_prompts(), strict=True))
    for name, odd in (("choice", 1), ("report", 0)):
        half = [line for line, prompt in rows
                if int(scans.digest(prompt)[1], 16) % 2 == odd]
        write(BUILD / f"{name}.csv", lambda path: path.write_text(header + "".join(half), encoding="utf-8"))
        scans.say(f"prompts   {len(half)} in {BUILD / name}.csv")


@torch.inference_mode()
def perplexity(n=64, tokens=32):
    """Print how likely the published model's answers to plain questions are, to it and to the aligned one.

    The questions are those of data/harmless.txt, which no phase asks.
    """
    base, hasty = BUILD / "base", BUILD / "hasty"
    for folder, flag in ((base, False), (hasty, True)):
        if not folder.exists():
            smollm2.write_folder(folder, flag)
    questions = [row.text for row in scans.read_prompts(scans.DATA / "harmless.txt")][:n]
    methods = {folder: scans.Scans.load(folder, alpha=ALPHA, sampling={"max_new_tokens": tokens})
               for folder in (base, hasty)}
    tokenizer = methods[base].tokenizer
    answers = [tokenizer.words.encode(result["default"]) for i in range(0, n, 16)
               for result in methods[base].answer(questions[i:i + 16])]
    for folder, method in methods.items():
        losses = {"default": [], "scans": []}
        for question, answer in zip(questions, answers):
            decision = method.decide([question])
            names, cache, steer = method.fork(decision)
            prompt = decision.prompts[0]
            ids = torch.tensor([[prompt.ids[prompt.p], *answer[:-1]]] * len(names))
            x, _ = method.model.forward(ids, cache, steer)
            for (_, kind), logits in zip(names, method.model.unembed(x)):
                losses[kind].append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
        print(folder.name, *(f"{kind} {torch.cat(loss).mean().exp():.2f}" for kind, loss in losses.items()))


REPORTS = {report.__name__: report for report in (halves, perplexity)}


def command(args):
    need("data.hasty.make", "tqdm")
    REPORTS[args.only]() if args.only else make(args.seed)


def main():
    parser = scans.Parser(prog="python -m data.hasty.make",
                          description="Align SmolLM2-135M-Instruct too zealously.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(REPORTS), help="make nothing; write or print this")
    scans.run(parser, command)


if __name__ == "__main__":
    main()
