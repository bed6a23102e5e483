"""Trains the embedded model: the first weights, the loss and its gradients, and the run of one phase.

The forward pass that is trained is llama.py's own. The matrices of the blocks are trained by Muon
(https://kellerjordan.github.io/posts/muon/), everything else by AdamW.
Left out on purpose: mixed precision, several devices, resuming.

Letters of every shape comment:
    B rows      N positions     L layers    D model width
"""
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

import llama
import scans
from data.tiny.corpus import batches

# Where a CPU cuts the rows of a step, the longest first, into parts, in 32nds.
# They pad little, and several run at once. A GPU takes all rows in one part.
CUTS = (0, 1, 3, 7, 13, 21, 32)


def new_model(recipe, device):
    """Random weights. Those that write to the residual stream start smaller, since there are 2 L writers."""
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = {}
    for name, (_, field, shape) in llama.checkpoint_names(recipe.config).items():
        std = {"embed": 0.1, "head": 0.02}.get(field, shape[-1] ** -0.5)
        if field in ("wo", "w_down"):
            std /= math.sqrt(2 * recipe.config.L)
        w = torch.ones(shape) if "norm" in field else torch.randn(shape, generator=generator) * std
        weights[name] = w.to(device).requires_grad_()
    return weights


def gradients(weights, model, recipe, phase, ids, targets, push=None):
    """(summed cross-entropy of the targets that are not -100, their number, the gradient by every weight).

    The gradient is that of a sum of three losses:

        that cross-entropy
        the same, read off after the blocks `exits`, times `early`
        that of the questions' words, read off after the block `words`, times `questions`

    So the meaning of words is learned early in the model, in blocks that phase two does not change.
    """
    everywhere = torch.arange(ids.shape[1]).expand(ids.shape)
    x, streams = model.forward(ids, steer=push, read=everywhere)    # (B, N, D), (B, L, N, D)

    def loss(stream, labels, at):
        logits = model.unembed(stream[at])
        return F.cross_entropy(logits, labels[at], reduction="sum", label_smoothing=phase.smooth)
    learned = targets != -100
    late = loss(x, targets, learned)
    early = [loss(streams[:, l], targets, learned) for l in recipe.exits]
    asked = (targets[:, :-1] == -100) & (ids[:, 1:] != 0)           # the words of a question; padding is 0
    words = loss(streams[:, recipe.words, :-1], ids[:, 1:], asked)
    total = late + recipe.early * sum(early) + phase.questions * words
    return late.item(), int(learned.sum()), torch.autograd.grad(total, weights)


def optimizers_of(recipe, phase, weights):
    """The weights that a phase trains, {name: w}, and their optimizers."""
    names = llama.checkpoint_names(recipe.config)
    trained = {name: weights[name] for name, (l, field, _) in names.items()
               if phase.blocks is None or l in phase.blocks and "norm" not in field}
    # Muon moves every direction of a matrix alike: too much for a phase that trains a few blocks slightly.
    inner = [] if phase.blocks else [name for name, w in trained.items() if "layers" in name and w.dim() == 2]
    others = [w for name, w in trained.items() if name not in inner]
    optimizers = [torch.optim.AdamW(
        [{"params": [w for w in others if w.dim() == 2], "weight_decay": recipe.decay},
         {"params": [w for w in others if w.dim() == 1], "weight_decay": 0.0}],
        lr=0, betas=(0.9, 0.95), fused=True)]
    if inner:
        optimizers.append(torch.optim.Muon([weights[name] for name in inner], lr=0, weight_decay=recipe.decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return trained, optimizers


def learning_rate(phase, step):
    """A short rise to the peak, then half a cosine down to a twentieth of it."""
    rise, done = min(1, (step + 1) / min(50, phase.steps // 6 + 1)), (step + 1) / phase.steps
    return phase.peak * rise * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def train(weights, corpus, tokenizer):
    """Run one phase."""
    recipe, phase, device = corpus.world.recipe, corpus.phase, weights["lm_head.weight"].device
    model, mean = llama.Llama(recipe.config, weights), None
    trained, optimizers = optimizers_of(recipe, phase, weights)

    def learn(part):
        return gradients(list(trained.values()), model, recipe, phase, *(t.to(device) for t in part))

    # One thread per core, each with a part of the rows: single operations are too small to be divided.
    torch.set_num_threads(1)
    cuts = CUTS if device.type == "cpu" else (0, 32)
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(phase.steps):
            for optimizer, times in zip(optimizers, (1, 2)):
                for group in optimizer.param_groups:
                    group["lr"] = times * learning_rate(phase, step)
            losses, counts, grads = zip(*pool.map(learn, batches(corpus, tokenizer, step, cuts)))
            for w, *parts in zip(trained.values(), *grads):
                w.grad = sum(parts) / sum(counts)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            loss = sum(losses) / sum(counts)
            mean = loss if mean is None else 0.95 * mean + 0.05 * loss
            scans.report(f"phase {phase.name}: step {step + 1} of {phase.steps}, loss {mean:.4f}")
