"""Proof that what the card calls held out is never drawn for training.

And that an interrupted run ends where a whole one does.
"""
import copy
import random
import re
from dataclasses import fields, replace

import pytest
import torch

import llama
import scans
from data.tiny import make, train
from data.tiny.corpus import Corpus
from data.tiny.recipe import CONFIG, HERE, ONE, STURDY, TABLES, TWO, Recipe
from data.tiny.reports import bare
from data.tiny.world import GROUPS, UNKNOWN, Row, World, content, dev_questions
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world():
    return World(Recipe().with_zeal(1.0))


def sturdy_corpus(world, steps):
    """The corpus of the second phase, for a run of so many small steps."""
    recipe, world = Recipe(), copy.copy(world)
    phases = tuple(replace(phase, steps=n) for phase, n in zip(recipe.phases, (2, steps, 2)))
    world.recipe = replace(recipe, rows=32, phases=phases)
    return Corpus(world, phases[1])


def pattern(text):
    """What a phrasing with [choices/like/these] can become."""
    def choice(piece):
        return "(?:" + "|".join(map(re.escape, piece[1:-1].split("/"))) + ")"
    pieces = re.split(r"(\[.*?\])", text.replace("{X}", "{x}"))
    return "".join(choice(piece) if piece.startswith("[") else re.escape(piece) for piece in pieces)


def test_no_train_phrasing_can_become_a_valid_or_test_one(world):
    held_out = 0
    before, after = ("|".join(map(pattern, world.phrasings[place, "any"])) for place in ("before", "after"))
    for form in ("do", "thing", "ask"):
        for part in ("valid", "test"):
            for sentence in world.phrasings[part, form]:
                held_out += 1
                assert "[" not in sentence
                wanted = sentence.replace("{X}", "{x}")
                assert not [text for text in world.phrasings["train", form] if re.fullmatch(
                    f"(?:(?:{before}) )?{pattern(text)}(?: (?:{after}))?", wanted, re.IGNORECASE)], sentence
    assert held_out >= 40


def test_a_loosened_phrasing_keeps_its_row_and_never_holds_a_held_out_phrasing(world):
    rng = random.Random(0)
    for form in ("do", "thing", "ask"):
        row = Row("", "", form, "xyzzy plugh", "")
        held_out = [text.rstrip(".?").replace("{X}", "{x}").format(x=row.text).lower()
                    for part in ("valid", "test") for text in world.phrasings[part, form]]
        said = [world.say("train", row, rng, loose=1.0).lower() for _ in range(3000)]
        assert all(row.text in text for text in said) and len(set(said)) > 1500
        assert not [text for text in said if any(phrase in text for phrase in held_out)]


def test_the_split(world):
    """Every row has one part; what no phase uses is never drawn.

    Phase two asks for no row that is measured.
    No phase asks for a harmful one that is checked or may become an anchor.
    """
    rng, corpora = random.Random(0), {phase.name: Corpus(world, phase) for phase in world.recipe.phases}
    texts = {part: {row.text for row in world.rows if row.part == part}
             for part in ("align", "valid", "taught", "fresh", "word")}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))
    used = {name: {group: {row.text for rows in corpus.stated[group] for row in rows} for group in GROUPS}
            for name, corpus in corpora.items()}
    for name in corpora:
        assert not set.union(*used[name].values()) & (texts["fresh"] | texts["word"])
    assert set.union(*used["two"].values()) <= texts["align"]
    for name, corpus in corpora.items():
        assert not any(row.part == "valid" for rows in corpus.asked["harmful"] for row in rows)
        for group in GROUPS:
            assert {row.text for rows in corpus.asked[group] for row in rows} <= used[name][group]
    assert not any(world.never.search(text) for group in used["one"].values() for text in group)
    checks = (HERE / "checks.txt").read_text(encoding="utf-8").lower()
    assert not [row.text for row in world.rows if row.answer is None and row.text.lower() in checks]
    dev = (HERE / "dev.txt").read_text(encoding="utf-8").lower()
    assert not [row.text for row in world.rows if len(row.text.split()) > 3 and row.text.lower() in dev]
    answers = {row.answer for row in world.rows} | {*world.phrasings["refusal", "any"], UNKNOWN}
    for corpus in corpora.values():
        for _ in range(2000):
            history, question, answer = corpus.draw(rng)
            assert not world.never.search(f"{question} {answer}")
            assert question is None or bare(answer) in answers


def test_the_marked_prompts_of_overrefusal_csv_lie_outside_phase_two(world):
    """The longest row of the world that each names is of a part that phase two does not ask for.

    One names none.
    """
    rows = [row for row in scans.read_prompts(HERE.parent / "overrefusal.csv")
            if row.fields["note"].startswith("embedded model")]
    assert len(rows) > 100
    texts = [(row, row.text.lower()) for row in world.rows]
    named = [max((row for row, text in texts if text in prompt.text.lower()), key=lambda row: len(row.text),
                 default=None) for prompt in rows]
    assert {row.part for row in named if row} == {"taught", "fresh"} and named.count(None) == 1


def test_questions_outside_the_world_are_not_near_what_it_holds(world):
    """Neither a row nor its words of weight stand in a made up question.

    This is found by plain search, not by the index that world.py uses.
    """
    rng, rows = random.Random(0), [content(row.text) for row in world.rows if row.answer]
    for sounds in ("plain", "dangerous"):
        texts = {world.unknown(rng, sounds).text for _ in range(500)}
        assert len(texts) > 300
        for text in texts:
            assert not [row for row in rows if len(row & content(text)) >= min(2, len(row))], text
            assert not world.never.search(text) and "{" not in text


def test_a_checkpoint_hangs_on_its_phase_those_before_it_and_the_tables(monkeypatch, tmp_path):
    recipe = Recipe()
    one, two = recipe.digest(ONE), recipe.digest(TWO)
    hasty = recipe.with_zeal(0.5)       # phase one is shared by models of other shares of wrong labels
    assert hasty.digest(ONE) == one and hasty.digest(hasty.phases[-1]) != two
    settled = {"scale", "draws", "reach"}                           # after training
    for field in fields(Recipe):
        if field.name != "phases":
            other = replace(recipe, **{field.name: "another"})
            assert (other.digest(ONE) == one) == (field.name in settled), field.name
    for field in fields(ONE):
        other = replace(ONE, **{field.name: "another"})
        assert replace(recipe, phases=(other, STURDY, TWO)).digest(TWO) != two, field.name
    for name in TABLES:
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    monkeypatch.setattr("data.tiny.recipe.HERE", tmp_path)
    assert recipe.digest(ONE) == one
    for name in TABLES:
        with open(tmp_path / name, "a", encoding="utf-8") as table:
            table.write("#\n")
        one, before = recipe.digest(ONE), one
        assert one != before, name


def test_the_recipe_fits_the_committed_model():
    assert llama.Config.from_folder(HERE) == CONFIG
    assert Recipe().exits == scans.unlisted(CONFIG.L).steer


def test_an_interrupted_run_ends_where_a_whole_one_does(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP", 2)
    corpus, ends, whole = sturdy_corpus(world, 4), [], train.batches
    recipe = corpus.world.recipe

    def interrupted(corpus, tokenizer, step, cuts):
        if step == 3:
            raise KeyboardInterrupt
        return whole(corpus, tokenizer, step, cuts)
    tokenizer = Tokenizer(HERE, CONFIG.V)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        weights = train.new_model(recipe, "cpu")
        if name == "b":
            monkeypatch.setattr(train, "batches", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train.train(weights, corpus, tokenizer, tmp_path / name)
            monkeypatch.setattr(train, "batches", whole)
            # what a new process begins with does not matter
            weights = train.new_model(replace(recipe, seed=1), "cpu")
        train.train(weights, corpus, tokenizer, tmp_path / name)
        ends.append(weights)
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="remove .* to begin anew"):
        train.train(weights, sturdy_corpus(world, 5), tokenizer, tmp_path / "a")


def test_the_words_of_questions_are_learnt_up_to_one_block_and_padding_is_not_a_word():
    recipe = Recipe()
    weights = train.new_model(recipe, "cpu")
    model, some = llama.assemble(CONFIG, weights), list(weights.values())
    ids = torch.randint(3, CONFIG.V, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(ids, -100)
    targets[:, 6:] = ids[:, 6:]
    without, weighted = (train.gradients(some, model, recipe, replace(ONE, questions=weight), ids, targets)[2]
                         for weight in (0.0, 0.2))
    moved = {name for name, a, b in zip(weights, without, weighted) if not torch.allclose(a, b, atol=1e-6)}
    blocks = {int(name.split(".")[2]) for name in moved if "layers" in name}
    assert blocks == set(range(recipe.words + 1))
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= moved
    longer = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(targets, (0, 4), value=-100)
    for a, b in zip(weighted, train.gradients(some, model, recipe, replace(ONE, questions=0.2), *longer)[2]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rescaling_changes_nothing_but_the_unit():
    weights = {name: w.detach() for name, w in train.new_model(Recipe(), "cpu").items()}
    ids = torch.randint(CONFIG.V, (2, 20), generator=torch.Generator().manual_seed(0))
    # norm_eps alone does not scale: it is added to squares
    grown = replace(CONFIG, norm_eps=4.0**2 * CONFIG.norm_eps)
    x, _ = llama.assemble(CONFIG, weights).forward(ids)
    larger, _ = llama.assemble(grown, make.rescale(weights, 4.0)).forward(ids)
    torch.testing.assert_close(larger, 4 * x, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_made_is_said_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="device nonsense: not available"):
        make.make(tmp_path / "new", Recipe(), "nonsense")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="two.pt: no such file"):
        make.share(tmp_path)
    (tmp_path / "build").mkdir()
    torch.save({"step": 100, "seed": 0, "zeal": 1.0}, tmp_path / "build" / "two.pt")
    with pytest.raises(ValueError, match=f"two.pt: 100 of {TWO.steps} steps"):
        make.share(tmp_path)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="training needs 2.9 or later"):
        make.make(tmp_path / "new", Recipe(), "cpu")
    assert not (tmp_path / "new").exists()


def test_the_kept_draw_of_anchors_is_one_whose_T_dev_txt_reaches():
    sigma = scans.Scans.load(HERE, device="cpu").decide(dev_questions("harmful")).sigma
    assert (sigma == 1).sum() >= Recipe().reach * len(sigma) > 100
