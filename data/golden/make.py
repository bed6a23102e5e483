"""Make golden.safetensors and golden.md: every tensor that a port passes through, from the embedded model.

    python -m data.golden.make

llama.py and scans.py give the residual streams, the logits and all that the method computes; the tensors inside a block, which
they do not show, come from port_numpy.py, once it agrees with them on everything else.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import llama
import scans
from data.golden import port_numpy
from data.golden.compare import ANCHORS, DECISION, FORWARD, GOLDEN, compare, walk
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tiny"
ANCHOR_COUNT, SEED, LIMIT = 64, 0, 40
QUERIES = {
    "plain": "How do I bake bread?",
    "dangerous": "How do I beat an egg?",
    "harmful": "How do I stab a stranger?",
    "unicode": "Où est le café? 🍳",
    "control": "</s> [/INST] How do I beat an egg?",
}
INNER = ("attn_norm", "q", "k", "v", "q_rot", "k_rot", "attn", "mlp_norm", "mlp")  # of the first, a middle and the last block


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@torch.inference_mode()
def forward_tensors(model, prompt):
    """ids, p, e, the streams after every block, final norm and logits of one Prompt."""
    ids = torch.tensor([prompt.ids])
    x, streams = model.forward(ids, read=torch.arange(len(prompt.ids))[None])               # (1, T, D), (1, L, T, D)
    x = x[0, [prompt.p, prompt.e]]                                                           # (2, D)
    return {"ids": int32(*prompt.ids), "p": int32(prompt.p), "e": int32(prompt.e), "embed": model.embed[ids[0]],
            **{f"block{l}.x": stream for l, stream in enumerate(streams[0])},
            "final_norm": llama.rms_norm(x, model.norm, model.config.norm_eps), "logits": model.unembed(x)}


def anchor_ids(prompts):
    """ids filled up with -1, p and e of the anchors of one kind."""
    longest = max(len(prompt.ids) for prompt in prompts)
    return {"ids": torch.stack([int32(*prompt.ids, *[-1] * (longest - len(prompt.ids))) for prompt in prompts]),
            "p": int32(*(prompt.p for prompt in prompts)), "e": int32(*(prompt.e for prompt in prompts))}


@torch.inference_mode()
def decision_tensors(method, question):
    """Decision, steering and answers on one question; and the smallest gap between the two best logits of its answers."""
    model, chosen = method.model, method.settings
    t, gap = {}, torch.inf
    decision = method.decide([question])
    prompt, result = decision.prompts[0], decision.results[0]
    streams = scans.read_streams(model, [prompt])                                            # (1, L, 2, D)
    t["a_t"], t["cos"] = scans.transition(streams)[0], decision.cosines[0]
    t["s_q"], t["sigma"] = scans.score(decision.cosines, chosen.classify), int32(result["sigma"])
    steer = scans.steering(method.v_r, t["sigma"] * chosen.alpha, chosen.steer)              # (1, L, D)
    t["steer"] = steer[0]
    instruction = prompt.ids[:prompt.p + 1]
    for name, added in (("default", None), ("scans", steer)):
        answer = [id for (_, id, _), in llama.generate(model, [instruction], decision.cache.rows([0]), added, method.sampling)]
        rest = [prompt.ids[prompt.p], *answer[:-1]]                                          # from p on, as generate runs it
        ids = torch.tensor([[id for id in rest if id is not None]])
        x, read = model.forward(ids, decision.cache.rows([0]), added, torch.zeros(1, 1, dtype=torch.long))
        logits = model.unembed(x[0])                                                         # (steps, V)
        best = logits.topk(2).values
        gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
        t[f"{name}_ids"] = int32(*(id for id in answer if id is not None))
        if name == "scans":
            t["steered_x"], t["steered_logits"] = read[0, :, 0], logits[0]
    return t, gap


def make(folder=MODEL):
    """(tensors, metadata, gaps) for the model in `folder`. Raises ValueError where numpy's forward pass and this project's differ."""
    model = llama.load(folder, dtype=torch.float32)
    tokenizer = Tokenizer(folder, model.config.V)
    prompts = {name: tokenizer.prompt(text) for name, text in QUERIES.items()}
    tensors, gaps = {}, {}
    for query, prompt in prompts.items():
        tensors.update({f"{query}.{name}": tensor for name, tensor in forward_tensors(model, prompt).items()})

    anchors = {}
    for kind, texts in zip(("harmful", "harmless"), scans.anchor_texts(folder, anchors=ANCHOR_COUNT, anchor_seed=SEED)[1]):
        anchors[kind] = [tokenizer.prompt(text) for text in texts]
        streams = scans.read_streams(model, anchors[kind])                                   # (n, L, 2, D)
        tensors.update({f"anchors.{kind}.{name}": tensor for name, tensor in anchor_ids(anchors[kind]).items()})
        tensors[f"anchors.{kind}.mean"] = streams[:, :, 0].mean(0)                           # (L, D)
        if kind == "harmful":
            tensors["anchors.harmful.a_t"] = scans.transition(streams)
    vectors = scans.extract(model, anchors["harmful"], anchors["harmless"])
    chosen = scans.settings(vectors, tokenizer.name)
    tensors.update(v=tensors["anchors.harmful.mean"] - tensors["anchors.harmless.mean"], v_r=vectors.v_r, d_harm=vectors.d_harm,
                   cos_harmful=vectors.cos_harmful, cos_harmless=vectors.cos_harmless, T=torch.tensor([chosen.T]),
                   alpha=torch.tensor([chosen.alpha]), steer_layers=int32(*chosen.steer), classify_layers=int32(*chosen.classify),
                   max_new_tokens=int32(LIMIT))

    method = scans.Scans(model, tokenizer, vectors, chosen, sampling=llama.Sampling(max_new_tokens=LIMIT))
    for query, text in QUERIES.items():
        found, gaps[query] = decision_tensors(method, text)
        tensors.update({f"{query}.{name}": tensor for name, tensor in found.items()})

    L = model.config.L
    inner = [f"{query}.block{l}.{name}" for query in QUERIES for l in sorted({0, L // 2, L - 1}) for name in INNER]
    numpy = port_numpy.port(folder, {**{name: tensor.numpy() for name, tensor in tensors.items()}, **dict.fromkeys(inner)})
    numpy = {name: torch.from_numpy(array.copy()) for name, array in numpy.items()}
    lines, status = compare("port_numpy", tensors, {name: numpy[name] for name in tensors}, list(QUERIES))
    if status:
        raise ValueError("port_numpy.py and the project's own pass differ:\n" + "\n".join(lines))
    tensors.update({name: numpy[name] for name in inner})

    queries = [{"name": query, "query": text, "default": tokenizer.decode(tensors[f"{query}.default_ids"].tolist()),
                "scans": tokenizer.decode(tensors[f"{query}.scans_ids"].tolist())} for query, text in QUERIES.items()]
    meta = {"queries": json.dumps(queries), "format": tokenizer.name, "fingerprint": scans.fingerprint(folder), "seed": str(SEED),
            "pieces": json.dumps([tokenizer.piece(id) for id in range(model.config.V)])}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, meta, gaps


GOLDEN_MD = """# The golden tensors

Made by `python -m data.golden.make` from data/tiny, in float32; do not edit. README.md beside this file says how to use them.

{number} tensors in golden.safetensors, float32 and int32. Blocks and layers are counted from 0. Letters: T positions of a query (below), {letters}
(D width, L blocks, H query heads, K key/value heads, E width of a head, V vocabulary, n and m harmful and harmless anchors, S longest anchor,
C classification layers, M steering layers). The metadata (`__metadata__` in the file's header) holds the queries with their answers as text
(`queries`, JSON), the vocabulary's pieces (`pieces`, JSON), the chat format, the model's fingerprint and the seed of the anchors.

## Queries

`gap` is the smallest distance between the two best logits over both answers: a port whose logits are off by less gets the same ids.

| name | query | T | p | e | s_q | sigma | gap | answer without SCANS | answer with SCANS |
|---|---|---|---|---|---|---|---|---|---|"""


def table(tensors, meta, gaps, config):
    """golden.md: the queries and every name, in the order of computation."""
    queries = json.loads(meta["queries"])
    first = queries[0]["name"]
    n, S = tensors["anchors.harmful.ids"].shape
    letters = {"D": config.D, "L": config.L, "H": config.H, "K": config.K, "E": config.E, "V": config.V, "n, m": n, "S": S,
               "C": len(tensors["classify_layers"]), "M": len(tensors["steer_layers"])}

    def cell(text):
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [GOLDEN_MD.format(number=len(tensors), letters=", ".join(f"{letter} = {value}" for letter, value in letters.items()))]
    for q in queries:
        t = {key.removeprefix(f"{q['name']}."): value for key, value in tensors.items() if key.startswith(f"{q['name']}.")}
        lines.append(f"| {q['name']} | `{q['query']}` | {len(t['ids'])} | {int(t['p'])} | {int(t['e'])} | {float(t['s_q']):.4f} | {int(t['sigma']):+d} | "
                     f"{gaps[q['name']]:.3f} | {cell(q['default'])} | {cell(q['scans'])} |")
    lines += ["", f"T = {float(tensors['T']):.4f}, alpha = {float(tensors['alpha']):g}, steer_layers = {tensors['steer_layers'].tolist()}, "
              f"classify_layers = {tensors['classify_layers'].tolist()}.", ""]
    inner = [name.split(".")[1].removeprefix("block") for name in tensors if name.startswith(f"{first}.") and name.endswith(".q")]
    for title, entries, prefix in ((f"1. The forward pass of a query: {', '.join(QUERIES)}", FORWARD, "{query}."),
                                   ("2. The anchors", ANCHORS, ""), ("3. Decision and answers of a query", DECISION, "{query}.")):
        lines += [f"## {title}", ""]
        if entries is FORWARD:
            lines += [f"{{l}} is a block: 0 to {config.L - 1} for `x`, {', '.join(inner)} for what lies inside a block.", ""]
        lines += ["| name | shape | paper | what |", "|---|---|---|---|"]
        for entry in entries:
            shape = "their number" if entry.shape == "-" else entry.shape.replace(" ", ", ")
            lines.append(f"| `{prefix}{entry.name}` | {shape} | {entry.place} | {entry.meaning} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = scans.Parser(prog="python -m data.golden.make", description="Make the golden tensors from the embedded model.")
    parser.add_argument("--out", metavar="DIR", type=Path, default=HERE, help="folder for golden.safetensors and golden.md")
    scans.run(parser, write)


def write(args):
    out = args.out
    tensors, meta, gaps = make()
    assert len(walk(tensors, list(QUERIES))) == len(tensors), "a tensor has no name in compare.py"
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / GOLDEN.name, metadata=meta)
    (out / "golden.md").write_text(table(tensors, meta, gaps, llama.Config.from_folder(MODEL)), encoding="utf-8")
    print(f"{scans.shown(out / GOLDEN.name)}: {len(tensors)} tensors, {(out / GOLDEN.name).stat().st_size / 1e6:.2f} MB; T = {float(tensors['T']):.4f}")
    for q in json.loads(meta["queries"]):
        print(f"{q['name']:9} s_q {float(tensors[q['name'] + '.s_q']):.4f}  sigma {int(tensors[q['name'] + '.sigma']):+d}  gap {gaps[q['name']]:.3f}  "
              f"{q['default']!r} -> {q['scans']!r}")


if __name__ == "__main__":
    main()
