"""Text to ids and back: the one place where a prompt is built.

A folder's tokenizer.model is read with sentencepiece, else its tokenizer.json with the tokenizers package.

Control ids are put in by hand, never parsed from text, so that nothing a user types can become one. A prompt
carries its two positions, which are counted, never searched for:

    p   last token of the instruction                     (where SCANS reads a^l(q), and from where it steers)
    e   last token of the instruction with r_pos ("Sure") behind it

The chat formats are one table, written after the templates that the models publish. Tests compare the ids
with transformers'.

References: SentencePiece (arXiv 1808.06226), byte-level BPE (GPT-2's report, section 2.2).
Left out: tools; the date lines that Llama 3.1 and later put before a system prompt; the "<think>" with which
DeepSeek's later template opens an answer.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama import read_json

# ---------------------------------------------------------------------------------------------------------
# The chat formats


@dataclass(frozen=True)
class Format:
    """One chat format. {bos_token}, {eos_token} and `controls` become control ids, all else stays text."""
    begin: str              # once, before the first turn
    system: str             # the system prompt {s}, in {system} of the first turn or before it; "" for none
    turn: str               # a question {q}; everything up to where the answer starts
    answer: str             # a finished answer {a}, before the next turn
    r_pos: str              # "Sure" with the joint this format puts before an answer
    marks: tuple            # regular expressions: what a chat template of this format shows
    controls: tuple = ()    # control tokens by the names they have in the vocabulary
    default_system: str | None = ""  # system prompt if none is given; None: the folder's template tells


FORMATS = {
    # BOS opens every turn. No default system prompt: Meta's advice, to reduce false refusals.
    "llama-2": Format(
        "", "<<SYS>>\n{s}\n<</SYS>>\n\n", "{bos_token}[INST] {system}{q} [/INST]", " {a} {eos_token}",
        " Sure", (r"\[INST\]", "<<SYS>>", "bos_token")),
    "llama-3": Format(
        "{bos_token}", "<|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "{a}<|eot_id|>", "Sure",
        (r"<\|start_header_id\|>", r"<\|eot_id\|>", "bos_token"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "vicuna": Format(
        "{bos_token}", "{s} ", "USER: {q} ASSISTANT:", " {a}{eos_token}", " Sure",
        ("USER:", "ASSISTANT:", "bos_token"), (),
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."),
    "mistral": Format(
        "{bos_token}", "", "[INST] {q} [/INST]", " {a}{eos_token}", " Sure", (r"\[INST\]", "bos_token")),
    # v0.3. The space that its template puts behind a tag is the one that sentencepiece puts before any text.
    "mistral-v3": Format(
        "{bos_token}", "", "[INST]{q}[/INST]", "{a}{eos_token}", "Sure",
        (r"\[INST\]", r"\[AVAILABLE_TOOLS\]", "bos_token"), ("[INST]", "[/INST]")),
    # The published template has no BOS. Tulu has the same tags, but no EOS after a question.
    "zephyr": Format(
        "", "<|system|>\n{s}{eos_token}\n", "<|user|>\n{q}{eos_token}\n<|assistant|>\n", "{a}{eos_token}\n",
        "Sure", (r"<\|user\|>[^}]*eos_token", r"<\|assistant\|>")),
    # SmolLM2, Yi-Chat. The default system prompt is SmolLM2's own.
    "chatml": Format(
        "", "<|im_start|>system\n{s}<|im_end|>\n", "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "{a}<|im_end|>\n", "Sure",
        (r"<\|im_start\|>", r"<\|im_end\|>"), ("<|im_start|>", "<|im_end|>"), None),
    # DeepSeek-R1-Distill-Llama
    "deepseek": Format(
        "{bos_token}", "{s}", "<｜User｜>{q}<｜Assistant｜>", "{a}{eos_token}", "Sure",
        ("<｜User｜>", "<｜Assistant｜>", "bos_token"), ("<｜User｜>", "<｜Assistant｜>")),
}


@dataclass(frozen=True)
class Control:
    """A control token, by its name in the vocabulary. What BOS and EOS are, each folder says for itself."""
    name: str


BOS, EOS = Control("{bos_token}"), Control("{eos_token}")


@dataclass(frozen=True)
class Prompt:
    """Ids of instruction + r_pos and the two positions in them: ids[:p + 1] is the instruction alone."""
    ids: list[int]
    p: int
    e: int


# ---------------------------------------------------------------------------------------------------------
# Two vocabularies with the same members: encode, decode, piece, size, and controls (names to ids)


class SentencePiece:
    """A tokenizer.model."""

    def __init__(self, path):
        try:
            sp = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: not a sentencepiece model") from None
        self.encode, self.decode, self.piece = sp.encode, sp.decode, sp.id_to_piece
        self.size = sp.vocab_size()
        self.controls = {sp.id_to_piece(id): id for id in range(self.size) if sp.is_control(id)}
        parts = (BOS, sp.bos_id()), (EOS, sp.eos_id())
        self.controls |= {part.name: id for part, id in parts if id >= 0}


class TokenizerJson:
    """A tokenizer.json, with a tokenizer_config.json that names BOS and EOS."""

    def __init__(self, path):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path}: reading it needs one more package: pip install tokenizers") from None
        data, config = read_json(path), path.with_name("tokenizer_config.json")
        try:
            added = data.get("added_tokens") or []
            self.controls = {token["content"]: token["id"] for token in added}
            self.hidden = {token["id"] for token in added if token["special"]}  # what no answer shows
            # encode_special_tokens keeps text from becoming a special token: here, any added one.
            added = [{**token, "special": True} for token in added]
            text = json.dumps({**data, "added_tokens": added, "truncation": None, "padding": None})
            self.tokens = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: not a tokenizer of the tokenizers package ({reason})") from None
        self.tokens.encode_special_tokens = True
        self.size = 1 + max(self.tokens.get_vocab().values(), default=-1)
        byte_level = "ByteLevel" in str(data.get("decoder"))
        self.spell = tokenizers.decoders.ByteLevel().decode if byte_level else "".join
        names = read_json(config) if config.is_file() else {}
        for part in (BOS, EOS):
            name = names.get(part.name.strip("{}"))
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str) and name in self.controls:
                self.controls[part.name] = self.controls[name]

    def encode(self, text):
        ids = self.tokens.encode(text, add_special_tokens=False).ids
        for id in set(ids).intersection(self.controls.values()):  # merges could spell one letter by letter
            raise ValueError(f"the text spells {self.piece(id)}, a control token of this vocabulary")
        return ids

    def decode(self, ids):
        return self.tokens.decode([id for id in ids if id not in self.hidden], skip_special_tokens=False)

    def piece(self, id):
        """As sentencepiece writes it: "▁egg" and "<0x0A>" for a byte-level "Ġegg" and "Ċ"."""
        piece = self.tokens.id_to_token(id) or f"<{id}>"  # a row that pads the embeddings has no name
        piece = self.spell([piece]).replace(" ", "▁")
        return "".join(char if char.isprintable() else f"<0x{ord(char):02X}>" for char in piece)


# ---------------------------------------------------------------------------------------------------------
# Prompts


def check_text(text):
    """ValueError for a prompt that is empty, or that holds half a character, which a shell may pass on."""
    if not text.strip():
        raise ValueError("the prompt is empty")
    if text.encode(errors="replace").decode() != text:
        raise ValueError("the text is not valid UTF-8")


class Tokenizer:
    """A folder's tokenizer with one chat format and one system prompt. `file` is the path that was read."""

    def __init__(self, folder, vocabulary, format=None, system=None):
        """vocabulary: the model's vocab_size, which the tokenizer must match.

        format: a name in FORMATS, or None to find it out. system: None for the default, "" for none.
        Raises ValueError for what cannot be.
        """
        kind, self.file = SentencePiece, Path(folder) / "tokenizer.model"
        if not self.file.is_file():
            kind, self.file = TokenizerJson, Path(folder) / "tokenizer.json"
        if not self.file.is_file():
            raise ValueError(f"{self.file.with_suffix('.model')}: no such file, and no tokenizer.json either")
        self.words = kind(self.file)
        self.decode, self.piece, size = self.words.decode, self.words.piece, self.words.size
        # The models of a tokenizer.json may have more rows, up to a round number.
        if size > vocabulary or size < vocabulary and kind is SentencePiece:
            raise ValueError(f"{self.file}: {size} pieces, the model's vocabulary is {vocabulary}")
        self.name = format or find_format(folder)
        if self.name not in FORMATS:
            raise ValueError(f"chat format {self.name}: unknown, there are {', '.join(FORMATS)}")
        self.format = f = FORMATS[self.name]
        for part in self.fill(f.begin + f.system + f.turn + f.answer, q="", a="", s="", system=""):
            if isinstance(part, Control) and part.name not in self.words.controls:
                raise ValueError(f"{self.file}: chat format {self.name} needs a control token {part.name}")
            for name in self.words.controls if isinstance(part, str) else ():
                if name in part:
                    raise ValueError(f"{self.file}: {name} is a control token, but text in {self.name}")
        default = template_system(folder) if f.default_system is None else f.default_system
        self.system = (default if system is None else system).strip()
        if self.system and not f.system:
            raise ValueError(f"chat format {self.name} has no system prompt")

    def fill(self, template, **contents):
        """The texts and Controls of one string of the format. Contents go in last, so that they stay text."""
        names = BOS.name, EOS.name, *self.format.controls
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", template)
        return [Control(part) if part in names else part.format(**contents) for part in parts if part]

    def encode(self, parts):
        """Ids of a sequence of texts and Controls. Text stays text: "</s>" gives pieces, not a control id.

        Neighbouring texts are joined, then encoded whole: two halves apart would gain a spurious space.
        """
        ids, text = [], ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
                continue
            if text:
                check_text(text + ".")      # it may be a space: only a question must not be empty
                ids += self.words.encode(text)
            text = ""
            if part is not None:
                ids.append(self.words.controls[part.name])
        return ids

    def prompt(self, question, history=()):
        """The Prompt of a question after finished (question, answer) turns. All contents are stripped."""
        check_text(question)
        f, inside = self.format, "{system}" in self.format.turn
        system = self.fill(f.system, s=self.system) if self.system else []
        parts = self.fill(f.begin) + ([] if inside else system)
        for i, (q, a) in enumerate((*history, (question, None))):
            parts += self.fill(f.turn, q=q.strip(), system="".join(system) if inside and i == 0 else "")
            if a is not None:
                parts += self.fill(f.answer, a=a.strip())
        instruction, ids = self.encode(parts), self.encode([*parts, f.r_pos])
        if ids[:len(instruction)] != instruction:
            raise ValueError(f'this tokenizer joins "{f.r_pos}" with the instruction, so that p has no place')
        return Prompt(ids, p=len(instruction) - 1, e=len(ids) - 1)


# ---------------------------------------------------------------------------------------------------------
# Which format a folder shows


def read_template(folder):
    """A folder's chat template, "" if it has none. Raises ValueError if it has one that cannot be read."""
    path, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        path, template = config, read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(template, list):  # several, by name: the others are for tools
            template = {named["name"]: named["template"] for named in template}["default"]
        if template is None or isinstance(template, str):
            return template or ""
    except (KeyError, TypeError, OSError, UnicodeDecodeError):
        pass
    raise ValueError(f"{path}: the chat template is neither text nor a list with a default one")


def template_system(folder):
    """The system prompt that stands in a folder's ChatML template as a literal; "" if there is none."""
    literal = r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""  # quote, prompt
    found = re.search(literal, read_template(folder))
    return re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), found[2]) if found else ""


def find_format(folder):
    """The name of the format whose marks a folder's chat template shows, all of them and no other format's.

    Without a template the folder's name tells. Raises ValueError if neither does.
    """
    template, ask = read_template(folder), f"give --format, one of {', '.join(FORMATS)}"
    if template:
        shown = {mark for f in FORMATS.values() for mark in f.marks if re.search(mark, template)}
        for name, f in FORMATS.items():
            if shown == set(f.marks):
                return name
        raise ValueError(f"{folder}: the chat template is of no format known here; {ask}")
    for part in reversed(Path(folder).resolve().parts[-3:]):  # a hub's cache has the name two levels up
        for name in sorted(FORMATS, key=len, reverse=True):
            if name in part.lower():
                return name
    raise ValueError(f"{folder}: no chat template, and the name does not tell the format; {ask}")
