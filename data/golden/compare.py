"""Compare a port's tensors with the golden ones, in the order of computation; explain the first that differs.

    python compare.py FILE.safetensors [GOLDEN.safetensors]

FILE holds what a port has so far, under the names of golden.md; a part will do. GOLDEN is golden.safetensors,
or shapes.safetensors for other shapes of model. Needs numpy, and hints.safetensors beside this file.
Exit status: 0 all that is there is the same, 1 something differs, 2 the file cannot be used.

Left out: text. The ids that every chat format must give stand in formats.json.
"""
import argparse
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Callable

import numpy as np

HERE = Path(__file__).resolve().parent
GOLDEN, HINTS = HERE / "golden.safetensors", HERE / "hints.safetensors"

# |difference| <= tolerance * (|golden value| + root mean square of the golden tensor), by the coarsest floats
# in the file. This project's own pass needs 0.007 in float16 and 0.06 in bfloat16 (the logits; streams 0.03),
# numpy against torch in float32 0.00001; the rest is room.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-2, "BF16": 1.5e-1}
FLOAT32 = TOLERANCE["F32"]

# Scores at half precision: this project's own cosines are 5.5e-4 off in bfloat16, its T 1.4e-5.
SCORE = 1e-3

# Half precision hides a wrong eps in every single number, not in the mean length of a query's rows of the
# first norm: rounding moves that by 1.8e-4 at most, an eps of 1e-6 for 1e-5 by 6e-4 to 4e-3.
LENGTH = 4e-4

# ----------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes with the length of the header, the header in JSON, the numbers; all little-endian

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
          "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1"}


def read_safetensors(path):
    """({name: array}, metadata, {name: its type in the file}). bfloat16 is the upper half of a float32."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        array = np.frombuffer(memoryview(data)[start:][slice(*entry["data_offsets"])], DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        tensors[name] = array.reshape(entry["shape"])
    return tensors, metadata, {name: entry["dtype"] for name, entry in header.items()}


def read(path):
    """As read_safetensors. Raises ValueError for a file that cannot be used."""
    try:
        return read_safetensors(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} in its header; "
                         f"a type must be one of {', '.join(DTYPES)}") from None
    except (ValueError, TypeError, AttributeError, OSError, MemoryError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a whole safetensors file ({reason})") from None


# ----------------------------------------------------------------------------------------------------
# What the method makes of other tensors. A port's are judged by its own: no rounding before them is an excuse


def unit(v):
    return v / np.sqrt((v * v).sum(-1, keepdims=True))


def cosine(a, b):
    """cos over the last axis."""
    return (unit(a) * unit(b)).sum(-1)


def leave_one_out(a_t):
    """Cosine of each row of a_t (n, L, D) with the mean of the others: (n, L)."""
    return cosine(a_t, (a_t.sum(0) - a_t) / (len(a_t) - 1))


def threshold(cos, layers):
    """T (1) from the leave-one-out cosines (n, L)."""
    scores = np.sort(cos[:, layers].mean(1))
    return scores[[int(0.01 * len(scores))]]


def steering(sigma, alpha, layers, v_r):
    """sigma alpha v_r (L, D) in `layers`, 0 elsewhere."""
    steer = np.zeros_like(v_r)
    steer[layers] = sigma * alpha * v_r[layers]
    return steer


# ----------------------------------------------------------------------------------------------------
# The names, in the order of computation


@dataclass(frozen=True)
class Name:
    """One kind of tensor."""
    name: str
    shape: str                      # in the letters of golden.md
    place: str                      # in the paper
    meaning: str
    causes: tuple[str, ...] = ()    # why ports get it wrong
    block0: float = FLOAT32         # tolerance in block 0 from float32 on: no rounding has piled up there
    half: float = 1.0               # tolerance in half precision, where it is below the dtype's
    of: tuple[str, ...] = ()        # what it is made of; a name with a dot in front is of the same query
    made: Callable | None = None    # and how

    @property
    def given(self):
        """An input: a port need not save it."""
        return self.meaning.partition(":")[0] == "input"


EARLIER = "only this differs: it is made here from what agrees above, so look at the code of this very step"
WIDTH = "each kind is filled up to its own longest row: take the row length from the header"
EPS = "eps is not rms_norm_eps of config.json: 1e-6 for 1e-5 is 1e-3 off here in the embedded model"

# one query, in the order of the forward pass; {l} is a block
FORWARD = [
    Name("ids", "N", "", "input: ids of instruction + r_pos, BOS first", (
        "BOS twice: the chat template puts one and the tokenizer adds another",
        "no BOS",
        "the query not stripped of white space at both ends",
        "two halves encoded apart: the second gains a spurious leading space piece",
        "the space before [/INST] is missing",
        "the space before Sure is missing",
        "`▁` missing in front of the text",
        "control strings in the query parsed as control ids",
        "a character that is no piece becomes the bytes of its UTF-8, not the unknown id",
        "the text normalized: NFKC, or spaces merged")),
    Name("p", "1", "", "input: position of the last token of the instruction", (
        "off by one: p is the index of the last token, len - 1",
        "searched for [/INST] instead of counted",
        "counted without BOS")),
    Name("e", "1", "", "input: position of the last token of instruction + r_pos", (
        "off by one: e is the index of the last token of all, len - 1",)),
    Name("embed", "N D", "", "embedding of the ids, not scaled", (
        "embedding scaled by sqrt(D), as other model families do",
        "ids shifted by one",
        "table transposed")),
    Name("block{l}.attn_norm", "N D", "",
         "input of the attention: RMS norm of the stream, times its weight", (
        EPS,
        "eps outside the root",
        "mean subtracted: that is LayerNorm",
        "the weight left out",
        "1 + weight instead of weight, as other model families do",
        "float16: the norm must be taken in float32 and rounded before the weight"), 2e-6),
    Name("block{l}.q", "N H E", "", "queries before rotary", (
        "weight transposed: a checkpoint's matrix is (out, in)",
        "heads split as (E, H) instead of (H, E)",
        "weights permuted for the interleaved rotary form, as GGUF files hold them"), 5e-6),
    Name("block{l}.k", "N K E", "", "keys before rotary", (
        "weight transposed: a checkpoint's matrix is (out, in)",
        "K taken for H: there may be fewer key heads",
        "weights permuted for the interleaved rotary form, as GGUF files hold them"), 5e-6),
    Name("block{l}.v", "N K E", "", "values", (
        "weight transposed: a checkpoint's matrix is (out, in)",
        "K taken for H: there may be fewer value heads",
        "rotary applied to v: only q and k are turned"), 5e-6),
    Name("block{l}.q_rot", "N H E", "", "queries after rotary", (
        "rotary layout: dimension i goes with i + E/2 (half-split), not with i + 1 (interleaved)",
        "sign of the sine",
        "positions counted from 1: BOS is 0",
        "rope_theta of config.json ignored or not the one used",
        "rope scaling ignored, or put where there is none: linear divides every angle by factor, llama3 some",
        "llama3 scaling without the blend between its two bounds",
        "the exponent of theta is -2i/E, for i in 0..E/2-1: not -i/E",
        "the exponent of theta is over E, the head's width: not over D",
        "the queries not turned at all")),
    Name("block{l}.k_rot", "N K E", "", "keys after rotary", (
        "only the queries turned",
        "keys turned after they were put into the cache, at another position")),
    Name("block{l}.attn", "N D", "", "output of the attention, after its output projection", (
        "no 1/sqrt(E)",
        "grouped heads: query head h reads key head h // (H/K), not h % K",
        "E taken for D / H: config.json may have a head_dim",
        "no mask: position t sees 0..t, none after it",
        "mask one short: position t sees itself too",
        "no window: position t sees keys t - window + 1 to t",
        "window one too wide: position t sees window keys, itself among them",
        "the output projection's matrix not transposed: y = W x, W is (out, in)",
        "v rotated: only q and k are turned",
        "heads put back in another order before the projection",
        "1/E instead of 1/sqrt(E)",
        "softmax over the wrong axis, or not in float32")),
    Name("block{l}.mlp_norm", "N D", "",
         "input of the mlp: RMS norm of the stream after the attention, times its weight", (
        "taken of the stream before the attention was added: the halves of a block are in sequence",
        "the other norm's weight",
        "the residual left out: the attention's output is added to x",
        "eps outside the root, or not the one of config.json")),
    Name("block{l}.mlp", "N D", "", "output of the mlp: down(silu(gate) * up)", (
        "silu on up instead of gate: gate and up swapped",
        "gelu for silu",
        "sigmoid for silu: silu(z) = z sigmoid(z)",
        "silu left out")),
    Name("block{l}.x", "N D", "a^l(q)", "residual stream after block l", (
        "the last block only: a library's last hidden state is taken after the final norm",
        "layer index shifted by one: hidden_states[l + 1] is block l, hidden_states[0] the embedding",
        "the residual left out: the mlp's output is added to x",
        "weights of another block",
        "an earlier block, whose inner tensors are not in the golden file: check it as block 0 was checked")),
    Name("final_norm", "2 D", "", "RMS norm of the last stream at p and e, times model.norm", (
        "rows swapped: row 0 is p, row 1 is e",
        "the weight of model.norm left out",
        "taken twice: the last state was normed already",
        "rows of other positions: p and e, not the last two",
        "eps outside the root, or not the one of config.json")),
    Name("logits", "2 V", "", "logits at p and e", (
        "final norm skipped",
        "head: lm_head, or the embedding where config.json ties them",
        "rows swapped: row 0 is p, row 1 is e",
        "logits capped or scaled, as other model families do")),
]

# the anchors, once
ANCHORS = [
    Name("anchors.harmful.ids", "n S", "Q-",
         "input: ids of the harmful anchors with r_pos, filled up with -1", (WIDTH,)),
    Name("anchors.harmful.p", "n", "", "input: their p"),
    Name("anchors.harmful.e", "n", "", "input: their e"),
    Name("anchors.harmless.ids", "m S'", "Q+", "input: the same of the harmless anchors", (WIDTH,)),
    Name("anchors.harmless.p", "m", "", "input"),
    Name("anchors.harmless.e", "m", "", "input"),
    Name("classify_layers", "C", "", "input: the layers of Eq. 4"),
    Name("anchors.harmful.mean", "L D", "Eq. 1", "mean over Q- of a^l(q), at p", (
        "read at e",
        "read at the last token of the query instead of p",
        "p of the first row taken for all: it is per row",
        "padding: in a batch padded on the left positions and mask must move with it",
        "padding: -1 reads the last row of a padded batch",
        "post-norm last state: only the last layer differs",
        "mean taken in float16")),
    Name("anchors.harmless.mean", "L D", "Eq. 1", "mean over Q+ of a^l(q), at p", (
        "as for the harmful ones: another position, padding, a post-norm state, float16",)),
    Name("v", "L D", "Eq. 1", "v_r before scaling: harmful minus harmless", (
        "the other sign: harmful minus harmless, so that adding it means refusing",
        "scaled already"),
        of=("anchors.harmful.mean", "anchors.harmless.mean"), made=lambda minus, plus: minus - plus),
    Name("v_r", "L D", "Eq. 1", "refusal steering vectors, each layer of unit length", (
        "unscaled v_r: each layer is divided by its own length",
        "scaled by the length over all layers at once"), of=("v",), made=unit),
    Name("anchors.harmful.a_t", "n L D", "Eq. 2", "transitions of the harmful anchors", (
        "the other sign: a_t is the stream at p minus that at e",
        "e of the first row taken for all: it is per row",
        "e off by one",
        "r_pos run without what stands before it")),
    Name("d_harm", "L D", "Eq. 3", "reference harm direction: mean over Q- of a_t^l", (
        "mean over all anchors: only the harmful ones count",
        "mean of transitions scaled to unit length: they are not",
        "scaled: it is not"), of=("anchors.harmful.a_t",), made=lambda a_t: a_t.mean(0)),
    Name("cos_harmful", "n L", "", "cosine of each harmful anchor with d_harm of the n - 1 others", (
        "d_harm of all n: each anchor must be left out of its own",
        "one cosine of all layers joined, instead of one a layer",
        "mean of the others taken of unit transitions",
        "cosine in float16"), half=SCORE, of=("anchors.harmful.a_t",), made=leave_one_out),
    Name("cos_harmless", "m L", "", "cosine of each harmless anchor with d_harm", (
        "d_harm is that of all harmful anchors: none is left out here, and none is harmless",
        "one cosine of all layers joined, instead of one a layer",
        "e or p of other rows, float16: as for the harmful ones"), half=SCORE),
    Name("T", "1", "this project", "threshold: sorted leave-one-out scores[floor(0.01 n)]", (
        "the index is floor(0.01 n), 0 for 64 anchors: the smallest score",
        "layers other than classify_layers",
        "sorted downwards",
        "an interpolated quantile"), half=SCORE, of=("cos_harmful", "classify_layers"), made=threshold),
    Name("alpha", "1", "Eq. 6", "input: steering strength"),
    Name("steer_layers", "M", "", "input: the layers of Eq. 6"),
    Name("max_new_tokens", "1", "", "input: limit of an answer"),
]

# one query again
DECISION = [
    Name("a_t", "L D", "Eq. 2", "transition: the stream at p minus the stream at e", (
        "the other sign: a_t is the stream at p minus that at e",
        "computed with steering still on from another query",
        "p off by one")),
    Name("cos", "L", "", "cosine of a_t^l with d_harm^l", (
        "one cosine of all layers joined, instead of one a layer",
        "cosine with v_r instead of d_harm",
        "dot product: both lengths are divided out",
        EARLIER), half=SCORE, of=(".a_t", "d_harm"), made=cosine),
    Name("s_q", "1", "Eq. 4", "similarity score: mean of cos over classify_layers", (
        "the last layer of the range left out: ranges are inclusive",
        "mean over all layers",
        "layers counted from 1",
        "mean over the steering layers"),
        half=SCORE, of=(".cos", "classify_layers"), made=lambda cos, layers: cos[layers].mean(keepdims=True)),
    Name("sigma", "1", "Eq. 5", "-1 if s_q < T, else +1", (
        "the other sign: below T is benign, steered away from refusal",
        "0/1 instead of -1/+1"), of=(".s_q", "T"), made=lambda s_q, T: np.where(s_q < T, -1, 1)),
    Name("steer", "L D", "Eq. 6", "what is added: sigma alpha v_r in steer_layers, 0 elsewhere", (
        "layers off by one: l is 0-based, after block l",
        "alpha forgotten",
        "sigma forgotten: alpha alone always steers towards refusal",
        "every layer steered: only steer_layers are, the rest is 0",
        "the last layer of the range left out: ranges are inclusive",
        "unscaled v_r"), of=(".sigma", "alpha", "steer_layers", "v_r"), made=steering),
    Name("steered_x", "L D", "Eq. 6",
         "steered streams at p, each read after the addition, of a pass over the instruction without r_pos", (
        "started at p + 1: p itself is steered, so it runs once more, with steering",
        "p not run again: its keys in the cache are unsteered; cut the cache back to p, not to p + 1",
        "steering before p: the keys of earlier positions must be the unsteered ones",
        "read before the addition",
        "added before the block instead of after it",
        "added between attention and mlp instead of after the block",
        "steered only the first of the layers",
        "every layer steered: only steer_layers are",
        "alpha or sigma forgotten",
        "p run again at another position: decoding that counts from 0 turns it wrongly",
        "r_pos still in the cache")),
    Name("steered_logits", "V", "", "steered logits at p: they choose the first token of the answer", (
        "taken from an unsteered pass",
        "final norm skipped",
        EARLIER)),
    Name("steered_x_next", "L D", "Eq. 6",
         "steered streams at p + 1, where the first id of the answer stands: the best of steered_logits", (
        "steered at p only: every later position is steered too",
        "the first id taken from the unsteered logits, or from those at e",
        "the keys and values of p left unsteered in the cache",
        "the keys and values of p left out of the cache",
        "the id run at another position than p + 1")),
    Name("default_ids", "-", "", "greedy answer without SCANS, no end token", (
        "the end token is kept",
        "the first token comes from the logits at p, not e: r_pos is no part of the answer",
        "steering left on",
        "repetition penalty on: it is 1 here",
        "a position skipped or repeated in the cache")),
    Name("scans_ids", "-", "", "greedy answer with SCANS, no end token", (
        "the end token is kept",
        "decoded without steering: every later step is steered too, not the first alone",
        "repetition penalty on: it is 1 here",
        "a position skipped or repeated in the cache")),
]


def walk(tensors, queries):
    """Every (full name, Name) among `tensors`, in the order of computation. queries: their names in order."""
    numbers = [int(match[1]) for match in (re.search(r"\.block(\d+)\.", name) for name in tensors) if match]
    blocks = [entry for entry in FORWARD if entry.name.startswith("block")]
    start, found = FORWARD.index(blocks[0]), []
    for query in queries:
        found += [(f"{query}.{entry.name}", entry) for entry in FORWARD[:start]]
        found += [(f"{query}.{entry.name.format(l=l)}", entry)
                  for l in range(max(numbers) + 1) for entry in blocks]
        found += [(f"{query}.{entry.name}", entry) for entry in FORWARD[start + len(blocks):]]
    found += [(entry.name, entry) for entry in ANCHORS]
    found += [(f"{query}.{entry.name}", entry) for query in queries for entry in DECISION]
    return [(name, entry) for name, entry in found if name in tensors]


# ----------------------------------------------------------------------------------------------------
# Is a tensor the same?


def difference(a, b, tolerance):
    """None where a is b within tolerance, else the index of the largest difference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    allowed = tolerance * (np.abs(b) + np.sqrt((b * b).mean()))
    off = np.where(np.isfinite(a), np.abs(a - b), np.inf)                   # NaN is the largest difference
    if (off <= allowed).all():
        return None
    return np.unravel_index((off - allowed).argmax(), off.shape)


def reshaped(a, b):
    """What makes the shape of b of a, which has as many elements."""
    if a.squeeze().shape == b.squeeze().shape:
        return "squeeze: an axis of length 1 is too many or too few"
    for axes in permutations(range(a.ndim)):
        if a.transpose(axes).shape == b.shape:
            return f"transpose: your axes in the order {axes}"
    return "reshape: the axes are joined or split otherwise"


def first_step(a, b):
    """The index of the first id in which two answers differ."""
    return next((i for i, (x, y) in enumerate(zip(a.tolist(), b.tolist())) if x != y), min(len(a), len(b)))


class Comparison:
    """A port's tensors beside the golden ones."""

    def __init__(self, golden, meta, theirs, types, hints):
        """types: {name: its type in the file}. hints: tensors and metadata of hints.safetensors."""
        self.golden, self.theirs, self.types, self.hints = golden, theirs, types, hints
        self.queries = {query["name"]: query for query in json.loads(meta["queries"])}
        self.pieces, self.eos = json.loads(meta.get("pieces", "[]")), json.loads(meta.get("eos", "[]"))
        self.kind = max(("F32", *(kind for kind in types.values() if kind in TOLERANCE)), key=TOLERANCE.get)
        self.tolerance = TOLERANCE[self.kind]
        self.half = self.tolerance > FLOAT32
        steps = [(name, entry) for name, entry in walk(golden, self.queries) if name in theirs]
        self.faults = [(name, entry, self.fault(name, entry)) for name, entry in steps]
        self.same = [name for name, _, fault in self.faults if not fault]
        self.late = [name for name, _, fault in self.faults if fault == "late"]
        self.wrong = [step for step in self.faults if step[2] not in ("", "late")]

    def allowed(self, name, entry):
        """The tolerance of a tensor; 0 for integers."""
        if self.golden[name].dtype.kind == "i":
            return 0
        if self.half:
            return min(self.tolerance, entry.half)
        return entry.block0 if ".block0." in name else FLOAT32

    def inputs(self, name, entry):
        """{name: the port's tensor} of what a tensor is made of, inputs from the golden file.

        None if one is missing.
        """
        found = {}
        for part in entry.of:
            part = name.partition(".")[0] + part if part.startswith(".") else part
            found[part] = self.theirs.get(part, self.golden[part] if part in INPUTS else None)
            if found[part] is None or found[part].shape != self.golden[part].shape:
                return None
        return found

    def fault(self, name, entry):
        """What is wrong with a tensor: "shape", "value" or words. "" for nothing, "late" if it may differ."""
        a, b = self.theirs[name], self.golden[name]
        if name.endswith("_ids"):
            return self.answer_fault(name, a, b)
        if a.shape != b.shape:
            return "shape"
        made = self.inputs(name, entry) if entry.made else None
        if made:
            rounded = [part for part in (name, *made) if self.types.get(part) in ("F16", "BF16")]
            if rounded:
                return (f"{', '.join(rounded)} saved in half precision: the method works in float32 at any "
                        "dtype, so save it in float32")
            tight = FLOAT32 if self.allowed(name, entry) else 0
            if difference(a, entry.made(*made.values()), tight) is not None:
                return f"not what your own {', '.join(made)} give"
        if difference(a, b, self.allowed(name, entry)) is not None:
            return "value"
        if self.half and name.endswith(".block0.attn_norm"):
            length = float(((a * b).sum(-1) / (b * b).sum(-1)).mean())
            if abs(length - 1) > LENGTH:
                return f"its rows are {length:.5f} times as long as they should be on average: a wrong eps"
        return ""

    def answer_fault(self, name, a, b):
        """The same for the ids of an answer: in half precision it may differ where two logits nearly tie."""
        if a.ndim != 1:
            return "shape"
        if set(self.eos) & set(a.tolist()):
            return "value"
        step = first_step(a, b)
        if step == len(a) == len(b):
            return ""
        query, which = name.split(".")
        gaps = self.queries[query]["gaps"][which.removesuffix("_ids")]
        logits = self.golden[f"{query}.logits"]
        tie = self.tolerance * np.sqrt((logits * logits).mean())
        return "late" if self.half and step < len(gaps) and gaps[step] <= tie else "value"

    # ----------------------------------------------------------------------------------------------------
    # Why is it not?

    def suspects(self, name):
        """The causes of known mistakes that change this tensor as the port's is changed, the likeliest first.

        hints.safetensors holds what planted mistakes gave: integers whole, of floats a sample. With x the
        change here and y the planted one, 2 x.y / (x.x + y.y) is 1 where they are the same. A mistake that
        would have changed a tensor which is the same is none.
        """
        tensors, meta = self.hints
        a, b, found = self.theirs[name], self.golden[name], {}
        for i, cause in enumerate(json.loads(meta["causes"])):
            known = tensors.get(f"{i}/{name}")
            if known is None or any(f"{i}/{other}" in tensors for other in self.same):
                continue
            if b.dtype.kind == "i":
                alike = float(np.array_equal(a, known))
            elif a.shape != b.shape:
                continue
            else:
                x, y = sample(a) - sample(b), known - sample(b)
                x, y = np.nan_to_num(x, posinf=0, neginf=0), np.nan_to_num(y, posinf=0, neginf=0)
                alike = 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum() or 1)
            if alike > 0.8:
                found[cause] = max(alike, found.get(cause, 0))
        return sorted(found, key=found.get, reverse=True)

    def explain(self, name, entry, fault):
        """Lines on a tensor that is not the golden one.

        What it is, where they differ, why ports get it wrong.
        """
        a, b, tolerance = self.theirs[name], self.golden[name], self.allowed(name, entry)
        letters = entry.shape.split() if entry.shape != "-" else ["step"]
        lines = [f"  is        {entry.meaning}" + (f" ({entry.place})" if entry.place else "")]
        if a.shape != b.shape:
            need = f" = ({', '.join(letters)})" if entry.shape != "-" else ""
            lines += [f"  shape     {tuple(a.shape)}, need {tuple(b.shape)}{need}"]
            if a.size == b.size:
                return lines + [f"  advice    {reshaped(a, b)}"]
        elif difference(a, b, tolerance) is not None:
            axes = [{"1": "value", "2": "row"}.get(letter, letter) for letter in letters]
            index = tuple(int(i) for i in difference(a, b, tolerance))
            x, y = a[index].item(), b[index].item()
            where = ", ".join(f"{axis} {i}" if axis in ("value", "row") else f"{axis} = {i}"
                              for axis, i in zip(axes, index))
            lines += [f"  largest   difference {abs(x - y):.3g} at {where}: {x:.6g}, golden {y:.6g}; "
                      + (f"tolerance {tolerance:g} ({self.kind})" if tolerance else "integers are exact")]
            rows = [i for i in range(len(b)) if difference(a[i], b[i], tolerance) is not None]
            if 0 < len(rows) < len(b):
                lines += [f"  where     {len(rows)} of {len(b)} along {axes[0]} differ, "
                          f"the first is {rows[0]}"]
        if fault not in ("shape", "value"):
            lines += [f"  judged    {fault}"]
        if name.endswith("ids") and a.ndim == b.ndim == 1:
            step = first_step(a, b)
            lines += [f"  yours     {self.around(a, step)}", f"  golden    {self.around(b, step)}"]
        first, *rest = self.causes(name, entry)
        return lines + [f"  causes    {first}", *(f"            {cause}" for cause in rest)]

    def causes(self, name, entry):
        """The causes of a wrong tensor, the likeliest first."""
        known = entry.causes or ("it is an input: take it from the golden file",)
        kept = bool(name.endswith("_ids") and set(self.eos) & set(self.theirs[name].ravel().tolist()))
        known = known if kept else [cause for cause in known if cause != "the end token is kept"]
        suspects = self.suspects(name)
        return [*suspects, *(cause for cause in known if cause not in suspects)]

    def around(self, ids, first):
        """The pieces of ids around the first that differs, which stands in brackets."""
        words = [*(self.pieces[id] if 0 <= id < len(self.pieces) else str(id) for id in ids.tolist()), "end"]
        words[first] = f"[{words[first]}]"
        shown = words[max(0, first - 4):first + 5]
        return ("... " if first > 4 else "") + " ".join(shown) + (" ..." if first + 5 < len(words) else "")


INPUTS = {entry.name for entry in ANCHORS if entry.given}
SAMPLES = 32


def sample(array):
    """At most SAMPLES numbers of an array, evenly from its first to its last, in float32."""
    array = np.asarray(array, np.float32).ravel()
    return array[np.linspace(0, array.size - 1, min(SAMPLES, array.size)).astype(int)]


# ----------------------------------------------------------------------------------------------------
# The report


def fold(names, known):
    """Names on few lines: a group (what stands before the first dot) that is there whole is named once."""
    groups, words = {}, []
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    for group, members in groups.items():
        whole = sum(name.startswith(f"{group}.") for name in known)
        words += [f"{group}.*"] if len(members) == whole else members
    return textwrap.indent(textwrap.fill(", ".join(words), 104), "    ")


def misshapen(wrong, theirs, golden):
    """Names of the tensors of another shape.

    Those of one query that are as long as its ids are named together.
    """
    long, names = {}, []
    for name, entry, _ in wrong:
        if theirs[name].shape != golden[name].shape and entry.shape.startswith("N"):
            long.setdefault(name.partition(".")[0], []).append(name)
        elif theirs[name].shape != golden[name].shape:
            names.append(name)
    return [words for query, some in long.items()
            for words in ([f"all of {query} that is N long"] if len(some) > 1 else some)] + names


def compare(path, golden, meta, theirs, types={}, hints=({}, {"causes": "[]"})):
    """(lines of the report, exit status) for a port's tensors, read from path, beside the golden ones with
    their metadata. types: of the tensors in the file. Raises ValueError if no name is known."""
    steps = walk(golden, [query["name"] for query in json.loads(meta["queries"])])
    known = [name for name, _ in steps]
    if not any(name in theirs for name in known):
        raise ValueError(f"{path}: none of its {len(theirs)} tensors has a golden name such as {known[0]}; "
                         "golden.md lists them")
    both = Comparison(golden, meta, theirs, types, hints)
    same, late, wrong = both.same, both.late, both.wrong
    lines = []
    if wrong:
        do = "does" if len(wrong) == 1 else "do"
        lines += [f"{wrong[0][0]} differs, the first of {len(wrong)} that {do}; {len(same)} agree",
                  *both.explain(*wrong[0])]
        shapes = misshapen(wrong[1:], theirs, golden)
        if shapes:
            lines += [f"misshapen as well:\n{fold(shapes, [])}"]
    if late:
        lines += [f"answers differ where two logits nearly tie, as they may in {both.kind}: "
                  f"{', '.join(late)}"]
    made = [name for name, entry in steps if not entry.given]
    missing = [name for name in made if name not in theirs]
    extra = [name for name in theirs if name not in golden]
    if missing:
        lines += [f"missing, {len(missing)} of {len(made)}:\n{fold(missing, made)}"]
    if extra:
        lines += [f"unknown names, not compared:\n{fold(extra, [])}"]
    if not wrong:
        lines += [f"same: {'what is there' if missing or late else 'everything'}, {len(same)} tensors; "
                  f"tolerance {both.tolerance:g} ({both.kind})"]
    return lines, 1 if wrong else 0


def stop(message):
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(prog="compare.py",
                                     description="Compare a port's tensors with the golden ones.")
    parser.add_argument("file", help="safetensors, named as in golden.md; a part will do")
    parser.add_argument("golden", nargs="?", default=GOLDEN, help="golden.safetensors or shapes.safetensors")
    parser.error = stop
    args = parser.parse_args()
    try:
        (golden, meta, _), (theirs, _, types) = read(args.golden), read(args.file)
        lines, status = compare(args.file, golden, meta, theirs, types, read(HINTS)[:2])
    except ValueError as error:
        stop(error)
    sys.stdout.reconfigure(errors="replace")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:         # the reader has gone, as head does: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
