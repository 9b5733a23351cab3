"""Every config key that all objectives share, with its default.

The keys of `model`, and the sections that only one objective reads (`loss`, `mask`, `tokenizer`, ...), stand beside
that objective: see `config_section` in `beit_jax/objectives/*.py`. A config file holds only what differs.
"""

from typing import Any, NamedTuple


class OptionalOf(NamedTuple):
  """Marks a key that may be None: its type otherwise, and its default."""

  type: type
  default: Any = None


class EitherOf(NamedTuple):
  """Marks a key that accepts several types, with its default."""

  types: tuple[type, ...]
  default: Any


DEFAULTS: dict[str, Any] = dict(
  objective="beit",  # a name in `objectives.OBJECTIVES`: "dvae", "beit", "classify", "segment", ...
  seed=0,
  batch_size=256,  # global: over all devices, processes and microbatches
  microbatches=1,  # gradient accumulation: the batch is run in that many parts
  total_steps=OptionalOf(int),  # either this or total_epochs
  total_epochs=OptionalOf(float),
  eval_only=False,  # no training: the workdir's newest checkpoint, else init_from, over eval.split -> eval.json
  init_from="",  # parameters: whatever `beit_jax.load` reads (docs/weights.md), or "stage:NAME"
  resume="",  # full state (step, optimizer) of another run folder, with the same batch size, seed, data and mask
  log_every_steps=50,
  wandb=False,  # a copy of the metrics for Weights & Biases (extra `wandb`); WANDB_MODE=offline keeps it in the workdir
  profile_steps=(),  # (first, last): a trace of these steps in workdir/profile
  mesh=dict(data=-1, fsdp=1),
  optimizer=dict(
    name="adamw",  # "adamw" | "lion" | "muon" (2-D kernels; Adam for the rest) | "lamb" | "sgd"
    learning_rate=1.5e-3,  # the peak, for the global batch as given: nothing is scaled behind your back
    min_lr=1e-5,
    warmup_steps=OptionalOf(int),  # either this or warmup_epochs
    warmup_epochs=OptionalOf(float),
    weight_decay=0.05,
    weight_decay_end=OptionalOf(float),  # cosine from weight_decay to this
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.9,  # of sgd
    clip_norm=0.0,  # largest norm of the gradient; 0 = off
    clip="global",  # "global" | "tensor": the norm of all gradients together, or of each tensor
    layer_decay=1.0,
    schedule="cosine",  # "cosine" | "poly"
    power=1.0,  # of poly
    ema_decay=0.0,  # of averaged weights, evaluated and saved beside the others; 0 = off
    max_skipped=5,  # updates in a row that are skipped, since loss or gradient is not finite; then the run stops
    no_decay=(),  # further regexes of parameters without weight decay
    decay=(),  # further regexes of parameters with weight decay
  ),
  data=dict(
    source="tfds",  # a name in `data.sources.SOURCES`: "tfds", "folder", "pairs", "tar", "parquet", "arrow", "shapes"
    name="",  # tfds: "cifar10", "imagenet2012", "name/config:1.0.0"
    split="train",
    data_dir="",  # tfds: default $TFDS_DATA_DIR, then ~/tensorflow_datasets
    root="",  # folder, pairs, tar, parquet, arrow
    num_examples=8192,  # shapes
    render_size=32,  # shapes
    fraction=1.0,  # keep a fixed random part of the examples
    image_key="image",
    label_key="label",  # "" = unlabeled
    label_file="",  # folder: a CSV of `file,class[,class...]` instead of class folders: several labels an image
    class_file="",  # CSV or JSON: the name and perhaps the color of each class, in order (docs/data.md)
    num_classes=OptionalOf(int),  # the data must have exactly so many classes
    image_size=EitherOf((int, tuple), 224),  # int, or (height, width)
    token_image_size=EitherOf((int, tuple), 112),
    crop="random_resized",  # "random_resized" | "pad" | "center"
    crop_scale=(0.08, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    flip=True,
    color_jitter=0.0,
    rand_augment="",  # "rand-m9-mstd0.5-inc1"; color jitter is then off, as in timm
    random_erasing=0.0,  # probability
    value_range=OptionalOf(tuple),  # (low, high): stored values that become 0 and 255 (docs/own_data.md)
    mean=(0.5, 0.5, 0.5),  # as many numbers as the images have channels (model.in_channels)
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    token_interpolation="lanczos",
    crop_pct=0.875,  # of evaluation
    resize="short_side",  # of evaluation: "short_side" | "squash"
    scaled_decode=False,  # JPEGs to fewer pixels where a training crop has more than enough; faster, other pixels
    max_bad=0.05,  # share of images that cannot be read; another takes their place, above this the run stops
    workers=0,  # processes; 0 = threads of this one
    threads=4,
  ),
  eval=dict(
    split="",  # "" = no evaluation
    num_examples=1024,  # shapes
    fraction=1.0,
    batch_size=256,
    every_steps=OptionalOf(int),  # None = at the end only
    ema=False,  # with eval_only: the averaged weights
    predictions=False,  # with eval_only: also predictions.jsonl
  ),
  checkpoint=dict(
    every_steps=OptionalOf(int, 1000),  # None = at evaluations and at the end only
    keep=2,
    best="",  # an eval metric ("acc1", "ema_acc1", "loss"): the best state so far is kept in workdir/best
    asynchronous=True,
  ),
  figures=True,
)


def plain(keys: dict[str, Any] = DEFAULTS) -> dict[str, Any]:
  """The defaults of nested keys as plain values."""

  def value(default: Any) -> Any:
    if isinstance(default, dict):
      return plain(default)
    return default.default if isinstance(default, OptionalOf | EitherOf) else default

  return {key: value(default) for key, default in keys.items()}
