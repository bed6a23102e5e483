"""The mistakes that ports make, planted one by one in the port in numpy: what compare.py's hints are made of.

Each is an edit of port_numpy.py's text, of the ids, or of an input. make.py runs them all. It keeps samples
of what they give in hints.safetensors, by which compare.py tells one from another, and writes the table
hints.md. The tests run them again, and variants that hints.safetensors does not know.

Left out: mistakes of speed alone, and of what a language or a library does for all programs alike.
"""
import json
import re
import types
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from data.golden import port_numpy
from data.golden.compare import ANCHORS, DECISION, FORWARD, GOLDEN, Comparison, difference, read, sample

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tiny"


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    The tensor that differs first (without its query), the beginning of its cause, and the edits.
    """
    first: str
    cause: str
    edits: tuple = ()           # (old, new) texts in port_numpy.py, each old one there once
    kept: bool = True           # in hints.safetensors? Others are variants, that the tests alone plant
    shape: str = ""             # the model of shapes/ in which it shows; "" for the embedded model


def edit(first, cause, *texts, kept=True):
    return Mistake(first, cause, tuple(zip(texts[::2], texts[1::2])), kept)


def variant(*words):
    return edit(*words, kept=False)


# ----------------------------------------------------------------------------------------------------
# The forward pass

EMBED = 'weights["model.embed_tokens.weight"][ids]'
NORM = "return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight"
Q, K, V = (f't[b + "{x}"] = {x} = heads(h, "self_attn.{x}_proj")' for x in "qkv")
HEADS = '.reshape(len(ids), -1, config["E"])'
BACK = "(lambda h, n: (h @ w(n))" + HEADS + ")("                # in place of heads(
PERMUTE = '.reshape(len(ids), -1, 2, config["E"] // 2).swapaxes(2, 3)' + HEADS
TURN = ("return np.concatenate((a * np.cos(angle) - b * np.sin(angle), "
        "b * np.cos(angle) + a * np.sin(angle)), -1)")
HALVES = "a, b = x[..., :E // 2], x[..., E // 2:]"
ANGLE = "angle = position *"
POWER = 'config["theta"] ** (-np.arange(0, E, 2) / E)'
SCALE = "/ np.float32(np.sqrt(E))"
MASK = "(back < 0) | "
OUT = 'w("self_attn.o_proj").T'
JOIN = 'v).reshape(N, H * E)'
MLP_NORM = 't[b + "mlp_norm"] = h = rms_norm(x, w("post_attention_layernorm"), config["eps"])'
MLP = "return (g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T"
FINAL = 't["final_norm"] = rms_norm(x, weights["model.norm.weight"], config["eps"])'
HEAD = 't["final_norm"] @ weights["lm_head.weight"].T'
ATTENDED, ADDED, KEPT = "x = x + o", "x = x + m", 't[b + "x"] = x '
WEIGHTS = 'weights[f"model.layers.{l}.{name}.weight"]'
FINAL_ROWS = '"final_norm": t["final_norm"][[p, e]]'
LOGIT_ROWS = '"logits": t["logits"][[p, e]]'

FORWARD_MISTAKES = [
    edit("embed", "embedding scaled", EMBED, f'{EMBED} * np.float32(np.sqrt(config["D"]))'),
    edit("embed", "ids shifted", EMBED, EMBED.replace("[ids]", "[ids - 1]")),
    variant("embed", "ids shifted", EMBED, EMBED.replace("[ids]", "[ids + 1]")),
    edit("block0.attn_norm", "eps is not", NORM, NORM.replace("(eps)", "(eps / 10)")),
    variant("block0.attn_norm", "eps is not", NORM, NORM.replace("(eps)", "(0)")),
    edit("block0.attn_norm", "eps outside", NORM,
         "return x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(eps)) * weight"),
    edit("block0.attn_norm", "mean subtracted", NORM, f"x = x - x.mean(-1, keepdims=True); {NORM}"),
    edit("block0.attn_norm", "the weight left out", NORM, NORM.replace(" * weight", "")),
    edit("block0.attn_norm", "1 + weight", NORM, NORM.replace("* weight", "* (1 + weight)")),
    edit("block0.attn_norm", "float16: the norm",
         NORM, f"x = x.astype(np.float16); {NORM}"),
    edit("block0.q", "weight transposed", Q,
         Q.replace("heads(", BACK)),
    edit("block0.q", "heads split as", Q, Q + '.reshape(len(ids), config["E"], -1).swapaxes(1, 2)'),
    edit("block0.q", "weights permuted", Q, Q + PERMUTE),
    edit("block0.k", "weight transposed", K,
         K.replace("heads(", BACK)),
    edit("block0.k", "weights permuted", K, K + PERMUTE),
    edit("block0.v", "weight transposed", V,
         V.replace("heads(", BACK)),
    edit("block0.v", "rotary applied to v", V, V.replace("= heads", "= rotate(heads") + ", config)"),
    edit("block0.q_rot", "rotary layout", HALVES, "a, b = x[..., 0::2], x[..., 1::2]",
         TURN, TURN.replace("np.concatenate(", "np.stack(").replace("), -1)", "), -1).reshape(x.shape)")),
    edit("block0.q_rot", "sign of the sine", ANGLE, "angle = -position *"),
    edit("block0.q_rot", "positions counted from 1", ANGLE, "angle = (position + 1) *"),
    edit("block0.q_rot", "rope_theta", POWER, POWER.replace('config["theta"]', "5e5")),
    variant("block0.q_rot", "rope_theta", POWER, POWER.replace('config["theta"]', "1e6")),
    edit("block0.q_rot", "rope scaling", ANGLE, "angle = position / 4 *"),
    variant("block0.q_rot", "rope scaling", ANGLE, "angle = position / 8 *"),
    edit("block0.q_rot", "the exponent of theta is -2i/E", POWER,
         POWER.replace("0, E, 2) / E", "E // 2) / E")),
    edit("block0.q_rot", "the exponent of theta is over E", POWER,
         POWER.replace(") / E)", ') / config["D"])')),
    edit("block0.q_rot", "the queries not turned", 't[b + "q_rot"] = q = rotate(q, config)',
         't[b + "q_rot"] = q'),
    edit("block0.k_rot", "only the queries", 't[b + "k_rot"] = k = rotate(k, config)', 't[b + "k_rot"] = k'),
    edit("block0.k_rot", "keys turned after", "k = rotate(k, config)",
         "k = rotate(np.append(k[:1], k, 0), config)[1:]"),
    edit("block0.attn", "no 1/sqrt(E)", SCALE, ""),
    edit("block0.attn", "1/E instead", SCALE, "/ np.float32(E)"),
    edit("block0.attn", "no mask", MASK, ""),
    edit("block0.attn", "no mask", MASK, "(back < -1) | "),
    edit("block0.attn", "mask one short", MASK, "(back < 1) | "),
    edit("block0.attn", "the output projection's matrix", OUT, OUT.removesuffix(".T")),
    edit("block0.attn", "v rotated", "o = attention(q, k, v,", "o = attention(q, k, rotate(v, config),"),
    edit("block0.attn", "heads put back", JOIN, "v).swapaxes(1, 2).reshape(N, H * E)"),
    edit("block0.attn", "heads put back", JOIN, "v)[:, ::-1].reshape(N, H * E)"),
    edit("block0.attn", "softmax over the wrong", "scores / scores.sum(-1, keepdims=True)",
         "scores / scores.sum(1, keepdims=True)"),
    edit("block0.mlp_norm", "taken of the stream before", MLP_NORM,
         MLP_NORM.replace("rms_norm(x", "rms_norm(x - o")),
    edit("block0.mlp_norm", "the other norm's", MLP_NORM, MLP_NORM.replace("post_attention", "input")),
    edit("block0.mlp_norm", "the residual left out", ATTENDED, "x = o"),
    edit("block0.mlp_norm", "eps outside the root, or", MLP_NORM, MLP_NORM.replace('config["eps"]', "1e-3")),
    edit("block0.mlp", "silu on up", MLP,
         "g, u = h @ up.T, h @ gate.T; return (g / (1 + np.exp(-g)) * u) @ down.T"),
    edit("block0.mlp", "gelu", MLP, MLP.replace("np.exp(-g)", "np.exp(-1.702 * g)")),
    variant("block0.mlp", "gelu", MLP, MLP.replace(
        "g / (1 + np.exp(-g))", "g / 2 * (1 + np.tanh(0.797885 * (g + 0.044715 * g ** 3)))")),
    edit("block0.mlp", "sigmoid", MLP, MLP.replace("g / (1", "1 / (1")),
    edit("block0.mlp", "silu left out", MLP, "return (g * (h @ up.T)) @ down.T"),
    edit("block11.x", "the last block only", KEPT, 't[b + "x"] = x if l < config["L"] - 1 else rms_norm('
         'x, weights["model.norm.weight"], config["eps"]) '),
    edit("block0.x", "layer index shifted", ADDED, "t[b + 'x'], x = x - o, x + m", KEPT, "pass "),
    edit("block0.x", "the residual left out", ADDED, "x = m"),
    edit("block1.x", "weights of another", WEIGHTS, WEIGHTS.replace("{l}", "{l - (l == 1)}")),
    variant("block1.x", "weights of another", WEIGHTS, WEIGHTS.replace("{l}", "{l - (l in (1, 2))}")),
    edit("final_norm", "rows swapped", FINAL_ROWS, FINAL_ROWS.replace("[p, e]", "[e, p]")),
    edit("final_norm", "rows of other", FINAL_ROWS, FINAL_ROWS.replace("[p, e]", "[p - 1, e - 1]")),
    edit("final_norm", "the weight of", FINAL, FINAL.replace('weights["model.norm.weight"]', "1")),
    edit("final_norm", "taken twice", FINAL,
         FINAL.replace("rms_norm(x", 'rms_norm(rms_norm(x, weights["model.norm.weight"], 1e-5)')),
    edit("final_norm", "eps outside the root, or", FINAL, FINAL.replace('config["eps"]', "1e-2")),
    edit("logits", "final norm skipped", HEAD, HEAD.replace('t["final_norm"]', "x")),
    edit("logits", "head:", HEAD, HEAD.replace("lm_head", "model.embed_tokens")),
    edit("logits", "rows swapped", LOGIT_ROWS, LOGIT_ROWS.replace("[p, e]", "[e, p]")),
    edit("logits", "logits capped", HEAD, f"30 * np.tanh({HEAD} / 30)"),
    edit("logits", "logits capped", HEAD, f"{HEAD} / 2"),
]

# In models of another shape: what the embedded model cannot show
GROUPS = 'np.repeat(a, H // config["K"], axis=1)'
LINEAR, LLAMA3 = 'frequency / rope["factor"]', '(keep + (1 - keep) / rope["factor"])'
WINDOW = '(back >= (config["window"] or N))'
THETA = 'rope["rope_theta"] or 10000.0'
BEST = '["logits"][-1].argmax()'
STEP = "best = forward(model, np.array(ids), steer, len(instruction) - 1)" + BEST
PENALTY = ('logits = forward(model, np.array(ids), steer, len(instruction) - 1)["logits"][-1].copy(); '
           'logits[ids] *= np.where(logits[ids] > 0, 1 / {by}, {by}); best = logits.argmax()')
TWICE = ("np.array(ids if len(ids) == len(instruction) else "
         "[*ids[:len(instruction)], *ids[len(instruction) - 1:]])")


def shaped(shape, first, cause, *texts, kept=True):
    return Mistake(first, cause, tuple(zip(texts[::2], texts[1::2])), kept, shape)


SHAPE_MISTAKES = [
    shaped("grouped", "block0.attn_norm", "eps is not", NORM, NORM.replace("(eps)", "(1e-5)")),
    shaped("grouped", "block0.k", "K taken for H", K,
           f"{K.partition(' = ')[2]}; t[b + 'k'] = k.repeat(2, 1)"),
    shaped("grouped", "block0.v", "K taken for H", V,
           f"{V.partition(' = ')[2]}; t[b + 'v'] = v.repeat(2, 1)"),
    shaped("grouped", "block0.q_rot", "rope_theta", THETA, "10000.0"),
    shaped("grouped", "block0.q_rot", "rope scaling", LINEAR, "frequency"),
    shaped("grouped", "block0.attn", "grouped heads", GROUPS, 'np.tile(a, (1, H // config["K"], 1))'),
    shaped("grouped", "block0.attn", "E taken for D / H", SCALE, "/ np.float32(np.sqrt(8))"),
    shaped("llama3", "block0.q_rot", "rope scaling", LLAMA3, "1"),
    shaped("llama3", "block0.q_rot", "rope scaling", LLAMA3, '/ rope["factor"]', "frequency * /",
           "frequency /"),
    shaped("llama3", "block0.q_rot", "llama3 scaling without", LLAMA3,
           '((keep > 0) + (keep == 0) / rope["factor"])'),
    shaped("llama3", "block0.q_rot", "llama3 scaling without", LLAMA3,
           '((keep == 1) + (keep < 1) / rope["factor"])'),
    shaped("window", "block0.attn", "no window", WINDOW, "(back >= N)"),
    shaped("window", "block0.attn", "window one too wide", WINDOW, WINDOW.replace("or N", "+ 1")),
    shaped("window", "block0.attn", "window one too wide", WINDOW, WINDOW.replace("or N", "- 1")),
    shaped("window", "block0.q_rot", "rope_theta", THETA, "10000.0"),
    shaped("grouped", "default_ids", "repetition penalty", STEP, PENALTY.format(by=1.1)),
    shaped("grouped", "default_ids", "repetition penalty", STEP, PENALTY.format(by=1.3), kept=False),
    shaped("grouped", "default_ids", "a position", STEP, STEP.replace("np.array(ids)", TWICE)),
    shaped("grouped", "default_ids", "the first token comes", "greedy(model, instruction, None, given",
           'greedy(model, given[f"{query}.ids"], None, given'),
]

# ----------------------------------------------------------------------------------------------------
# The anchors

READ = "np.stack([streams(t, at) for t, at in zip(passes, positions)]) for positions in (p, e)"
PASS = "[forward(model, row[:last + 1]) for row, last in zip(ids, e)]"
STREAM = 'np.stack([value[position] for name, value in t.items() if name.endswith(".x")])'
MINUS, PLUS = 't["anchors.harmful.mean"] = minus_p.mean(0)', 't["anchors.harmless.mean"] = plus_p.mean(0)'
DIFFERENCE = 't["v"] = v = t["anchors.harmful.mean"] - t["anchors.harmless.mean"]'
UNIT = 't["v_r"] = v / np.sqrt((v * v).sum(-1, keepdims=True))'
A_T = "a_t = minus_p - minus_e"
D_HARM = 't["d_harm"] = d_harm = a_t.mean(0)'
OTHERS = "np.delete(a_t, i, 0).mean(0)"
COS_MINUS, COS_PLUS = "cosine(a_t, others)", "cosine(plus_p - plus_e, d_harm)"
SORTED, AT = "np.sort(t[\"cos_harmful\"][:, layers].mean(1))", "scores[[int(0.01 * n)]]"
LENGTHS = "np.sqrt((a_t * a_t).sum(-1, keepdims=True))"
JOINED = "cosine({a}.reshape(len({a}), -1), {b})[:, None] * np.ones(a_t.shape[1], np.float32)"

ANCHOR_MISTAKES = [
    edit("anchors.harmful.mean", "read at e", READ, READ.replace("(p, e)", "(e, e)")),
    edit("anchors.harmful.mean", "read at the last token of the query", READ,
         READ.replace("(p, e)", "(p - 4, e)")),
    edit("anchors.harmful.mean", "read at the last token of the query", READ,
         READ.replace("(p, e)", "(p - 1, e)")),
    edit("anchors.harmful.mean", "p of the first row", READ,
         READ.replace("(p, e)", "(np.minimum(p[0], e), e)")),
    edit("anchors.harmful.mean", "padding: -1", PASS, "[forward(model, np.maximum(row, 0)) for row in ids]",
         READ, READ.replace("(p, e)", "(p * 0 - 1, e)")),
    edit("anchors.harmful.mean", "padding: in a batch", PASS,
         "[{name: x[-last - 1:] for name, x in "
         "forward(model, np.append(np.maximum(row[last + 1:], 0), row[:last + 1])).items()} "
         "for row, last in zip(ids, e)]"),
    edit("anchors.harmful.mean", "post-norm", STREAM,
         f'(lambda s: np.append(s[:-1], t["final_norm"][position][None], 0))({STREAM})'),
    edit("anchors.harmful.mean", "mean taken in float16", MINUS,
         MINUS.replace(".mean(0)", ".astype(np.float16).mean(0)")),
    edit("anchors.harmless.mean", "as for the harmful", PLUS, PLUS.replace("plus_p", "plus_e")),
    variant("anchors.harmless.mean", "as for the harmful", PLUS,
            PLUS.replace(".mean(0)", ".astype(np.float16).mean(0)")),
    edit("v", "the other sign", DIFFERENCE, DIFFERENCE.replace("v = ", "v = -").replace(" - ", " + ")),
    edit("v", "scaled already", UNIT, f't["v"] = {UNIT}'),
    edit("v_r", "unscaled", UNIT, 't["v_r"] = v'),
    edit("v_r", "scaled by the length over all", UNIT, UNIT.replace(".sum(-1, keepdims=True)", ".sum()")),
    edit("anchors.harmful.a_t", "the other sign", A_T, "a_t = minus_e - minus_p"),
    edit("anchors.harmful.a_t", "e of the first row", READ,
         READ.replace("(p, e)", "(p, np.minimum(e[0], e))")),
    edit("anchors.harmful.a_t", "e off by one", READ, READ.replace("(p, e)", "(p, e - 1)")),
    edit("anchors.harmful.a_t", "r_pos run without", A_T,
         'a_t = minus_p - np.stack([streams(forward(model, row[p + 1:e + 1]), -1) for row, p, e in zip('
         '*(given[f"anchors.harmful.{part}"] for part in ("ids", "p", "e")))])'),
    edit("d_harm", "mean over all anchors", D_HARM,
         D_HARM.replace("a_t.mean", "np.append(a_t, plus_p - plus_e, 0).mean")),
    edit("d_harm", "mean of transitions scaled", D_HARM,
         D_HARM.replace("a_t.mean", f"(a_t / {LENGTHS}).mean")),
    edit("d_harm", "scaled: it is not", D_HARM,
         f"{D_HARM}; t['d_harm'] = d_harm / np.sqrt((d_harm * d_harm).sum(-1, keepdims=True))"),
    edit("cos_harmful", "d_harm of all n", COS_MINUS, "cosine(a_t, d_harm)"),
    edit("cos_harmful", "cosine in float16", COS_MINUS,
         "cosine(a_t.astype(np.float16), others.astype(np.float16)).astype(np.float32)"),
    edit("cos_harmful", "one cosine of all layers", COS_MINUS,
         JOINED.format(a="a_t", b="others.reshape(n, -1)")),
    edit("cos_harmful", "mean of the others", OTHERS, f"np.delete(a_t / {LENGTHS}, i, 0).mean(0)"),
    edit("cos_harmless", "d_harm is that", COS_PLUS, "cosine(plus_p - plus_e, (plus_p - plus_e).mean(0))"),
    edit("cos_harmless", "one cosine of all layers", COS_PLUS,
         JOINED.format(a="(plus_p - plus_e)", b="d_harm.ravel()")),
    edit("cos_harmless", "e or p of other rows", COS_PLUS, "cosine(plus_p - np.roll(plus_e, 1, 0), d_harm)"),
    edit("T", "the index is", AT, "scores[[1]]"),
    variant("T", "the index is", AT, "scores[[int(0.02 * n)]]"),
    edit("T", "sorted downwards", AT, "scores[[-1]]"),
    edit("T", "an interpolated", AT, "np.quantile(scores, [0.01]).astype(np.float32)"),
    edit("T", "layers other", SORTED, SORTED.replace("[:, layers]", "")),
    edit("T", "layers other", SORTED, SORTED.replace("layers]", "layers[:-1]]")),
]

# ----------------------------------------------------------------------------------------------------
# Decision, steering, answers

TRANSITION = "a_t = streams(passed, p) - streams(passed, e)"
COS = 'cosine(a_t, found["d_harm"])'
SCORE = 'cos[given["classify_layers"]].mean(keepdims=True)'
SIGMA = "np.where(s_q < found[\"T\"], -1, 1)"
STEER = 'steer[chosen] = sigma * given["alpha"] * found["v_r"][chosen]'
CHOSEN = 'chosen = given["steer_layers"]'
ADD = "x = x + steer[l] * (np.arange(len(ids)) >= p)[:, None]"
ADDED_HERE = "(0 if steer is None else steer[l] * (np.arange(len(ids)) >= p)[:, None])"
STEERED = "steered = forward(model, instruction, steer, p)"
STEERED_X = 't["steered_x"] = streams(steered, p)'
LOGITS = 't["steered_logits"] = steered["logits"][p]'
FIRST = 'first = t["steered_logits"].argmax()'
NEXT = "forward(model, np.append(instruction, first), steer, p)"
DEFAULT = "greedy(model, instruction, None, limit)"
SCANS = "greedy(model, instruction, steer, limit)\n    return t"

DECISION_MISTAKES = [
    edit("a_t", "the other sign", TRANSITION, "a_t = streams(passed, e) - streams(passed, p)"),
    edit("a_t", "p off by one", TRANSITION, TRANSITION.replace("passed, p)", "passed, p - 1)")),
    edit("a_t", "computed with steering", TRANSITION,
         'still = np.zeros_like(found["v_r"]); chosen = given["steer_layers"]; '
         'still[chosen] = -given["alpha"] * found["v_r"][chosen]; '
         'passed = forward(model, given[f"{query}.ids"], still, 0); ' + TRANSITION),
    edit("cos", "one cosine of all", COS,
         "cosine(a_t.ravel(), found['d_harm'].ravel()) * np.ones(len(a_t), np.float32)"),
    edit("cos", "cosine with v_r", COS, COS.replace("d_harm", "v_r")),
    edit("cos", "dot product", COS, "(a_t * found['d_harm']).sum(-1)"),
    edit("s_q", "the last layer", SCORE, SCORE.replace('"]]', '"][:-1]]')),
    edit("s_q", "mean over all layers", SCORE, "cos.mean(keepdims=True)"),
    edit("s_q", "layers counted from 1", SCORE, SCORE.replace('"]]', '"] - 1]')),
    edit("s_q", "mean over the steering", SCORE, SCORE.replace("classify", "steer")),
    edit("sigma", "the other sign", SIGMA, SIGMA.replace("-1, 1", "1, -1")),
    edit("sigma", "0/1", SIGMA, SIGMA.replace("-1, 1", "0, 1")),
    edit("steer", "layers off by one", CHOSEN, f"{CHOSEN} - 1"),
    variant("steer", "layers off by one", CHOSEN, f"{CHOSEN} + 1"),
    edit("steer", "unscaled v_r", STEER, STEER.replace('found["v_r"]', 'found["v"]')),
    edit("steer", "sigma forgotten", STEER, STEER.replace("sigma * ", "")),
    edit("steer", "alpha forgotten", STEER, STEER.replace('given["alpha"] * ', "")),
    edit("steer", "every layer steered", CHOSEN, 'chosen = np.arange(len(found["v_r"]))'),
    variant("steer", "every layer steered", CHOSEN, 'chosen = np.arange(1, len(found["v_r"]))'),
    edit("steer", "the last layer of the range", CHOSEN, f"{CHOSEN}[:-1]"),
    edit("steered_x", "started at p + 1", ADD, ADD.replace(">= p", "> p")),
    edit("steered_x", "p not run again", STEERED_X, 't["steered_x"] = streams(passed, p)'),
    edit("steered_x", "read before", STEERED_X, f"{STEERED_X} - steer"),
    edit("steered_x", "steering before p", ADD, ADD.replace(">= p", ">= 0")),
    variant("steered_x", "steering before p", ADD, ADD.replace(">= p", ">= p - 3")),
    edit("steered_x", "added before the block",
         'b = f"block{l}."', f'b = f"block{{l}}."; x = x + {ADDED_HERE}', ADD, "pass"),
    edit("steered_x", "added between", ATTENDED, f"x = x + o + {ADDED_HERE}", ADD, "pass"),
    edit("steered_x", "steered only the first", STEERED,
         "one = 0 * steer; one[chosen[0]] = steer[chosen[0]]; " + STEERED.replace("steer,", "one,")),
    edit("steered_x", "every layer steered", STEERED,
         STEERED.replace("steer,", 'sigma * given["alpha"] * found["v_r"],')),
    edit("steered_x", "alpha or sigma", STEERED, STEERED.replace("steer,", 'steer / given["alpha"],')),
    edit("steered_x", "alpha or sigma", STEERED, STEERED.replace("steer,", "-steer,")),
    edit("steered_x", "p run again at another", STEERED,
         "steered = forward(model, np.append(instruction, instruction[-1:]), steer, p + 1)",
         STEERED_X, STEERED_X.replace(", p)", ", p + 1)")),
    edit("steered_x", "r_pos still", STEERED,
         'steered = forward(model, np.append(given[f"{query}.ids"], instruction[-1]), steer, e + 1)',
         STEERED_X, STEERED_X.replace(", p)", ", -1)")),
    edit("steered_logits", "taken from", LOGITS, LOGITS.replace("steered[", "passed[")),
    edit("steered_logits", "final norm skipped", LOGITS,
         't["steered_logits"] = streams(steered, p)[-1] @ model[1]["lm_head.weight"].T'),
    edit("steered_x_next", "steered at p only", ADD, ADD.replace(">= p", "== p")),
    edit("steered_x_next", "the first id taken", FIRST, 'first = passed["logits"][p].argmax()'),
    variant("steered_x_next", "the first id taken", FIRST, 'first = passed["logits"][e].argmax()'),
    edit("steered_x_next", "the keys and values of p left unsteered", NEXT,
         "forward(model, np.append(instruction, first), steer, p + 1)"),
    edit("steered_x_next", "the keys and values of p left out", NEXT,
         "forward(model, np.append(instruction[:-1], [first, first]), steer, p)"),
    edit("steered_x_next", "the id run at another", f"{NEXT}, p + 1",
         f"{NEXT}, p + 2".replace("first", "[first, first]")),
    edit("default_ids", "the first token comes", DEFAULT,
         'greedy(model, np.append(instruction, given[f"{query}.ids"][p + 1:]), None, limit)'),
    edit("default_ids", "the end token", DEFAULT, f"np.append({DEFAULT}, 2)"),
    edit("default_ids", "steering left on", DEFAULT, DEFAULT.replace("None", "steer")),
    edit("scans_ids", "decoded without", SCANS,
         "np.append(first, greedy(model, np.append(instruction, first), None, limit - 1)).astype(np.int32)\n"
         "    return t"),
    edit("scans_ids", "the end token", SCANS,
         SCANS.replace("greedy", "np.append(greedy").replace("\n", ", 2)\n")),
]

# ----------------------------------------------------------------------------------------------------
# Text and positions: the ids of a query q as other hands make them


@cache
def pieces():
    return SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def encode(text, bos=(1,)):
    return [*bos, *pieces().encode(text)]


def whole(q):
    return f"[INST] {q.strip()} [/INST] Sure"


def control(text):
    """Ids of a text in which </s> is parsed as the control id."""
    first, *rest = text.split("</s>")
    return encode(first) + [id for part in rest for id in encode(part, (2,))]


def unknown(text):
    """Ids of a text in which what is no piece becomes the unknown id."""
    return [0 if "<0x" in pieces().id_to_piece(id) else id for id in encode(text)]


def bare(text):
    """Ids of a text without the space piece in front."""
    return [1, *encode("\n" + text)[len(encode("\n")):]]


TEXT_MISTAKES = {
    "BOS twice": lambda q: encode(whole(q), (1, 1)),
    "no BOS": lambda q: encode(whole(q), ()),
    "the query not stripped": lambda q: encode(f"[INST] {q} [/INST] Sure"),
    "two halves": lambda q: encode(whole(q).removesuffix(" Sure")) + encode(" Sure", ()),
    "the space before [/INST]": lambda q: encode(whole(q).replace(" [/INST] Sure", "[/INST] Sure")),
    "the space before Sure": lambda q: encode(whole(q).replace(" Sure", "Sure")),
    "`▁` missing": lambda q: bare(whole(q)),
    "control strings": lambda q: control(whole(q)),
    "a character that is no piece": lambda q: unknown(whole(q)),
    "the text normalized": lambda q: encode(unicodedata.normalize("NFD", whole(q))),
}
INPUT_MISTAKES = [
    ("p", "off by one", lambda p: p + 1),
    ("p", "searched for", lambda p: p * 0 - 1),
    ("p", "counted without BOS", lambda p: p - 1),
    ("e", "off by one", lambda e: e + 1),
]
VALUES = [Mistake("ids", cause, make) for cause, make in TEXT_MISTAKES.items()]
VALUES += [Mistake(*row) for row in INPUT_MISTAKES]
MISTAKES = [*VALUES, *FORWARD_MISTAKES, *SHAPE_MISTAKES, *ANCHOR_MISTAKES, *DECISION_MISTAKES]

# ----------------------------------------------------------------------------------------------------
# Planting


class Field:
    """The golden files, the models, and what it takes to plant a mistake and to see what it gives."""

    def __init__(self, folder=HERE):
        self.folder = folder
        self.golden, self.meta, _ = read(folder / GOLDEN.name)
        self.shapes, self.shapes_meta, _ = read(folder / "shapes.safetensors")
        self.queries = {query["name"]: query["query"] for query in json.loads(self.meta["queries"])}
        self.model, self.passes, self.outcomes = port_numpy.load(MODEL), {}, {}
        self.source = Path(port_numpy.__file__).read_text(encoding="utf-8")

    def planted(self, mistake):
        """port_numpy as a module with other texts in it.

        Its forward pass remembers, where it is the true one.
        """
        source = self.source
        for old, new in mistake.edits:
            if source.count(old) != 1:
                raise ValueError(f"{source.count(old)} times in port_numpy.py, need once: {old}")
            source = source.replace(old, new)
        module = types.ModuleType("planted")
        module.__file__ = port_numpy.__file__
        exec(compile(source, "planted", "exec"), vars(module))
        forward = slice(self.source.index("# 3."), self.source.index("# 4."))
        if self.source[forward] in source and not mistake.shape:
            module.forward = self.remember
        return module

    def remember(self, model, ids, steer=None, p=0):
        """port_numpy's own pass, run once for the same arguments.

        Of it the streams, final norm and logits.
        """
        key = (bytes(np.asarray(ids, np.int32)), None if steer is None else bytes(steer), int(p))
        if key not in self.passes:
            t = port_numpy.forward(model, ids, steer, p)
            self.passes[key] = {name: t[name] for name in t if name.endswith(".x") or "." not in name}
        return self.passes[key]

    def outcome(self, mistake):
        """{name: tensor} that a port with this mistake gives: as much of the golden file as shows it."""
        if id(mistake) not in self.outcomes:
            self.outcomes[id(mistake)] = self.run(mistake)
        return self.outcomes[id(mistake)]

    def run(self, mistake):
        golden = self.golden
        if mistake.first == "ids":
            return {f"{query}.ids": np.array(mistake.edits(text)) for query, text in self.queries.items()}
        if mistake in VALUES:
            return {f"plain.{mistake.first}": mistake.edits(golden[f"plain.{mistake.first}"])}
        module = self.planted(mistake)
        if mistake.shape:
            golden = {name: x for name, x in self.shapes.items() if name.startswith(mistake.shape)}
            golden["max_new_tokens"] = self.shapes["max_new_tokens"]
            found = module.port(self.folder / "shapes" / mistake.shape, golden)
            return {name: x for name, x in found.items() if name.startswith(mistake.shape)}
        if mistake in FORWARD_MISTAKES:
            t = module.forward(self.model, golden["plain.ids"])
            t = module.shown(t, golden["plain.p"][0], golden["plain.e"][0])
            return {f"plain.{name}": x for name, x in t.items() if f"plain.{name}" in golden}
        if mistake in ANCHOR_MISTAKES:
            return module.extract(self.model, golden, golden["classify_layers"])
        found, answers = {}, mistake.first.endswith("_ids")
        given = golden if answers else {**golden, "max_new_tokens": [0]}
        for query in self.queries:                              # until one shows it
            passed = self.remember(self.model, golden[f"{query}.ids"])
            t = module.decide_and_answer(self.model, given, golden, query, passed)
            t = {name: x for name, x in t.items() if answers or not name.endswith("_ids")}
            found.update({f"{query}.{name}": x for name, x in t.items()})
            if any(self.differs(f"{query}.{name}", x) for name, x in t.items()):
                break
        return found

    def differs(self, name, array):
        b = {**self.shapes, **self.golden}[name]
        return array.shape != b.shape or difference(array, b, 0 if b.dtype.kind == "i" else 1e-4) is not None

    def judge(self, mistake, hints=({}, {"causes": "[]"})):
        """(name, causes) of the first tensor that compare.py finds wrong; (None, []) if it finds none."""
        golden, meta = (self.shapes, self.shapes_meta) if mistake.shape else (self.golden, self.meta)
        both = Comparison(golden, meta, self.outcome(mistake), {}, hints)
        return next(((name, both.causes(name, entry)) for name, entry, _ in both.wrong), (None, []))


def cause_of(mistake):
    """The cause in compare.py's table that a mistake is to be told by.

    Raises ValueError unless there is one.
    """
    kind = re.sub(r"(?<=block)\d+", "{l}", mistake.first)
    entry, = (entry for entry in (*FORWARD, *ANCHORS, *DECISION) if entry.name == kind)
    cause = [cause for cause in entry.causes if cause.startswith(mistake.cause)]
    if len(cause) != 1:
        raise ValueError(f"{mistake.first}: {len(cause)} causes begin with {mistake.cause!r}")
    return cause[0]


def hints(field):
    """(tensors, metadata) of hints.safetensors.

    Of every kept mistake what it changes, integers whole, floats as samples.
    """
    tensors, causes = {}, []
    for mistake in MISTAKES:
        if mistake.kept:
            for name, x in field.outcome(mistake).items():
                if (name in field.golden or name in field.shapes) and field.differs(name, x):
                    whole = np.asarray(x).dtype.kind == "i"
                    tensors[f"{len(causes)}/{name}"] = np.asarray(x, np.int32) if whole else sample(x)
            causes.append(cause_of(mistake))
    return tensors, {"causes": json.dumps(causes)}


def table(field, hints):
    """(the text of hints.md, ranks).

    Of every mistake where it shows, and at which place its cause is named.
    """
    ranks, rows = [], []
    for mistake in MISTAKES:
        cause = cause_of(mistake)
        (name, causes), (_, plain) = field.judge(mistake, hints), field.judge(mistake)
        ranks.append(causes.index(cause) + 1 if cause in causes else 99)
        words = cause if mistake.kept else f"{cause} (another variant)"
        rows.append(f"| {words} | `{name}` | {ranks[-1]} | {plain.index(cause) + 1} |")
    good = sum(rank <= 2 for rank in ranks)
    head = HEAD.format(number=len(ranks), caught=sum("`None`" not in row for row in rows), good=good)
    return head + "\n".join(rows) + "\n", ranks


HEAD = """# Planted mistakes

Made by `python -m data.golden.make`: every mistake of mistakes.py, planted in port_numpy.py, and what
compare.py says.

{caught} of {number} are caught. The true cause is the first or the second named in {good} of them.
The last column is its place in the fixed list of compare.py, without hints.safetensors.
A variant is planted by the tests alone: hints.safetensors knows another form of the same mistake.

| planted | first tensor that differs | place of the true cause | in the fixed list |
|---|---|---|---|
"""
