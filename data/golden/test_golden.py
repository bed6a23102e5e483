"""Proof of the porting kit: the golden files, the port in numpy, the comparison, and planted mistakes.

The numpy port is the independent oracle: it shares no line with llama.py and scans.py, and must give what
they give. Of the random models in shapes/ transformers is the oracle.
"""
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import llama
from data.golden import make, models, port_numpy
from data.golden.compare import GOLDEN, Comparison, main, read_safetensors
from tokenizer import FORMATS, Tokenizer

HERE = ROOT / "data" / "golden"
SHAPES = HERE / "shapes.safetensors"
(GOLD, META, _), (SHAPED, SHAPED_META, _) = read_safetensors(GOLDEN), read_safetensors(SHAPES)
QUERIES = [query["name"] for query in json.loads(META["queries"])]


def report(theirs, kinds=()):
    """(the report as one text, exit status) beside golden.safetensors."""
    lines, status = Comparison(GOLD, META, theirs, kinds).report()
    return "\n".join(lines), status


def command(*words, cwd=ROOT):
    """A command run as a user runs it, with one thread: the matrices are small."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


# ----------------------------------------------------------------------------------------------------
# The golden files


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """The golden files, rebuilt. Building them compares numpy's pass with the project's own."""
    out = tmp_path_factory.mktemp("golden")
    done = command("-m", "data.golden.make", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_golden_file_is_up_to_date(remade):
    tensors, meta, _ = read_safetensors(remade / GOLDEN.name)
    assert tensors.keys() == GOLD.keys() and meta.keys() <= META.keys() and GOLDEN.stat().st_size < 4e6
    assert report(tensors) == (f"same: {len(GOLD)} of {len(GOLD)} tensors (F32)", 0)
    for old, new in zip(json.loads(META["queries"]), json.loads(meta["queries"]), strict=True):
        assert {**old, "gaps": 0} == {**new, "gaps": 0}
        for which, gaps in old["gaps"].items():
            np.testing.assert_allclose(gaps, new["gaps"][which], atol=1e-3)
    refused = {name: {q["name"] for q in json.loads(META["queries"]) if q[name].startswith("Sorry")}
               for name in ("default", "scans")}
    assert refused == {"default": {"dangerous", "harmful"}, "scans": {"harmful"}}
    old, new = ((folder / "golden.md").read_text(encoding="utf-8") for folder in (HERE, remade))
    assert old.partition("## 1.")[2] == new.partition("## 1.")[2] != ""     # before it are rounded numbers


def test_the_random_models_and_formats_are_up_to_date(remade):
    tensors, meta, _ = read_safetensors(remade / SHAPES.name)
    assert tensors.keys() == SHAPED.keys() and Comparison(SHAPED, SHAPED_META, tensors).report()[1] == 0
    for path in remade.rglob("*.json"):
        assert path.read_bytes() == (HERE / path.relative_to(remade)).read_bytes()


def test_every_tensor_has_the_shape_that_the_table_gives():
    config, steps = llama.read_config(make.MODEL), Comparison(GOLD, META, {}).steps
    assert len(steps) == len(GOLD)
    for name, (_, shape, *_) in steps.items():
        letters = {**vars(config), "n": 64, "m": 64, "N": len(GOLD.get(name.partition(".")[0] + ".ids", [])),
                   "A": 53, "A'": 36, "C": 8, "S": 4, "-": len(GOLD[name]) if GOLD[name].ndim else 0}
        assert GOLD[name].shape == tuple(int(letters.get(letter, letter)) for letter in shape.split()), name


@pytest.mark.parametrize("shape", models.SHAPES)
@torch.inference_mode()
def test_transformers_gives_the_passes_of_the_random_models(shape):
    t = {name.removeprefix(f"{shape}."): torch.tensor(x) for name, x in SHAPED.items()}
    model = AutoModelForCausalLM.from_pretrained(HERE / "shapes" / shape, dtype=torch.float32)
    ids, p, e = t["ids"][None].long(), int(t["p"]), int(t["e"])
    out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits[0, [p, e]], t["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.hidden_states[1][0], t["block0.x"], rtol=1e-4, atol=1e-4)
    answer = model.generate(ids[:, :p + 1], max_new_tokens=int(t["max_new_tokens"]), do_sample=False,
                            repetition_penalty=1.0, pad_token_id=0)[0, p + 1:]
    end = np.atleast_1d(model.config.eos_token_id)
    assert [id for id in answer.tolist() if id not in end] == t["default_ids"].tolist()


def test_formats_json_is_what_the_tokenizer_gives_and_models_md_writes_the_same_templates():
    page = (HERE / "models.md").read_text(encoding="utf-8").replace("\n" + " " * 17, "")
    for name, chat in FORMATS.items():
        lines = [f"    {name:13}{chat.prompt}", f'      {{system}}   "{chat.system}"' if chat.system else "",
                 f'      r_pos      "{chat.r_pos}"']
        assert "\n".join(line.replace("\n", "\\n") for line in lines if line) in page, name
    cases = json.loads((HERE / "formats.json").read_text(encoding="utf-8"))
    assert {case["format"] for case in cases} == FORMATS.keys()
    for case in cases:
        size = 2048 if case["tokenizer"] == "../tiny" else 400
        tokenizer = Tokenizer(HERE / case["tokenizer"], size, case["format"], case["system"])
        assert vars(tokenizer.prompt(case["query"])) == {key: case[key] for key in ("ids", "p", "e")}


# ----------------------------------------------------------------------------------------------------
# The port in numpy, and the comparison as a command


def test_the_port_through_the_comparison_in_a_bare_folder(tmp_path):
    done = command("-m", "data.golden.port_numpy", tmp_path / "mine.safetensors")
    assert done.returncode == 0, done.stderr
    for file in (HERE / "compare.py", GOLDEN):
        shutil.copy(file, tmp_path)
    done = command("-I", "compare.py", "mine.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"same: {len(GOLD)} of {len(GOLD)} tensors (F32)\n"), done
    wild = {"plain.s_q": torch.zeros(1), "v": torch.full((12, 128), 1e300, dtype=torch.float64)}
    save_file(wild, tmp_path / "wild.safetensors")
    done = command("-I", "compare.py", "wild.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "") and done.stdout.startswith("v differs"), done


def test_the_port_gives_the_tensors_of_the_random_models():
    for shape in models.SHAPES:
        golden = {name: x for name, x in SHAPED.items() if name.startswith((shape, "max_new_tokens"))}
        found = port_numpy.port(HERE / "shapes" / shape, golden)
        lines, status = Comparison(golden, SHAPED_META, found).report()
        assert (len(lines), status) == (1, 0), lines


# ----------------------------------------------------------------------------------------------------
# Planted mistakes: each is caught at the tensor where it is made

GIVEN, READ = "out, passed = dict(given), {}", "for positions in (p, e))"
PASSES = "forward(model, row[:last + 1]) for row, last in zip(ids, e)"
ADD, STEERED = "* (np.arange(len(ids)) >= p)[:, None]", "steered = forward(model, instruction, steer, p)"
COS, LAYERS = 'cosine(a_t, found["d_harm"])', 'layers = given["steer_layers"]'
SCANS = 't["scans_ids"] = greedy(model, instruction, steer, limit)'

# what is wrong; the tensor to be named, "unicode." left out; words of the true cause, printed or not;
# pairs of a text in port_numpy.py and the text in its place
PLANTED = [
    ("BOS twice", "ids", "BOS is there twice",
     GIVEN, f'{GIVEN}; given["unicode.ids"] = out["unicode.ids"] = np.append(1, given["unicode.ids"])'),
    ("p is a length", "p", "off by one",
     GIVEN, f'{GIVEN}; given["unicode.p"] = out["unicode.p"] = given["unicode.p"] + 1'),
    ("embedding scaled", "embed", "sqrt(D)", 'tokens.weight"][ids]', 'tokens.weight"][ids] * 128 ** 0.5'),
    ("eps of another model", "block0.attn_norm", "eps", "np.float32(eps)", "np.float32(eps / 10)"),
    ("norm in float16", "block0.attn_norm", "float16",
     "    return x / np.sqrt((", "    x = x.astype(np.float16)\n    return x / np.sqrt(("),
    ("matrices not transposed", "block0.q", "transposed", "h @ w(name).T", "h @ w(name)"),
    ("heads split as (E, H)", "block0.q", "heads split",
     '.reshape(len(ids), -1, config["E"])', '.reshape(len(ids), config["E"], -1).swapaxes(1, 2)'),
    ("keys of a GGUF file", "block0.k", "permuted", '= k = heads(h, "self_attn.k_proj")',
     '= k = heads(h, "self_attn.k_proj").reshape(len(h), 4, 2, 16).swapaxes(2, 3).reshape(len(h), 4, 32)'),
    ("v rotated", "block0.v", "rotary applied to v",
     '= v = heads(h, "self_attn.v_proj")', '= v = rotate(heads(h, "self_attn.v_proj"), config)'),
    ("rotary of neighbours", "block0.q_rot", "half-split",
     "a, b = x[..., :E // 2], x[..., E // 2:]", "a, b = x[..., ::2], x[..., 1::2]"),
    ("theta of another model", "block0.q_rot", "rope_theta", 'rope["rope_theta"] or 10000.0', "5e5"),
    ("positions from 1", "block0.q_rot", "position from 0", "angle = position", "angle = (position + 1)"),
    ("keys not rotated", "block0.k_rot", "only the queries", "= k = rotate(k, config)", "= k"),
    ("scores not scaled", "block0.attn", "sqrt(E)", " / np.float32(np.sqrt(E))", ""),
    ("no mask", "block0.attn", "mask", "(back < 0) | ", ""),
    ("no window", "window.block0.attn", "window", 'config["window"] or N', "N"),
    ("query head h reads h % K", "grouped.block0.attn", "h // (H/K)",
     'np.repeat(a, H // config["K"], axis=1)', 'np.tile(a, (1, H // config["K"], 1))'),
    ("mlp beside the attention", "block0.mlp_norm", "before the attention",
     '= h = rms_norm(x, w("post', '= h = rms_norm(x - o, w("post'),
    ("gate and up swapped", "block0.mlp", "swapped", "def mlp(h, gate, up,", "def mlp(h, up, gate,"),
    ("gelu", "block0.mlp", "activation", "np.exp(-g)", "np.exp(-1.702 * g)"),
    ("the input of the block", "block0.x", "shifted by one", '"x"] = x  ', '"x"] = x - o - m  '),
    ("the last layer normed", "block11.x", "after the final norm",
     '"x"] = x  ', '"x"] = x if l < 11 else rms_norm(x, weights["model.norm.weight"], 1e-5)  '),
    ("no final norm", "logits", "final norm skipped", 't["final_norm"] @ weights', "x @ weights"),
    ("anchors read at e", "anchors.harmful.mean", "at e", READ, READ.replace("(p,", "(e,")),
    ("the end of padded rows", "anchors.harmful.mean", "padding", READ, READ.replace("(p,", "(p * 0 - 1,"),
     PASSES, "forward(model, np.maximum(row, 0)) for row in ids"),
    ("harmless minus harmful", "v", "sign",
     't["anchors.harmful.mean"] - t["anchors.harmless.mean"]', "plus_p.mean(0) - minus_p.mean(0)"),
    ("v_r not scaled", "v_r", "not scaled", "= v / np.sqrt((v * v).sum(-1, keepdims=True))", "= v"),
    ("e minus p", "anchors.harmful.a_t", "sign", "minus_p - minus_e", "minus_e - minus_p"),
    ("all anchors in d_harm", "d_harm", "only the harmful",
     "d_harm = a_t.mean(0)", "d_harm = np.append(a_t, plus_p - plus_e, 0).mean(0)"),
    ("nothing left out", "cos_harmful", "left out", "cosine(a_t, others)", "cosine(a_t, d_harm)"),
    ("the second score", "T", "index", "scores[[int(0.01 * n)]]", "scores[[1]]"),
    ("a sign left over", "a_t", "steering still on", 't["a_t"] = a_t =',
     'passed = forward(model, given[f"{query}.ids"], found["v_r"], 0); t["a_t"] = a_t ='),
    ("cosine with v_r", "cos", "v_r instead", COS, COS.replace("d_harm", "v_r")),
    ("no end of the range", "s_q", "last layer", '"classify_layers"]].mean', '"classify_layers"][:-1]].mean'),
    ("sigma of 0 and 1", "sigma", "0/1", '< found["T"], -1, 1)', '< found["T"], 0, 1)'),
    ("layers from 1", "steer", "from 0", LAYERS, LAYERS + " + 1"),
    ("no alpha", "steer", "alpha", 'sigma * given["alpha"] *', "sigma *"),
    ("steered after p", "steered_x", "p not run again", ADD, ADD.replace(">=", ">")),
    ("steered before p", "steered_x", "before p", ADD, ADD.replace(">= p", ">= 0")),
    ("r_pos kept", "steered_x", "leave r_pos out", "streams(steered, p)", "streams(steered, -1)", STEERED,
     'steered = forward(model, np.append(given[f"{query}.ids"], instruction[-1]), steer, e + 1)'),
    ("unsteered logits", "steered_logits", "unsteered", '= steered["logits"][p]', '= passed["logits"][p]'),
    ("steered at p only", "steered_x_next", "at p only", ADD, ADD.replace(">=", "==")),
    ("an answer from e", "default_ids", "logits at e", 't["default_ids"] = greedy(model, instruction,',
     't["default_ids"] = greedy(model, given[f"{query}.ids"],'),
    ("the end token kept", "default_ids", "end token kept",
     "if best in end:", "if len(ids) > len(instruction) and ids[-1] in end:"),
    ("a repetition penalty", "grouped.default_ids", "repetition penalty", '["logits"][-1].argmax()',
     '["logits"][-1]; best[ids] *= np.where(best[ids] > 0, 1 / 1.1, 1.1); best = best.argmax()'),
    ("steered at the first step", "scans_ids", "first step only", SCANS,
     't["scans_ids"] = np.append(first, greedy(model, np.append(instruction, first), None, limit - 1))'),
]


@functools.cache
def reference(folder, answers):
    """By the port without mistake: one query and four anchors of each kind, or one random model."""
    others = {*QUERIES, *models.SHAPES} - {"unicode", folder.name}
    golden = {name: x[:4] if name.startswith("anchors.") else x
              for name, x in (GOLD if folder == make.MODEL else SHAPED).items()
              if name.partition(".")[0] not in others and (answers or not name.endswith("_ids"))}
    return port_numpy.port(folder, {**golden, "max_new_tokens": golden["max_new_tokens"] * answers})


@functools.cache
def outcome(row):
    """(the first tensor found wrong, the causes printed) for the port with one mistake."""
    _, name, _, *texts = row
    shape, source = name.partition(".")[0], (HERE / "port_numpy.py").read_text(encoding="utf-8")
    for old, new in zip(texts[::2], texts[1::2]):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = types.ModuleType("planted")
    module.__file__ = port_numpy.__file__
    exec(source, vars(module))
    folder, meta = (HERE / "shapes" / shape, SHAPED_META) if shape in models.SHAPES else (make.MODEL, META)
    golden = reference(folder, name.endswith("_ids"))
    with np.errstate(all="ignore"):
        lines, _ = Comparison(golden, meta, module.port(folder, golden)).report()
    return lines[0].partition(" ")[0], "\n".join(line for line in lines if line.startswith("  cause?"))


@pytest.mark.parametrize("row", PLANTED, ids=lambda row: row[0])
def test_a_planted_mistake_is_caught_where_it_is_made(row):
    assert outcome(row)[0].removeprefix("unicode.") == row[1]


def test_the_true_cause_is_printed_for_nine_mistakes_of_ten():
    named = [row[0] for row in PLANTED if row[2] in outcome(row)[1]]
    assert len(PLANTED) > 40 and len(named) >= 0.9 * len(PLANTED), {row[0] for row in PLANTED} - {*named}


# ----------------------------------------------------------------------------------------------------
# What the comparison reports


def test_an_answer_without_steering_differs_and_inputs_need_not_be_saved():
    theirs = {name: x for name, x in GOLD.items() if name.rpartition(".")[2] not in port_numpy.INPUTS}
    assert report(theirs) == (f"same: {len(GOLD) - 25} of {len(GOLD) - 25} tensors (F32)", 0)
    text, status = report({**theirs, "dangerous.scans_ids": GOLD["dangerous.default_ids"]})
    assert status == 1 and text.startswith("dangerous.scans_ids differs, the first of 1\n"), text


def test_the_report_says_where_and_what_is_missing_or_unknown():
    x = GOLD["plain.block3.x"].copy()
    x[4, 7] = np.nan
    text, status = report({"mine": x, "plain.block3.x": x, "plain.embed": GOLD["plain.embed"]})
    assert status == 1 and text.startswith("plain.block3.x differs, the first of 1\n  is      a^l(q): resid")
    number = f"{GOLD['plain.block3.x'][4, 7]:.6g}"
    assert f"nan at [4, 7] of (N D), expected {number} (golden), tolerance 0.0001" in text
    assert f"missing: {len(GOLD) - 27} tensors, first plain.block0.attn_norm, " in text
    assert "unknown: 1 tensors, first 'mine'" in text and "same: 1 of 2" in text


@pytest.mark.parametrize("name, kind, tolerance", [
    ("plain.block6.q", "F32", 1e-4), ("plain.block6.q", "F64", 1e-4), ("plain.block6.q", "F16", 2e-2),
    ("plain.block6.q", "BF16", 1.5e-1), ("plain.block0.attn_norm", "F32", 2e-6),
    ("plain.block0.v", "F32", 5e-6), ("plain.block0.v", "F16", 2e-2), ("cos_harmless", "BF16", 1e-3),
])
def test_a_tensor_may_differ_by_its_tolerance_and_no_more(name, kind, tolerance):
    for part, status in ((0.9, 0), (1.1, 1)):
        x = GOLD[name].astype(np.float64)
        x.flat[5] += part * tolerance * (abs(x.flat[5]) + np.sqrt((x * x).mean()))
        assert report({name: x}, {kind})[1] == status


@pytest.mark.parametrize("name, change, where", [
    ("v_r", lambda x: x.T, "floats of shape (128, 12), expected floats of shape (12, 128) (L D)"),
    ("plain.block0.q", lambda x: x.reshape(1, 2, 1, 7, 1, 1, 2, 2, 1, 1, 32, 1), "floats of shape (1, 2, 1,"),
    ("classify_layers", lambda x: x + 1, "5 at [0] of (C), expected 4 (golden), tolerance 0"),
    ("steer_layers", np.float32, "floats of shape (4,), expected integers"),
    ("plain.ids", np.float32, "floats of shape (14,), expected integers"),
    ("plain.scans_ids", np.float32, "floats of shape (24,), expected integers"),
    ("plain.scans_ids", lambda x: x[:, None], "integers of shape (24, 1), expected integers of shape (24,)"),
    ("plain.scans_ids", lambda x: x[:0], "-1 at [0] of (-), expected"),
])
def test_another_shape_or_kind_is_named_and_nothing_that_depends_on_it_fails(name, change, where):
    text, status = report({**GOLD, name: change(GOLD[name])})
    assert status == 1 and text.startswith(f"{name} differs") and where in text, text


def header(text):
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize("content", [
    None, os.mkdir, os.mkfifo, b"", b"no tensors", header(b"[" * 99999), header(b"[]"), header(b'{"v": 1}'),
    header(b'{"v": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'),
    header(b'{"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16, 2]}}'),
    header(b'{"v": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}'),
    header(b'{"mine": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'),
], ids=lambda content: repr(content)[:20])
def test_an_unusable_file_is_one_line_and_exit_status_2(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.safetensors"
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    for arguments in ([path], [GOLDEN, path]):      # the second: swapped
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and str(path) in err


# ----------------------------------------------------------------------------------------------------
# Half precision


@pytest.fixture(scope="module", params=["F16", "BF16"])
def half(request):
    """(types in the file, tensors): the numpy port with a pass of llama.py in half precision."""
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[request.param]
    model = llama.load(make.MODEL, dtype=dtype)

    @torch.inference_mode()
    def forward(_, ids, steer=None, p=0):
        ids, cache = torch.tensor(ids)[None].long(), llama.Cache(model.config, 1, 80, model.embed)
        calls = [(ids, None)]
        if steer is not None:
            calls = [(ids[:, :p], None), (ids[:, p:], torch.tensor(steer)[None].to(dtype))]
        found = [model.forward(ids, cache, steer, torch.arange(ids.shape[1])[None]) for ids, steer in calls]
        x, streams = (torch.cat(parts, -2)[0] for parts in zip(*found))
        t = {f"block{l}.x": stream for l, stream in enumerate(streams)}
        t |= {"embed": model.embed[ids[0]], "logits": model.unembed(x),
              "final_norm": llama.rms_norm(x, model.norm, model.config.norm_eps)}
        return {name: tensor.float().numpy() for name, tensor in t.items()}

    other = r"block\d+\.[^x]|^(plain|control|dangerous|harmful)\."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port_numpy, "forward", forward)
        golden = {name: x for name, x in GOLD.items() if not re.search(other, name)}
        return [request.param], port_numpy.port(make.MODEL, golden)


def test_a_port_in_half_precision_passes(half):
    kinds, theirs = half
    text, status = report(theirs, kinds)
    assert status == 0 and text.endswith(f"same: {len(theirs)} of {len(theirs)} tensors ({kinds[0]})"), text


@pytest.mark.parametrize("name, change", {
    "cos_harmful": lambda t: t["cos_harmful"].mean(1, keepdims=True) + 0 * t["cos_harmful"],
    "cos_harmless": lambda t: t["cos_harmless"].mean(1, keepdims=True) + 0 * t["cos_harmless"],
    "T": lambda t: np.sort(t["cos_harmful"][:, 4:].mean(1))[[1]],
    "unicode.s_q": lambda t: t["unicode.cos"].mean(keepdims=True),
    "unicode.cos": lambda t: t["unicode.cos"].astype(np.float16),   # the method works in float32
    "unicode.steer": lambda t: t["unicode.steer"] * 1.02,
    "unicode.sigma": lambda t: -t["unicode.sigma"],
    "unicode.block1.x": lambda t: t["unicode.block0.x"],
    "unicode.default_ids": lambda t: t["unicode.default_ids"][::-1],
}.items())
def test_half_precision_hides_no_mistake(name, change, half):
    kinds, theirs = half
    text, status = report({**theirs, name: change(theirs)}, kinds)
    assert status == 1 and text.startswith(f"{name} differs"), text


def test_an_answer_may_differ_in_half_precision_where_two_logits_nearly_tie():
    gaps = json.loads(META["queries"])[1]["gaps"]["scans"]
    for step, status in ((int(np.argmin(gaps)), 0), (int(np.argmax(gaps)), 1)):
        answer = np.append(GOLD["unicode.scans_ids"][:step], np.int32([7, 7]))
        assert report({"unicode.scans_ids": answer}, {"BF16"})[1] == status
