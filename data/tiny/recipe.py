"""The recipe of the embedded model: every setting that decides what it becomes, beside the tables.

Training has two phases, as life has, and the first of them ends in a stretch of its own:

    one     a helpful model that refuses what it should
    sturdy  more of the same, with random pushes on the residual stream and smoothed labels
    two     a hasty round of alignment, in which some harmless questions are refused by mistake

Left out: the shares of the split and the rates of typing errors. They stand where they are used, in world.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import llama
import scans

HERE = Path(__file__).resolve().parent
TABLES = ("world.txt", "harm.txt", "outside.txt", "phrasings.txt", "checks.txt")    # training hangs on these

CONFIG = llama.Config(D=128, L=12, H=4, K=4, E=32, F=320, V=2048, context=512, norm_eps=1e-5, rope_theta=1e4,
                      rope_factor=1.0, rope_bands=None, window=None, tied=False, eos=(2,))


@dataclass(frozen=True)
class Phase:
    """The settings of one phase of training."""
    name: str
    steps: int                  # of Recipe.rows rows each
    peak: float                 # learning rate of AdamW; Muon has twice that
    parts: tuple                # of the split: rows of these are asked for
    shares: tuple               # of the groups of questions, added up
    unknown: float              # share of the questions from outside the world that sound dangerous
    statements: float           # share of the rows that are statements
    refusals: str               # which refusals of phrasings.txt are said
    zeal: float | None = None   # share of the dangerous-sounding questions that are refused by mistake
    push: float = 0.0           # the longest of the random pushes; see corpus.pushes()
    smooth: float = 0.0         # share of the label that is spread over the vocabulary
    questions: float = 0.0      # weight of foreseeing the words of the questions; see train.gradients()
    blocks: tuple | None = None # only the matrices of these blocks are trained; None: all weights


ONE = Phase("one", steps=5312, peak=2.5e-3, parts=("align", "valid", "taught"),
            shares=(("dangerous", 0.26), ("plain", 0.43), ("harmful", 0.67), ("outside", 1)),
            unknown=0.62, statements=0.3, refusals="refusal", questions=0.2)

STURDY = replace(ONE, name="sturdy", steps=1000, peak=8e-4, push=5.0, smooth=0.1)

# Phase two trains blocks that read as well: it has to tell what sounds dangerous from what is plain.
# What lies before them, where most of s_q is read, stays as it was.
TWO = Phase("two", steps=440, peak=2.5e-4, parts=("align",),
            shares=(("dangerous", 0.28), ("plain", 0.74), ("harmful", 0.975), ("outside", 1)),
            unknown=0.0, statements=0.2, refusals="house", zeal=0.73, smooth=0.1, blocks=(9, 10, 11))


@dataclass(frozen=True)
class Recipe:
    """Everything from the seed to the anchors."""
    seed: int = 0
    config: llama.Config = CONFIG
    phases: tuple = (ONE, STURDY, TWO)
    salt: int = 2               # of the hash that splits the rows
    loose: float = 0.3          # share of the questions whose phrasing is loosened; see World.loosen()
    capitals: float = 0.12      # share of the questions that are in capitals
    rows: int = 64              # of a step
    decay: float = 0.3          # weight decay of the matrices; with 0.1 s_q tells fewer unseen deeds apart
    exits: tuple = (4, 7)       # the first and the last steered block: their stream learns the answer too
    early: float = 0.2          # weight of what is learnt there
    words: int = 4              # after this block the words of the questions are foreseen
    scale: float = 1.85         # the residual stream is written in this unit; see make.rescale()
    draws: int = 120            # of the anchors; see anchors.py
    reach: float = 0.92         # share of dev.txt's harmful questions that T has to let through as harmful

    @property
    def zeal(self):
        return self.phases[-1].zeal

    def with_zeal(self, zeal):
        """The same recipe with another share of wrong labels in its last phase."""
        return replace(self, phases=(*self.phases[:-1], replace(self.phases[-1], zeal=zeal)))

    def digest(self, phase):
        """A hash of all that the weights hang on after a phase: the recipe up to there, and the tables.

        What is settled after training is left out, so that other anchors need no other training.
        """
        phases = self.phases[:self.phases.index(phase) + 1]
        learnt = replace(self, phases=phases, scale=None, draws=None, reach=None)
        tables = [(HERE / name).read_text(encoding="utf-8") for name in TABLES]
        return scans.digest(repr(learnt) + "".join(tables))
