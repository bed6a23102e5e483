"""alphas.py FOLDER [alpha...] [T=..]: valid and dev with SCANS at several alphas"""
import sys, torch, scans
from dataclasses import replace
from pathlib import Path
from data.tiny import make as m
torch.set_num_threads(1)
w=m.World(); me=scans.Scans.load(Path(sys.argv[1]),sampling={"max_new_tokens":48}); c=me.settings
T=[float(a[2:]) for a in sys.argv[2:] if a.startswith("T=")]
if T: c=replace(c,T=T[0])
pairs={g:m.questions(w,g,"valid","valid",250) for g in m.GROUPS}
texts={g:[q for _,q in p] for g,p in pairs.items()}|{f"dev {g}":[q for l,q in m.lines("dev.txt") if l==g] for g in ("harmful","dangerous")}
for a in [float(a) for a in sys.argv[2:] if "=" not in a]:
    me.settings=replace(c,alpha=a); cells=[]
    for g,t in texts.items():
        rs=m.ask(me,t,default=False); cell=f"{g} {100*sum(x['refused']['scans'] for x in rs)/len(rs):.1f}"
        if g in ("dangerous","plain"):
            ok=[m.is_right(r,x["scans"]) for (r,_),x in zip(pairs[g],rs) if not x["refused"]["scans"]]; cell+=f" (right {100*sum(ok)/max(1,len(ok)):.1f})"
        cells.append(cell)
    print(a,"; ".join(cells),flush=True)
