"""Proof that what the card calls held out is never drawn for training, and that an interrupted run ends where a whole one does."""
import re
from dataclasses import replace

import pytest
import torch

import llama
import scans
from data.tiny import make
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world():
    return make.World()


def test_no_train_phrasing_can_become_a_valid_or_test_one(world):
    def pattern(text):
        pieces = re.split(r"(\[.*?\])", text.replace("{X}", "{x}"))
        return "".join("(?:" + "|".join(map(re.escape, piece[1:-1].split("/"))) + ")" if piece.startswith("[") else re.escape(piece) for piece in pieces)
    held_out, around = 0, [f"(?:{'|'.join(pattern(text) for text in world.phrasings[place, 'any'])})" for place in ("before", "after")]
    for form in ("do", "thing", "ask"):
        for part in ("valid", "test"):
            for sentence in world.phrasings[part, form]:
                held_out += 1
                assert "[" not in sentence
                assert not [text for text in world.phrasings["train", form] if re.fullmatch(
                    f"(?:{around[0]} )?{pattern(text)}(?: {around[1]})?", sentence.replace("{X}", "{x}"), re.IGNORECASE)], sentence
    assert held_out >= 40


def test_a_loosened_phrasing_keeps_its_row_and_never_holds_a_held_out_phrasing(world):
    rng = make.random.Random(0)
    for form in ("do", "thing", "ask"):
        row = make.Row("", "", form, "xyzzy plugh", "")
        held_out = [text.rstrip(".?").replace("{X}", "{x}").format(x=row.text).lower() for part in ("valid", "test") for text in world.phrasings[part, form]]
        said = [world.say("train", row, rng, loose=1.0).lower() for _ in range(3000)]
        assert all(row.text in text for text in said) and len(set(said)) > 1500
        assert not [text for text in said if any(phrase in text for phrase in held_out)]


def test_the_split(world):
    """Every row has one part; what no phase uses is never drawn. Phase two asks for no row that is measured, no phase for a harmful one
    that is checked or may become an anchor."""
    corpus, rng = make.Corpus(world, 1.0), make.random.Random(0)
    texts = {part: {row.text for row in world.rows if row.part == part} for part in ("align", "valid", "taught", "fresh", "word")}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))
    used = {phase: {group: {row.text for rows in corpus.pool[group, phase] for row in rows} for group in make.GROUPS} for phase in make.SHARES}
    for phase in make.SHARES:
        assert not set.union(*used[phase].values()) & (texts["fresh"] | texts["word"])
    assert set.union(*used["two"].values()) <= texts["align"]
    assert not any(row.part == "valid" for phase in make.SHARES for rows in corpus.asked["harmful", phase] for row in rows)
    assert not any(world.never.search(text) for group in used["one"].values() for text in group)
    checks = (make.HERE / "checks.txt").read_text(encoding="utf-8").lower()
    assert not [row.text for row in world.rows if row.answer is None and row.text.lower() in checks]
    dev = (make.HERE / "dev.txt").read_text(encoding="utf-8").lower()
    assert not [row.text for row in world.rows if len(row.text.split()) > 3 and row.text.lower() in dev]
    answers = {row.answer for row in world.rows} | {*world.phrasings["refusal", "any"], make.UNKNOWN}
    for phase in make.SHARES:
        for _ in range(2000):
            history, question, answer = corpus.draw(phase, rng)
            assert not world.never.search(f"{question} {answer}")
            assert question is None or make.bare(answer) in answers


def test_the_marked_prompts_of_overrefusal_csv_lie_outside_phase_two(world):
    """The longest row of the world that each names is of a part that phase two does not ask for; one names none."""
    rows = [row for row in scans.read_prompts(make.HERE.parent / "overrefusal.csv") if row.fields["note"].startswith("embedded model")]
    assert len(rows) > 100
    texts = [(row, row.text.lower()) for row in world.rows]
    named = [max((row for row, text in texts if text in prompt.text.lower()), key=lambda row: len(row.text), default=None) for prompt in rows]
    assert {row.part for row in named if row} == {"taught", "fresh"} and named.count(None) == 1


def test_questions_outside_the_world_are_not_near_what_it_holds(world):
    """Neither a row nor its words of weight stand in a made up question; by plain search, not by the index that make.py uses."""
    rng, rows = make.random.Random(0), [make.content(row.text) for row in world.rows if row.answer]
    for sounds in ("plain", "dangerous"):
        texts = {world.unknown(rng, sounds).text for _ in range(500)}
        assert len(texts) > 300
        for text in texts:
            assert not [row for row in rows if len(row & make.content(text)) >= min(2, len(row))], text
            assert not world.never.search(text) and "{" not in text


def test_an_interrupted_run_ends_where_a_whole_one_does(world, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "STEPS", {"one": 2, "sturdy": 4, "two": 2})
    monkeypatch.setattr(make, "ROWS", 32)
    monkeypatch.setattr(make, "KEEP", 2)
    corpus, ends, whole = make.Corpus(world, 1.0), [], make.batches

    def interrupted(corpus, tokenizer, phase, seed, step, cuts):
        if step == 3:
            raise KeyboardInterrupt
        return whole(corpus, tokenizer, phase, seed, step, cuts)
    tokenizer = Tokenizer(make.HERE, make.CONFIG.V)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        weights = make.new_model(0, "cpu")
        if name == "b":
            monkeypatch.setattr(make, "batches", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make.train(weights, corpus, tokenizer, "sturdy", 0, tmp_path / name)
            monkeypatch.setattr(make, "batches", whole)
            weights = make.new_model(1, "cpu")  # what a new process begins with does not matter
        make.train(weights, corpus, tokenizer, "sturdy", 0, tmp_path / name)
        ends.append(weights)
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(make, "STEPS", {"one": 2, "sturdy": 5, "two": 2})
    with pytest.raises(ValueError, match="remove .* to begin anew"):
        make.train(weights, corpus, tokenizer, "sturdy", 0, tmp_path / "a")


def test_the_words_of_questions_are_learnt_up_to_one_block_and_padding_is_not_a_word():
    weights = make.new_model(0, "cpu")
    model, some = llama.assemble(make.CONFIG, weights), list(weights.values())
    ids = torch.randint(3, make.CONFIG.V, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(ids, -100)
    targets[:, 6:] = ids[:, 6:]
    without, weighted = (make.gradients(some, model, 0.0, questions, ids, targets)[2] for questions in (0.0, 0.2))
    moved = {name for name, a, b in zip(weights, without, weighted) if not torch.allclose(a, b, atol=1e-6)}
    blocks = {int(name.split(".")[2]) for name in moved if "layers" in name}
    assert blocks == set(range(make.WORDS + 1)) and {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= moved
    longer = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(targets, (0, 4), value=-100)
    for a, b in zip(weighted, make.gradients(some, model, 0.0, 0.2, *longer)[2]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rescaling_changes_nothing_but_the_unit():
    weights = {name: w.detach() for name, w in make.new_model(0, "cpu").items()}
    ids = torch.randint(make.CONFIG.V, (2, 20), generator=torch.Generator().manual_seed(0))
    grown = replace(make.CONFIG, norm_eps=4.0**2 * make.CONFIG.norm_eps)     # it alone does not scale: it is added to squares
    (x, _), (larger, _) = (llama.assemble(*of).forward(ids) for of in ((make.CONFIG, weights), (grown, make.rescale(weights, 4.0))))
    torch.testing.assert_close(larger, 4 * x, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_made_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="device nonsense: not to be had here"):
        make.make(tmp_path / "new", 0, 1.0, "nonsense")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="two.pt: no such file"):
        make.share(tmp_path)
    (tmp_path / "build").mkdir()
    torch.save({"step": 100, "seed": 0, "zeal": 1.0}, tmp_path / "build" / "two.pt")
    with pytest.raises(ValueError, match=f"two.pt: 100 of {make.STEPS['two']} steps"):
        make.share(tmp_path)


def test_the_kept_draw_of_anchors_is_one_whose_T_dev_txt_reaches():
    decided = scans.Scans.load(make.HERE).decide(make.dev_questions("harmful")).results
    assert sum(result["sigma"] == 1 for result in decided) >= make.REACH * len(decided) > 100
