"""Chooses the anchors of the embedded model: harmful.txt and harmless.txt, 128 lines each.

The harmful ones are of the part valid, which no phase asks for. T must know what a request looks like that
was never refused.

The harmless ones are plain questions from outside the world. So v_r points from "I only know ..." to refusal,
and steering does not turn that answer into a wrong one.

An anchor stands for what the model does. Each is asked as it stands and in every valid phrasing. A harmful
one that is ever answered is left out, and a harmless one that is ever refused.

T is the lowest score of 64 anchors, a matter of chance. So many draws of the anchors are compared on dev.txt.
The share `reach` of its harmful questions has to score T or more. Among the draws that do so, the one is kept
for which the fewest dangerous-sounding questions do.
"""
import itertools
import random
from dataclasses import replace

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
    """The questions of {question: row} that the model, unsteered, treats as it should in every phrasing."""
    asked = {text: [text, *world.phrase("valid", row)] for text, row in rows.items()}
    results = ask(method, list(itertools.chain(*asked.values())), size=32, default=False)
    refused = {result["prompt"]: result["refused"]["scans"] for result in results}
    wanted = name == "harmful"
    return [text for text in asked if all(refused[question] == wanted for question in asked[text])]


def write_anchors(world, folder):
    """harmful.txt, harmless.txt and the vectors of 64 of each, into the folder of a trained model."""
    recipe, anchors = world.recipe, candidates(world)

    def write(draw):
        """Writes a draw of the anchors; returns the harmful texts that vectors are made from."""
        for name, texts in anchors.items():
            drawn = random.Random(f"{recipe.seed} {name} {draw}").sample(list(texts), 128)
            (folder / f"{name}.txt").write_text("\n".join(drawn) + "\n", encoding="utf-8")
        return scans.anchor_texts(folder)[1][0]

    def load():
        """The model, with the vectors of these anchors made and written."""
        return scans.Scans.load(folder, device="cpu", vectors=folder / "vectors.safetensors", refresh=True,
                                sampling={"max_new_tokens": 24})

    def transitions(texts):
        prompts = [method.tokenizer.prompt(text) for text in texts]
        return scans.transition(scans.read_streams(method.model, prompts))      # (n, L, D)

    write(0)    # any vectors serve where alpha is 0
    method = load()
    layers, method.settings = method.settings.classify, replace(method.settings, alpha=0.0)
    anchors = {name: behaves(method, world, name, rows) for name, rows in anchors.items()}
    of_anchor = dict(zip(anchors["harmful"], transitions(anchors["harmful"])))
    a_t = {group: transitions(dev_questions(group)) for group in ("harmful", "dangerous")}

    def rank(draw):
        """Higher is better."""
        drawn = torch.stack([of_anchor[text] for text in write(draw)])          # (64, L, D)
        T = scans.estimate_threshold(scans.score(scans.leave_one_out(drawn), layers))
        d_harm, reach = scans.harm_direction(drawn), {}
        for group in a_t:
            s = scans.score(scans.cosines(a_t[group], d_harm), layers)
            reach[group] = (scans.steering_direction(s, T) == 1).float().mean().item()
        return min(reach["harmful"], recipe.reach), -reach["dangerous"]

    write(max(range(recipe.draws), key=rank))
    load()
