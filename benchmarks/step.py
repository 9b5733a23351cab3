"""Compares the pre-training step with one in PyTorch: images/s, fraction of the peak of matrix products, memory.

    python benchmarks/step.py                                                             # BEiT-B, float32, batch 8
    python benchmarks/step.py --parts                                                     # times of the parts of ours
    python benchmarks/step.py --variant=large --dtype=bfloat16 --batch=128 --steps=20     # on a GPU

Our side is the objective, optimizer and step of the recipe, from a uint8 batch on, masks included. The PyTorch side is
transformers' BEiT backbone with a linear head on the masked positions, FLAVA's image codebook (the same dVAE), fused
AdamW and the same clipping; it gets float pixels and masks. Weights are random and nothing is downloaded.

PyTorch is tried with several kinds of attention, memory layouts and compilers, and the fastest setting is compared; on
a GPU at least one of them must be compiled. Then rounds of the two sides alternate, and medians are printed. Our side
runs once with the tokenizer and once with given tokens, as from a cache; PyTorch always runs its tokenizer.

On a CPU the ratio of CPU times estimates the ratio on an idle machine; prefer it if other processes use the cores. With
--dtype=float32 matrix products are in full float32 on both sides, without a GPU's TF32; with bfloat16 the few products
in float32 may use TF32 on both.
"""

import argparse
import statistics

from rounds import Child

ENCODERS = {"base": (768, 12), "large": (1024, 24)}  # width, depth
AUTOTUNE = "max-autotune-no-cudagraphs"  # on a GPU only
TRIALS = (  # settings of the PyTorch side: attention, mode of torch.compile, channels_last
  dict(attention="eager", compile="", channels_last=0),
  dict(attention="sdpa", compile="", channels_last=0),
  dict(attention="sdpa", compile="", channels_last=1),
  dict(attention="eager", compile="default", channels_last=1),
  dict(attention="sdpa", compile="default", channels_last=1),
  dict(attention="sdpa", compile="default", channels_last=0),
  dict(attention="eager", compile=AUTOTUNE, channels_last=1),
  dict(attention="sdpa", compile=AUTOTUNE, channels_last=0),
  dict(attention="sdpa", compile=AUTOTUNE, channels_last=1),
)
TRIAL_ROUNDS = 5


def encoder_flops(variant: str, patches: int = 196, masked: int = 75, vocab_size: int = 8192) -> float:
  """Returns the FLOPs of matrix products for one image: forward and backward pass, 2 for a multiply-add."""
  width, depth = ENCODERS[variant]
  tokens = patches + 1
  block = tokens * 24 * width**2 + 4 * tokens**2 * width
  embed = 2 * patches * 768 * width
  return (
    3 * (depth * block + 2 * masked * width * vocab_size) + 2 * embed
  )  # the patch embedding needs no gradient of its input


def tokenizer_flops(side: int = 112, n_hid: int = 256, vocab_size: int = 8192) -> float:
  """Returns the FLOPs of the tokenizer's forward pass for one image."""
  total, previous = side**2 * 49 * 3 * n_hid, n_hid
  for group in range(4):
    width, pixels = n_hid * 2**group, (side >> group) ** 2
    for block in range(2):
      source, hidden = (previous if block == 0 else width), width // 4
      total += pixels * (9 * source * hidden + 18 * hidden**2 + hidden * width)
      total += pixels * source * width if source != width else 0
    previous = width
  return 2 * (total + (side // 8) ** 2 * previous * vocab_size)


def on_cpu(child: Child) -> bool:
  return child.ask("device").startswith("cpu")


def fastest_pytorch(shared: dict, trials: tuple[dict, ...], steps: int) -> tuple[Child, dict]:
  """Tries the settings of the PyTorch side one after the other and restarts the one with the smallest median."""
  found, cpu = [], None
  for trial in trials:
    if cpu and trial["compile"] == AUTOTUNE:
      continue
    child = None
    try:
      child = Child("step_torch.py", **shared, **trial)
      child.steps(3)  # compiles
      cpu, has_gradient = on_cpu(child), child.ask("bias_gradient")
      times = [child.steps(steps) for _ in range(TRIAL_ROUNDS)]
    except RuntimeError as error:
      print(f"PyTorch {trial}: {error}", flush=True)
      continue
    finally:
      if child:
        child.close()
    if not has_gradient:
      raise SystemExit(f"PyTorch {trial}: its bias table has no gradient, so it does less work than ours")
    seconds = statistics.median(t.cpu if cpu else t.wall for t in times) / steps
    print(f"PyTorch {trial}: {seconds:.3f} s a step{' (of CPU time)' if cpu else ''}", flush=True)
    found.append((seconds, trial))
  if not found:
    raise SystemExit("no setting of PyTorch ran; see above")
  if not cpu and not any(trial["compile"] for _, trial in found):
    raise SystemExit(
      "no compiled setting of PyTorch ran on this GPU, so the comparison would favor ours; see above"
    )
  chosen = min(found, key=lambda pair: pair[0])[1]
  child = Child("step_torch.py", **shared, **chosen)
  child.steps(3)
  return child, chosen


def compare(sides: dict[str, Child], args) -> None:
  """Alternates rounds, then prints a line for each side and the ratio of the first to the second."""
  times = {name: [] for name in sides}
  for _ in range(args.rounds):
    for name, child in sides.items():
      times[name].append(child.steps(args.steps))
  rates, cpus = [], []
  for name, child in sides.items():
    wall = [t.wall / args.steps for t in times[name]]
    median, others = statistics.median(wall), statistics.median(t.others for t in times[name])
    rate, cpu = args.batch / median, statistics.median(t.cpu for t in times[name]) / args.steps
    flops = encoder_flops(args.variant) + (0 if "cached" in name else tokenizer_flops())
    memory, peak = child.ask("memory"), child.ask("peak")
    print(
      f"{name:20} {rate:8.2f} images/s  {median:.3f} s a step ({min(wall):.3f} to {max(wall):.3f}), {cpu:.2f} s of "
      f"CPU, others {others:.2f} cores  {flops * rate / 1e12:.3f} of {peak / 1e12:.3f} TFLOP/s of a large product "
      f"({flops * rate / peak:.0%})  {memory:.2f} GiB at the peak  "
      f"[{child.ask('device')}; {flops / 1e9:.1f} GFLOP an image]"
    )
    rates.append(rate)
    cpus.append(cpu)
  of_cpu = f"  (of CPU time: {cpus[1] / cpus[0]:.3f})" if all(map(on_cpu, sides.values())) else ""
  print(f"ratio {rates[0] / rates[1]:.3f}{of_cpu}", flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--variant", choices=sorted(ENCODERS), default="base")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--tokenizer", choices=("online", "cached", "both"), default="both")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--steps", type=int, default=1, help="steps in a round")
  parser.add_argument(
    "--trials", default="", help="indices of the settings of PyTorch to try, e.g. 1,2; default all"
  )
  parser.add_argument("--parts", action="store_true", help="only time the parts of our step")
  args = parser.parse_args()
  shared = dict(variant=args.variant, batch=args.batch, dtype=args.dtype)
  trials = tuple(TRIALS[int(i)] for i in args.trials.split(",")) if args.trials else TRIALS
  if args.parts:
    ours = Child("step_ours.py", **shared, tokenizer="online")
    for name, (wall, cpu) in ours.ask("parts").items():
      print(f"{name:10} {wall:8.3f} s, {cpu:8.3f} s of CPU")
    ours.close()
    return
  pytorch, chosen = fastest_pytorch(shared, trials, args.steps)
  print(f"BEiT {args.variant}, {args.dtype}, batch {args.batch}; PyTorch with {chosen} and its tokenizer")
  for tokenizer in ("online", "cached") if args.tokenizer == "both" else (args.tokenizer,):
    ours = Child("step_ours.py", **shared, tokenizer=tokenizer)
    ours.steps(2)
    compare({f"ours, tokens {tokenizer}": ours, "PyTorch": pytorch}, args)
    ours.close()
  pytorch.close()


if __name__ == "__main__":
  main()
