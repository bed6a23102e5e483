"""How fast is this against what people use? Random weights of a model's shape, run in turn by this project and by transformers.

    python -m data.versus --shape 1b [--dtype bfloat16] [--pairs 5]           needs transformers

The other side is transformers' generate, one prompt at a time, with forward hooks that add the vectors, and a first pass of its own
to classify, logits of all positions included: the way the public code works. Both sides share the very weight tensors, but for the
matrices that `llama.pack` lays out anew. Every row names what is measured, then what against; the ratio is the other's seconds to
the first's, the median over pairs of runs in turn with the least and the most beside it, so that what else the machine does hits
both alike.
"""
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

import llama
from data.experiments import SHAPES, RandomPrompts, plain, random_model
from scans import Parser, Sampling, Scans, choose_device, choose_threads, extract, number, run, say, settings


def named(model):
    """{name in a checkpoint: tensor} of a model."""
    return {name: getattr(model if l is None else model.blocks[l], field) for name, (l, field, _) in llama.checkpoint_names(model.config).items()}


def as_transformers(model):
    """The same model in transformers' hands, on the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    c = model.config
    config = LlamaConfig(hidden_size=c.D, num_hidden_layers=c.L, num_attention_heads=c.H, num_key_value_heads=c.K, head_dim=c.E, intermediate_size=c.F,
                         vocab_size=c.V, max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, bos_token_id=1, eos_token_id=None, pad_token_id=0)
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
    ids = torch.tensor([prompt.ids], device=theirs.device)
    states = theirs(ids, output_hidden_states=True).hidden_states[1:]
    cos = [F.cosine_similarity((states[l][0, prompt.p] - states[l][0, prompt.e]).float(), scans.d_harm[l], dim=0) for l in scans.settings.classify]
    sign = 1 if sum(cos) / len(cos) >= scans.settings.T else -1

    def add(l):
        vector = (sign * scans.settings.alpha * scans.v_r[l]).to(theirs.dtype)

        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            x[:, prompt.p if x.shape[1] > 1 else 0:] += vector
        return hook
    hooks = [theirs.model.layers[l].register_forward_hook(add(l)) for l in scans.settings.steer]
    out = their_plain(theirs, ids[:, :prompt.p + 1], new)
    for hook in hooks:
        hook.remove()
    return out


@torch.inference_mode()
def their_extraction(theirs, harmful, harmless):
    """192 single passes: every anchor as it is, and the harmful ones with r_pos once more."""
    for prompt in harmful + harmless:
        theirs(torch.tensor([prompt.ids[:prompt.p + 1]], device=theirs.device), output_hidden_states=True)
    for prompt in harmful:
        theirs(torch.tensor([prompt.ids], device=theirs.device), output_hidden_states=True)


def bare_linears(model, plain, new):
    """Seconds for `new` single rows through every weight matrix and nothing else, in the best of three ways: packed, and plain with oneDNN and without."""
    def matrices(model):
        return [w for block in model.blocks for w in vars(block).values() if w.dim() == 2] + [model.head]
    rows = {w.shape[1]: torch.randn(1, w.shape[1], device=w.device, dtype=w.dtype) for w in matrices(plain)}

    @torch.inference_mode()
    def once(multiply, weights):
        for w in weights:
            multiply(rows[w.shape[1]], w)
    seconds = []
    for multiply, weights, enabled in ((llama.linear, matrices(model), True), (F.linear, matrices(plain), True), (F.linear, matrices(plain), False)):
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=enabled):
            once(multiply, weights)
            seconds.append(timed(lambda: [once(multiply, weights) for _ in range(new)]))
    return min(seconds)


def timed(work):
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def versus(args):
    """Ratios of seconds, the other side's to ours."""
    device = choose_device(args.device)
    plain_model = random_model(args.shape, device, getattr(torch, args.dtype), packed=False)
    choose_threads(plain_model, args.threads)
    theirs = as_transformers(plain_model)
    tensors = named(plain_model)
    model = llama.assemble(plain_model.config, {name: llama.pack(field, tensors[name])
                                                for name, (_, field, _) in llama.checkpoint_names(plain_model.config).items()})
    draw = RandomPrompts(model.config.V, 24)
    anchors = [draw.prompt("") for _ in range(2 * args.anchors)]
    found = extract(model, anchors[:args.anchors], anchors[args.anchors:])
    prompts = RandomPrompts(model.config.V, 64)

    def ours(length, new):
        return Scans(model, RandomPrompts(model.config.V, length), found, settings(found, "llama-2", T=0.5), sampling=Sampling(new))
    short, long, batch, ids = ours(64, 32), ours(128, 64), ours(64, 64), torch.tensor([prompts.prompt("").ids[:64]], device=device)
    say(f"{args.shape} shape, {args.dtype} on {device}, {torch.get_num_threads()} threads; seconds of the one, of the other, median ratio [least, most] of {args.pairs} pairs")
    rows = {
        "plain generation, 64 + 32 tokens, against transformers": (lambda: plain(short), lambda: their_plain(theirs, ids, 32)),
        "SCANS, one answer, 64 + 32, against transformers with hooks": (lambda: short.answer(["x"], False), lambda: their_scans(theirs, prompts.prompt(""), short, 32)),
        "SCANS, one answer, 128 + 64, against plain generation": (lambda: long.answer(["x"], False), lambda: plain(long)),
        "both answers, 128 + 64, against one": (lambda: long.answer(["x"]), lambda: long.answer(["x"], False)),
        "decoding of 32 tokens against bare linears": (lambda: plain(short)["decoding"], lambda: bare_linears(model, plain_model, 32)),
        f"extraction, {args.anchors} + {args.anchors} anchors, against single passes": (lambda: extract(model, anchors[:args.anchors], anchors[args.anchors:]),
                                                         lambda: their_extraction(theirs, anchors[:args.anchors], anchors[args.anchors:])),
        "50 queries, both answers, 64 + 64, in one batch, against 25 times 2 of ours": (lambda: batch.answer(["x"] * 50), lambda: 25 * timed(
            lambda: [batch.answer(["x"]) for _ in range(2)])),
        "50 queries, both answers, 64 + 64, in one batch, against 25 times 2 of theirs": (lambda: batch.answer(["x"] * 50), lambda: 25 * timed(
            lambda: [(their_plain(theirs, ids, 64), their_scans(theirs, prompts.prompt(""), short, 64)) for _ in range(2)])),
    }
    for name, (mine, other) in rows.items():
        if args.only and not any(word in name for word in args.only):
            continue
        pairs = []
        for _ in range(args.pairs):
            seconds = []
            for work in (mine, other):
                result = []
                spent = timed(lambda: result.append(work()))
                seconds.append(result[0] if isinstance(result[0], float) else spent)
            pairs.append(seconds)
        ratios = sorted(b / a for a, b in pairs)
        print(f"{name:78} {statistics.median(a for a, _ in pairs):8.2f} {statistics.median(b for _, b in pairs):8.2f}   "
              f"{statistics.median(ratios):6.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]", flush=True)
    tokens = [[id for (_, id, _), in llama.generate(model, [ids[0].tolist()], prefilled(model, ids), None, Sampling(32))],
              their_plain(theirs, ids, 32)[0, 64:].tolist()]
    same = next((i for i, (a, b) in enumerate(zip(*tokens)) if a != b), 32)
    print(f"greedy ids, {args.dtype}: {'all 32 equal' if same == 32 else f'the first {same} of 32 equal'}")


@torch.inference_mode()
def prefilled(model, ids):
    cache = llama.Cache(model.config, 1, ids.shape[1] + 32, model.embed)
    model.forward(ids[:, :-1], cache)
    return cache


def main():
    parser = Parser(prog="python -m data.versus", description=versus.__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=number(int, 1, 1024))
    parser.add_argument("--pairs", type=number(int, 1), default=5)
    parser.add_argument("--anchors", type=number(int, 2), default=64)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only the rows whose name has one of these words")
    run(parser, versus)


if __name__ == "__main__":
    main()
