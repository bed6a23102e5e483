"""The embedded model: what its card calls held out is never drawn for training, and how it is trained."""
import csv
import random
import re
from dataclasses import replace

import pytest
import torch

import llama
import scans
from data.tiny import make, reports, train
from data.tiny.corpus import Corpus, encoded
from data.tiny.recipe import HERE, ONE, Recipe
from data.tiny.world import UNKNOWN, Row, World, content, dev_questions
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def corpora(world):
    return {phase.name: Corpus(world, phase) for phase in world.recipe.phases}


def pattern(text):
    """What a phrasing with [choices/like/these] can become."""
    text = re.escape(text.replace("{X}", "{x}"))
    return re.sub(r"\\\[(.*?)\\\]", lambda match: f"(?:{match[1].replace('/', '|')})", text)


def test_no_train_phrasing_can_become_a_valid_or_test_one(world):
    before, after = ("|".join(map(pattern, world.phrasings[place, "any"])) for place in ("before", "after"))
    for form in ("do", "thing", "ask"):
        trained = [f"(?:(?:{before}) )?{pattern(text)}(?: (?:{after}))?"
                   for text in world.phrasings["train", form]]
        for text in world.phrasings["valid", form] + world.phrasings["test", form]:
            text = text.replace("{X}", "{x}")
            assert not [some for some in trained if re.fullmatch(some, text, re.IGNORECASE)], text


def test_a_loosened_phrasing_keeps_its_row_and_contains_no_held_out_phrasing(world):
    rng = random.Random(0)
    for form in ("do", "thing", "ask"):
        row = Row("", "", form, "xyzzy plugh", "")
        held_out = [text.rstrip(".?").replace("{X}", "{x}").format(x=row.text).lower()
                    for part in ("valid", "test") for text in world.phrasings[part, form]]
        said = [world.say("train", row, rng, loose=1.0).lower() for _ in range(1000)]
        assert all(row.text in text for text in said) and len(set(said)) > 500
        assert not [text for text in said if any(phrase in text for phrase in held_out)]


def test_the_split(world, corpora):
    """No phase draws a row that is measured, or asks about a harmful one of valid or of checks.txt."""
    parts = {row.text: row.part for row in world.rows}
    assert len(parts) == len(world.rows)
    for name, corpus in corpora.items():
        allowed = {"align"} if name == "two" else {"align", "valid", "taught"}
        stated, asked = ({parts[row.text] for some in groups.values() for rows in some for row in rows}
                         for groups in (corpus.stated, corpus.asked))
        assert asked <= stated == allowed
        assert "valid" not in {parts[row.text] for rows in corpus.asked["harmful"] for row in rows}
    checks = (HERE / "checks.txt").read_text(encoding="utf-8").lower()
    assert not [row for row in world.rows if row.answer is None and row.text.lower() in checks]


def test_what_is_drawn_has_a_known_answer_and_no_word_that_is_kept_out(world, corpora):
    rng, answers = random.Random(0), {row.answer for row in world.rows} | {UNKNOWN}
    answers.update(world.phrasings["refusal", "any"])
    for corpus in corpora.values():
        for _ in range(2000):
            for question, answer in corpus.draw(rng):
                assert not world.never.search(f"{question} {answer}")
                assert question is None or reports.bare(answer) in answers


def test_the_marked_prompts_of_overrefusal_csv_are_of_rows_that_phase_two_does_not_ask(world):
    """The longest row that each contains is measured, not trained. One prompt contains none."""
    with open(scans.DATA / "overrefusal.csv", encoding="utf-8", newline="") as file:
        prompts = [row["prompt"].lower() for row in csv.DictReader(file)
                   if row["note"].startswith("embedded model")]
    rows = [max((row for row in world.rows if row.text.lower() in prompt), key=lambda row: len(row.text),
                default=None) for prompt in prompts]
    assert len(rows) > 100 and rows.count(None) == 1
    assert {row.part for row in rows if row} == {"taught", "fresh"}


def test_questions_outside_the_world_are_unlike_its_rows(world):
    """By plain search, not by the index that world.py uses."""
    rng, rows = random.Random(0), [content(row.text) for row in world.rows if row.answer]
    for sounds in ("plain", "dangerous"):
        for text in {world.unknown(rng, sounds).text for _ in range(300)}:
            assert not [row for row in rows if len(row & content(text)) >= min(2, len(row))], text
            assert not world.never.search(text) and "{" not in text


def test_a_row_is_the_prompt_of_its_question_and_the_answer(corpora):
    tokenizer = Tokenizer(HERE, 2048)
    for seed in range(40):
        (question, answer), *more = corpora["one"].draw(random.Random(seed))
        if question and not more:
            ids, targets = encoded(corpora["one"], tokenizer, random.Random(seed))
            prompt = tokenizer.prompt(question)
            assert ids[:prompt.p + 1] == prompt.ids[:prompt.p + 1] and targets[:prompt.p] == [-100] * prompt.p
            assert tokenizer.decode(targets[prompt.p:-1]) == answer and targets[-1] == 2


def test_a_phase_of_few_blocks_trains_those_alone(world, corpora):
    two, recipe = corpora["two"], replace(world.recipe, rows=32)
    corpus = Corpus(World(recipe), replace(two.phase, steps=1))
    before, weights = (train.new_model(recipe, "cpu") for _ in range(2))
    train.train(weights, corpus, Tokenizer(HERE, 2048))
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert {int(name.split(".")[2]) for name in changed} == {9, 10, 11} and len(changed) == 3 * 7


def test_the_words_of_questions_are_learned_in_the_first_blocks():
    recipe, weights = Recipe(), train.new_model(Recipe(), "cpu")
    model, some = llama.Llama(recipe.config, weights), list(weights.values())
    ids = torch.randint(3, 2048, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(ids, -100)
    targets[:, 6:] = ids[:, 6:]
    without, weighted = (train.gradients(some, model, recipe, replace(ONE, questions=weight), ids, targets)[2]
                         for weight in (0.0, 0.2))
    moved = {name for name, a, b in zip(weights, without, weighted) if not torch.allclose(a, b, atol=1e-6)}
    blocks = {int(name.split(".")[2]) for name in moved if "layers" in name}
    assert blocks == set(range(recipe.words + 1))
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= moved


def test_rescaling_changes_nothing_but_the_unit():
    weights = {name: w.detach() for name, w in train.new_model(Recipe(), "cpu").items()}
    config, ids = Recipe().config, torch.arange(40).view(2, 20)
    grown = replace(config, norm_eps=4.0**2 * config.norm_eps)      # it is added to squares
    x, _ = llama.Llama(config, weights).forward(ids)
    larger, _ = llama.Llama(grown, make.rescale(weights, 4.0)).forward(ids)
    torch.testing.assert_close(larger, 4 * x, atol=1e-4, rtol=1e-4)


def test_the_card_has_the_table_that_is_printed_and_dev_txt_reaches_T(capsys):
    method, recipe = scans.load(HERE, device="cpu", max_new_tokens=4), Recipe()
    sigma = method.decide(dev_questions("harmful")).sigma
    assert (sigma == 1).sum() >= recipe.reach * len(sigma) > 100
    reports.table(method, n=4)
    names = re.findall(r"^\| \([abc]\).*? \| ", capsys.readouterr().out, re.M)
    card = (HERE / "README.md").read_text(encoding="utf-8")
    assert len(names) == 13 and all(name in card for name in names)
