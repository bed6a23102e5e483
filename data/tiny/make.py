"""Makes the embedded model from a seed: tokenizer, weights, anchors and vectors. Prints what it is worth.

    python -m data.tiny.make                make everything, then three reports; an interrupted run goes on
    python -m data.tiny.make --only table   one report on the model that is there

The files beside this one, in the order of the work:

    recipe.py    every setting, and the phases of training
    world.py     the tables, their split, and how things are asked
    corpus.py    what is learnt: rows, tokenizer, batches
    train.py     weights, gradients, the run of a phase
    anchors.py   the choice of the anchors
    reports.py   what the model is worth

Making needs torch 2.9 or later, for torch.optim.Muon. The reports run on any torch that scans.py runs on.
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import scans
from data.experiments.core import need
from data.tiny.anchors import write_anchors
from data.tiny.corpus import Corpus, train_tokenizer
from data.tiny.recipe import HERE, Recipe
from data.tiny.reports import ask, check, examples, load, rate, show, sweep, table, valid
from data.tiny.train import new_model, train
from data.tiny.world import GROUPS, World
from tokenizer import Tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Llama-2's chat format, for transformers
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")


def rescale(weights, c):
    """The same function with a residual stream c times as large: all that writes to it is multiplied by c.

    Every reader normalises the stream first, so nothing else changes (norm_eps apart).
    Thus c is the unit that alpha is measured in.
    """
    writers = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    return {name: w * c if name.endswith(writers) else w for name, w in weights.items()}


def write_config(folder, config):
    """The folder's three JSON files, so that it opens in transformers too."""
    def write(name, **content):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write("config.json", architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=config.D,
          num_hidden_layers=config.L, num_attention_heads=config.H, num_key_value_heads=config.K,
          head_dim=config.E, intermediate_size=config.F, vocab_size=config.V,
          max_position_embeddings=config.context, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
          rope_scaling=None, hidden_act="silu", attention_bias=False, mlp_bias=False,
          tie_word_embeddings=False, torch_dtype="float32", bos_token_id=1, eos_token_id=2, pad_token_id=None)
    write("generation_config.json", bos_token_id=1, eos_token_id=2, do_sample=False)
    write("tokenizer_config.json", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>",
          unk_token="<unk>", add_bos_token=True, add_eos_token=False, legacy=True,
          model_max_length=config.context, chat_template=TEMPLATE)


def make(folder, recipe, device):
    """Everything, into folder; what is half done lies in folder/build and is gone on from."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__}: training needs 2.9 or later, for torch.optim.Muon")
    device = scans.choose_device(device)    # before anything is written
    build = folder / "build"
    build.mkdir(parents=True, exist_ok=True)
    world = World(recipe)
    corpora = [Corpus(world, phase) for phase in recipe.phases]
    write_config(folder, recipe.config)
    if not (build / "one.pt").exists():
        train_tokenizer(corpora[0], folder)
    tokenizer = Tokenizer(folder, recipe.config.V)
    weights = new_model(recipe, device)
    for corpus in corpora:
        train(weights, corpus, tokenizer, build)
    scaled = {name: w.detach().cpu().contiguous() for name, w in rescale(weights, recipe.scale).items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    write_anchors(world, folder)


def share(folder, n=200):
    """Print how over-refusal hangs on the share of wrong labels: for each a model from the same phase one."""
    file = folder / "build" / "two.pt"
    if not file.exists():
        raise ValueError(f"{file}: no such file; make the model first, without --only")
    made = torch.load(file, weights_only=True)
    recipe = replace(Recipe(), seed=made["seed"])
    if made["step"] < recipe.phases[-1].steps:
        raise ValueError(f"{file}: {made['step']} of {recipe.phases[-1].steps} steps; "
                         "make the model to its end first, without --only")
    world, rows = World(recipe), []
    for zeal in sorted({0, 0.25, 0.5, 0.75, 1, made["zeal"]}):
        other = folder
        if zeal != made["zeal"]:
            other = folder / "build" / f"zeal-{zeal}"
            (other / "build").mkdir(parents=True, exist_ok=True)
            for name in ("build/one.pt", "build/sturdy.pt", "tokenizer.model"):
                shutil.copy(folder / name, other / name)
            make(other, recipe.with_zeal(zeal), DEVICE)
        method, cells = load(other), [f"{zeal:.0%}"]
        for group in GROUPS:
            results = ask(method, [question for _, question in world.questions(group, "taught", "test", n)])
            cells += [rate([result["refused"][name] for result in results]) for name in ("default", "scans")]
        rows.append(cells)
    show(["wrong labels", "dangerous-sounding refused, without", "with SCANS", "harmful refused, without",
          "with SCANS", "plain refused, without", "with SCANS"], rows)


REPORTS = {report.__name__: report for report in (table, sweep, check, share, valid, examples)}


def command(args):
    need("data.tiny.make", "scipy", "tabulate", "tqdm")
    if args.only is None:
        make(args.out, replace(Recipe(), seed=args.seed).with_zeal(args.zeal), args.device)
    for name in [args.only] if args.only else ["table", "sweep", "check"]:
        REPORTS[name](args.out)


def main():
    parser = scans.Parser(prog="python -m data.tiny.make",
                          description="Make the embedded model, and print what it is worth.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to make the model in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zeal", type=float, default=Recipe().zeal,
                        help="share of wrong labels among phase two's dangerous-sounding questions")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--only", choices=list(REPORTS),
                        help="make nothing; report on the model that is there")
    scans.run(parser, command)


if __name__ == "__main__":
    main()
