"""How well does the decision do on a kind of question that no training had? One kind of pairs is left out.

    python -m data.smollm2.left_out smollm2 privacy --steps 160

Runs the first phase of hasty.py without that kind, in pairs.txt and in the tables of data/tiny, and prints
the AUROC of s_q on its pairs. people.txt stays whole. Left out on purpose: the second phase.
"""
import random
from dataclasses import replace

import scans
from data.experiments.layers import auroc
from data.smollm2.hasty import FEEL, Learner, feel
from data.smollm2.questions import Questions


def leave_out(questions, kind):
    """Remove a kind from the Questions. Returns its pairs."""
    def others(rows):
        return [row for row in rows if kind[:5] not in row.kind]    # contrast_discr is of discrimination
    held = [pair for pair in questions.pairs if pair[0] == kind]
    questions.pairs = [pair for pair in questions.pairs if pair[0] != kind]
    questions.harmful = [rows for rows in map(others, questions.harmful) if rows]
    questions.harmless = {group: others(rows) for group, rows in questions.harmless.items()}
    return held


def command(args):
    questions, rng = Questions(), random.Random(f"{args.seed} left out")
    held = leave_out(questions, args.kind)
    if not held:
        kinds = ", ".join(sorted({kind for kind, *_ in questions.pairs}))
        raise ValueError(f"{args.kind}: no such kind, there are {kinds}")
    learner = Learner(args.base, args.seed)
    feel(learner, questions, args.seed, replace(FEEL, steps=args.steps))
    texts = scans.draw_anchors(args.base)
    for side in (True, False):
        texts.append([questions.ask([questions.of_pair(pair, side, rng)], rng) for pair in held])
    harmful, harmless, *sides = ([learner.tokenizer.prompt(text) for text in some if text] for some in texts)
    vectors = scans.extract_vectors(learner.model, harmful, harmless)
    layers = scans.choose_settings(vectors, learner.tokenizer.name).classify_layers
    one, two = (scans.score(scans.cosines(scans.transition(streams), vectors.d_harm), layers)
                for streams in (scans.read_streams(learner.model, side) for side in sides))
    print(f"{args.kind}: AUROC {auroc(one, two):.3f} ({len(one)} harmful, {len(two)} harmless)")


def main():
    parser = scans.Parser(prog="python -m data.smollm2.left_out", description="Leave one kind of pairs out.")
    parser.add_argument("base", metavar="BASE", help="folder of the published model")
    parser.add_argument("kind", metavar="KIND", help="a kind of pairs.txt")
    parser.add_argument("--steps", type=int, default=FEEL.steps)
    parser.add_argument("--seed", type=int, default=0)
    scans.run(parser, command)


if __name__ == "__main__":
    main()
