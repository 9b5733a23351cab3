"""The PyTorch side of `step.py`: transformers' BEiT with a head on the masked positions, FLAVA's codebook as tokenizer.

Normalized float32 pixels and masks are on the device beforehand, so they cost no time.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import rounds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.peers import torch, transformers  # noqa: E402  works around broken installations of torchvision

nn = torch.nn

SIZES = {  # (hidden_size, num_hidden_layers, num_attention_heads, layer_scale_init_value), clip_norm
  "base": ((768, 12, 12, 0.1), 3.0),
  "large": ((1024, 24, 16, 1e-5), 1.0),
}
NUM_MASKED = 75


class MaskedImageModel(nn.Module):
  """BEiT as released (shared relative-position bias, LayerScale) with 8,192 logits at the masked patches only."""

  def __init__(self, variant: str, attention: str):
    super().__init__()
    width, depth, heads, scale = SIZES[variant][0]
    config = transformers.BeitConfig(
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      intermediate_size=4 * width,
      layer_scale_init_value=scale,
      layer_norm_eps=1e-6,
      use_mask_token=True,
      use_shared_relative_position_bias=True,
      use_mean_pooling=False,
      drop_path_rate=0.1,
      attn_implementation=attention,
    )
    self.beit = transformers.BeitModel(config, add_pooling_layer=False)
    self.lm_head = nn.Linear(width, config.vocab_size)

  def forward(self, image, mask, slots, targets):
    x = self.beit(image, bool_masked_pos=mask).last_hidden_state[:, 1:]
    x = x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
    logits = self.lm_head(x).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.gather(1, slots).flatten())


def build(args):
  torch.manual_seed(0)
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  dtype = getattr(torch, args.dtype)
  model = MaskedImageModel(args.variant, args.attention).to(device).train()
  tokenizer = (
    transformers.FlavaImageCodebook(transformers.FlavaImageCodebookConfig()).to(device, dtype).eval()
  )
  if args.channels_last:
    tokenizer = tokenizer.to(memory_format=torch.channels_last)
  no_decay = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("cls_token")]
  without_decay = {id(p) for p in no_decay}
  groups = [
    dict(params=[p for p in model.parameters() if id(p) not in without_decay], weight_decay=0.05),
    dict(params=no_decay, weight_decay=0.0),
  ]
  optimizer = torch.optim.AdamW(groups, lr=1e-7, betas=(0.9, 0.999), fused=True)
  image = torch.rand(args.batch, 3, 224, 224, device=device)
  token_image = torch.rand(args.batch, 3, 112, 112, device=device).to(dtype)
  if args.channels_last:
    token_image = token_image.to(memory_format=torch.channels_last)
  slots = torch.rand(args.batch, 196, device=device).argsort(1)[:, :NUM_MASKED]
  mask = torch.zeros(args.batch, 196, dtype=torch.bool, device=device).scatter_(1, slots, True)
  loss_of, tokens_of = model, tokenizer.get_codebook_indices
  if args.compile:
    loss_of, tokens_of = (torch.compile(f, mode=args.compile) for f in (model, tokens_of))

  def step():
    with torch.no_grad():
      targets = tokens_of(token_image).flatten(1)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
      loss = loss_of(image, mask, slots, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), SIZES[args.variant][1])
    optimizer.step()
    return loss

  def bias_gradient():
    """Whether the last step computed a gradient of the bias table; some kinds of attention do not."""
    (table,) = (p for n, p in model.named_parameters() if n.endswith("relative_position_bias_table"))
    return table.grad is not None and bool(table.grad.any())

  return step, bias_gradient


def matmul_peak(dtype: str) -> float:
  """Returns the FLOP/s of one large matrix product, the best of several runs."""
  cuda = torch.cuda.is_available()
  size, repeats = (8192, 10) if cuda else (4096, 1)
  # Random numbers as in training: with equal numbers a GPU draws less power and is faster.
  a = (
    torch.randn(size, size, device="cuda" if cuda else "cpu") / size**0.5
  )  # keeps the scale of repeated products
  a = a.to(getattr(torch, dtype))
  wait = torch.cuda.synchronize if cuda else lambda: None
  best = float("inf")
  for _ in range(6):
    began = time.perf_counter()
    out = a
    for _ in range(repeats):
      out = out @ a
    wait()
    best = min(best, (time.perf_counter() - began) / repeats)
  return 2 * size**3 / best


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--variant", default="base")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--attention", default="sdpa")
  parser.add_argument("--compile", default="", help="mode of torch.compile")
  parser.add_argument("--channels_last", type=int, default=0)
  args = parser.parse_args()
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype != "float32"
  torch.backends.cudnn.benchmark = True
  step, bias_gradient = build(args)

  def run(count):
    for _ in range(count):
      loss = step()
    assert torch.isfinite(loss).item()  # waits for the device

  def memory():
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else rounds.peak_rss()

  name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  rounds.serve(
    run,
    memory=memory,
    peak=lambda: matmul_peak(args.dtype),
    device=lambda: f"{name}, torch {torch.__version__}",
    bias_gradient=bias_gradient,
  )


if __name__ == "__main__":
  main()
