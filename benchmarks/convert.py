"""Measures time and memory of converting BEiT-L from unilm .pth to hf and from hf to orbax, each in a new process.

    python benchmarks/convert.py

First writes a full-size file of random weights. The memory of a conversion is the peak of its process minus the peak
after its imports; both are printed. Linux only (/proc).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CHILD = """
import sys, time
from beit_jax.weights import io as weights_io
import jax
jax.devices()
def peak():
  return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
base, began = peak(), time.monotonic()
weights_io.save(weights_io.load(sys.argv[1]), sys.argv[2], format=sys.argv[3])
print(time.monotonic() - began, base, peak())
"""


def main():
  from beit_jax.models.beit import VARIANTS
  from beit_jax.weights import unilm
  from beit_jax.weights.files import torchfile
  from beit_jax.weights.kinds import make_module

  with tempfile.TemporaryDirectory() as folder:
    encoder = dict(VARIANTS["large"], rel_pos="per_block", layer_scale_init=1e-5)
    module = make_module("classifier", dict(encoder=encoder, num_classes=21841))
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in unilm.param_shapes(module, (224, 224)).items():
      shape = unilm.lazy.torch_shape(shape, name)
      tensors[unilm.torch_name(name)] = rng.standard_normal(shape, np.float32)
    source = Path(folder) / "beit_large_patch16_224_pt22k_ft22k.pth"
    torchfile.save(source, tensors, {})
    size = source.stat().st_size
    print(f"BEiT-L with 21,841 classes: {size / 1e9:.2f} GB")
    for format in ("hf", "orbax"):
      target = Path(folder) / format
      out = subprocess.run(
        [sys.executable, "-c", CHILD, source, target, format], check=True, capture_output=True, text=True
      ).stdout.split()
      seconds, base, peak = map(float, out)
      print(
        f"{source.suffix} -> {format}: {seconds:.1f} s, {(peak - base) / size:.2f} times the file's size in memory "
        f"({base / 1e9:.2f} GB after imports, {peak / 1e9:.2f} GB at the peak)"
      )
      source = target


if __name__ == "__main__":
  main()
