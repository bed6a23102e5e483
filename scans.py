"""SCANS, Safety-Conscious Activation Steering (Cao, Yang, Zhao, AAAI 2025, arXiv 2408.11491), in one file.

A safety-aligned chat model refuses harmless questions that merely sound dangerous. SCANS cures
that without training:

    extraction   a refusal vector v_r^l per layer, from harmful and harmless anchors (Eq. 1),
                 and a harm direction d_harm^l (Eqs. 2, 3)
    layers       which layers carry the refusal: project the vectors on the vocabulary (section 3.2)
    decision     is this query harmful? cosine of its hidden-state transition with d_harm (Eqs. 4, 5)
    steering     add sigma alpha v_r in the middle layers while generating (Eq. 6)

The first third of the file is the method, in that order. You may stop reading where it ends. The rest is
what a command needs: settings, prompt files, the vectors file, flags and printing. One line of
`Llama.forward` in llama.py adds the vectors; tokenizer.py counts the positions p and e.

Layer l is the residual stream after block l, 0-based, before the final norm, everywhere.

Letters of every shape comment:
    B queries    n, m harmful, harmless anchors    L layers    D model width    V vocabulary
    T is the threshold, never a shape
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during slow imports: no traceback; see `run`

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import llama
from llama import Cache, Sampling, checked
from tokenizer import FORMATS, Tokenizer, check_text

DATA = Path(__file__).resolve().parent / "data"

# ---------------------------------------------------------------------------------------------------------
# Extraction: Eqs. 1 to 3


def pad(prompts, device):
    """Ids of B Prompts, padded on the right to the longest: (B, longest), and their p and e: (B, 2)."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = [prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in prompts]
    positions = [[prompt.p, prompt.e] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(positions, device=device)


@torch.inference_mode()
def read_streams(model, prompts, batch_size=16, progress=lambda done: None):
    """The residual streams at p and e of n Prompts: (n, L, 2, D) float32.

    One pass over instruction + r_pos gives both: attention is causal, so position p does not see r_pos.
    """
    streams = torch.empty(len(prompts), model.config.L, 2, model.config.D)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))      # like lengths pad less
    for i in range(0, len(order), batch_size):
        rows = order[i:i + batch_size]
        ids, positions = pad([prompts[row] for row in rows], model.embed.device)
        _, read = model.forward(ids, read=positions)                            # (B, L, 2, D)
        check_finite(read, [f"prompt {row + 1}" for row in rows])
        streams[rows] = read.float().cpu()
        progress(i + len(rows))
    return streams


def refusal_vectors(a_harmful, a_harmless):
    """v_r (L, D) of unit length and its length before scaling (L), from a^l(q) at p, (n, L, D) and (m, L, D).

    The paper does not scale. The public code does, and its alpha (3.5 or 4) only makes sense with it.
    """
    v = a_harmful.mean(0) - a_harmless.mean(0)                                  # Eq. 1, (L, D)
    norm = v.norm(dim=-1)                                                       # (L)
    if not norm.all():
        raise ValueError(f"layer {int(norm.argmin())}: harmful and harmless anchors have the same mean")
    return v / norm[:, None], norm


def transition(streams):
    """a_t (n, L, D) from the streams at p and e (n, L, 2, D)."""
    return streams[:, :, 0] - streams[:, :, 1]                                  # Eq. 2


def harm_direction(a_t):
    """d_harm (L, D) from the harmful anchors' transitions (n, L, D)."""
    return a_t.mean(0)                                                          # Eq. 3


def leave_one_out(a_t):
    """Cosines (n, L) of each transition of a_t (n, L, D) with the d_harm of the n - 1 others."""
    others = harm_direction(a_t) * len(a_t) - a_t       # (n, L, D), the sum: a cosine ignores the scale
    return F.cosine_similarity(a_t, others, dim=-1)


@dataclass
class Vectors:
    """All that extraction finds. One file holds it."""
    v_r: torch.Tensor           # (L, D) refusal steering vectors, unit length
    d_harm: torch.Tensor        # (L, D) reference harm direction
    cos_harmful: torch.Tensor   # (n, L) leave-one-out cosines of the harmful anchors
    cos_harmless: torch.Tensor  # (m, L) cosines of the harmless anchors with d_harm
    v_norm: torch.Tensor        # (L) length of v_r before scaling
    a_norm: torch.Tensor        # (L) mean length of the residual stream at p, over all anchors


def extract(model, harmful, harmless, progress=lambda done: None):
    """Vectors from the Prompts of n harmful and m harmless anchors."""
    n = len(harmful)
    streams = read_streams(model, harmful + harmless, progress=progress)        # (n + m, L, 2, D)
    a_p, a_t = streams[:, :, 0], transition(streams)                            # (n + m, L, D) each
    v_r, v_norm = refusal_vectors(a_p[:n], a_p[n:])
    d_harm = harm_direction(a_t[:n])
    return Vectors(v_r=v_r, d_harm=d_harm, v_norm=v_norm, a_norm=a_p.norm(dim=-1).mean(0),
                   cos_harmful=leave_one_out(a_t[:n]), cos_harmless=cosines(a_t[n:], d_harm))


# ---------------------------------------------------------------------------------------------------------
# Layers: anchoring the safety-critical ones (section 3.2)


def segments(L):
    """The three uniform segments of L layers: {"former": 0-9, "middle": 10-20, "latter": 21-31} for 32."""
    return {"former": range(L // 3), "middle": range(L // 3, 2 * L // 3), "latter": range(2 * L // 3, L)}


def principal_component(v):
    """First principal component (D) of the rows of v (layers, D), turned along their mean.

    Not centred: we want what the layers of a segment share, and centring removes just that.
    The sign of a component is arbitrary. Against the mean, the table would show words of compliance.
    The paper specifies neither.
    """
    component = torch.linalg.svd(v, full_matrices=False).Vh[0]
    return component if component @ v.mean(0) >= 0 else -component


def top_tokens(model, tokenizer, directions, k=10):
    """The k tokens with the highest logit for each direction (n, D), without the final norm: n lists."""
    directions = directions.to(model.head.device)
    rows = model.head.to_dense().split(8192)            # in parts: some vocabularies have 128 thousand pieces
    logits = torch.cat([directions @ part.float().T for part in rows], -1)      # (n, V)
    return [[tokenizer.piece(id) for id in ids] for ids in logits.topk(k).indices.tolist()]


def segment_words(model, tokenizer, v_r):
    """Table 1: the ten tokens that each segment's component of v_r (L, D) points to, {segment: tokens}."""
    parts = {name: v_r[list(layers)] for name, layers in segments(len(v_r)).items() if layers}
    components = torch.stack([principal_component(part) for part in parts.values()])    # (segments, D)
    return dict(zip(parts, top_tokens(model, tokenizer, components)))


# ---------------------------------------------------------------------------------------------------------
# Decision: Eqs. 4 and 5


def cosines(a_t, d_harm):
    """cos(a_t^l, d_harm^l) for every layer: (B, L) from (B, L, D) and (L, D)."""
    return F.cosine_similarity(a_t, d_harm, dim=-1)


def score(cos, layers):
    """s_q (B) from the cosines (B, L), over the classification layers."""
    return cos[:, layers].mean(1)                                               # Eq. 4


def steering_direction(s, T):
    """sigma (B): -1 benign, steered against refusal; +1 harmful, steered towards it."""
    return torch.where(s < T, -1, 1)                                            # Eq. 5


QUANTILE = 0.01     # share of the harmful anchors that an estimated T may lose


def estimate_threshold(scores):
    """T from the harmful anchors' leave-one-out scores (n): at most floor(QUANTILE n) of them lie below.

    It bounds the errors on the anchors, not on queries to come.
    """
    return float(scores.sort().values[math.floor(QUANTILE * len(scores))])


# ---------------------------------------------------------------------------------------------------------
# Steering, and the main job: Eq. 6


def steering(v_r, strength, layers):
    """What is added to the residual stream of each row: (B, L, D), zero but for the steering layers.

    strength (B): sigma * alpha of each row, 0 for an answer without SCANS; v_r (L, D).
    """
    steer = torch.zeros(len(strength), *v_r.shape, device=v_r.device)
    steer[:, layers] = strength.to(v_r.device)[:, None, None] * v_r[layers]     # Eq. 6, the term added
    return steer


@dataclass
class Decision:
    """What follows from one unsteered pass over instruction + r_pos, for B questions."""
    questions: list[str]
    prompts: list               # B Prompts
    cosines: torch.Tensor       # (B, L)
    s: torch.Tensor             # (B)
    sigma: torch.Tensor         # (B)
    cache: Cache                # B rows, cut back to p
    known: int                  # positions that were not run, because a chat had them already
    seconds: float


class Scans:
    """A model with its tokenizer, vectors and settings.

    Scans.load("data/tiny").answer(["How do I kill dandelions in a lawn?"])
    """

    def __init__(self, model, tokenizer, vectors, settings, sigma=None, sampling=None, meta=None):
        """sigma: None to decide per query, else -1, 0 or +1 for every query.
        sampling: None for greedy, with the model's repetition penalty. meta: metadata of the vectors file."""
        self.model, self.tokenizer, self.vectors, self.settings = model, tokenizer, vectors, settings
        self.sigma = sigma if sigma is None else check("sigma", sigma)
        self.sampling = sampling or settings.sampling({})
        self.meta = meta
        self.v_r, self.d_harm = vectors.v_r.to(model.embed.device), vectors.d_harm

    @classmethod
    def load(cls, folder=DATA / "tiny", *, device=None, dtype=None, format=None, system=None, sigma=None,
             sampling=None, alpha=None, threshold=None, steer_layers=None, classify_layers=None, **anchors):
        """Everything from a model's folder. Arguments are named as the flags; None is the flag's default.

        steer_layers, classify_layers: lists of layers. sampling: a dict of fields of llama.Sampling.
        anchors: vectors, refresh, harmful, harmless, anchors, anchor_seed, as in `find_vectors`.
        Extracts the vectors where there are none yet. Raises ValueError.
        """
        model, tokenizer = open_model(folder, device, dtype, format, system)
        vectors, _, meta = find_vectors(folder, model, tokenizer, **anchors)
        chosen = settings(vectors, tokenizer.name, alpha, threshold, steer_layers, classify_layers)
        return cls(model, tokenizer, vectors, chosen, sigma, chosen.sampling(sampling or {}), meta)

    def answer(self, questions, default=True, history=(), past=None, show=lambda *new: None):
        """Decide on each question, then answer it; see `decide` and `decode`."""
        return self.decode(self.decide(questions, history, past), default, show)

    @torch.inference_mode()
    def decide(self, questions, history=(), past=None):
        """The Decision on each question after `history`, finished (question, answer) turns.

        past: a Past to start from, for one question. It is brought up to date.
        """
        started = time.perf_counter()
        prompts = self.build(questions, history)
        streams, cache, known = self.run_once(prompts, past)                    # (B, L, 2, D)
        check_finite(streams, [repr(question[:60]) for question in questions])
        cos = cosines(transition(streams), self.d_harm)                         # (B, L)
        s = score(cos, self.settings.classify)                                  # (B)
        sigma = steering_direction(s, self.settings.T)
        if self.sigma is not None:
            sigma = torch.full_like(sigma, self.sigma)
        return Decision(questions, prompts, cos, s, sigma, cache, known, time.perf_counter() - started)

    def build(self, questions, history=()):
        """The Prompt of each question. The same for extraction, decision and answer."""
        prompts = [self.tokenizer.prompt(question, history) for question in questions]
        for prompt in prompts:
            if prompt.e >= self.model.config.context:
                raise ValueError(f"the prompt has {prompt.e + 1} tokens with its {self.r_pos()}, "
                                 f"the model's context is {self.model.config.context}")
        return prompts

    def run_once(self, prompts, past=None):
        """One unsteered pass over instruction + r_pos.

        Returns the streams at p and e (B, L, 2, D) in float32 on the CPU, the cache cut back to p, and how
        many positions came from `past`. Position p runs once more, steered, when the answer begins.
        """
        config, start = self.model.config, [prompt.p for prompt in prompts]
        end = min(max(start) + 1 + self.sampling.max_new_tokens, config.context)
        cache = Cache(config, len(prompts), max(end, *(prompt.e + 1 for prompt in prompts)), self.model.embed)
        if past and len(prompts) != 1:
            raise ValueError(f"a chat goes on with one question, not {len(prompts)}")
        known = past.reuse(cache, prompts[0].ids[:start[0]]) if past else 0
        ids, positions = pad(prompts, self.model.embed.device)
        _, streams = self.model.forward(ids[:, known:], cache, read=positions - known)
        cache.length = torch.tensor(start)      # "at p and after": what is steered goes on from here
        return streams.float().cpu(), cache, known

    def fork(self, decision, default=True):
        """The rows to decode: their names (question, "default" or "scans"), cache, and steer (rows, L, D)."""
        kinds = ("default", "scans") if default else ("scans",)
        names = [(i, kind) for i in range(len(decision.prompts)) for kind in kinds]
        cache = decision.cache.rows([i for i, _ in names]) if default else decision.cache
        sigma, alpha = decision.sigma.tolist(), self.settings.alpha
        strength = [sigma[i] * alpha if kind == "scans" else 0.0 for i, kind in names]      # of Eq. 6
        steer = steering(self.v_r, torch.tensor(strength), self.settings.steer)
        return names, cache, steer.to(self.model.embed.dtype)

    @torch.inference_mode()
    def decode(self, decision, default=True, show=lambda *new: None):
        """Answer without SCANS (unless default is False) and with it, all rows in one batch.

        show(i, "default" or "scans", text, stopped) gets the new text of an answer to question i as it comes.
        Returns B dicts with the keys of --json.
        """
        started, answers = time.perf_counter(), {}
        if self.sampling.max_new_tokens:
            names, cache, steer = self.fork(decision, default)
            prompts = [decision.prompts[i] for i, _ in names]
            instructions = [prompt.ids[:prompt.p + 1] for prompt in prompts]
            answers = {name: Answer() for name in names}
            for step in llama.generate(self.model, instructions, cache, steer, self.sampling):
                for row, id, stopped in step:
                    name = names[row]
                    show(*name, answers[name].grow(id, stopped, self.tokenizer), stopped)
        seconds = time.perf_counter() - started if answers else None
        return [self.result(decision, i, answers, seconds) for i in range(len(decision.prompts))]

    def result(self, decision, i, answers, seconds):
        """The dict of --json for question i. Fields that need an answer are None if none was generated."""
        chosen, prompt = self.settings, decision.prompts[i]
        default, scans = (answers.get((i, kind)) for kind in ("default", "scans"))

        def both(value):
            return {"default": default and value(default), "scans": scans and value(scans)}
        return {
            "prompt": decision.questions[i], "format": self.tokenizer.name, "p": prompt.p, "e": prompt.e,
            "score": float(decision.s[i]), "threshold": chosen.T, "threshold_rule": chosen.T_rule,
            "sigma": int(decision.sigma[i]), "alpha": chosen.alpha,
            "steer_layers": chosen.steer, "classify_layers": chosen.classify, "warning": chosen.doubt,
            **both(lambda answer: answer.text),
            "refused": both(lambda answer: is_refusal(answer.text)),
            "stopped": both(lambda answer: answer.stopped),
            # run for the answer, new tokens apart: the default one alone would run its p + 1 positions
            "positions": {"default": default and prompt.p + 1,
                          "scans": prompt.e + 1 - decision.known + (scans is not None)},
            "seconds": {"score": decision.seconds, "answers": seconds},
        }

    def r_pos(self):
        return self.tokenizer.format.r_pos.strip()


# =========================================================================================================
# Here the method ends. What follows is what a command needs.
# =========================================================================================================
# Answers as they grow, and chats


@dataclass
class Past:
    """What a chat keeps of its last turn: the ids before its p, and a cache with their unsteered keys."""
    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def reuse(self, cache, before):
        """Fill a new cache of one row with what is known of the ids `before` p.

        Both are kept for the next turn. Returns how many positions are known.
        """
        known = len(os.path.commonprefix([self.ids, before]))       # works on lists of ids too
        if known:
            cache.kv[:, :, :, :known] = self.cache.kv[:, :, :, :known]
            cache.length[:] = known
        self.ids, self.cache = before, cache
        return known


@dataclass
class Answer:
    """An answer as it grows."""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    stopped: str | None = None

    def grow(self, id, stopped, tokenizer):
        """Take in the next id (None for the end token) and return the text that is new.

        All ids are decoded again: a piece alone loses its space, and a character may take several pieces.
        Half a character is held back.
        """
        self.ids += [] if id is None else [id]
        self.stopped = stopped
        before, text = self.text, tokenizer.decode(self.ids)
        if stopped or not text.endswith("\ufffd"):
            self.text = text
        return self.text[len(before):]


# ---------------------------------------------------------------------------------------------------------
# Settings: which layers, alpha and T


@dataclass(frozen=True)
class Published:
    """Settings for one model and where they come from. Layers are inclusive."""
    model: str
    steer: tuple[int, int]
    classify: tuple[int, int]
    alpha: float
    T: float | None             # None: to be estimated
    repetition_penalty: float
    source: str


PUBLISHED = {   # (chat format, number of layers)
    ("llama-2", 32): Published("Llama-2-7b-chat", (10, 19), (10, 31), 3.5, 0.75, 1.1,
                               "public code; T also in section 4.4"),
    ("llama-2", 40): Published("Llama-2-13b-chat", (10, 19), (10, 18), 3.5, 0.75, 1.1, "public code"),
    ("vicuna", 32): Published("vicuna-7b-v1.5", (10, 19), (10, 31), 4.0, 0.75, 1.1, "public code"),
    ("vicuna", 40): Published("vicuna-13b-v1.5", (10, 19), (10, 18), 4.0, 0.70, 1.1,
                              "public code, the rule for data sets it does not name"),
}


def unlisted(L):
    """Settings for any other model of L layers: steer the middle third, classify from there on."""
    first, last = L // 3, max(L // 3, 2 * L // 3 - 1)
    return Published("a model outside the paper", (first, last), (first, L - 1), 3.5, None, 1.0,
                     f"the middle third of its {L} layers")


@dataclass(frozen=True)
class Settings:
    """What a run uses, derived anew each time."""
    alpha: float
    T: float
    T_rule: str
    steer: list[int]
    classify: list[int]
    table: Published            # where what was not given comes from
    below: int                  # harmful anchors with a leave-one-out score below T
    above: int                  # harmless anchors with a score of T or more
    doubt: str | None           # why the decision cannot be trusted, by the anchors' own scores

    def sampling(self, given):
        """llama.Sampling of the fields that are given, with the repetition penalty of the table."""
        return Sampling(**{"repetition_penalty": self.table.repetition_penalty, **given})


def settings(vectors, format, alpha=None, T=None, steer=None, classify=None):
    """Settings from the vectors and the chat format. Arguments that are not None go before the table.

    T is what is given, else the published one where model and layers are the table's, else estimated.
    """
    L = len(vectors.v_r)
    table = PUBLISHED.get((format, L)) or unlisted(L)
    steer = check_layers("steering", span(table.steer) if steer is None else steer, L)
    classify = check_layers("classification", span(table.classify) if classify is None else classify, L)
    harmful, harmless = score(vectors.cos_harmful, classify), score(vectors.cos_harmless, classify)
    if T is not None:
        T, rule = check("threshold", T), "given"
    elif table.T is not None and classify == span(table.classify):
        T, rule = table.T, f"published for {table.model}"
    else:
        T, rule = estimate_threshold(harmful), "estimated from the anchors"
    return Settings(table.alpha if alpha is None else check("alpha", alpha), T, rule, steer, classify, table,
                    int((harmful < T).sum()), int((harmless >= T).sum()), doubt(harmful, harmless))


MOST_ABOVE, LEAST_AUROC = 0.2, 0.9      # the decision is doubtful beyond these: our choice, not the paper's


def doubt(harmful, harmless):
    """A warning if the scores of the harmful (n) and the harmless anchors (m) overlap, else None.

    A T estimated from anchors that overlap lies below most harmless queries, which SCANS then steers towards
    refusal: worse than nothing. A model that was never aligned to refuse is the usual reason.
    """
    _, above, area = separation(harmful, harmless)
    share = above / len(harmless)
    if share <= MOST_ABOVE and area >= LEAST_AUROC:
        return None
    return (f"s_q does not tell harm here: {share:.0%} of the harmless anchors reach an estimated T, "
            f"AUROC {area:.3f}; harmless queries would be steered towards refusal; try other anchors, or "
            "--classify-layers (--analyze compares some); or this model is not aligned to refuse")


def separation(harmful, harmless):
    """How the anchors' scores part, (n) and (m): the estimated T, harmless ones that reach it, the AUROC."""
    T = estimate_threshold(harmful)
    return T, int((harmless >= T).sum()), auroc(harmful, harmless)


def auroc(positive, negative):
    """Area under the ROC curve: the chance that a positive score lies above a negative one, ties half."""
    above = positive[:, None] - negative[None, :]
    return float((above > 0).float().mean() + (above == 0).float().mean() / 2)


def span(ends):
    """(10, 19) as the layers 10 to 19."""
    return list(range(ends[0], ends[1] + 1))


def check_layers(what, layers, L):
    """The layers, if a model of L layers has them all."""
    if not layers or min(layers) < 0 or max(layers) >= L:
        raise ValueError(f"{what} layers {show_layers(layers)}: the model has layers 0-{L - 1}")
    return layers


# flag, or argument of Scans.load: its type, the least and the most it may be
LIMITS = {
    "alpha": (float, 0, 3.4e38),
    "threshold": (float, -2, 2),
    "sigma": (int, -1, 1),
    "anchors": (int, 2, 2**31),
    "anchor_seed": (int, 0, 2**63 - 1),
    "threads": (int, 1, 1024),
    **llama.SAMPLING,
}


def check(name, value):
    """The value of a flag, if it is of its type and within LIMITS."""
    return checked(name, value, *LIMITS[name])


def check_finite(streams, names):
    """ValueError for NaN or infinity in streams (B, L, ...): its first layer, and the name of the row."""
    bad = ~streams.isfinite().flatten(2).all(-1)                                # (B, L)
    if bad.any():
        l = int(bad.any(0).nonzero()[0])
        name = names[int(bad[:, l].nonzero()[0])]
        raise ValueError(f"NaN or infinity in the residual stream after layer {l}, at {name}")


# ---------------------------------------------------------------------------------------------------------
# Refusals

CANNOT = (r"(?:cannot|can't|can not|could not|couldn't|will not|won't|"
          r"(?:am|'m) (?:not able|unable|not allowed|not going|not willing) to)")
HELP = (r"(?:help|assist|aid|support|provide|give|offer|share|tell|teach|explain|discuss|answer|respond|"
        r"describe|fulfill?|satisfy|comply|engage|participate|do (?:that|this|so)|write|create|generate|"
        r"produce|advise|recommend|suggest|encourage|promote|condone|endorse|facilitate)")
REFUSALS = (    # looked for in the opening of an answer, lower case, with straight quotes
    # I (simply) cannot (in good conscience) help; not: I cannot taste food
    rf"\bi ?(?:\w+ ){{0,2}}{CANNOT} (?!wait )(?:[\w,']+ ){{0,4}}?{HELP}\b",
    r"\bi (?:do not|don't) (?:provide|assist|help|support|condone|engage)\b|\bi(?:'d| would) rather not\b",
    r"\b(?:not|n't) something (?:that )?i (?:can|could|am able|will|'m able)\b",
    rf"\bsorry,? but\b|\bsorry,? i ?{CANNOT}\b",                      # not: sorry to hear that
    r"^no[,.]? i (?:will not|won't)\b",
    r"\bi (?:must |have to )?apologi[sz]e,? but\b",
    r"\bi (?:must|have to|will have to)(?: \w+ly)? (?:decline|refuse)\b|\bi (?:decline|refuse) to\b",
    r"\b(?:not|n't) (?:feel )?comfortable (?:with )?\w+ing\b",         # I'm not comfortable helping with that
    r"\bas an? (?:responsible|ethical|respectful)(?:,? (?:and )?\w+){0,2} (?:ai|assistant|model|chatbot)\b",
    r"\b(?:not|never|n't) (?:appropriate|ethical|acceptable)\b(?: or \w+)? (?:for me )?to\b",
    r"\b(?:it|this|that)(?: is|'s| would be) (?:\w+ and )?(?:unethical|immoral)\b",
    r"\b(?:against|not within|beyond) my (?:programming|guidelines|principles|values|policy|policies)\b",
)


def is_refusal(answer):
    """Does an answer refuse? A stand-in for a judge; the answers are kept.

    Looks at its first two sentences, at most 300 characters, without what stands in double quotes: a refusal
    inside a dialogue, or in a law's text further down, is none.
    """
    text = answer.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")).lower()
    sentences = re.split(r"(?<=[.!?])\s+", re.sub(r'"[^"]*"', "", text).strip())
    opening = " ".join(sentences[:2])[:300]
    return any(re.search(pattern, opening) for pattern in REFUSALS)


# ---------------------------------------------------------------------------------------------------------
# Prompt files

# the first of these columns that a file has is the prompt
COLUMNS = ("prompt", "goal", "Goal", "Question", "question", "forbidden_prompt", "Behavior", "instruction",
           "text", "sentence")


def read_table(text, delimiter):
    """The rows of a csv as objects. A row with more cells than the header is an error."""
    csv.field_size_limit(2**31 - 1)     # documents to summarize are longer than csv's own limit
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has {len(row[None])} cells more than the header")
        rows.append(row)
    return rows


READERS = {     # suffix: text to a list of strings or of objects
    ".txt": lambda text: text.split("\n"),
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
    ".csv": lambda text: read_table(text, ","),
    ".tsv": lambda text: read_table(text, "\t"),
}


@dataclass(frozen=True)
class Row:
    """A prompt of a file."""
    text: str
    label: str | None = None    # safe or unsafe; None where the file does not say
    type: str = ""
    fields: dict = field(default_factory=dict)      # all that stands in its row


def read_prompts(path):
    """The Rows of a .csv, .tsv, .json, .jsonl or .txt file (one prompt a line). Raises ValueError.

    The label is the column `label`, else XSTest's type (contrast_... is unsafe), else None.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path}: the suffix {suffix!r} is not one of {', '.join(READERS)}; pandas turns "
                         "parquet into csv: read_parquet(FILE).explode(['sentence', 'label']).to_csv(FILE)")
    try:
        items = READERS[suffix](path.read_text(encoding="utf-8-sig"))   # -sig: a byte-order mark may lead
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except (OSError, csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(items, list) or not all(isinstance(item, (str, dict)) for item in items):
        raise ValueError(f"{path}: need a list of strings or of objects")
    rows = [read_row({"text": item} if isinstance(item, str) else item, f"{path}: row {number}")
            for number, item in enumerate(items, 1)]
    rows = [row for row in rows if row.text]
    if not rows:
        raise ValueError(f"{path}: no prompts")
    return rows


def read_row(item, place):
    """The Row of an object of a prompt file. `place` says where it stands."""
    column = next((name for name in COLUMNS if name in item), None)
    if column is None:
        raise ValueError(f"{place} has none of the columns {', '.join(COLUMNS)}")
    fields = {name: "" if value is None else value for name, value in item.items()}
    text, kind, label = fields[column], fields.get("type", ""), fields.get("label", "")
    if not isinstance(text, str) or not isinstance(kind, str):
        raise ValueError(f"{place} has {column} {llama.brief(text)} and type {llama.brief(kind)}, need text")
    if label in ("True", "False"):      # RepE-Data: true is harmless
        label = {"True": "safe", "False": "unsafe"}[label]
    if label not in ("safe", "unsafe", ""):
        raise ValueError(f"{place} has the label {llama.brief(label)}, need safe or unsafe")
    if not label and "focus" in item and kind:      # XSTest v2
        label = "unsafe" if kind.startswith("contrast_") else "safe"
    if text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{place} holds {llama.brief(text)}, which is no valid Unicode")
    return Row(text.strip(), label or None, kind, item)


def draw_anchors(path, kind, n, seed):
    """n different prompts of a file, drawn by seed. Rows with another label than `kind` are left out."""
    texts = list(dict.fromkeys(row.text for row in read_prompts(path) if row.label in (kind, None)))
    if len(texts) < n:
        raise ValueError(f"{path}: {len(texts)} different {kind} prompts, {n} anchors asked for")
    return random.Random(seed).sample(texts, n)


def anchor_texts(folder, harmful=None, harmless=None, anchors=None, anchor_seed=None):
    """The anchors of a run: their two files, harmful and harmless, and the texts drawn from each.

    A file that is not named is the one in the model's folder, else the one in data/.
    """
    n = check("anchors", 64 if anchors is None else anchors)
    seed = check("anchor_seed", 0 if anchor_seed is None else anchor_seed)
    files = [Path(named) if named is not None else
             (Path(folder) if (Path(folder) / name).exists() else DATA) / name
             for named, name in ((harmful, "harmful.txt"), (harmless, "harmless.txt"))]
    texts = [draw_anchors(file, kind, n, seed) for file, kind in zip(files, ("unsafe", "safe"))]
    both = set(texts[0]) & set(texts[1])
    if both:
        raise ValueError(f"{files[0]} and {files[1]}: {len(both)} of {n} anchors are harmful and harmless at "
                         f"once, {min(both)!r} the first")
    return files, texts


# ---------------------------------------------------------------------------------------------------------
# State that lasts: the vectors file

VERSION = "1"
META = ("version", "fingerprint", "format", "system", "r_pos", "harmful", "harmless", "anchors",
        "anchor_seed", "dtype")


WHOLE = 1e9     # bytes; a larger weight file is not hashed whole


def digest(text):
    """Sixteen hexadecimal digits that stand for a text or bytes."""
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()[:16]


def fingerprint(folder):
    """A model's identity: config, tokenizer and weights. Unmoved by copying the folder.

    Weight files below WHOLE are hashed whole; of larger ones the header, and 4 KiB of every tensor.
    """
    folder, h = Path(folder), hashlib.sha256()
    for name in ("config.json", "tokenizer.model", "tokenizer.json"):
        if (folder / name).exists():
            h.update((folder / name).read_bytes())
    for path in llama.weight_files(folder):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size < WHOLE:
                h.update(file.read())
                continue
            for start, length in samples(file, size):
                file.seek(start)
                h.update(file.read(length))
    return h.hexdigest()[:16]


def samples(file, size):
    """(start, length) of what is hashed of a large weight file."""
    if not file.name.endswith(".safetensors"):      # a zip of pickled tensors: a block of every MiB
        return [(start, 4096) for start in range(0, size, 2**20)]
    end = 8 + int.from_bytes(file.read(8), "little")
    tensors = json.loads(file.read(end - 8))
    tensors.pop("__metadata__", None)
    starts = sorted(end + entry["data_offsets"][0] for entry in tensors.values())
    return [(0, end), *((start, 4096) for start in starts)]


@contextlib.contextmanager
def written_whole(path):
    """A temporary path beside `path`, moved into place if all goes well, else removed. Raises ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file, and is not written over")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()       # now, not after minutes of work; and with the mode that umask gives
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_vectors(path, vectors, meta):
    save_file({name: tensor.contiguous() for name, tensor in vars(vectors).items()}, path, metadata=meta)


def is_ours(path):
    """Is this a vectors file, whole, damaged or empty? No other file is ever written over."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(2**16)
    begins = head[8:].startswith(b'{"__metadata__":{')
    return not head or begins and all(f'"{key}":"'.encode() in head for key in META)


def load_vectors(path):
    """(Vectors, metadata) of a vectors file. ValueError for one that is damaged, or that is none."""
    path, advice = Path(path), ""
    try:
        advice = "; --refresh makes it again" if is_ours(path) else ""
        if path.exists() and not path.is_file():    # a pipe would wait for ever
            raise ValueError("no regular file")
        with safe_open(path, "pt") as file:
            meta, names = file.metadata() or {}, list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        check_vectors(tensors, meta)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = llama.first_line(error)
        raise ValueError(f"{path}: not a whole vectors file ({reason}){advice}") from None
    return Vectors(**tensors), meta


def check_vectors(tensors, meta):
    """ValueError for what no extraction can have written."""
    have, need = {*tensors, *meta}, {*Vectors.__dataclass_fields__, *META}
    if have != need:
        raise ValueError(f"{', '.join(sorted(need ^ have))[:99]}: missing, or too many")
    if not re.fullmatch(r"\d{1,9}", meta["anchors"]) or tensors["v_r"].dim() != 2:
        raise ValueError(f"{meta['anchors']!r:.20} anchors, v_r has shape {tuple(tensors['v_r'].shape)}")
    n, (L, D) = int(meta["anchors"]), tensors["v_r"].shape
    shapes = {"v_r": (L, D), "d_harm": (L, D), "cos_harmful": (n, L), "cos_harmless": (n, L), "v_norm": (L,),
              "a_norm": (L,)}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} {str(tensor.dtype)[6:]}, "
                             f"need {shape} float32")
        by_layer = (tensor.T if name.startswith("cos_") else tensor).reshape(L, -1)
        finite, zero = by_layer.isfinite().all(-1), (by_layer == 0).all(-1)    # (L)
        for fault, bad in (("NaN or infinity", ~finite), ("only zeros", zero)):
            if bad.any():
                raise ValueError(f"{fault} in {name}, layer {int(bad.nonzero()[0])}")
    length, cos = tensors["v_r"].norm(dim=-1), torch.cat((tensors["cos_harmful"], tensors["cos_harmless"]))
    if (length - 1).abs().max() > 1e-3 or cos.abs().max() > 1.001:
        raise ValueError(f"v_r is {float(length.min()):.4g} to {float(length.max()):.4g} long, need 1; "
                         f"a cosine is {float(cos.abs().max()):.4g}")


def check_meta(path, meta, want):
    """ValueError for the first entry of `want` that a vectors file does not share."""
    for key, value in want.items():
        if meta.get(key) != value:
            raise ValueError(f"{path}: made for {key} {meta.get(key)!r}, this run has {value!r}; "
                             "--refresh makes it again")


def cache_folder():
    """Where vectors are kept that have no other place."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scans"
    except RuntimeError:
        raise ValueError("no home folder to keep vectors in: give --vectors FILE --refresh") from None


def find_vectors(folder, model, tokenizer, *, vectors=None, refresh=False, harmful=None, harmless=None,
                 anchors=None, anchor_seed=None, progress=lambda done, total: None):
    """(Vectors, path, metadata): from the file `vectors`, else the model's folder, else the user's cache.

    A named file must be for this model and this prompt; its anchors are compared where they are named too.
    The one in the model's folder serves where all but the model agree, else a file in the cache under a name
    made from all of it. Vectors are extracted where there are none yet, or with `refresh`.
    """
    files, texts = anchor_texts(folder, harmful, harmless, anchors, anchor_seed)
    named = any(value is not None for value in (harmful, harmless, anchors, anchor_seed))
    identity = {"version": VERSION, "fingerprint": fingerprint(folder), "format": tokenizer.name,
                "system": tokenizer.system, "r_pos": tokenizer.format.r_pos}
    sample = {"harmful": digest("\n".join(texts[0])), "harmless": digest("\n".join(texts[1])),
              "anchors": str(len(texts[0])), "anchor_seed": str(anchor_seed or 0)}
    meta = want = {**identity, **sample, "dtype": str(model.embed.dtype)[6:]}
    if vectors is not None:
        path, want = Path(vectors), {**identity, **(sample if named else {})}
        if not path.exists() and not refresh:
            raise ValueError(f"{path}: no such file; --refresh makes it")
    else:
        path = Path(folder) / "vectors.safetensors"
        if not path.exists() or not serves(path, want, refresh):
            path = cache_folder() / f"{digest(json.dumps(want))}.safetensors"
    if path.exists() and not refresh:
        found, meta = load_vectors(path)
        check_meta(path, meta, want)
    else:
        if path.exists() and not is_ours(path):
            raise ValueError(f"{path}: is no vectors file, and is not written over")
        prompts = [anchor_prompts(file, some, model, tokenizer) for file, some in zip(files, texts)]
        with written_whole(path) as temporary:
            found = extract(model, *prompts, progress=lambda done: progress(done, 2 * len(texts[0])))
            save_vectors(temporary, found, meta)
    if found.v_r.shape != (model.config.L, model.config.D):
        raise ValueError(f"{path}: vectors of {tuple(found.v_r.shape)}, the model has "
                         f"{(model.config.L, model.config.D)}")
    return found, path, meta


def serves(path, want, refresh):
    """Is the vectors file of a model's folder for these anchors and this prompt? A damaged one is mended."""
    try:
        meta = load_vectors(path)[1]
    except ValueError:
        if not refresh:
            raise
        return True
    return all(meta[key] == value for key, value in want.items() if key != "fingerprint")


def anchor_prompts(file, texts, model, tokenizer):
    """The Prompts of the anchors of a file."""
    prompts = [tokenizer.prompt(text) for text in texts]
    longest = max(prompt.e + 1 for prompt in prompts)
    if longest > model.config.context:
        raise ValueError(f"{file}: an anchor has {longest} tokens, the context is {model.config.context}")
    return prompts


def open_model(folder, device=None, dtype=None, format=None, system=None):
    """The Llama and the Tokenizer of a folder. dtype: the name of one of torch's."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype}: need one of {', '.join(DTYPES)}")
    model = llama.load(folder, choose_device(device), dtype and getattr(torch, dtype))
    return model, Tokenizer(folder, model.config.V, format, system)


DTYPES = ("float32", "bfloat16", "float16")


def choose_device(name):
    """A torch device: the one named, else a GPU, else an Apple GPU, else the CPU. Raises ValueError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()       # a device that holds no numbers, like meta, fails here
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name}: not available ({llama.first_line(error)})") from None


def choose_threads(model, threads):
    """Set the CPU threads. A small model has one: its steps are shorter than the waking of a second."""
    if threads or model.size() < 2e7:
        torch.set_num_threads(threads or 1)


# ---------------------------------------------------------------------------------------------------------
# The command


def show_layers(layers):
    """[10, 11, 12, 20] as "10-12,20"; parse_layers reads it."""
    runs = []
    for l in layers:
        if runs and l == runs[-1][1] + 1:
            runs[-1][1] = l
        else:
            runs.append([l, l])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_layers(text):
    """Inclusive ranges, "10-14,20", as a sorted list."""
    if not re.fullmatch(r"\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no list of layers like 10-14,20")
    runs = [[int(number) for number in run.split("-")] for run in text.split(",")]
    return sorted({l for run in runs for l in range(run[0], run[-1] + 1)})


def number(kind, low, high):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = text
        try:
            return checked("it", value, kind, low, high)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line. It takes --alpha=-- for a flag without a value: that is one too."""

    def parse_args(self):
        args = super().parse_args()
        for name, value in vars(args).items():
            if isinstance(value, list) and (not value or [] in value) and not name.endswith("_layers"):
                self.error(f"argument --{name.replace('_', '-')}: expected a value")
        return args

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def add_flags(parser):
    """The flags about the model and the method. Their names are those of Scans.load and of llama.Sampling."""
    def flag(group, name, help, metavar=None, **more):
        limits = LIMITS.get(name.replace("-", "_"))
        if limits and "choices" not in more:
            more["type"] = number(*limits)
            metavar = metavar or ("N" if limits[0] is int else "X")
        if "action" not in more:
            more["metavar"] = metavar
        group.add_argument(f"--{name}", help=help, **more)

    m = parser.add_argument_group("model")
    flag(m, "model", "a Hugging Face folder; default: the embedded model", "DIR", default=str(DATA / "tiny"))
    flag(m, "format", "default: what the folder's chat template or name shows", choices=list(FORMATS))
    flag(m, "system", "system prompt; default: the format's own", "TEXT")
    flag(m, "device", "cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    flag(m, "dtype", "default: that of the weights, where the device computes in it", choices=DTYPES)
    flag(m, "threads", "CPU threads; default: torch's choice, 1 for a small model")
    v = parser.add_argument_group("vectors")
    flag(v, "vectors", "vectors file; default: in the model's folder, else in the user's cache", "FILE")
    flag(v, "refresh", "extract them again", action="store_true")
    flag(v, "harmful", f"harmful anchors ({', '.join(READERS)})", "FILE")
    flag(v, "harmless", "harmless anchors", "FILE")
    flag(v, "anchors", "anchors of each kind, 64")
    flag(v, "anchor-seed", "seed of their drawing, 0")
    s = parser.add_argument_group("method; default: what is published for the model")
    flag(s, "alpha", "steering strength")
    flag(s, "threshold", "s_q below T is benign", "T")
    flag(s, "sigma", "forced on every query: -1 against refusal, 1 towards it, 0 no steering", type=int,
         choices=[-1, 0, 1])
    flag(s, "steer-layers", "inclusive, 0-based, like 10-14,20", "LAYERS", type=parse_layers)
    flag(s, "classify-layers", "likewise", "LAYERS", type=parse_layers)
    d = parser.add_argument_group("decoding")
    flag(d, "max-new-tokens", "256; 0: score only")
    flag(d, "repetition-penalty", "1.1 for the models of the paper, 1 for others")
    flag(d, "temperature", "0: greedy")
    flag(d, "top-p", "1")
    flag(d, "top-k", "0: all")
    flag(d, "seed", "of sampling, 0")
    flag(d, "no-default", "only the answer with SCANS", action="store_true")
    flag(parser, "json", "one JSON object a query on standard output", action="store_true")


def given(args, names):
    """{name: value} of the flags among `names` that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


ANCHORS = ("harmful", "harmless", "anchors", "anchor_seed")


def setup(args):
    """Scans from parsed flags; says what it found. What needs no weights is checked before they are read."""
    sampling = given(args, Sampling.__dataclass_fields__)
    if not sampling.get("temperature"):
        for name in ("top_p", "top_k", "seed"):
            if name in sampling:
                say(f"note      --{name.replace('_', '-')} has no effect without --temperature")
    if Path(args.model).is_dir():
        L = llama.read_config(args.model).L
        for what, layers in (("steering", args.steer_layers), ("classification", args.classify_layers)):
            if layers is not None:
                check_layers(what, layers, L)
        anchor_texts(args.model, **given(args, ANCHORS))

    model, tokenizer = open_model(args.model, args.device, args.dtype, args.format, args.system)
    choose_threads(model, args.threads)
    dtype, stored = (str(kind)[6:] for kind in (model.embed.dtype, model.stored))
    say(f"model     {shown(args.model)}: {model.size() / 1e6:.1f} M parameters, {model.config.L} layers, "
        f"{dtype}{'' if dtype == stored else f' (stored: {stored})'} on {model.embed.device}; "
        f"chat format {tokenizer.name}")
    if model.embed.device.type == "cpu" and llama.is_slow(model.embed.dtype):
        say(f"note      this CPU is slow in {dtype}: --dtype bfloat16 is faster, and rounds more")

    def progress(done, total):
        report(f"extracting vectors: {done} of {total} anchors", done == total)
    vectors, path, meta = find_vectors(args.model, model, tokenizer, vectors=args.vectors,
                                       refresh=args.refresh, progress=progress, **given(args, ANCHORS))
    say(f"vectors   {shown(path)}: {meta['anchors']} + {meta['anchors']} anchors, seed {meta['anchor_seed']}")

    chosen = settings(vectors, tokenizer.name, args.alpha, args.threshold, args.steer_layers,
                      args.classify_layers)
    say(f"settings  for {chosen.table.model} ({chosen.table.source}): alpha {chosen.alpha:g}, "
        f"steering layers {show_layers(chosen.steer)}, "
        f"classification layers {show_layers(chosen.classify)} of {model.config.L}")
    n, m = len(vectors.cos_harmful), len(vectors.cos_harmless)
    say(f"T         {chosen.T:.4f}, {chosen.T_rule}; {chosen.below} of {n} harmful anchors lie below, "
        f"{chosen.above} of {m} harmless ones above")
    if chosen.T_rule.startswith("published") and chosen.below > math.floor(QUANTILE * n):
        estimate = estimate_threshold(score(vectors.cos_harmful, chosen.classify))
        say(f"warning   the published T loses {chosen.below} of these anchors, an estimated one at most "
            f"{math.floor(QUANTILE * n)}: it was tuned with others; try --threshold {estimate:.4f}")
    if chosen.doubt:
        say(f"warning   {chosen.doubt}")
    sampling = chosen.sampling(sampling)
    if sampling.temperature:
        say(f"sampling  {sampling}")
    return Scans(model, tokenizer, vectors, chosen, args.sigma, sampling, meta)


def shown(path):
    """A path as a person would type it: relative where it lies below the current folder."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(line):
    """A line on standard error. What comes from a file or a user cannot move the cursor."""
    report("", True)
    print("".join(c if c.isprintable() else "\ufffd" for c in line), file=sys.stderr, flush=True)


def report(line, last):
    """A progress line, on a terminal only; the last one is wiped."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{'' if last else line}", end="", file=sys.stderr, flush=True)


def fail(message):
    """One line with the name of the program, or of its folder where that is run with -m. Exit status 2."""
    path = Path(sys.argv[0])
    say(f"{path.parent.name if path.name == '__main__.py' else path.name}: {message}")
    sys.exit(2)


def explain(decision, T):
    """The decision in one line."""
    s, sigma = float(decision.s[0]), int(decision.sigma[0])
    words = {-1: "benign, steered away from refusal", 1: "harmful, steered towards refusal", 0: "no steering"}
    say(f"s_q       {s:.4f} {'<' if s < T else '>='} T: sigma = {sigma:+d}, {words[sigma]}")


class Printer:
    """Shows answers that grow together, one below the other: each waits until those before it have ended."""
    TITLES = {"default": "without SCANS: ", "scans": "with SCANS:    "}
    ENDS = {None: "", "eos": "\n", "length": " [--max-new-tokens]\n", "context": " [end of the context]\n"}

    def __init__(self, names):
        self.order, self.ended, self.waiting = list(names), set(), {name: self.TITLES[name] for name in names}

    def show(self, i, name, new, stopped):
        self.waiting[name] += new + self.ENDS[stopped]
        if stopped:
            self.ended.add(name)
        while self.order:
            first = self.order[0]
            print(self.waiting.pop(first), end="", flush=True)
            if first not in self.ended:
                self.waiting[first] = ""
                return
            self.order.pop(0)


def ask(scans, question, args, history=(), past=None, decided=lambda decision: {}):
    """One question, shown as the flags say; its result. decided(decision) gives what more --json tells."""
    decision = scans.decide([question], history, past)
    explain(decision, scans.settings.T)
    more = decided(decision)
    printer = Printer(["scans"] if args.no_default else ["default", "scans"])
    show = (lambda *new: None) if args.json else printer.show
    result = {**scans.decode(decision, not args.no_default, show)[0], **more}
    if args.json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return result


def chat(scans, args):
    """Questions line by line from standard input. The conversation goes on with the answers of SCANS.

    Turns that the context does not hold are dropped, the oldest first, for the decision and the answer alike.
    """
    history, past = [], Past()
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            history = newest(scans, line.strip(), history)
            result = ask(scans, line.strip(), args, history, past)
            history.append((result["prompt"], result["scans"] or ""))


def newest(scans, question, history):
    """The last turns of a chat, so many that a quarter of the context stays free for the answer."""
    context = scans.model.config.context
    most = context - min(scans.sampling.max_new_tokens, context // 4)
    fits = (i for i in range(len(history)) if scans.tokenizer.prompt(question, history[i:]).e < most)
    dropped = next(fits, len(history))
    if dropped:
        say(f"note      the oldest {dropped} of {len(history)} turns dropped: the context is {context}")
    return history[dropped:]


def trace(scans, question, args):
    """One query whole: its tokens with p and e, the cosine of every layer, v_r in words, the answers."""
    chosen = scans.settings

    def show(decision):
        prompt, cos = decision.prompts[0], decision.cosines[0].tolist()
        marks = {prompt.p: " <p>", prompt.e: " <e>"}
        tokens = [scans.tokenizer.piece(id) + marks.get(i, "") for i, id in enumerate(prompt.ids)]
        top = top_tokens(scans.model, scans.tokenizer, scans.v_r, 5)
        if args.json:
            return {"tokens": tokens, "cosines": cos, "top_tokens": top}
        print(textwrap.fill(" ".join(tokens), 110), f"\np = {prompt.p}, last token of the instruction; "
              f"e = {prompt.e}, last token of {scans.r_pos()}\n")
        print("layer  cos(a_t, d_harm)  used to   v_r points to")
        for l, words in enumerate(top):
            use = ("classify " if l in chosen.classify else "") + ("steer" if l in chosen.steer else "")
            print(f"{l:5}  {cos[l]:16.4f}  {use:14}  {' '.join(words)}")
        s, sigma = float(decision.s[0]), int(decision.sigma[0])
        print(f"\ns_q = {s:.4f}, the mean over the layers that classify; T = {chosen.T:.4f}; "
              f"sigma = {sigma:+d}; added at p and after: {sigma * chosen.alpha:+g} v_r\n", flush=True)
        return {}
    ask(scans, question, args, decided=show)


def analyze(scans, args):
    """The layers: words of each segment (Table 1), lengths, separation of the anchors. Changes nothing."""
    vectors, L = scans.vectors, scans.model.config.L
    words = segment_words(scans.model, scans.tokenizer, vectors.v_r)
    by_layer = top_tokens(scans.model, scans.tokenizer, vectors.v_r)
    rows = [{"layer": l, "v_norm": float(vectors.v_norm[l]), "a_norm": float(vectors.a_norm[l]),
             "auroc": auroc(vectors.cos_harmful[:, l], vectors.cos_harmless[:, l]),
             "top_tokens": by_layer[l]} for l in range(L)]
    ranges = []
    for layers in candidates(L):
        T, above, area = separation(score(vectors.cos_harmful, layers), score(vectors.cos_harmless, layers))
        ranges.append({"classify_layers": layers, "auroc": area, "threshold": T, "above": above})
    set_now = scans.settings.classify
    best = max(ranges, key=lambda row: (row["auroc"], -row["above"], row["classify_layers"] == set_now))
    if args.json:
        found = {"segments": words, "layers": rows, "ranges": ranges, "best": best["classify_layers"]}
        print(json.dumps(found, ensure_ascii=False))
        return
    print("segment         tokens its first principal component points to")
    for name, some in words.items():
        print(f"{name:7} {show_layers(segments(L)[name]):7} {' '.join(some)}")
    print("\nlayer  |v_r| before scaling  |a| at p  AUROC of the anchors  v_r points to")
    for row in rows:
        print(f"{row['layer']:5}  {row['v_norm']:20.3f}  {row['a_norm']:8.2f}  {row['auroc']:20.3f}  "
              f"{' '.join(row['top_tokens'][:6])}")
    print("\nclassification layers  AUROC of the anchors  T estimated  harmless anchors above")
    for row in ranges:
        name = show_layers(row["classify_layers"]) + " as set" * (row["classify_layers"] == set_now)
        print(f"{name:21}  {row['auroc']:20.3f}  {row['threshold']:11.4f}  {row['above']:22}")
    ties = sum(row["auroc"] == best["auroc"] for row in ranges) - 1
    more = f" ({ties} more are as good)" if ties else ""
    print(f"best by AUROC: {show_layers(best['classify_layers'])}{more}")


def candidates(L):
    """Ranges of layers that may classify: every run of whole segments."""
    parts = [list(layers) for layers in segments(L).values() if layers]
    return [sum(parts[i:j], []) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]


def main():
    parser = Parser(
        prog="scans.py",
        description="SCANS: answers harmless questions that a safety-aligned model refuses. No training.",
        epilog="Answers go to standard output, all else to standard error. Exit status 2: unusable input.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", action="append",
                      help="answer without and with SCANS; may repeat; - reads a prompt a line")
    mode.add_argument("--chat", action="store_true", help="the same, line after line, in one conversation")
    mode.add_argument("--trace", metavar="TEXT", help="one query whole: tokens, positions, cosines, answers")
    mode.add_argument("--analyze", action="store_true", help="the layers: words, lengths, separation")
    add_flags(parser)
    run(parser, modes)


def modes(args):
    for text in args.prompt or [args.trace] * (args.trace is not None):
        check_text(text)
    scans = setup(args)
    if args.chat:
        chat(scans, args)
    elif args.trace is not None:
        trace(scans, args.trace, args)
    elif args.analyze:
        analyze(scans, args)
    else:
        for text in args.prompt:
            for question in ([line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text]):
                ask(scans, question, args)


def run(parser, command):
    """Parse the flags and carry out command(args). What can go wrong becomes one line and an exit status."""
    sys.stderr, sys.stdin = sys.stderr or open(os.devnull, "w"), sys.stdin or io.StringIO()     # None: closed
    if sys.stdout is None:
        fail("standard output is closed")
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout.reconfigure(errors="replace")
        command(parser.parse_args())
        sys.stdout.flush()
    except BrokenPipeError:     # the reader has gone: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        report("", True)
        sys.exit(130)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail("out of memory: try --dtype bfloat16, a smaller --max-new-tokens, or --device cpu")
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
