"""Malformed input of every kind, by seed: each run ends in exit status 0, or in 2 with one line of reason.

A case copies a small random model with its vectors, prompts and results, damages one file or one flag, and
runs a command on it in this process. What is checked of every case:

    no traceback, no hang; exit status 0 or 2, and with 2 one line that starts with the program's name
    what is known to be wrong is refused
    a refused run leaves every file as it was, and no temporary one

    python data/test_fuzz.py 5000 7         # a wider run: so many cases, from this seed
"""
import collections
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import scans  # noqa: E402
from data.experiments.__main__ import main as experiments  # noqa: E402

CASES, SEED = 400, 30
SECONDS = 20        # a run that takes longer hangs
PROGRAMS = {"scans.py": scans.main, "experiments": experiments}

# ------------------------------------------------------------------------------------------------------------
# What a case starts from

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "vocab_size": 2048,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "eos_token_id": 2, "hidden_act": "silu", "rope_scaling": {"type": "linear", "factor": 2.0}}


def make_model(folder, size, generator=torch.Generator().manual_seed(0)):
    D, KE, F = 16, 8, 24
    block = {"input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (KE, D),
             "self_attn.v_proj": (KE, D), "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes = {"model.embed_tokens.weight": (size, D), "model.norm.weight": (D,), "lm_head.weight": (size, D)}
    for l in range(CONFIG["num_hidden_layers"]):
        shapes.update({f"model.layers.{l}.{name}.weight": shape for name, shape in block.items()})
    tensors = {name: torch.randn(shape, generator=generator) / 3 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": size}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')


def make_tokenizer(folder):
    """A byte-level tokenizer.json of Llama-2's format; returns its size."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train([str(ROOT / "data" / "harmless.txt")], tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return made.get_vocab_size()


def make_whole(folder):
    """Two models, one for each kind of tokenizer; their vectors, a prompt file and a results file."""
    tiny = ROOT / "data" / "tiny"
    template = json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]
    for name in ("pieces", "bytes"):
        model = folder / name
        model.mkdir()
        if name == "pieces":
            shutil.copy(tiny / "tokenizer.model", model)
        make_model(model, 2048 if name == "pieces" else make_tokenizer(model))
        (model / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}))
        for kind in ("harmful", "harmless"):
            lines = (ROOT / "data" / f"{kind}.txt").read_text().splitlines()
            (model / f"{kind}.txt").write_text("\n".join(lines[:8]))
        made = run("scans.py", ask(folder, name), folder)
        assert made[0] == 0, made
    rows = "prompt,label,type,score:guard", "Whip it.,safe,a,0.5", "Rob it.,unsafe,b,1", ""
    (folder / "prompts.csv").write_text("\n".join(rows))
    made = run("experiments", evaluate(folder), folder)
    assert made[0] == 0, made
    return folder


def ask(box, model="pieces", *more):
    """Arguments of one question. The vectors are made again, so that the whole of a model is used."""
    return ["--model", box / model, "--vectors", box / f"{model}.safetensors", "--refresh", "--anchors", 4,
            "--prompt", "Whip it.", "--max-new-tokens", 2, *more]


def evaluate(box, *more):
    """Arguments of eval. The name of the prompt file stands in the results: it is relative."""
    return ["eval", "prompts.csv", "--model", box / "pieces", "--vectors", box / "pieces.safetensors",
            "--anchors", 4, "--max-new-tokens", 1, "--out", box / "out.jsonl", *more]


class Hang(BaseException):
    """No Exception: nothing that a command catches."""


def stop(*_):
    raise Hang


def run(program, argv, box, stdin="Whip it.\n"):
    """(exit status, traceback or "hang"; what was said) of a command in this process, in the folder box."""
    said, out = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")
    before = sys.argv, sys.stdin, os.getcwd()
    os.chdir(box)
    sys.argv, sys.stdin = [program, *map(str, argv)], io.StringIO(stdin)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            PROGRAMS[program]()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except Hang:
        status = "hang"
    except BaseException:
        status = traceback.format_exc()
    finally:
        signal.alarm(0)
        os.chdir(before[2])
        sys.argv, sys.stdin = before[:2]
        torch.set_num_threads(1)
    return status, said.getvalue()


# ------------------------------------------------------------------------------------------------------------
# Damage. Each takes (rng, box) and gives (program, arguments, whether it must be refused)

ODD = [None, True, False, "", "8", "false", "\ud800", "x" * 300, -1, 0, 1, 3, 1.5, 12.0, 1e9, math.inf,
       -math.inf,
       math.nan, 10**9, 10**400, [], [[2]], ["x"], {}, {"type": "linear"}]
INTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "max_position_embeddings")


def odd(rng):
    return rng.choice(ODD)


def is_int(value, low):
    return type(value) is int and value >= low


def is_wrong(field, value):
    """Is a value of config.json surely wrong? What is absent may have a default."""
    if value is None:
        return field in ("hidden_size", "num_hidden_layers", "vocab_size", "architectures")
    if field in INTS:
        return not is_int(value, 1) or field == "num_hidden_layers" and value != 4
    if field in ("rms_norm_eps", "rope_theta"):
        below = value == 0 and field == "rope_theta"
        return type(value) not in (int, float) or not 0 <= value < 1e13 or below
    if field == "tie_word_embeddings":
        return not isinstance(value, bool)
    if field == "architectures":
        return True
    if field == "rope_scaling":
        return value not in ({}, [], "", 0, False) and value is not False and not isinstance(value, dict)
    return False


def is_wrong_eos(value):
    some = value if isinstance(value, list) else [] if value is None else [value]
    return not all(is_int(id, 0) and id < 2048 for id in some)


def edit(path, change):
    """Change the object of a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def config(rng, box):
    field, value = rng.choice([*CONFIG, "sliding_window", "quantization_config"]), odd(rng)
    edit(box / "pieces" / "config.json", lambda c: c.update({field: value}))
    if field == "sliding_window":
        edit(box / "pieces" / "config.json", lambda c: c.update(architectures=["MistralForCausalLM"]))
        return "scans.py", ask(box), value is not None and not is_int(value, 1)
    return "scans.py", ask(box), is_wrong(field, value)


def rope(rng, box):
    kind = rng.choice(["linear", "llama3", "default"])
    field = rng.choice(["factor", "low_freq_factor", "type"])
    some = {"type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 1e4, field: odd(rng)}
    edit(box / "pieces" / "config.json", lambda c: c.update(rope_scaling=some))
    number = type(some["factor"]) in (int, float) and 1 <= some["factor"] < 1e7
    return "scans.py", ask(box), field == "factor" and kind != "default" and not number


def generation(rng, box):
    value = odd(rng)
    path = box / "pieces" / rng.choice(["config.json", "generation_config.json"])
    edit(path, lambda c: c.update(eos_token_id=value))
    return "scans.py", ask(box), is_wrong_eos(value) and path.name.startswith("generation")


def tokenizer_config(rng, box):
    field, model = rng.choice(["chat_template", "bos_token", "eos_token"]), rng.choice(["pieces", "bytes"])
    value = rng.choice([odd(rng), [{"name": odd(rng), "template": odd(rng)}], {"content": odd(rng)}])
    edit(box / model / "tokenizer_config.json", lambda c: c.update({field: value}))
    return "scans.py", ask(box, model), field == "chat_template" and isinstance(value, (int, float, dict))


def spoil(value, rng):
    """A value somewhere inside a JSON value is replaced or removed."""
    while isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.4 or not isinstance(value[key], (dict, list)) or not value[key]:
            if rng.random() < 0.2:
                del value[key]
            else:
                value[key] = odd(rng)
            return
        value = value[key]


def tokenizer_json(rng, box):
    edit(box / "bytes" / "tokenizer.json", lambda value: spoil(value, rng))
    return "scans.py", ask(box, "bytes"), False


def damage(data, rng):
    """Bytes with one thing wrong: cut, doubled, spliced or flipped."""
    i, n = rng.randrange(len(data) + 1), rng.choice([1, 8, 100])
    return rng.choice([
        lambda: data[:i], lambda: data + data[i:], lambda: data[:i] + rng.randbytes(n) + data[i + n:],
        lambda: data[:i] + data[i + n:], lambda: data[:i] + b"9" * 5000 + data[i:], lambda: rng.randbytes(n),
        lambda: data[:i] + bytes(n) + data[i + n:], lambda: b"[" * 100000, lambda: b""])()


def any_bytes(rng, box):
    """Any file of a model, damaged anywhere."""
    model = rng.choice(["pieces", "bytes"])
    path = rng.choice(sorted((box / model).iterdir()))
    path.write_bytes(damage(path.read_bytes(), rng))
    return "scans.py", ask(box, model), False


def split(path):
    """The header of a safetensors file, and its data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(path, header, data):
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def weights_header(rng, box):
    path = box / "pieces" / "model.safetensors"
    header, data = split(path)
    entry = header[rng.choice(sorted(header))]
    must = True
    if rng.random() < 0.5:
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2",
                                     7, "X"])
    else:
        spoil(header, rng)
        must = False    # an entry of metadata may go
    join(path, header, data)
    return "scans.py", ask(box), must


def weights_data(rng, box):
    """One tensor with NaN or infinity, of another dtype or shape, gone, or one too many."""
    path = box / "pieces" / "model.safetensors"
    tensors = load_file(path)
    name = rng.choice([name for name in sorted(tensors) if "layers" in name])
    tensor = tensors.pop(name)
    kind = rng.choice([
        lambda: {}, lambda: {name: tensor * math.nan}, lambda: {name: tensor * math.inf},
        lambda: {name: tensor[:-1]},
        lambda: {name: tensor.to(torch.float8_e4m3fn)}, lambda: {name: tensor.double()},
        lambda: {name: tensor.int()}, lambda: {name: tensor[None]}, lambda: {name: tensor, "x": tensor + 1},
        lambda: {name: torch.empty(0)}])
    save_file({**tensors, **kind()}, path)
    return "scans.py", ask(box), True


def index(rng, box):
    names = list(load_file(box / "pieces" / "model.safetensors"))
    shards = dict.fromkeys(names, "model.safetensors")
    value = rng.choice([odd(rng), {**shards, rng.choice(names): odd(rng)}, [names],
                        {**shards, "x": "../pieces"}])
    (box / "pieces" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    return "scans.py", ask(box), True


def pickles(rng, box):
    """A .bin that holds something else than a dict of dense tensors, or is damaged."""
    tensors, path = load_file(box / "pieces" / "model.safetensors"), box / "pieces" / "pytorch_model.bin"
    name = rng.choice([name for name in sorted(tensors) if "layers" in name])
    tensor = tensors[name]
    value = rng.choice([
        odd(rng), [*tensors.values()], {**tensors, name: tensor.tolist()}, {**tensors, 3: tensor},
        {**tensors, name: tensor.to_sparse()}, {**tensors, name: torch.empty(tensor.shape, device="meta")},
        {**tensors, name: tensor.to(torch.complex64)}, {**tensors, name: tensor.to(torch.float8_e5m2)},
        {"state_dict": tensors}, {**tensors, name: tensor * math.nan}, tensors,
        {**tensors, name: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)}])
    torch.save(value, path)
    (box / "pieces" / "model.safetensors").unlink()
    if value is tensors:
        path.write_bytes(damage(path.read_bytes(), rng))
    return "scans.py", ask(box), value is not tensors


def without_refresh(box, *more):
    return ["--model", box / "pieces", "--vectors", box / "pieces.safetensors", "--prompt", "Whip it.",
            "--max-new-tokens", 2, *more]


def vectors_data(rng, box):
    path = box / "pieces.safetensors"
    tensors, (header, _) = load_file(path), split(path)
    name = rng.choice(sorted(tensors))
    tensor, meta = tensors[name], header["__metadata__"]
    kind = rng.choice([
        lambda: tensors.pop(name), lambda: tensors.update(x=tensor.clone()), lambda: tensor.mul_(math.nan),
        lambda: tensor.mul_(0), lambda: tensors.update({name: tensor.double()}),
        lambda: tensors.update({name: tensor.half()}), lambda: tensors.update({name: tensor[:-1].clone()}),
        lambda: tensors["v_r"].mul_(1.5), lambda: tensors["cos_harmful"].mul_(1e6), lambda: meta.clear(),
        lambda: tensors.update({name: tensor[None].clone()}),
        lambda: meta.update({rng.choice(sorted(set(meta) - {"dtype", "harmful", "harmless", "anchor_seed"})):
                             rng.choice(["", "x", "9" * 5000, "\x1b[2J", "-4", "4.0"])})])
    kind()
    save_file(tensors, path, metadata=meta)
    return "scans.py", without_refresh(box), True


def vectors_bytes(rng, box):
    path = box / "pieces.safetensors"
    path.write_bytes(damage(path.read_bytes(), rng))
    return "scans.py", rng.choice([ask, without_refresh])(box), False


def vectors_header(rng, box):
    path = box / "pieces.safetensors"
    header, data = split(path)
    spoil(header, rng)
    join(path, header, data)
    return "scans.py", without_refresh(box), False


def foreign(rng, box):
    """A file that is none of ours, as vectors to be made again or as results. It must not be written over."""
    path = box / "precious.txt"
    if rng.random() < 0.1:      # a pipe stands for devices: a wrong program run by root would replace those
        os.mkfifo(path)
    else:
        path.write_bytes(rng.choice([b"precious", b"precious\n", b"{}\n", b"[1]", b'{"variant": 1}\n',
                                     b"\xff\xfe", b"\0" * 99,
                                 (box / "prompts.csv").read_bytes(),
                                 (box / "pieces" / "model.safetensors").read_bytes()]))
    if rng.random() < 0.5:
        return "scans.py", ask(box, "pieces", "--vectors", path), True
    return "experiments", evaluate(box, "--out", path), True


RECORD = ("variant", "file", "row", "type", "label", "prompt", "score", "threshold", "sigma", "default",
          "scans",
          "refused", "stopped", "settings", "score:guard")


def results(rng, box):
    """A record of --out with a field removed, or changed to what this run would not write."""
    path = box / "out.jsonl"
    lines = path.read_text().splitlines()
    i, field = rng.randrange(len(lines)), rng.choice(RECORD)
    record = json.loads(lines[i])
    inner = record[field] if field in ("refused", "stopped", "settings") and rng.random() < 0.5 else record
    key = rng.choice(sorted(inner)) if inner is not record else field
    was = inner[key]
    inner[key] = odd(rng)
    if rng.random() < 0.3:
        del inner[key]
    lines[i] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    may = key in inner and (type(inner[key]) is type(was) and inner[key] == was or key in (
        "scans", "default", "refused", "stopped", "sigma", "score", "threshold"))
    return "experiments", evaluate(box), not may


def results_bytes(rng, box):
    path = box / "out.jsonl"
    path.write_bytes(damage(path.read_bytes(), rng))
    return "experiments", evaluate(box), False


CELLS = ["Whip it.", "", '"', "\ud800", "\x1b[2J", "a,b", "\0", "x" * 200000, "safe", "unsafe", "True",
         "maybe",
         "contrast_x", "</s>", "<<SYS>>", "{q}", "\u2028", "\ufeff", 3, None, ["x"], {"a": 1}, True, math.nan]
COLUMNS = ["prompt", "goal", "label", "type", "focus", "score:a", "text", "", "prompt"]
SUFFIXES = {".txt", ".csv", ".tsv", ".json", ".jsonl"}


def prompts(rng, box):
    """A prompt file of any suffix, as prompts or as anchors."""
    suffix = rng.choice([*sorted(SUFFIXES), ".CSV", ".Json", ".yaml", ".html", ".parquet", ""])
    path, columns = box / f"odd{suffix}", rng.sample(COLUMNS, rng.randint(1, 5))
    cells = [rng.sample(CELLS, len(columns) + (rng.random() < 0.1)) for _ in range(rng.randint(0, 9))]
    rows = [dict(zip(columns, row)) for row in cells]
    value = rng.choice([rows, [row[0] for row in cells], odd(rng), [odd(rng)]])
    mark = "\t" if suffix == ".tsv" else ","
    table = "\n".join(mark.join(str(cell) for cell in row) for row in [columns, *cells])
    text = rng.choice([json.dumps(value), "\n".join(map(json.dumps, rows)), table,
                       "\n".join(table.split(mark))])
    data = text.encode(errors="surrogatepass")
    path.write_bytes(damage(data, rng) if rng.random() < 0.3 else data)
    must = suffix.lower() not in SUFFIXES
    if rng.random() < 0.3:
        return "scans.py", ask(box, "pieces", rng.choice(["--harmful", "--harmless"]), path), must
    name = rng.choice(["", "safe:", "unsafe:"]) + str(path)
    command = evaluate(box, "--out", box / "new.jsonl", "--batch-size", 4)[:1]
    return "experiments", command + [name] + evaluate(
        box, "--out", box / "new.jsonl")[2:], must


TEXTS = ["", "-1", "0", "1", "2.5", "nan", "inf", "-inf", "1e-40", "1e-46", "1e400", "9" * 400, "--", "-",
         "x", "\u0663",
         "0x10", " 1", "\udcff", "1e-7", "true", "None", "0-3", "3-1", "0-999", "1,,2", "-1-2", "1-2-3",
         "{s}",
         "/", ".", "meta", "cuda:99", "cpu:7", "cpu", "llama-2", "vicuna", "zephyr", "float16", "bfloat16",
         "\n", "a\nb"]
FLAGS = ("model", "format", "system", "device", "dtype", "vectors", "harmful", "harmless", "anchors",
         "anchor-seed",
         "alpha", "threshold", "sigma", "steer-layers", "classify-layers", "max-new-tokens",
         "repetition-penalty",
         "temperature", "top-p", "top-k", "seed", "prompt", "trace", "chat", "analyze", "json", "nonsense")
WRONG_FLAGS = {
    "temperature": ["-1", "nan", "inf", "x", "1e400"],
    "top-p": ["0", "1e-46", "nan", "2.5"],
    "alpha": ["-1", "nan", "inf", "x"],
    "anchors": ["0", "1", "2.5", "9" * 400],
    "top-k": ["-1", "2.5", "9" * 400],
    "seed": ["-1", "9" * 400, "x"],
    "device": ["meta", "x", "cuda:99", ""],
    "sigma": ["2.5", "9" * 400, "true"],
    "steer-layers": ["3-1", "0-999", "", "x"],
    "max-new-tokens": ["-1", "9" * 400, "1e400"],
    "format": ["x", ""],
    "model": ["", "x", "/dev/null"],
    "prompt": ["", "\n", "\udcff"],
    "threshold": ["nan", "inf", "9" * 400],
    "repetition-penalty": ["0", "nan", "1e-46"],
    "vectors": ["/", "."],
    "harmful": ["/dev/null", "/", "", "x"]}


def flags(rng, box):
    more = []
    for _ in range(rng.randint(1, 3)):
        flag, text = rng.choice(FLAGS), rng.choice(TEXTS)
        bare = flag in ("chat", "analyze", "json")
        more += [f"--{flag}"] if bare else [f"--{flag}={text}"] if rng.random() < 0.7 else [f"--{flag}", text]
    return "scans.py", ask(box, "pieces", *more), False


def wrong_flags(rng, box):
    flag = rng.choice(sorted(WRONG_FLAGS))
    return "scans.py", ask(box, "pieces", f"--{flag}={rng.choice(WRONG_FLAGS[flag])}"), True


def experiment_flags(rng, box):
    flag = rng.choice(["batch-size", "trials", "out", "limit", "values", "plot", *FLAGS])
    command = rng.choice([
        evaluate(box)[:-2], ["figures", *evaluate(box)[1:-2]],
        ["capability", "--text", box / "prompts.csv", *evaluate(box)[2:-2]],
        ["sweep", rng.choice(["alpha", "threshold", "layers", "random", "anchors"]), *evaluate(box)[1:-2]]])
    text = rng.choice(TEXTS)
    return "experiments", [*command, f"--{flag}={text}"], False


DAMAGES = [config, config, rope, generation, tokenizer_config, tokenizer_json, any_bytes, any_bytes,
           weights_header, weights_data, index, pickles, vectors_data, vectors_bytes, vectors_header, foreign,
           results, results, results_bytes, prompts, prompts, flags, flags, wrong_flags, experiment_flags]


# ------------------------------------------------------------------------------------------------------------
# One case


def contents(box):
    files = (path for path in sorted(box.rglob("*")) if path.is_file())
    return {str(path.relative_to(box)): path.read_bytes() for path in files}


def fault(seed, whole, box):
    """What is wrong with the outcome of case `seed`, or None; and what the case was."""
    rng = random.Random(seed)
    shutil.copytree(whole, box)
    how = rng.choice(DAMAGES)
    program, argv, must = how(rng, box)
    case = [how.__name__, program, *(str(arg)[:80] for arg in argv)]
    before = contents(box)
    status, said = run(program, argv, box, rng.choice(["Whip it.\n", "", "\n\n", "a\nb\n", "\udcff\n"]))
    after = contents(box)
    shutil.rmtree(box)
    lines = said.splitlines()
    if status == "hang" or isinstance(status, str):
        return f"{'hang' if status == 'hang' else 'traceback'}: {status[-1500:]}", case
    if status not in (0, 2):
        return f"status {status}: {said}", case
    if status == 2 and (not lines or not lines[-1].startswith(f"{program}: ")
                        or sum(line.startswith(f"{program}: ") for line in lines) > 1):
        return f"line: not one last line of the program's own: {said}", case
    if status == 0 and must:
        return f"silent: status 0, must be refused: {said}", case
    if any(name.endswith(".tmp") for name in after):
        return f"left: {[name for name in after if name.endswith('.tmp')]}", case
    if status == 2:
        changed = [name for name in before if after.get(name) != before[name]]
        if changed:
            return f"written: {changed} although refused: {said}", case
    return None, case


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield make_whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("part", range(8))
def test_no_damage_goes_unnoticed(part, whole, tmp_path):
    for seed in range(SEED * 1000 + part, SEED * 1000 + CASES, 8):
        wrong, case = fault(seed, whole, tmp_path / "box")
        assert wrong is None, f"case {seed}: {case}: {wrong}"


if __name__ == "__main__":
    many, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch + "/cache"
        os.mkdir(scratch + "/whole")
        whole_box, kinds = make_whole(Path(scratch) / "whole"), collections.Counter()
        for number in range(first, first + many):
            wrong, case = fault(number, whole_box, Path(scratch) / "box")
            kinds[wrong and wrong.partition(":")[0]] += 1
            if wrong:
                print(number, case, wrong, sep="\n", end="\n\n", flush=True)
    print(dict(kinds))
