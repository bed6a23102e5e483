"""Proof of the porting kit: the golden file, the port that makes its inner tensors, the comparison, the tables.

The numpy port is the independent oracle: it shares no line with llama.py and scans.py, and must give what they give.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import llama
import scans
from data.golden import ledger, make, port_numpy
from data.golden.compare import GOLDEN, compare, main, read, walk

HERE = ROOT / "data" / "golden"
META = read(GOLDEN)[1]
QUERIES = [query["name"] for query in json.loads(META["queries"])]


@pytest.fixture(scope="module")
def golden():
    return read(GOLDEN)[0]


@pytest.fixture(scope="module")
def method():
    return scans.Scans.load(device="cpu", sampling={"max_new_tokens": 4})


def command(*words, cwd=ROOT):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the matrices are small: threads would wait for each other
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# The golden file


def test_the_golden_file_is_up_to_date(golden, tmp_path):
    done = command("-m", "data.golden.make", "--out", tmp_path)                              # which itself holds numpy's pass against the project's own
    assert done.returncode == 0, done.stderr
    tensors, meta, _ = read(tmp_path / GOLDEN.name)
    lines, status = compare("golden.safetensors", tensors, meta, golden)
    assert status == 0 and lines == [f"same: everything, {len(golden)} tensors; tolerance 0.0001 (F32)"], lines
    assert {key: META[key] for key in ("fingerprint", "queries", "pieces")} == {key: meta[key] for key in ("fingerprint", "queries", "pieces")}


def test_names_shapes_and_size_are_those_of_the_table(golden):
    assert GOLDEN.stat().st_size < 4e6
    config, table = llama.Config.from_folder(make.MODEL), (HERE / "golden.md").read_text(encoding="utf-8")
    steps = walk(golden, QUERIES)
    assert len(steps) == len(golden) == len(dict(steps))
    for name, entry in steps:
        assert re.search(rf"`(\{{query\}}\.)?{re.escape(entry.name)}` \| ", table), f"{entry.name} is not in golden.md"
        query = name.partition(".")[0]
        anchors = golden["anchors.harmless.ids" if "harmless" in name else "anchors.harmful.ids"]
        letters = {**vars(config), "n": 64, "m": 64, "N": len(golden.get(f"{query}.ids", [])), "S": anchors.shape[1], "S'": anchors.shape[1],
                   "C": len(golden["classify_layers"]), "M": len(golden["steer_layers"])}
        if entry.shape != "-":
            assert tuple(golden[name].shape) == tuple(int(letters.get(letter, letter)) for letter in entry.shape.split()), name


def test_the_answers_in_the_metadata_are_the_ids_spelled_out(golden):
    pieces = json.loads(META["pieces"])
    for query in json.loads(META["queries"]):
        for which in ("default", "scans"):
            words = [pieces[id] for id in golden[f"{query['name']}.{which}_ids"].tolist()]
            spelled = [bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.encode() for piece in words]
            text = b"".join(spelled).decode(errors="replace")
            assert text.replace("\u2581", " ").removeprefix(" ") == query[which]


# ----------------------------------------------------------------------------------------------------------------------
# The port in numpy


def imports(file):
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return ({name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
            | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)})


def test_port_and_comparison_need_numpy_alone():
    assert imports("port_numpy.py") == {"json", "sys", "pathlib", "numpy"}
    assert imports("compare.py") - sys.stdlib_module_names == {"numpy", "data.golden.port_numpy"}
    assert len((HERE / "port_numpy.py").read_text().splitlines()) < 250


def test_the_port_through_the_comparison_in_the_kit_alone(golden, tmp_path):
    for file in ("golden/port_numpy.py", "golden/compare.py", "golden/golden.safetensors", "tiny/config.json", "tiny/model.safetensors"):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "data" / file, tmp_path / "data" / file)
    done = command("-m", "data.golden.port_numpy", "out.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("-m", "data.golden.compare", "out.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"same: everything, {len(golden)} tensors; tolerance 0.0001 (F32)\n"), done


SHAPES = {
    "multi-head": LlamaConfig(num_key_value_heads=4, head_dim=16),
    "grouped heads of another width": LlamaConfig(num_key_value_heads=2, head_dim=24),
    "tied, linear scaling": LlamaConfig(num_key_value_heads=4, head_dim=16, tie_word_embeddings=True,
                                        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}),
    "sliding window": MistralConfig(num_key_value_heads=1, head_dim=16, sliding_window=5),
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_llama_gives_numpy_s_residuals_and_logits(shape, tmp_path):
    config = SHAPES[shape]
    config.update(dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=100, max_position_embeddings=64,
                       initializer_range=0.2))
    torch.manual_seed(0)
    (MistralForCausalLM if "window" in shape else LlamaForCausalLM)(config).float().save_pretrained(tmp_path)
    model, ids = llama.load(tmp_path), torch.randint(100, (12,))
    x, streams = model.forward(ids[None], read=torch.arange(12)[None])                      # (1, T, D), (1, L, T, D)
    t = port_numpy.forward(port_numpy.load(tmp_path), ids.numpy())
    for l in range(3):
        np.testing.assert_allclose(streams[0, l], t[f"block{l}.x"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.unembed(x[0]), t["logits"], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The comparison: every trap is found at its spot, and named


def changed_forward(monkeypatch, **parts):
    """The names of plain's pass, as a port with other parts would give them."""
    for name, part in parts.items():
        monkeypatch.setattr(port_numpy, name, part)
    golden = read(GOLDEN)[0]
    p, e = golden["plain.p"].item(), golden["plain.e"].item()
    t = port_numpy.forward(port_numpy.load(make.MODEL), golden["plain.ids"])
    t |= {name: t[name][[p, e]] for name in ("final_norm", "logits")}
    return {f"plain.{name}": array for name, array in t.items()}


def interleaved(x, config):
    E = config["E"]
    angle = np.arange(len(x))[:, None, None] * config["theta"] ** (-np.arange(0, E, 2) / E)
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1).reshape(x.shape).astype(np.float32)


def unscaled(q, k, v, config):
    return attention(q * np.float32(np.sqrt(config["E"])), k, v, config)


attention, rms_norm = port_numpy.attention, port_numpy.rms_norm
FORWARD_TRAPS = {
    "eps of 1e-6": ("block0.attn_norm", "not the one of config.json", {"rms_norm": lambda x, w, eps: rms_norm(x, w, eps / 10)}),
    "eps behind the root": ("block0.attn_norm", "eps outside", {
        "rms_norm": lambda x, w, eps: x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(eps)) * w}),
    "interleaved rotary": ("block0.q_rot", "half-split", {"rotate": interleaved}),
    "LayerNorm": ("block0.attn_norm", "LayerNorm", {"rms_norm": lambda x, w, eps: rms_norm(x - x.mean(-1, keepdims=True), w, eps)}),
    "no 1/sqrt(E)": ("block0.attn", "1/sqrt(E)", {"attention": unscaled}),
    "gelu": ("block0.mlp", "gelu", {"mlp": lambda h, gate, up, down: ((h @ gate.T) / (1 + np.exp(-1.702 * (h @ gate.T))) * (h @ up.T)) @ down.T}),
}


@pytest.mark.parametrize("trap", FORWARD_TRAPS)
def test_a_trap_of_the_forward_pass_is_named(trap, golden, monkeypatch):
    name, cause, parts = FORWARD_TRAPS[trap]
    lines, status = compare("mine", golden, META, changed_forward(monkeypatch, **parts))
    assert status == 1 and lines[0].startswith(f"plain.{name} differs"), lines
    assert cause in "\n".join(line for line in lines if not line.startswith("missing"))


def steered_from(golden, p):
    """steered_x of plain, with the steering begun at position p."""
    at = golden["plain.p"].item()
    t = port_numpy.forward(port_numpy.load(make.MODEL), golden["plain.ids"][:at + 1], golden["plain.steer"], p)
    return port_numpy.streams(t, at)


def steered_at_p_only(golden):
    """steered_x_next of dangerous, with nothing added at p + 1."""
    p, ids = golden["dangerous.p"].item(), golden["dangerous.ids"]
    model, run = port_numpy.load(make.MODEL), np.append(ids[:p + 1], golden["dangerous.steered_logits"].argmax())
    return port_numpy.streams(port_numpy.forward(model, run, golden["dangerous.steer"], p), p + 1) - golden["dangerous.steer"]


def post_norm(golden, name):
    weights = port_numpy.load(make.MODEL)[1]
    return rms_norm(golden[name], weights["model.norm.weight"], 1e-5)


LAST = llama.Config.from_folder(make.MODEL).L - 1 if (make.MODEL / "config.json").exists() else 0
VALUE_TRAPS = {  # the tensor that differs first, a word of its cause, what a port would have there
    "double BOS": ("plain.ids", "BOS twice", lambda g: np.append(g["plain.ids"][:1], g["plain.ids"])),
    "no leading space": ("control.ids", "space", lambda g: np.roll(g["control.ids"], 1)),
    "p searched for and not found": ("plain.p", "searched for", lambda g: np.array([-1])),
    "post-norm last state": (f"plain.block{LAST}.x", "after the final norm", lambda g: post_norm(g, f"plain.block{LAST}.x")),
    "hidden_states[l] for layer l": ("plain.block1.x", "layer index shifted", lambda g: g["plain.block0.x"]),
    "anchors read at e": ("anchors.harmful.mean", "read at e", lambda g: g["anchors.harmful.mean"] - g["d_harm"]),
    "unscaled v_r": ("v_r", "unscaled", lambda g: g["v"]),
    "a_t the other way round": ("anchors.harmful.a_t", "the other sign", lambda g: -g["anchors.harmful.a_t"]),
    "nothing left out": ("cos_harmful", "left out", lambda g: port_numpy.cosine(g["anchors.harmful.a_t"], g["d_harm"])),
    "sorted downwards": ("T", "downwards", lambda g: g["cos_harmful"][:, g["classify_layers"]].mean(1).max(keepdims=True)),
    "last layer excluded": ("plain.s_q", "ranges are inclusive", lambda g: g["plain.cos"][g["classify_layers"][:-1]].mean(keepdims=True)),
    "sigma of the other sign": ("plain.sigma", "the other sign", lambda g: -g["plain.sigma"]),
    "layers off by one": ("plain.steer", "layers off by one", lambda g: np.roll(g["plain.steer"], 1, 0)),
    "steering before p": ("plain.steered_x", "steering before p", lambda g: steered_from(g, 0)),
    "p kept in the cache": ("plain.steered_x", "p not run again",
                            lambda g: np.stack([g[f"plain.block{l}.x"][g["plain.p"].item()] for l in range(LAST + 1)])),
    "first token from e": ("plain.default_ids", "not e", lambda g: np.roll(g["plain.default_ids"], 1)),
    "steered at p only": ("dangerous.steered_x_next", "steered at p only", steered_at_p_only),
    "logits at e before those at p": ("plain.logits", "rows swapped", lambda g: g["plain.logits"][::-1]),
    "row length of the other anchors": ("anchors.harmless.ids", "row length", lambda g: np.pad(g["anchors.harmless.ids"], ((0, 0), (0, 3)))),
}


@pytest.mark.parametrize("trap", VALUE_TRAPS)
def test_a_trap_of_the_method_is_named(trap, golden):
    name, cause, value = VALUE_TRAPS[trap]
    lines, status = compare("mine", golden, META, {**golden, name: value(golden)})
    assert status == 1 and lines[0].startswith(f"{name} differs"), lines
    assert any(cause in line for line in lines), lines


def test_an_answer_without_steering_differs_somewhere(golden):
    theirs = {**golden, **{f"{query}.scans_ids": golden[f"{query}.default_ids"] for query in QUERIES}}
    lines, status = compare("mine", golden, META, theirs)
    assert status == 1 and re.match(r"\w+\.scans_ids differs", lines[0]), "no query's answer changes with SCANS: make.py needs other candidates"
    assert "decoded without steering" in "\n".join(lines)


def test_a_second_bos_takes_few_lines_and_shows_the_pieces(golden):
    long = [name for name, entry in walk(golden, ["plain"]) if entry.shape.startswith("N")]
    theirs = {name: np.append(x[:1], x, 0) if name in long else x for name, x in golden.items()}
    lines, status = compare("mine", golden, META, theirs)
    report = "\n".join(lines)
    assert status == 1 and "misshapen as well:\n    all of plain that is N long" in report and len(report.splitlines()) < 16, report
    assert re.search(r"  yours     <s> \[<s>\] ", report) and re.search(r"  golden    <s> \[▁\S*\] ", report), report


def test_inputs_need_not_be_saved(golden):
    inputs = [name for name, entry in walk(golden, QUERIES) if entry.given]
    lines, status = compare("mine", golden, META, {name: x for name, x in golden.items() if name not in inputs})
    assert status == 0 and lines == [f"same: everything, {len(golden) - len(inputs)} tensors; tolerance 0.0001 (F32)"] and len(inputs) == 25
    lines, _ = compare("mine", golden, META, {"plain.s_q": golden["plain.s_q"] + 1})
    assert "at value 0:" in lines[2]


def test_where_a_difference_lies(golden):
    x = golden["plain.block3.x"].copy()
    x[4, 7] += 1
    lines, _ = compare("mine", golden, META, {"plain.block3.x": x, "plain.embed": golden["plain.embed"]})
    assert lines[0] == "plain.block3.x differs, the first of 1 that does; 1 agree" and "(a^l(q))" in lines[1]
    assert re.match(r"  largest   difference 1 at N = 4, D = 7: \S+, golden \S+; tolerance 0.0001 \(F32\)", lines[2]), lines
    assert lines[3] == f"  where     1 of {len(x)} along N differ, the first is 4"


def test_nan_missing_extra_and_misshapen_tensors_are_named(golden):
    theirs = {"plain.embed": golden["plain.embed"].copy(), "v_r": golden["v_r"].T, "d_harm": golden["d_harm"][:, :3], "mine": np.zeros(1)}
    theirs["plain.embed"][2, 3] = np.nan
    lines, status = compare("mine", golden, META, theirs)
    report = "\n".join(lines)
    assert status == 1 and lines[0].startswith("plain.embed differs, the first of 3 that do; 0 agree") and "nan" in report and "N = 2, D = 3" in report
    assert "misshapen as well:\n    v_r, d_harm" in report and "unknown names, not compared:\n    mine" in report
    assert "control.*" in report and "plain.ids" not in report and f"missing, {len(golden) - 28} of {len(golden) - 25}" in report
    lines, _ = compare("mine", golden, META, {"v_r": theirs["v_r"]})
    D, L = theirs["v_r"].shape
    assert f"  shape     ({D}, {L}), need ({L}, {D}) = (L, D)" in lines


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
@torch.inference_mode()
def test_a_port_in_half_precision_passes_with_its_own_tolerance(dtype, kind, golden, tmp_path):
    model, theirs = llama.load(make.MODEL, dtype=dtype), {}
    for query in QUERIES:
        ids, p, e = torch.from_numpy(golden[f"{query}.ids"].copy()), golden[f"{query}.p"].item(), golden[f"{query}.e"].item()
        x, streams = model.forward(ids[None].long(), read=torch.arange(len(ids))[None])
        theirs |= {f"{query}.block{l}.x": stream for l, stream in enumerate(streams[0])}
        theirs[f"{query}.logits"] = model.unembed(x[0, [p, e]]).to(dtype)
        a_t = streams[0, :, p].float() - streams[0, :, e].float()
        theirs[f"{query}.cos"] = scans.cosines(a_t, torch.from_numpy(golden["d_harm"].copy()))
        theirs[f"{query}.default_ids"] = torch.from_numpy(golden[f"{query}.default_ids"][::-1].copy())
    save_file(theirs, tmp_path / "mine.safetensors")
    theirs, _, types = read(tmp_path / "mine.safetensors")
    assert kind in types.values()
    lines, status = compare("mine", golden, META, theirs, kind)
    assert status == 0 and kind in lines[-1] and lines[0].startswith(f"answers differ, as they may in {kind}"), lines
    theirs["plain.block1.x"] = theirs["plain.block0.x"]                                     # the wide tolerance still sees an error
    assert compare("mine", golden, META, theirs, kind)[1] == 1


@pytest.mark.parametrize("content, complaint", [
    (None, "no such file"),
    (b"no tensors", "not a whole safetensors file"),
    ({"x": torch.zeros(2)}, "none of its 1 tensors has a golden name such as plain.ids"),
    ({"v_r": torch.zeros(2).to(torch.float8_e4m3fn)}, "F8_E4M3 in its header; a type must be one of"),
])
def test_an_unusable_file_is_one_line_and_exit_status_2(content, complaint, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith(f"compare.py: {path}: ") and complaint in err


# ----------------------------------------------------------------------------------------------------------------------
# The tables of the documents


def symbol_rows(text):
    """(variable, shape, file, function) of each row of the table from paper symbol to code."""
    rows = re.findall(r"^\|[^|]+\| (`[^|]+`) \| ([^|]+) \| (\w+\.py) \| `([\w.]+)` \|$", text, re.M)
    return [(variable, shape, file, function) for variables, shape, file, function in rows for variable in re.findall(r"`([^`]+)`", variables)]


def seen(method):
    """{(function, variable): value} of every local variable, and of the fields of the objects, in one extraction and one answer."""
    found = {}

    def watch(frame, event, _):
        if event == "return" and Path(frame.f_code.co_filename).parent == ROOT:
            found.update({(frame.f_code.co_qualname, name): value for name, value in frame.f_locals.items()})
    prompts = [method.tokenizer.prompt(query["query"]) for query in json.loads(META["queries"])]
    sys.setprofile(watch)
    try:
        vectors = scans.extract(method.model, prompts[:3], prompts[3:])
        scans.principal_component(vectors.v_r)
        method.answer(["How do I beat an egg?"])
    finally:
        sys.setprofile(None)
    for thing in (vectors, method.settings, prompts[0], method.tokenizer.format):
        found.update({(type(thing).__name__, name): value for name, value in vars(thing).items()})
    return found


def test_the_table_of_symbols_holds(method):
    rows, found = symbol_rows((ROOT / "README.md").read_text(encoding="utf-8")), seen(method)
    assert len(rows) >= 15, "README.md has no table | symbol | variable | shape | file | function |"
    fixed = {"L": method.model.config.L, "D": method.model.config.D}                         # B, T, n, m may be any
    for variable, shape, file, function in rows:
        assert function.split(".")[0] in vars(sys.modules[file.removesuffix(".py")]), f"{file} has no {function}"
        assert (function, variable) in found, f"{function} in {file} has no variable {variable}"
        value = found[function, variable]
        if shape == "text":
            assert isinstance(value, str)
        elif shape == "n, m prompts":
            assert isinstance(value, list)
        else:
            letters, got = re.findall(r"\w+", shape), tuple(getattr(value, "shape", ()))
            assert len(letters) == len(got), f"{variable} in {function} has shape {got}, the table says {shape}"
            for letter, size in zip(letters, got):
                wanted = int(letter) if letter.isdigit() else fixed.get(letter, size)
                assert size == wanted, f"{variable} in {function} has shape {got}, the table says {shape}"


def test_the_ledger_runs_and_its_table_is_of_this_model(monkeypatch, capsys):
    kept = (HERE / "ledger.md").read_text(encoding="utf-8")
    assert f"fingerprint {scans.fingerprint(make.MODEL)}" in kept, "ledger.md is of another model: python -m data.golden.ledger > data/golden/ledger.md"
    monkeypatch.setattr(ledger, "ANCHOR_COUNT", 8)
    ledger.measure(SimpleNamespace(n=2))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {12} and len(rows) >= 17 and lines[-1].startswith("- perplexity")
    assert all(re.sub(r"[\d.]+", "", row.split("|")[1]) in re.sub(r"[\d.]+", "", kept) for row in rows), "ledger.md is not of this ledger.py"
