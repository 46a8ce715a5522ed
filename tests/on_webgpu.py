"""python tests/on_webgpu.py FOLDER...: run exports on the WebGPU provider, in a process of their own.

One network with masks per process: with several, the provider's logical And has given wrong results. Reads inputs.pt,
writes outputs.pt and profile.csv in every folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils import _pytree

from fasfx.runtime import OnnxModel

for folder in map(Path, sys.argv[1:]):
    model, inputs = OnnxModel(folder, device="webgpu"), torch.load(folder / "inputs.pt")
    torch.save(_pytree.tree_leaves(model(**inputs)), folder / "outputs.pt")
    model.profile(**inputs).to_csv(folder / "profile.csv")
