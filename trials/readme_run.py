"""Run in the root: every indented command block of README.md with a fenced output below it; the output is replaced. Then the plots."""
import re, subprocess, sys
s = open("README.md").read()
def run(cmd):
    r = subprocess.run(["bash", "-c", cmd], capture_output=True, text=True)
    print(r.returncode, cmd.strip().splitlines()[-1], r.stderr[-200:] if r.returncode else "", flush=True)
    assert r.returncode == 0
    return r.stdout
def one(m):
    cmd = "\n".join(l.strip() for l in m[1].strip("\n").splitlines()).replace("pip install -r requirements.txt && ", "")
    return f"{m[1]}\n```\n{run(cmd).rstrip(chr(10))}\n```"
s = re.sub(r"((?:^    \S[^\n]*\n)+)\n```\n(.*?)\n```", one, s, flags=re.M | re.S)
open("README.md", "w").write(s)
for cmd in re.findall(r"^    (python .*--plot data/figures)$", s, flags=re.M): run(cmd)
