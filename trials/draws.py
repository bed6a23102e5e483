"""draws.py FOLDER...: the T of all draws, and what of valid and dev lies above"""
import sys, torch, scans, shutil
from pathlib import Path
from data.tiny import make as m
torch.set_num_threads(2)
w=m.World()
got=[]
def spy(x): 
    x=sorted(x); got.append(x); return x
import builtins
m.sorted=spy
for f in map(Path,sys.argv[1:]):
    tmp=Path(str(f)+"_d"); shutil.rmtree(tmp,ignore_errors=True); shutil.copytree(f,tmp,ignore=shutil.ignore_patterns("build"))
    got.clear(); m.write_anchors(w,tmp,0); Ts=[t for t,_ in got[-1]]
    me=scans.Scans.load(tmp,device="cpu",sampling={"max_new_tokens":1})
    texts={g:[q for _,q in m.questions(w,g,"valid","valid",500)] for g in ("dangerous","harmful")}|{f"dev {g}":[q for l,q in m.lines("dev.txt") if l==g] for g in ("harmful","dangerous")}
    s={g:torch.tensor([x["score"] for x in m.ask(me,t,default=False,size=32)]) for g,t in texts.items()}
    print(f)
    for i in range(9,30,2): print(i,round(Ts[i],4)," ".join(f"{g} {100*(v>Ts[i]).float().mean():.1f}" for g,v in s.items()),flush=True)
