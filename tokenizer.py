"""Text to ids and back: the one place where a prompt is built.

A folder's tokenizer.model is read with sentencepiece, else its tokenizer.json with the tokenizers package.
Control ids are put in by hand, never parsed from text, so that nothing a user types can become one. A prompt
carries its two positions, which are counted, never searched for:

    p   last token of the instruction: where SCANS reads a^l(q), and from where it steers
    e   last token of the instruction followed by r_pos ("Sure")

Left out on purpose: tools; conversations, since SCANS is single-turn; the date lines that Llama 3.1 and later
put before a system prompt; the "<think>" with which DeepSeek's later template opens an answer.
"""
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama import read_json, regular_file

# ---------------------------------------------------------------------------------------------------------
# The chat formats


@dataclass(frozen=True)
class Format:
    """One chat format. {bos}, {eos} and `controls` become control ids, everything else stays text."""
    prompt: str                 # with {system} and the question {q}, up to where the answer starts
    system: str                 # what {system} becomes where there is a system prompt {s}; "" if it cannot be
    r_pos: str                  # "Sure" with the joint that this format puts before an answer
    marks: tuple                # regular expressions: all that a chat template of this format shows
    controls: tuple = ()        # control tokens by the names they have in the vocabulary
    default_system: str | None = ""     # system prompt if none is given; None: the folder's template's


FORMATS = {
    # No default system prompt: Meta's advice, to reduce false refusals.
    "llama-2": Format(
        "{bos}[INST] {system}{q} [/INST]", "<<SYS>>\n{s}\n<</SYS>>\n\n", " Sure",
        (r"\[INST\]", "<<SYS>>", "bos_token")),
    "llama-3": Format(
        "{bos}{system}<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|>", "Sure",
        (r"<\|start_header_id\|>", r"<\|eot_id\|>", "bos_token"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "vicuna": Format(
        "{bos}{system}USER: {q} ASSISTANT:", "{s} ", " Sure", ("USER:", "ASSISTANT:", "bos_token"), (),
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."),
    "mistral": Format("{bos}[INST] {q} [/INST]", "", " Sure", (r"\[INST\]", "bos_token")),
    # v0.3. The space that its template puts after a tag is the one that sentencepiece puts before any text.
    "mistral-v3": Format(
        "{bos}[INST]{q}[/INST]", "", "Sure", (r"\[INST\]", r"\[AVAILABLE_TOOLS\]", "bos_token"),
        ("[INST]", "[/INST]")),
    # The published template has no BOS. Tulu has the same tags, but no EOS after a question.
    "zephyr": Format(
        "{system}<|user|>\n{q}{eos}\n<|assistant|>\n", "<|system|>\n{s}{eos}\n", "Sure",
        (r"<\|user\|>[^}]{0,80}eos_token", r"<\|assistant\|>")),
    # SmolLM2, Yi-Chat
    "chatml": Format(
        "{system}<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n{s}<|im_end|>\n", "Sure",
        (r"<\|im_start\|>", r"<\|im_end\|>"), ("<|im_start|>", "<|im_end|>"), None),
    # DeepSeek-R1-Distill-Llama
    "deepseek": Format(
        "{bos}{system}<｜User｜>{q}<｜Assistant｜>", "{s}", "Sure",
        ("<｜User｜>", "<｜Assistant｜>", "bos_token"), ("<｜User｜>", "<｜Assistant｜>")),
}


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
        self.size, ends = sp.vocab_size(), {"{bos}": sp.bos_id(), "{eos}": sp.eos_id()}
        self.controls = {sp.id_to_piece(id): id for id in range(self.size) if sp.is_control(id)}
        self.controls.update({name: id for name, id in ends.items() if id >= 0})


def guarded(method):
    """The tokenizers package raises anything, Rust panics included, which are not Exceptions."""
    @functools.wraps(method)
    def call(self, argument):
        try:
            return method(self, argument)
        except (ValueError, KeyboardInterrupt, SystemExit):
            raise
        except ImportError:
            raise ValueError("this tokenizer needs one more package: pip install tokenizers") from None
        except BaseException as error:
            raise ValueError(f"{self.path}: the tokenizers package cannot use it ({error})") from None
    return call


class TokenizerJson:
    """A tokenizer.json, with a tokenizer_config.json that names BOS and EOS."""

    @guarded
    def __init__(self, path):
        import tokenizers
        self.path = path
        data, config = read_json(path), path.with_name("tokenizer_config.json")
        added = data.get("added_tokens") or []
        # encode_special_tokens keeps text from becoming a special token: here, any added one
        text = json.dumps({**data, "added_tokens": [{**token, "special": True} for token in added],
                           "truncation": None, "padding": None})
        self.tokens = tokenizers.Tokenizer.from_str(text)
        self.tokens.encode_special_tokens = True
        self.size = 1 + max(self.tokens.get_vocab().values(), default=-1)
        self.controls = {token["content"]: self.tokens.token_to_id(token["content"]) for token in added}
        self.hidden = {self.controls[token["content"]] for token in added if token["special"]}
        ends = read_json(config) if config.is_file() else {}
        for part in ("bos", "eos"):
            name = ends.get(f"{part}_token")
            name = name["content"] if isinstance(name, dict) else name
            if name in self.controls:
                self.controls[f"{{{part}}}"] = self.controls[name]

    @guarded
    def encode(self, text):
        ids = self.tokens.encode(text, add_special_tokens=False).ids
        for id in set(ids).intersection(self.controls.values()):    # merges could spell one letter by letter
            raise ValueError(f"the text spells {self.piece(id)}, a control token of this vocabulary")
        return ids

    @guarded
    def decode(self, ids):
        return self.tokens.decode([id for id in ids if id not in self.hidden], skip_special_tokens=False)

    @guarded
    def piece(self, id):
        return self.tokens.id_to_token(id) or f"<{id}>"     # a row that pads the embeddings has no name


# ---------------------------------------------------------------------------------------------------------
# Prompts


class Tokenizer:
    """A folder's tokenizer with one chat format and one system prompt. `path` is the file that was read."""

    def __init__(self, folder, vocabulary, format=None, system=None):
        """vocabulary: the model's vocab_size, which the tokenizer must match.

        format: a name in FORMATS, or None to find it out. system: None for the default, "" for none.
        Raises ValueError for what does not fit together.
        """
        kind, self.path = SentencePiece, Path(folder) / "tokenizer.model"
        if not self.path.exists():
            kind, self.path = TokenizerJson, Path(folder) / "tokenizer.json"
        self.words = kind(regular_file(self.path))
        self.decode, self.piece, size = self.words.decode, self.words.piece, self.words.size
        # The models of a tokenizer.json may have more rows, up to a round number.
        if size > vocabulary or size < vocabulary and kind is SentencePiece:
            raise ValueError(f"{self.path}: {size} pieces, the model's vocabulary is {vocabulary}")
        self.name = format or find_format(folder)
        self.format = f = FORMATS[self.name]
        self.names = ("{bos}", "{eos}", *f.controls)
        for part in self.split(f.prompt + f.system):
            absent = part in self.names and part not in self.words.controls
            if absent or part not in self.names and any(name in part for name in self.words.controls):
                raise ValueError(f"{self.path}: the control tokens of this vocabulary are not those of chat "
                                 f"format {self.name}, which has {part!r}")
        default = template_system(folder) if f.default_system is None else f.default_system
        self.system = (default if system is None else system).strip()
        if self.system and not f.system:
            raise ValueError(f"chat format {self.name} has no system prompt")

    def split(self, template):
        """The parts of a template: names of control tokens, and the texts between them."""
        return [part for part in re.split(f"({'|'.join(map(re.escape, self.names))})", template) if part]

    def prompt(self, question):
        """The Prompt of a question, which is stripped. Raises ValueError for what is empty or not text."""
        if not question.strip():
            raise ValueError("the prompt is empty")
        question.encode(), self.system.encode()     # ValueError for a lone surrogate, as a shell may pass on
        f = self.format
        template = f.prompt.replace("{system}", f.system if self.system else "")
        instruction, ids = self.encode(template, question), self.encode(template + f.r_pos, question)
        if ids[:len(instruction)] != instruction or len(ids) == len(instruction):
            raise ValueError(f'{self.path}: "{f.r_pos}" does not follow the instruction as tokens of its own')
        return Prompt(ids, p=len(instruction) - 1, e=len(ids) - 1)

    def encode(self, template, question):
        """Ids of a template. What stands between control tokens is encoded whole, never in halves: the
        second would gain a spurious space. The contents go in last, so that they stay text."""
        ids = []
        for part in self.split(template):
            if part in self.names:
                ids.append(self.words.controls[part])
            else:
                ids += self.words.encode(part.format(q=question.strip(), s=self.system))
        return ids


# ---------------------------------------------------------------------------------------------------------
# Detecting the chat format


def read_template(folder):
    """A folder's chat template, as text; "" if it has none."""
    path, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if path.exists():
        return regular_file(path).read_text(encoding="utf-8", errors="replace")
    return str(read_json(config).get("chat_template") or "") if config.exists() else ""


def template_system(folder):
    """The system prompt that a folder's ChatML template contains as a literal; "" if there is none."""
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)((?:\\.|[^\\<{])+)<\|im_end\|>", read_template(folder))
    return re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), found[1]) if found else ""


def find_format(folder):
    """The name of the format whose marks a folder's chat template shows, all of them and no other format's.

    Without a template the folder's name decides. Raises ValueError if neither does.
    """
    template = read_template(folder)
    shown = {mark for f in FORMATS.values() for mark in f.marks if re.search(mark, template)}
    found = [name for name, f in FORMATS.items() if shown == set(f.marks)]
    if not template:
        for part in reversed(Path(folder).resolve().parts[-3:]):    # a hub's cache has the name two levels up
            found += sorted((name for name in FORMATS if name in part.lower()), key=len, reverse=True)
    if not found:
        raise ValueError(f"{folder}: the chat template, or without one the name, does not show a known "
                         f"format; give --format, one of {', '.join(FORMATS)}")
    return found[0]
