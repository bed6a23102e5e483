"""The Llama forward pass, written out: config, residual stream, key/value cache, weights, decoding.

Serves every Hugging Face folder of Llama shape: Llama 2 and 3, Vicuna, TinyLlama, SmolLM2, Mistral.

Activation steering needs two arguments of `forward`. `steer` is added to the residual stream after each
block. `read` names the positions whose residual stream is handed back. Both are plain tensors: there is no
hook, and no state outlives a call.

References: Llama 2 (arXiv 2307.09288), Llama 3 (2407.21783), RMSNorm (1910.07467), rotary positions
(2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245), sliding windows (2310.06825).

Left out on purpose: quantised weights, rope scaling other than linear and llama3, tensor parallelism.

Letters of every shape comment below, and of the weight table:
    B rows of a batch       T positions of this call    S slots of the cache    P positions read
    D model width           L blocks                    F mlp width             V vocabulary
    H query heads           K key/value heads           E width of a head
"""
import functools
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
    F: int                      # intermediate_size, width of the mlp
    V: int                      # vocab_size
    context: int                # max_position_embeddings, or max_sequence_length of a stretched model
    norm_eps: float             # rms_norm_eps
    rope_theta: float           # base of the rotary frequencies
    rope_factor: float          # divides the frequencies of rope_scaling; 1 without
    rope_bands: tuple | None    # of rope_type llama3: low_freq_factor, high_freq_factor, original context
    window: int | None          # sliding_window of Mistral v0.1: a key further back is not seen
    tied: bool                  # tie_word_embeddings: the output embedding is the input embedding
    eos: tuple[int, ...]        # ids that end an answer: generation_config.json's, else config.json's


def checked(what, value, kind, low, high):
    """value as a bool, int or float (kind) from low to high; else ValueError. A bool is no number."""
    types = (int, float) if kind is float else kind
    if not isinstance(value, types) or isinstance(value, bool) != (kind is bool) or not low <= value <= high:
        need = ("true or false" if kind is bool else
                f"{'an integer' if kind is int else 'a number'} from {low:g} to {high:g}")
        raise ValueError(f"{what} is {brief(value)}, need {need}")
    return kind(value)


def brief(value):
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


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
    """Rotary frequencies (E/2), in radians a position, float32."""
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
    """cos and sin of the rotation at positions pos (B, T): each (B, T, 1, E/2), the 1 for the heads."""
    angle = pos[..., None, None].float() * frequencies(config, pos.device)      # (B, T, 1, E/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each head of x (B, T, H, E). Half-split form: dimension i goes with i + E/2, not with i + 1."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def project(block, h, cos, sin, config):
    """Queries (B, T, H, E), keys and values (B, T, K, E) of h (B, T, D). Queries and keys are rotated."""
    B, T, _ = h.shape
    q = linear(h, block.wq).view(B, T, config.H, config.E)
    k = linear(h, block.wk).view(B, T, config.K, config.E)
    v = linear(h, block.wv).view(B, T, config.K, config.E)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def attend(block, q, k, v, mask):
    """Attention of q (B, T, H, E) over k and v (B, S, K, E), then the output projection: (B, T, D).

    mask: (B, 1, T, S), true where a query may look; None for plainly causal, where S = T.
    """
    B, T, H, E = q.shape
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))                            # heads before positions
    o = attention(q, k, v, mask)                                                # (B, H, T, E)
    return linear(o.transpose(1, 2).reshape(B, T, H * E), block.wo)


def mlp(block, h):
    """SwiGLU: (B, T, D) -> (B, T, F) twice -> (B, T, D)."""
    return linear(F.silu(linear(h, block.w_gate)) * linear(h, block.w_up), block.w_down)


# ---------------------------------------------------------------------------------------------------------
# The model


class Cache:
    """Keys and values of all blocks. Row b has `length[b]` slots filled; the next forward writes behind them.

    Cutting a row back is setting its length. What lies behind is never attended to, and is written over.
    """

    def __init__(self, config, rows, slots, like):
        # zeros, not empty: a masked slot has weight 0, and 0 times garbage may be NaN
        shape = (config.L, 2, rows, slots, config.K, config.E)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = torch.zeros(rows, dtype=torch.long)  # on the CPU: reading it must not wait for a GPU

    def store(self, l, k, v, pos, S):
        """Put k and v (B, T, K, E) of block l at pos (B, T); return its first S slots, (B, S, K, E) each."""
        row = torch.arange(len(pos), device=pos.device)[:, None]                # (B, 1)
        self.kv[l, 0, row, pos], self.kv[l, 1, row, pos] = k, v
        return self.kv[l, 0, :, :S], self.kv[l, 1, :, :S]

    def rows(self, index):
        """A new cache with the rows `index` of this one: repeated, reordered or left out."""
        new = object.__new__(Cache)
        new.kv, new.length = self.kv[:, :, index], self.length[index]
        return new


def sees(pos, S, window):
    """Which of S slots the queries at pos (B, T) may look at: (B, 1, T, S), the 1 for the heads."""
    slot = torch.arange(S, device=pos.device)
    mask = slot <= pos[..., None]                                               # (B, T, S)
    if window:
        mask &= slot > pos[..., None] - window
    return mask[:, None]


class Llama:
    """Weights as tensors: embed (V, D), blocks[l].NAME (see BLOCK), norm (D), head (V, D); and their config.

    `stored` is the dtype of the file that the weights come from.
    """

    def __init__(self, config, embed, blocks, norm, head):
        self.config, self.embed, self.blocks, self.norm, self.head = config, embed, blocks, norm, head
        self.stored = embed.dtype

    def forward(self, ids, cache=None, steer=None, read=None):
        """Run ids (B, T), the positions after those in the cache; all from 0 without a cache.

        steer: (B, L, D) or None, added after block l at EVERY position of this call (Eq. 6).
               Give a steered call only positions from p on.
        read:  (B, P) or None, indices into this call's positions.

        Returns x (B, T, D), the stream after the last block, and the streams read (B, L, P, D).
        These are taken after each block, before the final norm; None where nothing is read.
        Rows padded on the right stay right: set cache.length afterwards.
        """
        config, (B, T) = self.config, ids.shape
        start = torch.zeros(B, dtype=torch.long) if cache is None else cache.length
        S = int(start.max()) + T
        if S > config.context:
            raise ValueError(f"{S} tokens, the model's context is {config.context}")
        pos = (start[:, None] + torch.arange(T)).to(ids.device)                 # (B, T)
        cos, sin = rotary(pos, config, self.embed.dtype)
        causal = S == T <= (config.window or T)     # nothing cached, all in the window: no mask is made
        mask = None if causal else sees(pos, S, config.window)
        streams = []

        x = F.embedding(ids, self.embed)                                        # (B, T, D)
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

        if cache is not None:
            cache.length = start + T
        return x, torch.stack(streams, 1) if read is not None else None         # (B, L, P, D)

    def unembed(self, x):
        """Logits (..., V) in float32 of residual streams x (..., D) after the last block."""
        return linear(rms_norm(x, self.norm, self.config.norm_eps), self.head).float()

    def size(self):
        """Number of parameters."""
        outer = [self.embed, self.norm, *([] if self.config.tied else [self.head])]
        return sum(t.numel() for t in outer + [t for block in self.blocks for t in vars(block).values()])


# ---------------------------------------------------------------------------------------------------------
# Decoding

# field of Sampling: its type, the least and the most it may be
SAMPLING = {
    "max_new_tokens": (int, 0, 2**31),
    "repetition_penalty": (float, 1e-3, 1e3),
    "temperature": (float, 0, 1e3),
    "top_p": (float, 1e-6, 1),
    "top_k": (int, 0, 2**31),
    "seed": (int, 0, 2**63 - 1),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ValueError for a value outside of SAMPLING."""
    max_new_tokens: int = 256
    repetition_penalty: float = 1.0     # see `penalize`
    temperature: float = 0.0            # 0, or below 1e-4: greedy
    top_p: float = 1.0                  # keep the fewest tokens whose probabilities reach top_p
    top_k: int = 0                      # keep the k best; 0: all
    seed: int = 0                       # each row draws for itself: a batch gives what single runs give

    def __post_init__(self):
        for name, limits in SAMPLING.items():
            checked(name, getattr(self, name), *limits)

    def pick(self, logits, generator):
        """One id from logits (V)."""
        if self.temperature < 1e-4:
            return int(logits.argmax())
        probs, order = (logits / self.temperature).softmax(-1).sort(descending=True)
        keep = probs.cumsum(-1) - probs < self.top_p        # the token that crosses top_p is kept
        if self.top_k:
            keep[self.top_k:] = False

        # Each id has its own exponential noise, and the largest ratio wins (the Gumbel-max trick).
        # Walking the sorted probabilities would hang on the order of the tail, which rounding changes.
        noise = torch.empty(len(logits)).exponential_(generator=generator).to(logits.device)
        return int(order[(probs * keep / noise[order]).argmax()])


def penalize(logits, seen, penalty):
    """Logits (B, V), those of ids already seen (B, V, bool) made less likely. CTRL (1909.05858), section 4.1.

    The penalty divides positive logits and multiplies negative ones.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@torch.inference_mode()
def generate(model, prompts, cache, steer=None, sampling=Sampling()):
    """Decode a batch.

    prompts: B lists of ids; cache: all but the last id of each has been run; steer: (B, L, D) or None.
    The last id of each prompt is run first, steered, and so is every new one. Yields once a step a list of
    (row, id, stopped). stopped is None while the row goes on, else "eos" (id None), "length" or "context".
    A row that has ended leaves the batch.
    """
    device = model.embed.device
    alive = list(range(len(prompts)))
    ids = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)                     # (B, 1)
    seen = torch.zeros(len(prompts), model.config.V, dtype=torch.bool, device=device)           # (B, V)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    draw = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]

    for step in range(1, sampling.max_new_tokens + 1):
        x, _ = model.forward(ids, cache, steer)
        logits = model.unembed(x[:, -1])                                                        # (B, V)
        if not logits.isfinite().all():
            b = int((~logits.isfinite().all(-1)).nonzero()[0])
            raise ValueError(f"NaN or infinity in {first_not_finite(model, ids, cache, steer, b)}, "
                             f"at new token {step} of the answer in row {alive[b]}")
        logits = penalize(logits, seen, sampling.repetition_penalty)
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


def first_not_finite(model, ids, cache, steer, b):
    """Where NaN or infinity begins in row b: its last step, run once more with every layer read."""
    cache.length = cache.length - 1
    _, streams = model.forward(ids, cache, steer, read=torch.zeros_like(ids))                   # (B, L, 1, D)
    bad = (~streams[b].isfinite().flatten(1).all(-1)).nonzero()                                 # layers
    return f"the residual stream after layer {int(bad[0])}" if len(bad) else "the logits alone"


# ---------------------------------------------------------------------------------------------------------
# Reading config.json

PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}

# field of config.json: its type, the least and the most it may be, and what absence means (...: an error)
FIELDS = {
    "hidden_size":             (int, 1, 2**20, ...),
    "num_hidden_layers":       (int, 1, 999, ...),
    "num_attention_heads":     (int, 1, 2**16, ...),
    "num_key_value_heads":     (int, 1, 2**16, None),
    "head_dim":                (int, 2, 2**16, None),
    "intermediate_size":       (int, 1, 2**24, ...),
    "vocab_size":              (int, 1, 2**24, ...),
    "max_position_embeddings": (int, 1, 2**31, ...),
    "max_sequence_length":     (int, 1, 2**31, 0),
    "rms_norm_eps":            (float, 0, 1, ...),
    "sliding_window":          (int, 1, 2**31, None),
    "tie_word_embeddings":     (bool, False, True, False),
    "rope_theta":              (float, 1, 1e12, 1e4),
    "factor":                  (float, 1, 1e6, ...),
    "low_freq_factor":         (float, 1e-6, 1e6, ...),
    "high_freq_factor":        (float, 1e-6, 1e6, ...),
    "original_max_position_embeddings": (int, 1, 2**31, ...),
}


def take_field(c, path, key):
    """The value of a field of FIELDS in the object c, which was read from `path`."""
    kind, low, high, absent = FIELDS[key]
    if c.get(key) is not None:
        return checked(f"{path}: {key}", c[key], kind, low, high)
    if absent is ...:
        raise ValueError(f"{path}: no {key}")
    return absent


def read_rope(c, path):
    """rope_theta, rope_factor and rope_bands, from config.json itself, rope_scaling or rope_parameters."""
    rope = {"rope_theta": c.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(c.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} is {brief(c[key])}, need an object")
        rope.update(c.get(key) or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    take = functools.partial(take_field, rope, path)
    if kind == "default":
        return take("rope_theta"), 1.0, None
    if kind == "linear":
        return take("rope_theta"), take("factor"), None
    if kind != "llama3":
        raise ValueError(f"{path}: rope_scaling of type {brief(kind)}, only linear and llama3 are supported")
    low, high = take("low_freq_factor"), take("high_freq_factor")
    if low >= high:
        raise ValueError(f"{path}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return take("rope_theta"), take("factor"), (low, high, take("original_max_position_embeddings"))


def read_eos(c, path, V):
    """Ids that end an answer, all below V: generation_config.json goes before config.json."""
    eos, generation = c.get("eos_token_id"), path.with_name("generation_config.json")
    if generation.exists():
        chosen = read_json(generation).get("eos_token_id")
        eos, path = (eos, path) if chosen is None else (chosen, generation)
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(checked(f"{path}: eos_token_id", id, int, 0, V - 1) for id in ids)


def read_json(path):
    """The object in a JSON file. ValueError names the file if it is absent or holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, need an object")
    return value


def read_config(folder):
    """Read config.json and generation_config.json of a folder. ValueError for what is not plain Llama."""
    path = Path(folder) / "config.json"
    c = read_json(path)
    kind = c.get("architectures")
    if not isinstance(kind, list) or kind[:1] not in (["LlamaForCausalLM"], ["MistralForCausalLM"]):
        raise ValueError(f"{path}: architectures is {brief(kind)}, "
                         "need [\"LlamaForCausalLM\"] or [\"MistralForCausalLM\"]")
    for key, only in PLAIN.items():
        if c.get(key, only) not in (only, None):
            raise ValueError(f"{path}: {key} is {brief(c[key])}, only {brief(only)} is supported")

    take = functools.partial(take_field, c, path)
    D, H, V = take("hidden_size"), take("num_attention_heads"), take("vocab_size")
    K, E = take("num_key_value_heads") or H, take("head_dim") or D // H
    if H % K:
        raise ValueError(f"{path}: num_attention_heads {H} is no multiple of num_key_value_heads {K}")
    if E < 2 or E % 2:
        raise ValueError(f"{path}: head_dim is {E} (hidden_size {D}, {H} heads), need an even number")
    theta, factor, bands = read_rope(c, path)
    return Config(
        D=D, L=take("num_hidden_layers"), H=H, K=K, E=E, F=take("intermediate_size"), V=V,
        context=max(take("max_position_embeddings"), take("max_sequence_length")),
        norm_eps=take("rms_norm_eps"), rope_theta=theta, rope_factor=factor, rope_bands=bands,
        window=take("sliding_window") if kind[0] == "MistralForCausalLM" else None,
        tied=take("tie_word_embeddings"), eos=read_eos(c, path, V))


# ---------------------------------------------------------------------------------------------------------
# Reading the weights

# field of a block: its name in the checkpoint between "model.layers.{l}." and ".weight", and its shape.
# HE is H times E.
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


def assemble(config, tensors):
    """The Llama of a dict of checkpoint tensors. It holds the very tensors: training one trains the other."""
    outer, blocks = {}, [SimpleNamespace() for _ in range(config.L)]
    for name, (l, field, _) in checkpoint_names(config).items():
        (outer if l is None else vars(blocks[l]))[field] = tensors[name]
    return Llama(config, outer["embed"], blocks, outer["norm"], outer.get("head", outer["embed"]))


def weight_files(folder):
    """The weight files of a folder: safetensors if there are any, else .bin. An index names the shards."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, paths = folder / f"{name}.index.json", [folder / name]
        if index.exists():
            shards = read_json(index).get("weight_map")
            names = list(shards.values()) if isinstance(shards, dict) else []
            if not names or not all(isinstance(shard, str) for shard in names):
                raise ValueError(f"{index}: weight_map is {brief(shards)}, need an object of file names")
            paths = [folder / shard for shard in sorted(set(names))]
        if index.exists() or paths[0].exists():
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"{path}: no such file")
            return paths
    raise ValueError(f"{folder}: no model.safetensors, model.safetensors.index.json, "
                     "pytorch_model.bin or pytorch_model.bin.index.json")


def read_tensors(path):
    """Yield (name, tensor) of one weight file, memory-mapped: pages are read when they are used."""
    if path.suffix == ".bin":
        yield from read_pickle(path).items()
        return
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            # one mapping a tensor, so that a converted one frees its pages at once
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
            yield name, tensor
            del tensor
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a whole weight file ({first_line(error)})") from None


def read_pickle(path):
    """{name: tensor} of a .bin file. Nothing but tensors is ever unpickled."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:      # a damaged pickle can raise anything
        raise ValueError(f"{path}: not a whole pickle of tensors alone, and no other is opened; "
                         f"fetch the folder's safetensors ({first_line(error)})") from None
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided and t.is_cpu
            for name, t in tensors.items()):
        raise ValueError(f"{path}: holds no dict of dense tensors")
    return tensors


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__


def load(folder, device=torch.device("cpu"), dtype=None):
    """Load a Hugging Face folder. dtype None: that of the weights, where the device computes in it.

    Tensors that need no conversion stay memory-mapped. Others are converted one by one, so that no second
    copy stands. Raises ValueError for missing, extra or misshapen tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'a file, need a folder' if folder.exists() else 'no such folder'}")
    config = read_config(folder)
    expected, tensors, stored = checkpoint_names(config), {}, None
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
                continue    # tables that old checkpoints carry along; the copy of a tied embedding
            if name not in expected or name in tensors:
                fault = "stands twice" if name in expected else "is not one of a Llama"
                raise ValueError(f"{path}: tensor {name} {fault}")
            _, field, shape = expected[name]
            if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
                raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)} {str(tensor.dtype)[6:]}, "
                                 f"config.json makes it {shape} of float32, bfloat16 or float16")
            stored, dtype = stored or tensor.dtype, dtype or working_dtype(tensor.dtype, device)
            tensors[name] = pack(field, tensor.to(device=device, dtype=dtype))
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(expected)} tensors are missing, "
                         f"{min(missing)} the first")
    model = assemble(config, tensors)
    model.stored = stored
    return model


def working_dtype(stored, device):
    """The dtype to compute in: that of the weights, but float16 on a GPU that has no bfloat16."""
    missing = {
        "cuda": lambda: not torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": lambda: not torch.backends.mps.is_macos_or_newer(14, 0),
    }.get(device.type, lambda: False)
    return torch.float16 if stored == torch.bfloat16 and missing() else stored


# ---------------------------------------------------------------------------------------------------------
# How a matrix is multiplied here
#
# Nothing below changes what is computed, only how fast a CPU does it. To read the method, think of
# `linear` as F.linear, of `attention` as F.scaled_dot_product_attention, and of `pack` as the identity.


def linear(x, weight):
    """x (..., in) times weight (out, in), which may be packed: (..., out)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if x.device.type == "cpu" and x.shape[:-1].numel() > 8 and is_slow(x.dtype):
        # Widened piece by piece, so that a piece stays in the CPU's cache.
        # 128 rows of float16 take a fifth of the time this way; up to 8 rows are faster as they are.
        wide = x.float()
        return torch.cat([F.linear(wide, piece.float()) for piece in weight.split(512)], -1).to(x.dtype)
    return F.linear(x, weight)


def attention(q, k, v, mask):
    """Scaled dot product attention of q (B, H, T, E) over k and v (B, K, S, E): (B, H, T, E)."""
    dtype, grouped = q.dtype, q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1 and q.device.type == "cpu" and dtype != torch.float32:
        # torch's half precision kernel for one query of grouped heads takes five times that of float32,
        # which is a quarter of a whole step of decoding at 600 positions
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped).to(dtype)


@functools.cache
def is_slow(dtype):
    """Has this CPU no instructions for a half precision? torch then multiplies one number at a time."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return dtype in names and not getattr(torch.ops.mkldnn, names[dtype])()
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def can_pack():
    """Has this CPU a packed product of bfloat16, equal to the plain one? Only AVX512 gains by it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or is_slow(torch.bfloat16):
        return False
    x = torch.linspace(-1, 1, 64).view(2, 32).bfloat16()
    weight = torch.linspace(-1, 1, 1536).view(48, 32).bfloat16()
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.allclose(linear(x, packed), F.linear(x, weight), atol=0.05, rtol=0.02)
    except (AttributeError, RuntimeError):
        return False


def pack(field, weight):
    """A bfloat16 matrix (out, in) in the order that a CPU with AVX512 reads fastest; others as they are.

    Decoding takes half the time. A packed matrix is opaque to all but `linear`; to_dense() gives it back.
    """
    packs = weight.dtype == torch.bfloat16 and weight.dim() == 2 and weight.device.type == "cpu"
    if not packs or field == "embed" or not can_pack():      # the rows of embed are looked up
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)
