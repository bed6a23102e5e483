"""phase.py OUT: tokenizer, phase one and sturdy, as make.py makes them (goes on after an interruption)"""
import sys
from pathlib import Path
from data.tiny import make as m
out=Path(sys.argv[1]); (out/"build").mkdir(parents=True,exist_ok=True)
w=m.World(); c=m.Corpus(w,m.ZEAL); m.write_config(out)
if not (out/"build/one.pt").exists(): m.train_tokenizer(c,out,0)
tok=m.Tokenizer(out,m.CONFIG.V); W=m.new_model(0,"cpu")
for ph in ("one","sturdy"): m.train(W,c,tok,ph,0,out/"build")
