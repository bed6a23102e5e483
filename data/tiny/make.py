"""Makes the embedded model from a seed: tokenizer, weights and anchors.

    python -m data.tiny.make OUT        in an hour on two cores
    python -m data.tiny.reports table   its results; see reports.py

The files in this folder, in the order of the work:

    recipe.py    every setting, and the phases of training
    world.py     the tables, their split, and how things are asked
    corpus.py    what is learned: rows, tokenizer, batches
    train.py     weights, gradients, the run of a phase
    anchors.py   the choice of the anchors
    reports.py   the results

Making needs torch 2.9 or later, for torch.optim.Muon.
"""
import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

import scans
from data.tiny.anchors import write_anchors
from data.tiny.corpus import Corpus, train_tokenizer
from data.tiny.recipe import HERE, Recipe
from data.tiny.train import new_model, train
from data.tiny.world import World
from tokenizer import Tokenizer


def rescale(weights, c):
    """The same function with a residual stream c times as long: all that writes to it is multiplied by c.

    Every reader normalizes the stream first, so nothing else changes, apart from the effect of norm_eps.
    So c only sets the unit in which alpha is measured.
    """
    writers = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    return {name: w * c if name.endswith(writers) else w for name, w in weights.items()}


def make(out, recipe, device):
    """Write a new folder."""
    world = World(recipe)
    corpora = [Corpus(world, phase) for phase in recipe.phases]
    weights = new_model(recipe, device)
    out.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(HERE / name, out)
    train_tokenizer(corpora[0], out)
    tokenizer = Tokenizer(out, recipe.config.V)
    for corpus in corpora:
        train(weights, corpus, tokenizer)
    scaled = {name: w.detach().cpu().contiguous() for name, w in rescale(weights, recipe.scale).items()}
    save_file(scaled, out / "model.safetensors", metadata={"format": "pt"})
    write_anchors(world, out)


def main():
    parser = scans.Parser(prog="python -m data.tiny.make", description="Make the embedded model.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: a GPU if there is one")
    scans.run(parser, lambda args: make(args.out, replace(Recipe(), seed=args.seed),
                                        scans.choose_device(args.device)))


if __name__ == "__main__":
    main()
