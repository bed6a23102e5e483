"""The Llama forward pass, written out: config, weights, residual stream, key/value cache, decoding.

Serves every Hugging Face folder of Llama shape (Llama-2, Vicuna, TinyLlama, Mistral v0.1 and v0.2). What activation steering
needs from a model is two arguments of `forward`: `steer`, added to the residual stream after each block, and `read`, the
positions whose residual stream is handed back. Both are plain tensors; nothing is patched, and no state outlives a call.

References: Llama 2 (arXiv 2307.09288), RMSNorm (1910.07467), rotary positions (2104.09864), SwiGLU (2002.05202),
grouped-query attention (2305.13245), sliding windows (2310.06825).
Left out on purpose: quantised weights, rope scaling other than linear, tensor parallelism, speculative decoding.

Letters of every shape comment below (and of the weight table):
    B rows of a batch     T positions of this call     S slots of the cache     P positions read     V vocabulary
    D model width         L blocks                     H query heads            K key/value heads    E width of a head
    F mlp width
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """The fields of config.json that shape the forward pass. `from_folder` reads them; absent keys mean what FIELDS say."""
    D: int                  # hidden_size, width of the residual stream
    L: int                  # num_hidden_layers, blocks
    H: int                  # num_attention_heads
    K: int                  # num_key_value_heads; absent: H (multi-head attention)
    E: int                  # head_dim; absent: D / H
    F: int                  # intermediate_size, width of the mlp
    V: int                  # vocab_size
    context: int            # max_position_embeddings, or max_sequence_length where a stretched model states it
    norm_eps: float         # rms_norm_eps
    rope_theta: float       # base of the rotary frequencies; absent: 10000
    rope_factor: float      # linear position interpolation; 1 without rope_scaling
    window: int | None      # sliding_window of Mistral v0.1: a key further back is not seen
    tied: bool              # tie_word_embeddings: the output embedding is the input embedding; absent: false
    eos: tuple[int, ...]    # ids that end an answer: generation_config.json's, else config.json's

    @classmethod
    def from_folder(cls, folder):
        """Read config.json (and generation_config.json) of `folder`. Raises ValueError for what is not plain Llama."""
        path = Path(folder) / "config.json"
        c = read_json(path)

        def need(key):
            if c.get(key) is None:
                raise ValueError(f"{path}: no {key}")
            return c[key]

        kind = (c.get("architectures") or ["none"])[0]
        if kind not in ("LlamaForCausalLM", "MistralForCausalLM"):
            raise ValueError(f"{path}: architecture {kind}, need LlamaForCausalLM or MistralForCausalLM")
        for key, fine in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("quantization_config", None)):
            if c.get(key, fine) not in (fine, None):
                raise ValueError(f"{path}: {key} = {c[key]} is not supported, only {fine}")
        rope = {"rope_theta": c.get("rope_theta"), **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type not in ("default", "linear"):
            raise ValueError(f"{path}: rope_scaling of type {rope_type} is not supported, only linear")
        if rope_type == "linear" and not rope.get("factor"):
            raise ValueError(f"{path}: linear rope_scaling without a factor")
        heads, width = need("num_attention_heads"), need("hidden_size")
        eos = c.get("eos_token_id")
        if (path.parent / "generation_config.json").exists():
            chosen = read_json(path.parent / "generation_config.json").get("eos_token_id")
            eos = eos if chosen is None else chosen
        try:
            config = cls(
                D=width, L=need("num_hidden_layers"), H=heads, K=c.get("num_key_value_heads") or heads,
                E=c.get("head_dim") or width // heads, F=need("intermediate_size"), V=need("vocab_size"),
                context=max(need("max_position_embeddings"), c.get("max_sequence_length") or 0),
                norm_eps=float(need("rms_norm_eps")), rope_theta=float(rope["rope_theta"] or 1e4),
                rope_factor=float(rope["factor"]) if rope_type == "linear" else 1.0,
                window=c.get("sliding_window") if kind == "MistralForCausalLM" else None,
                tied=c.get("tie_word_embeddings") or False,
                eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
            if min(config.D, config.L, config.H, config.K, config.E, config.F, config.V, config.context) < 1 or config.H % config.K:
                raise ValueError
        except (TypeError, ValueError, ZeroDivisionError):
            raise ValueError(f"{path}: a size is no positive number, or {heads} heads do not share "
                             f"{c.get('num_key_value_heads')} key/value heads evenly") from None
        return config


def read_json(path):
    """The object in a JSON file; ValueError names the file if it is absent or holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, need an object")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a block

# Half precision that this CPU has no instructions for: torch then multiplies one number at a time.
SLOW = {dtype for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
        if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)())}


# CPUs on which a packed bfloat16 matrix is known to be worth it
PACKS = torch.bfloat16 not in SLOW and torch.backends.cpu.get_cpu_capability() == "AVX512"


def widen(x, slow=SLOW):
    """x in float32 where its own precision, one of `slow`, is slow on a CPU; as it is elsewhere."""
    return x.float() if x.device.type == "cpu" and x.dtype in slow else x


def pack(field, weight):
    """A matrix (out, in) in the order in which this CPU multiplies bfloat16 fastest, where that pays: decoding is then bound by the
    reading of the weights, for two rows as for one. Opaque to all but `linear`; to_dense() gives the plain one back. The rows of embed
    are looked up, so it stays as it is."""
    if PACKS and field != "embed" and weight.dim() == 2 and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    return weight


def linear(x, weight):
    """x (..., in) times weight (out, in), plain or packed. Where half precision is slow, more than 8 rows go through float32, the weight
    widened piece by piece so that it stays in the cache; up to 8 rows are faster as they are (measured on two AVX2 cores)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if widen(weight[:0]).dtype == weight.dtype or x.shape[:-1].numel() <= 8:
        return F.linear(x, weight)
    wide = x.float()
    return torch.cat([F.linear(wide, piece.float()) for piece in weight.split(512)], -1).to(x.dtype)


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis, in float32; rounded to the stream's dtype before the weight, as the models were trained."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rotary(pos, config, dtype):
    """cos and sin of the rotation at positions pos (B, T): each (B, T, 1, E/2), the 1 for the heads. Angles are float32."""
    freq = config.rope_theta ** -(torch.arange(0, config.E, 2, device=pos.device).float() / config.E) / config.rope_factor
    angle = (pos[..., None].float() * freq)[:, :, None]                                      # (B, T, 1, E/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each head of x (B, T, heads, E). Half-split form: dimension i goes with i + E/2, not with its neighbour."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def project(block, h, cos, sin, config):
    """Queries (B, T, H, E), keys and values (B, T, K, E) of h (B, T, D); queries and keys turned to their positions."""
    B, T, _ = h.shape
    q = linear(h, block.wq).view(B, T, config.H, config.E)
    k = linear(h, block.wk).view(B, T, config.K, config.E)
    v = linear(h, block.wv).view(B, T, config.K, config.E)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def attend(block, q, k, v, mask):
    """Attention of q (B, T, H, E) over k and v (B, S, K, E), then the output projection: (B, T, D). mask None: causal, S = T."""
    B, T, H, E = q.shape
    slow = (torch.bfloat16, torch.float16) if T == 1 else SLOW  # one query a row: torch's half kernels take 5 times the float32 one's time
    qkv = [widen(t, slow).transpose(1, 2) for t in (q, k, v)]                                # heads before positions
    o = F.scaled_dot_product_attention(*qkv, mask, is_causal=mask is None, enable_gqa=H != k.shape[2])
    return linear(o.to(q.dtype).transpose(1, 2).reshape(B, T, H * E), block.wo)


def mlp(block, h):
    """SwiGLU: (B, T, D) -> (B, T, F) twice -> (B, T, D)."""
    return linear(F.silu(linear(h, block.w_gate)) * linear(h, block.w_up), block.w_down)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Cache:
    """Keys and values of all blocks. Row b has `length[b]` slots filled; the next forward writes behind them.

    Cutting a row back is setting its length: what lies behind is never attended to, and is written over.
    """
    def __init__(self, config, rows, slots, like):
        # zeros, not empty: a masked slot has weight 0, and 0 times garbage may be NaN
        self.kv = torch.zeros(config.L, 2, rows, slots, config.K, config.E, dtype=like.dtype, device=like.device)
        self.length = torch.zeros(rows, dtype=torch.long)  # stays on the CPU: reading it must not wait for a GPU

    def store(self, l, k, v, pos, S):
        """Put the new k and v (B, T, K, E) of block l at positions pos (B, T); return those of the first S slots, (B, S, K, E)."""
        row = torch.arange(len(pos), device=pos.device)[:, None]                             # (B, 1)
        self.kv[l, 0, row, pos], self.kv[l, 1, row, pos] = k, v
        return self.kv[l, 0, :, :S], self.kv[l, 1, :, :S]

    def rows(self, index):
        """A new cache with the rows `index` of this one: repeated, reordered or left out."""
        new = object.__new__(Cache)
        new.kv, new.length = self.kv[:, :, index], self.length[index]
        return new


class Llama:
    """Weights as tensors: embed (V, D), blocks[l].NAME (see BLOCK), norm (D), head (V, D), matrices packed where `pack` does it; their
    config; and the dtype that their file has."""

    def __init__(self, config, embed, blocks, norm, head):
        self.config, self.embed, self.blocks, self.norm, self.head, self.stored = config, embed, blocks, norm, head, embed.dtype

    def forward(self, ids, cache=None, steer=None, read=None):
        """Run ids (B, T), the positions after those in the cache (all from 0 without one).

        steer: (B, L, D) or None, added after block l at EVERY position of this call (Eq. 6): give it only positions from p on.
        read: (B, P) or None, indices into this call's positions.
        Returns x (B, T, D), the stream after the last block, and the streams read (B, L, P, D) after each block, before
        the final norm; None where nothing is read. Rows padded on the right stay right: set cache.length afterwards.
        """
        config, (B, T) = self.config, ids.shape
        start = torch.zeros(B, dtype=torch.long) if cache is None else cache.length
        S = int(start.max()) + T
        if S > config.context:
            raise ValueError(f"{S} tokens, the model's context is {config.context}")
        pos = (start[:, None] + torch.arange(T)).to(ids.device)                              # (B, T)
        cos, sin = rotary(pos, config, self.embed.dtype)
        if S == T <= (config.window or T):
            mask = None             # nothing cached, all in the window: plainly causal, and no mask is ever made
        else:
            slot = torch.arange(S, device=ids.device)
            mask = slot <= pos[..., None]                                                    # (B, T, S)
            if config.window:
                mask &= slot > pos[..., None] - config.window
            mask = mask[:, None]                                                             # (B, 1, T, S)
        streams = []

        x = F.embedding(ids, self.embed)                                                     # (B, T, D)
        for l, block in enumerate(self.blocks):
            q, k, v = project(block, rms_norm(x, block.attn_norm, config.norm_eps), cos, sin, config)
            if cache is not None:
                k, v = cache.store(l, k, v, pos, S)
            x = x + attend(block, q, k, v, mask)
            x = x + mlp(block, rms_norm(x, block.mlp_norm, config.norm_eps))
            if steer is not None:
                x = x + steer[:, l, None]                                                    # Eq. 6
            if read is not None:
                streams.append(x[torch.arange(B, device=x.device)[:, None], read])           # (B, P, D)
        if cache is not None:
            cache.length = start + T
        return x, torch.stack(streams, 1) if read is not None else None                      # (B, L, P, D)

    def size(self):
        """Number of parameters."""
        tensors = [self.embed, self.norm, *([] if self.config.tied else [self.head])]
        return sum(tensor.numel() for tensor in tensors + [tensor for block in self.blocks for tensor in vars(block).values()])

    def unembed(self, x):
        """Logits (..., V) in float32 of residual streams x (..., D) after the last block."""
        return linear(rms_norm(x, self.norm, self.config.norm_eps), self.head).float()


# ----------------------------------------------------------------------------------------------------------------------
# Loading

# field of a block: its name in the checkpoint between "model.layers.{l}." and ".weight", and its shape; HE is H times E
BLOCK = {
    "attn_norm": ("input_layernorm", "D"),
    "wq": ("self_attn.q_proj", "HE D"),
    "wk": ("self_attn.k_proj", "KE D"),
    "wv": ("self_attn.v_proj", "KE D"),
    "wo": ("self_attn.o_proj", "D HE"),
    "mlp_norm": ("post_attention_layernorm", "D"),
    "w_gate": ("mlp.gate_proj", "F D"),
    "w_up": ("mlp.up_proj", "F D"),
    "w_down": ("mlp.down_proj", "D F"),
}
OUTER = {"embed": ("model.embed_tokens.weight", "V D"), "norm": ("model.norm.weight", "D"), "head": ("lm_head.weight", "V D")}


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


def assemble(config, tensors):
    """The Llama of a dict of checkpoint tensors, one for each of `checkpoint_names`: the very tensors, so that training one trains the other."""
    outer, blocks = {}, [SimpleNamespace() for _ in range(config.L)]
    for name, (l, field, _) in checkpoint_names(config).items():
        (outer if l is None else vars(blocks[l]))[field] = tensors[name]
    return Llama(config, outer["embed"], blocks, outer["norm"], outer.get("head", outer["embed"]))


def weight_files(folder):
    """The weight files of a folder in order: safetensors if there are any, else pytorch_model*.bin; sharded ones by their index."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        paths, index = [folder / name], folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index}: no weight_map")
            paths = [folder / shard for shard in sorted(set(shards.values()))]
        if index.exists() or paths[0].exists():
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"{path}: no such file")
            return paths
    raise ValueError(f"{folder}: no model.safetensors, model.safetensors.index.json, pytorch_model.bin or pytorch_model.bin.index.json")


def read_tensors(path):
    """Yield (name, tensor) of one weight file, memory-mapped: pages are read when they are used."""
    try:
        if path.suffix == ".bin":
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
            return
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, "pt") as file:  # one mapping a tensor, so that a converted one frees its pages at once
                tensor = file.get_tensor(name)
            yield name, tensor
            del tensor
    except UnpicklingError:
        raise ValueError(f"{path}: not a pickle of tensors alone, and no other is opened; fetch the folder's safetensors") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole weight file ({str(error).partition(chr(10))[0] or 'empty'})") from None


def has_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def working_dtype(stored, device):
    """The dtype to compute in: the weights' own, but the other half precision where the device is without it, or where it is a CPU
    that is slow in float16 and packs bfloat16: that rounds the weights to 8 bits, and decodes 1.5 times, prefills 8 times as fast."""
    if stored == torch.bfloat16 and not has_bfloat16(device):
        return torch.float16
    if stored == torch.float16 and device.type == "cpu" and stored in SLOW and PACKS:
        return torch.bfloat16
    return stored


def load(folder, device=torch.device("cpu"), dtype=None):
    """Load a Hugging Face folder. dtype None: the weights' own, where the device computes in it. Tensors that need no conversion stay memory-mapped,
    others are converted or packed one by one, so that no second copy stands. Raises ValueError for missing, extra or misshapen tensors."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: a file, need a model's folder")
    config = Config.from_folder(folder)
    expected, tensors, stored = checkpoint_names(config), {}, None
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
                continue  # tables that old checkpoints carry along; the copy of a tied embedding
            if name not in expected or name in tensors:
                raise ValueError(f"{path}: tensor {name} {'stands twice' if name in expected else 'is not one of a Llama'}")
            _, field, shape = expected[name]
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)} {str(tensor.dtype)[6:]}, "
                                 f"config.json makes it {shape} of floats")
            stored, dtype = stored or tensor.dtype, dtype or working_dtype(tensor.dtype, device)
            tensor = tensor.to(device=device, dtype=dtype)
            tensors[name] = pack(field, tensor)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(expected)} tensors are missing, {min(missing)} the first")
    model = assemble(config, tensors)
    model.stored = stored
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""
    max_new_tokens: int = 256
    repetition_penalty: float = 1.0     # divides the positive logits of ids already seen, multiplies the negative ones
    temperature: float = 0.0            # 0: greedy
    top_p: float = 1.0                  # keep the fewest tokens whose probabilities reach top_p
    top_k: int = 0                      # keep the k best; 0: all
    seed: int = 0                       # each row draws from its own generator, so that a batch gives what single runs give

    def pick(self, logits, generator):
        """One id from logits (V)."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits, order = (logits / self.temperature).sort(descending=True)
        probs = logits.softmax(-1)
        keep = probs.cumsum(-1) - probs < self.top_p       # the token that crosses top_p is kept
        if self.top_k:
            keep[self.top_k:] = False
        return int(order[torch.multinomial(probs * keep, 1, generator=generator)])


@torch.inference_mode()
def generate(model, prompts, cache, steer=None, sampling=Sampling()):
    """Decode a batch. prompts: B lists of ids; cache: all but the last id of each has been run; steer: (B, L, D) or None.

    The last id of each prompt is run first, steered, and so is every new one. Yields once a step a list of
    (row, id, stopped): stopped is None while the row goes on, else why it ended: "eos" (id None), "length" or "context".
    A row that has ended leaves the batch.
    """
    device = model.embed.device
    alive = list(range(len(prompts)))
    ids = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)                  # (B, 1)
    seen = torch.zeros(len(prompts), model.config.V, dtype=torch.bool, device=device)        # (B, V): for the penalty
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    draw = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts]
    for step in range(1, sampling.max_new_tokens + 1):
        x, _ = model.forward(ids, cache, steer)
        logits = model.unembed(x[:, -1])                                                     # (B, V)
        if not logits.isfinite().all():
            b = int((~logits.isfinite().all(-1)).nonzero()[0])
            cache.length = cache.length - 1  # once more, to see where it began
            _, streams = model.forward(ids, cache, steer, read=torch.zeros_like(ids))        # (B, L, 1, D)
            bad = (~streams[b].isfinite().flatten(1).all(-1)).nonzero()                      # layers
            place = f"residual stream after layer {int(bad[0])}" if len(bad) else "logits, not in the residual stream"
            raise ValueError(f"NaN or infinity in the {place}, at new token {step} of the answer in row {alive[b]}")
        logits = torch.where(seen, torch.where(logits > 0, logits / sampling.repetition_penalty,
                                               logits * sampling.repetition_penalty), logits)
        out, keep = [], []
        for b, row in enumerate(alive):
            id, stopped = sampling.pick(logits[b], draw[row]), None
            if id in model.config.eos:
                id, stopped = None, "eos"
            elif len(prompts[row]) + step >= model.config.context:
                stopped = "context"
            elif step == sampling.max_new_tokens:
                stopped = "length"
            if stopped is None:
                keep.append(b)
            out.append((row, id, stopped))
        yield out
        if not keep:
            return
        ids = torch.tensor([[out[b][1]] for b in keep], device=device)
        if len(keep) < len(alive):
            alive, cache, seen = [alive[b] for b in keep], cache.rows(keep), seen[keep]
            steer = None if steer is None else steer[keep]
        seen[torch.arange(len(alive), device=device), ids[:, 0]] = True
