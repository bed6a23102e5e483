"""Compare a port's tensors with the golden ones, in the order in which they are computed, and explain the first that differs.

    python -m data.golden.compare FILE.safetensors

FILE holds what a port has so far, under the names of golden.md; a part will do. Needs numpy alone.
Exit status: 0 all that is there is the same, 1 something differs, 2 the file cannot be used.
"""
import argparse
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.golden.port_numpy import DTYPES, read_safetensors

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden.safetensors"

# |difference| <= tolerance * (|golden value| + root mean square of the golden tensor), by the coarsest floats in the file.
# This project's own pass needs 0.007 in float16 and 0.06 in bfloat16 (the logits; streams 0.03), numpy against torch in float32 0.00001; the rest is room.
TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-2, "BF16": 1.5e-1}


@dataclass(frozen=True)
class Name:
    """One kind of tensor: its name, shape in the letters of golden.md, place in the paper, meaning, and why ports get it wrong."""
    name: str
    shape: str
    place: str
    meaning: str
    causes: tuple[str, ...] = ()
    block0: float = TOLERANCE["F32"]    # tolerance in block 0 from float32 on: no rounding has piled up there, and a wrong eps is as small as 1e-5

    @property
    def given(self):
        """An input: a port need not save it."""
        return self.meaning.partition(":")[0] == "input"


EARLIER = "only this differs: it is made here from what agrees above, so look at the code of this very step"

WIDTH = "each kind is filled up to its own longest row: take the row length from the header"

# one query, in the order of the forward pass; {l} is a block
FORWARD = [
    Name("ids", "N", "", "input: ids of instruction + r_pos, BOS first", (
        "BOS twice: the chat template puts one and the tokenizer adds another", "no BOS",
        "the space before [/INST] or the one before Sure is missing", "two halves encoded apart: the second gains a spurious leading space piece",
        "`▁` missing in front of the text", "a character that is no piece becomes the bytes of its UTF-8", "control strings in the query parsed as control ids", "the query not stripped of white space at both ends")),
    Name("p", "1", "", "input: position of the last token of the instruction", (
        "searched for [/INST] instead of counted", "off by one: p is the index of the last token, len - 1", "counted without BOS")),
    Name("e", "1", "", "input: position of the last token of instruction + r_pos", ("off by one: e is the index of the last token of all, len - 1",)),
    Name("embed", "N D", "", "embedding of the ids, not scaled", (
        "embedding scaled by sqrt(D), as other model families do", "table transposed", "ids shifted by one")),
    Name("block{l}.attn_norm", "N D", "", "input of the attention: RMS norm of the stream, times its weight", (
        "eps outside the root, or not the one of config.json: only a difference near 1e-5 is eps", "mean subtracted: that is LayerNorm",
        "float16: the norm must be taken in float32 and rounded before the weight", "1 + weight instead of weight, as other model families do"), 2e-6),
    Name("block{l}.q", "N H E", "", "queries before rotary", (
        "weight transposed: a checkpoint's matrix is (out, in)", "heads split as (E, H) instead of (H, E)",
        "weights permuted for the interleaved rotary form, as GGUF files hold them"), 5e-6),
    Name("block{l}.k", "N K E", "", "keys before rotary", (
        "weight transposed", "K taken for H: there may be fewer key heads", "weights permuted for the interleaved rotary form"), 5e-6),
    Name("block{l}.v", "N K E", "", "values", ("weight transposed", "K taken for H", "rotary applied to v: only q and k are turned"), 5e-6),
    Name("block{l}.q_rot", "N H E", "", "queries after rotary", (
        "rotary layout: dimension i goes with i + E/2 (half-split), not with i + 1 (interleaved)", "sign of the sine",
        "positions counted from 1: BOS is 0", "rope_theta or linear scaling of config.json ignored", "the exponent of theta is -2i/E, for i in 0..E/2-1: not -i/E, not over D")),
    Name("block{l}.k_rot", "N K E", "", "keys after rotary", (
        "rotary layout, as for q", "keys turned after they were put into the cache, at another position")),
    Name("block{l}.attn", "N D", "", "output of the attention, after its output projection", (
        "no 1/sqrt(E)", "mask: position t sees 0..t, itself too", "grouped heads: query head h reads key head h // (H/K), not h % K",
        "heads put back in another order before the projection", "softmax over the wrong axis, or not in float32")),
    Name("block{l}.mlp_norm", "N D", "", "input of the mlp: RMS norm of the stream after the attention, times its weight", (
        "taken of the stream before the attention was added: the two halves of a block are in sequence, not parallel", "the other norm's weight")),
    Name("block{l}.mlp", "N D", "", "output of the mlp: down(silu(gate) * up)", (
        "silu on up instead of gate", "gelu for silu", "gate and up swapped")),
    Name("block{l}.x", "N D", "a^l(q)", "residual stream after block l", (
        "the last block only: a library's last hidden state is taken after the final norm",
        "layer index shifted by one: hidden_states[l + 1] is block l, hidden_states[0] the embedding",
        "an earlier block's inner tensors are not in the golden file: check this block as block 0 was checked", "weights of another block")),
    Name("final_norm", "2 D", "", "RMS norm of the last stream at p and e, times model.norm", (
        "rows swapped: row 0 is p, row 1 is e", "the weight of model.norm left out", "eps", "taken twice: the last state was normed already")),
    Name("logits", "2 V", "", "logits at p and e", (
        "rows swapped: row 0 is p, row 1 is e", "head: lm_head, or the embedding where config.json ties them", "logits capped or scaled, as other model families do")),
]

# the anchors, once
ANCHORS = [
    Name("anchors.harmful.ids", "n S", "Q-", "input: ids of the harmful anchors with r_pos, filled up with -1", (WIDTH,)),
    Name("anchors.harmful.p", "n", "", "input: their p"),
    Name("anchors.harmful.e", "n", "", "input: their e"),
    Name("anchors.harmless.ids", "m S'", "Q+", "input: the same of the harmless anchors", (WIDTH,)),
    Name("anchors.harmless.p", "m", "", "input"),
    Name("anchors.harmless.e", "m", "", "input"),
    Name("classify_layers", "C", "", "input: the layers of Eq. 4"),
    Name("anchors.harmful.mean", "L D", "Eq. 1", "mean over Q- of a^l(q), at p", (
        "padding: in a batch padded on the left positions and mask must move with it; p and e are per row", "read at e, or at -1",
        "read at the last token of the query instead of p", "mean taken in float16", "post-norm last state: only the last layer differs")),
    Name("anchors.harmless.mean", "L D", "Eq. 1", "mean over Q+ of a^l(q), at p", ("as for the harmful ones",)),
    Name("v", "L D", "Eq. 1", "v_r before scaling: harmful minus harmless", (
        "the other sign: harmful minus harmless, so that adding it means refusing", "scaled already")),
    Name("v_r", "L D", "Eq. 1", "refusal steering vectors, each layer of unit length", (
        "unscaled v_r: each layer is divided by its own length", "scaled by the length over all layers at once")),
    Name("anchors.harmful.a_t", "n L D", "Eq. 2", "transitions of the harmful anchors", (
        "the other sign: a_t is the stream at p minus that at e", "e off by one where r_pos is several tokens",
        "r_pos run without what stands before it")),
    Name("d_harm", "L D", "Eq. 3", "reference harm direction: mean over Q- of a_t^l", (
        "mean over all anchors: only the harmful ones count", "scaled: it is not")),
    Name("cos_harmful", "n L", "", "cosine of each harmful anchor with d_harm of the n - 1 others", (
        "d_harm of all n: each anchor must be left out of its own", "cosine in float16",
        "one cosine of all layers joined, instead of one a layer")),
    Name("cos_harmless", "m L", "", "cosine of each harmless anchor with d_harm", ("as for the harmful ones; none is left out here",)),
    Name("T", "1", "this project", "threshold: sorted leave-one-out scores[floor(0.01 n)]", (
        "the index is floor(0.01 n), 0 for 64 anchors: the smallest score", "sorted downwards", "an interpolated quantile", "layers other than classify_layers")),
    Name("alpha", "1", "Eq. 6", "input: steering strength"),
    Name("steer_layers", "M", "", "input: the layers of Eq. 6"),
    Name("max_new_tokens", "1", "", "input: limit of an answer"),
]

# one query again
DECISION = [
    Name("a_t", "L D", "Eq. 2", "transition: the stream at p minus the stream at e", (
        "the other sign", "p off by one", "computed with steering still on from another query")),
    Name("cos", "L", "", "cosine of a_t^l with d_harm^l", ("cosine over the wrong axis", EARLIER)),
    Name("s_q", "1", "Eq. 4", "similarity score: mean of cos over classify_layers", (
        "the last layer of the range left out: ranges are inclusive", "mean over all layers", "layers counted from 1")),
    Name("sigma", "1", "Eq. 5", "-1 if s_q < T, else +1", ("the other sign: below T is benign, steered away from refusal", "0/1 instead of -1/+1")),
    Name("steer", "L D", "Eq. 6", "what is added: sigma alpha v_r in steer_layers, 0 elsewhere", (
        "layers off by one: l is 0-based, after block l", "unscaled v_r", "sigma forgotten: alpha alone always steers towards refusal")),
    Name("steered_x", "L D", "Eq. 6", "steered streams at p, each read after the addition, of a pass over the instruction without r_pos", (
        "read before the addition",
        "steering before p: the keys of earlier positions must be the unsteered ones", "added before the block instead of after it",
        "steered only the first or the last layer",
        "p not run again: its cached keys are the unsteered ones; cut the cache back to p, not to p + 1",
        "p run again at another position: decoding that counts from 0 turns it wrongly", "r_pos still in the cache")),
    Name("steered_logits", "V", "", "steered logits at p: they choose the first token of the answer", (
        "stream normed without the last layer's steering", EARLIER)),
    Name("steered_x_next", "L D", "Eq. 6", "steered streams at p + 1, where the first id of the answer stands: the best of steered_logits", (
        "steered at p only: every later position is steered too", "the first id taken from other logits: the unsteered ones, or those at e",
        "the id run at another position than p + 1", "the keys and values of p left out of the cache, or kept unsteered")),
    Name("default_ids", "-", "", "greedy answer without SCANS, no end token", (
        "the first token comes from the logits at p, not e: r_pos is no part of the answer", "the end token is kept",
        "a position skipped or repeated in the cache", "repetition penalty on: it is 1 here", "steering left on")),
    Name("scans_ids", "-", "", "greedy answer with SCANS, no end token", (
        "decoded without steering: every later step is steered too, not the first alone", "as for the answer without SCANS")),
]


def walk(tensors, queries):
    """Every (full name, Name) among `tensors`, in the order of computation. queries: their names in order."""
    found, L = [], tensors["v_r"].shape[0]
    for query in queries:
        blocks = [entry for entry in FORWARD if entry.name.startswith("block")]
        start = FORWARD.index(blocks[0])
        found += [(f"{query}.{entry.name}", entry) for entry in FORWARD[:start]]
        found += [(f"{query}.{entry.name.format(l=l)}", entry) for l in range(L) for entry in blocks]
        found += [(f"{query}.{entry.name}", entry) for entry in FORWARD[start + len(blocks):]]
    found += [(entry.name, entry) for entry in ANCHORS]
    found += [(f"{query}.{entry.name}", entry) for query in queries for entry in DECISION]
    return [(name, entry) for name, entry in found if name in tensors]


def read(path):
    """({name: array}, metadata, {name: type}) of a safetensors file. Raises ValueError."""
    try:
        return read_safetensors(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} in its header; a type must be one of {', '.join(DTYPES)}") from None
    except (ValueError, TypeError, AttributeError, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({str(error).partition(chr(10))[0]})") from None


def difference(a, b, tolerance):
    """None where a is b within tolerance, else the index of the largest difference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    allowed = tolerance * (np.abs(b) + np.sqrt((b * b).mean()))
    off = np.where(np.isfinite(a), np.abs(a - b), np.inf)                                    # NaN is the largest difference
    if (off <= allowed).all():
        return None
    return np.unravel_index((off - allowed).argmax(), off.shape)


def fold(names, known):
    """Names on few lines: a group (what stands before the first dot) that is there whole is named once."""
    groups, words = {}, []
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    for group, members in groups.items():
        whole = sum(name.startswith(f"{group}.") for name in known)
        words += [f"{group}.*"] if len(members) == whole else members
    return textwrap.indent(textwrap.fill(", ".join(words), 116), "    ")


def around(ids, first, pieces):
    """The pieces of ids around the first that differs, which stands in brackets."""
    words = [pieces[id] if 0 <= id < len(pieces) else f"no piece: {id}" for id in ids.tolist()] + ["end"]
    shown = [f"[{word}]" if i == first else word for i, word in enumerate(words)][max(0, first - 4):first + 5]
    return ("... " if first > 4 else "") + " ".join(shown) + (" ..." if first + 5 < len(words) else "")


def explain(name, entry, a, b, tolerance, kind, pieces):
    """Lines on a tensor a that is not the golden b: what it is, where they differ, why ports get it wrong."""
    letters = entry.shape.split() if entry.shape != "-" else ["step"]
    lines = [f"  is        {entry.meaning}" + (f" ({entry.place})" if entry.place else "")]
    if a.shape != b.shape:
        lines += [f"  shape     {tuple(a.shape)}, need {tuple(b.shape)}" + (f" = ({', '.join(letters)})" if entry.shape != "-" else "")]
    else:
        axes = [{"1": "value", "2": "row"}.get(letter, letter) for letter in letters]
        index = tuple(int(i) for i in difference(a, b, tolerance))
        x, y = a[index].item(), b[index].item()
        where = ", ".join(f"{axis} {i}" if axis in ("value", "row") else f"{axis} = {i}" for axis, i in zip(axes, index))
        lines += [f"  largest   difference {abs(x - y):.3g} at {where}: {x:.6g}, golden {y:.6g}; "
                  + (f"tolerance {tolerance:g} ({kind})" if tolerance else "integers are exact")]
        rows = [i for i in range(len(b)) if difference(a[i], b[i], tolerance) is not None]
        if 0 < len(rows) < len(b):
            lines += [f"  where     {len(rows)} of {len(b)} along {axes[0]} differ, the first is {rows[0]}"]
    if name.endswith("ids") and a.ndim == b.ndim == 1:
        first = next((i for i, (x, y) in enumerate(zip(a.tolist(), b.tolist())) if x != y), min(len(a), len(b)))
        lines += [f"  yours     {around(a, first, pieces)}", f"  golden    {around(b, first, pieces)}"]
    causes = entry.causes or ("it is an input: take it from golden.safetensors",)
    return lines + [f"  causes    {causes[0]}"] + [f"            {cause}" for cause in causes[1:]]


def misshapen(wrong):
    """Names of the tensors of another shape; those of one query that are as long as its ids are named together."""
    long, names = {}, []
    for name, entry, a, b, _ in wrong:
        if a.shape != b.shape and entry.shape.startswith("N"):
            long.setdefault(name.partition(".")[0], []).append(name)
        elif a.shape != b.shape:
            names.append(name)
    return [words for query, some in long.items() for words in ([f"all of {query} that is N long"] if len(some) > 1 else some)] + names


def compare(path, golden, meta, theirs, kind="F32"):
    """(lines of the report, exit status) for a port's tensors, read from path, beside the golden ones with their metadata.
    kind: the coarsest type of their floats. Raises ValueError if no name is known."""
    steps = walk(golden, [query["name"] for query in json.loads(meta["queries"])])
    known, pieces = [name for name, _ in steps], json.loads(meta["pieces"])
    if not any(name in theirs for name in known):
        raise ValueError(f"{path}: none of its {len(theirs)} tensors has a golden name such as {known[0]}; golden.md lists them")
    same, wrong, late = [], [], []
    for name, entry in steps:
        if name not in theirs:
            continue
        a, b = theirs[name], golden[name]
        tolerance = 0 if b.dtype.kind == "i" else entry.block0 if ".block0." in name and TOLERANCE[kind] == TOLERANCE["F32"] else TOLERANCE[kind]
        if a.shape == b.shape and difference(a, b, tolerance) is None:
            same.append(name)
        elif name.endswith("_ids") and TOLERANCE[kind] > TOLERANCE["F32"]:
            late.append(name)                       # in half precision two near logits may change places
        else:
            wrong.append((name, entry, a, b, tolerance))
    lines = []
    if wrong:
        lines += [f"{wrong[0][0]} differs, the first of {len(wrong)} that {'does' if len(wrong) == 1 else 'do'}; {len(same)} agree",
                  *explain(*wrong[0], kind, pieces)]
        shapes = misshapen(wrong[1:])
        if shapes:
            lines += [f"misshapen as well:\n{fold(shapes, [])}"]
    if late:
        lines += [f"answers differ, as they may in {kind}: {', '.join(late)}"]
    made = [name for name, entry in steps if not entry.given]
    missing, extra = [name for name in made if name not in theirs], [name for name in theirs if name not in golden]
    if missing:
        lines += [f"missing, {len(missing)} of {len(made)}:\n{fold(missing, made)}"]
    if extra:
        lines += [f"unknown names, not compared:\n{fold(extra, [])}"]
    if not wrong:
        lines += [f"same: {'what is there' if missing or late else 'everything'}, {len(same)} tensors; tolerance {TOLERANCE[kind]:g} ({kind})"]
    return lines, 1 if wrong else 0


def stop(message):
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(prog="python -m data.golden.compare", description="Compare a port's tensors with the golden ones.")
    parser.add_argument("file", help="safetensors, named as in golden.md; a part will do")
    parser.error = stop
    file = parser.parse_args().file
    try:
        (golden, meta, _), (theirs, _, types) = read(GOLDEN), read(file)
        kind = max((kind for kind in ("F32", *types.values()) if kind in TOLERANCE), key=TOLERANCE.get)
        lines, status = compare(file, golden, meta, theirs, kind)
    except ValueError as error:
        stop(error)
    sys.stdout.reconfigure(errors="replace")
    print("\n".join(lines))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
