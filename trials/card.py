"""REPORT [SHARE]: put the printed tables into data/tiny/README.md."""
import re, sys
card = open("data/tiny/README.md").read(); report = open(sys.argv[1]).read()
def table(text, head):
    i = text.index(head); return text[i:].split("\n\n")[0].rstrip()
def put(head, text):
    global card
    old = table(card, head); new = table(text, head).split("\n    ")[0]
    new = "\n".join(l for l in new.splitlines() if l.startswith("|")); assert card.count(old) == 1; card = card.replace(old, new)
put("| group | prompts | without SCANS", report); put("| steering | dangerous-sounding refused", report)
for kind, good, n in re.findall(r"^([a-z, ]+): (\d+) of (\d+) as they should be", report, flags=re.M):
    card, k = re.subn(rf"^- {kind}: \d+ of \d+ as", f"- {kind}: {good} of {n} as", card, flags=re.M); assert k == 1, kind
T = re.search(r"^T = ([\d.]+)", report, flags=re.M)[1]
card, k = re.subn(r"T = [\d.]+, estimated from the anchors;", f"T = {T}, estimated from the anchors;", card); assert k == 1
if len(sys.argv) > 2: put("| wrong labels | dangerous", open(sys.argv[2]).read())
open("data/tiny/README.md", "w").write(card)
