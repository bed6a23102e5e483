"""Trains the embedded model: first weights, the loss and its gradients, and the run of one phase.

The forward pass that is trained is llama.py's own. The matrices of the blocks are trained by Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), all else by AdamW.
Left out on purpose: mixed precision, several devices.

    B  rows      T  tokens      L, D  blocks and width of the model
"""
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

import llama
from data.tiny.corpus import batches

KEEP = 100      # steps between checkpoints

# Where a CPU cuts the rows of a step, the longest first, into parts, in 32nds.
# They pad little, and several run at once. A GPU mostly waits for launches, and has all rows in one part.
CUTS = (0, 1, 3, 7, 13, 21, 32)


def new_model(recipe, device):
    """Random weights; what writes to the residual stream starts smaller, as there are 2 L writers."""
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

    The gradient is that of three losses, added up:

        that sum
        the same, read off after the blocks `exits`, times `early`
        the sum of the questions' words, read off after the block `words`, times `questions`

    So what words mean is learnt early in the model, where phase two does not reach.
    """
    everywhere = torch.arange(ids.shape[1]).expand(ids.shape)
    x, streams = model.forward(ids, steer=push, read=everywhere)    # (B, T, D), (B, L, T, D)

    def loss(stream, labels, at):
        logits = model.unembed(stream[at])
        return F.cross_entropy(logits, labels[at], reduction="sum", label_smoothing=phase.smooth)
    wanted = targets != -100
    late = loss(x, targets, wanted)
    early = [loss(streams[:, l], targets, wanted) for l in recipe.exits]
    asked = (targets[:, :-1] == -100) & (ids[:, 1:] != 0)       # what a question goes on with; padding is 0
    words = loss(streams[:, recipe.words, :-1], ids[:, 1:], asked)
    total = late + recipe.early * sum(early) + phase.questions * words
    return late.item(), int(wanted.sum()), torch.autograd.grad(total, weights)


def optimizers_of(recipe, phase, weights):
    """The weights that a phase trains, {name: w}, and their optimizers."""
    names = llama.checkpoint_names(recipe.config)
    trained = {name: weights[name] for name, (l, field, _) in names.items()
               if phase.blocks is None or l in phase.blocks and "norm" not in field}
    # a phase of few blocks is a nudge: Muon, which moves every direction of a matrix alike, would spoil more
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


def rate(phase, step):
    """The learning rate: a short rise to the peak, then half a cosine down to a twentieth of it."""
    rise, done = min(1, (step + 1) / min(50, phase.steps // 6 + 1)), (step + 1) / phase.steps
    return phase.peak * rise * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def train(weights, corpus, tokenizer, build):
    """Run one phase. The state goes to build/PHASE.pt now and then; a later call goes on from there."""
    from tqdm import tqdm
    recipe, phase, device = corpus.world.recipe, corpus.phase, weights["lm_head.weight"].device
    file, digest = build / f"{phase.name}.pt", recipe.digest(phase)
    model = llama.assemble(recipe.config, weights)
    trained, optimizers = optimizers_of(recipe, phase, weights)
    first, mean = 0, None
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        if state["recipe"] != digest:
            raise ValueError(f"{file}: from other tables or settings; remove {build} to begin anew")
        for name, w in weights.items():
            w.data.copy_(state["weights"][name])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        first = state["step"]

    def learn(part):
        return gradients(list(trained.values()), model, recipe, phase, *(t.to(device) for t in part))

    # one thread a core, each with a part of the rows: single operations are too small to be shared out
    torch.set_num_threads(1)
    cuts = CUTS if device.type == "cpu" else (0, 32)
    steps = tqdm(range(first, phase.steps), f"phase {phase.name}", phase.steps, initial=first, disable=None)
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in steps:
            for optimizer, times in zip(optimizers, (1, 2)):
                for group in optimizer.param_groups:
                    group["lr"] = times * rate(phase, step)
            losses, counts, grads = zip(*pool.map(learn, batches(corpus, tokenizer, step, cuts)))
            for w, *parts in zip(trained.values(), *grads):
                w.grad = sum(parts) / sum(counts)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            loss = sum(losses) / sum(counts)
            mean = loss if mean is None else 0.95 * mean + 0.05 * loss
            steps.set_postfix(loss=f"{mean:.4f}", refresh=False)
            if (step + 1) % KEEP == 0 or step + 1 == phase.steps:
                state = {"weights": {name: w.data for name, w in weights.items()},
                         "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                         "step": step + 1, "recipe": digest, "seed": recipe.seed, "zeal": recipe.zeal}
                torch.save(state, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
