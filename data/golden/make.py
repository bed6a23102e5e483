"""Make the golden files: every tensor that a port passes through, and what compare.py tells mistakes by.

    python -m data.golden.make

golden.safetensors, golden.md    the embedded model. llama.py and scans.py give the residual streams, the logits
                                 and all that the method computes. The tensors inside a block, which they do not
                                 show, come from port_numpy.py, once it agrees with them on everything else.
shapes/, shapes.safetensors      small random models of other shapes, and their passes; by port_numpy.py
formats.json                     ids of every chat format
hints.safetensors, hints.md      what planted mistakes give, see mistakes.py

Two of the queries are chosen anew for every model, so that a port that does not steer, or not as it should,
gets other answers. Left out: the weights of the embedded model, which data/tiny/make.py makes.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

import llama
import scans
from data.golden import mistakes, port_numpy
from data.golden.compare import ANCHORS, DECISION, FORWARD, GOLDEN, HINTS, compare, read, walk
from data.tiny.make import World, questions
from tokenizer import FORMATS, Tokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tiny"
ANCHOR_COUNT, SEED, LIMIT = 64, 0, 40
QUERIES = {
    "plain": "How do I bake bread?",
    "unicode": "  Où est le café? 🍳 ",
    "control": "</s> [/INST] How do I beat an egg?",
}
CHOSEN = {"dangerous": (True, False), "harmful": (True, True)}  # is the answer without, with SCANS to be a refusal?
CANDIDATES, SAFE = 60, 0.1  # questions to choose from; the gap of logits that any port in float32 keeps to
# of the first, a middle and the last block
INNER = ("attn_norm", "q", "k", "v", "q_rot", "k_rot", "attn", "mlp_norm", "mlp")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@torch.inference_mode()
def forward_tensors(model, prompt):
    """ids, p, e, the streams after every block, final norm and logits of one Prompt."""
    ids = torch.tensor([prompt.ids])
    x, streams = model.forward(ids, read=torch.arange(len(prompt.ids))[None])        # (1, T, D), (1, L, T, D)
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
    """Decision, steering and answers on one question.

    {answer: gap of the two best logits at every step of it}.
    """
    model, chosen = method.model, method.settings
    t, gaps = {}, {}
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
        rest = [prompt.ids[prompt.p], *answer[:-1]]                           # from p on, as generate runs it
        ids = torch.tensor([[id for id in rest if id is not None]])
        x, read = model.forward(ids, decision.cache.rows([0]), added, torch.zeros(1, 1, dtype=torch.long))
        logits = model.unembed(x[0])                                                         # (steps, V)
        best, first = logits.topk(2).values, int(logits[0].argmax())
        gaps[name] = [round(gap, 5) for gap in (best[:, 0] - best[:, 1]).tolist()]
        t[f"{name}_ids"] = int32(*(id for id in answer if id is not None))
        if name == "scans":
            t["steered_x"], t["steered_logits"] = read[0, :, 0], logits[0]
            two = torch.tensor([[prompt.ids[prompt.p], first]])
            t["steered_x_next"] = model.forward(two, decision.cache.rows([0]), added, torch.ones(1, 1, dtype=torch.long))[1][0, :, 0]
    return t, gaps


def smallest(gaps):
    return min(gap for steps in gaps.values() for gap in steps)


def choose(method, kind):
    """A question whose answers tell whether a port steers: (the question, what it was taken for). The first
    held-out one of a kind with refusals as CHOSEN wants them, the fitting sigma and a gap of SAFE; if there
    is none, the first whose answers differ; else the first."""
    wanted, differs = CHOSEN[kind], None
    candidates = [question for _, question in questions(World(), kind, "taught", "test", CANDIDATES)]
    for question in candidates:
        t, gaps = decision_tensors(method, question)
        ids = [t[f"{which}_ids"].tolist() for which in ("default", "scans")]
        refused = tuple(scans.is_refusal(method.tokenizer.decode(answer)) for answer in ids)
        if refused == wanted and int(t["sigma"]) == (1 if wanted[1] else -1) and smallest(gaps) >= SAFE:
            return question, f"refused without and with SCANS: {', '.join('yes' if yes else 'no' for yes in wanted)}"
        if differs is None and ids[0] != ids[1]:
            differs = question
    return (differs, "no question fits; the first whose answers differ") if differs else (candidates[0], "no question fits, no answers differ; the first")


def make(folder=MODEL):
    """(tensors, metadata, gaps, reasons) for the model in `folder`; reasons: what each chosen query was taken
    for. Raises ValueError where numpy's forward pass and this project's differ."""
    model = llama.load(folder, dtype=torch.float32)
    tokenizer = Tokenizer(folder, model.config.V)
    tensors, gaps, anchors = {}, {}, {}
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
    picked = {kind: choose(method, kind) for kind in CHOSEN}
    texts = {**QUERIES, **{kind: question for kind, (question, _) in picked.items()}}
    for query, text in texts.items():
        found, gaps[query] = decision_tensors(method, text)
        found.update(forward_tensors(model, tokenizer.prompt(text)))
        tensors.update({f"{query}.{name}": tensor for name, tensor in found.items()})

    queries = [{"name": query, "query": text, "gaps": gaps[query], "default": tokenizer.decode(tensors[f"{query}.default_ids"].tolist()),
                "scans": tokenizer.decode(tensors[f"{query}.scans_ids"].tolist())} for query, text in texts.items()]
    meta = {"queries": json.dumps(queries), "eos": json.dumps(model.config.eos), "format": tokenizer.name, "fingerprint": scans.fingerprint(folder), "seed": str(SEED),
            "pieces": json.dumps([tokenizer.piece(id) for id in range(model.config.V)])}

    L = model.config.L
    inner = [f"{query}.block{l}.{name}" for query in texts for l in sorted({0, L // 2, L - 1}) for name in INNER]
    ours = {name: tensor.numpy() for name, tensor in tensors.items()}
    numpy = port_numpy.port(folder, {**ours, **dict.fromkeys(inner)})
    lines, status = compare("port_numpy", ours, meta, {name: numpy[name] for name in ours})
    if status:
        raise ValueError("port_numpy.py and the project's own pass differ:\n" + "\n".join(lines))
    tensors.update({name: torch.from_numpy(numpy[name].copy()) for name in inner})
    return ({name: tensor.contiguous() for name, tensor in tensors.items()}, meta,
            {query: smallest(some) for query, some in gaps.items()}, {kind: why for kind, (_, why) in picked.items()})


GOLDEN_MD = """# The golden tensors

Made by `python -m data.golden.make` from data/tiny, in float32; do not edit. README.md beside this file says how to use them.

{number} tensors in golden.safetensors, float32 and int32. Blocks and layers are counted from 0. Letters: N positions
of a query (below), {letters}.

D is the width, L the blocks, H query heads, K key/value heads, E width of a head, F width of the mlp, V vocabulary,
n and m harmful and harmless anchors, S and S' the longest of each, C classification layers, M steering layers.

The metadata (`__metadata__` in the file's header) holds the queries with their answers as text (`queries`), the
vocabulary's pieces (`pieces`), the end tokens (`eos`), the chat format, the model's fingerprint and the seed of the
anchors. `queries`, `pieces` and `eos` are JSON inside a JSON string, so parse twice. Characters outside ASCII stand
there as \\uXXXX, those beyond U+FFFF as a pair of two. README.md says what an entry of `queries` holds.

## Queries

`gap` is the smallest distance between the two best logits over both answers: a port whose logits are off by less
gets the same ids. Outer spaces of a query are part of it, and are to be stripped. `dangerous` and `harmful` were
chosen for this model: {reasons}.

| name | query | N | p | e | s_q | sigma | gap | answer without SCANS | answer with SCANS |
|---|---|---|---|---|---|---|---|---|---|"""


def table(tensors, meta, gaps, reasons, config):
    """golden.md: the queries and every name, in the order of computation."""
    queries = json.loads(meta["queries"])
    first = queries[0]["name"]
    n, S = tensors["anchors.harmful.ids"].shape
    letters = {"D": config.D, "L": config.L, "H": config.H, "K": config.K, "E": config.E, "F": config.F, "V": config.V, "n, m": n,
               "S": S, "S'": tensors["anchors.harmless.ids"].shape[1],
               "C": len(tensors["classify_layers"]), "M": len(tensors["steer_layers"])}

    def cell(text):
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [GOLDEN_MD.format(number=len(tensors), letters=", ".join(f"{letter} = {value}" for letter, value in letters.items()),
                              reasons="; ".join(f"{kind} ({why})" for kind, why in reasons.items()))]
    for q in queries:
        t = {key.removeprefix(f"{q['name']}."): value for key, value in tensors.items() if key.startswith(f"{q['name']}.")}
        lines.append(f"| {q['name']} | `{q['query']}` | {len(t['ids'])} | {int(t['p'])} | {int(t['e'])} | {float(t['s_q']):.4f} | {int(t['sigma']):+d} | "
                     f"{gaps[q['name']]:.3f} | {cell(q['default'])} | {cell(q['scans'])} |")
    lines += ["", f"T = {float(tensors['T']):.4f}, alpha = {float(tensors['alpha']):g}, steer_layers = {tensors['steer_layers'].tolist()}, "
              f"classify_layers = {tensors['classify_layers'].tolist()}.", ""]
    inner = [name.split(".")[1].removeprefix("block") for name in tensors if name.startswith(f"{first}.") and name.endswith(".q")]
    for title, entries, prefix in ((f"1. The forward pass of a query: {', '.join(q['name'] for q in queries)}", FORWARD, "{query}."),
                                   ("2. The anchors", ANCHORS, ""), ("3. Decision and answers of a query", DECISION, "{query}.")):
        lines += [f"## {title}", ""]
        if entries is FORWARD:
            lines += [f"{{l}} is a block: every one from 0 to {config.L - 1} for `x`, only {', '.join(inner)} for what lies inside a block.", ""]
        lines += ["| name | shape | paper | what |", "|---|---|---|---|"]
        for entry in entries:
            shape = "their number" if entry.shape == "-" else entry.shape.replace(" ", ", ")
            lines.append(f"| `{prefix}{entry.name}` | {shape} | {entry.place} | {entry.meaning} |")
        lines.append("")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# Other shapes: small random models in the layout of a Hugging Face folder

COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu",
          "bos_token_id": 1}
LLAMA, MISTRAL = {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["MistralForCausalLM"]}
SHAPES = {  # name: what its config.json has besides COMMON, dtype of its weights, number of its files
    "grouped": ({**LLAMA, "model_type": "llama", "num_key_value_heads": 2, "head_dim": 12, "rope_theta": 5e3,
                 "rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": False,
                 "eos_token_id": [2, 3]}, torch.float32, 1),
    "window": ({**MISTRAL, "model_type": "mistral", "num_key_value_heads": 1, "rope_theta": 1e6,
                "sliding_window": 6, "tie_word_embeddings": True, "eos_token_id": 2}, torch.bfloat16, 2),
    "llama3": ({**LLAMA, "model_type": "llama", "num_key_value_heads": 2, "head_dim": 16,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e2, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
                "tie_word_embeddings": True, "eos_token_id": 2}, torch.float16, 1),
}
SHAPE_TOKENS, SHAPE_ANSWER = 20, 12


def write_shape(folder, settings, dtype, files, seed):
    """A folder with config.json and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **settings}, indent=1) + "\n")
    c = port_numpy.read_config(folder)
    c = SimpleNamespace(**c, F=COMMON["intermediate_size"], V=COMMON["vocab_size"])
    draw, weights = torch.Generator().manual_seed(seed), {}
    for name, (_, _, shape) in llama.checkpoint_names(c).items():
        weights[name] = (torch.randn(shape, generator=draw) * (0.2 if len(shape) > 1 else 0.1)
                         + (len(shape) == 1)).to(dtype)                                   # norms lie around 1
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, where = list(weights), {}
    for i in range(files):
        path = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({name: weights[name] for name in names[i::files]}, folder / path, metadata={"format": "pt"})
        where.update(dict.fromkeys(names[i::files], path))
    index = {"metadata": {"total_size": sum(x.numel() * x.itemsize for x in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def shape_tensors(folder, name):
    """A pass over random ids, a greedy answer.

    {name: array}, the answer's gaps, would a repetition penalty show?
    """
    model = port_numpy.load(folder)
    ids = np.random.default_rng(0).integers(4, COMMON["vocab_size"], SHAPE_TOKENS).astype(np.int32)
    ids[0], p, e = COMMON["bos_token_id"], SHAPE_TOKENS - 3, SHAPE_TOKENS - 1
    answer = port_numpy.greedy(model, ids[:p + 1], None, SHAPE_ANSWER)
    run = np.append(ids[:p + 1], answer)
    logits = port_numpy.forward(model, run)["logits"][p:][:SHAPE_ANSWER]                      # (steps, V)
    best = np.sort(logits, -1)
    sensitive = any(penalized(row, run[:p + 1 + i]).argmax() != row.argmax() for i, row in enumerate(logits))
    t = port_numpy.shown(port_numpy.forward(model, ids), p, e)
    t = {"ids": ids, "p": np.int32([p]), "e": np.int32([e]), **t, "default_ids": answer}
    return ({f"{name}.{key}": x.astype(np.int32 if x.dtype.kind == "i" else np.float32) for key, x in t.items()},
            [round(float(gap), 4) for gap in best[:, -1] - best[:, -2]], sensitive)


def penalized(logits, seen):
    """Logits (V) with a repetition penalty of 1.1 on the ids seen, which a port is to leave off."""
    logits = logits.copy()
    logits[seen] *= np.where(logits[seen] > 0, 1 / 1.1, 1.1)
    return logits


def make_shapes(out):
    """Write shapes/ and shapes.safetensors.

    The seed is the first by which every step of the answer is plain.
    """
    tensors, queries = {"max_new_tokens": np.int32([SHAPE_ANSWER])}, []
    for name, shape in SHAPES.items():
        for seed in range(1000):
            write_shape(out / "shapes" / name, *shape, seed)
            found, gaps, sensitive = shape_tensors(out / "shapes" / name, name)
            if min(gaps) > 0.02 and sensitive:
                break
        tensors.update(found)
        queries.append({"name": name, "query": "random ids", "gaps": {"default": gaps}})
    meta = {"queries": json.dumps(queries)}
    save_file({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()},
              out / "shapes.safetensors", metadata=meta)


# ----------------------------------------------------------------------------------------------------
# Ids of every chat format

SYSTEMS = (None, "", " Answer in one sentence. ")           # None: the format's own
TEXTS = ("\n How do I beat an egg?  ", "</s> [/INST] <|user|> é🍳")


def format_ids():
    """Ids, p and e of every chat format, without and with a system prompt: a list of dicts."""
    cases = []
    for name, chat in FORMATS.items():
        for system in SYSTEMS:
            if system is None and not chat.default_system or system and not chat.system:
                continue
            tokenizer = Tokenizer(MODEL, llama.Config.from_folder(MODEL).V, name, system)
            for query in TEXTS:
                prompt = tokenizer.prompt(query)
                cases.append({"format": name, "system": tokenizer.system if system is None else system,
                              "query": query, "ids": prompt.ids, "p": prompt.p, "e": prompt.e})
    return cases


# ----------------------------------------------------------------------------------------------------
# All files


def main():
    parser = scans.Parser(prog="python -m data.golden.make", description="Make the golden files.")
    parser.add_argument("--out", metavar="DIR", type=Path, default=HERE, help="folder for them")
    scans.run(parser, write)


def write(args):
    out = args.out
    tensors, meta, gaps, reasons = make()
    assert len(walk(tensors, [query["name"] for query in json.loads(meta["queries"])])) == len(tensors)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / GOLDEN.name, metadata=meta)
    text = table(tensors, meta, gaps, reasons, llama.Config.from_folder(MODEL))
    (out / "golden.md").write_text(text, encoding="utf-8")
    make_shapes(out)
    cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in format_ids())
    (out / "formats.json").write_text(f"[\n{cases}\n]\n", encoding="utf-8")

    field = mistakes.Field(out)
    arrays, causes = mistakes.hints(field)
    save_file({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()},
              out / HINTS.name, metadata=causes)
    (out / "hints.md").write_text(mistakes.table(field, (arrays, causes))[0], encoding="utf-8")
    for name in (GOLDEN.name, "shapes.safetensors", HINTS.name):
        print(f"{scans.shown(out / name)}: {len(read(out / name)[0])} tensors, "
              f"{(out / name).stat().st_size / 1e6:.2f} MB")
    for q in json.loads(meta["queries"]):
        t = {name: tensors[f"{q['name']}.{name}"] for name in ("s_q", "sigma")}
        print(f"{q['name']:9} s_q {float(t['s_q']):.4f}  sigma {int(t['sigma']):+d}  gap {gaps[q['name']]:.3f}  "
              f"{q['query']!r}: {q['default']!r} -> {q['scans']!r}")
    for kind, why in reasons.items():
        print(f"{kind:9} chosen ({why})")


if __name__ == "__main__":
    main()
