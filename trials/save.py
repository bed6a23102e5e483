import sys, torch
from pathlib import Path
from data.tiny import make
s = torch.load(sys.argv[1], weights_only=True)
make.save_file({n: x.contiguous() for n, x in make.rescale(s["weights"], make.SCALE).items()}, sys.argv[2]+"/model.safetensors", metadata={"format":"pt"})
