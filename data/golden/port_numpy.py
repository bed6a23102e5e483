"""SCANS in numpy: a worked port, from the weights in a folder to both answers, by the specification alone.

It uses numpy, and of this project only the reader of safetensors, so it is the tests' independent oracle too.
It prefers the shortest true statement: no batch, no cache, every pass runs the whole sequence. README.md
says what a cache changes. Every tensor is kept under its name in golden.safetensors. Equation numbers are the
paper's (arXiv 2408.11491). Left out: text. Ids come from the golden file.

    python -m data.golden.port_numpy OUT.safetensors    # then: python -m data.golden.compare OUT.safetensors

Letters of the shapes: N positions, D model width, L blocks, H query heads, K key/value heads, E width of a
head, M mlp width, V vocabulary, n and m harmful and harmless anchors.
"""
import json
import sys
from pathlib import Path

import numpy as np

from data.golden.compare import DTYPES, read_safetensors

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------
# 1. Safetensors: compare.py has the reader


def write_safetensors(path, tensors):
    """Every array as float32 or int32."""
    header, parts, offset = {}, [], 0
    for name, array in tensors.items():
        array = np.asarray(array)
        kind = "I32" if array.dtype.kind == "i" else "F32"
        parts.append(array.astype(DTYPES[kind]).tobytes())
        end = offset + len(parts[-1])
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


# ----------------------------------------------------------------------------------------------------
# 2. The model: a folder's config.json and weights


def read_config(folder):
    """What config.json says of the forward pass. An absent key has the default used here."""
    c = json.loads((Path(folder) / "config.json").read_text())
    rope = {"rope_theta": c.get("rope_theta"), **(c.get("rope_scaling") or {}),
            **(c.get("rope_parameters") or {})}
    D, H = c["hidden_size"], c["num_attention_heads"]
    return {
        "L": c["num_hidden_layers"], "D": D, "H": H, "K": c.get("num_key_value_heads") or H,
        "E": c.get("head_dim") or D // H, "eps": c["rms_norm_eps"], "eos": c.get("eos_token_id"),
        "theta": rope["rope_theta"] or 10000.0,
        "rope": rope, "scaling": rope.get("rope_type") or rope.get("type"),
        "window": c.get("sliding_window") if c["architectures"] == ["MistralForCausalLM"] else None,
        "tied": c.get("tie_word_embeddings") or False,
    }


def load(folder):
    """(config, weights) of a Hugging Face folder of Llama shape, all float32."""
    config = read_config(folder)
    weights = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        weights.update({name: array.astype(np.float32) for name, array in read_safetensors(path)[0].items()})
    if config["tied"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return config, weights


# ----------------------------------------------------------------------------------------------------
# 3. The forward pass


def rms_norm(x, weight, eps):
    """eps is added inside the root; the mean of squares is not centred."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight


def frequencies(config):
    """Angle per position of each pair of dimensions (E/2), as rope scaling leaves it."""
    E, rope = config["E"], config["rope"]
    frequency = config["theta"] ** (-np.arange(0, E, 2) / E)
    if config["scaling"] == "linear":
        return frequency / rope["factor"]
    if config["scaling"] == "llama3":   # long waves are divided, short ones kept, those between are blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (keep + (1 - keep) / rope["factor"])
    return frequency


def rotate(x, config):
    """Turn x (N, heads, E) to positions 0..N-1. Half-split: dimension i goes with i + E/2, not with i + 1."""
    E = config["E"]
    position = np.arange(len(x), dtype=np.float32)[:, None, None]           # (N, 1, 1)
    angle = position * frequencies(config).astype(np.float32)               # (N, 1, E/2)
    a, b = x[..., :E // 2], x[..., E // 2:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)


def attention(q, k, v, config):
    """Causal attention of q (N, H, E) over k, v (N, K, E): (N, H E). Head h reads key head h // (H/K)."""
    N, H, E = q.shape
    k, v = (np.repeat(a, H // config["K"], axis=1) for a in (k, v))                          # (N, H, E)
    scores = np.einsum("the,she->hts", q, k) / np.float32(np.sqrt(E))                        # (H, N, N)
    back = np.arange(N)[:, None] - np.arange(N)                            # how far key s is behind query t
    scores[:, (back < 0) | (back >= (config["window"] or N))] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,she->the", scores / scores.sum(-1, keepdims=True), v).reshape(N, H * E)


def mlp(h, gate, up, down):
    """down(silu(gate(h)) * up(h)): (N, D) -> (N, M) twice -> (N, D)."""
    g = h @ gate.T
    return (g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T


def forward(model, ids, steer=None, p=0):
    """Every tensor of one pass over ids (N), by name.

    steer (L, D) is added after block l at the positions from p on (Eq. 6).
    """
    config, weights = model
    t = {}
    t["embed"] = x = weights["model.embed_tokens.weight"][ids]                               # (N, D)
    for l in range(config["L"]):
        b = f"block{l}."

        def w(name):
            return weights[f"model.layers.{l}.{name}.weight"]                                # (out, in)

        def heads(h, name):                                                          # (N, D) -> (N, heads, E)
            return (h @ w(name).T).reshape(len(ids), -1, config["E"])
        t[b + "attn_norm"] = h = rms_norm(x, w("input_layernorm"), config["eps"])            # (N, D)
        t[b + "q"] = q = heads(h, "self_attn.q_proj")                                        # (N, H, E)
        t[b + "k"] = k = heads(h, "self_attn.k_proj")                                        # (N, K, E)
        t[b + "v"] = v = heads(h, "self_attn.v_proj")                                        # (N, K, E)
        t[b + "q_rot"] = q = rotate(q, config)
        t[b + "k_rot"] = k = rotate(k, config)
        t[b + "attn"] = o = attention(q, k, v, config) @ w("self_attn.o_proj").T             # (N, D)
        x = x + o
        t[b + "mlp_norm"] = h = rms_norm(x, w("post_attention_layernorm"), config["eps"])    # (N, D)
        t[b + "mlp"] = m = mlp(h, w("mlp.gate_proj"), w("mlp.up_proj"), w("mlp.down_proj"))     # (N, D)
        x = x + m
        if steer is not None:
            x = x + steer[l] * (np.arange(len(ids)) >= p)[:, None]                           # Eq. 6
        t[b + "x"] = x                                                    # (N, D): a^l, before any final norm
    t["final_norm"] = rms_norm(x, weights["model.norm.weight"], config["eps"])               # (N, D)
    t["logits"] = t["final_norm"] @ weights["lm_head.weight"].T                              # (N, V)
    return t


def streams(t, position):
    """a^l at one position of a pass, all layers: (L, D)."""
    return np.stack([value[position] for name, value in t.items() if name.endswith(".x")])


# ----------------------------------------------------------------------------------------------------
# 4. Extraction from the anchors


def cosine(a, b):
    """cos over the last axis."""
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def read_anchors(model, ids, p, e):
    """The streams of every anchor at p and at e: two arrays (n, L, D). ids (n, longest) is filled up with -1.

    One pass over instruction + r_pos gives both: attention is causal, position p does not see what follows.
    """
    passes = [forward(model, row[:last + 1]) for row, last in zip(ids, e)]
    return tuple(np.stack([streams(t, at) for t, at in zip(passes, positions)]) for positions in (p, e))


def extract(model, given, layers):
    """Everything that is made of the anchors, by name. given: their ids, p and e; layers: classify_layers."""
    def read(kind):
        return read_anchors(model, *(given[f"anchors.{kind}.{part}"] for part in ("ids", "p", "e")))

    t = {}
    (minus_p, minus_e), (plus_p, plus_e) = read("harmful"), read("harmless")                 # each (n, L, D)
    t["anchors.harmful.mean"] = minus_p.mean(0)                                              # (L, D)
    t["anchors.harmless.mean"] = plus_p.mean(0)                                              # (L, D)
    t["v"] = v = t["anchors.harmful.mean"] - t["anchors.harmless.mean"]                      # Eq. 1
    t["v_r"] = v / np.sqrt((v * v).sum(-1, keepdims=True))                     # unit length, as alpha expects
    t["anchors.harmful.a_t"] = a_t = minus_p - minus_e                                      # Eq. 2, (n, L, D)
    t["d_harm"] = d_harm = a_t.mean(0)                                                       # Eq. 3, (L, D)
    n = len(a_t)
    others = np.stack([np.delete(a_t, i, 0).mean(0) for i in range(n)])   # d_harm without anchor i, (n, L, D)
    t["cos_harmful"] = cosine(a_t, others)                                                   # (n, L)
    t["cos_harmless"] = cosine(plus_p - plus_e, d_harm)                                      # (m, L)
    scores = np.sort(t["cos_harmful"][:, layers].mean(1))                      # Eq. 4 of every harmful anchor
    t["T"] = scores[[int(0.01 * n)]]                                             # at most 1 in 100 is below
    return t


# ----------------------------------------------------------------------------------------------------
# 5. Decision, steering, answers


def greedy(model, instruction, steer, limit):
    """Ids of an answer: the best one each step, until an end id (left out) or the limit.

    Steered from p on.
    """
    end, ids = np.atleast_1d(model[0]["eos"]), list(instruction)
    while len(ids) - len(instruction) < limit:
        best = forward(model, np.array(ids), steer, len(instruction) - 1)["logits"][-1].argmax()
        if best in end:
            break
        ids.append(int(best))
    return np.array(ids[len(instruction):], dtype=np.int32)


def decide_and_answer(model, given, found, query, passed):
    """Decision and both answers of one query, by name.

    found: what was extracted from the anchors; passed: its pass over instruction + r_pos.
    """
    t, p, e = {}, given[f"{query}.p"][0], given[f"{query}.e"][0]
    t["a_t"] = a_t = streams(passed, p) - streams(passed, e)                                 # Eq. 2, (L, D)
    t["cos"] = cos = cosine(a_t, found["d_harm"])                                            # (L)
    t["s_q"] = s_q = cos[given["classify_layers"]].mean(keepdims=True)                       # Eq. 4
    t["sigma"] = sigma = np.where(s_q < found["T"], -1, 1)                                   # Eq. 5
    t["steer"] = steer = np.zeros_like(found["v_r"])                   # (L, D), 0 outside the steering layers
    layers = given["steer_layers"]
    steer[layers] = sigma * given["alpha"] * found["v_r"][layers]                       # Eq. 6, what is added
    instruction = given[f"{query}.ids"][:p + 1]                                              # without r_pos
    steered = forward(model, instruction, steer, p)
    t["steered_x"] = streams(steered, p)                                                     # (L, D)
    t["steered_logits"] = steered["logits"][p]                                               # (V)
    first = t["steered_logits"].argmax()                                               # the answer's first id
    t["steered_x_next"] = streams(forward(model, np.append(instruction, first), steer, p), p + 1)  # (L, D)
    limit = given["max_new_tokens"][0]
    t["default_ids"] = greedy(model, instruction, None, limit)
    t["scans_ids"] = greedy(model, instruction, steer, limit)
    return t


# ----------------------------------------------------------------------------------------------------
# 6. All of it, by the names of the golden file

# what a port is given; it computes the rest
INPUTS = ("ids", "p", "e", "alpha", "steer_layers", "classify_layers", "max_new_tokens")


def shown(t, p, e):
    """A pass as the golden file shows it: final norm and logits at p and e only."""
    return {**t, "final_norm": t["final_norm"][[p, e]], "logits": t["logits"][[p, e]]}


def port(folder, golden):
    """Every tensor of a golden file, from the inputs among its tensors and the model in `folder`."""
    model = load(folder)
    given = {name: array for name, array in golden.items() if name.split(".")[-1] in INPUTS}
    queries = [name[:-4] for name in given if name.endswith(".ids") and not name.startswith("anchors.")]
    out, passed = dict(given), {}
    for query in queries:
        passed[query] = t = forward(model, given[f"{query}.ids"])
        t = shown(t, given[f"{query}.p"][0], given[f"{query}.e"][0])
        out.update({f"{query}.{name}": value for name, value in t.items()})
        if f"{query}.default_ids" in golden:
            instruction = given[f"{query}.ids"][:given[f"{query}.p"][0] + 1]
            out[f"{query}.default_ids"] = greedy(model, instruction, None, given["max_new_tokens"][0])
    if "anchors.harmful.ids" in given:
        out.update(extract(model, given, given["classify_layers"]))
        for query in queries:
            found = decide_and_answer(model, given, out, query, passed[query])
            out.update({f"{query}.{name}": value for name, value in found.items()})
    return {name: out[name] for name in golden}


if __name__ == "__main__":
    golden = read_safetensors(HERE / "golden.safetensors")[0]
    write_safetensors(sys.argv[1], port(HERE.parent / "tiny", golden))
