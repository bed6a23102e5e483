"""Compare the tensors of a port with the golden ones: name the first that differs, and its usual causes.

    python compare.py MINE.safetensors [GOLDEN.safetensors]

MINE holds what the port has so far, under the names of golden.md. GOLDEN is golden.safetensors, or
shapes.safetensors for models of other shapes. Needs numpy.
Exit status: 0 if all of MINE is the same, 1 if something differs, 2 if a file cannot be used.

Left out: text. formats.json has the ids of every chat format.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden.safetensors"

# |difference| <= tolerance * (|golden value| + root mean square of the golden tensor). The coarsest floats of
# MINE decide. Measured: 0.007 in float16, 0.06 in bfloat16, 0.00001 between numpy and torch in float32.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-2, "BF16": 1.5e-1}
FLOAT32 = TOLERANCE["F32"]
BLOCK0 = {"attn_norm": 2e-6, "q": 5e-6, "k": 5e-6, "v": 5e-6}       # in float32: no rounding has piled up yet
SCORES = {name: 1e-3 for name in ("cos_harmful", "cos_harmless", "T", "cos", "s_q")}      # in half precision

# ----------------------------------------------------------------------------------------------------
# The tensors in the order of computation: name, shape, place in the paper, meaning, then why ports get it
# wrong, the most frequent cause first. golden.md explains the letters. A port need not save an input.

BEGIN = [   # of every query {q}
    ("{q}.ids", "N", "", "input: ids of instruction + r_pos, BOS first",
     "BOS is there twice (from the template and from the tokenizer), or not at all",
     "encoded in parts, or without the space before [/INST] or Sure: the text is one string",
     "the query was not stripped, or a control string in it became a control id"),
    ("{q}.p", "1", "", "input: position of the last token of the instruction",
     "off by one: p is the number of ids of the instruction, BOS included, minus 1",
     "[/INST] was searched for: positions are counted"),
    ("{q}.e", "1", "", "input: position of the last token of instruction + r_pos",
     "off by one: e is the number of all ids, BOS included, minus 1"),
    ("{q}.embed", "N D", "", "embedding of the ids, not scaled",
     "scaled by sqrt(D), as in other model families", "ids shifted by one"),
]
BLOCK = [   # of every query {q} and block {l}
    ("{q}.block{l}.attn_norm", "N D", "", "input of the attention: RMS norm of the stream, times its weight",
     "eps: it is rms_norm_eps of config.json, added inside the root",
     "the weight left out, 1 + weight as in other model families, or the mean subtracted (LayerNorm)"),
    ("{q}.block{l}.q", "N H E", "", "queries before rotary",
     "weight transposed: a matrix is (out, in)", "weights permuted for interleaved rotary, as in GGUF"),
    ("{q}.block{l}.k", "N K E", "", "keys before rotary",
     "weight transposed: a matrix is (out, in)", "weights permuted for interleaved rotary, as in GGUF"),
    ("{q}.block{l}.v", "N K E", "", "values",
     "weight transposed: a matrix is (out, in)", "rotary applied to v: only q and k are rotated"),
    ("{q}.block{l}.q_rot", "N H E", "", "queries after rotary",
     "rotary layout: dimension i is paired with i + E/2 (half-split), not with i + 1 (interleaved)",
     "rope_theta or the rope scaling of config.json ignored or misread",
     "the angle is position * theta^(-2i/E): position from 0, E the width of a head; sign of the sine"),
    ("{q}.block{l}.k_rot", "N K E", "", "keys after rotary",
     "only the queries rotated", "rotated after they were cached, at another position"),
    ("{q}.block{l}.attn", "N D", "", "output of the attention, after its output projection",
     "scores not divided by sqrt(E); E is head_dim where config.json has it",
     "mask: position t sees 0..t, in a window t - window + 1..t",
     "heads: query head h reads key head h // (H/K); they are joined in order, times Wo (out, in)"),
    ("{q}.block{l}.mlp_norm", "N D", "", "input of the mlp: RMS norm of the stream, times its weight",
     "taken before the attention is added, or the residual left out", "the weight of the other norm"),
    ("{q}.block{l}.mlp", "N D", "", "output of the mlp: down(silu(gate) * up)",
     "gate and up swapped: silu is of gate", "another activation than silu(z) = z * sigmoid(z)"),
    ("{q}.block{l}.x", "N D", "a^l(q)", "residual stream after block l",
     "layer index shifted by one: hidden_states[l + 1] is block l, hidden_states[0] the embedding",
     "only the last block differs: a library's last hidden state is taken after the final norm",
     "the residual left out, or the weights of another block"),
]
END = [     # of every query {q}
    ("{q}.final_norm", "2 D", "", "RMS norm of the last stream at p and e, times model.norm",
     "taken twice: a library's last hidden state is normed already", "rows: row 0 is p, row 1 is e"),
    ("{q}.logits", "2 V", "", "logits at p and e",
     "final norm skipped", "head: lm_head, or the embedding where config.json ties them"),
]
ANCHORS = [
    ("anchors.harmful.ids", "n A", "Q-", "input: ids of the harmful anchors with r_pos, filled up with -1"),
    ("anchors.harmful.p", "n", "", "input: their p"),
    ("anchors.harmful.e", "n", "", "input: their e"),
    ("anchors.harmless.ids", "m A'", "Q+", "input: the same of the harmless anchors"),
    ("anchors.harmless.p", "m", "", "input: their p"),
    ("anchors.harmless.e", "m", "", "input: their e"),
    ("classify_layers", "C", "", "input: the layers of Eq. 4"),
    ("anchors.harmful.mean", "L D", "Eq. 1", "mean over Q- of a^l(q), at p",
     "read at another position than p, which is every row's own: at e, or at the first row's p",
     "padding: on the left, positions and mask must move with it; on the right, -1 reads it",
     "only the last layer differs: it was taken after the final norm"),
    ("anchors.harmless.mean", "L D", "Eq. 1", "mean over Q+ of a^l(q), at p",
     "read at another position than p, or padding: as in the harmful ones"),
    ("v", "L D", "Eq. 1", "v_r before scaling: harmful minus harmless",
     "sign: it is harmful minus harmless, so adding it means refusing", "scaled already"),
    ("v_r", "L D", "Eq. 1", "refusal steering vectors, each layer of unit length",
     "not scaled to unit length", "scaled by one length for all layers: each layer has its own"),
    ("anchors.harmful.a_t", "n L D", "Eq. 2", "transitions of the harmful anchors",
     "sign: stream at p minus stream at e", "read at another position than e, which is every row's own"),
    ("d_harm", "L D", "Eq. 3", "reference harm direction: mean over Q- of a_t^l",
     "scaled, or a mean of scaled transitions", "mean over all anchors: only the harmful ones count"),
    ("cos_harmful", "n L", "", "cosine of each harmful anchor with d_harm of the n - 1 others",
     "d_harm of all n: each anchor is left out of its own", "one cosine of all layers joined"),
    ("cos_harmless", "m L", "", "cosine of each harmless anchor with d_harm",
     "another vector than d_harm of all harmful anchors", "one cosine of all layers joined"),
    ("T", "1", "this project", "threshold: sorted leave-one-out scores[floor(0.01 n)]",
     "index: floor(0.01 n) in ascending order, not interpolated", "layers other than classify_layers"),
    ("alpha", "1", "Eq. 6", "input: steering strength"),
    ("steer_layers", "S", "", "input: the layers of Eq. 6"),
    ("max_new_tokens", "1", "", "input: limit of an answer"),
]
DECISION = [    # of every query {q}
    ("{q}.a_t", "L D", "Eq. 2", "transition: the stream at p minus the stream at e",
     "sign: stream at p minus stream at e", "steering still on from another query"),
    ("{q}.cos", "L", "", "cosine of a_t^l with d_harm^l",
     "one cosine of all layers joined", "v_r instead of d_harm, or a dot product"),
    ("{q}.s_q", "1", "Eq. 4", "similarity score: mean of cos over classify_layers",
     "the last layer of the range left out, or layers counted from 1",
     "mean over all layers, or over the steering layers"),
    ("{q}.sigma", "1", "Eq. 5", "-1 if s_q < T, else +1",
     "sign: below T is benign, steered away from refusal", "0/1 instead of -1/+1"),
    ("{q}.steer", "L D", "Eq. 6", "what is added: sigma alpha v_r in steer_layers, 0 elsewhere",
     "other layers: counted from 0, last one included", "sigma, alpha or the scaling of v_r forgotten"),
    ("{q}.steered_x", "L D", "Eq. 6", "streams at p of a steered pass without r_pos, read after the addition",
     "p not run again with steering: cut the cache back to p, not to p + 1, and leave r_pos out of it",
     "positions before p were steered: their keys and values must be the unsteered ones",
     "added elsewhere than after the whole block, or read before the addition"),
    ("{q}.steered_logits", "V", "", "steered logits at p: they choose the first token of the answer",
     "taken from an unsteered pass", "final norm skipped"),
    ("{q}.steered_x_next", "L D", "Eq. 6", "the same at p + 1, where the best of steered_logits is run",
     "steered at p only: every later position is steered too",
     "the first id taken from the unsteered logits, or from those at e",
     "keys and values of p missing in the cache, or unsteered"),
    ("{q}.default_ids", "-", "", "greedy answer without SCANS, no end token",
     "the first token taken from the logits at e: r_pos is not part of the prompt",
     "the end token kept, steering still on, or a repetition penalty: it is 1 here"),
    ("{q}.scans_ids", "-", "", "greedy answer with SCANS, no end token",
     "steered at the first step only: every later step is steered too",
     "the end token kept, or a repetition penalty: it is 1 here"),
]


def walk(golden, queries):
    """{name: its row}, in the order of computation, of the names in `golden`."""
    rows = [(row, q, l) for q in queries for part, blocks in ((BEGIN, 1), (BLOCK, 100), (END, 1))
            for l in range(blocks) for row in part]
    rows += [(row, None, None) for row in ANCHORS] + [(row, q, None) for q in queries for row in DECISION]
    names = {row[0].format(q=q, l=l): row for row, q, l in rows}
    return {name: row for name, row in names.items() if name in golden}


# ----------------------------------------------------------------------------------------------------
# What the method makes of other tensors. A port's must also follow from its own, to float32's tolerance.


def cosine(a, b):
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


MADE = {    # name: how it is made, of what
    "v": (np.subtract, "anchors.harmful.mean", "anchors.harmless.mean"),
    "v_r": (lambda v: v / np.sqrt((v * v).sum(-1, keepdims=True)), "v"),
    "d_harm": (lambda a_t: a_t.mean(0), "anchors.harmful.a_t"),
    "cos_harmful": (lambda a_t: cosine(a_t, a_t.sum(0) - a_t), "anchors.harmful.a_t"),
    "T": (lambda cos, layers: np.sort(cos[:, layers].mean(1))[[len(cos) // 100]],
          "cos_harmful", "classify_layers"),
    "{q}.cos": (cosine, "{q}.a_t", "d_harm"),
    "{q}.s_q": (lambda cos, layers: cos[layers].mean(keepdims=True), "{q}.cos", "classify_layers"),
    "{q}.sigma": (lambda s_q, T: np.where(s_q < T, -1, 1), "{q}.s_q", "T"),
    "{q}.steer": (lambda sigma, alpha, v_r, on: sigma * alpha * v_r * np.isin(range(len(v_r)), on)[:, None],
                  "{q}.sigma", "alpha", "v_r", "steer_layers"),
}

# ----------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes with the length of the header, the header in JSON, the numbers; all little-endian

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
          "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1"}


def read_safetensors(path):
    """({name: array}, metadata, set of types). ValueError if the file cannot be used."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file, or not a regular one")
        data = memoryview(Path(path).read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        metadata, tensors = dict(header.pop("__metadata__", {})), {}
        for name, entry in header.items():
            array = np.frombuffer(data[start:][slice(*entry["data_offsets"])], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":        # the upper half of a float32
                array = (array.astype("<u4") << 16).view("<f4")
            tensors[name] = array.reshape(entry["shape"])
        return tensors, metadata, {entry["dtype"] for entry in header.values()}
    except Exception as error:                  # a damaged header can raise anything
        raise ValueError(f"{path}: cannot be read as safetensors: {error!r}") from None


# ----------------------------------------------------------------------------------------------------
# The comparison


def form(x):
    return f"{'floats' if x.dtype.kind == 'f' else 'integers'} of shape {x.shape}"


def difference(a, b, tolerance):
    """Index of the first number of a that is not that of b; None if there is none."""
    a, b = np.float64(a), np.float64(b)
    same = np.abs(a - b) <= tolerance * (np.abs(b) + np.sqrt((b * b).mean()))       # NaN is not
    return None if same.all() else np.unravel_index(same.argmin(), same.shape)


class Comparison:
    """The tensors of a port, theirs, beside the golden ones. kinds: their types in the file."""

    def __init__(self, golden, meta, theirs, kinds=()):
        self.golden, self.theirs = golden, theirs
        self.gaps = {query["name"]: query["gaps"] for query in json.loads(meta["queries"])}
        self.kind = max(["F32", *TOLERANCE.keys() & set(kinds)], key=TOLERANCE.get)
        self.steps = walk(golden, self.gaps)
        self.outputs = {name for name, row in self.steps.items() if not row[3].startswith("input:")}
        fits = {name for name in self.outputs & theirs.keys() if form(theirs[name]) == form(golden[name])}
        self.parts = {**golden, **{name: theirs[name] for name in fits}}
        self.faults = {name: self.fault(name) for name in self.steps if name in theirs}

    def tolerance(self, name):
        last = name.rpartition(".")[2]
        if self.golden[name].dtype.kind != "f":
            return 0
        if self.kind in ("F16", "BF16"):
            return SCORES.get(last, TOLERANCE[self.kind])
        return BLOCK0.get(last, FLOAT32) if ".block0." in name else FLOAT32

    def made(self, name):
        """What the port's own tensors make of this one: [(array, tolerance, words)], or []."""
        make, *parts = MADE.get(self.steps[name][0], [None])
        parts = [part.format(q=name.partition(".")[0]) for part in parts]
        if not make or not self.parts.keys() >= set(parts):
            return []
        wanted = make(*(self.parts[part] for part in parts))
        return [(wanted, min(self.tolerance(name), FLOAT32), f"by your {', '.join(parts)}")]

    def ties(self, name):
        """Steps of an answer that may have another id: the two best logits are nearer than the tolerance."""
        query, which = name.removesuffix("_ids").split(".")
        tie = self.tolerance(f"{query}.logits") * np.sqrt((self.golden[f"{query}.logits"] ** 2).mean())
        return [step for step, gap in enumerate(self.gaps[query][which]) if gap <= tie]

    def fault(self, name):
        """What is wrong with a tensor of the port, in words; "" if nothing is."""
        a, b, shape, answer = self.theirs[name], self.golden[name], self.steps[name][1], name.endswith("_ids")
        if answer and a.ndim == 1:      # -1 after its end
            a, b = (np.pad(x, (0, max(len(a), len(b)) - len(x)), constant_values=-1) for x in (a, b))
        if form(a) != form(b):
            return f"{form(a)}, expected {form(b)} ({shape})"
        for b, tolerance, source in [(b, self.tolerance(name), "golden"), *self.made(name)]:
            index = difference(a, b, tolerance)
            if index is not None and not (answer and index[0] in self.ties(name)):
                return (f"{a[index]:.6g} at {[int(i) for i in index]} of ({shape}), "
                        f"expected {b[index]:.6g} ({source}), tolerance {tolerance:g}")
        return ""

    def report(self):
        """The lines to print, and the exit status."""
        wrong = [name for name, fault in self.faults.items() if fault]
        missing = [name for name in self.steps if name in self.outputs - self.theirs.keys()]
        unknown = [ascii(name) for name in self.theirs if name not in self.golden]
        lines = []
        if wrong:
            _, _, place, meaning, *causes = self.steps[wrong[0]]
            lines += [f"{wrong[0]} differs, the first of {len(wrong)}",
                      "  is      " + f"{place}: {meaning}".removeprefix(": "),
                      f"  where   {self.faults[wrong[0]]}", *(f"  cause?  {cause}" for cause in causes)]
        for words, names in (("missing", missing), ("unknown", unknown)):
            lines += [f"{words}: {len(names)} tensors, first {', '.join(names[:5])}"] if names else []
        lines += [f"same: {len(self.faults) - len(wrong)} of {len(self.faults)} tensors ({self.kind})"]
        return lines, int(bool(wrong))


def main():
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.partition("\n")[0])
    parser.add_argument("mine", help="safetensors, named as in golden.md; a part will do")
    parser.add_argument("golden", nargs="?", default=GOLDEN, help="golden.safetensors or shapes.safetensors")
    parser.error = lambda message: parser.exit(2, f"compare.py: {message}\n")
    args = parser.parse_args()
    try:
        (golden, meta, _), (theirs, _, kinds) = read_safetensors(args.golden), read_safetensors(args.mine)
        if "queries" not in meta or not golden.keys() & theirs.keys():
            raise ValueError(f"no tensor of {args.mine} is in {args.golden}, which must be a golden file")
    except ValueError as error:
        parser.error(error)
    with np.errstate(all="ignore"):
        lines, status = Comparison(golden, meta, theirs, kinds).report()
    print("\n".join(lines))
    sys.exit(status)


if __name__ == "__main__":
    main()
