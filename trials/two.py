"""Phase two from a finished phase one with other settings; then the part valid and dev.txt at several alphas. For choosing settings.

    PYTHONPATH=. python trials/two.py FROM OUT [zeal=0.95] [PEAK=1.2e-3] [STEPS=200] [SHARES=(...)] [STATEMENTS=.1] ['NUDGED={"wo": (8,), "w_down": (8,)}'] [SCALE=.66]

FROM holds build/one.pt and tokenizer.model. No training if OUT/build/two.pt is whole and of the same settings.
"""
import ast
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import scans
from data.tiny import make as m

source, out, zeal = Path(sys.argv[1]), Path(sys.argv[2]), m.ZEAL


for setting in sys.argv[3:]:
    name, value = setting.split("=", 1)
    value = eval(value)
    if name == "NOSTURDY":
        del m.STEPS["sturdy"]; m.SMOOTH["two"] = value
    elif name == "zeal":
        zeal = value
    elif name in ("STEPS", "PEAK", "STATEMENTS", "SHARES", "PUSH", "SMOOTH"):
        getattr(m, name)["two"] = value
    else:
        assert hasattr(m, name), name
        setattr(m, name, value)
(out / "build").mkdir(parents=True, exist_ok=True)
for name in ("build/one.pt", *(["build/sturdy.pt"] if not any("NOSTURDY" in a for a in sys.argv) else []), "tokenizer.model"):
    if (source / name).exists() and not (out / name).exists():
        shutil.copy(source / name, out / name)
started = time.time()
m.make(out, 0, zeal, "cpu")
torch.set_num_threads(2)
world, method = m.World(), scans.Scans.load(out, sampling={"max_new_tokens": 48})
print(f"== {sys.argv[2:]}, {time.time() - started:.0f} s")
pairs = {group: m.questions(world, group, "valid", "valid", 300) for group in m.GROUPS}
rng = m.random.Random(5)
pairs["outside"] = [(row, m.one_of(world.say("valid", row, rng), rng)) for row in (world.unknown(rng, "plain") for _ in range(150))]
pairs["outside2"] = [(row, m.one_of(world.say("valid", row, rng), rng)) for row in (world.unknown(rng, "dangerous") for _ in range(100))]
texts = {group: [question for _, question in some] for group, some in pairs.items()}
texts |= {f"dev {group}": [text for label, text in m.lines("dev.txt") if label == group] for group in ("harmful", "dangerous")}
chosen, s = method.settings, {}


def show(label, name, results):
    cells = []
    for group, rows in results.items():
        refused = [row["refused"][name] for row in rows]
        cell = f"{group} {100 * sum(refused) / len(refused):.1f}"
        if group in ("dangerous", "plain", "outside", "outside2"):
            right = [m.is_right(row, result[name]) for (row, _), result in zip(pairs[group], rows) if not result["refused"][name]]
            cell += f" (right {100 * sum(right) / max(1, len(right)):.1f})"
        cells.append(cell)
    print(f"{label:>9}: " + "; ".join(cells), flush=True)


results = {group: m.ask(method, some) for group, some in texts.items()}
s = {group: torch.tensor([row["score"] for row in rows]) for group, rows in results.items()}
print(f"T {chosen.T:.4f}; AUROC valid {scans.auroc(s['harmful'], s['dangerous']):.4f}, dev {scans.auroc(s['dev harmful'], s['dev dangerous']):.4f}; above T: "
      + ", ".join(f"{group} {100 * (some > chosen.T).float().mean():.1f}" for group, some in s.items()))
for share in (0.91, 0.95):
    T = s["dev harmful"].quantile(1 - share)
    print(f"  at {share:.0%} of dev harmful T {T:.4f}: " + ", ".join(f"{group} {100 * (some > T).float().mean():.1f}" for group, some in s.items()))
show("without", "default", results)
show("3.5", "scans", results)
for alpha in (4.25, 5.0, 6.0, 7.0):
    method.settings = replace(chosen, alpha=alpha)
    show(str(alpha), "scans", {group: m.ask(method, some, default=False) for group, some in texts.items()})
