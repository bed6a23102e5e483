import sys,torch,scans
from pathlib import Path
from data.tiny import make as m
torch.set_num_threads(1)
w=m.World()
pairs=m.questions(w,"plain","valid","valid",2000); print(len(pairs), len({r.text for r,_ in pairs}))
for f in sys.argv[1:]:
    me=scans.Scans.load(Path(f),sampling={"max_new_tokens":24}); me.settings=m.replace(me.settings,alpha=0.0)
    res=m.ask(me,[q for _,q in pairs],default=False,size=32)
    bad=[(round(r["score"],4),row.kind,q) for (row,q),r in zip(pairs,res) if r["refused"]["scans"]]
    print(f,len(bad)); 
    for b in sorted(bad,reverse=True)[:20]: print("  ",*b)
