import sys, time
from pathlib import Path
from data.tiny import make
from tokenizer import Tokenizer
out = Path(sys.argv[1]); build = out/"build"; build.mkdir(parents=True, exist_ok=True)
world = make.World(); corpus = make.Corpus(world, make.ZEAL)
make.write_config(out)
if not (build/"one.pt").exists(): make.train_tokenizer(corpus, out, 0)
tok = Tokenizer(out, make.CONFIG.V)
w = make.new_model(0, "cpu"); t=time.time()
for phase in make.STEPS: make.train(w, corpus, tok, phase, 0, build)
make.save_file({n: x.detach().cpu().contiguous() for n, x in make.rescale(w, make.SCALE).items()}, out/"model.safetensors", metadata={"format":"pt"})
print("done", time.time()-t)
