import sys,torch,scans,collections
from pathlib import Path
from data.tiny import make as m
w=m.World()
for f in sys.argv[1:]:
    me=scans.Scans.load(Path(f),device="cpu",sampling={"max_new_tokens":20}); me.settings=m.replace(me.settings,alpha=0.0)
    for part,n in (("align",600),("valid",2000)):
        pairs=m.questions(w,"plain",part,"valid",n)
        res=m.ask(me,[q for _,q in pairs],default=False,size=32)
        bad=collections.Counter(row.text for (row,_),r in zip(pairs,res) if r["refused"]["scans"])
        print(f,part,len(pairs),sum(bad.values()),bad.most_common(25),flush=True)
