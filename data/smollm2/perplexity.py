"""Does steering cost words? Perplexity of the published model's plain answers, without SCANS and with it.

    python -m data.smollm2.perplexity smollm2 smollm2-hasty

Greedy answers of the published model to data/harmless.txt, 24 tokens each, are read by the aligned one. Every
question is steered as SCANS decides. Left out on purpose: texts that no model wrote, see `capability`.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import llama
import scans
from data.experiments.table3_capability import from_p
from data.smollm2.hasty import answers_of


@torch.inference_mode()
def losses(method, question, answer, kind):
    """The cross-entropy of every id of an answer: kind "default", or "steered" as SCANS decides."""
    decision = method.decide([question])
    prompt, = decision.prompts
    logits, = from_p(method, decision, [[prompt.ids[prompt.p], *answer[:-1]]], kind)            # (N, V)
    return F.cross_entropy(logits, torch.tensor(answer), reduction="none")


def command(args):
    method = scans.load(args.hasty, alpha=args.alpha, T=args.threshold)
    questions, base = scans.read_anchors(scans.DATA / "harmless.txt")[:args.limit], llama.load(args.base)
    answers = [answer for i in range(0, len(questions), 16)
               for answer in answers_of(base, method.tokenizer, questions[i:i + 16], 24)[0]]
    for name, kind in (("without SCANS", "default"), (f"alpha {method.settings.alpha:g}", "steered")):
        total = torch.cat([losses(method, *pair, kind) for pair in zip(questions, answers)])
        print(f"{name}: perplexity {float(total.mean().exp()):.3f}")


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
