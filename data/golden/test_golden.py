"""Proof of the porting kit: the golden files, the port in numpy, the comparison and its hints, the tables.

The numpy port is the independent oracle: it shares no line with llama.py and scans.py, and must give what
they give. Of the random models in shapes/ transformers is the oracle.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import llama
import scans
from data.golden import compare as kit
from data.golden import ledger, make, mistakes, models, port_numpy
from data.golden.compare import GOLDEN, HINTS, compare, main, read, walk
from tokenizer import FORMATS, Prompt

HERE = ROOT / "data" / "golden"
META = read(GOLDEN)[1]
QUERIES = [query["name"] for query in json.loads(META["queries"])]
SHAPES = HERE / "shapes.safetensors"


@pytest.fixture(scope="module")
def golden():
    return read(GOLDEN)[0]


@pytest.fixture(scope="module")
def method():
    return scans.Scans.load(device="cpu", sampling={"max_new_tokens": 4})


def command(*words, cwd=ROOT):
    """A command run as a user runs it.

    One thread: the matrices are small, threads would wait for each other.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------
# The golden files


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """The golden files made anew; making them holds numpy's pass against the project's own."""
    out = tmp_path_factory.mktemp("golden")
    done = command("-m", "data.golden.make", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_golden_file_is_up_to_date(golden, remade):
    tensors, meta, _ = read(remade / GOLDEN.name)
    lines, status = compare("golden.safetensors", tensors, meta, golden)
    assert status == 0, lines
    assert lines == [f"same: everything, {len(golden)} tensors; tolerance 0.0001 (F32)"]
    for key in ("fingerprint", "pieces", "eos"):
        assert META[key] == meta[key]
    for old, new in zip(json.loads(META["queries"]), json.loads(meta["queries"]), strict=True):
        for which, gaps in old.pop("gaps").items():
            np.testing.assert_allclose(gaps, new["gaps"][which], atol=1e-3)
        assert old.items() <= new.items()


def test_the_other_files_are_up_to_date(remade):
    for name in (SHAPES.name, HINTS.name):
        (old, old_meta, _), (new, new_meta, _) = read(HERE / name), read(remade / name)
        assert old.keys() == new.keys() and old_meta.keys() == new_meta.keys()
        for key in old:
            size = np.nan_to_num(abs(old[key])).max()
            np.testing.assert_allclose(old[key], new[key], rtol=1e-3, atol=1e-3 * size)
    assert (HERE / "formats.json").read_bytes() == (remade / "formats.json").read_bytes()
    for path in remade.rglob("config.json"):
        assert path.read_bytes() == (HERE / path.relative_to(remade)).read_bytes()


def test_names_shapes_and_size_are_those_of_the_table(golden):
    assert GOLDEN.stat().st_size < 4e6
    config, table = llama.read_config(make.MODEL), (HERE / "golden.md").read_text(encoding="utf-8")
    steps = walk(golden, QUERIES)
    assert len(steps) == len(golden) == len(dict(steps))
    for name, entry in steps:
        assert re.search(rf"`(\{{query\}}\.)?{re.escape(entry.name)}` \| ", table), entry.name
        query = name.partition(".")[0]
        anchors = golden["anchors.harmless.ids" if "harmless" in name else "anchors.harmful.ids"]
        letters = {**vars(config), "n": 64, "m": 64, "N": len(golden.get(f"{query}.ids", [])),
                   "S": anchors.shape[1], "S'": anchors.shape[1],
                   "C": len(golden["classify_layers"]), "M": len(golden["steer_layers"])}
        if entry.shape != "-":
            shape = tuple(int(letters.get(letter, letter)) for letter in entry.shape.split())
            assert tuple(golden[name].shape) == shape, name


def test_the_answers_in_the_metadata_are_the_ids_spelled_out(golden):
    pieces = json.loads(META["pieces"])
    for query in json.loads(META["queries"]):
        for which in ("default", "scans"):
            words = [pieces[id] for id in golden[f"{query['name']}.{which}_ids"].tolist()]
            spelled = [bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.encode()
                       for piece in words]
            text = b"".join(spelled).decode(errors="replace")
            assert text.replace("\u2581", " ").removeprefix(" ") == query[which]


@pytest.mark.parametrize("shape", models.SHAPES)
@torch.inference_mode()
def test_transformers_gives_the_passes_of_the_random_models(shape, caplog):
    tensors, meta, _ = read(SHAPES)
    t = {name.removeprefix(f"{shape}."): torch.from_numpy(x.copy()) for name, x in tensors.items()}
    model = AutoModelForCausalLM.from_pretrained(HERE / "shapes" / shape, dtype=torch.float32)
    ids, p, e = t["ids"][None].long(), int(t["p"]), int(t["e"])
    out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits[0, [p, e]], t["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.hidden_states[0][0], t["embed"])
    torch.testing.assert_close(out.hidden_states[1][0], t["block0.x"], rtol=1e-4, atol=1e-4)
    answer = model.generate(ids[:, :p + 1], max_new_tokens=int(tensors["max_new_tokens"][0]), do_sample=False,
                            repetition_penalty=1.0, pad_token_id=0)[0, p + 1:]
    end = np.atleast_1d(model.config.eos_token_id)
    assert [id for id in answer.tolist() if id not in end] == t["default_ids"].tolist()


@pytest.mark.parametrize("shape", models.SHAPES)
@torch.inference_mode()
def test_llama_gives_the_passes_of_the_random_models(shape):
    tensors, meta, _ = read(SHAPES)
    t = {name.removeprefix(f"{shape}."): torch.from_numpy(x.copy()) for name, x in tensors.items()}
    model, T = llama.load(HERE / "shapes" / shape, dtype=torch.float32), len(t["ids"])
    x, streams = model.forward(t["ids"][None].long(), read=torch.arange(T)[None])    # (1, T, D), (1, L, T, D)
    for l in range(model.config.L):
        torch.testing.assert_close(streams[0, l], t[f"block{l}.x"], rtol=1e-4, atol=1e-4)
    logits = model.unembed(x[0, [int(t["p"]), int(t["e"])]])
    torch.testing.assert_close(logits, t["logits"], rtol=1e-4, atol=1e-4)


def test_the_random_models_are_small_and_show_what_they_are_for():
    size = sum(path.stat().st_size for path in [SHAPES, *(HERE / "shapes").rglob("*.*")])
    assert size < 1e6, size
    config = {shape: port_numpy.read_config(HERE / "shapes" / shape) for shape in models.SHAPES}
    assert config["grouped"]["E"] != config["grouped"]["D"] // config["grouped"]["H"] > config["grouped"]["K"]
    assert config["window"]["window"] < models.LENGTH - 2
    plain = port_numpy.frequencies({**config["llama3"], "scaling": None})
    scaled = port_numpy.frequencies(config["llama3"]) / plain
    assert scaled.max() == 1 and np.isclose(scaled.min(), 1 / 8) and ((scaled > 0.13) & (scaled < 0.99)).any()


def written_formats():
    """{format: {"": template, "{s}": with a system prompt, "r_pos": text}} as models.md writes them."""
    found = {}
    for line in (HERE / "models.md").read_text(encoding="utf-8").partition("## Chat formats")[2].splitlines():
        label, text = line[4:17], line[17:].replace("\\n", "\n")
        if not line.startswith("    "):
            continue
        if label.strip():
            found.setdefault(label.strip(), {}) if label[0] != " " else None
            name = label.strip() if label[0] != " " else name
            key = label.strip() if label[0] == " " else ""
        found[name][key] = found[name].get(key, "") + text
    return {name: {**parts, "r_pos": json.loads(parts["r_pos"])} for name, parts in found.items()}


def test_the_ids_of_every_format_are_those_that_the_kit_writes_down():
    """The formats of models.md, each stretch between control tokens encoded by itself, give formats.json."""
    formats, cases = written_formats(), json.loads((HERE / "formats.json").read_text(encoding="utf-8"))
    assert {case["format"] for case in cases} == set(FORMATS) == set(formats)
    for name, chat in FORMATS.items():
        systems = {bool(case["system"]) for case in cases if case["format"] == name}
        assert systems == {False, bool(chat.system)}
        assert ("{s}" in formats[name]) == bool(chat.system)
    sp = SentencePieceProcessor(model_file=str(make.MODEL / "tokenizer.model"))
    tokens = tokenizers.Tokenizer.from_file(str(HERE / "vocabulary" / "tokenizer.json"))
    tokens.encode_special_tokens = True
    for case in cases:
        ours = case["tokenizer"] == "vocabulary"
        names = {name: tokens.token_to_id(name) for name in FORMATS[case["format"]].controls}
        names["<BOS>"] = tokens.token_to_id("<|begin|>") if ours else 1
        names["<EOS>"] = tokens.token_to_id("<|end|>") if ours else 2

        def ids(template):
            found = []
            for part in re.split("(" + "|".join(map(re.escape, names)) + ")", template):
                text = part.replace("{s}", case["system"].strip()).replace("{q}", case["query"].strip())
                if part in names:
                    found.append(names[part])
                elif text:
                    found += tokens.encode(text, add_special_tokens=False).ids if ours else sp.encode(text)
            return found
        chat = formats[case["format"]]
        template = chat["{s}" if case["system"] else ""]
        assert ids(template + chat["r_pos"]) == case["ids"], case
        assert (len(ids(template)) - 1, len(case["ids"]) - 1) == (case["p"], case["e"])


# ----------------------------------------------------------------------------------------------------
# The kit alone


def imports(file):
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return ({name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
            | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)})


def test_port_and_comparison_need_numpy_alone():
    assert imports("port_numpy.py") - sys.stdlib_module_names == {"numpy", "data.golden.compare"}
    assert imports("compare.py") - sys.stdlib_module_names == {"numpy"}
    assert len((HERE / "port_numpy.py").read_text().splitlines()) < 300


def test_the_port_through_the_comparison_in_a_bare_folder(golden, tmp_path):
    done = command("-m", "data.golden.port_numpy", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    for file in ("compare.py", "golden.safetensors", "hints.safetensors"):
        shutil.copy(HERE / file, tmp_path / file)
    done = command("-I", "compare.py", "out.safetensors", cwd=tmp_path)
    line = f"same: everything, {len(golden)} tensors; tolerance 0.0001 (F32)\n"
    assert (done.returncode, done.stdout) == (0, line), done
    save_file({"s_q": torch.zeros(1), "plain.s_q": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    done = command("-I", "compare.py", "wrong.safetensors", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("plain.s_q differs"), done


def test_the_random_models_through_the_comparison(tmp_path):
    tensors, _, _ = read(SHAPES)
    theirs = {}
    for shape in models.SHAPES:
        wanted = {name: x for name, x in tensors.items() if name.startswith(shape)}
        wanted["max_new_tokens"] = tensors["max_new_tokens"]
        theirs |= port_numpy.port(HERE / "shapes" / shape, wanted)
    port_numpy.write_safetensors(tmp_path / "out.safetensors", theirs)
    done = command("data/golden/compare.py", tmp_path / "out.safetensors", SHAPES)
    assert (done.returncode, done.stdout[:16]) == (0, "same: everything"), done
    theirs["window.default_ids"] = theirs["window.default_ids"][::-1]
    port_numpy.write_safetensors(tmp_path / "out.safetensors", theirs)
    done = command("data/golden/compare.py", tmp_path / "out.safetensors", SHAPES)
    assert done.returncode == 1 and done.stdout.startswith("window.default_ids differs"), done


# ----------------------------------------------------------------------------------------------------
# The comparison: every mistake is caught at its spot, and named


@pytest.fixture(scope="module")
def field():
    return mistakes.Field()


def label(mistake):
    variant = "" if mistake.kept else ", a variant"
    return f"{mistake.shape or 'tiny'} {mistake.first}: {mistake.cause}{variant}"


@pytest.mark.parametrize("mistake", mistakes.MISTAKES, ids=label)
def test_a_mistake_is_caught_where_it_is_made_and_named(mistake, field):
    with np.errstate(all="ignore"):
        name, causes = field.judge(mistake, read(HINTS)[:2])
    assert name is not None, "not caught"
    assert name.partition(".")[2] == mistake.first or name == mistake.first
    assert mistakes.cause_of(mistake) in causes


def test_the_true_cause_is_the_first_or_second_of_nearly_all(field):
    with np.errstate(all="ignore"):
        text, ranks = mistakes.table(field, read(HINTS)[:2])
    assert sum(rank <= 2 for rank in ranks) >= 0.95 * len(ranks) and len(ranks) > 150
    kept = (HERE / "hints.md").read_text(encoding="utf-8")
    assert re.findall(r"^\|.*?\|.*?\|", text, re.M) == re.findall(r"^\|.*?\|.*?\|", kept, re.M)


def test_every_cause_is_planted_or_stands_for_what_cannot_be():
    planted = {mistakes.cause_of(mistake) for mistake in mistakes.MISTAKES}
    causes = {cause for entry in (*kit.FORWARD, *kit.ANCHORS, *kit.DECISION) for cause in entry.causes}
    assert causes - planted == {
        "table transposed",                                     # another shape
        kit.WIDTH,                                              # another shape
        kit.EARLIER,                                            # no mistake of its own
        "an earlier block, whose inner tensors are not in the golden file: check it as block 0 was checked"}


def test_a_mistake_that_would_show_earlier_is_not_named(golden, field):
    """What rotates v before it is saved changes v: where v is the same, it is not the cause."""
    rotated = next(m for m in mistakes.MISTAKES if m.cause == "v rotated")
    assert field.judge(rotated, read(HINTS)[:2])[1][0].startswith("v rotated")


def test_an_answer_without_steering_differs_somewhere(golden):
    theirs = {**golden, **{f"{query}.scans_ids": golden[f"{query}.default_ids"] for query in QUERIES}}
    lines, status = compare("mine", golden, META, theirs)
    assert status == 1 and re.match(r"\w+\.scans_ids differs", lines[0]), "no answer changes with SCANS"
    assert "decoded without steering" in "\n".join(lines)


def test_a_second_bos_takes_few_lines_and_shows_the_pieces(golden):
    long = [name for name, entry in walk(golden, ["plain"]) if entry.shape.startswith("N")]
    theirs = {name: np.append(x[:1], x, 0) if name in long else x for name, x in golden.items()}
    lines, status = compare("mine", golden, META, theirs)
    report = "\n".join(lines)
    assert status == 1 and "misshapen as well:\n    all of plain that is N long" in report
    assert len(report.splitlines()) < 18, report
    assert re.search(r"  yours     <s> \[<s>\] ", report), report
    assert re.search(r"  golden    <s> \[▁\S*\] ", report), report


def test_inputs_need_not_be_saved(golden):
    inputs = [name for name, entry in walk(golden, QUERIES) if entry.given]
    theirs = {name: x for name, x in golden.items() if name not in inputs}
    lines, status = compare("mine", golden, META, theirs)
    assert status == 0 and len(inputs) == 25
    assert lines == [f"same: everything, {len(golden) - len(inputs)} tensors; tolerance 0.0001 (F32)"]
    lines, _ = compare("mine", golden, META, {"plain.s_q": golden["plain.s_q"] + 1})
    assert "at value 0:" in lines[2]


def test_where_a_difference_lies(golden):
    x = golden["plain.block3.x"].copy()
    x[4, 7] += 1
    lines, _ = compare("mine", golden, META, {"plain.block3.x": x, "plain.embed": golden["plain.embed"]})
    assert lines[0] == "plain.block3.x differs, the first of 1 that does; 1 agree" and "(a^l(q))" in lines[1]
    assert re.match(r"  largest   difference 1 at N = 4, D = 7: \S+, golden \S+; tolerance 0.0001 \(F32\)",
                    lines[2])
    assert lines[3] == f"  where     1 of {len(x)} along N differ, the first is 4"


def test_nan_missing_extra_and_misshapen_tensors_are_named(golden):
    theirs = {"plain.embed": golden["plain.embed"].copy(), "v_r": golden["v_r"].T,
              "d_harm": golden["d_harm"][:, :3], "mine": np.zeros(1)}
    theirs["plain.embed"][2, 3] = np.nan
    lines, status = compare("mine", golden, META, theirs)
    report = "\n".join(lines)
    assert status == 1 and lines[0].startswith("plain.embed differs, the first of 3 that do; 0 agree")
    assert "nan" in report and "N = 2, D = 3" in report
    assert "misshapen as well:\n    v_r, d_harm" in report
    assert "unknown names, not compared:\n    mine" in report
    assert "control.*" in report and "plain.ids" not in report
    assert f"missing, {len(golden) - 28} of {len(golden) - 25}" in report


@pytest.mark.parametrize("name, change, advice", [
    ("v_r", lambda x: x.T, "transpose: your axes in the order (1, 0)"),
    ("plain.block0.q", lambda x: x.swapaxes(0, 1), "transpose: your axes in the order (1, 0, 2)"),
    ("plain.block0.x", lambda x: x[None], "squeeze: an axis of length 1 is too many or too few"),
    ("T", lambda x: x[0], "squeeze: an axis of length 1 is too many or too few"),
    ("plain.block0.q", lambda x: x.reshape(len(x), -1), "reshape: the axes are joined or split otherwise"),
])
def test_as_many_numbers_in_another_shape_get_advice_and_no_causes(name, change, advice, golden):
    lines, status = compare("mine", golden, META, {name: change(golden[name])}, hints=read(HINTS)[:2])
    shape, need = np.shape(change(golden[name])), golden[name].shape
    assert status == 1 and any(line.startswith(f"  shape     {shape}, need {need}") for line in lines), lines
    assert f"  advice    {advice}" in lines and "causes" not in "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# Half precision judges too


@torch.inference_mode()
def half_port(golden, dtype, eps=None):
    """{name: tensor} of a port that computes in half precision, and the method in float32."""
    model, t = llama.load(make.MODEL, dtype=dtype), {}
    model.config = replace(model.config, norm_eps=eps or model.config.norm_eps)
    streams = {}
    for kind in ("harmful", "harmless"):
        rows = zip(*(golden[f"anchors.{kind}.{part}"].tolist() for part in ("ids", "p", "e")))
        streams[kind] = scans.read_streams(model, [Prompt(ids[:e + 1], p, e) for ids, p, e in rows])
        t[f"anchors.{kind}.mean"] = streams[kind][:, :, 0].mean(0)
    t["v"] = t["anchors.harmful.mean"] - t["anchors.harmless.mean"]
    t["v_r"] = scans.refusal_vectors(streams["harmful"][:, :, 0], streams["harmless"][:, :, 0])[0]
    t["anchors.harmful.a_t"] = a_t = scans.transition(streams["harmful"])
    t["d_harm"] = d_harm = scans.harm_direction(a_t)
    t["cos_harmful"] = scans.leave_one_out(a_t)
    t["cos_harmless"] = scans.cosines(scans.transition(streams["harmless"]), d_harm)
    classify = golden["classify_layers"].tolist()
    t["T"] = torch.tensor([scans.estimate_threshold(scans.score(t["cos_harmful"], classify))])
    for query in QUERIES:
        ids = torch.from_numpy(golden[f"{query}.ids"].copy()).long()
        p, e = golden[f"{query}.p"].item(), golden[f"{query}.e"].item()
        x, read_ = model.forward(ids[None], read=torch.arange(len(ids))[None])
        found = {f"block{l}.x": stream for l, stream in enumerate(read_[0])}
        weight, eps = model.blocks[0].attn_norm, model.config.norm_eps
        found["block0.attn_norm"] = llama.rms_norm(model.embed[ids], weight, eps)
        found["logits"] = model.unembed(x[0, [p, e]]).to(dtype)
        found["a_t"] = scans.transition(read_[:, :, [p, e]].float())[0]
        found["cos"] = scans.cosines(found["a_t"][None], d_harm)[0]
        found["s_q"] = scans.score(found["cos"][None], classify)
        found["sigma"] = scans.steering_direction(found["s_q"], t["T"]).int()
        layers = golden["steer_layers"].tolist()
        found["steer"] = scans.steering(t["v_r"], found["sigma"] * float(golden["alpha"][0]), layers)[0]
        for name, steer in (("default", None), ("scans", found["steer"][None].to(dtype))):
            cache = llama.Cache(model.config, 1, 128, model.embed)
            model.forward(ids[None, :p], cache)
            sampling = llama.Sampling(max_new_tokens=int(golden["max_new_tokens"][0]))
            steps = llama.generate(model, [ids[:p + 1].tolist()], cache, steer, sampling)
            answer = [id for (_, id, _), in steps if id is not None]
            found[f"{name}_ids"] = torch.tensor(answer, dtype=torch.int32)
        t.update({f"{query}.{name}": tensor for name, tensor in found.items()})
    return t


HALF = {torch.float16: "F16", torch.bfloat16: "BF16"}


@pytest.fixture(scope="module")
def half_ports(golden):
    return {dtype: half_port(golden, dtype) for dtype in HALF}


def judged(tensors, golden, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "mine.safetensors")
    theirs, _, types = read(tmp_path / "mine.safetensors")
    return compare("mine", golden, META, theirs, types, read(HINTS)[:2])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_port_in_half_precision_passes(dtype, half_ports, golden, tmp_path):
    lines, status = judged(half_ports[dtype], golden, tmp_path)
    assert status == 0 and HALF[dtype] in lines[-1], lines


def second(scores):
    return scores.sort().values[[1]]


CLASSIFY = list(range(4, 12))
HALF_MISTAKES = {  # the tensor, and what a port would have there
    "cosines over all layers": (
        "cos_harmful", lambda t: t["cos_harmful"].mean(1, keepdim=True).expand(-1, 12)),
    "no leave-one-out": ("cos_harmful", lambda t: scans.cosines(t["anchors.harmful.a_t"], t["d_harm"])),
    "T of the second score": ("T", lambda t: second(t["cos_harmful"][:, CLASSIFY].mean(1))),
    "mean over all layers": ("plain.s_q", lambda t: t["plain.cos"].mean().reshape(1)),
    "cosine with v_r": ("plain.cos", lambda t: scans.cosines(t["plain.a_t"][None], t["v_r"])[0]),
    "alpha a little off": ("plain.steer", lambda t: t["plain.steer"] * 1.02),
    "v_r of another length": ("v_r", lambda t: t["v_r"] * 1.01),
    "the sign of another query": ("plain.sigma", lambda t: -t["plain.sigma"]),
    "streams of another block": ("plain.block1.x", lambda t: t["plain.block0.x"].clone()),
    "an end token kept": (
        "plain.default_ids", lambda t: torch.cat((t["plain.default_ids"], torch.tensor([2])))),
    "another answer where nothing ties": ("plain.default_ids", lambda t: t["plain.default_ids"].flip(0)),
    "an answer cut short": ("plain.default_ids", lambda t: t["plain.default_ids"][:-1]),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mistake", HALF_MISTAKES)
def test_half_precision_hides_no_mistake(mistake, dtype, half_ports, golden, tmp_path):
    name, make_wrong = HALF_MISTAKES[mistake]
    lines, status = judged({**half_ports[dtype], name: make_wrong(half_ports[dtype])}, golden, tmp_path)
    assert status == 1 and lines[0].startswith(f"{name} differs"), lines


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_does_not_hide_a_wrong_eps(dtype, half_ports, golden, tmp_path):
    model = llama.load(make.MODEL, dtype=dtype)
    theirs = dict(half_ports[dtype])
    for query in QUERIES:
        embed = model.embed[torch.from_numpy(golden[f"{query}.ids"].copy()).long()]
        theirs[f"{query}.block0.attn_norm"] = llama.rms_norm(embed, model.blocks[0].attn_norm, 1e-6)
    lines, status = judged(theirs, golden, tmp_path)
    assert status == 1 and lines[0].startswith("plain.block0.attn_norm differs"), lines
    assert any("eps" in line for line in lines if line.startswith("  judged"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scores_saved_in_half_precision_are_sent_back(dtype, half_ports, golden, tmp_path):
    theirs = {**half_ports[dtype], "cos_harmful": half_ports[dtype]["cos_harmful"].to(dtype)}
    lines, status = judged(theirs, golden, tmp_path)
    assert status == 1 and "cos_harmful saved in half precision" in "\n".join(lines)


def test_an_answer_may_differ_in_half_precision_where_two_logits_nearly_tie(golden, half_ports, tmp_path):
    gaps = {query["name"]: query["gaps"]["scans"] for query in json.loads(META["queries"])}
    query = min(gaps, key=lambda name: min(gaps[name]))
    step = int(np.argmin(gaps[query]))
    answer = torch.from_numpy(np.append(golden[f"{query}.scans_ids"][:step], np.int32([7, 7])))
    lines, status = judged({**half_ports[torch.bfloat16], f"{query}.scans_ids": answer}, golden, tmp_path)
    assert status == 0 and f"nearly tie, as they may in BF16: {query}.scans_ids" in "\n".join(lines), lines


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
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"compare.py: {path}: ") and complaint in err


# ----------------------------------------------------------------------------------------------------
# The tables of the documents


def symbol_rows(text):
    """(variable, shape, file, function) of each row of the table from paper symbol to code."""
    rows = re.findall(r"^\|[^|]+\| (`[^|]+`) \| ([^|]+) \| (\w+\.py) \| `([\w.]+)` \|$", text, re.M)
    return [(variable, shape, file, function) for variables, shape, file, function in rows
            for variable in re.findall(r"`([^`]+)`", variables)]


def seen(method):
    """{(function, variable).

    Value} of every local variable, and of the fields of the objects, in one extraction and one answer.
    """
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
    fixed = {"L": method.model.config.L, "D": method.model.config.D}                   # B, T, n, m may be any
    for variable, shape, file, function in rows:
        module = vars(sys.modules[file.removesuffix(".py")])
        assert function.split(".")[0] in module, f"{file} has no {function}"
        assert (function, variable) in found, f"{function} in {file} has no variable {variable}"
        value = found[function, variable]
        if shape == "text":
            assert isinstance(value, str)
        elif shape == "n, m prompts":
            assert isinstance(value, list)
        else:
            letters, got = re.findall(r"\w+", shape), tuple(getattr(value, "shape", ()))
            words = f"{variable} in {function} has shape {got}, the table says {shape}"
            assert len(letters) == len(got), words
            for letter, size in zip(letters, got):
                wanted = int(letter) if letter.isdigit() else fixed.get(letter, size)
                assert size == wanted, words


def test_the_ledger_runs_and_its_table_is_of_this_model(monkeypatch, capsys):
    kept = (HERE / "ledger.md").read_text(encoding="utf-8")
    assert f"fingerprint {scans.fingerprint(make.MODEL)}" in kept, "ledger.md is of another model"
    monkeypatch.setattr(ledger, "ANCHOR_COUNT", 8)
    ledger.measure(SimpleNamespace(n=2))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {12} and len(rows) >= 17
    assert lines[-1].startswith("- perplexity")
    words = re.sub(r"[\d.]+", "", kept)
    assert all(re.sub(r"[\d.]+", "", row.split("|")[1]) in words for row in rows), "not of this ledger.py"
