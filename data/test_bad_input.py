"""Bad input of every kind, for scans.py: it ends in exit status 2 with one line that says what and where.

First the cases that a user meets, by name. Then files that are damaged at random, by seed, in every place
that is read: each run ends in status 0 or 2, without a traceback, and leaves every file as it was.

    CASES=5000 python -m pytest data/test_bad_input.py      # more random cases than usual
"""
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import llama  # noqa: E402
import scans  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

TINY = ROOT / "data" / "tiny"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "eos_token_id": 2, "hidden_act": "silu", "rope_scaling": {"type": "linear", "factor": 2.0}}


def make_models(box):
    """Two random models, one for each kind of tokenizer, with anchors of their own and their vectors."""
    words = tokenizers.ByteLevelBPETokenizer()
    words.train(str(ROOT / "data" / "harmless.txt"), 400, show_progress=False, special_tokens=["<s>", "</s>"])
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    for name in ("pieces", "bytes"):
        folder = box / name
        folder.mkdir()
        if name == "pieces":
            shutil.copy(TINY / "tokenizer.model", folder)
        else:
            words.save(str(folder / "tokenizer.json"))
        config = {**CONFIG, "vocab_size": 2048 if name == "pieces" else words.get_vocab_size()}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}))
        draw, names = torch.Generator().manual_seed(0), llama.checkpoint_names(llama.read_config(folder))
        save_file({tensor: torch.randn(shape, generator=draw) / 3 for tensor, (_, _, shape) in names.items()},
                  folder / "model.safetensors")
        for kind, suffix in (("harmful", "txt"), ("harmless", "csv")):
            lines = (ROOT / "data" / f"{kind}.txt").read_text().splitlines()[:8]
            header = ["prompt"] if suffix == "csv" else []
            (folder / f"{kind}.{suffix}").write_text("\n".join([*header, *lines]) + "\n")
        status, _, said = run(ask(box, name), box)
        assert status == 0, said
    return box


def ask(box, model="pieces"):
    folder = box / model
    return ["--model", folder, "--vectors", box / f"{model}.safetensors", "--anchors", 4,
            "--harmful", folder / "harmful.txt", "--harmless", folder / "harmless.csv",
            "--max-new-tokens", 2, "--prompt", "Whip it."]


def run(argv, box, main=scans.main):
    """(exit status or traceback, output, errors) of scans.py in this process, in the folder box."""
    said, out, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin, os.getcwd())
    sys.argv, sys.stdin = ["scans.py", *map(str, argv)], io.StringIO("")
    os.chdir(box)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        status = traceback.format_exc()
    finally:
        os.chdir(before[2])
        sys.argv, sys.stdin = before[:2]
    return status, out.getvalue(), said.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def box(models, tmp_path):
    shutil.copytree(models, tmp_path / "box")
    return tmp_path / "box"


def assert_refused(result, message):
    """Exit status 2, the message on the last line of standard error, nothing on standard output."""
    status, out, err = result
    last = err.splitlines()[-1]
    assert status == 2 and message in last and last.startswith("scans.py: ") and not out


# ---------------------------------------------------------------------------------------------------------
# By name: folders


def config(**changed):
    """An edit of a folder's config.json; `...` removes a key."""
    def edit(folder):
        edited = {**json.loads((folder / "config.json").read_text()), **changed}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in edited.items() if v is not ...}))
    return edit


def weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def pipe(name):
    return lambda folder: (remove(name)(folder), os.mkfifo(folder / name))


Q3 = "model.layers.3.self_attn.q_proj.weight"
FOLDERS = {
    "config absent": (remove("config.json"), "config.json: no such file"),
    "config not JSON": (write("config.json", b"{"), "cannot be read as JSON"),
    "config deep": (write("config.json", b"[" * 100000), "cannot be read as JSON"),
    "config a pipe": (pipe("config.json"), "config.json: not a regular file"),
    "other architecture": (config(architectures=["GPT2LMHeadModel"]), "architectures is ['GPT2LMHeadModel']"),
    "no size": (config(hidden_size=...), "hidden_size is None, expected a positive int"),
    "size true": (config(num_hidden_layers=True), "num_hidden_layers is True, expected a positive int"),
    "size huge": (config(num_hidden_layers=10**400), "num_hidden_layers is 1000"),
    "layers many": (config(num_hidden_layers=10**9), "1000000000 layers"),
    "heads do not divide": (config(num_key_value_heads=3), "4 heads of width 4, 3 key/value heads"),
    "rope of another type": (config(rope_scaling={"type": "dynamic"}), "rope_type is 'dynamic'"),
    "rope without a type": (config(rope_scaling={"factor": 4.0}), "expected an object with a rope_type"),
    "rope said twice": (config(rope_parameters={"rope_type": "default"}), "rope_type is 'default' in rope"),
    "attention_bias": (config(attention_bias=True), "attention_bias is True"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "an end that is no id": (write("generation_config.json", b'{"eos_token_id": ["x"]}'), "eos_token_id is"),
    "no weights": (remove("model.safetensors"), "no model.safetensors. If the main revision"),
    "missing tensor": (weights(lambda t: t.pop(Q3)), f"tensor {Q3} is missing"),
    "unknown tensor": (weights(lambda t: t.update(extra=torch.ones(2))), "tensor extra is unknown"),
    "misshapen tensor": (weights(lambda t: t.update({Q3: torch.ones(15, 16)})), "(15, 16) float32, expected"),
    "integers": (weights(lambda t: t.update({Q3: torch.ones(16, 16, dtype=torch.int8)})), "int8"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 999), "not a complete"),
    "weights a pipe": (pipe("model.safetensors"), "model.safetensors: not a regular file"),
    "shard missing": (write("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}'),
                      "gone.safetensors: no such file"),
    "tokenizer absent": (remove("tokenizer.model"), "tokenizer.json: no such file"),
    "tokenizer garbage": (write("tokenizer.model", b"garbage"), "not a sentencepiece model"),
    "NaN in weights": (weights(lambda t: t[Q3].fill_(float("nan"))), "infinity in the residual stream"),
    "NaN in the head": (weights(lambda t: t["lm_head.weight"].fill_(float("nan"))), "infinity in the logits"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case, box):
    damage, message = FOLDERS[case]
    damage(box / "pieces")
    (box / "pieces.safetensors").unlink()
    assert_refused(run(ask(box), box), message)


class Panic(BaseException):
    """As the tokenizers package's PanicException, which is not an Exception."""


def test_a_tokenizer_json_that_lies_or_panics(box, monkeypatch):
    """A control token has the id that the library gives it, whatever the file lists."""
    path = box / "bytes" / "tokenizer.json"
    data = json.loads(path.read_text())
    right = data["added_tokens"][0]["id"]
    data["model"]["vocab"].update({token["content"]: token["id"] for token in data["added_tokens"]})
    data["added_tokens"][0]["id"] += 1
    path.write_text(json.dumps(data))
    tokenizer = Tokenizer(box / "bytes", 999)
    assert tokenizer.prompt("Whip it.").ids[0] == right

    def panic(*args, **named):
        raise Panic("index out of bounds")
    tokenizer.words.tokens = SimpleNamespace(encode=panic, decode=panic, id_to_token=panic)
    for call in (lambda: tokenizer.prompt("x"), lambda: tokenizer.decode([1]), lambda: tokenizer.piece(1)):
        with pytest.raises(ValueError, match="tokenizer.json: the tokenizers package cannot use it"):
            call()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert_refused(run(ask(box, "bytes"), box), "needs one more package: pip install tokenizers")


def test_vocabularies_that_do_not_fit(box):
    size = json.loads((box / "bytes" / "config.json").read_text())["vocab_size"]
    for folder, vocabulary, format, message in (
            ("pieces", 2048, "chatml", "tokens of this vocabulary are not those of chat format chatml"),
            ("bytes", size, "mistral-v3", "not those of chat format mistral-v3, which has '[INST]'"),
            ("bytes", size - 1, None, f"{size} pieces, the model's vocabulary is {size - 1}"),
            ("pieces", 2049, None, "2048 pieces, the model's vocabulary is 2049")):
        with pytest.raises(ValueError, match=re.escape(message)):
            Tokenizer(box / folder, vocabulary, format)


# ---------------------------------------------------------------------------------------------------------
# By name: flags. {few} is a file of the content below

FILES = {"empty.txt": b"\n \n", "binary.txt": b"\xff\xfe\x00\x01", "few.txt": b"one\ntwo\ntwo\n",
         "columns.csv": b"a,b\n1,2\n", "quote.csv": b'prompt\n"x\n'}
FLAGS = {
    "--analyze": "not allowed with",
    "--aplha 3": "unrecognized arguments: --aplha",
    "--model /nowhere": "/nowhere/config.json: no such file",
    f"--model {__file__}": "config.json: no such file",
    "--harmful {empty}": "0 distinct prompts, 4 anchors requested",
    "--harmful /nowhere.txt": "/nowhere.txt: no such file",
    "--harmful {binary}": "binary.txt: 'utf-8' codec",
    "--harmful {few}": "2 distinct prompts, 4 anchors requested",
    "--harmful {columns}": "none of the columns",
    "--harmful {quote}": "unexpected end of data",
    "--anchors 1": "1 is not from 2 to",
    "--steer-layers 2-4": "layers 2-4: the model has layers 0-3",
    "--classify-layers 3-2": "layers 3-2",
    "--steer-layers 2..3": "invalid layer_range value: '2..3'",
    "--device abacus": "device abacus: not available",
    "--device cuda:77": "device cuda:77: not available",
    "--device hpu": "device hpu: not available",
    "--device meta": "device meta: not available",
    "--dtype int8": "invalid choice: 'int8'",
    "--format gpt": "invalid choice: 'gpt'",
    "--alpha nan": "nan is not from 0",
    "--threshold nan": "nan is not from -2",
    "--max-new-tokens 0": "0 is not from 1",
    "--vectors {binary}": "not an intact vectors file",
    "--vectors /": "not a regular file",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, box):
    for name, content in FILES.items():
        (box / name).write_bytes(content)
    more = flags.format(**{Path(name).stem: box / name for name in FILES})
    assert_refused(run(["--device", "cpu", *ask(box), *more.split()], box), FLAGS[flags])


@pytest.mark.parametrize("args, message", [
    ([], "one of the arguments"), (["--prompt", " \n"], "the prompt is empty"),
    (["--prompt", "\udcff"], "surrogates not allowed"), (["--prompt", "egg " * 999], "context is 128"),
    (["--prompt", "x", "--vectors", ""], "not a regular file")])
def test_prompts(args, message, box):
    assert_refused(run([*ask(box)[:-2], *args], box), message)


# ---------------------------------------------------------------------------------------------------------
# At random

CASES = int(os.environ.get("CASES", 240))
ODD = [None, True, "", "8", "x" * 300, -1, 0, 1, 3, 1.5, float("inf"), float("nan"), 10**400, [], [[2]], {}]


def spoil(value, rng):
    """A value somewhere inside a JSON value is replaced or removed."""
    while isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.4 or not value[key] or not isinstance(value[key], (dict, list)):
            value[key] = rng.choice(ODD)
            return
        value = value[key]


def damaged(data, path, rng):
    """The bytes of a file with one thing wrong: a flipped bit, a cut, a splice, or an odd JSON value."""
    i, n = rng.randrange(len(data) + 1), rng.choice([1, 8, 100])
    if rng.random() < 0.3 and path.suffix == ".json":
        value = json.loads(data)
        spoil(value, rng)
        return json.dumps(value).encode()
    if rng.random() < 0.4 and i < len(data):
        return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
    return rng.choice([data[:i], data + data[i:], data[:i] + rng.randbytes(n) + data[i + n:], b"",
                       data[:i] + data[i + n:], data[:i] + b"9" * 5000 + data[i:], rng.randbytes(n)])


def fault(seed, models, box):
    """What is wrong with the outcome of case `seed`, or None."""
    rng = random.Random(seed)
    shutil.copytree(models, box)
    model = rng.choice(["pieces", "bytes"])
    path = rng.choice([box / f"{model}.safetensors", *sorted((box / model).iterdir())])
    path.write_bytes(damaged(path.read_bytes(), path, rng))
    before = {file: file.read_bytes() for file in box.rglob("*") if file.is_file()}
    status, out, said = run(ask(box, model), box)
    after = {file: file.read_bytes() for file in box.rglob("*") if file.is_file()}
    shutil.rmtree(box)
    lines = [line for line in said.splitlines() if line.startswith("scans.py: ")]
    if status not in (0, 2):
        return f"{path.name}: {status}"
    if status == 2 and (len(lines) != 1 or not said.endswith(lines[0] + "\n")):
        return f"{path.name}: not one last line: {said}"
    if status == 0 and path.parent == box:
        return f"{path.name}: damaged vectors are used"
    return f"{path.name}: files have changed" if after != before else None


@pytest.mark.parametrize("part", range(8))
def test_damage_at_random(part, models, tmp_path):
    for seed in range(part, CASES, 8):
        assert fault(seed, models, tmp_path / "box") is None, f"case {seed}"
