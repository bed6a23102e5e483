"""FOLDER: every draw of the anchors: dev harmful, dangerous above T; valid dangerous above T; capitals; T; draw. Best last."""
import inspect, sys
from pathlib import Path
import torch, scans
from data.tiny import make
torch.set_num_threads(2)
src = inspect.getsource(make.write_anchors)
tail = "    write(max(range(DRAWS), key=rank))"
assert tail in src
src = src.replace(tail, """    world_valid = [q for _, q in questions(world, "dangerous", "valid", "valid", 500)]
    read = lambda texts: scans.transition(scans.read_streams(method.model, [method.tokenizer.prompt(t) for t in texts]))
    more = {"valid": read(world_valid), "caps": read([t.upper() for t in dev_questions("harmful")]), "vh": read([q for _, q in questions(world, "harmful", "valid", "valid", 500)])}
    a_t.update(more)
    out = []
    aur = None
    for draw in range(DRAWS):
        drawn = write(draw)
        s = {g: scans.score(scans.cosines(a_t[g], drawn.d_harm), drawn.settings.classify) for g in a_t}
        T = drawn.settings.T
        r = {g: (s[g] >= T).float().mean().item() for g in s}
        out.append((r["harmful"], r["dangerous"], r["valid"], r["caps"], r["vh"], T, draw, scans.auroc(s["harmful"], s["dangerous"])))
    n = len(dev_questions("harmful"))
    print("anchors kept", {k: len(v) for k, v in anchors.items()})
    for o in sorted(out): print("harmful %.3f dangerous %.3f valid %.3f caps %.3f validharm %.3f T %.4f draw %d auroc %.4f" % o)
""")
exec(src, make.__dict__)
folder = Path(sys.argv[1])
make.write_anchors(make.World(), folder, 0)
