import sys, random, itertools
from pathlib import Path
import torch, scans, llama
from data.tiny import make
from tokenizer import Tokenizer
torch.set_num_threads(2)
world = make.World()
dev = {g: make.dev_questions(g) for g in ("harmful", "dangerous")}
for folder in map(Path, sys.argv[1:]):
    tok = Tokenizer(folder, make.CONFIG.V); model = llama.load(folder)
    R = lambda qs: scans.transition(scans.read_streams(model, [tok.prompt(q) for q in qs]))
    rng = random.Random(1); temps = itertools.cycle(make.by_template(world.select("harmful", "valid")))
    A = R(list(dict.fromkeys(make.mangle(world.say("train", rng.choice(next(temps)), rng, 0.2), world, rng) for _ in range(640))))
    d = A.mean(0); c = {g: scans.cosines(R(q), d) for g, q in dev.items()}
    print(folder.name)
    for l in range(12):
        h, x = c["harmful"][:, l], c["dangerous"][:, l]; q = h.quantile(.07)
        print(f"  {l:2d} auroc {scans.auroc(h, x):.4f}  sd {h.std():.4f} {x.std():.4f}  mean {h.mean():.4f} {x.mean():.4f}  at 93%: {(x>=q).float().mean():.3f}")
    for ls in (range(4,12), range(4,11), range(4,8), range(8,12), range(6,10), range(4,10)):
        h, x = (scans.score(c[g], list(ls)) for g in ("harmful", "dangerous")); print("  ", ls, f"{scans.auroc(h,x):.4f} at 93%: {(x>=h.quantile(.07)).float().mean():.3f}")
