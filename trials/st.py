"""SRC=FOLDER OUT settings: sturdy from FOLDER/build/one.pt with settings, then phase two likewise (two:KEY)"""
import sys, time, shutil
from pathlib import Path
import torch
from data.tiny import make
from tokenizer import Tokenizer
import os; src = Path(os.environ["SRC"]); out = Path(sys.argv[1]); (out/"build").mkdir(parents=True, exist_ok=True)
for n in ("tokenizer.model","config.json","generation_config.json","tokenizer_config.json"): shutil.copy(src/n, out/n)
for a in sys.argv[2:]:
    k, v = a.split("="); v = eval(v)
    if k == "q": make.QUESTIONS = dict(make.QUESTIONS, sturdy=v)
    elif k == "steps": make.STEPS = dict(make.STEPS, sturdy=v)
    elif k == "peak": make.PEAK = dict(make.PEAK, sturdy=v)
    else: assert hasattr(make, k), k; setattr(make, k, v)
make.KEEP = 10**6
world = make.World(); tok = Tokenizer(out, make.CONFIG.V); corpus = make.Corpus(world, make.ZEAL)
w = {n: x.clone().requires_grad_() for n, x in torch.load(src/"build/one.pt", weights_only=True)["weights"].items()}
t = time.time(); make.train(w, corpus, tok, "sturdy", 0, out/"build")
make.save_file({n: x.detach().contiguous() for n, x in make.rescale(w, make.SCALE).items()}, out/"model.safetensors", metadata={"format":"pt"})
print(f"{time.time()-t:.0f} s")
