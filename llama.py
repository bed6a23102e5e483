"""The Llama forward pass, written out: config, residual stream, key/value cache, greedy decoding, weights.

It serves Hugging Face folders of Llama's shape: Llama 2 and 3, Vicuna, TinyLlama, SmolLM2, Mistral.

Activation steering needs two arguments of `forward`. `steer` is added to the residual stream after each
block. `read` names the positions whose residual stream is returned. Both are plain tensors: there are no
hooks, and no state outlives a call.

References: Llama 2 (arXiv 2307.09288), Llama 3 (2407.21783), RMSNorm (1910.07467), rotary positions
(2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245), sliding windows (2310.06825).

Left out on purpose: sampling, biases, quantised weights, rope scaling other than linear and llama3.

Letters used in shape comments and in the weight table:
    B rows of a batch       N positions of this call    S slots of the cache    P positions read
    D model width           L blocks                    M mlp width             V vocabulary
    H query heads           K key/value heads           E width of a head
"""
import copy
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# ---------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """What config.json says about the forward pass."""
    D: int                      # hidden_size, width of the residual stream
    L: int                      # num_hidden_layers, blocks
    H: int                      # num_attention_heads
    K: int                      # num_key_value_heads; absent: H (multi-head attention)
    E: int                      # head_dim; absent: D / H
    M: int                      # intermediate_size, width of the mlp
    V: int                      # vocab_size
    context: int                # max_position_embeddings, or max_sequence_length of a stretched model
    norm_eps: float             # rms_norm_eps
    rope_theta: float           # base of the rotary frequencies
    rope_factor: float          # divides the frequencies of rope_scaling; 1 without
    rope_bands: tuple | None    # of rope_type llama3: low_freq_factor, high_freq_factor, original context
    window: int | None          # sliding_window of Mistral v0.1: a key further back is not seen
    tied: bool                  # tie_word_embeddings: the output embedding is the input embedding
    eos: tuple[int, ...]        # ids that end an answer: generation_config.json's, else config.json's


# ---------------------------------------------------------------------------------------------------------
# The parts of a block


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis, in float32.

    Rounded to the stream's dtype before the weight is multiplied, as the models were trained.
    """
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def frequencies(config, device):
    """Rotary frequencies (E/2), in radians per position, float32."""
    freq = config.rope_theta ** -(torch.arange(0, config.E, 2, device=device).float() / config.E)   # (E/2)
    if config.rope_bands is None:
        return freq / config.rope_factor

    # Llama 3: a wave that turns less than `low` times in the original context is stretched by the factor.
    # One that turns more than `high` times stays. Between them the two are blended.
    low, high, original = config.rope_bands
    turns = original * freq / (2 * math.pi)                                     # (E/2)
    stay = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (stay + (1 - stay) / config.rope_factor)


def rotary(pos, config, dtype):
    """cos and sin of the rotation at positions pos (B, N): each (B, N, 1, E/2), the 1 for the heads."""
    angle = pos[..., None, None].float() * frequencies(config, pos.device)      # (B, N, 1, E/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each head of x (B, N, H, E). Half-split form: dimension i goes with i + E/2, not with i + 1."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def project(block, h, cos, sin, config):
    """Queries (B, N, H, E), keys and values (B, N, K, E) of h (B, N, D). Queries and keys are rotated."""
    B, N, _ = h.shape
    q = linear(h, block.wq).view(B, N, config.H, config.E)
    k = linear(h, block.wk).view(B, N, config.K, config.E)
    v = linear(h, block.wv).view(B, N, config.K, config.E)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def attend(block, q, k, v, mask):
    """Attention of q (B, N, H, E) over k and v (B, S, K, E), then the output projection: (B, N, D).

    mask: (B, 1, N, S), true where a query may look; None for plainly causal, where S = N.
    """
    B, N, H, E = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)                                 # heads before positions
    if N == 1:      # the heads that share a key stand where positions would: many times faster on a CPU
        o = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, E), k, v, mask)
    else:
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)
    return linear(o.reshape(B, N, H * E), block.wo)


def mlp(block, h):
    """SwiGLU: (B, N, D) -> (B, N, M) twice -> (B, N, D)."""
    return linear(F.silu(linear(h, block.w_gate)) * linear(h, block.w_up), block.w_down)


# ---------------------------------------------------------------------------------------------------------
# The model


class Cache:
    """Keys and values of all blocks. Row b has `length[b]` slots filled; the next forward fills later ones.

    Cutting a row back is setting its length. Later slots are never attended to, and are overwritten.
    """

    def __init__(self, config, rows, slots, like):
        # zeros, not empty: a masked slot has weight 0, and 0 times garbage may be NaN
        shape = (config.L, 2, rows, slots, config.K, config.E)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = torch.zeros(rows, dtype=torch.long)  # on the CPU: reading it must not wait for a GPU

    def store(self, l, k, v, pos, S):
        """Put k and v (B, N, K, E) of block l at pos (B, N); return its first S slots, (B, S, K, E) each."""
        row = torch.arange(len(pos), device=pos.device)[:, None]                # (B, 1)
        self.kv[l, 0, row, pos], self.kv[l, 1, row, pos] = k, v
        return self.kv[l, 0, :, :S], self.kv[l, 1, :, :S]

    def rows(self, index):
        """A new cache with the rows `index` of this one: repeated, reordered or left out."""
        new = copy.copy(self)
        new.kv, new.length = self.kv[:, :, index], self.length[index]
        return new


def sees(pos, S, window):
    """Which of S slots the queries at pos (B, N) may look at: (B, 1, N, S), the 1 for the heads."""
    slot = torch.arange(S, device=pos.device)
    mask = slot <= pos[..., None]                                               # (B, N, S)
    if window:
        mask &= slot > pos[..., None] - window
    return mask[:, None]


def check_finite(x, what):
    """x (B, ...), if no number in it is NaN or infinite; otherwise a ValueError that names the row."""
    bad = ~x.isfinite().flatten(1).all(1)                                       # (B)
    if bad.any():
        raise ValueError(f"NaN or infinity in {what}, row {int(bad.nonzero()[0])} of {len(x)}: the weights, "
                         "config.json or alpha are out of range; in float16 it may help to use float32")
    return x


class Llama:
    """The weights: embed (V, D), blocks[l].NAME (see BLOCK), norm (D), head (V, D); and their config."""

    def __init__(self, config, tensors):
        """tensors: by their names in the checkpoint. They are kept as they are, not copied."""
        self.config, self.blocks = config, [SimpleNamespace() for _ in range(config.L)]
        self.size = sum(tensor.numel() for tensor in tensors.values())      # parameters
        for name, (l, field, _) in checkpoint_names(config).items():
            setattr(self if l is None else self.blocks[l], field, tensors[name])
        if config.tied:
            self.head = self.embed

    def forward(self, ids, cache=None, steer=None, read=None):
        """Run ids (B, N), at the positions that follow the cache's; from 0 without a cache.

        steer: (B, L, D) or None, added after block l at EVERY position of this call (Eq. 6).
               Give a steered call only positions from p on.
        read:  (B, P) or None, indices into this call's positions.

        Returns x (B, N, D), the stream after the last block, and the streams read (B, L, P, D).
        These are taken after each block, before the final norm; None where nothing is read.
        Rows padded on the right are correct up to their padding: set cache.length afterwards.
        Raises ValueError for more positions than the context has, and for NaN or infinity in the stream.
        """
        config, (B, N) = self.config, ids.shape
        start = torch.zeros(B, dtype=torch.long) if cache is None else cache.length
        S = int(start.max()) + N
        if S > config.context:
            raise ValueError(f"{S} tokens, the model's context is {config.context}")
        pos = (start[:, None] + torch.arange(N)).to(ids.device)                 # (B, N)
        cos, sin = rotary(pos, config, self.embed.dtype)
        causal = S == N <= (config.window or N)     # nothing cached, all in the window: no mask is made
        mask = None if causal else sees(pos, S, config.window)
        streams = []

        x = F.embedding(ids, self.embed)                                        # (B, N, D)
        for l, block in enumerate(self.blocks):
            q, k, v = project(block, rms_norm(x, block.attn_norm, config.norm_eps), cos, sin, config)
            if cache is not None:
                k, v = cache.store(l, k, v, pos, S)
            x = x + attend(block, q, k, v, mask)
            x = x + mlp(block, rms_norm(x, block.mlp_norm, config.norm_eps))
            if steer is not None:
                x = x + steer[:, l, None]                                       # Eq. 6
            if read is not None:
                streams.append(x[torch.arange(B, device=x.device)[:, None], read])              # (B, P, D)

        check_finite(x, "the residual stream")      # once is enough: every block adds to what was there
        if cache is not None:
            cache.length = start + N
        return x, torch.stack(streams, 1) if read is not None else None         # (B, L, P, D)

    def unembed(self, x):
        """Logits (..., V) in float32 of residual streams x (..., D) after the last block."""
        return linear(rms_norm(x, self.norm, self.config.norm_eps), self.head).float()


# ---------------------------------------------------------------------------------------------------------
# Greedy decoding


@torch.inference_mode()
def generate(model, prompts, cache, steer=None, max_new_tokens=256, repetition_penalty=1.0):
    """Decode a batch greedily.

    prompts: B lists of ids; cache: all but the last id of each has been run; steer: (B, L, D) or None.
    The last id of each prompt is run first, steered, and so is every new one. After each step yields
    (answers, stopped), one entry per row: the new ids so far, and None while the row continues, else "eos"
    (an id that is left out), "length" or "context". A row that has ended leaves the batch.
    """
    device, context = model.embed.device, model.config.context
    answers, stopped, rows = [[] for _ in prompts], [None] * len(prompts), list(range(len(prompts)))
    ids = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)                     # (B, 1)
    seen = torch.zeros(len(prompts), model.config.V, dtype=torch.bool, device=device)           # (B, V)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True

    for step in range(1, max_new_tokens + 1):
        x, _ = model.forward(ids, cache, steer)
        logits = check_finite(model.unembed(x[:, -1]), "the logits")                            # (B, V)
        # ids already seen are made less likely: CTRL (1909.05858), section 4.1
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        ids = torch.where(seen, penalized, logits).argmax(-1, keepdim=True)                     # (B, 1)
        seen.scatter_(1, ids, True)
        for row, id in zip(rows, ids[:, 0].tolist()):
            if id in model.config.eos:
                stopped[row] = "eos"
                continue
            answers[row].append(id)
            if len(prompts[row]) + step >= context:
                stopped[row] = "context"
            elif step == max_new_tokens:
                stopped[row] = "length"
        yield answers, stopped

        keep = [b for b, row in enumerate(rows) if stopped[row] is None]
        if not keep:
            return
        if len(keep) < len(rows):
            rows, ids, seen, cache = [rows[b] for b in keep], ids[keep], seen[keep], cache.rows(keep)
            steer = None if steer is None else steer[keep]


# ---------------------------------------------------------------------------------------------------------
# Reading a folder: config.json


def regular_file(path):
    """The Path of a regular file: reading a pipe in its place would wait forever."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return path


def read_json(path):
    """The object in a JSON file."""
    path = regular_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


SUPPORTED = {"architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"]), "hidden_act": ("silu", None),
             "attention_bias": (False, None), "mlp_bias": (False, None), "quantization_config": (None,),
             "rope_type": ("default", "linear", "llama3", None)}


def read_config(folder):
    """The Config of a folder. ValueError for what is not plain Llama, with the file and the field."""
    path = Path(folder) / "config.json"
    c, generation = read_json(path), path.with_name("generation_config.json")

    def take(key, kind=int, absent=None):
        """The positive number, or the bool, at a key; `absent` where the key is missing or null."""
        value = absent if c.get(key) is None else c[key]
        if type(value) not in (kind, int) or not (kind is bool or 0 < value < 2**40):
            raise ValueError(f"{path}: {key} is {value!r:.60}, expected a positive {kind.__name__}")
        return kind(value)

    for key in ("rope_scaling", "rope_parameters"):     # their fields are lifted to those of config.json
        rope = c.get(key) or {}
        if rope and not (isinstance(rope, dict) and {"type", "rope_type"} & rope.keys()):
            raise ValueError(f"{path}: {key} is {rope!r:.60}, expected an object with a rope_type")
        for name, value in rope.items():
            name = "rope_type" if name == "type" else name
            if c.get(name) not in (None, value):
                raise ValueError(f"{path}: {name} is {value!r:.60} in {key}, but {c[name]!r:.60} elsewhere")
            c[name] = value
    for key, values in SUPPORTED.items():
        if c.get(key) not in values:
            raise ValueError(f"{path}: {key} is {c.get(key)!r:.60}, expected one of {values}")

    L, D, H = take("num_hidden_layers"), take("hidden_size"), take("num_attention_heads")
    K, E = take("num_key_value_heads", absent=H), take("head_dim", absent=D // H)
    if L > 1000 or H % K or E % 2:
        raise ValueError(f"{path}: {L} layers, {H} heads of width {E}, {K} key/value heads; expected at most "
                         "1000 layers, an even width, and key/value heads that divide the heads")
    kind, bands = c.get("rope_type") or "default", None
    if kind == "llama3":
        bands = (take("low_freq_factor", float), take("high_freq_factor", float),
                 take("original_max_position_embeddings"))
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = c.get("eos_token_id", []) if eos is None else eos
    eos = eos if isinstance(eos, list) else [eos]
    if not all(type(id) is int for id in eos):
        raise ValueError(f"{path}: eos_token_id is {eos!r:.60}, expected integers")
    sliding = c["architectures"] == ["MistralForCausalLM"] and c.get("sliding_window") is not None
    return Config(
        D=D, L=L, H=H, K=K, E=E, M=take("intermediate_size"), V=take("vocab_size"),
        context=max(take("max_position_embeddings"), take("max_sequence_length", absent=1)),
        norm_eps=take("rms_norm_eps", float), rope_theta=take("rope_theta", float, 1e4),
        rope_factor=1.0 if kind == "default" else take("factor", float), rope_bands=bands,
        window=take("sliding_window") if sliding else None,
        tied=take("tie_word_embeddings", bool, False), eos=tuple(eos))


# ---------------------------------------------------------------------------------------------------------
# Reading a folder: the weights

# field of a block: its name in the checkpoint between "model.layers.{l}." and ".weight", and its shape.
# HE is H times E.
BLOCK = {
    "attn_norm": ("input_layernorm", "D"),
    "wq": ("self_attn.q_proj", "HE D"),
    "wk": ("self_attn.k_proj", "KE D"),
    "wv": ("self_attn.v_proj", "KE D"),
    "wo": ("self_attn.o_proj", "D HE"),
    "mlp_norm": ("post_attention_layernorm", "D"),
    "w_gate": ("mlp.gate_proj", "M D"),
    "w_up": ("mlp.up_proj", "M D"),
    "w_down": ("mlp.down_proj", "D M"),
}
OUTER = {
    "embed": ("model.embed_tokens.weight", "V D"),
    "norm": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def checkpoint_names(config):
    """{name in the checkpoint: (block or None, field, shape)} of every tensor a model of this config has."""
    def shape(letters):
        return tuple(math.prod(getattr(config, letter) for letter in word) for word in letters.split())
    names = {name: (None, field, shape(letters)) for field, (name, letters) in OUTER.items()}
    if config.tied:
        del names["lm_head.weight"]
    for l in range(config.L):
        for field, (name, letters) in BLOCK.items():
            names[f"model.layers.{l}.{name}.weight"] = (l, field, shape(letters))
    return names


def open_files(folder):
    """{name of a tensor: its open file}, of model.safetensors or of the shards that an index names.

    The files are memory-mapped: pages are read when they are used.
    """
    index, names, files = folder / "model.safetensors.index.json", {"model.safetensors"}, {}
    if index.exists():
        shards = read_json(index).get("weight_map")
        names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    elif not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder}: no model.safetensors. If the main revision has only pytorch_model.bin, "
                         "another may have it: refs/pr/3 of vicuna-7b-v1.5, refs/pr/13 of vicuna-13b-v1.5")
    for path in sorted(folder / name for name in names):
        try:
            file = safe_open(regular_file(path), "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
        files.update(dict.fromkeys(file.keys(), file))
    return files


def load(folder, device=torch.device("cpu"), dtype=None):
    """The Llama of a Hugging Face folder. dtype None: that of the weights.

    Tensors that need no conversion stay memory-mapped. Others are converted one by one, so that no second
    copy of the model exists. Raises ValueError for missing, unknown or misshapen tensors.
    """
    config, files = read_config(folder), open_files(Path(folder))
    expected, tensors, identity = checkpoint_names(config), {}, hashlib.sha256(repr(config).encode())
    for name in sorted(files.keys() ^ expected.keys()):
        if not name.endswith("rotary_emb.inv_freq") and not (config.tied and name == "lm_head.weight"):
            raise ValueError(f"{folder}: tensor {name} is {'missing' if name in expected else 'unknown'}; "
                             f"there are {len(files)}, expected {len(expected)}")
    for name, (_, field, shape) in expected.items():
        tensor = files[name].get_tensor(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
            raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)} {str(tensor.dtype)[6:]}, "
                             f"expected {shape} in float32, bfloat16 or float16")
        some = tensor.flatten()[::tensor.numel() // 256 + 1].contiguous()       # training moves nearly all
        identity.update(some.view(torch.uint8).numpy().tobytes())
        tensors[name] = pack(field, tensor.to(device=device, dtype=dtype))
    model = Llama(config, tensors)
    model.fingerprint = identity.hexdigest()[:16]
    return model


# ---------------------------------------------------------------------------------------------------------
# How a matrix is multiplied here
#
# Nothing below changes what is computed, only how fast a CPU does it. To read the method, think of
# `linear` as F.linear, and of `pack` as the identity.


def linear(x, weight):
    """x (..., in) times weight (out, in), which may be packed: (..., out)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def pack(field, weight):
    """A bfloat16 matrix (out, in) in the order that a CPU with AVX512 reads fastest; others as they are.

    Decoding takes half the time. A packed matrix is opaque to all but `linear`; to_dense() unpacks it.
    """
    operators = torch.ops.mkldnn    # private ones: if this torch lacks them, the matrix stays plain
    if (weight.dtype == torch.bfloat16 and weight.dim() == 2 and weight.device.type == "cpu"
            and field != "embed"    # its rows are looked up
            and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and hasattr(operators, "_linear_pointwise") and hasattr(operators, "_reorder_linear_weight")
            and operators._is_mkldnn_bf16_supported()):
        return operators._reorder_linear_weight(weight)
    return weight
