"""The ledger: what each quirk of the authors' public code does, measured on the embedded model.

    python -m data.golden.ledger > data/golden/ledger.md

The questions are ones that the model's alignment never saw. Both answers of SCANS to each, with sigma = -1
and with +1, are made once. A quirk that changes the classification is measured by which of the two a question
then gets, one that changes the steering by answers made anew. Where a quirk changes the cosines, T is
estimated anew from the anchors, by the same rule.

Left out: what the embedded model cannot show, see NOT_MEASURED.
"""
from dataclasses import replace

import torch

import llama
import scans
from data.golden.make import ANCHOR_COUNT, MODEL
from data.tiny.world import World
from tokenizer import BOS, Prompt

KINDS = ("harmful", "dangerous")  # the questions; "dangerous" ones only sound so
LIMIT = 48
HEAD = """# Ledger of deviations

Made by `python -m data.golden.ledger` on data/tiny (fingerprint {fingerprint}): what each quirk of the
authors' public code does there.

s_q is a mean. `moved` is the mean distance from the first row's s_q, `turned` the number of questions that
get the other sigma, `refused` the share of refusals with SCANS. Without SCANS the model refuses
{without[harmful]} of the {n[harmful]} harmful questions and {without[dangerous]} of the {n[dangerous]}
dangerous-sounding harmless ones. A quirk without effect on this small model may have one on a large one.
"""
NOT_MEASURED = [
    ("the Vicuna system prompt is cut after its first sentence, a newline stands before ASSISTANT:, "
     "generation has no system prompt",
     "the embedded model speaks the Llama-2 format and never saw a system prompt"),
    ("the layers depend on the test file's name", "there are no two sets of layers for this model"),
    ("perplexity puts [/INST] in the middle of each window", "the embedded model knows no running text"),
]


class Ledger:
    """The reference run, and the measures that a row compares with it."""

    def __init__(self, n):
        self.method = scans.Scans.load(MODEL, device="cpu", sampling={"max_new_tokens": LIMIT})
        self.model, self.tokenizer = self.method.model, self.method.tokenizer
        self.chosen, self.v_r, world = self.method.settings, self.method.vectors.v_r, World()
        self.questions = {kind: [question for _, question in world.questions(kind, "taught", "test", n)]
                          for kind in KINDS}
        self.streams = self.read(self.prompts(0))
        self.s, self.T = self.scores(self.streams)
        self.refused = self.both_answers(self.v_r)

    def prompts(self, seed, make=None):
        """Prompts of the questions and of anchors drawn by seed: {kind: list}.

        make: another way from text to Prompt.
        """
        harmful, harmless = scans.anchor_texts(MODEL, anchors=ANCHOR_COUNT, anchor_seed=seed)[1]
        return {kind: [(make or self.tokenizer.prompt)(text) for text in texts]
                for kind, texts in {**self.questions, "Q-": harmful, "Q+": harmless}.items()}

    def read(self, prompts, model=None):
        """Streams at p and e: {kind: (n, L, 2, D)}."""
        return {kind: scans.read_streams(model or self.model, some) for kind, some in prompts.items()}

    def scores(self, streams, layers=None):
        """{kind: s_q (n)} of the questions, and T, from the streams of questions and anchors."""
        layers = layers or self.chosen.classify
        a_t = {kind: scans.transition(x) for kind, x in streams.items()}
        d_harm = scans.harm_direction(a_t["Q-"])
        T = scans.estimate_threshold(scans.score(scans.leave_one_out(a_t["Q-"]).nan_to_num(), layers))
        return {kind: scans.score(scans.cosines(a_t[kind], d_harm).nan_to_num(), layers) for kind in KINDS}, T

    def both_answers(self, v_r, everywhere=False):
        """{kind: {sigma: which answers are refusals (n)}}, steered with v_r from p on.

        everywhere: at every position of the prompt too.
        """
        return {kind: {sigma: self.answers(kind, sigma, v_r, everywhere) for sigma in (-1, 1)}
                for kind in KINDS}

    @torch.inference_mode()
    def answers(self, kind, sigma, v_r, everywhere):
        prompts = [self.tokenizer.prompt(question) for question in self.questions[kind]]
        slots = max(prompt.e for prompt in prompts) + 1 + LIMIT
        cache = llama.Cache(self.model.config, len(prompts), slots, self.model.embed)
        steer = scans.steering(v_r, torch.full((len(prompts),), sigma * self.chosen.alpha), self.chosen.steer)
        self.model.forward(scans.pad(prompts, "cpu")[0], cache, steer if everywhere else None)
        cache.length = torch.tensor([prompt.p for prompt in prompts])
        ids, instructions = [[] for _ in prompts], [prompt.ids[:prompt.p + 1] for prompt in prompts]
        for step in llama.generate(self.model, instructions, cache, steer, self.method.sampling):
            for row, id, _ in step:
                ids[row] += [] if id is None else [id]
        return torch.tensor([scans.is_refusal(self.tokenizer.decode(row)) for row in ids])

    def row(self, name, s, T, refused=None, sigma=None):
        """One line of the table: T, AUROC; for each kind s_q, its move, sigmas turned, the share refused."""
        refused, cells = refused or self.refused, []
        for kind in KINDS:
            chosen = scans.steering_direction(s[kind], T) if sigma is None else sigma[kind]
            turned = int((chosen != scans.steering_direction(self.s[kind], self.T)).sum())
            share = torch.where(chosen == 1, refused[kind][1], refused[kind][-1]).float().mean()
            moved = (s[kind] - self.s[kind]).abs().mean()
            cells += [f"{s[kind].mean():.4f}", f"{moved:.4f}", f"{turned}", f"{share:.1%}"]
        return f"| {name} | {T:.4f} | {scans.auroc(s['harmful'], s['dangerous']):.3f} | {' | '.join(cells)} |"

    def quirks(self):
        """The lines of the table, one quirk after the other."""
        s, T, L = self.s, self.T, self.model.config.L
        layers = self.chosen.classify
        yield self.row("none: SCANS as it is here", s, T)

        streams = {kind: x.clone() for kind, x in self.streams.items()}
        for x in streams.values():
            x[:, -1] = llama.rms_norm(x[:, -1], self.model.norm, self.model.config.norm_eps)
        yield self.row("the last layer is taken after the final norm", *self.scores(streams))

        streams = {kind: x.half() for kind, x in self.streams.items()}
        v_r = scans.refusal_vectors(streams["Q-"][:, :, 0], streams["Q+"][:, :, 0])[0].float()
        yield self.row("streams in float16 before means and cosines", *self.scores(streams),
                       self.both_answers(v_r))

        everywhere = self.both_answers(self.v_r, everywhere=True)
        nothing = {kind: x[:, :, [1, 1]] for kind, x in self.streams.items()}
        zero, _ = self.scores(nothing)
        yield self.row("[/INST] is not found: p = -1 reads e twice, s_q = 0 (here with the T of the first "
                       "row), and every position is steered", zero, T, everywhere)
        yield self.row("of these, the steering of every position alone", s, T, everywhere)

        short = list(range(L // 4, max(L // 4 + 1, round(0.475 * L))))
        yield self.row("classification layers end early, as for 13b (10-18 of 40; "
                       f"here {scans.show_layers(short)} of {L})", *self.scores(self.streams, short))

        sigma = {}
        for kind in KINDS:
            a_t = scans.transition(self.streams[kind])
            cos = scans.cosines(a_t, scans.harm_direction(scans.transition(self.streams["Q-"])))
            sigma[kind] = torch.where((cos[:, layers] < T).any(-1), -1, 1)
        yield self.row("the rule of one test file: benign if any layer lies below T, not the mean", s, T,
                       sigma=sigma)
        for other in (0.60, 0.75):
            yield self.row(f"T by the test file's name, {other:.2f}, instead of one T from this model's "
                           "anchors", s, other)

        for seed in (1, 2, 3):
            anchors = {kind: some for kind, some in self.prompts(seed).items() if kind not in KINDS}
            streams = {**self.streams, **self.read(anchors)}
            v_r = scans.refusal_vectors(streams["Q-"][:, :, 0], streams["Q+"][:, :, 0])[0]
            yield self.row(f"anchors drawn without a seed: another draw ({seed} of 3)", *self.scores(streams),
                           self.both_answers(v_r))

        def newline(text):
            return self.raw(f"[INST] {text}\n [/INST]")
        prompts = {kind: [newline(text) for text in texts] for kind, texts in self.questions.items()}
        yield self.row("a line's newline is kept for the classifier",
                       *self.scores({**self.streams, **self.read(prompts)}))

        prompts = [prompt for kind in KINDS for prompt in self.prompts(0)[kind]]
        once = sum(prompt.e + 2 for prompt in prompts) / len(prompts)
        twice = sum(prompt.e + 1 + prompt.p + 1 for prompt in prompts) / len(prompts)
        yield (f"| a query is prefilled twice: {twice:.1f} prompt positions a query instead of {once:.1f} | "
               + " | ".join(["same"] * 10) + " |")

        half = llama.load(MODEL, dtype=torch.float16)
        mixed = {**self.streams, **self.read({kind: self.prompts(0)[kind] for kind in KINDS}, half)}
        yield self.row("vectors in float32, queries in float16", *self.scores(mixed))

        def no_bos(text):
            prompt = self.tokenizer.prompt(text)
            return replace(prompt, ids=prompt.ids[1:], p=prompt.p - 1, e=prompt.e - 1)
        streams = self.read(self.prompts(0, no_bos))
        v_r = scans.refusal_vectors(streams["Q-"][:, :, 0], streams["Q+"][:, :, 0])[0]
        yield self.row("no BOS while extracting and classifying, BOS while generating (Vicuna's quirk, "
                       "tried in this format)", *self.scores(streams), self.both_answers(v_r))

        v = self.v_r * self.method.vectors.v_norm[:, None]
        yield self.row("the paper's text instead of its code: v_r not scaled to unit length", s, T,
                       self.both_answers(v))

    def raw(self, text):
        """A Prompt of an instruction as it stands, nothing stripped."""
        r_pos = self.tokenizer.format.r_pos
        ids, p = self.tokenizer.encode([BOS, text + r_pos]), len(self.tokenizer.encode([BOS, text])) - 1
        return Prompt(ids, p, len(ids) - 1)

    def without(self):
        """Share of refusals without SCANS."""
        return {kind: f"{self.answers(kind, 0, self.v_r, False).float().mean():.1%}" for kind in KINDS}


def main():
    parser = scans.Parser(prog="python -m data.golden.ledger",
                          description="Measure the quirks of the public code on the embedded model.")
    parser.add_argument("--n", type=scans.number(int, 1, 10**6), default=200, help="questions of each kind")
    scans.run(parser, measure)


def measure(args):
    ledger = Ledger(args.n)
    n, without = {kind: len(texts) for kind, texts in ledger.questions.items()}, ledger.without()
    print(HEAD.format(fingerprint=scans.fingerprint(MODEL), n=n, without=without))
    print("| quirk | T | AUROC | harmful: s_q | moved | turned | refused "
          "| dangerous-sounding: s_q | moved | turned | refused |\n|" + "---|" * 11)
    for line in ledger.quirks():
        print(line, flush=True)
    print("\nNot measured:\n")
    for quirk, why in NOT_MEASURED:
        print(f"- {quirk}: {why}.")


if __name__ == "__main__":
    main()
