"""Table 4: speed and memory of one query (bench), and speed beside transformers (versus).

Prompts are random ids, and so are the weights of a --shape: what a machine would do with a model that is not
there yet. A row names what is measured, then what against. The two run in turn, so that whatever else the
machine does hits both alike.

The other side of versus is transformers' generate with forward hooks that add the vectors, and a first pass
of its own to classify: the way the public code works. Both sides share the very weight tensors, except for
the matrices that `llama.pack` rearranges.
"""
import dataclasses
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F

import llama
from data.experiments.core import show
from scans import COUNT, DATA, FLAGS, Scans, choose_device, choose_settings, extract_vectors, report, say
from tokenizer import FORMATS, Prompt

SHAPES = {  # D, L, H, K, M of TinyLlama-1.1B, Llama-2-7b, Llama-2-13b
    "1b": (2048, 22, 32, 4, 5632), "7b": (4096, 32, 32, 32, 11008), "13b": (5120, 40, 40, 40, 13824)}
PROMPT, NEW = 128, 64       # tokens of a query and of its answer
ANCHORS, ANCHOR = 64, 24    # anchors of each kind, and tokens of each: as long as most are


class RandomPrompts:
    """Stands in for a tokenizer: whatever the question, n random ids, and one for r_pos."""
    format = FORMATS["llama-2"]

    def __init__(self, vocabulary, n):
        self.vocabulary, self.n, self.generator = vocabulary, n, torch.Generator().manual_seed(0)

    def prompt(self, question):
        ids = torch.randint(self.vocabulary, (self.n + 1,), generator=self.generator).tolist()
        return Prompt(ids, self.n - 1, self.n)

    def decode(self, ids):
        return ""


def random_weights(args, pack):
    """Config and tensors of a shape, random, made where they stay. ValueError if they will not fit."""
    (D, L, H, K, M), device = SHAPES[args.shape], choose_device(args.device)
    dtype = getattr(torch, args.dtype or "bfloat16")
    config = llama.Config(D=D, L=L, H=H, K=K, E=D // H, M=M, V=32000, context=4096, norm_eps=1e-5,
                          rope_theta=1e4, rope_factor=1.0, rope_bands=None, window=None, tied=False, eos=())
    names, tensors = llama.checkpoint_names(config), {}
    size = sum(math.prod(size) for _, _, size in names.values()) * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cpu" and size > memory:      # without this check, the machine might freeze
        raise ValueError(f"{size / 1e9:.1f} GB of weights, {memory / 1e9:.1f} GB of memory")
    noise = (0.02 * torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for name, (_, field, size) in names.items():
        tensor = torch.ones(size, device=device, dtype=dtype)   # as norms are
        if len(size) > 1:
            for piece in tensor.view(-1).split(len(noise)):     # the same noise over and over: quick
                piece.copy_(noise[:len(piece)])
        tensors[name] = pack(field, tensor)
    return config, tensors


def random_method(model):
    """A Scans of random prompts, and the Prompts of its anchors, harmful and harmless."""
    draw = RandomPrompts(model.config.V, ANCHOR)
    anchors = [[draw.prompt("") for _ in range(ANCHORS)] for _ in range(2)]
    vectors = extract_vectors(model, *anchors)
    settings = choose_settings(vectors, "llama-2", T=0.5, max_new_tokens=NEW)
    return Scans(model, RandomPrompts(model.config.V, PROMPT), vectors, settings), anchors


@torch.inference_mode()
def prefill(method, ids):
    """A cache of all ids of one instruction but the last, with room for an answer."""
    cache = llama.Cache(method.model.config, 1, PROMPT + NEW, method.model.embed)
    method.model.forward(torch.tensor([ids[:-1]], device=method.model.embed.device), cache)
    return cache


def plain(method, ids):
    """The new ids of a greedy answer without SCANS."""
    *_, (answers, _) = llama.generate(method.model, [ids], prefill(method, ids), None, NEW)
    return answers[0]


def our_pairs(method):
    ids = method.tokenizer.prompt("").ids[:-1]
    return {f"prompt of {PROMPT} tokens, against the decision on it":
            (lambda: prefill(method, ids), lambda: method.decide(["x"])),
            f"answer of {NEW} tokens without SCANS, against with SCANS":
            (lambda: plain(method, ids), lambda: method.answer(["x"], default=False)),
            "one answer with SCANS, against both answers":
            (lambda: method.answer(["x"], default=False), lambda: method.answer(["x"]))}


# ---------------------------------------------------------------------------------------------------------
# The other side


def as_transformers(config, tensors):
    """The same model in transformers' hands, on the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = LlamaConfig(
        hidden_size=config.D, num_hidden_layers=config.L, num_attention_heads=config.H, vocab_size=config.V,
        num_key_value_heads=config.K, head_dim=config.E, intermediate_size=config.M, eos_token_id=None,
        max_position_embeddings=config.context, rms_norm_eps=config.norm_eps, pad_token_id=0)
    with torch.device("meta"):
        model = LlamaForCausalLM(theirs)
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(theirs).to(model.device)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def their_plain(theirs, ids):
    ids = torch.tensor([ids], device=theirs.device)
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)


@torch.inference_mode()
def their_scans(theirs, method):
    """Classify in a pass of its own, then generate with a hook on every steered block."""
    prompt, settings = method.tokenizer.prompt(""), method.settings
    states = theirs(torch.tensor([prompt.ids], device=theirs.device), output_hidden_states=True).hidden_states
    cos = [F.cosine_similarity((states[l + 1][0, prompt.p] - states[l + 1][0, prompt.e]).float().cpu(),
                               method.vectors.d_harm[l], dim=0) for l in settings.classify_layers]
    sigma = 1 if sum(cos) / len(cos) >= settings.T else -1

    def add(l):
        vector = (sigma * settings.alpha * method.vectors.v_r[l]).to(theirs.device, theirs.dtype)

        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            x[:, prompt.p if x.shape[1] > 1 else 0:] += vector
        return hook
    hooks = [theirs.model.layers[l].register_forward_hook(add(l)) for l in settings.steer_layers]
    their_plain(theirs, prompt.ids[:-1])
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def their_extraction(theirs, harmful, harmless):
    """Single passes: every anchor as it is, and the harmful ones with r_pos once more."""
    for ids in [a.ids[:-1] for a in harmful + harmless] + [a.ids for a in harmful]:
        theirs(torch.tensor([ids], device=theirs.device), output_hidden_states=True)


def their_pairs(theirs, method, anchors):
    ids = method.tokenizer.prompt("").ids[:-1]
    return {"plain generation, against transformers":
            (lambda: plain(method, ids), lambda: their_plain(theirs, ids)),
            "SCANS, one answer, against transformers with hooks":
            (lambda: method.answer(["x"], default=False), lambda: their_scans(theirs, method)),
            f"extraction, {ANCHORS} + {ANCHORS} anchors, against single passes":
            (lambda: extract_vectors(method.model, *anchors), lambda: their_extraction(theirs, *anchors))}


# ---------------------------------------------------------------------------------------------------------
# The commands


def timed(work):
    """Seconds of work(); a GPU has ended by then."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(pairs, model, args):
    """Print a row for each pair of works, run in turn; a first round, which is slower, is not counted."""
    if args.threads:
        torch.set_num_threads(args.threads)
    say(f"model     {args.shape or args.model}: {model.size / 1e6:.1f} M parameters, "
        f"{str(model.embed.dtype)[6:]} on {model.embed.device}, {torch.get_num_threads()} threads")
    rows = []
    for name, works in pairs.items():
        report(name)
        rounds = [[timed(work) for work in works] for _ in range(args.trials + 1)][1:]
        first, second = (statistics.median(seconds) for seconds in zip(*rounds))
        ratios = sorted(b / a for a, b in rounds)
        rows.append({"what": name, "first": first, "second": second, "ratio": statistics.median(ratios),
                     "least": ratios[0], "most": ratios[-1]})
    if model.embed.is_cuda:
        say(f"memory    at most {torch.cuda.max_memory_allocated() / 1e6:.0f} MB of the GPU")
    show({"speed": rows}, args.json)


def flags(parser):
    parser.add_argument("--dtype", choices=FLAGS["dtype"][0], help="default: that of --model, or bfloat16")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--threads", type=COUNT, metavar="N", help="CPU threads")
    parser.add_argument("--trials", metavar="N", type=COUNT, default=5, help="rounds, 5")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def bench_flags(parser):
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape")
    what.add_argument("--model", metavar="DIR", default=DATA / "tiny", help="default: the embedded model")
    flags(parser)


def versus_flags(parser):
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="random weights, 1b")
    flags(parser)


def bench(args):
    """Speed and memory of one query: without SCANS, with it, both answers."""
    if args.shape:
        model = llama.Llama(*random_weights(args, llama.pack))
    else:
        model = llama.load(args.model, choose_device(args.device), args.dtype and getattr(torch, args.dtype))
        model.config = dataclasses.replace(model.config, eos=())    # no answer ends before its length
    compare(our_pairs(random_method(model)[0]), model, args)


def versus(args):
    """Speed against transformers with forward hooks, as ratios of seconds: the other side's to ours."""
    config, tensors = random_weights(args, lambda field, tensor: tensor)
    theirs, names = as_transformers(config, tensors), llama.checkpoint_names(config)
    model = llama.Llama(config, {name: llama.pack(names[name][1], tensors[name]) for name in names})
    method, anchors = random_method(model)
    compare(our_pairs(method) | their_pairs(theirs, method, anchors), model, args)
    ids = method.tokenizer.prompt("").ids[:-1]
    mine, other = plain(method, ids), their_plain(theirs, ids)[0, PROMPT:].tolist()
    say(f"greedy    {sum(a == b for a, b in zip(mine, other))} of {NEW} ids are equal")
