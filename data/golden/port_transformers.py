"""SCANS on any causal language model of transformers that has a chat template: Llama, Qwen, Gemma, Phi, ...

    pip install transformers        # and accelerate for --device-map: several GPUs, or a part on disk
    python -m data.golden.port_transformers --model Qwen/Qwen2.5-7B-Instruct --device-map auto --prompt TEXT

The mathematics, the settings, T and the vectors file are those of scans.py. Only what differs is here:
prompts come from the tokenizer's own chat template, the residual stream is read and steered by forward hooks
on the blocks, and transformers loads, splits, quantises and decodes.

Left out: system prompts other than the template's own; reuse of the decision's cache, so each query is
prefilled twice.

Letters of the shapes: B queries, N positions, R rows of a batch of answers, L blocks, D model width.
"""
import contextlib
import json
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llama
import scans
from tokenizer import Prompt, find_format


class Chat:
    """Prompts by a tokenizer's own chat template; what scans.py calls a tokenizer."""

    def __init__(self, tokenizer, name, r_pos="Sure"):
        if not tokenizer.chat_template:
            raise ValueError("its tokenizer has no chat template")
        self.tokenizer, self.system, self.format = tokenizer, "", SimpleNamespace(r_pos=r_pos)
        self.controls = tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.name = "its chat template"
        with contextlib.suppress(ValueError):
            self.name = find_format(name)       # a model of the paper gets its published settings
        identity = json.dumps([tokenizer.chat_template, sorted(tokenizer.get_vocab().items())])
        self.path = SimpleNamespace(read_bytes=identity.encode)     # of a file, in scans.py
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self.prompt("Hello")                    # a template that fails does so now

    def prompt(self, question):
        """The Prompt of a question. Raises ValueError where p and e cannot be counted."""
        question = question.strip()
        if not question:
            raise ValueError("the prompt is empty")
        question.encode()                       # ValueError for half a character, as a shell may pass on
        for token in self.controls:             # the tokenizer would let a user end the turn, and move p
            if token in question:
                raise ValueError(f"the prompt spells {token}, a control token of this vocabulary")
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                                  add_generation_prompt=True, tokenize=False)
        joint = "" if text[-1:].isspace() or text.endswith(self.controls) else " "
        instruction, ids = (self.tokenizer.encode(part, add_special_tokens=False)
                            for part in (text, text + joint + self.format.r_pos))
        if not 0 < len(instruction) < len(ids) or ids[:len(instruction)] != instruction:
            raise ValueError(f"the tokenizer joins {self.format.r_pos!r} to {text[-9:]!r} before it")
        return Prompt(ids, p=len(instruction) - 1, e=len(ids) - 1)


@contextlib.contextmanager
def hooked(blocks, layers, hook):
    """Within it, hook(l, x) sees the stream x (B, N, D) after each of the layers, and may return another."""
    def attach(l):
        def call(block, arguments, output):
            bare = isinstance(output, torch.Tensor)     # since transformers 5
            x = hook(l, output if bare else output[0])
            return x if bare or x is None else (x, *output[1:])
        return blocks[l].register_forward_hook(call)

    handles = [attach(l) for l in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Model:
    """A model of transformers, `lm`; what scans.py calls a model, as far as reading goes."""

    def __init__(self, lm):
        self.lm, self.decoder = lm, lm.get_decoder()
        self.blocks = getattr(self.decoder, "layers", None)
        if not isinstance(self.blocks, torch.nn.ModuleList):
            raise ValueError(f"no list of blocks: {type(self.decoder).__name__}, which get_decoder() of "
                             f"{type(lm).__name__} gives, has no ModuleList called layers")
        self.config = SimpleNamespace(L=len(self.blocks), D=lm.get_input_embeddings().embedding_dim)
        # not what accelerate keeps on disk ("meta"), nor what a quantiser has packed
        weights = [w for w in lm.state_dict().values() if type(w) is torch.Tensor and not w.is_meta]
        self.embed = SimpleNamespace(device=weights[0].device, dtype=lm.dtype)
        some = [w.flatten()[::w.numel() // 256 + 1].tolist() for w in weights]
        self.fingerprint = f"transformers {scans.digest([lm.name_or_path, lm.config.to_json_string(), some])}"

    def forward(self, ids, read):
        """(None, the streams (B, L, P, D) at positions read (B, P)) of ids (B, N), padded on the right."""
        streams, row, read = [], torch.arange(len(ids))[:, None], read.cpu()
        with hooked(self.blocks, range(self.config.L),
                    lambda l, x: streams.append(x[row, read].float().cpu())):
            self.decoder(input_ids=ids, use_cache=False)        # no mask: no position sees a later one
        return None, llama.check_finite(torch.stack(streams, 1), "the residual stream")

    def steered(self, steer, layers):
        """Within it, steer (R, L, D) is added at the last position of each call: p, then every later one."""
        def add(l, x):
            return torch.cat((x[:, :-1], x[:, -1:] + steer[:, l, None].to(x)), 1)               # Eq. 6
        return hooked(self.blocks, layers, add)


class Scans(scans.Scans):
    """As in scans.py, except that `answer` decides too, and that an answer stops for "eos" or "length"."""

    @torch.inference_mode()
    def answer(self, questions, default=True, show=lambda answers: None):
        lm, settings, device = self.model.lm, self.settings, self.model.embed.device
        prompts = [self.tokenizer.prompt(question) for question in questions]
        streams = scans.read_streams(self.model, prompts)                               # (B, L, 2, D)
        cos = scans.cosines(scans.transition(streams), self.vectors.d_harm)             # (B, L)
        s = scans.score(cos, settings.classify_layers)                                  # (B)
        sigma = [(-1 if x < settings.T else 1) if settings.sigma is None else settings.sigma for x in s]
        results = [{"prompt": questions[i], "p": prompt.p, "e": prompt.e, "score": float(s[i]),
                    "sigma": sigma[i], "cosines": cos[i].tolist(),
                    "default": None, "steered": None, "stopped": {}} for i, prompt in enumerate(prompts)]
        rows = [(i, "steered", settings.alpha * direction) for i, direction in enumerate(sigma)]
        if default:
            rows = [(i, "default", 0.0) for i, *_ in rows] + rows
        strength = torch.tensor([strength for *_, strength in rows])                            # (R)
        steer = scans.steering(self.vectors.v_r, strength, settings.steer_layers)               # (R, L, D)
        ids = [prompts[i].ids[:prompts[i].p + 1] for i, *_ in rows]
        N = max(map(len, ids))
        mask = torch.tensor([[0] * (N - len(row)) + [1] * len(row) for row in ids], device=device)
        # padded with the row's own first id: a tokenizer need not have a pad token
        ids = torch.tensor([row[:1] * (N - len(row)) + row for row in ids], device=device)      # (R, N)
        end = lm.generation_config.eos_token_id or self.tokenizer.tokenizer.eos_token_id
        end = [end] if isinstance(end, int) else end

        def watch(ids, scores):                 # a criterion for stopping that never stops
            show(ids[:, N:].tolist())
            return torch.zeros_like(ids[:, 0], dtype=torch.bool)

        with self.model.steered(steer.to(device), settings.steer_layers):
            ids = lm.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, disable_compile=True,
                              max_new_tokens=settings.max_new_tokens, stopping_criteria=[watch],
                              repetition_penalty=settings.repetition_penalty,
                              eos_token_id=end, pad_token_id=end[0])
        for (i, kind, _), row in zip(rows, ids[:, N:].tolist()):
            stop = next((n for n, id in enumerate(row) if id in end), None)
            results[i][kind] = self.tokenizer.decode(row[:stop])
            results[i]["stopped"][kind] = "length" if stop is None else "eos"
        return results


def load(name, r_pos="Sure", vectors=None, harmful=None, harmless=None, anchors=None, anchor_seed=None,
         progress=lambda done: None, dtype=None, device_map=None, quantization_config=None, **settings):
    """As in scans.py, of a folder or a name on the hub; dtype and the two after it are from_pretrained's."""
    try:
        if AutoConfig.from_pretrained(name).is_encoder_decoder:
            raise ValueError("it has an encoder; SCANS needs a causal language model")
        chat = Chat(AutoTokenizer.from_pretrained(name), name, r_pos)
        model = Model(AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", device_map=device_map, quantization_config=quantization_config))
    except Exception as error:                  # transformers raises anything
        raise ValueError(f"{name}: {error!s:.300}") from None
    found = scans.find_vectors(name, model, chat, vectors, progress, harmful=harmful, harmless=harmless,
                               anchors=anchors, anchor_seed=anchor_seed)
    return Scans(model, chat, found, scans.choose_settings(found, chat.name, **settings))


FLAGS = {name: flag for name, flag in scans.FLAGS.items() if name not in ("format", "system", "device")}
FLAGS["device_map"] = (str, "auto: several GPUs, then memory, then disk; or one device, such as cuda:1")


def command(args):
    method = load(args.model, progress=lambda done: scans.report(f"extracting vectors: {done} anchors"),
                  **{name: getattr(args, name) for name in FLAGS})
    scans.describe(method, args)
    for question in args.prompt:
        scans.ask(method, question, args)


def main():
    parser = scans.Parser(prog="port_transformers.py", description="SCANS on a model of transformers.")
    parser.add_argument("--model", required=True, metavar="NAME", help="a folder, or a name on the hub")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may repeat")
    parser.add_argument("--no-default", action="store_true", help="only the answer with SCANS")
    parser.add_argument("--json", action="store_true", help="one JSON object per query on standard output")
    scans.add_table(parser, FLAGS)
    parser.set_defaults(trace=None)             # a mode that scans.ask looks for
    scans.run(parser, command)


if __name__ == "__main__":
    main()
