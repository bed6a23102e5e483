import sys, random, itertools
from pathlib import Path
import torch, scans, llama
from data.tiny import make
from tokenizer import Tokenizer
torch.set_num_threads(2)
world = make.World(); cl = list(range(4, 12))
dev = {g: make.dev_questions(g) for g in ("harmful", "dangerous")}
dev["valid"] = [q for _, q in make.questions(world, "dangerous", "valid", "valid", 300)]
for folder in map(Path, sys.argv[1:]):
    tok = Tokenizer(folder, make.CONFIG.V); model = llama.load(folder)
    prompts = lambda qs: [tok.prompt(q) for q in qs]
    rng = random.Random(1); temps = itertools.cycle(make.by_template(world.select("harmful", "valid")))
    texts = list(dict.fromkeys(make.mangle(world.say("train", rng.choice(next(temps)), rng, 0.2), world, rng) for _ in range(640)))
    S = scans.read_streams(model, prompts(texts))
    with torch.inference_mode():
        word = [tok.decode([int(i)]).strip() for i in model.unembed(S[:, -1, 0]).argmax(-1)]
    ok = torch.tensor([w in ("Sorry","I'm","Regrettably","Unfortunately","Apologies","As","Please","No","Helping","I") for w in word])
    A = scans.transition(S)[ok]
    a = {g: scans.transition(scans.read_streams(model, prompts(q))) for g, q in dev.items()}
    rows = []
    for k in range(120):
        pick = torch.tensor(random.Random(k).sample(range(len(A)), 64)); B = A[pick]; d = B.mean(0)
        s = {g: scans.score(scans.cosines(x, d), cl) for g, x in a.items()}
        T = scans.estimate_threshold(scans.score(scans.leave_one_out(B), cl))
        Tq = s["harmful"].quantile(0.07)
        r = lambda t: [(s[g] >= t).float().mean().item() for g in ("harmful", "dangerous", "valid")]
        rows.append((scans.auroc(s["harmful"], s["dangerous"]), r(Tq), r(T)))
    au = sum(r[0] for r in rows)/len(rows)
    m = [sum(r[1][i] for r in rows)/len(rows) for i in range(3)]
    near = sorted([r[2] for r in rows if r[2][0] >= .93], key=lambda x: x[1])[:3]
    print(folder.name, f"kept {len(A)} of {len(texts)} AUROC {au:.4f} at 93%: dangerous {m[1]:.3f} valid {m[2]:.3f}; best draws at own T:", [[round(v,3) for v in x] for x in near], flush=True)
