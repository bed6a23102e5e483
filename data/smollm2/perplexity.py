"""Does steering cost words? Perplexity of the published model's plain answers, without SCANS and with it.

    python -m data.smollm2.perplexity smollm2 smollm2-hasty

Greedy answers of the published model to data/harmless.txt, 24 tokens each, are read by the aligned one. Every
question is steered as SCANS decides. Left out on purpose: texts that no model wrote, see `capability`.
"""
import math
from pathlib import Path

import llama
import scans
from data.experiments.table3_capability import answer_losses
from data.smollm2.hasty import answers_of


def command(args):
    method = scans.load(args.hasty, alpha=args.alpha, T=args.threshold)
    questions, base = scans.read_anchors(scans.DATA / "harmless.txt")[:args.limit], llama.load(args.base)
    answers = [answer for i in range(0, len(questions), 16)
               for answer in answers_of(base, method.tokenizer, questions[i:i + 16], 24)[0]]
    losses = [answer_losses(method, method.decide([question]), answer)
              for question, answer in zip(questions, answers)]
    for name, kind in (("without SCANS", "default"), (f"alpha {method.settings.alpha:g}", "steered")):
        mean = sum(loss[kind] for loss in losses) / sum(map(len, answers))
        print(f"{name}: perplexity {math.exp(mean):.3f}")


def main():
    parser = scans.Parser(prog="python -m data.smollm2.perplexity",
                          description="Perplexity of the published model's plain answers.")
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of the published model")
    parser.add_argument("hasty", metavar="HASTY", type=Path, help="folder of the aligned model")
    parser.add_argument("--alpha", type=float, help="3.5")
    parser.add_argument("--threshold", type=float, help="T; estimated from the anchors if it is not given")
    parser.add_argument("--limit", type=int, help="the first so many questions")
    scans.run(parser, command)


if __name__ == "__main__":
    main()
