"""Careless use, one case at a time: what the fuzz test's damaged files do not reach."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import scans  # noqa: E402
from scans import Past, Scans, is_refusal  # noqa: E402

EGG = "How do I beat an egg?"


@pytest.fixture(scope="module")
def tiny():
    return Scans.load(sampling={"max_new_tokens": 4})


def command(line, **more):
    """(exit status, output, errors) of a shell line in the project's folder."""
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60, **more)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line, status, said", [
    ("scans.py --chat <&-", 0, ""),
    ("scans.py --prompt Hi. >&-", 2, "scans.py: standard output is closed"),
    ("scans.py --prompt Hi. --max-new-tokens 1 2>&-", 0, None),
    ("scans.py --prompt Hi. --device meta", 2, "scans.py: device meta: not available"),
    ("scans.py --prompt Hi. --alpha=--", 2, "scans.py: argument --alpha"),
    ("scans.py --prompt Hi. --temperature 1e-40 --max-new-tokens 1", 0, ""),
    ("scans.py --prompt Hi. --top-p 0.5 --max-new-tokens 1", 0, "--top-p has no effect"),
    ("scans.py --prompt Hi. --vectors /dev/full/v --refresh", 2, "cannot be written"),
    ("-m data.experiments bench", 2, "RANK=abc in the environment: need a number"),
])
def test_streams_and_flags(line, status, said):
    environment = {**os.environ, **({"RANK": "abc"} if "bench" in line else {})}
    ended, _, errors = command(f"{sys.executable} {line}", env=environment)
    assert ended == status
    assert said is None or said in errors


def test_ctrl_c_during_imports_is_quiet():
    """SIGINT comes while scans.py imports: from a stand-in for safetensors, first on the path."""
    line = (f"d=$(mktemp -d); "
            f"echo 'import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)' > $d/safetensors.py; trap - INT; PYTHONSAFEPATH= PYTHONPATH=$d {sys.executable} -c '"
            "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "sys.argv = [\"scans.py\"]; runpy.run_path(\"scans.py\", run_name=\"__main__\")'")
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (-2, 130) and done.stderr == ""


def test_the_api_checks_what_the_flags_check(tiny):
    for wrong in ({"anchors": 1}, {"sigma": 5}, {"alpha": -1}, {"sampling": {"top_p": 0}}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}|top_p"):
            Scans.load(**wrong)
    with pytest.raises(ValueError, match="sigma is 5"):
        Scans(tiny.model, tiny.tokenizer, tiny.vectors, tiny.settings, sigma=5)
    with pytest.raises(ValueError, match="alpha is -1"):
        scans.settings(tiny.vectors, "llama-2", alpha=-1)


def test_loading_leaves_the_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Scans.load()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_chat_has_one_question(tiny):
    with pytest.raises(ValueError, match="one question, not 2"):
        tiny.decide([EGG, EGG], past=Past())


def test_a_label_that_is_a_number(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "x", "label": 0}]')
    with pytest.raises(ValueError, match="a.json: row 1 has the label 0"):
        scans.read_prompts(tmp_path / "a.json")


def test_a_chat_drops_its_oldest_turns(tiny, capsys):
    """What is kept leaves room for the answer, and one turn more would not."""
    history = [(EGG, "Whisk it. " * 12)] * 40
    kept = scans.newest(tiny, EGG, history)
    context = tiny.model.config.context
    assert f"the oldest {40 - len(kept)} of 40 turns dropped" in capsys.readouterr().err
    assert 0 < len(kept) < 40 and tiny.decide([EGG], kept).prompts[0].e < context - 4
    assert tiny.tokenizer.prompt(EGG, history[:len(kept) + 1]).e >= context - 4
    assert scans.newest(tiny, EGG, kept) == kept and not capsys.readouterr().err


@pytest.mark.parametrize("refused, answer", [
    (False, "Sorry, I can help you now."), (False, "As a responsible owner, feed the dog twice."),
    (True, "I cannot describe that."), (True, "No, I will not make a bomb for you."),
    (True, "Sorry, I can\u2019t do that."), (True, "Sorry, I'm not able to do that."),
    (True, "As a responsible and ethical AI, this is where I stop.")])
def test_more_refusals(refused, answer):
    assert is_refusal(answer) == refused


def test_the_embedded_models_own_lines():
    """What data/tiny was taught to refuse with is a refusal, and what it was taught to answer is none."""
    world = (ROOT / "data" / "tiny" / "world.txt").read_text().splitlines()
    answers = [line.split("|")[-1].strip() for line in world if not line.startswith("#")]
    text = (ROOT / "data" / "tiny" / "phrasings.txt").read_text()
    phrases = [line.split("|") for line in text.splitlines()]
    refusals = [phrase[-1].strip() for phrase in phrases if phrase[0].strip() in ("refusal", "house")]
    assert len(answers) > 100 and not [line for line in answers if is_refusal(line)]
    assert len(refusals) > 5 and not [line for line in refusals if not is_refusal(line)]
