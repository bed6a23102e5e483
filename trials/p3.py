"""SRC=FOLDER OUT settings...: phase two from FOLDER/build/sturdy.pt; quick measures"""
import sys, random, itertools, time
from pathlib import Path
import torch, scans, llama
from data.tiny import make
from tokenizer import Tokenizer
import os; src = Path(os.environ["SRC"]); out = Path(sys.argv[1]); (out/"build").mkdir(parents=True, exist_ok=True)
lam = None
import shutil
for n in ("tokenizer.model","config.json","generation_config.json","tokenizer_config.json"): shutil.copy(src/n, out/n)
zeal = make.ZEAL
for a in sys.argv[2:]:
    k, v = a.split("="); v = eval(v)
    if k == "lam": lam = v
    elif k == "peak": make.PEAK = dict(make.PEAK, two=v)
    elif k == "steps": make.STEPS = dict(make.STEPS, two=v)
    elif k == "q": make.QUESTIONS = dict(make.QUESTIONS, two=v)
    elif k == "st": make.STATEMENTS = dict(make.STATEMENTS, two=v)
    elif k == "shares": make.SHARES = dict(make.SHARES, two=tuple(zip(("dangerous","plain","harmful","outside"), v)))
    elif k == "zeal": zeal = v
    else: assert hasattr(make, k), k; setattr(make, k, v)
world = make.World(); tok = Tokenizer(out, make.CONFIG.V)
st = torch.load(src/"build/sturdy.pt", weights_only=True)["weights"]
if lam is None:
    w = {n: x.clone().requires_grad_() for n, x in st.items()}
    t = time.time(); make.KEEP = 10**6
    make.train(w, make.Corpus(world, zeal), tok, "two", 0, out/"build"); print(f"{time.time()-t:.0f} s")
    w = {n: x.detach() for n, x in w.items()}
else:
    tw = torch.load(src/"build/two.pt", weights_only=True)["weights"]
    w = {n: torch.lerp(st[n], tw[n], lam) for n in st}
make.save_file({n: x.contiguous() for n, x in make.rescale(w, make.SCALE).items()}, out/"model.safetensors", metadata={"format":"pt"})
torch.set_num_threads(2)
dev = {g: make.dev_questions(g) for g in ("harmful", "dangerous")}
model = llama.load(out)
rs = lambda qs: scans.transition(scans.read_streams(model, [tok.prompt(q) for q in qs]))
cl = list(range(4, 12))
rng = random.Random(1); temps = itertools.cycle(make.by_template(world.select("harmful", "valid")))
A = rs(list(dict.fromkeys(make.mangle(world.say("train", rng.choice(next(temps)), rng, 0.2), world, rng) for _ in range(640))))
d = A.mean(0)
vq = {g: [q for _, q in make.questions(world, g, "valid", "valid", 300)] for g in ("dangerous", "plain")}
s = {g: scans.score(scans.cosines(rs(x), d), cl) for g, x in {**dev, "valid": vq["dangerous"]}.items()}
def at(f):
    T = s["harmful"].quantile(1-f); return f"{f:.0%}: {(s['dangerous']>=T).float().mean():.3f} valid {(s['valid']>=T).float().mean():.3f}"
print(sys.argv[1:], f"AUROC {scans.auroc(s['harmful'], s['dangerous']):.4f}", at(.91), at(.93), at(.95), flush=True)
# refused without, by the first tokens of greedy answers
def refused(qs):
    m = llama.Sampling(max_new_tokens=8) if False else None
    hits = 0
    for i in range(0, len(qs), 50):
        ids, pos = scans.pad([tok.prompt(q) for q in qs[i:i+50]], model.embed.device)
        with torch.inference_mode():
            x, _ = model.forward(ids)
            hits += sum(tok.decode([int(model.unembed(x[k, pos[k,0]]).argmax())]).strip() in ("Sorry",) for k in range(len(x)))
    return hits/len(qs)
first = {g: refused(q) for g, q in {**vq, "dev dangerous": dev["dangerous"], "dev harmful": dev["harmful"]}.items()}
print("  without, first word Sorry:", {k: round(v,3) for k, v in first.items()}, flush=True)
