"""Table 4 of the BEiT paper: BEiT without block-wise masking, without visual tokens, recovering everything, longer.

    python -m beit_jax.main --config=configs/table4.py:shapes     # embedded scenes, three seeds
    python -m beit_jax.main --config=configs/table4.py:cifar10    # real images, three seeds
    python -m beit_jax.main --config=configs/table4.py:imagenet   # the paper's size, one seed

Every row is one pre-training; the backbone is then fine-tuned for classification and, where the data has label maps,
for segmentation. One tokenizer serves all rows. Rows are compared seed by seed with the first one. The table is
written to WORKDIR/summary.txt, comparison.md, comparison.tex and comparison.svg. The same command continues a run that
was stopped; `--config.stages="('tokenizer', ...)"` selects stages.
Source: BEiT paper, Table 4 (ViT-B with absolute positions, 300 epochs; SETR-PUP on ADE20K).
Expected at the paper's size: the numbers in the columns "paper". Run here: docs/results.md.
"""

import beit_base
import beit_v2_base
import cifar10
import dino_base
import finetune_imagenet
import finetune_imagenet22k
import quickstart
import scratch_imagenet
import setr_ade20k
import vqkd
from ml_collections import ConfigDict

SCENES = ("source", "render_size", "image_size", "threads")
# Row -> (label, changes of the pre-training, the paper's accuracy on ImageNet and mIoU on ADE20K)
ROWS = {
  "beit": ("BEiT", {}, ("82.86", "44.65")),
  "random": ("- block-wise masking", {"mask": {"kind": "random"}}, ("82.77", "42.93")),
  "pixels": ("- visual tokens (recover pixels)", {"target": "pixels"}, ("81.04", "41.38")),
  "pixels-random": (
    "- visual tokens - block-wise masking",
    {"target": "pixels", "mask": {"kind": "random"}},
    ("80.50", "37.09"),
  ),
  "all": ("+ recover 100 % of visual tokens", {"recover": "all"}, ("82.59", "40.93")),
  "unmasked": (
    "- masking + recover 100 % of visual tokens",
    {"recover": "all", "mask": {"kind": "none"}},
    ("81.67", "36.73"),
  ),
  "longer": ("BEiT, 800 instead of 300 epochs", "longer", ("83.19", "45.58")),
}


def small(
  config: dict, data: dict, model: dict, pretrain: dict, longer: dict, labels: dict, seeds: tuple
) -> dict:
  """The stages of a small size, all of one length of pre-training.

  Args:
    config: a chain with `tokenizer`, `pretrain` and fine-tuning, from which the remaining keys come.
    data: keys of all stages.
    model: the encoder, with absolute positions as in the paper's tables (DINO's views of two sizes need them).
    pretrain: what differs in the pre-training.
    longer: its length in the row "800 instead of 300 epochs".
    labels: the same length, for pre-training with the labels of all images.
    seeds: of pre-training and fine-tuning.
  """
  side = data["image_size"]
  finetune = {**config["finetune"], "model": model}
  masked = changed({**config["pretrain"], "model": model}, pretrain)
  local = dict(count=4, image_size=side // 2, crop_scale=(0.1, 0.5))
  dino = dict(
    objective="dino",
    batch_size=masked["batch_size"],
    model={**model, "outputs": 512, "hidden": 256, "bottleneck": 64},
    local=local,
    loss=dict(teacher_momentum=0.99, freeze_last_layer_epochs=0),
    optimizer=dict(
      learning_rate=1e-3, warmup_steps=100, weight_decay=0.04, weight_decay_end=0.4, clip_norm=3.0
    ),
    data={**data, "crop_scale": (0.4, 1.0), "color_jitter": 0.4},
    eval=masked["eval"],
  )
  tokenizer_v2 = dict(
    objective="vqkd",
    teacher=dict(init_from="stage:teacher"),
    batch_size=masked["batch_size"],
    model={
      **model,
      "vocab_size": config["tokenizer"]["model"]["vocab_size"],
      "code_dim": 16,
      "decoder_depth": 1,
    },
    optimizer=dict(learning_rate=1e-3, warmup_steps=50, betas=(0.9, 0.99), weight_decay=1e-4),
    codebook=dict(replace_below=0.1),  # few images: without it, 60 % of 256 words were in use on CIFAR-10
    data={**data, "token_image_size": side, "crop_scale": (0.5, 1.0)},
    eval=masked["eval"],
  )
  supervised = {**finetune, **labels, "init_from": "", "data": {**finetune["data"], "fraction": 1.0}}
  length = {key: masked[key] for key in ("total_steps", "total_epochs") if key in masked}
  aggregation = dict(early_block=3 * model["depth"] // 4, head_blocks=2)
  return dict(
    tokenizer=config["tokenizer"],
    pretrain=masked,
    pretrain_v2=changed(masked, {"model": aggregation, "data": {"token_image_size": side}}),
    longer=longer,
    dino={**dino, **length},
    vqkd={**tokenizer_v2, **length},
    labels=supervised,
    finetune=finetune,
    seeds=seeds,
  )


def shapes() -> dict:
  """Scenes of 24x24 pixels, which have label maps: about half a minute for each stage on two CPU cores."""
  data, model = quickstart.DATA, {**quickstart.MODEL, "preset": "paper"}
  steps = dict(total_steps=800)
  size = small(
    quickstart.get_config().to_dict(), data, model, steps, dict(total_steps=2133), steps, seeds=(0, 1, 2)
  )
  size["segment"] = dict(
    objective="segment",
    batch_size=16,
    total_steps=200,
    model={**model, "num_classes": 9, "channels": 32, "aux_channels": 32},
    optimizer=dict(learning_rate=2e-3, min_lr=0.0, schedule="poly", warmup_steps=20),
    data={**{key: data[key] for key in SCENES}, "num_examples": 256},
    segment=dict(resize=(24, 24), resize_ratio=(0.75, 1.5), stride=24),
    eval=quickstart.EVAL,
  )
  return size


def cifar() -> dict:
  """CIFAR-10: minutes for each stage, hours for the table."""
  config, model = cifar10.get_config().to_dict(), {**cifar10.MODEL, "preset": "paper"}
  config["finetune"] = config["finetune_0"]
  epochs = dict(total_epochs=3.0)
  return small(config, cifar10.DATA, model, epochs, dict(total_epochs=8.0), epochs, seeds=cifar10.SEEDS)


def imagenet() -> dict:
  """The paper's size: ViT-B with absolute positions on ImageNet-1K, and ADE20K."""
  stages = beit_base.get_config("paper").to_dict()
  paper = {"model": {"preset": "paper"}}
  ours = {"data": {"mean": beit_base.MEAN, "std": beit_base.STD}}
  theirs = {
    "data": {"mean": finetune_imagenet.HALF, "std": finetune_imagenet.HALF}
  }  # of the published weights

  def finetune(start: str, pixels: dict) -> dict:
    return changed(finetune_imagenet.get_config(f"base_{start}").to_dict(), {**paper, **pixels})

  segment = setr_ade20k.get_config().to_dict()

  return dict(
    tokenizer=stages["tokenizer"],
    pretrain={**stages["pretrain"], "total_epochs": 300.0},
    pretrain_v2=changed(beit_v2_base.stages("base", "300", 9)["pretrain"], paper),
    longer=dict(total_epochs=800.0),
    dino=dino_base.get_config().to_dict(),
    vqkd=vqkd.get_config("dino").to_dict(),
    intermediate=changed(finetune_imagenet22k.get_config("base").to_dict(), {**paper, **ours}),
    scratch=scratch_imagenet.get_config("base").to_dict(),
    finetune=finetune("pt1k", ours),
    segment=segment,
    # Rows with recipes of their own
    recipes={
      "finetune_supervised": finetune("supervised", theirs),
      "segment_supervised": changed(segment, theirs),
      "finetune_beit-labels": finetune("ft22k", ours),
    },
    seeds=(0,),
  )


SIZES = {"shapes": shapes, "cifar10": cifar, "imagenet": imagenet}
VARIANTS = tuple(SIZES)
PAPER = "paper, ImageNet"


def size_of(variant: str) -> dict:
  """The stages and seeds of a size."""
  if variant not in SIZES:
    raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
  return SIZES[variant]()


def changed(run: dict, changes: dict) -> dict:
  """A run with some keys replaced; of sections, the keys that `changes` has."""
  return {**run, **{key: {**run[key], **v} if isinstance(v, dict) else v for key, v in changes.items()}}


def transferred(size: dict, row: str, seed: int, init_from: str) -> dict:
  """The stages that fine-tune one backbone."""
  recipes = size.get("recipes", {})
  tasks = {name: recipes.get(f"{name}_{row}", size[name]) for name in ("finetune", "segment") if name in size}
  return {
    f"{name}_{row}_{seed}": {**run, "seed": seed, "init_from": init_from} for name, run in tasks.items()
  }


def comparison(title: str, size: dict, rows: dict) -> dict:
  """The table of all rows; see beit_jax/run/comparison.py.

  Args:
    title: of the table.
    size: see `size_of`.
    rows: row -> (label, ..., the paper's numbers).
  """
  columns = {"finetune": ("top-1 accuracy", "acc1"), "segment": ("mIoU", "mIoU")}
  columns = {name: column for name, column in columns.items() if name in size}
  return dict(
    title=title,
    columns=tuple(label for label, _ in columns.values()),
    paper=PAPER,
    rows=tuple(
      (
        row[0],
        tuple(f"{task}_{name}_*.eval.{metric}" for task, (_, metric) in columns.items()),
        tuple(row[-1][: len(columns)]),
      )
      for name, row in rows.items()
    ),
  )


def get_config(variant="shapes"):
  size = size_of(variant)
  stages = dict(tokenizer=size["tokenizer"])
  for seed in size["seeds"]:
    for name, (_, changes, _) in ROWS.items():
      changes = size["longer"] if changes == "longer" else changes
      stages[f"pretrain_{name}_{seed}"] = {**changed(size["pretrain"], changes), "seed": seed}
      stages |= transferred(size, name, seed, f"stage:pretrain_{name}_{seed}")
  table = comparison("BEiT, Table 4", size, ROWS)
  return ConfigDict(dict(stages=tuple(stages), **stages, comparison=table))
