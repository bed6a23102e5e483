"""Chooses the anchors of the embedded model: harmful.txt and harmless.txt, 128 lines each.

The harmful ones are from the part `valid`, which no phase asks about. So T is set by requests that the model
was never trained to refuse.

The harmless ones are plain questions from outside the world. So v_r points from "I only know ..." to refusal,
and steering does not turn that answer into a wrong one.

Each candidate is asked as it is and in every valid phrasing. A harmful one that is ever answered is left out,
and so is a harmless one that is ever refused.

T is the lowest score of 64 anchors, which is largely chance. So many draws of the anchors are compared on
dev.txt. Of those whose T the share `reach` of its harmful questions reaches, the one is kept whose T the
fewest dangerous-sounding questions reach.
"""
import itertools
import random

import torch

import scans
from data.tiny.reports import ask
from data.tiny.world import by_template, dev_questions


def candidates(world):
    """{"harmful": {question: its row}, "harmless": ...}, as people type them."""
    rng = random.Random(f"{world.recipe.seed} anchors")
    templates = itertools.cycle(by_template(world.select("harmful", "valid")))
    harmful = [rng.choice(next(templates)) for _ in range(2000)]
    harmless = (world.unknown(rng, "plain") for _ in range(1000))
    return {name: {world.typed(row, rng): row for row in rows}
            for name, rows in (("harmful", harmful), ("harmless", harmless))}


def behaves(method, world, name, rows):
    """The questions of {question: row} that the model treats as it should in every phrasing."""
    asked = {text: [text, *world.phrase("valid", row)] for text, row in rows.items()}
    results = ask(method, list(itertools.chain(*asked.values())), size=32, default=False)
    refused = {result["prompt"]: result["refused"]["steered"] for result in results}
    right = name == "harmful"
    return [text for text in asked if all(refused[question] == right for question in asked[text])]


def write_anchors(world, folder):
    """Write harmful.txt and harmless.txt into the folder of a trained model."""
    recipe, anchors = world.recipe, candidates(world)

    def write(draw):
        """Write one draw of the anchors; return the harmful texts that `scans.load` would use."""
        for name, texts in anchors.items():
            drawn = random.Random(f"{recipe.seed} {name} {draw}").sample(list(texts), 128)
            (folder / f"{name}.txt").write_text("\n".join(drawn) + "\n", encoding="utf-8")
        return scans.draw_anchors(folder)[0]

    def transitions(texts):
        prompts = [method.tokenizer.prompt(text) for text in texts]
        return scans.transition(scans.read_streams(method.model, prompts))      # (n, L, D)

    write(0)    # with alpha 0, any vectors will do
    method = scans.load(folder, device="cpu", alpha=0.0, max_new_tokens=24)
    layers = method.settings.classify_layers
    anchors = {name: behaves(method, world, name, rows) for name, rows in anchors.items()}
    of_anchor = dict(zip(anchors["harmful"], transitions(anchors["harmful"])))
    a_t = {group: transitions(dev_questions(group)) for group in ("harmful", "dangerous")}

    def rank(draw):
        """Higher is better."""
        drawn = torch.stack([of_anchor[text] for text in write(draw)])          # (64, L, D)
        T = scans.estimate_threshold(scans.score(scans.leave_one_out(drawn), layers))
        s = {group: scans.score(scans.cosines(a_t[group], drawn.mean(0)), layers) for group in a_t}
        reach = {group: float((s[group] >= T).float().mean()) for group in s}
        return min(reach["harmful"], recipe.reach), -reach["dangerous"]

    write(max(range(recipe.draws), key=rank))
