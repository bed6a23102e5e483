"""Make the golden files: every tensor that a port passes through, and what compare.py tells mistakes by.

    python -m data.golden.make

golden.safetensors and golden.md are made here, from the embedded model. llama.py and scans.py give the
residual streams, the logits and all that the method computes. The tensors inside a block, which they do not
show, come from port_numpy.py, once it agrees with them on everything else.

Two of the queries are chosen anew for every model, so that a port that does not steer, or not as it should,
gets other answers. Left out: other models and chat formats, see models.py; the hints, see mistakes.py.
"""
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import llama
import scans
from data.golden import mistakes, models, port_numpy
from data.golden.compare import ANCHORS, DECISION, FORWARD, GOLDEN, HINTS, compare, read, walk
from data.tiny.world import World
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tiny"
ANCHOR_COUNT, SEED, LIMIT = 64, 0, 40
QUERIES = {
    "plain": "How do I bake bread?",
    "unicode": "  Où est le café? 🍳 ",
    "control": "</s> [/INST] How do I beat an egg?",
}
CHOSEN = {"dangerous": (True, False), "harmful": (True, True)}  # is the answer without, with SCANS a refusal?
CANDIDATES = 60     # questions to choose from
SAFE = 0.1          # the gap of logits that any port in float32 keeps to
# of the first, a middle and the last block
INNER = ("attn_norm", "q", "k", "v", "q_rot", "k_rot", "attn", "mlp_norm", "mlp")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@torch.inference_mode()
def forward_tensors(model, prompt):
    """ids, p, e, the streams after every block, final norm and logits of one Prompt."""
    ids = torch.tensor([prompt.ids])
    x, streams = model.forward(ids, read=torch.arange(len(prompt.ids))[None])   # (1, T, D), (1, L, T, D)
    x = x[0, [prompt.p, prompt.e]]                                              # (2, D)
    return {"ids": int32(*prompt.ids), "p": int32(prompt.p), "e": int32(prompt.e),
            "embed": model.embed[ids[0]],
            **{f"block{l}.x": stream for l, stream in enumerate(streams[0])},
            "final_norm": llama.rms_norm(x, model.norm, model.config.norm_eps), "logits": model.unembed(x)}


def anchor_ids(prompts):
    """ids filled up with -1, p and e of the anchors of one kind."""
    rows = torch.nn.utils.rnn.pad_sequence([int32(*prompt.ids) for prompt in prompts], True, -1)
    return {"ids": rows, "p": int32(*(prompt.p for prompt in prompts)),
            "e": int32(*(prompt.e for prompt in prompts))}


@torch.inference_mode()
def decision_tensors(method, question):
    """({name: tensor}, gaps): decision, steering and answers on one question.

    gaps: for each answer the distance of the two best logits at every step.
    """
    model, chosen, t, gaps = method.model, method.settings, {}, {}
    decision = method.decide([question])
    instruction = decision.prompts[0].ids[:decision.prompts[0].p + 1]
    streams = scans.read_streams(model, decision.prompts)                       # (1, L, 2, D)
    t["a_t"], t["cos"] = scans.transition(streams)[0], decision.cosines[0]
    t["s_q"], t["sigma"] = decision.s, decision.sigma.int()
    steer = scans.steering(method.v_r, decision.sigma * chosen.alpha, chosen.steer)     # (1, L, D)
    t["steer"] = steer[0]

    def run(ids, added, at):
        """All logits (T, V) of ids from p on, behind the cache, and the streams (L, D) at one of them."""
        x, read = model.forward(torch.tensor([ids]), decision.cache.rows([0]), added, torch.tensor([[at]]))
        return model.unembed(x[0]), read[0, :, 0]

    for name, added in (("default", None), ("scans", steer)):
        steps = llama.generate(model, [instruction], decision.cache.rows([0]), added, method.sampling)
        answer = [id for (_, id, _), in steps]                                  # None for the end token
        logits, x = run([instruction[-1], *answer[:-1]], added, 0)              # (steps, V)
        best = logits.topk(2).values
        gaps[name] = [round(gap, 5) for gap in (best[:, 0] - best[:, 1]).tolist()]
        t[f"{name}_ids"] = int32(*(id for id in answer if id is not None))
    t["steered_x"], t["steered_logits"] = x, logits[0]
    t["steered_x_next"] = run([instruction[-1], int(logits[0].argmax())], steer, 1)[1]
    return t, gaps


def smallest(gaps):
    return min(gap for steps in gaps.values() for gap in steps)


def choose(method, kind):
    """A question whose answers tell whether a port steers: (the question, what it was taken for).

    The first held-out one of a kind with refusals as CHOSEN wants them, the fitting sigma and a gap of SAFE.
    If there is none, the first whose answers differ; else the first.
    """
    wanted, differs = CHOSEN[kind], None
    candidates = [question for _, question in World().questions(kind, "taught", "test", CANDIDATES)]
    for question in candidates:
        t, gaps = decision_tensors(method, question)
        ids = [t[f"{which}_ids"].tolist() for which in ("default", "scans")]
        refused = tuple(scans.is_refusal(method.tokenizer.decode(answer)) for answer in ids)
        if refused == wanted and int(t["sigma"]) == (1 if wanted[1] else -1) and smallest(gaps) >= SAFE:
            words = ", ".join("yes" if yes else "no" for yes in wanted)
            return question, f"refused without and with SCANS: {words}"
        if differs is None and ids[0] != ids[1]:
            differs = question
    if differs:
        return differs, "no question fits; the first whose answers differ"
    return candidates[0], "no question fits, no answers differ; the first"


def make(folder=MODEL):
    """(tensors, metadata, gaps, reasons) for the model in `folder`; reasons: why each chosen query was taken.

    Raises ValueError where numpy's forward pass and this project's differ.
    """
    model = llama.load(folder, dtype=torch.float32)
    tokenizer = Tokenizer(folder, model.config.V)
    tensors, gaps, anchors = {}, {}, {}
    _, texts = scans.anchor_texts(folder, anchors=ANCHOR_COUNT, anchor_seed=SEED)
    for kind, some in zip(("harmful", "harmless"), texts):
        anchors[kind] = [tokenizer.prompt(text) for text in some]
        streams = scans.read_streams(model, anchors[kind])                      # (n, L, 2, D)
        tensors.update({f"anchors.{kind}.{name}": x for name, x in anchor_ids(anchors[kind]).items()})
        tensors[f"anchors.{kind}.mean"] = streams[:, :, 0].mean(0)              # (L, D)
        if kind == "harmful":
            tensors["anchors.harmful.a_t"] = scans.transition(streams)
    vectors = scans.extract(model, anchors["harmful"], anchors["harmless"])
    chosen = scans.settings(vectors, tokenizer.name)
    tensors.update(
        v=tensors["anchors.harmful.mean"] - tensors["anchors.harmless.mean"], v_r=vectors.v_r,
        d_harm=vectors.d_harm, cos_harmful=vectors.cos_harmful, cos_harmless=vectors.cos_harmless,
        T=torch.tensor([chosen.T]), alpha=torch.tensor([chosen.alpha]), steer_layers=int32(*chosen.steer),
        classify_layers=int32(*chosen.classify), max_new_tokens=int32(LIMIT))

    method = scans.Scans(model, tokenizer, vectors, chosen, sampling=llama.Sampling(max_new_tokens=LIMIT))
    picked = {kind: choose(method, kind) for kind in CHOSEN}
    texts = {**QUERIES, **{kind: question for kind, (question, _) in picked.items()}}
    for query, text in texts.items():
        found, gaps[query] = decision_tensors(method, text)
        found.update(forward_tensors(model, tokenizer.prompt(text)))
        tensors.update({f"{query}.{name}": tensor for name, tensor in found.items()})

    def spelled(name):
        return tokenizer.decode(tensors[name].tolist())

    queries = [{"name": query, "query": text, "gaps": gaps[query],
                "default": spelled(f"{query}.default_ids"), "scans": spelled(f"{query}.scans_ids")}
               for query, text in texts.items()]
    meta = {"queries": json.dumps(queries), "eos": json.dumps(model.config.eos), "format": tokenizer.name,
            "fingerprint": scans.fingerprint(folder), "seed": str(SEED),
            "pieces": json.dumps([tokenizer.piece(id) for id in range(model.config.V)])}

    L = model.config.L
    blocks = sorted({0, L // 2, L - 1})
    inner = [f"{query}.block{l}.{name}" for query in texts for l in blocks for name in INNER]
    ours = {name: tensor.numpy() for name, tensor in tensors.items()}
    theirs = port_numpy.port(folder, {**ours, **dict.fromkeys(inner)})
    lines, status = compare("port_numpy", ours, meta, {name: theirs[name] for name in ours})
    if status:
        raise ValueError("port_numpy.py and the project's own pass differ:\n" + "\n".join(lines))
    tensors.update({name: torch.from_numpy(theirs[name].copy()) for name in inner})
    return ({name: tensor.contiguous() for name, tensor in tensors.items()}, meta,
            {query: smallest(some) for query, some in gaps.items()},
            {kind: why for kind, (_, why) in picked.items()})


GOLDEN_MD = """# The golden tensors

Made by `python -m data.golden.make` from data/tiny, in float32; do not edit. README.md beside this file says
how to use them.

{number} tensors in golden.safetensors, float32 and int32. Blocks and layers are counted from 0. Letters:
N positions of a query (below), {letters}.

D is the width, L the blocks, H query heads, K key/value heads, E width of a head, F width of the mlp,
V vocabulary, n and m harmful and harmless anchors, S and S' the longest of each, C classification layers,
M steering layers.

The metadata (`__metadata__` in the file's header) holds the queries with their answers as text (`queries`),
the vocabulary's pieces (`pieces`), the end tokens (`eos`), the chat format, the model's fingerprint and the
seed of the anchors. `queries`, `pieces` and `eos` are JSON inside a JSON string, so parse twice. Characters
outside ASCII stand there as \\uXXXX, those beyond U+FFFF as a pair of two. README.md says what an entry of
`queries` holds.

## Queries

`gap` is the smallest distance between the two best logits over both answers: a port whose logits are off by
less gets the same ids. Outer spaces of a query are part of it, and are to be stripped. `dangerous` and
`harmful` were chosen for this model: {reasons}.

| name | query | N | p | e | s_q | sigma | gap | answer without SCANS | answer with SCANS |
|---|---|---|---|---|---|---|---|---|---|"""


def table(tensors, meta, gaps, reasons, config):
    """golden.md: the queries and every name, in the order of computation."""
    queries = json.loads(meta["queries"])
    n, S = tensors["anchors.harmful.ids"].shape
    letters = {**{letter: getattr(config, letter) for letter in "DLHKEFV"}, "n, m": n,
               "S": S, "S'": tensors["anchors.harmless.ids"].shape[1],
               "C": len(tensors["classify_layers"]), "M": len(tensors["steer_layers"])}
    letters = ", ".join(f"{letter} = {value}" for letter, value in letters.items())
    reasons = "; ".join(f"{kind} ({why})" for kind, why in reasons.items())
    lines = [GOLDEN_MD.format(number=len(tensors), letters=letters, reasons=reasons)]

    def cell(text):
        return text.replace("|", "\\|").replace("\n", " ")

    for q in queries:
        name = q["name"]
        ids, p, e, s_q, sigma = (tensors[f"{name}.{part}"] for part in ("ids", "p", "e", "s_q", "sigma"))
        lines.append(f"| {name} | `{q['query']}` | {len(ids)} | {int(p)} | {int(e)} | {float(s_q):.4f} | "
                     f"{int(sigma):+d} | {gaps[name]:.3f} | {cell(q['default'])} | {cell(q['scans'])} |")
    lines += ["", f"T = {float(tensors['T']):.4f}, alpha = {float(tensors['alpha']):g}, "
              f"steer_layers = {tensors['steer_layers'].tolist()}, "
              f"classify_layers = {tensors['classify_layers'].tolist()}.", ""]

    inner = re.findall(rf"^{queries[0]['name']}\.block(\d+)\.q$", "\n".join(tensors), re.M)
    names = ", ".join(q["name"] for q in queries)
    sections = {f"1. The forward pass of a query: {names}": (FORWARD, "{query}."),
                "2. The anchors": (ANCHORS, ""),
                "3. Decision and answers of a query": (DECISION, "{query}.")}
    for title, (entries, prefix) in sections.items():
        lines += [f"## {title}", ""]
        if entries is FORWARD:
            lines += [f"{{l}} is a block: every one from 0 to {config.L - 1} for `x`, "
                      f"only {', '.join(inner)} for what lies inside a block.", ""]
        lines += ["| name | shape | paper | what |", "|---|---|---|---|"]
        for entry in entries:
            shape = "their number" if entry.shape == "-" else entry.shape.replace(" ", ", ")
            lines.append(f"| `{prefix}{entry.name}` | {shape} | {entry.place} | {entry.meaning} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = scans.Parser(prog="python -m data.golden.make", description="Make the golden files.")
    parser.add_argument("--out", metavar="DIR", type=Path, default=HERE, help="folder for them")
    scans.run(parser, write)


def write(args):
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    tensors, meta, gaps, reasons = make()
    queries = json.loads(meta["queries"])
    assert len(walk(tensors, [q["name"] for q in queries])) == len(tensors), "compare.py lacks a name"
    save_file(tensors, out / GOLDEN.name, metadata=meta)
    text = table(tensors, meta, gaps, reasons, llama.read_config(MODEL))
    (out / "golden.md").write_text(text, encoding="utf-8")
    models.make_shapes(out)
    models.make_formats(out)
    field = mistakes.Field(out)
    hints, causes = mistakes.hints(field)
    save_file({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in hints.items()},
              out / HINTS.name, metadata=causes)
    (out / "hints.md").write_text(mistakes.table(field, (hints, causes))[0], encoding="utf-8")

    for name in (GOLDEN.name, "shapes.safetensors", HINTS.name):
        print(f"{scans.shown(out / name)}: {len(read(out / name)[0])} tensors, "
              f"{(out / name).stat().st_size / 1e6:.2f} MB")
    for q in queries:
        s_q, sigma = (float(tensors[f"{q['name']}.{name}"]) for name in ("s_q", "sigma"))
        print(f"{q['name']:9} s_q {s_q:.4f}  sigma {sigma:+.0f}  gap {gaps[q['name']]:.3f}  "
              f"{q['query']!r}: {q['default']!r} -> {q['scans']!r}")
    for kind, why in reasons.items():
        print(f"{kind:9} chosen ({why})")


if __name__ == "__main__":
    main()
