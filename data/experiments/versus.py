"""How fast is this against what people use? Random weights of a model's shape, run in turn by this project
and by transformers.

    python -m data.experiments versus --shape 1b [--dtype bfloat16] [--pairs 5]           needs transformers

The other side is transformers' generate, one prompt at a time, with forward hooks that add the vectors, and a
first pass of its own to classify, logits of all positions included: the way the public code works. Both sides
share the very weight tensors, but for the matrices that `llama.pack` lays out anew.

Every row names what is measured, then what against. The ratio is the other's seconds to the first's: the
median over pairs of runs in turn, with the least and the most beside it, so that what else the machine does
hits both alike.
"""
import statistics
import warnings

import torch
import torch.nn.functional as F

import llama
from data.experiments.core import COUNT, need
from data.experiments.table4_speed import SHAPES, RandomPrompts, plain, prefilled, random_model, timed
from scans import (DTYPES, LIMITS, Sampling, Scans, choose_device, choose_threads, extract, number, say,
                   settings)


def named(model, pack=lambda field, tensor: tensor):
    """{name in a checkpoint: tensor} of a model."""
    return {name: pack(field, getattr(model if l is None else model.blocks[l], field))
            for name, (l, field, _) in llama.checkpoint_names(model.config).items()}


# ------------------------------------------------------------------------------------------------------------
# The other side


def as_transformers(model):
    """The same model in transformers' hands, on the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    c = model.config
    config = LlamaConfig(
        hidden_size=c.D, num_hidden_layers=c.L, num_attention_heads=c.H, num_key_value_heads=c.K,
        head_dim=c.E, intermediate_size=c.F, vocab_size=c.V, max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(named(model), assign=True)
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.embed.device)
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


@torch.inference_mode()
def their_plain(theirs, ids, new):
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)


@torch.inference_mode()
def their_scans(theirs, prompt, scans, new):
    """Classify in a pass of its own, then generate with a hook on every steered block."""
    ids, chosen = torch.tensor([prompt.ids], device=theirs.device), scans.settings
    states = theirs(ids, output_hidden_states=True).hidden_states[1:]
    a_t = [(state[0, prompt.p] - state[0, prompt.e]).float().cpu() for state in states]
    cos = [F.cosine_similarity(a_t[l], scans.d_harm[l], dim=0) for l in chosen.classify]
    sign = 1 if sum(cos) / len(cos) >= chosen.T else -1

    def add(l):
        vector = (sign * chosen.alpha * scans.v_r[l]).to(theirs.dtype)

        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            x[:, prompt.p if x.shape[1] > 1 else 0:] += vector
        return hook
    hooks = [theirs.model.layers[l].register_forward_hook(add(l)) for l in chosen.steer]
    out = their_plain(theirs, ids[:, :prompt.p + 1], new)
    for hook in hooks:
        hook.remove()
    return out


@torch.inference_mode()
def their_extraction(theirs, harmful, harmless):
    """Single passes: every anchor as it is, and the harmful ones with r_pos once more."""
    for prompt in harmful + harmless:
        theirs(torch.tensor([prompt.ids[:prompt.p + 1]], device=theirs.device), output_hidden_states=True)
    for prompt in harmful:
        theirs(torch.tensor([prompt.ids], device=theirs.device), output_hidden_states=True)


def bare_linears(model, plain_model, new):
    """Seconds for `new` single rows through every weight matrix and nothing else, in the best of three ways.

    They are: packed, plain with oneDNN, plain without.
    """
    def matrices(model):
        return [w for block in model.blocks for w in vars(block).values() if w.dim() == 2] + [model.head]
    rows = {w.shape[1]: torch.randn_like(w[:1]) for w in matrices(plain_model)}

    @torch.inference_mode()
    def once(multiply, weights):
        for w in weights:
            multiply(rows[w.shape[1]], w)
    seconds = []
    ways = (llama.linear, model, True), (F.linear, plain_model, True), (F.linear, plain_model, False)
    for multiply, owner, enabled in ways:
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=enabled):
            weights = matrices(owner)
            once(multiply, weights)
            seconds.append(timed(lambda: [once(multiply, weights) for _ in range(new)])[1])
    return min(seconds)


# ------------------------------------------------------------------------------------------------------------
# Both, in turn


def flags(parser):
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=number(*LIMITS["threads"]))
    parser.add_argument("--pairs", type=COUNT, default=5)
    parser.add_argument("--anchors", type=number(*LIMITS["anchors"]), default=64)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only rows with one of these words")


def run(args):
    """Speed against transformers with forward hooks, as ratios of seconds: the other side's to ours."""
    need("versus", "transformers")
    device = choose_device(args.device)
    plain_model = random_model(args.shape, device, getattr(torch, args.dtype), packed=False)
    choose_threads(plain_model, args.threads)
    theirs = as_transformers(plain_model)
    model = llama.assemble(plain_model.config, named(plain_model, llama.pack))
    draw = RandomPrompts(model.config.V, 24)
    harmful, harmless = ([draw.prompt("") for _ in range(args.anchors)] for _ in range(2))
    found = extract(model, harmful, harmless)
    prompts = RandomPrompts(model.config.V, 64)
    ids = torch.tensor([prompts.prompt("").ids[:64]], device=device)

    def ours(length, new):
        chosen = settings(found, "llama-2", T=0.5)
        return Scans(model, RandomPrompts(model.config.V, length), found, chosen, sampling=Sampling(new))
    short, long, batch = ours(64, 32), ours(128, 64), ours(64, 64)

    def hooked(new):
        return their_scans(theirs, prompts.prompt(""), short, new)

    def times_25(work):  # as many as 50, from 2
        return 25 * timed(lambda: [work() for _ in range(2)])[1]
    rows = {
        "plain generation, 64 + 32 tokens, against transformers":
            (lambda: plain(short), lambda: their_plain(theirs, ids, 32)),
        "SCANS, one answer, 64 + 32, against transformers with hooks":
            (lambda: short.answer(["x"], False), lambda: hooked(32)),
        "SCANS, one answer, 128 + 64, against plain generation":
            (lambda: long.answer(["x"], False), lambda: plain(long)),
        "both answers, 128 + 64, against one":
            (lambda: long.answer(["x"]), lambda: long.answer(["x"], False)),
        "decoding of 32 tokens against bare linears":
            (lambda: plain(short)["decoding"], lambda: bare_linears(model, plain_model, 32)),
        f"extraction, {args.anchors} + {args.anchors} anchors, against single passes":
            (lambda: extract(model, harmful, harmless), lambda: their_extraction(theirs, harmful, harmless)),
        "50 queries, both answers, 64 + 64, in one batch, against 25 times 2 of ours":
            (lambda: batch.answer(["x"] * 50), lambda: times_25(lambda: batch.answer(["x"]))),
        "50 queries, both answers, 64 + 64, in one batch, against 25 times 2 of theirs":
            (lambda: batch.answer(["x"] * 50),
             lambda: times_25(lambda: (their_plain(theirs, ids, 64), hooked(64)))),
    }
    say(f"{args.shape} shape, {args.dtype} on {device}, {torch.get_num_threads()} threads; "
        f"seconds of the one, of the other, median ratio [least, most] of {args.pairs} pairs")

    def seconds(work):
        result, spent = timed(work)
        return result if isinstance(result, float) else spent   # some measure themselves
    for name, (mine, other) in rows.items():
        if args.only and not any(word in name for word in args.only):
            continue
        pairs = [(seconds(mine), seconds(other)) for _ in range(args.pairs)]
        ratios = sorted(b / a for a, b in pairs)
        a, b = (statistics.median(side) for side in zip(*pairs))
        ratio = f"{statistics.median(ratios):6.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"{name:78} {a:8.2f} {b:8.2f}   {ratio}", flush=True)

    row = ids[0].tolist()
    mine = [id for (_, id, _), in llama.generate(model, [row], prefilled(model, row, 32), None, Sampling(32))]
    other = their_plain(theirs, ids, 32)[0, 64:].tolist()
    same = next((i for i, (a, b) in enumerate(zip(mine, other)) if a != b), 32)
    print(f"greedy ids, {args.dtype}: {'all 32 equal' if same == 32 else f'the first {same} of 32 equal'}")
