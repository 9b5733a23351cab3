"""A cache of visual tokens: those of the first epochs of a run, computed once (`beit_jax.tokenize`) and replayed.

A cache is a folder of three kinds of files:
  `cache.json`: what the tokens depend on.
  `tokens-000000.array_record` and so on: the shards. Position p of the training order (epoch p // n, then the
    permutation of that epoch) is record p % shard_size of shard p // shard_size, so a run reads shards in order.
  `shards.jsonl`: size and sha256 of each finished shard.
A record is (epoch, index) as uint32, then the N tokens as uint16 (uint32 if the vocabulary is larger than 65,536), all
little-endian. The index is that of the example whose pixels were tokenized. It differs from the index in the training
order if that example could not be read and another one replaced it.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from beit_jax.data import images, pipeline, resize
from beit_jax.data.examples import HostBatch, candidates
from beit_jax.data.sources import Example, Source
from beit_jax.data.views import ViewReader
from beit_jax.errors import BadImage, UserError
from beit_jax.run import files

DESCRIPTION, SHARD_LIST, VERSION = "cache.json", "shards.jsonl", 1
SHARD_SIZE = 2**14  # examples; a kill loses at most one shard
WRITER_OPTIONS = "group_size:64,zstd:3"  # 364 bytes an example; groups of one record would take 452
MAX_OPEN_SHARDS = 4  # per process: examples are read ahead, also from the next shards
NUM_SAMPLES = 16  # examples whose hash identifies the data
PAUSES = (0.0, 0.2, 1.0)  # seconds before each look at the list of shards, which `tokenize` may be extending
# The color jitter of the token view depends on both views.
VIEWS = ("image_size", "token_image_size", "interpolation", "token_interpolation")
HOST_AUGMENTATIONS = ("crop", "crop_scale", "crop_ratio", "flip", "scaled_decode", "value_range")
CONFIG_KEY = "config key 'tokenizer.cache'"


def cache_key(
  config: ConfigDict,
  tokenizer: Any,
  num_tokens: int,
  source: Source,
  *,
  augmentations: tuple[str, ...],
  platform: str,
) -> dict[str, Any]:
  """Describes everything that the tokens of a run depend on.

  Args:
    config: the run's complete config.
    tokenizer: the run's tokenizer, a `Pretrained`.
    num_tokens: number of tokens of an example.
    source: the training data; some of its examples are read. Its location is not part of the result.
    augmentations: names of the augmentations on the device that the objective applies.
    platform: of the devices that compute the tokens, as JAX names it. Where two words are equally likely, rounding
      decides.

  Returns:
    JSON values.
  """
  data_keys = (*VIEWS, *HOST_AUGMENTATIONS, *augmentations)
  module = tokenizer.module
  sums = "" if module.residual_dtype == module.dtype else f", sums in {module.residual_dtype}"
  key = {
    "tokenizer's sha256": tokenizer.description.get("sha256"),
    "tokenizer's dtype": module.dtype + sums,
    "platform": platform,
    "vocab_size": module.vocab_size,
    "tokens": num_tokens,
    "data": {k: v for k, v in source.description.items() if k not in ("root", "label_file")},
    "examples": len(source),
    "sha256 of some examples": _sample_sha256(source),
    "pixels": resize.BACKEND,
    "seed": config.seed,
    **{f"data.{name}": config.data[name] for name in data_keys},
  }
  return json.loads(json.dumps(key, default=str))


def _sample_sha256(source: Source) -> str:
  digest = hashlib.sha256()
  for index in np.linspace(0, len(source) - 1, NUM_SAMPLES).astype(int):
    try:
      image = source[int(index)]["image"]
    except (OSError, BadImage):
      image = b""
    digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes())
  return digest.hexdigest()


def _differences(cache: Mapping[str, Any], run: Mapping[str, Any]) -> str:
  # A key that is missing counts as 0: an augmentation that is newer than the cache and is off changes no tokens.
  names = sorted(cache.keys() | run.keys())
  names = [name for name in names if (cache.get(name) or 0) != (run.get(name) or 0)]
  return "\n  ".join(
    f"{name}: the cache was made with {cache.get(name)!r}, this run has {run.get(name)!r}" for name in names
  )


class TokenCache:
  """A cache folder. Shards are opened when they are first read, and a cache can be pickled.

  Attributes:
    key: see `cache_key`.
    command: the command that made the cache, without --epochs.
    epochs: number of epochs that the cache has when it is finished.
    examples: number of examples of an epoch.
    num_tokens: number of tokens of an example.
    positions: length of the part of the training order that is needed; later shards need not exist.

  Raises:
    UserError: there is no cache in the folder, or not one of this version.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(os.path.expanduser(folder)).absolute()
    try:
      description = json.loads((self.folder / DESCRIPTION).read_text())
      # The first version did not say. On a CPU its tokens are those of this version; elsewhere its float32 products
      # were rounded, so that its caches are refused there.
      self.key, self.command = {"platform": "cpu", **description["key"]}, str(description["command"])
      self.epochs, self.shard_size = int(description["epochs"]), int(description["shard_size"])
      self.examples, self.num_tokens = int(self.key["examples"]), int(self.key["tokens"])
      self.positions = self.epochs * self.examples
      self.dtype = np.dtype("<u2" if int(self.key["vocab_size"]) <= 2**16 else "<u4")
      if description["version"] != VERSION or min(self.shard_size, self.examples, self.num_tokens) < 1:
        raise ValueError(f"version {description['version']!r}; this program reads version {VERSION}")
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(
        f"{folder}: no token cache here (there is no {DESCRIPTION}); `python -m beit_jax.tokenize` makes one"
      ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(f"{self.folder / DESCRIPTION} cannot be read ({error!r}); make a new cache") from None

  @property
  def num_shards(self) -> int:
    return -(-self.epochs * self.examples // self.shard_size)

  @property
  def record_size(self) -> int:
    """Bytes of an example before compression."""
    return 8 + self.num_tokens * self.dtype.itemsize

  def path(self, shard: int) -> Path:
    return self.folder / f"tokens-{shard:06d}.array_record"

  def span(self, shard: int) -> tuple[int, int]:
    """The positions of a shard: (first, last + 1)."""
    return shard * self.shard_size, min((shard + 1) * self.shard_size, self.epochs * self.examples)

  def faults(self, shards: Iterable[int] | None = None, *, verify: bool = False) -> dict[int, str]:
    """Finds shards that are missing or damaged.

    Args:
      shards: the shards to look at; default: all that are needed.
      verify: compare the sha256 of each shard and not only its size.

    Returns:
      Shard -> what is wrong with it.
    """
    shards = range(-(-self.positions // self.shard_size)) if shards is None else shards
    # A later line replaces an earlier one of the same shard.
    entries = {row["shard"]: row for row in files.read_json_lines(self.folder / SHARD_LIST) if "shard" in row}
    found = {shard: self._fault(shard, entries.get(shard, {}), verify) for shard in shards}
    return {shard: fault for shard, fault in found.items() if fault}

  def _fault(self, shard: int, entry: Mapping[str, Any], verify: bool) -> str:
    start, stop = self.span(shard)
    path = self.path(shard)
    if not path.is_file() or entry.get("records", 0) < min(stop, self.positions) - start:
      return "missing"
    if entry.get("size") != path.stat().st_size:
      return "damaged: its size has changed"
    if verify and entry.get("sha256") != files.hash_file(path, "sha256"):
      return "damaged: its sha256 has changed"
    return ""

  def write(self, shard: int, keys: np.ndarray, tokens: np.ndarray) -> None:
    """Writes a shard; it appears under its name when it is complete.

    Args:
      shard: its number.
      keys: [R, 2], (epoch, index of the tokenized example) of each record.
      tokens: [R, N].

    Raises:
      UserError: the shard cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter  # slow import that few runs need

    path, temporary = self.path(shard), self.path(shard).with_suffix(".tmp")
    try:
      writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
      for key, row in zip(keys.astype("<u4"), tokens.astype(self.dtype), strict=True):
        writer.write(key.tobytes() + row.tobytes())
      writer.close()
      files.sync(temporary)
      size, sha256 = temporary.stat().st_size, files.hash_file(temporary, "sha256")
      os.replace(temporary, path)
      with (self.folder / SHARD_LIST).open("a") as file:
        entry = {"shard": shard, "records": len(keys), "size": size, "sha256": sha256}
        file.write(f"\n{json.dumps(entry)}\n")  # a kill may have cut off the previous line
        file.flush()
        os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:
      raise UserError(
        f"{path} cannot be written ({error}). The shards before it are finished; free some space or repair the disk, "
        "and give the same command again"
      ) from None

  def lookup(self, seed: int, epoch: int, index: int) -> tuple[int, np.ndarray]:
    """Finds the tokens of an example in an epoch. Thread-safe.

    Returns:
      (index of the example that was tokenized, its tokens [N]).

    Raises:
      UserError: the shard is missing or damaged, or follows another order of examples.
    """
    position = epoch * self.examples + int(pipeline.places(seed, epoch, self.examples)[index])
    shard, row = divmod(position, self.shard_size)
    record = _open_shard(self, shard).read([row])[0]
    found_epoch, found = map(int, np.frombuffer(record, "<u4", 2))
    if found_epoch != epoch or (found != index and found not in candidates(index, self.examples)):
      raise UserError(
        f"{self.path(shard)}: record {row} is example {found} of epoch {found_epoch}, expected example {index} of "
        f"epoch {epoch}: the program that made this cache has another order of examples; make a new cache"
      )
    return found, np.frombuffer(record, self.dtype, offset=8)


@functools.lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(cache: TokenCache, shard: int) -> Any:
  """Verifies a shard and opens it."""
  from array_record.python.array_record_module import ArrayRecordReader

  for pause in PAUSES:
    time.sleep(pause)
    faults = cache.faults([shard], verify=True)
    if not faults:
      return ArrayRecordReader(str(cache.path(shard)))
  raise UserError(f"{cache.path(shard)} is {faults[shard]}; this command repairs it: {cache.command}")


def create(folder: Path, key: dict[str, Any], epochs: int, command: str) -> None:
  """Creates a cache without shards, or extends an existing one to more epochs.

  Raises:
    UserError: the folder has the cache of another run.
  """
  shard_size = SHARD_SIZE
  if (folder / DESCRIPTION).exists():
    existing = TokenCache(folder)
    if _differences(existing.key, key):
      raise UserError(
        f"--out={folder} has the cache of another run:\n  {_differences(existing.key, key)}\nUse another folder, or "
        "delete this one"
      )
    epochs, shard_size = max(epochs, existing.epochs), existing.shard_size
  description = dict(version=VERSION, key=key, epochs=epochs, shard_size=shard_size, command=command)
  files.write_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def open_for_run(folder: str, key: dict[str, Any], positions: int) -> TokenCache:
  """Opens the cache for a run that reads the first `positions` examples of the training order.

  Raises:
    UserError: the cache belongs to another tokenizer, data or augmentation, has too few epochs, or is unfinished.
  """
  try:
    cache = TokenCache(folder)
  except UserError as error:
    raise UserError(f"{CONFIG_KEY}: {error}") from None
  if _differences(cache.key, key):
    raise UserError(
      f"{CONFIG_KEY}: {folder} does not fit this run:\n  {_differences(cache.key, key)}\nGive the run the values of "
      "the cache, make another cache, or leave the key out"
    )
  epochs = -(-positions // cache.examples)
  if epochs > cache.epochs:
    raise UserError(
      f"{CONFIG_KEY}: {folder} holds {cache.epochs} epochs, but this run sees {epochs}. This command adds the others: "
      f"{cache.command} --epochs={epochs}"
    )
  cache.positions = positions
  faults = cache.faults()
  if faults:
    num_shards = -(-positions // cache.shard_size)
    raise UserError(
      f"{CONFIG_KEY}: {folder} is not finished: {len(faults)} of the {num_shards} shards for this run are missing or "
      f"have changed in size, first {cache.path(min(faults)).name}. This command makes them: {cache.command} "
      f"--epochs={cache.epochs}"
    )
  return cache


class CachedTokenReader(ViewReader):
  """A `ViewReader` that takes the "targets" of training examples, tokens [N], from a cache.

  Training batches then have no "token_image"; evaluation is unchanged. An example that could not be read when the cache
  was made counts as unreadable, so that pixels and tokens always belong to the same example.
  """

  def __init__(self, views: images.ViewSizes, options: dict[str, Any], cache: TokenCache):
    # With scaled_decode, the scale at which a JPEG is decoded depends on all views.
    needed = {name: view for name, view in views.items() if name != "token_image" or options["scaled_decode"]}
    super().__init__(needed, options)
    self._cache, self._all_views = cache, ViewReader(views, options)

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    """See `Reader`.

    Raises:
      BadImage: the cache has the tokens of another example, which is a later candidate to replace this one.
      UserError: the cache has the tokens of an example that cannot be read any more.
    """
    seed, epoch, index = key
    found, targets = self._cache.lookup(seed, epoch, index)
    current = example.get("index", index)
    if found == current:
      return {**super().train(image, example, key), "targets": targets}
    order = list(candidates(index, self._cache.examples))
    if order.index(found) > order.index(current):
      raise BadImage(f"example {index}: the cache has the tokens of example {found} in its place")
    raise UserError(
      f"{CONFIG_KEY}: {self._cache.folder} has the tokens of example {found} in epoch {epoch}, which cannot be read "
      f"now ({example.get('replaces')}). Repair the file or the disk and give the same command again. If the example "
      "could not be read then either, an earlier version of this program made the cache: make a new one"
    )

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    return self._all_views.eval(image, example)
