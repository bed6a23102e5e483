"""NAME key=value ...: phase one alone, short, and AUROC on dev.txt"""
import sys, time, random, itertools
from pathlib import Path
import torch, scans, llama
from data.tiny import make
from tokenizer import Tokenizer
out = Path(sys.argv[1]); build = out/"build"; build.mkdir(parents=True, exist_ok=True)
for a in sys.argv[2:]:
    k, v = a.split("="); v = eval(v)
    if k == "q": make.QUESTIONS = dict(make.QUESTIONS, one=v)
    elif k == "one": make.STEPS = dict(make.STEPS, one=v)
    else: assert hasattr(make, k); setattr(make, k, v)
make.KEEP = 10**6
world = make.World(); corpus = make.Corpus(world, make.ZEAL)
make.write_config(out); make.train_tokenizer(corpus, out, 0)
tok = Tokenizer(out, make.CONFIG.V)
w = make.new_model(0, "cpu"); t=time.time()
make.train(w, corpus, tok, "one", 0, build)
took = time.time()-t
make.save_file({n: x.detach().cpu().contiguous() for n, x in make.rescale(w, make.SCALE).items()}, out/"model.safetensors", metadata={"format":"pt"})
torch.set_num_threads(2)
import subprocess
print(sys.argv[1:], f"{took:.0f} s"); 
