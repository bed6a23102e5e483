"""sturdy.py FROM OUT: phase one and sturdy only"""
import sys, shutil
from pathlib import Path
from data.tiny import make as m
src,out=map(Path,sys.argv[1:3]); (out/"build").mkdir(parents=True,exist_ok=True)
for n in ("build/one.pt","tokenizer.model"): shutil.copy(src/n,out/n)
for s in sys.argv[3:]:
    n,v=s.split("=",1); getattr(m,n)["sturdy"]=eval(v); print(n,v)
w=m.World(); c=m.Corpus(w,m.ZEAL); m.write_config(out); tok=m.Tokenizer(out,m.CONFIG.V); W=m.new_model(0,"cpu")
for ph in ("one","sturdy"): m.train(W,c,tok,ph,0,out/"build")
