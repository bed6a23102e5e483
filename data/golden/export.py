"""Write a model's vectors for other stacks: safetensors, JSON, a llama.cpp control vector, a note.

    python -m data.golden.export DIR        # and the flags of scans.py about the model and the method

stacks.md describes the files field by field. Needs the package gguf besides those of scans.py.

References: the GGUF format (github.com/ggml-org/ggml, docs/gguf.md); llama.cpp's cvector-generator.
Left out: formats of other servers. vectors.json holds all that one needs.
"""
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import scans

try:
    import gguf
except ImportError:  # an extra
    gguf = None

FILES = "vectors.safetensors", "vectors.json", "vectors.gguf", "README.txt"
NOTE = """Refusal vectors of {model}, chat format {format}, {L} layers of width {D}

vectors.safetensors   all that scans.py found; its flag --vectors takes this file
vectors.json          v_r, d_harm, T, alpha, layers, format, system prompt, r_pos: all that SCANS needs
vectors.gguf          llama.cpp control vector: unit vectors in the steering layers {layers}, zeros elsewhere

The scale on llama.cpp's command line is alpha to add, minus alpha to subtract:

    llama-cli -m MODEL.gguf --control-vector-scaled vectors.gguf:{alpha:g}      # sigma = +1: towards refusal
    llama-cli -m MODEL.gguf --control-vector-scaled vectors.gguf:-{alpha:g}     # sigma = -1: against it

Older builds take two words, FILE SCALE. What a control vector cannot carry:

- sigma. SCANS chooses it for every query: score the query first (Eqs. 2 to 5), then start with that sign.
- The start position. llama.cpp adds the vector at every position, the prompt's too; SCANS only from p on.
- Block 0. The format has no name for it.

Answers therefore differ somewhat from those of scans.py.

WARNING. Subtracted from every query, these vectors remove the model's refusals altogether, of harmful
requests as well. SCANS never does that: where s_q reaches T it adds them. Do not serve a model with a
fixed negative scale.
"""


def control_vector(path, v_r, layers):
    """Write v_r (L, D) as a control vector: direction.l for block l, from 1 on; zeros outside `layers`."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", len(v_r) - 1)
    for l in range(1, len(v_r)):
        row = v_r[l].float().numpy()
        writer.add_tensor(f"direction.{l}", row if l in layers else np.zeros_like(row))      # (D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(native, plain, control, readme, method, model):
    """Write the four files of a Scans; model: the folder it came from."""
    vectors, chosen, tokenizer = method.vectors, method.settings, method.tokenizer
    L, D = vectors.v_r.shape
    facts = {"model": Path(model).resolve().name, "format": tokenizer.name, "system": tokenizer.system,
             "r_pos": tokenizer.format.r_pos, "alpha": chosen.alpha, "T": chosen.T,
             "steer_layers": chosen.steer, "classify_layers": chosen.classify}
    rows = {name: [[float(f"{x:.9g}") for x in row] for row in getattr(vectors, name).tolist()]
            for name in ("v_r", "d_harm")}                                  # 9 digits: float32, exactly
    note = NOTE.format(**{**facts, "model": model}, L=L, D=D, layers=scans.show_layers(chosen.steer))
    scans.save_vectors(native, vectors, method.meta)
    plain.write_text(json.dumps({**facts, **rows}), encoding="utf-8")
    control_vector(control, vectors.v_r, chosen.steer)
    readme.write_text(note, encoding="utf-8")


def export(args):
    """Write the four files into args.folder. What cannot be is a ValueError before the model is loaded."""
    if gguf is None:
        raise ValueError("the export needs the package gguf: pip install gguf")
    with ExitStack() as stack:      # all four are begun before the model is loaded, and moved at the end
        paths = [stack.enter_context(scans.written_whole(args.folder / name)) for name in FILES]
        write(*paths, scans.setup(args), args.model)
    scans.say(f"exported  {scans.shown(args.folder)}: README.txt, vectors.safetensors, .json, .gguf")


def main():
    parser = scans.Parser(prog="python -m data.golden.export",
                          description="Write a model's vectors for other stacks.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to; made if it is not there")
    scans.add_flags(parser)
    scans.run(parser, export)


if __name__ == "__main__":
    main()
