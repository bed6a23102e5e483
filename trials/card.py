"""trials/card.py REPORT [SHARE]: put the reports of make into the card's tables"""
import re, sys
from pathlib import Path
p=Path("data/tiny/README.md"); text=p.read_text()
rep=re.sub(r"[^\n]*\r","",Path(sys.argv[1]).read_text())
if len(sys.argv)>2: rep+="\n"+re.sub(r"[^\n]*\r","",Path(sys.argv[2]).read_text())
def block(head,src):
    i=src.index(head); lines=[]
    for l in src[i:].split("\n"):
        if not l.startswith("|"): break
        lines.append(l)
    return "\n".join(lines)
for head in ("| group | prompts |","| steering | dangerous","| wrong labels |"):
    if head in rep: text=text.replace(block(head,text),block(head,rep))
counts=re.findall(r"^(.*: \d+ of \d+) as they should be$",rep,re.M)
for c in counts:
    kind=c.split(":")[0]
    text=re.sub(rf"- {re.escape(kind)}: \d+ of \d+ as they should be",f"- {c} as they should be",text)
p.write_text(text)
T=re.search(r"T = ([\d.]+) \(.*",rep); print(T and T[0]); print(counts)
fails=re.findall(r"^    (known, of no phase|outside|harmful|chat turns, of no phase|chat turns|known): (.*)$",rep,re.M)
seen={}
for k,l in fails:
    seen[k]=seen.get(k,0)+1
    if seen[k]<=2: print("      "+k+": "+l)
