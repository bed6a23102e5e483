"""Text to ids and back, and the chat formats: the one place where a prompt is built.

A sentencepiece model turns text into ids; the control ids BOS and EOS are put in by hand, never parsed from text, so that
nothing a user types can become one. The chat formats are one table. A prompt carries its two positions, which are
counted, never searched for:

    p   last token of the instruction                     (where SCANS reads a^l(q), and from where it steers)
    e   last token of the instruction with r_pos ("Sure") behind it
"""
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

BOS, EOS = object(), object()  # control ids in the table below; everything else there is text


@dataclass(frozen=True)
class Format:
    """One chat format. Neighbouring texts are joined, then encoded whole: two halves apart would gain a spurious space."""
    begin: tuple            # once, before the first turn
    system: tuple           # the system prompt {s}, inside the first turn's {system} or before it; () if the format has none
    turn: tuple             # a question {q}; everything up to where the answer starts
    answer: tuple           # a finished answer {a}, before the next turn
    r_pos: str              # "Sure" with the joint this format puts before an answer
    default_system: str     # what stands for the system prompt if none is given; "" for none


FORMATS = {
    # BOS opens every turn. No default system prompt: Meta's advice, to reduce false refusals.
    "llama-2": Format((), ("<<SYS>>\n{s}\n<</SYS>>\n\n",), (BOS, "[INST] {system}{q} [/INST]"), (" {a} ", EOS), " Sure", ""),
    "vicuna": Format((BOS,), ("{s} ",), ("USER: {q} ASSISTANT:",), (" {a}", EOS), " Sure",
                     "A chat between a curious user and an artificial intelligence assistant. "
                     "The assistant gives helpful, detailed, and polite answers to the user's questions."),
    "mistral": Format((BOS,), (), ("[INST] {q} [/INST]",), (" {a}", EOS), " Sure", ""),
    # The published template has no BOS; its tags are plain text.
    "zephyr": Format((), ("<|system|>\n{s}", EOS, "\n"), ("<|user|>\n{q}", EOS, "\n<|assistant|>\n"), ("{a}", EOS, "\n"), "Sure", ""),
}

# what a chat template shows, looked for in this order: Llama-2's template holds [INST] too
MARKS = {"<<SYS>>": "llama-2", "<|assistant|>": "zephyr", "[INST]": "mistral", "ASSISTANT:": "vicuna"}


@dataclass(frozen=True)
class Prompt:
    """Ids of instruction + r_pos and the two positions in them: ids[:p + 1] is the instruction alone."""
    ids: list[int]
    p: int
    e: int


class Tokenizer:
    """A folder's tokenizer.model with one chat format and one system prompt."""

    def __init__(self, folder, vocabulary, format=None, system=None):
        """vocabulary: the model's vocab_size, which the tokenizer must match. format: a name in FORMATS, or None to find it
        out. system: None for the format's own default, "" for none. Raises ValueError for what cannot be."""
        path = Path(folder) / "tokenizer.model"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a sentencepiece tokenizer is needed")
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: not a sentencepiece model") from None
        if self.sp.vocab_size() != vocabulary:
            raise ValueError(f"{path}: {self.sp.vocab_size()} pieces, the model's vocabulary is {vocabulary}")
        self.name = format or find_format(folder)
        if self.name not in FORMATS:
            raise ValueError(f"chat format {self.name}: unknown, there are {', '.join(FORMATS)}")
        self.format = FORMATS[self.name]
        self.system = (self.format.default_system if system is None else system).strip()
        if self.system and not self.format.system:
            raise ValueError(f"chat format {self.name} has no system prompt")

    def encode(self, parts):
        """Ids of a sequence of texts, BOS and EOS. Text is always plain text: "</s>" gives pieces, not a control id."""
        ids, text = [], ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
                continue
            try:
                ids += self.sp.encode(text.encode().decode())  # not every str is UTF-8: half a character from a shell is not
            except UnicodeEncodeError:
                raise ValueError("the text is not valid UTF-8") from None
            text = ""
            if part is not None:
                ids.append(self.sp.bos_id() if part is BOS else self.sp.eos_id())
        return ids

    def decode(self, ids):
        return self.sp.decode(ids)

    def piece(self, id):
        return self.sp.id_to_piece(id)

    def prompt(self, question, history=()):
        """The Prompt of a question after `history`, finished (question, answer) turns. All contents are stripped."""
        def fill(parts, **contents):  # one pass of str.format: braces inside the contents stay what they are
            return [part.format(**contents) if isinstance(part, str) else part for part in parts]

        if not question.strip():
            raise ValueError("the prompt is empty")
        f = self.format
        system = fill(f.system, s=self.system) if self.system else []
        inside = any(isinstance(part, str) and "{system}" in part for part in f.turn)
        parts = list(f.begin) + ([] if inside else system)
        for i, (q, a) in enumerate((*history, (question, None))):
            parts += fill(f.turn, q=q.strip(), system="".join(system) if inside and i == 0 else "")
            if a is not None:
                parts += fill(f.answer, a=a.strip())
        instruction, ids = self.encode(parts), self.encode([*parts, f.r_pos])
        if ids[:len(instruction)] != instruction:
            raise ValueError(f'this tokenizer joins "{f.r_pos}" with the end of the instruction, so that p has no place')
        return Prompt(ids, p=len(instruction) - 1, e=len(ids) - 1)


def find_format(folder):
    """The chat format a folder shows in its chat template, else in its name. Raises ValueError if neither tells."""
    folder = Path(folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = (folder / name).read_text(encoding="utf-8", errors="replace")
            for mark, format in MARKS.items():
                if mark in template:
                    return format
    for part in reversed(folder.resolve().parts[-3:]):  # a hub's cache has the model's name two levels up
        for name in FORMATS:
            if name in part.lower():
                return name
    raise ValueError(f"{folder}: no chat template, and the name does not tell it: give --format, one of {', '.join(FORMATS)}")
