"""The chat formats: one table, and which of its entries a model's folder shows.

Written after the chat templates that the models publish. Tests compare the ids with transformers'.

Left out: tools, the date lines that Llama 3.1 and later put before a system prompt, and the "<think>" with
which DeepSeek's later template opens an answer.
"""
import re
from dataclasses import dataclass
from pathlib import Path

from llama import read_json


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
        for name in FORMATS:
            if name in part.lower():
                return name
    raise ValueError(f"{folder}: no chat template, and the name does not tell the format; {ask}")
