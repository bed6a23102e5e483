"""The recipe of the embedded model: every setting that decides what it becomes, except the tables.

Training has three phases:

    one     a helpful model that refuses what it should
    sturdy  the same rows, with random pushes on the residual stream and smoothed labels
    two     a hasty round of alignment, in which some harmless questions are refused by mistake

Left out: the shares of the split and the rates of typing errors, which are in world.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import llama

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Phase:
    """The settings of one phase of training."""
    name: str
    steps: int                  # of Recipe.rows rows each
    peak: float                 # learning rate of AdamW; Muon has twice that
    parts: tuple                # of the split: their rows are asked about
    shares: tuple               # of the groups of questions, cumulative
    unknown: float              # share of the questions from outside the world that sound dangerous
    statements: float           # share of the rows that are statements
    refusals: str               # which refusals of phrasings.txt are used
    zeal: float = 0.0           # share of the dangerous-sounding questions that are refused by mistake
    push: float = 0.0           # the longest of the random pushes; see corpus.pushes()
    smooth: float = 0.0         # share of the label that is spread over the vocabulary
    questions: float = 0.0      # weight of predicting the words of the questions; see train.gradients()
    blocks: tuple | None = None # only the matrices of these blocks are trained; None: all weights


ONE = Phase("one", steps=5312, peak=2.5e-3, parts=("align", "valid", "taught"),
            shares=(("dangerous", 0.26), ("plain", 0.43), ("harmful", 0.67), ("outside", 1)),
            unknown=0.62, statements=0.3, refusals="refusal", questions=0.2)

STURDY = replace(ONE, name="sturdy", steps=1000, peak=8e-4, push=5.0, smooth=0.1)

# The blocks before these, in which most of s_q is read, stay as they are.
TWO = Phase("two", steps=440, peak=2.5e-4, parts=("align",),
            shares=(("dangerous", 0.28), ("plain", 0.74), ("harmful", 0.975), ("outside", 1)),
            unknown=0.0, statements=0.2, refusals="house", zeal=0.73, smooth=0.1, blocks=(9, 10, 11))


@dataclass(frozen=True)
class Recipe:
    """Everything from the seed to the anchors."""
    seed: int = 0
    config: llama.Config = llama.read_config(HERE)
    phases: tuple = (ONE, STURDY, TWO)
    salt: int = 2               # of the hash that splits the rows
    loose: float = 0.3          # share of the questions whose phrasing is loosened; see World.loosen()
    capitals: float = 0.12      # share of the questions that are in capitals
    rows: int = 64              # per step
    decay: float = 0.3          # weight decay of the matrices
    exits: tuple = (4, 7)       # first and last steered block: their stream learns the answer too
    early: float = 0.2          # weight of what is learned there
    words: int = 4              # after this block the words of the questions are predicted
    scale: float = 1.85         # unit of the residual stream; see make.rescale()
    draws: int = 120            # of the anchors; see anchors.py
    reach: float = 0.92         # share of the harmful questions of dev.txt that must reach T
