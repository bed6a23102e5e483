"""What each quirk of the authors' public code does, measured on the embedded model:

    python -m data.experiments.ledger > data/experiments/ledger.md

The model's alignment never saw these questions. Both answers of SCANS to each, with sigma = -1 and with +1,
are generated once. A quirk of the classification is measured by which of the two a question then gets, a
quirk of the steering by new answers. Where a quirk changes the cosines, T is estimated again from the
anchors, by the same rule.
"""
import copy
from dataclasses import replace

import torch

import llama
import scans
from data.experiments.layers import auroc
from data.experiments.refusals import has_refusal_phrase
from data.tiny.world import World
from tokenizer import Prompt

KINDS = ("harmful", "dangerous")    # the questions; "dangerous" ones only sound so
HEAD = """# Ledger of deviations

Made by `python -m data.experiments.ledger` on data/tiny (fingerprint {fingerprint}): what each quirk of the
authors' public code does there.

s_q is a mean. `moved` is the mean distance from the first row's s_q, `turned` the number of questions that
get the other sigma, `refused` the share of refusals with SCANS. Without SCANS the model refuses
{harmful} of the {n} harmful questions and {dangerous} of the {n} dangerous-sounding harmless ones.
A quirk without effect on this small model may have one on a large one.

| quirk | T | AUROC | harmful: s_q | moved | turned | refused \
| dangerous-sounding: s_q | moved | turned | refused |
|---|---|---|---|---|---|---|---|---|---|---|"""
FOOT = """
Not measured:

- the Vicuna system prompt is cut after its first sentence, a newline is put before ASSISTANT:, generation has
  no system prompt: the embedded model uses the Llama-2 format and never saw a system prompt.
- the layers depend on the test file's name: there are no two sets of layers for this model.
- perplexity puts [/INST] in the middle of each window: the embedded model knows no running text."""


class Everywhere(scans.Scans):
    """Steers every position of the prompt too."""

    def decide(self, questions):
        decision, settings = super().decide(questions), self.settings
        p, decision.cache.length = decision.cache.length, torch.zeros(len(questions), dtype=torch.long)
        steer = scans.steering(self.vectors.v_r, decision.sigma * settings.alpha, settings.steer_layers)
        self.model.forward(scans.pad(decision.prompts, "cpu")[0], decision.cache, steer)
        decision.cache.length = p
        return decision


class Ledger:
    """The reference run, and the measures that a row compares with it."""

    def __init__(self, n):
        self.method, world = scans.load(device="cpu", max_new_tokens=48), World()
        self.texts = {kind: [question for _, question in world.questions(kind, "taught", "test", n)]
                      for kind in KINDS}
        self.streams = self.read()
        self.s, self.T = self.scores(self.streams)
        self.refused = self.both_answers()

    def read(self, seed=0, prompt=None, model=None):
        """Streams at p and e, {kind: (n, L, 2, D)}, of the questions and of anchors drawn by seed."""
        harmful, harmless = scans.draw_anchors(scans.DATA / "tiny", anchor_seed=seed)
        prompt, texts = prompt or self.method.tokenizer.prompt, {**self.texts, "Q-": harmful, "Q+": harmless}
        return {kind: scans.read_streams(model or self.method.model, [prompt(text) for text in some])
                for kind, some in texts.items()}

    def cosines(self, streams):
        """{kind: (n, L)} of the questions."""
        _, d_harm = scans.extract(streams["Q-"], streams["Q+"])
        return {kind: scans.cosines(scans.transition(streams[kind]), d_harm) for kind in KINDS}

    def scores(self, streams, layers=None):
        """{kind: s_q (n)} of the questions, and T, from the streams of questions and anchors."""
        layers = layers or self.method.settings.classify_layers
        left_out = scans.leave_one_out(scans.transition(streams["Q-"]))
        return ({kind: scans.score(cos, layers) for kind, cos in self.cosines(streams).items()},
                scans.estimate_threshold(scans.score(left_out, layers)))

    def both_answers(self, v_r=None, kind_of_scans=scans.Scans, sigmas=(-1, 1)):
        """{(kind, sigma): which answers are refusals (n)}, steered with v_r."""
        vectors = self.method.vectors if v_r is None else replace(self.method.vectors, v_r=v_r.float())
        method = kind_of_scans(self.method.model, self.method.tokenizer, vectors, self.method.settings)
        refused = {}
        for sigma in sigmas:
            method.settings = replace(method.settings, sigma=sigma)
            for kind, texts in self.texts.items():
                refused[kind, sigma] = torch.tensor([has_refusal_phrase(result["steered"])
                                                     for result in method.answer(texts, default=False)])
        return refused

    def row(self, name, s=None, T=None, refused=None, sigma=None):
        """Print one line: T, AUROC; for each kind s_q, its move, sigmas turned, the share refused."""
        s, T, refused = s or self.s, T or self.T, refused or self.refused
        cells = [name, f"{T:.4f}", f"{auroc(s['harmful'], s['dangerous']):.3f}"]
        for kind in KINDS:
            harmful = s[kind] >= T if sigma is None else sigma[kind]
            turned = int((harmful != (self.s[kind] >= self.T)).sum())
            share = torch.where(harmful, refused[kind, 1], refused[kind, -1]).float().mean()
            moved = (s[kind] - self.s[kind]).abs().mean()
            cells += [f"{s[kind].mean():.4f}", f"{moved:.4f}", str(turned), f"{share:.1%}"]
        print("|", " | ".join(cells), "|", flush=True)

    def redo(self, name, streams):
        """A row with vectors, T and answers from other streams."""
        v_r, _ = scans.extract(streams["Q-"], streams["Q+"])
        self.row(name, *self.scores(streams), self.both_answers(v_r))

    def quirks(self):
        """Print the lines of the table, one quirk after the other."""
        method, model, tokenizer = self.method, self.method.model, self.method.tokenizer
        anchors, layers = {kind: self.streams[kind] for kind in ("Q-", "Q+")}, method.settings.classify_layers
        self.row("none: SCANS as it is here")

        streams = {kind: x.clone() for kind, x in self.streams.items()}
        for x in streams.values():
            x[:, -1] = llama.rms_norm(x[:, -1], model.norm, model.config.norm_eps)
        self.row("the last layer is taken after the final norm", *self.scores(streams))
        self.redo("streams in float16 before means and cosines",
                  {kind: x.half() for kind, x in self.streams.items()})

        everywhere = self.both_answers(kind_of_scans=Everywhere)
        zero, _ = self.scores({kind: x[:, :, [1, 1]] for kind, x in self.streams.items()})
        self.row("[/INST] is not found: p = -1 reads e twice, s_q = 0 (here with the T of the first row), "
                 "and every position is steered", zero, refused=everywhere)
        self.row("of these, the steering of every position alone", refused=everywhere)

        self.row("classification layers end early, as for 13b (10-18 of 40; here 3-5 of 12)",
                 *self.scores(self.streams, range(3, 6)))
        self.row("the rule of one test file: benign if any layer is below T, not the mean",
                 sigma={kind: (cos[:, layers] >= self.T).all(-1)
                        for kind, cos in self.cosines(self.streams).items()})
        for T in (0.60, 0.75):
            self.row(f"T by the test file's name, {T:.2f}, instead of one T from this model's anchors", T=T)
        for seed in (1, 2, 3):
            self.redo(f"anchors drawn without a seed: another draw ({seed} of 3)", self.read(seed))

        other = copy.copy(tokenizer)
        other.format = replace(tokenizer.format, prompt=tokenizer.format.prompt.replace("{q}", "{q}\n"))
        self.row("a line's newline is kept for the classifier",
                 *self.scores(self.read(prompt=other.prompt) | anchors))
        prompts = [tokenizer.prompt(text) for texts in self.texts.values() for text in texts]
        p, e = (sum(getattr(prompt, name) for prompt in prompts) / len(prompts) for name in "pe")
        self.row(f"a query is prefilled twice: {e + p + 2:.1f} prompt positions per query "
                 f"instead of {e + 2:.1f}")
        half = llama.load(scans.DATA / "tiny", dtype=torch.float16)
        self.row("vectors in float32, queries in float16", *self.scores(self.read(model=half) | anchors))

        def no_bos(text):
            prompt = tokenizer.prompt(text)
            return Prompt(prompt.ids[1:], prompt.p - 1, prompt.e - 1)
        self.redo("no BOS while extracting and classifying, BOS while generating (Vicuna's quirk, tried in "
                  "this format)", self.read(prompt=no_bos))
        self.row("the paper's text instead of its code: v_r not scaled to unit length",
                 refused=self.both_answers(method.vectors.v_r * method.vectors.v_norm[:, None]))


def measure(n=200):
    torch.set_num_threads(1)        # the model is small: a step is shorter than waking a second thread
    ledger = Ledger(n)
    without = {kind: f"{hits.float().mean():.1%}"
               for (kind, _), hits in ledger.both_answers(sigmas=[0]).items()}
    print(HEAD.format(fingerprint=ledger.method.model.fingerprint, n=n, **without))
    ledger.quirks()
    print(FOOT)


if __name__ == "__main__":
    measure()
