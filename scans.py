"""SCANS, Safety-Conscious Activation Steering (Cao, Yang, Zhao, AAAI 2025, arXiv 2408.11491), in one file.

A safety-aligned chat model refuses harmless questions that merely sound dangerous. SCANS cures that without training:

    anchors      64 harmful queries Q-, 64 harmless ones Q+
    extraction   a refusal vector v_r^l per layer from their difference (Eq. 1), a harm direction d_harm^l (Eqs. 2, 3)
    layers       which layers carry the refusal: project the vectors on the vocabulary (section 3.2)
    decision     is this query harmful? cosine of its hidden-state transition with d_harm (Eqs. 4, 5)
    steering     add sigma * alpha * v_r in the middle layers while generating (Eq. 6)

The sections below follow that order; then the main job, the vectors file, the command line.
Layer l is the residual stream after block l, 0-based, before the final norm, everywhere.
What differs from the authors' public code, and why, stands in the README.

Letters of every shape comment:
    B queries   n, m harmful, harmless anchors   L layers   D model width   V vocabulary   T threshold, not a shape
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import llama
from llama import Cache, Sampling
from tokenizer import FORMATS, Tokenizer

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# Anchors: prompts from files

COLUMNS = ("prompt", "goal", "Goal", "Question", "question", "forbidden_prompt", "Behavior", "instruction", "text")


@dataclass(frozen=True)
class Row:
    """A prompt of a file: its text, "safe" / "unsafe" / None where the file does not say, its type, all its fields."""
    text: str
    label: str | None = None
    type: str = ""
    fields: dict = field(default_factory=dict)


def read_prompts(path):
    """Every prompt of a .csv (first present of COLUMNS), .json (list of strings or objects) or .txt file (one a line).

    The label is the column `label`, else XSTest's type (contrast_... is unsafe), else None. Raises ValueError.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: parquet is not read here; convert it once: python -c \"import pandas as p; d = p.read_parquet('{path}'); "
                         f"d = d.explode(['sentence', 'label']).rename(columns={{'sentence': 'prompt'}}) if 'sentence' in d else d; "
                         f"d.replace({{True: 'safe', False: 'unsafe'}}).to_csv('{path.with_suffix('.csv')}', index=False)\"")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some sets begin with a byte-order mark
        if path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)          # documents to summarize are longer than csv's own limit
            items = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        elif path.suffix == ".json":
            items = json.loads(text)
        else:
            items = text.split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except (OSError, csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(items, list) or not all(isinstance(item, (str, dict)) for item in items):
        raise ValueError(f"{path}: need a list of strings or of objects")
    rows = []
    for number, item in enumerate(items, 1):
        item = {"text": item} if isinstance(item, str) else item
        column = next((name for name in COLUMNS if name in item), None)
        if column is None:
            raise ValueError(f"{path}: row {number} has none of the columns {', '.join(COLUMNS)}")
        kind = item.get("type") or ""
        label = item.get("label") or ("unsafe" if kind.startswith("contrast_") else "safe" if "type" in item and "focus" in item else None)
        if label not in ("safe", "unsafe", None):
            raise ValueError(f"{path}: row {number} has the label {label}, need safe or unsafe")
        if (item[column] or "").strip():
            rows.append(Row(item[column].strip(), label, kind, item))
    if not rows:
        raise ValueError(f"{path}: no prompts")
    return rows


def draw_anchors(path, kind, n, seed):
    """n different prompts of a file, drawn by seed; kind "safe" or "unsafe" leaves out rows labelled otherwise."""
    texts = list(dict.fromkeys(row.text for row in read_prompts(path) if row.label in (kind, None)))
    if len(texts) < n:
        raise ValueError(f"{path}: {len(texts)} different {kind} prompts, {n} anchors asked for")
    return random.Random(seed).sample(texts, n)


# ----------------------------------------------------------------------------------------------------------------------
# Extraction: Eqs. 1 to 3


def pad(prompts, device):
    """Ids of several Prompts, padded on the right, and their positions: (B, T) and (B, 2) with p and e."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in prompts], device=device)
    return ids, torch.tensor([[prompt.p, prompt.e] for prompt in prompts], device=device)


def check_finite(streams, names):
    """Raise ValueError naming the first layer of streams (B, L, ...) that holds NaN or infinity, and the first of the B names there."""
    bad = ~streams.isfinite().flatten(2).all(-1)                                            # (B, L)
    if bad.any():
        l = int(bad.any(0).nonzero()[0])
        raise ValueError(f"NaN or infinity in the residual stream after layer {l}, at {names[int(bad[:, l].nonzero()[0])]}")


@torch.inference_mode()
def read_streams(model, prompts, batch_size=16, progress=lambda done: None):
    """The residual streams at p and e of every prompt: (n, L, 2, D) float32. One pass over instruction + r_pos gives both:
    attention is causal, so position p does not see r_pos."""
    streams = torch.empty(len(prompts), model.config.L, 2, model.config.D)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))                  # like lengths together: less padding
    for i in range(0, len(order), batch_size):
        rows = order[i:i + batch_size]
        ids, positions = pad([prompts[row] for row in rows], model.embed.device)
        _, read = model.forward(ids, read=positions)                                        # (B, L, 2, D)
        check_finite(read, [f"prompt {row + 1}" for row in rows])
        streams[rows] = read.float().cpu()
        progress(i + len(rows))
    return streams


def refusal_vectors(a_harmful, a_harmless):
    """v_r (L, D) of unit length and its length before scaling (L), from a^l(q) at p: (n, L, D) and (m, L, D).

    The scaling is the public code's, not the paper's; the published alpha (2 to 4) only makes sense with it.
    """
    v = a_harmful.mean(0) - a_harmless.mean(0)                                              # Eq. 1
    norm = v.norm(dim=-1)                                                                   # (L)
    if (norm == 0).any():
        raise ValueError(f"layer {int((norm == 0).nonzero()[0])}: harmful and harmless anchors have the same mean")
    return v / norm[:, None], norm


def transition(streams):
    """a_t (n, L, D) from the streams at p and e (n, L, 2, D)."""
    return streams[:, :, 0] - streams[:, :, 1]                                              # Eq. 2


def harm_direction(a_t):
    """d_harm (L, D) from the harmful anchors' transitions (n, L, D)."""
    return a_t.mean(0)                                                                      # Eq. 3


def leave_one_out(a_t):
    """Cosines (n, L) of each harmful anchor's transition with the d_harm of the n - 1 others; a_t (n, L, D)."""
    n = len(a_t)
    others = (n * harm_direction(a_t) - a_t) / (n - 1)                                      # (n, L, D)
    return F.cosine_similarity(a_t, others, dim=-1)


@dataclass
class Vectors:
    """All that extraction finds; one file holds it."""
    v_r: torch.Tensor           # (L, D) refusal steering vectors, unit length
    d_harm: torch.Tensor        # (L, D) reference harm direction
    cos_harmful: torch.Tensor   # (n, L) leave-one-out cosines of the harmful anchors
    cos_harmless: torch.Tensor  # (m, L) cosines of the harmless anchors with d_harm
    v_norm: torch.Tensor        # (L) length of v_r before scaling
    a_norm: torch.Tensor        # (L) mean length of the residual stream at p, over all anchors


def extract(model, harmful, harmless, progress=lambda done: None):
    """Vectors from the Prompts of the anchors."""
    streams = read_streams(model, harmful + harmless, progress=progress)
    minus, plus = streams[:len(harmful)], streams[len(harmful):]
    v_r, v_norm = refusal_vectors(minus[:, :, 0], plus[:, :, 0])
    a_t = transition(minus)
    d_harm = harm_direction(a_t)
    return Vectors(v_r, d_harm, leave_one_out(a_t), F.cosine_similarity(transition(plus), d_harm, dim=-1),
                   v_norm, streams[:, :, 0].norm(dim=-1).mean(0))


# ----------------------------------------------------------------------------------------------------------------------
# Layers: anchoring the safety-critical ones (section 3.2)


def segments(L):
    """The three uniform segments of L layers: {"former": 0-9, "middle": 10-20, "latter": 21-31} for 32."""
    return {"former": range(L // 3), "middle": range(L // 3, 2 * L // 3), "latter": range(2 * L // 3, L)}


def principal_component(v):
    """First principal component (D) of the rows of v (layers, D), along their mean.

    Not centred: what the layers of a segment share is what is wanted, and centring would take just that away. The paper does
    not say. A component has no sign of its own: turned the other way the table would show the words of compliance.
    """
    component = torch.linalg.svd(v, full_matrices=False).Vh[0]
    return component if component @ v.mean(0) >= 0 else -component


def top_tokens(model, tokenizer, directions, k=10):
    """The k pieces whose output embedding each direction (n, D) points to most: n lists."""
    logits = directions.to(model.head.device) @ model.head.to_dense().float().T             # (n, V)
    return [[tokenizer.piece(id) for id in ids] for ids in logits.topk(k).indices.tolist()]


def auroc(positive, negative):
    """Chance that a positive score lies above a negative one, ties counted half: the area under the ROC curve."""
    above = positive[:, None] - negative[None, :]
    return float((above > 0).float().mean() + (above == 0).float().mean() / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Decision: Eqs. 4 and 5


def cosines(a_t, d_harm):
    """cos(a_t^l, d_harm^l) for every layer: (B, L) from (B, L, D) and (L, D)."""
    return F.cosine_similarity(a_t, d_harm, dim=-1)


def score(cos, layers):
    """s_q (B) from the cosines (B, L), over the classification layers."""
    return cos[:, layers].mean(1)                                                           # Eq. 4


def steering_direction(s, T):
    """sigma (B): -1 benign, steered against refusal; +1 harmful, steered towards it."""
    return torch.where(s < T, -1, 1)                                                        # Eq. 5


QUANTILE = 0.01  # share of the harmful anchors that an estimated T may lose


def estimate_threshold(scores):
    """T from the harmful anchors' leave-one-out scores (n): at most floor(QUANTILE n) of them lie below. A bound on the
    anchors, not on queries to come."""
    return float(scores.sort().values[math.floor(QUANTILE * len(scores))])


# ----------------------------------------------------------------------------------------------------------------------
# Settings per model


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


PUBLISHED = {  # (chat format, number of layers)
    ("llama-2", 32): Published("Llama-2-7b-chat", (10, 19), (10, 31), 3.5, 0.75, 1.1, "public code; T also in section 4.4"),
    ("llama-2", 40): Published("Llama-2-13b-chat", (10, 19), (10, 18), 3.5, 0.75, 1.1, "public code"),
    ("vicuna", 32): Published("vicuna-7b-v1.5", (10, 19), (10, 31), 4.0, 0.75, 1.1, "public code"),
    ("vicuna", 40): Published("vicuna-13b-v1.5", (10, 19), (10, 18), 4.0, 0.70, 1.1, "public code"),
}


def unlisted(L):
    """Settings for any other model: steer the middle third, classify from there to the end, estimate T."""
    return Published(f"any other model of {L} layers", (L // 3, max(L // 3, 2 * L // 3 - 1)), (L // 3, L - 1), 3.5, None, 1.0,
                     "this project: the middle third")


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


def settings(vectors, format, alpha=None, T=None, steer=None, classify=None):
    """Settings from the vectors and the chat format; arguments that are not None go before the table.

    T is what is given, else the published one where model and layers are the table's, else estimated from the anchors.
    """
    L = len(vectors.v_r)
    table = PUBLISHED.get((format, L)) or unlisted(L)
    whole = {name: list(range(first, last + 1)) for name, (first, last) in (("steering", table.steer), ("classification", table.classify))}
    steer, classify = whole["steering"] if steer is None else steer, whole["classification"] if classify is None else classify
    for name, layers in (("steering", steer), ("classification", classify)):
        if not layers or min(layers) < 0 or max(layers) >= L:
            raise ValueError(f"{name} layers {show_layers(layers)}: the model has layers 0-{L - 1}")
    harmful, harmless = score(vectors.cos_harmful, classify), score(vectors.cos_harmless, classify)
    if T is not None:
        rule = "given"
    elif table.T is not None and classify == whole["classification"]:
        T, rule = table.T, f"published for {table.model}"
    else:
        T, rule = estimate_threshold(harmful), "estimated from the anchors"
    return Settings(table.alpha if alpha is None else alpha, T, rule, steer, classify, table,
                    int((harmful < T).sum()), int((harmless >= T).sum()))


# ----------------------------------------------------------------------------------------------------------------------
# Steering, and the main job: Eq. 6


def steering(v_r, strength, layers):
    """What is added to the residual stream of each row: (B, L, D), zero but for the steering layers.

    strength (B): sigma * alpha of each row, 0 for an answer without SCANS; v_r (L, D).
    """
    steer = torch.zeros(len(strength), *v_r.shape, device=v_r.device)
    steer[:, layers] = strength[:, None, None] * v_r[layers]                                # Eq. 6, the term added
    return steer


@dataclass
class Past:
    """What a chat keeps of its last turn: the ids before its p, and a cache that holds their unsteered keys."""
    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None


@dataclass
class Decision:
    """What one unsteered pass over instruction + r_pos tells of B questions."""
    results: list[dict]         # B dicts with the keys of --json; what only answers tell is None
    prompts: list               # B Prompts
    cosines: torch.Tensor       # (B, L)
    cache: Cache                # B rows, cut back to p


class Scans:
    """A model with its tokenizer, vectors and settings: `Scans.load("data/tiny").answer(["How do I kill dandelions in a lawn?"])`."""

    def __init__(self, model, tokenizer, vectors, settings, sigma=None, sampling=None, meta=None):
        """sigma: None to decide per query, else -1, 0 or +1 for every query. sampling: None for the model's published way.
        meta: the metadata of the file that the vectors come from, for `export`."""
        self.model, self.tokenizer, self.vectors, self.settings, self.sigma = model, tokenizer, vectors, settings, sigma
        self.meta, self.sampling = meta, sampling or Sampling(repetition_penalty=settings.table.repetition_penalty)
        self.v_r, self.d_harm = (t.to(model.embed.device) for t in (vectors.v_r, vectors.d_harm))

    @classmethod
    def load(cls, folder=HERE / "data" / "tiny", device=None, dtype=None, format=None, system=None, vectors=None, refresh=False,
             harmful=None, harmless=None, anchors=None, anchor_seed=None, alpha=None, threshold=None, sigma=None,
             steer_layers=None, classify_layers=None, sampling={}, threads=None, log=lambda line: None, progress=lambda done, total: None):
        """Everything from a model's folder; arguments are the flags of the command, None for what they default to.

        sampling: the fields of llama.Sampling that are given. Makes the vectors where there are none. Raises ValueError.
        """
        model = llama.load(folder, choose_device(device), dtype and getattr(torch, dtype))
        choose_threads(model, threads)
        tokenizer = Tokenizer(folder, model.config.V, format, system)
        dtype, stored = (str(kind)[6:] for kind in (model.embed.dtype, model.stored))
        slow = "" if llama.widen(model.embed[:0]).dtype == model.embed.dtype else " (slow in it: long prompts go through float32)"
        log(f"model     {shown(folder)}: {model.size() / 1e6:.1f} M parameters, {model.config.L} layers, {dtype}{'' if dtype == stored else f' (stored: {stored})'} "
            f"on {model.embed.device}{slow}; chat format {tokenizer.name}")
        found, path, meta = find_vectors(folder, model, tokenizer, vectors, refresh, harmful, harmless, anchors, anchor_seed, progress)
        log(f"vectors   {shown(path)}: {meta['anchors']} + {meta['anchors']} anchors, seed {meta['anchor_seed']}")
        chosen = settings(found, tokenizer.name, alpha, threshold, steer_layers, classify_layers)
        return cls(model, tokenizer, found, chosen, sigma, Sampling(**{"repetition_penalty": chosen.table.repetition_penalty, **sampling}), meta)

    @torch.inference_mode()
    def decide(self, questions, history=(), past=None):
        """The Decision on each question after `history` (finished turns).

        past: a Past to start from, for one question; it is brought up to date. Raises ValueError.
        """
        started, config = time.perf_counter(), self.model.config
        prompts = [self.tokenizer.prompt(question, history) for question in questions]
        for prompt in prompts:
            if prompt.e >= config.context:
                raise ValueError(f"the prompt has {prompt.e + 1} tokens with its {self.tokenizer.format.r_pos.strip()}, "
                                 f"the model's context is {config.context}")
        end = min(max(prompt.p for prompt in prompts) + 1 + self.sampling.max_new_tokens, config.context)
        cache = Cache(config, len(prompts), max(end, *(prompt.e + 1 for prompt in prompts)), self.model.embed)
        known = len(os.path.commonprefix([past.ids, prompts[0].ids[:prompts[0].p]])) if past else 0
        if known:
            cache.kv[:, :, :, :known] = past.cache.kv[:, :, :, :known]
            cache.length[:] = known
        ids, positions = pad(prompts, self.model.embed.device)
        _, streams = self.model.forward(ids[:, known:], cache, read=positions - known)      # (B, L, 2, D)
        check_finite(streams, [repr(question[:60]) for question in questions])
        cos = cosines(transition(streams.float()), self.d_harm)                             # (B, L)
        s = score(cos, self.settings.classify)                                              # (B)
        sigma = steering_direction(s, self.settings.T) if self.sigma is None else torch.full_like(s, self.sigma).int()
        cache.length = torch.tensor([prompt.p for prompt in prompts])  # cut back to p, which runs once more, steered
        if past:
            past.ids, past.cache = prompts[0].ids[:prompts[0].p], cache
        return Decision([{
            "prompt": question, "format": self.tokenizer.name, "p": prompt.p, "e": prompt.e, "score": float(s[i]),
            "threshold": self.settings.T, "threshold_rule": self.settings.T_rule, "sigma": int(sigma[i]), "alpha": self.settings.alpha,
            "steer_layers": self.settings.steer, "classify_layers": self.settings.classify, "default": None, "scans": None,
            "refused": {"default": None, "scans": None}, "stopped": {"default": None, "scans": None},
            "positions": {"default": None, "scans": prompt.e + 1 - known},
            "seconds": {"score": time.perf_counter() - started, "answers": None},
        } for i, (question, prompt) in enumerate(zip(questions, prompts))], prompts, cos, cache)

    @torch.inference_mode()
    def answer(self, questions, default=True, history=(), past=None, decided=lambda decision: None, show=lambda *new: None):
        """Answer each question without SCANS (unless default is False) and with it, all rows in one batch; arguments as in `decide`.

        decided(Decision) is called before decoding; show(i, "default" or "scans", text, stopped) with the new text of an
        answer to question i as it comes, and at last why it ended. Returns the list of dicts of `decide`, filled in.
        """
        decision = self.decide(questions, history, past)
        decided(decision)
        started, results, cache = time.perf_counter(), decision.results, decision.cache
        if self.sampling.max_new_tokens == 0:
            return results
        rows = [(i, name) for i in range(len(questions)) for name in (("default", "scans") if default else ("scans",))]
        if default:
            cache = cache.rows([i for i, _ in rows])
        strength = torch.tensor([0.0 if name == "default" else results[i]["sigma"] * self.settings.alpha for i, name in rows])
        steer = steering(self.v_r, strength.to(self.v_r.device), self.settings.steer).to(self.model.embed.dtype)
        instructions = [decision.prompts[i].ids[:decision.prompts[i].p + 1] for i, _ in rows]
        answers = [[] for _ in rows]
        for step in llama.generate(self.model, instructions, cache, steer, self.sampling):
            for row, id, stopped in step:
                i, name = rows[row]
                answers[row] += [] if id is None else [id]
                # decode the whole: a piece alone loses its space, and a character may take several; half a one is held back
                text, before = self.tokenizer.decode(answers[row]), results[i][name] or ""
                if stopped or not text.endswith("\ufffd"):
                    results[i][name] = text
                    show(i, name, text[len(before):], stopped)
                results[i]["stopped"][name] = stopped
        for (i, name), instruction in zip(rows, instructions):
            results[i]["refused"][name] = is_refusal(results[i][name])
            # the default answer shares the pass of the other; alone it would run its p + 1 positions
            results[i]["positions"][name] = results[i]["positions"]["scans"] + 1 if name == "scans" else len(instruction)
            results[i]["seconds"]["answers"] = time.perf_counter() - started
        return results


# ----------------------------------------------------------------------------------------------------------------------
# Refusal detection

CANNOT = r"(?:cannot|can't|can not|could not|couldn't|will not|won't|(?:am|'m) (?:not able|unable|not allowed|not going|not willing) to)"
HELP = (r"(?:help|assist|aid|support|provide|give|offer|share|tell|teach|explain|discuss|answer|respond|fulfill?|satisfy|comply|engage|"
        r"participate|do (?:that|this|so)|write|create|generate|produce|advise|recommend|suggest|encourage|promote|condone|endorse|facilitate)")
REFUSALS = (  # looked for in the opening of an answer, lower case, with straight quotes
    rf"\bi ?(?:\w+ ){{0,2}}{CANNOT} (?!wait )(?:[\w,']+ ){{0,4}}?{HELP}\b",  # I (simply) cannot (in good conscience) help; not: I cannot taste food
    r"\bi (?:do not|don't) (?:provide|assist|help|support|condone|engage)\b|\bi(?:'d| would) rather not\b",
    r"\b(?:not|n't) something (?:that )?i (?:can|could|am able|will|'m able)\b",
    r"\bsorry,? but\b|\bsorry,? i (?:can|won|will|am)",                # I'm sorry, but ...; not: sorry to hear that
    r"\bi (?:must |have to )?apologi[sz]e,? but\b",
    r"\bi (?:must|have to|will have to)(?: \w+ly)? (?:decline|refuse)\b|\bi (?:decline|refuse) to\b",
    r"\b(?:not|n't) (?:feel )?comfortable (?:with )?\w+ing\b",         # I'm not comfortable helping with that
    r"\bas an? (?:responsible|ethical|respectful)\b",                  # As a responsible assistant, ...
    r"\b(?:not|never|n't) (?:appropriate|ethical|acceptable)\b(?: or \w+)? (?:for me )?to\b",
    r"\b(?:it|this|that)(?: is|'s| would be) (?:\w+ and )?(?:unethical|immoral)\b",
    r"\b(?:against|not within|beyond) my (?:programming|guidelines|principles|values|policy|policies)\b",
)


def is_refusal(answer):
    """Does an answer refuse? Looks at its first two sentences, at most 300 characters, without what stands in double quotes:
    a refusal inside a dialogue or a law's text further down is none. A stand-in for a judge; the answers are kept."""
    text = answer.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")).lower()
    opening = " ".join(re.split(r"(?<=[.!?])\s+", re.sub(r'"[^"]*"', "", text).strip())[:2])[:300]
    return any(re.search(pattern, opening) for pattern in REFUSALS)


# ----------------------------------------------------------------------------------------------------------------------
# State that lasts: the vectors file

VERSION = "1"


def digest(text):
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()[:16]


def fingerprint(folder):
    """A model's identity: config, tokenizer, and of every weight file its size, first MiB (the header) and 64 blocks of its
    data. Quick on 13 GB, unmoved by copying the folder."""
    h = hashlib.sha256()
    for name in ("config.json", "tokenizer.model"):
        h.update((Path(folder) / name).read_bytes())
    for path in llama.weight_files(folder):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            h.update(file.read(2**20))
            for block in range(64):
                file.seek(size * block // 64)
                h.update(file.read(4096))
    return h.hexdigest()[:16]


def save_vectors(path, vectors, meta):
    """Write a vectors file: under a temporary name first, then moved into place."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in vars(vectors).items()}, temporary, metadata=meta)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_vectors(path):
    """(Vectors, metadata) of a vectors file. Raises ValueError for one that is damaged or holds NaN."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            vectors = Vectors(**{name: file.get_tensor(name) for name in file.keys()})
        L, D = vectors.v_r.shape
        shapes = {"v_r": (L, D), "d_harm": (L, D), "cos_harmful": (len(vectors.cos_harmful), L),
                  "cos_harmless": (len(vectors.cos_harmless), L), "v_norm": (L,), "a_norm": (L,)}
        if any(tuple(getattr(vectors, name).shape) != shape for name, shape in shapes.items()):
            raise ValueError(f"need the shapes {shapes}")
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole vectors file ({str(error).partition(chr(10))[0]}); --refresh makes it again") from None
    for name, tensor in vars(vectors).items():
        by_layer = tensor.T if name.startswith("cos_") else tensor                          # (L, ...)
        bad = ~by_layer.isfinite().reshape(L, -1).all(-1)
        if bad.any():
            raise ValueError(f"{path}: NaN or infinity in {name}, layer {int(bad.nonzero()[0])}; --refresh makes it again")
    return vectors, meta


def check_meta(path, meta, want):
    """ValueError for the first entry of `want` that a vectors file does not share."""
    for key, value in want.items():
        if meta.get(key) != value:
            raise ValueError(f"{path}: made for {key} {meta.get(key)!r}, this run has {value!r}; --refresh makes it again")


def anchor_texts(folder, harmful=None, harmless=None, anchors=None, anchor_seed=None):
    """The anchors of a run: their two files, harmful and harmless, and the texts drawn from each."""
    folder, anchors = Path(folder), 64 if anchors is None else anchors
    files = [given or (folder if (folder / name).exists() else HERE / "data") / name
             for given, name in ((harmful, "harmful.txt"), (harmless, "harmless.txt"))]
    return files, [draw_anchors(file, kind, anchors, anchor_seed or 0) for file, kind in zip(files, ("unsafe", "safe"))]


def find_vectors(folder, model, tokenizer, path=None, refresh=False, harmful=None, harmless=None, anchors=None, anchor_seed=None,
                 progress=lambda done, total: None):
    """(Vectors, path, metadata): from `path`, else the model's folder, else the user's cache; extracted where there are none yet.

    A file at `path` must be for this model and this prompt; its anchors are compared only where they are named. The one in
    the model's folder serves where all but the model agree, else a file in the cache, under a name made from all of it.
    """
    folder, named = Path(folder), any(value is not None for value in (harmful, harmless, anchors, anchor_seed))
    anchors, anchor_seed = 64 if anchors is None else anchors, anchor_seed or 0
    files, texts = anchor_texts(folder, harmful, harmless, anchors, anchor_seed)
    both = set(texts[0]) & set(texts[1])
    if both:
        raise ValueError(f"{files[0]} and {files[1]}: {len(both)} of {anchors} anchors are harmful and harmless at once, {min(both)!r} the first")
    identity = {"version": VERSION, "fingerprint": fingerprint(folder), "format": tokenizer.name, "system": tokenizer.system,
                "r_pos": tokenizer.format.r_pos}
    sample = {"harmful": digest("\n".join(texts[0])), "harmless": digest("\n".join(texts[1])), "anchors": str(anchors),
              "anchor_seed": str(anchor_seed), "dtype": str(model.embed.dtype)[6:]}
    if path is not None:
        path, want = Path(path), {**identity, **(sample if named else {})}
        want.pop("dtype", None)
    else:
        want, beside = {**identity, **sample}, folder / "vectors.safetensors"
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scans" / f"{digest(json.dumps(want))}.safetensors"
        if beside.exists():
            try:
                meta = load_vectors(beside)[1]
            except ValueError:
                if not refresh:
                    raise
                meta = want
            if all(meta.get(key) == value for key, value in want.items() if key != "fingerprint"):
                path = beside
    if path.exists() and not refresh:
        vectors, meta = load_vectors(path)
        check_meta(path, meta, want)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: the folder cannot be written to; give --vectors")  # now, not after minutes of extraction
        prompts = []
        for file, kind in zip(files, texts):
            prompts.append([tokenizer.prompt(text) for text in kind])
            longest = max(prompt.e + 1 for prompt in prompts[-1])
            if longest > model.config.context:
                raise ValueError(f"{file}: an anchor has {longest} tokens, the model's context is {model.config.context}")
        vectors, meta = extract(model, *prompts, progress=lambda done: progress(done, 2 * anchors)), {**identity, **sample}
        save_vectors(path, vectors, meta)
    if vectors.v_r.shape != (model.config.L, model.config.D):
        raise ValueError(f"{path}: vectors of {tuple(vectors.v_r.shape)}, the model has {(model.config.L, model.config.D)}")
    return vectors, path, meta


# ----------------------------------------------------------------------------------------------------------------------
# The command


def choose_device(name):
    """A torch device: the one named, else a GPU, else an Apple GPU, else the CPU. Raises ValueError for one that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name}: not to be had here ({str(error).partition(chr(10))[0]})") from None


def choose_threads(model, threads):
    """Set the CPU threads of this process: `threads`, else one for a small model, whose steps are shorter than waking a second."""
    if threads or model.size() < 2e7:
        torch.set_num_threads(threads or 1)


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
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers like 10-14,20")
    runs = [[int(number) for number in run.split("-")] for run in text.split(",")]
    if max(max(run) for run in runs) > 999:
        raise argparse.ArgumentTypeError(f"{text!r} names layers beyond 999")
    return sorted({l for run in runs for l in range(run[0], run[-1] + 1)})


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from low (or above it) to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r}: need {'an integer' if kind is int else 'a number'} "
                                             f"{'above' if above else 'from'} {low:g}{'' if math.isinf(high) else f' to {high:g}'}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def add_flags(parser):
    """The flags about the model and the method, with names for Scans.load and llama.Sampling."""
    m = parser.add_argument_group("model")
    m.add_argument("--model", metavar="DIR", default=str(HERE / "data" / "tiny"), help="a Hugging Face folder; default: the embedded model")
    m.add_argument("--format", choices=list(FORMATS), help="chat format; default: what the folder's chat template or name shows")
    m.add_argument("--system", metavar="TEXT", help="system prompt; default: the format's own")
    m.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    m.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the weights, where the device computes in it")
    m.add_argument("--threads", type=number(int, 1, 1024), help="CPU threads; default: torch's choice, 1 for a small model")
    v = parser.add_argument_group("vectors")
    v.add_argument("--vectors", metavar="FILE", help="vectors file; default: in the model's folder, else in the user's cache")
    v.add_argument("--refresh", action="store_true", help="extract them again")
    v.add_argument("--harmful", metavar="FILE", help="harmful anchors (.txt, .csv or .json)")
    v.add_argument("--harmless", metavar="FILE", help="harmless anchors")
    v.add_argument("--anchors", metavar="N", type=number(int, 2), help="anchors of each kind, 64")
    v.add_argument("--anchor-seed", metavar="N", type=number(int, 0), help="seed of their drawing, 0")
    s = parser.add_argument_group("method; default: the published settings of the model, else those for any model")
    s.add_argument("--alpha", type=number(float, 0), help="steering strength")
    s.add_argument("--threshold", metavar="T", type=number(float, -2, 2), help="s_q below T is benign")
    s.add_argument("--sigma", type=int, choices=[-1, 0, 1], help="forced on every query: -1 against refusal, 1 towards it, 0 no steering")
    s.add_argument("--steer-layers", metavar="LAYERS", type=parse_layers, help="inclusive, 0-based, like 10-14,20")
    s.add_argument("--classify-layers", metavar="LAYERS", type=parse_layers)
    d = parser.add_argument_group("decoding")
    d.add_argument("--max-new-tokens", metavar="N", type=number(int, 0), help="256; 0: score only")
    d.add_argument("--repetition-penalty", metavar="X", type=number(float, 0, above=True), help="1.1 for the models of the paper, 1 for others")
    d.add_argument("--temperature", metavar="X", type=number(float, 0), help="0: greedy")
    d.add_argument("--top-p", metavar="X", type=number(float, 0, 1, above=True))
    d.add_argument("--top-k", metavar="N", type=number(int, 0))
    d.add_argument("--seed", metavar="N", type=number(int, 0, 2**63 - 1), help="of sampling, 0")
    d.add_argument("--no-default", action="store_true", help="only the answer with SCANS")
    parser.add_argument("--json", action="store_true", help="one JSON object a query on standard output")


def setup(args):
    """Scans from parsed flags; says on standard error what it found."""
    sampling = {name: getattr(args, name) for name in Sampling.__dataclass_fields__ if getattr(args, name) is not None}
    scans = Scans.load(args.model, args.device, args.dtype, args.format, args.system, args.vectors, args.refresh, args.harmful,
                       args.harmless, args.anchors, args.anchor_seed, args.alpha, args.threshold, args.sigma, args.steer_layers,
                       args.classify_layers, sampling, args.threads, say, lambda done, total: report(f"extracting vectors: {done} of {total} anchors", done == total))
    config, chosen = scans.model.config, scans.settings
    say(f"settings  {chosen.table.model} ({chosen.table.source}): alpha {chosen.alpha:g}, steering layers {show_layers(chosen.steer)}, "
        f"classification layers {show_layers(chosen.classify)} of {config.L}")
    say(f"T         {chosen.T:.4f}, {chosen.T_rule}; {chosen.below} of {len(scans.vectors.cos_harmful)} harmful anchors lie below, "
        f"{chosen.above} of {len(scans.vectors.cos_harmless)} harmless ones above")
    if scans.sampling.temperature:
        say(f"sampling  {scans.sampling}")
    return scans


def shown(path):
    """A path as a person would type it: relative where it lies below the current folder."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(line):
    print(line, file=sys.stderr, flush=True)


def report(line, last):
    """A progress line, on a terminal only; the last one is wiped."""
    if sys.stderr.isatty():
        print(f"\r{line}" if not last else f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


def fail(message):
    say(f"{Path(sys.argv[0]).name}: {message}")
    sys.exit(2)


def explain(result):
    """The decision in one line."""
    sigma = {-1: "benign, steered away from refusal", 1: "harmful, steered towards refusal", 0: "no steering"}[result["sigma"]]
    sign = "<" if result["score"] < result["threshold"] else ">="
    say(f"s_q       {result['score']:.4f} {sign} T: sigma = {result['sigma']:+d}, {sigma}")


class Printer:
    """Shows answers that grow together one below the other: each is held back until those before it have ended."""
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


def ask(scans, question, args, history=(), past=None, decided=lambda decision: None):
    """One question, shown as the flags say; its result."""
    def explained(decision):
        decided(decision)
        explain(decision.results[0])
    printer = Printer(["scans"] if args.no_default else ["default", "scans"])
    show = (lambda *new: None) if args.json else printer.show
    result, = scans.answer([question], not args.no_default, history, past, explained, show)
    if args.json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return result


def chat(scans, args):
    """Questions line by line from standard input; the conversation goes on with the answers of SCANS."""
    history, past = [], Past()
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            result = ask(scans, line.strip(), args, history, past)
            history.append((result["prompt"], result["scans"] or ""))


def trace(scans, question, args):
    """One query whole: its tokens with p and e, the cosine of every layer, what v_r says in words, and the answers."""
    config, chosen = scans.model.config, scans.settings

    def show(decision):
        prompt, result = decision.prompts[0], decision.results[0]
        marks = {prompt.p: " <p>", prompt.e: " <e>"}
        tokens = [scans.tokenizer.piece(id) + marks.get(i, "") for i, id in enumerate(prompt.ids)]
        top = top_tokens(scans.model, scans.tokenizer, scans.v_r, 5)
        cos = decision.cosines[0].tolist()
        if args.json:
            result.update(tokens=tokens, cosines=cos, top_tokens=top)
            return
        print(textwrap.fill(" ".join(tokens), 118), f"\np = {prompt.p}, last token of the instruction; e = {prompt.e}, "
              f"last token of {scans.tokenizer.format.r_pos.strip()}\n")
        print("layer  cos(a_t, d_harm)  used to   v_r points to")
        for l in range(config.L):
            use = ("classify " if l in chosen.classify else "") + ("steer" if l in chosen.steer else "")
            print(f"{l:5}  {cos[l]:16.4f}  {use:14}  {' '.join(top[l])}")
        print(f"\ns_q = {result['score']:.4f}, the mean over the layers that classify; T = {result['threshold']:.4f}; "
              f"sigma = {result['sigma']:+d}; added at p and after: {result['sigma'] * result['alpha']:+g} v_r\n", flush=True)
    ask(scans, question, args, decided=show)


def analyze(scans, args):
    """The layers: words of each segment (Table 1), lengths, separation of the anchors. Reports, changes nothing."""
    vectors, tokenizer, model = scans.vectors, scans.tokenizer, scans.model
    thirds = {name: layers for name, layers in segments(model.config.L).items() if layers}
    components = torch.stack([principal_component(vectors.v_r[list(layers)]) for layers in thirds.values()])    # (segments, D)
    words, by_layer = dict(zip(thirds, top_tokens(model, tokenizer, components))), top_tokens(model, tokenizer, vectors.v_r)
    rows = [{"layer": l, "v_norm": float(vectors.v_norm[l]), "a_norm": float(vectors.a_norm[l]),
             "auroc": auroc(vectors.cos_harmful[:, l], vectors.cos_harmless[:, l]),
             "top_tokens": by_layer[l]} for l in range(model.config.L)]
    if args.json:
        print(json.dumps({"segments": words, "layers": rows}, ensure_ascii=False))
        return
    print("segment         tokens its first principal component points to")
    for name, layers in thirds.items():
        print(f"{name:7} {show_layers(layers):7} {' '.join(words[name])}")
    print("\nlayer  |v_r| before scaling  |a| at p  AUROC of the anchors  v_r points to")
    for row in rows:
        print(f"{row['layer']:5}  {row['v_norm']:20.3f}  {row['a_norm']:8.2f}  {row['auroc']:20.3f}  {' '.join(row['top_tokens'][:6])}")


def main():
    parser = Parser(prog="scans.py", description="SCANS: answers harmless questions that a safety-aligned model refuses, without training.",
                    epilog="Answers go to standard output, everything else to standard error. Exit status: 0 done, 2 unusable input.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", action="append", help="answer without and with SCANS; may repeat; - reads a prompt a line")
    mode.add_argument("--chat", action="store_true", help="the same, line after line, with the conversation so far")
    mode.add_argument("--trace", metavar="TEXT", help="one query whole: tokens, positions, cosines, words, answers")
    mode.add_argument("--analyze", action="store_true", help="the layers: words, lengths, separation of the anchors")
    add_flags(parser)
    run(parser, modes)


def modes(args):
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
    """Parse the flags, carry out command(args), and turn what can go wrong into one line and an exit status."""
    try:
        sys.stdout.reconfigure(errors="replace")
        command(parser.parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail("out of memory: try --dtype bfloat16, a smaller --max-new-tokens, or --device cpu")
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
