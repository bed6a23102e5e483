"""Proof of port_transformers.py: on data/tiny and SmolLM2 beside scans.py, on other families beside Eq. 6."""
import contextlib
import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import scans
from data.golden import port_transformers as port
from data.golden.compare import GOLDEN, Comparison, read_safetensors
from data.golden.make import QUERIES, int32
from data.smollm2.__main__ import write_folder
from tokenizer import Tokenizer

TINY = ROOT / "data" / "tiny"
ROWS = csv.DictReader((ROOT / "data" / "overrefusal.csv").read_text(encoding="utf-8").splitlines())
HELD_OUT = [row["prompt"] for row in ROWS if row["note"] == "embedded model, held out"]


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    torch.set_num_threads(1)
    return port.load(TINY, vectors=tmp_path_factory.mktemp("ported") / "v.safetensors", max_new_tokens=40)


@contextlib.contextmanager
def watched(model):
    """Within it, two lists per block: its outputs before steering, and what the next module is given."""
    before, after = ([[] for _ in model.blocks] for _ in range(2))
    handles = []
    for l, (block, following) in enumerate(zip(model.blocks, [*model.blocks[1:], model.decoder.norm])):
        handles += [block.register_forward_hook(lambda module, given, x, l=l: before[l].append(x)),
                    following.register_forward_pre_hook(lambda module, given, l=l: after[l].append(given[0]))]
    yield before, after
    for handle in handles:
        handle.remove()


# ----------------------------------------------------------------------------------------------------
# data/tiny, SmolLM2


def test_it_passes_the_comparison(ported):
    golden, meta, _ = read_safetensors(GOLDEN)
    model, vectors, chosen = ported.model, ported.vectors, ported.settings
    t = {name: x for name, x in vars(vectors).items() if name in golden} | {"T": torch.tensor([chosen.T])}
    for kind, texts in zip(("harmful", "harmless"), scans.draw_anchors(TINY)):
        streams = scans.read_streams(model, [ported.tokenizer.prompt(text) for text in texts])
        t[f"anchors.{kind}.mean"] = streams[:, :, 0].mean(0)
        t[f"anchors.{kind}.a_t"] = scans.transition(streams)
    for name, text in QUERIES.items():
        if name == "control":                   # the port refuses it
            continue
        prompt, shown = ported.tokenizer.prompt(text), []
        x, = model.forward(torch.tensor([prompt.ids]), torch.arange(prompt.e + 1)[None])[1]     # (L, N, D)
        with watched(model) as (_, after):
            result, = ported.answer([text], show=shown.append)
        default, steered = ([id for id in ids if id != 2] for ids in shown[-1])
        strength = torch.tensor([result["sigma"] * chosen.alpha])
        steer, = scans.steering(vectors.v_r, strength, chosen.steer_layers)
        t |= {f"{name}.{key}": value for key, value in {
            "ids": int32(*prompt.ids), "p": int32(prompt.p), "e": int32(prompt.e),
            **{f"block{l}.x": stream for l, stream in enumerate(x)}, "a_t": x[:, prompt.p] - x[:, prompt.e],
            "cos": torch.tensor(result["cosines"]), "s_q": torch.tensor([result["score"]]),
            "sigma": int32(result["sigma"]), "steer": steer,
            # calls of a block: the decision, the prompt, the steps; the second row is steered
            "steered_x": torch.stack([calls[1][1, -1] for calls in after]),
            "steered_x_next": torch.stack([calls[2][1, -1] for calls in after]),
            "default_ids": int32(*default), "scans_ids": int32(*steered)}.items()}
    mine = {name: x.detach().numpy() for name, x in t.items() if name in golden}
    lines, status = Comparison(golden, meta, mine).report()
    assert status == 0 and f"same: {len(mine)} of {len(mine)} tensors" in lines[-1], lines


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_its_held_out_answers_are_those_of_the_core(penalty, ported, tmp_path):
    core = scans.load(TINY, vectors=tmp_path / "v.safetensors", max_new_tokens=40, repetition_penalty=penalty)
    theirs = port.Scans(ported.model, ported.tokenizer, ported.vectors,
                        dataclasses.replace(ported.settings, repetition_penalty=penalty))
    for i in range(0, 110, 10):
        for mine, other in zip(core.answer(HELD_OUT[i:i + 10]), theirs.answer(HELD_OUT[i:i + 10])):
            for key in ("score", "cosines"):
                assert other.pop(key) == pytest.approx(mine.pop(key), abs=1e-5)
            assert other == mine


def test_the_scores_of_smollm2_agree(tmp_path):
    try:
        write_folder(tmp_path / "smollm2")
    except ValueError as error:
        pytest.skip(str(error))
    core, theirs = (module.load(tmp_path / "smollm2", vectors=tmp_path / f"{module.__name__}.safetensors",
                                anchors=4, T=0.5, max_new_tokens=4) for module in (scans, port))
    for mine, other in zip(core.answer(HELD_OUT[:2]), theirs.answer(HELD_OUT[:2])):
        for key in ("score", "cosines"):
            assert other.pop(key) == pytest.approx(mine.pop(key), abs=1e-4)
        assert other == mine


# ----------------------------------------------------------------------------------------------------
# Other families, several devices, r_pos

SIZES = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
         "sliding_window": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = transformers.LlamaConfig(**SIZES)


def write_model(folder, config):
    """A folder with a random model of a transformers config and the tokenizer of data/tiny."""
    torch.manual_seed(0)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    getattr(transformers, kind).from_config(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3"])
def test_steering_of_other_families_is_eq_6_and_nothing_else(family, dtype, tmp_path):
    config = getattr(transformers, f"{family}Config")(**SIZES)
    theirs = port.load(write_model(tmp_path, config), vectors=tmp_path / "v.safetensors", anchors=8,
                       dtype=dtype, max_new_tokens=5)
    T = sorted(result["score"] for result in theirs.answer(HELD_OUT[:3]))[1]        # both signs occur
    theirs.settings = chosen = dataclasses.replace(theirs.settings, T=T)
    with watched(theirs.model) as (before, after):
        results = theirs.answer(HELD_OUT[:3])
    sigma = [result["sigma"] for result in results]
    assert sorted(sigma) == [-1, 1, 1]
    strength = torch.tensor([0, 0, 0] + sigma) * chosen.alpha               # of the six rows
    steer = scans.steering(theirs.vectors.v_r, strength, chosen.steer_layers).to(getattr(torch, dtype))
    for l in range(6):
        assert len(before[l]) == 6
        for x, y in zip(before[l][1:], after[l][1:]):       # the first call was the decision
            expected = x.clone()
            expected[:, -1] += steer[:, l]
            assert torch.equal(y, expected)
        difference = after[l][1][3:] - after[l][1][:3]                      # of the prompt, (3, N, D)
        assert not any(row[-1 - result["p"]:-1].any() for row, result in zip(difference, results))
        if l == chosen.steer_layers[0]:
            rounding = torch.finfo(steer.dtype).eps * float(after[l][1].abs().max())
            torch.testing.assert_close(difference[:, -1], steer[3:, l], rtol=0, atol=rounding)
    theirs.settings = dataclasses.replace(chosen, alpha=0.0)
    assert all(result["default"] == result["steered"] for result in theirs.answer(HELD_OUT[:3]))


def test_after_an_exception_nothing_stays_hooked(ported):
    def fail(answers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ported.answer(HELD_OUT[:1], show=fail)
    assert not any(block._forward_hooks for block in ported.model.blocks)


def test_a_model_split_over_memory_and_disk_gives_the_same_answers(ported, tmp_path):
    pytest.importorskip("accelerate")
    outer = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    where = dict.fromkeys(outer, "cpu") | {f"model.layers.{l}": "cpu" if l < 6 else "disk" for l in range(12)}
    split = port.load(TINY, vectors=tmp_path / "v.safetensors", device_map=where, max_new_tokens=40)
    assert split.model.lm.model.layers[7].mlp.up_proj.weight.is_meta
    assert split.answer(HELD_OUT[:4]) == ported.answer(HELD_OUT[:4])


def test_r_pos_of_several_tokens(ported):
    chat = port.Chat(ported.tokenizer.tokenizer, TINY, "Sure, here you are")
    core = Tokenizer(TINY, 2048)
    core.format = dataclasses.replace(core.format, r_pos=" Sure, here you are")
    for question in HELD_OUT[:20]:
        prompt = chat.prompt(question)
        assert prompt == core.prompt(question) and prompt.e - prompt.p > 3
    several = port.Scans(ported.model, chat, ported.vectors, ported.settings)
    assert several.answer(HELD_OUT[:1])[0]["default"] == ported.answer(HELD_OUT[:1])[0]["default"]


# ----------------------------------------------------------------------------------------------------
# The command


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["port_transformers.py", *map(str, words)])
    port.main()


def test_the_command_gives_the_object_that_the_core_gives(ported, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "--model", TINY, "--vectors", tmp_path / "v.safetensors", "--json", "--prompt",
            HELD_OUT[0], "--max-new-tokens", 40)
    result = json.loads(capsys.readouterr().out)
    assert result.pop("settings")["steer_layers"] == "4-7" and [result] == ported.answer(HELD_OUT[:1])


@pytest.mark.parametrize("message, config, template", [
    ("it has an encoder", transformers.T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1), "x"),
    ("no ModuleList called layers", transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4), "x"),
    ("its tokenizer has no chat template", LLAMA, None),
    ("the tokenizer joins 'Sure' to", LLAMA, "{{ messages[0].content }} Answer: "),
    ("no system", LLAMA, "{{ raise_exception('no system') }}"),
    ("the prompt spells </s>", LLAMA, "{{ messages[0].content }}"),
])
def test_what_cannot_be_used_is_one_line(message, config, template, tmp_path, monkeypatch, capfd):
    write_model(tmp_path, config)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--model", tmp_path, "--vectors", tmp_path / "v", "--prompt", "a</s>")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("port_transformers.py: ") and message in err.splitlines()[-1]
