"""Table 4: speed and memory of one query, without SCANS, with it, and of both answers. Needs no package
beyond the four.

Prompts are random ids, and --shape takes random weights: what a machine would do with a model that is not
there yet. Each figure is the median of several rounds, in which the modes run in turn: what else the machine
does hits all alike.
"""
import dataclasses
import math
import os
import re
import statistics
import time
from pathlib import Path

import torch

import llama
from data.experiments.core import COUNT, show
from llama import Cache, Sampling
from scans import (Scans, add_flags, choose_device, choose_threads, extract, report, say, settings,
                   shown)
from tokenizer import FORMATS, Prompt

SHAPES = {  # D, L, H, K, F of TinyLlama-1.1B, Llama-2-7b, Llama-2-13b
    "1b": (2048, 22, 32, 4, 5632), "7b": (4096, 32, 32, 32, 11008), "13b": (5120, 40, 40, 40, 13824)}
PROMPT, ANCHOR = 128, 24    # tokens of a query, and of an anchor: as long as most are


class RandomPrompts:
    """Stands in for a tokenizer: whatever the question, `length` random ids, and one for r_pos."""
    name, format = "llama-2", FORMATS["llama-2"]

    def __init__(self, vocabulary, length):
        self.vocabulary, self.length, self.generator = vocabulary, length, torch.Generator().manual_seed(0)

    def prompt(self, question, history=()):
        ids = torch.randint(self.vocabulary, (self.length + 1,), generator=self.generator).tolist()
        return Prompt(ids, self.length - 1, self.length)

    def decode(self, ids):
        return ""


# ------------------------------------------------------------------------------------------------------------
# Random weights


def free_bytes(device):
    """Memory that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        return int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def random_model(shape, device, dtype, packed=True):
    """A Llama of that shape with random weights, made where they stay, packed as `llama.load` does.

    Raises ValueError if it will not fit.
    """
    D, L, H, K, width = SHAPES[shape]
    config = llama.Config(D=D, L=L, H=H, K=K, E=D // H, F=width, V=32000, context=4096, norm_eps=1e-5,
                          rope_theta=1e4, rope_factor=1.0, rope_bands=None, window=None, tied=False, eos=())
    names, tensors = llama.checkpoint_names(config), {}
    wanted = sum(math.prod(size) for _, _, size in names.values()) * dtype.itemsize
    if wanted + 2**30 > free_bytes(device):
        raise ValueError(f"--shape {shape}: {wanted / 1e9:.1f} GB of weights in {str(dtype)[6:]} "
                         f"and 1 GB beside them, {free_bytes(device) / 1e9:.1f} GB are free on {device}")
    noise = (0.02 * torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for name, (_, field, size) in names.items():
        tensor = torch.ones(size, device=device, dtype=dtype)   # as norms are
        if len(size) > 1:
            for piece in tensor.view(-1).split(len(noise)):     # the same noise over and over: quick
                piece.copy_(noise[:len(piece)])
        tensors[name] = llama.pack(field, tensor) if packed else tensor
    return llama.assemble(config, tensors)


# ------------------------------------------------------------------------------------------------------------
# What is measured


def timed(work):
    """What work() returns, and its seconds; a GPU has ended by then."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def with_peak(device, work):
    """What work() returns, and the most bytes held meanwhile by the GPU or this process; None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        return work(), None
    Path("/proc/self/clear_refs").write_text("5")
    return work(), int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@torch.inference_mode()
def prefilled(model, ids, new):
    """A cache of all ids (T) but the last, with room for `new` more tokens, as `llama.generate` wants it."""
    cache = Cache(model.config, 1, len(ids) + new, model.embed)
    x, _ = model.forward(torch.tensor([ids[:-1]], device=model.embed.device), cache)
    x[0, -1, 0].item()  # a GPU has now ended
    return cache


@torch.inference_mode()
def plain(scans):
    """One answer without SCANS: seconds of prompt and decoding, positions run but for the new ones."""
    prompt = scans.tokenizer.prompt("")
    ids = prompt.ids[:prompt.p + 1]
    cache, before = timed(lambda: prefilled(scans.model, ids, scans.sampling.max_new_tokens))
    _, decoding = timed(lambda: list(llama.generate(scans.model, [ids], cache, None, scans.sampling)))
    return {"prompt": before, "decoding": decoding, "positions": len(ids)}


def steered(scans, default):
    """The same with SCANS, or of both answers."""
    result, = scans.answer(["x"], default)
    seconds = result["seconds"]
    return {"prompt": seconds["score"], "decoding": seconds["answers"],
            "positions": result["positions"]["scans"]}


MODES = {"without SCANS": plain, "with SCANS": lambda scans: steered(scans, False),
         "both answers": lambda scans: steered(scans, True)}


def rounds(scans, device, trials):
    """{mode: one dict a round}; a first round, which is slower, is not counted."""
    runs, total = {name: [] for name in MODES}, (trials + 1) * len(MODES)
    for done in range(total):
        name = list(MODES)[done % len(MODES)]
        one, peak = with_peak(device, lambda: MODES[name](scans))
        report(f"{done + 1} of {total} runs", done + 1 == total)
        if done >= len(MODES):
            seconds = one["prompt"] + one["decoding"]
            runs[name].append({**one, "seconds": seconds, "peak_MB": peak and peak / 1e6})
    return runs


def median(some, key):
    return None if some[0][key] is None else statistics.median(one[key] for one in some)


def speed_row(name, some, new):
    seconds = [one["seconds"] for one in some]
    return {"mode": name, "prompt_per_second": PROMPT / median(some, "prompt"),
            "tokens_per_second": new / median(some, "decoding"), "seconds": statistics.median(seconds),
            "least": min(seconds), "most": max(seconds), "positions": some[0]["positions"],
            "peak_MB": median(some, "peak_MB")}


def price_row(without, steered, step):
    """What SCANS adds, from rounds of both; step: seconds of one decoding step."""
    pairs = [{**{key: b[key] and b[key] - a[key] for key in a},
              "percent": 100 * (b["seconds"] / a["seconds"] - 1)} for a, b in zip(without, steered)]
    price = {key: median(pairs, key) for key in ("positions", "seconds", "percent", "peak_MB")}
    return {**price, "decoding_steps": price["seconds"] / step}


def machine_row(model, device, step):
    """Decoding reads every weight once a token: how near to what the memory gives is it?"""
    block = torch.ones(2**28 if device.type == "cuda" else 2**27, device=device)
    bandwidth = block.nbytes / min(timed(lambda: block.sum().item())[1] for _ in range(5))
    embedding = 0 if model.config.tied else model.embed.numel()     # of the input embedding, one row is read
    read = (model.size() - embedding) * model.embed.itemsize
    return {"weights_GB": read / 1e9, "read_GB_per_second": bandwidth / 1e9,
            "limit_tokens_per_second": bandwidth / read, "share_reached": read / step / bandwidth}


def flags(parser):
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape, not --model")
    parser.add_argument("--trials", metavar="N", type=COUNT, default=5, help="rounds, 5")
    add_flags(parser)


def run(args):
    """Speed and memory of one query of 128 tokens: without SCANS, with it, both answers."""
    device, dtype = choose_device(args.device), args.dtype and getattr(torch, args.dtype)
    if args.shape:
        model = random_model(args.shape, device, dtype or llama.working_dtype(torch.bfloat16, device))
    else:
        model = llama.load(args.model, device, dtype)
        model.config = dataclasses.replace(model.config, eos=())  # no answer ends before its length
    choose_threads(model, args.threads)
    config, new = model.config, 64 if args.max_new_tokens is None else max(1, args.max_new_tokens)
    if PROMPT + new > config.context:
        raise ValueError(f"--max-new-tokens {new}: {PROMPT} tokens of the prompt and {new} new ones, "
                         f"the model's context is {config.context}")
    about = {"model": args.shape or str(shown(args.model)), "parameters": model.size(),
             "dtype": str(model.embed.dtype)[6:], "device": str(device), "threads": torch.get_num_threads(),
             "prompt_tokens": PROMPT, "new_tokens": new}
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())
    say(f"{facts}; prompts of random ids")

    draw = RandomPrompts(config.V, ANCHOR)
    harmful, harmless = ([draw.prompt("") for _ in range(64)] for _ in range(2))
    (vectors, seconds), peak = with_peak(device, lambda: timed(lambda: extract(model, harmful, harmless)))
    chosen = settings(vectors, "llama-2", args.alpha, 0.5, args.steer_layers, args.classify_layers)
    prompts, sampling = RandomPrompts(config.V, PROMPT), Sampling(max_new_tokens=new)
    scans = Scans(model, prompts, vectors, chosen, args.sigma, sampling)
    runs = rounds(scans, device, args.trials)
    step = median(runs["without SCANS"], "decoding") / new
    show({"about": about, "speed": [speed_row(name, some, new) for name, some in runs.items()],
          "price": [price_row(runs["without SCANS"], runs["with SCANS"], step)],
          "machine": [machine_row(model, device, step)],
          "extraction": [{"tokens_each": ANCHOR, "seconds": seconds, "prompts_per_second": 128 / seconds,
                          "peak_MB": peak and peak / 1e6}]}, args.json)
