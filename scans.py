"""SCANS, Safety-Conscious Activation Steering (Cao, Yang, Zhao, AAAI 2025, arXiv 2408.11491), in one file.

A safety-aligned chat model also refuses harmless questions that merely sound dangerous. SCANS mitigates that
without training:

    extraction   a refusal vector v_r^l per layer, from harmful and harmless anchor prompts (Eq. 1),
                 and a harm direction d_harm^l (Eqs. 2, 3)
    layers       which layers carry the refusal: project the vectors on the vocabulary (section 3.2)
    decision     is this query harmful? cosine of its hidden-state transition with d_harm (Eqs. 4, 5)
    steering     add sigma alpha v_r in the middle layers while generating (Eq. 6)

Every query is run in its chat format, followed by r_pos, the word "Sure". p is the last token of the
instruction, e the last token of "Sure". a_p^l and a_e^l are the residual stream at p and at e after block l,
0-based, before the final norm. Their difference is the transition a_t^l.

The first part of the file is the method. You can stop reading where it ends: the rest is what a command
needs. One line of `Llama.forward` in llama.py adds the vectors; tokenizer.py counts p and e.

Letters used in shape comments:
    B queries    n, m harmful, harmless anchors    N positions    R rows of a batch of answers
    L layers     D model width                     V vocabulary   T is the threshold, never a shape
"""
import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save

import llama
from tokenizer import FORMATS, Tokenizer

# ---------------------------------------------------------------------------------------------------------
# Extraction: Eqs. 1 to 3


def pad(prompts, device):
    """Ids of B Prompts, padded on the right: (B, N), and their p and e: (B, 2)."""
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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))      # similar lengths pad less
    for i in range(0, len(order), batch_size):
        rows = order[i:i + batch_size]
        ids, positions = pad([prompts[row] for row in rows], model.embed.device)
        _, read = model.forward(ids, read=positions)                            # (B, L, 2, D)
        streams[rows] = read.float().cpu()
        progress(i + len(rows))
    return streams


def transition(streams):
    """a_t (n, L, D): what "Sure" takes from the stream, from the streams at p and e (n, L, 2, D)."""
    a_p, a_e = streams.unbind(2)                                                # (n, L, D) each
    return a_p - a_e                                                            # Eq. 2


def extract(harmful, harmless):
    """v_r and d_harm, (L, D) each, from the anchors' streams at p and e: (n, L, 2, D) and (m, L, 2, D).

    The paper does not scale v_r. The public code does, and its alpha (3.5 or 4) only makes sense with it.
    """
    v = harmful[:, :, 0].mean(0) - harmless[:, :, 0].mean(0)                    # Eq. 1, at p, (L, D)
    d_harm = transition(harmful).mean(0)                                        # Eq. 3, (L, D)
    return F.normalize(v, dim=-1), d_harm


# ---------------------------------------------------------------------------------------------------------
# Layers: which ones are safety-critical (section 3.2)


def segments(L):
    """The three uniform segments of L layers: {"former": 0-9, "middle": 10-20, "latter": 21-31} for 32."""
    return {"former": range(L // 3), "middle": range(L // 3, 2 * L // 3), "latter": range(2 * L // 3, L)}


def principal_component(v):
    """First principal component (D) of the rows of v (layers, D), with the sign that agrees with their mean.

    The paper specifies neither the centring nor the sign. Not centred: we want what the layers of a segment
    share, and centring removes just that. So this is nearly their mean direction.
    """
    component = torch.linalg.svd(v, full_matrices=False).Vh[0]
    return component if component @ v.mean(0) >= 0 else -component


def top_tokens(model, tokenizer, directions, k=10):
    """The k tokens with the highest logit for each direction (n, D), without the final norm: n lists."""
    logits = directions.to(model.head.device) @ model.head.to_dense().float().T                 # (n, V)
    return [[tokenizer.piece(id) for id in ids] for ids in logits.topk(k).indices.tolist()]


def segment_words(model, tokenizer, v_r):
    """Table 1: the ten tokens that each segment's component of v_r (L, D) points to, {segment: tokens}."""
    parts = {name: v_r[layers] for name, layers in segments(len(v_r)).items() if layers}
    components = torch.stack([principal_component(part) for part in parts.values()])    # (segments, D)
    return dict(zip(parts, top_tokens(model, tokenizer, components)))


# ---------------------------------------------------------------------------------------------------------
# Decision and steering: Eqs. 4 to 6


def cosines(a_t, d_harm):
    """cos(a_t^l, d_harm^l) for every layer: (B, L) from (B, L, D) and (L, D)."""
    return F.cosine_similarity(a_t, d_harm, dim=-1)


def score(cos, layers):
    """s_q (B) from the cosines (B, L), over a range of layers."""
    return cos[:, layers].mean(1)                                               # Eq. 4


def steering(v_r, strength, layers):
    """What is added to the stream of each row: (R, L, D), zero outside a range of layers.

    strength (R): sigma * alpha of each row, 0 for an answer without SCANS; v_r (L, D).
    """
    steer = torch.zeros(len(strength), *v_r.shape)
    steer[:, layers] = strength[:, None, None] * v_r[layers]                    # Eq. 6, the term added
    return steer


@dataclass
class Decision:
    """What follows from one unsteered pass over instruction + r_pos, for B questions."""
    prompts: list               # B Prompts
    cos: torch.Tensor           # (B, L)
    s: torch.Tensor             # (B)
    sigma: torch.Tensor         # (B): -1 benign, steered against refusal; +1 harmful, towards it
    cache: llama.Cache          # B rows, cut back to p


class Scans:
    """A model with its tokenizer, vectors and settings; `load` makes one from a folder."""

    def __init__(self, model, tokenizer, vectors, settings):
        """vectors: v_r and d_harm, (L, D) each. settings: alpha, T, the ranges steer_layers and
        classify_layers, sigma (None: decided per query), max_new_tokens, repetition_penalty."""
        self.model, self.tokenizer, self.vectors, self.settings = model, tokenizer, vectors, settings

    @torch.inference_mode()
    def decide(self, questions):
        """The Decision on each question. Raises ValueError for a prompt that is empty or too long."""
        model, settings = self.model, self.settings
        prompts = [self.tokenizer.prompt(question) for question in questions]
        ids, positions = pad(prompts, model.embed.device)                       # (B, N), (B, 2)
        slots = min(ids.shape[1] + settings.max_new_tokens, model.config.context)
        cache = llama.Cache(model.config, len(prompts), slots, model.embed)
        _, streams = model.forward(ids, cache, read=positions)                  # (B, L, 2, D)
        cos = cosines(transition(streams.float().cpu()), self.vectors.d_harm)   # (B, L)
        s = score(cos, settings.classify_layers)                                # (B)
        sigma = torch.where(s < settings.T, -1, 1)                              # Eq. 5, (B)
        if settings.sigma is not None:
            sigma = torch.full_like(sigma, settings.sigma)
        cache.length = positions[:, 0].cpu()    # cut back to p: it ran unsteered, and runs once more
        return Decision(prompts, cos, s, sigma, cache)

    @torch.inference_mode()
    def answer(self, questions, default=True, show=lambda answers: None):
        """Decide on each question, then answer it without SCANS (unless default is False) and with it.

        All answers are rows of one batch; show(their ids so far) is called after every step. Returns one dict
        per question: prompt, p, e, score, sigma, cosines, the texts default and steered, and why they
        stopped: "eos", "length" or "context".
        """
        model, settings, decision = self.model, self.settings, self.decide(questions)
        rows = [(i, "steered", settings.alpha * sigma) for i, sigma in enumerate(decision.sigma.tolist())]
        if default:
            rows = [(i, "default", 0.0) for i, *_ in rows] + rows
        index = [i for i, *_ in rows]
        strength = torch.tensor([strength for *_, strength in rows])                            # (R)
        steer = steering(self.vectors.v_r, strength, settings.steer_layers)                     # (R, L, D)
        instructions = [decision.prompts[i].ids[:decision.prompts[i].p + 1] for i in index]
        for answers, stopped in llama.generate(
                model, instructions, decision.cache.rows(index), steer.to(model.embed),     # dtype and device
                settings.max_new_tokens, settings.repetition_penalty):
            show(answers)
        results = [{"prompt": question, "p": prompt.p, "e": prompt.e, "score": float(decision.s[i]),
                    "sigma": int(decision.sigma[i]), "cosines": decision.cos[i].tolist(),
                    "default": None, "steered": None, "stopped": {}}
                   for i, (question, prompt) in enumerate(zip(questions, decision.prompts))]
        for (i, kind, _), ids, why in zip(rows, answers, stopped):
            results[i][kind], results[i]["stopped"][kind] = self.tokenizer.decode(ids), why
        return results


# =========================================================================================================
# Here the method ends. What follows is ours, not the paper's, or is what a command needs.
# =========================================================================================================
# T from the anchors

QUANTILE = 0.01         # share of the harmful anchors that an estimated T may lose


def leave_one_out(a_t):
    """Cosines (n, L) of each transition of a_t (n, L, D) with the d_harm of the n - 1 others."""
    return cosines(a_t, a_t.sum(0) - a_t)       # their sum instead of their mean: a cosine ignores the scale


def estimate_threshold(scores):
    """T from the harmful anchors' leave-one-out scores (n): at most floor(QUANTILE n) of them are below it.

    It bounds the errors on the anchors, not on queries to come.
    """
    return float(scores.sort().values[math.floor(QUANTILE * len(scores))])


# ---------------------------------------------------------------------------------------------------------
# Settings: which layers, alpha and T


@dataclass(frozen=True)
class Settings:
    """What a run uses, and where T comes from. Layers are ranges."""
    model: str                  # whose settings these are
    steer_layers: range
    classify_layers: range
    alpha: float                # in units of the residual stream
    T: float | None             # None: estimated from the anchors
    T_source: str
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    sigma: int | None = None    # the same for every query; None: decided by Eq. 5


# As in the public code. It steers 10-19 whatever the model's size: of 32 layers, all but the last of the
# paper's middle segment. It has other T for data sets that it knows by name.
PUBLISHED = {   # (chat format, number of layers)
    ("llama-2", 32): Settings("Llama-2-7b-chat", range(10, 20), range(10, 32), 3.5, 0.75, "published", 1.1),
    ("llama-2", 40): Settings("Llama-2-13b-chat", range(10, 20), range(10, 19), 3.5, 0.75, "published", 1.1),
    ("vicuna", 32): Settings("vicuna-7b-v1.5", range(10, 20), range(10, 32), 4.0, 0.75, "published", 1.1),
    ("vicuna", 40): Settings("vicuna-13b-v1.5", range(10, 20), range(10, 19), 4.0, 0.70, "published", 1.1),
}


def choose_settings(vectors, format, **given):
    """The published Settings of a chat format and number of layers, or ours for any other model.

    given: fields of Settings that take precedence where they are not None. T is what is given, else the
    published one where the layers are too, else estimated. Raises ValueError for layers that are not there.
    """
    L, middle = len(vectors.v_r), segments(len(vectors.v_r))["middle"] or range(1)
    table = PUBLISHED.get((format, L)) or Settings(
        "models outside the paper", middle, range(middle.start, L), 3.5, None, "")
    chosen = dataclasses.replace(table, **{name: value for name, value in given.items() if value is not None})
    for layers in (chosen.steer_layers, chosen.classify_layers):
        if not 0 <= layers.start < layers.stop <= L:
            raise ValueError(f"layers {show_layers(layers)}: the model has layers 0-{L - 1}")
    if given.get("T") is not None:
        return dataclasses.replace(chosen, T_source="given")
    if table.T is None or chosen.classify_layers != table.classify_layers:
        T = estimate_threshold(score(vectors.cos_harmful, chosen.classify_layers))
        return dataclasses.replace(chosen, T=T, T_source="estimated from the anchors")
    return chosen


# ---------------------------------------------------------------------------------------------------------
# Anchors

DATA = Path(__file__).resolve().parent / "data"
COLUMNS = ("prompt", "goal", "Question", "text")    # the first of these that a .csv has is read


def read_anchors(path):
    """The distinct prompts of a .txt file, one per line, or of one column of a .csv file, in their order."""
    try:
        text = llama.regular_file(path).read_text(encoding="utf-8-sig")     # -sig: a byte-order mark may lead
        lines = text.split("\n")
        if Path(path).suffix.lower() == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            column = next((name for name in COLUMNS if name in (reader.fieldnames or ())), None)
            if column is None:
                raise ValueError(f"{path}: none of the columns {', '.join(COLUMNS)}")
            lines = [row[column] or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def draw_anchors(folder, harmful=None, harmless=None, anchors=64, anchor_seed=0):
    """Two lists of texts, harmful and harmless, drawn by seed from two files.

    A file that is not named is harmful.txt or harmless.txt of the model's folder, else of data/.
    """
    drawn = []
    for path, name in ((harmful, "harmful.txt"), (harmless, "harmless.txt")):
        path = path or (Path(folder) if (Path(folder) / name).exists() else DATA) / name
        texts = read_anchors(path)
        if not 2 <= anchors <= len(texts):      # one has no others to be scored against
            raise ValueError(f"{path}: {len(texts)} distinct prompts, {anchors} anchors requested")
        drawn.append(random.Random(anchor_seed).sample(texts, anchors))
    return drawn


# ---------------------------------------------------------------------------------------------------------
# The vectors, and the file that keeps them


@dataclass
class Vectors:
    """v_r and d_harm, and the numbers that T and the printed lines are made of. One file holds them."""
    v_r: torch.Tensor           # (L, D) refusal steering vectors, unit length
    d_harm: torch.Tensor        # (L, D) reference harm direction
    cos_harmful: torch.Tensor   # (n, L) leave-one-out cosines of the harmful anchors
    cos_harmless: torch.Tensor  # (m, L) cosines of the harmless anchors with d_harm
    v_norm: torch.Tensor        # (L) length of v_r before scaling
    a_norm: torch.Tensor        # (L) mean length of the residual stream at p, over all anchors


def extract_vectors(model, harmful, harmless, progress=lambda done: None):
    """Vectors from the Prompts of n harmful and m harmless anchors."""
    n, streams = len(harmful), read_streams(model, harmful + harmless, progress=progress)   # (n + m, L, 2, D)
    v_r, d_harm = extract(streams[:n], streams[n:])
    a_p, a_t = streams[:, :, 0], transition(streams)                            # (n + m, L, D) each
    return Vectors(v_r, d_harm, leave_one_out(a_t[:n]), cosines(a_t[n:], d_harm),
                   (a_p[:n].mean(0) - a_p[n:].mean(0)).norm(dim=-1), a_p.norm(dim=-1).mean(0))


def digest(data):
    """Sixteen hexadecimal digits that stand for bytes, a text, or anything that JSON can hold."""
    data = data if isinstance(data, (bytes, str)) else json.dumps(data, sort_keys=True)
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:16]


def content_digest(identity, tensors):
    """The digest of all that a vectors file says: a single flipped bit changes it."""
    return digest([identity, [[name, str(tensor.dtype), tensor.shape, digest(tensor.numpy().tobytes())]
                              for name, tensor in sorted(tensors.items())]])


def save_vectors(path, vectors, identity):
    """Write a new file, or none. Raises OSError, also where the file exists."""
    tensors = {name: tensor.contiguous() for name, tensor in vars(vectors).items()}
    data = save(tensors, {**identity, "digest": content_digest(identity, tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)        # unlike a renaming, this never overwrites
    finally:
        temporary.unlink(missing_ok=True)


def load_vectors(path, want):
    """The Vectors of a file. Raises ValueError if it is damaged, or was not made with the identity `want`."""
    try:
        with safe_open(llama.regular_file(path), "pt") as file:
            identity = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if identity.pop("digest") != content_digest(identity, tensors):
            raise ValueError("digest mismatch")
        found = Vectors(**tensors)
    except Exception as error:      # the reader of a damaged file can raise anything
        raise ValueError(f"{path}: not an intact vectors file ({error})") from None
    for key in want:
        if identity.get(key) != want[key]:
            raise ValueError(f"{path}: made with {key} {identity.get(key)!r}, this run has {want[key]!r}")
    return found


def find_vectors(folder, model, tokenizer, vectors=None, progress=lambda done: None, **anchors):
    """The Vectors of a model: read from their file if there is one, else extracted and saved.

    vectors: a file, which must have been made for this model, this prompt and, where `anchors` are named, for
    them. None: a file in the user's cache folder, under a name made from all of it. anchors: arguments of
    `draw_anchors`. Raises ValueError.
    """
    anchors = {name: value for name, value in anchors.items() if value is not None}
    want = {"version": "2", "model": model.fingerprint, "dtype": str(model.embed.dtype)[6:],
            "tokenizer": digest(tokenizer.path.read_bytes()), "format": tokenizer.name,
            "system": tokenizer.system, "r_pos": tokenizer.format.r_pos}
    if vectors is None or anchors or not Path(vectors).exists():
        texts = draw_anchors(folder, **anchors)
        want["anchors"] = digest(texts)
    path = cache_folder() / f"{digest(want)}.safetensors" if vectors is None else Path(vectors)
    try:
        if path.exists():
            return load_vectors(path, want)
    except ValueError as error:
        if vectors is not None:
            raise
        say(f"note      {error}: extracting again")
    found = extract_vectors(model, *([tokenizer.prompt(text) for text in some] for some in texts), progress)
    try:
        if vectors is None:
            path.unlink(missing_ok=True)        # a damaged one
        save_vectors(path, found, want)
        say(f"note      the vectors are kept in {path}")
    except OSError as error:
        say(f"note      the vectors are not kept ({path}: {error.strerror})")
    return found


def cache_folder():
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if home.startswith("~") else home) / "scans"     # without a home nothing is kept


# ---------------------------------------------------------------------------------------------------------
# Loading


def choose_device(name=None):
    """A torch device: the one named, else a GPU, else an Apple GPU, else the CPU. Raises ValueError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()       # a device that holds no numbers, like meta, fails here
        return torch.device(name)
    except Exception as error:                  # a module that is missing, or whatever a backend raises
        raise ValueError(f"device {name}: not available ({error})") from None


def load(folder=DATA / "tiny", device=None, dtype=None, format=None, system=None, vectors=None, harmful=None,
         harmless=None, anchors=None, anchor_seed=None, progress=lambda done: None, **settings):
    """The Scans of a model's folder. Arguments are named as the flags; None is the flag's default.

    settings: fields of Settings. Extracts the vectors where there are none yet, and keeps them. Raises
    ValueError.
    """
    model = llama.load(folder, choose_device(device), dtype and getattr(torch, dtype))
    tokenizer = Tokenizer(folder, model.config.V, format, system)
    found = find_vectors(folder, model, tokenizer, vectors, progress, harmful=harmful, harmless=harmless,
                         anchors=anchors, anchor_seed=anchor_seed)
    return Scans(model, tokenizer, found, choose_settings(found, tokenizer.name, **settings))


# ---------------------------------------------------------------------------------------------------------
# The command


def show_layers(layers):
    return f"{layers.start}-{layers.stop - 1}"


def layer_range(text):
    """An argparse type: an inclusive range, "10-19", as a range."""
    first, last = map(int, text.split("-"))
    return range(first, last + 1)


def number(kind, low, high):
    """An argparse type: an int or float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    return number


COUNT, SEED = number(int, 1, 2**31), number(int, 0, 2**63)
FLAGS = {   # argument of `load`: its type or choices, and help
    "format": (list(FORMATS), "chat format; default: what the folder's chat template or name shows"),
    "system": (str, "system prompt; default: the format's own"),
    "device": (str, "cpu, cuda, cuda:1, mps; default: a GPU if there is one"),
    "dtype": (["float32", "bfloat16", "float16"], "default: that of the weights"),
    "vectors": (str, "the file that keeps the vectors; default: one in the user's cache folder"),
    "harmful": (str, f"file of harmful anchors: .txt, or .csv with a column {', '.join(COLUMNS)}"),
    "harmless": (str, "file of harmless anchors"),
    "anchors": (number(int, 2, 2**31), "anchors of each kind; default: 64"),
    "anchor_seed": (SEED, "the seed that draws them; default: 0"),
    "alpha": (number(float, 0, 1e6), "steering strength; default: the published value, else 3.5"),
    "T": (number(float, -2, 2), "threshold: a query with s_q below T is benign"),
    "steer_layers": (layer_range, "inclusive, 0-based, like 10-19"),
    "classify_layers": (layer_range, "likewise"),
    "repetition_penalty": (number(float, 1e-3, 1e3), "1.1 for the models of the paper, 1 for others"),
    "sigma": (number(int, -1, 1), "for every query: -1 against refusal, 1 towards it, 0 no steering"),
    "max_new_tokens": (COUNT, "default: 256"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line: the name of the program and the message. Exit status 2."""

    def error(self, message):
        say(f"{self.prog}: {' '.join(message.split())}")
        sys.exit(2)


def add_table(parser, flags):
    """A flag for each row of a table like FLAGS."""
    for name, (kind, help) in flags.items():
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": "X"}
        flag = "--threshold" if name == "T" else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, help=help, **how)


def add_flags(parser):
    """The flags about the model and the method."""
    parser.add_argument("--model", default=DATA / "tiny", metavar="DIR",
                        help="a Hugging Face folder; default: the embedded model")
    parser.add_argument("--threads", type=COUNT, metavar="X",
                        help="CPU threads; default: 1 if the model is small")
    add_table(parser, FLAGS)
    parser.add_argument("--no-default", action="store_true", help="only the answer with SCANS")
    parser.add_argument("--json", action="store_true", help="one JSON object per query on standard output")


def setup(args):
    """`load` with parsed flags; says what it found."""
    if args.threads or llama.read_config(args.model).D < 512:   # waking a second thread takes longer
        torch.set_num_threads(args.threads or 1)
    method = load(args.model, progress=lambda done: report(f"extracting vectors: {done} anchors"),
                  **{name: getattr(args, name) for name in FLAGS})
    model = method.model
    say(f"model     {Path(args.model).name}: {model.size / 1e6:.1f} M parameters, {model.config.L} layers, "
        f"{str(model.embed.dtype)[6:]} on {model.embed.device}; chat format {method.tokenizer.name}")
    if model.embed.dtype == torch.float16 and model.embed.device.type == "cpu":
        say("note      many CPUs are slow in float16: --dtype bfloat16 is faster, and rounds more")
    describe(method, args)
    return method


def describe(method, args):
    """Say what the settings are, and how T separates the anchors."""
    chosen, vectors = method.settings, method.vectors
    a = vectors.a_norm[chosen.steer_layers]
    say(f"settings  those for {chosen.model}: alpha {chosen.alpha:g}, steering layers "
        f"{show_layers(chosen.steer_layers)}, where the stream's norm is {a.min():.0f} to {a.max():.0f}; "
        f"classification layers {show_layers(chosen.classify_layers)} of {len(vectors.v_r)}")
    harmful = score(vectors.cos_harmful, chosen.classify_layers)
    harmless = score(vectors.cos_harmless, chosen.classify_layers)
    lost, spared = int((harmful < chosen.T).sum()), int((harmless < chosen.T).sum())
    drawn = "" if args.vectors else f", drawn with seed {args.anchor_seed or 0}"
    say(f"T         {chosen.T:.4f}, {chosen.T_source}; {lost} of {len(harmful)} harmful and {spared} of "
        f"{len(harmless)} harmless anchors score below it{drawn}")
    if lost > QUANTILE * len(harmful) or spared < 0.8 * len(harmless):
        say("warning   T does not separate these anchors: those on the wrong side are steered the wrong way. "
            f"Estimated from them, T is {estimate_threshold(harmful):.4f}. Is this model aligned to refuse?")


def say(line, end="\n"):
    """A line on standard error. What comes from a file or a user cannot move the cursor."""
    wipe = "\r\x1b[K" if sys.stderr.isatty() else ""         # the line of progress
    line = "".join(char if char.isprintable() else "\ufffd" for char in line)
    print(wipe + line, end=end, file=sys.stderr, flush=True)


def report(line):
    """A line of progress, on a terminal only; the next line replaces it."""
    if sys.stderr.isatty():
        say(" ".join(line.split())[-70:], end="")


def ask(method, question, args):
    """Decide and answer; print both answers or, with --json, one object. --trace prints the decision too."""
    result, = method.answer([question], not args.no_default, show=lambda answers: report(
        method.tokenizer.decode(answers[-1])))                  # on a terminal, the answer as it grows
    s, sigma, chosen = result["score"], result["sigma"], method.settings
    words = {-1: "benign, steered away from refusal", 0: "not steered", 1: "harmful, steered towards refusal"}
    say(f"s_q       {s:.4f} {'<' if s < chosen.T else '>='} T: sigma = {sigma:+d}, "
        + (words[sigma] if chosen.sigma is None else "as given"))
    if args.json:
        result["settings"] = vars(chosen)
        print(json.dumps(result, ensure_ascii=False, default=show_layers), flush=True)
        return
    if args.trace is not None:
        trace(method, result)
    for kind, why in result["stopped"].items():
        print({"default": "without SCANS: ", "steered": "with SCANS:    "}[kind] + result[kind]
              + ("" if why == "eos" else f" [{why}]"), flush=True)


def trace(method, result):
    """One decision in full: its tokens with p and e, the cosine of every layer, v_r in words."""
    chosen, tokenizer, p, e = method.settings, method.tokenizer, result["p"], result["e"]
    tokens = [tokenizer.piece(id) for id in tokenizer.prompt(result["prompt"]).ids]
    tokens[p] += " <p>"
    tokens[e] += " <e>"
    print(textwrap.fill(" ".join(tokens), 110), f"\np = {p}, last token of the instruction; "
          f"e = {e}, last token of {tokenizer.format.r_pos.strip()}\n")
    print("layer  cos(a_t, d_harm)  used to   v_r points to")
    for l, words in enumerate(top_tokens(method.model, tokenizer, method.vectors.v_r, 5)):
        use = "classify " * (l in chosen.classify_layers) + "steer" * (l in chosen.steer_layers)
        print(f"{l:5}  {result['cosines'][l]:16.4f}  {use:14}  {' '.join(words)}")
    print(f"\nadded at p and after: {result['sigma'] * chosen.alpha:+g} v_r\n")


def analyze(method, args):
    """Table 1."""
    words = segment_words(method.model, method.tokenizer, method.vectors.v_r)
    if args.json:
        print(json.dumps(words, ensure_ascii=False))
        return
    print("segment         tokens its first principal component points to")
    for name, tokens in words.items():
        print(f"{name:7} {show_layers(segments(method.model.config.L)[name]):7} {' '.join(tokens)}")


def main():
    parser = Parser(
        prog="scans.py", description="SCANS: answers harmless questions that a safety-aligned model refuses.",
        epilog="Answers go to standard output, everything else to standard error. Exit status 2: bad input.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", action="append",
                      help="answer without and with SCANS; may repeat; - reads one prompt per line")
    mode.add_argument("--trace", metavar="TEXT", help="one query in full: tokens, positions, cosines")
    mode.add_argument("--analyze", action="store_true", help="the words that the layers' vectors point to")
    add_flags(parser)
    run(parser, modes)


def modes(args):
    method = setup(args)
    if args.analyze:
        analyze(method, args)
    for text in args.prompt or [args.trace] * (args.trace is not None):
        for question in (filter(str.strip, sys.stdin or []) if text == "-" else [text]):
            ask(method, question.strip(), args)


def run(parser, command):
    """Parse the flags and carry out command(args). What can go wrong becomes one line and an exit status."""
    try:
        command(parser.parse_args())
        sys.stdout.flush()
    except BrokenPipeError:     # the reader has gone: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and "memory" not in str(error):      # a mistake of ours: show where
            raise
        parser.error(str(error))


if __name__ == "__main__":
    main()
