"""Make what other models need: random models of other shapes, and the ids of every chat format.

shapes/, shapes.safetensors    three small random models in the layout of a Hugging Face folder; a pass and a
                               greedy answer of each by port_numpy.py, which tests compare with transformers
formats.json, vocabulary/      ids of every chat format, by the embedded model's tokenizer; where the tags are
                               control tokens, by a small vocabulary that has them

models.md explains how to use them; make.py calls this file. Left out: text for the random models.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file

import llama
from data.golden import port_numpy
from tokenizer import FORMATS, Tokenizer

MODEL = Path(__file__).resolve().parent.parent / "tiny"

# ----------------------------------------------------------------------------------------------------
# Other shapes

COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu",
          "bos_token_id": 1}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
# name: what its config.json has besides COMMON; dtype of its weights, number of their files, and their seed:
# the first with no near tie among the logits, and an answer that a repetition penalty of 1.1 would change
SHAPES = {
    "grouped": ({**LLAMA, "num_key_value_heads": 2, "head_dim": 12, "rope_theta": 5e3,
                 "rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": False,
                 "eos_token_id": [2, 3]}, torch.float32, 1, 2),
    "window": ({**MISTRAL, "num_key_value_heads": 1, "rope_theta": 1e6, "sliding_window": 6,
                "tie_word_embeddings": True, "eos_token_id": 2}, torch.bfloat16, 2, 2),
    "llama3": ({**LLAMA, "num_key_value_heads": 2, "head_dim": 16,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e2, "factor": 8.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 64},
                "tie_word_embeddings": True, "eos_token_id": 2}, torch.float16, 1, 5),
}
LENGTH, ANSWER = 20, 12     # ids of a pass, and of its answer at most


def write_shape(folder, settings, dtype, files, seed):
    """A folder with config.json and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **settings}, indent=1) + "\n")
    letters = {**port_numpy.read_config(folder), "M": COMMON["intermediate_size"], "V": COMMON["vocab_size"]}
    draw, weights = torch.Generator().manual_seed(seed), {}
    for name, (_, _, shape) in llama.checkpoint_names(SimpleNamespace(**letters)).items():
        x = torch.randn(shape, generator=draw)
        weights[name] = (0.2 * x if len(shape) > 1 else 1 + 0.1 * x).to(dtype)      # norms are around 1
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, where = list(weights), {}
    for i in range(files):
        path = f"model-{i + 1:05}-of-{files:05}.safetensors"
        some = {name: weights[name] for name in names[i::files]}
        save_file(some, folder / path, metadata={"format": "pt"})
        where.update(dict.fromkeys(some, path))
    index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def shape_tensors(folder, name):
    """({name: array}, gaps): a pass over random ids, a greedy answer, and the gap of its two best logits."""
    model = port_numpy.load(folder)
    ids = np.random.default_rng(0).integers(4, COMMON["vocab_size"], LENGTH).astype(np.int32)
    ids[0], p, e = COMMON["bos_token_id"], LENGTH - 3, LENGTH - 1
    answer = port_numpy.greedy(model, ids[:p + 1], None, ANSWER)
    logits = port_numpy.forward(model, np.append(ids[:p + 1], answer))["logits"][p:][:ANSWER]   # (steps, V)
    best = np.sort(logits.astype(np.float32))[:, -2:]
    t = port_numpy.shown(port_numpy.forward(model, ids), p, e)
    t = {"ids": ids, "p": np.int32([p]), "e": np.int32([e]), **t, "default_ids": answer}
    t = {f"{name}.{key}": x if x.dtype.kind == "i" else x.astype(np.float32) for key, x in t.items()}
    return t, [round(gap, 4) for gap in (best[:, 1] - best[:, 0]).tolist()]


def make_shapes(out):
    """Write shapes/ and shapes.safetensors."""
    tensors, queries = {"max_new_tokens": np.int32([ANSWER])}, []
    for name, shape in SHAPES.items():
        write_shape(out / "shapes" / name, *shape)
        found, gaps = shape_tensors(out / "shapes" / name, name)
        tensors.update(found)
        queries.append({"name": name, "query": "random ids", "gaps": {"default": gaps}})
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}
    save_file(tensors, out / "shapes.safetensors", metadata={"queries": json.dumps(queries)})


# ----------------------------------------------------------------------------------------------------
# Ids of every chat format

SYSTEMS = (None, "", " Answer in one sentence. ")           # None: the format's own
TEXTS = ("\n How do I beat an egg?  ", "</s> [/INST] <|user|> é🍳")
BOS, EOS = "<|begin|>", "<|end|>"                           # of vocabulary/, besides the formats' own


def make_vocabulary(folder):
    """Write a folder with a byte-level tokenizer.json that has the control tokens of all formats."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    controls = [BOS, EOS, *(name for chat in FORMATS.values() for name in chat.controls)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=controls, show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokens.train([str(MODEL / "harmless.txt")], trainer)
    tokens.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
    return tokens.get_vocab_size()


def make_formats(out):
    """Write vocabulary/ and formats.json: ids, p and e of every format, without and with a system prompt."""
    sizes = {MODEL: llama.read_config(MODEL).V, out / "vocabulary": make_vocabulary(out / "vocabulary")}
    cases = []
    for name, chat in FORMATS.items():
        folder = out / "vocabulary" if chat.controls else MODEL
        for system in SYSTEMS:
            if system is None and not chat.default_system or system and not chat.system:
                continue
            tokenizer = Tokenizer(folder, sizes[folder], name, system)
            for query in TEXTS:
                prompt = tokenizer.prompt(query)
                cases.append({
                    "format": name, "tokenizer": "vocabulary" if chat.controls else "../tiny",
                    "system": tokenizer.system if system is None else system, "query": query,
                    "ids": prompt.ids, "p": prompt.p, "e": prompt.e})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (out / "formats.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
