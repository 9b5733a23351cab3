"""A cache of visual tokens: those of K epochs of a run, computed once (`beit_jax.tokenize`) and replayed.

`DIR/cache.json` says what the tokens depend on, `DIR/tokens-000000.array_record` and so on hold them, and
`DIR/shards.jsonl` has a line with size and sha256 for each shard that is finished. Position p of the training order
(epoch = p // n, then the permutation of that epoch) is record p % shard_size of shard p // shard_size, so that a run
reads one shard after the other. A record is (epoch, index) as uint32, then the N tokens of that example as uint16
(uint32 where the vocabulary is larger than 65,536), little-endian; 64 of them are compressed together. The index
is that of the example whose pixels were tokenized: another than the order has there if that one could not be read.
"""

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.data import images, pipeline, resize
from beit_jax.data.examples import HostBatch, candidates
from beit_jax.data.views import ViewReader
from beit_jax.errors import BadImage, UserError

ABOUT, SHARDS, VERSION = "cache.json", "shards.jsonl", 1
SHARD_SIZE = 2**14  # examples: what a kill costs at most
WRITING = "group_size:64,zstd:3"  # one record a group: 452 instead of 364 bytes an example
OPEN = 4  # shards that a process holds open; it reads in order, and the batches ahead may lie in the next
SAMPLE = 16  # examples that stand for the data
PAUSES = (0.0, 0.2, 1.0)  # seconds before shards.jsonl is read again: the cache may just have become longer
# The image's size and interpolation too: the grey that jitter turns around is that of the image.
VIEWS = ("image_size", "token_image_size", "interpolation", "token_interpolation")
AUGMENTATION = ("crop", "crop_scale", "crop_ratio", "flip", "color_jitter", "scaled_decode")


def cache_key(config: Any, tokenizer: Any, num_tokens: int, source: Any) -> dict[str, Any]:
  """Everything that decides which tokens an example of an epoch has, as JSON values.

  Args:
    tokenizer: a `Pretrained`.
    source: the training data; a few of its examples are read. Where it lies does not matter.
  """
  key = {
    "tokenizer's sha256": tokenizer.description.get("sha256"),
    "tokenizer's dtype": tokenizer.module.dtype,
    "vocab_size": tokenizer.module.vocab_size,
    "tokens": num_tokens,
    "data": {k: v for k, v in source.description.items() if k not in ("root", "label_file")},
    "examples": len(source),
    "sha256 of some examples": _sample(source),
    "pixels": resize.BACKEND,
    "seed": config.seed,
    **{f"data.{name}": config.data[name] for name in (*VIEWS, *AUGMENTATION)},
  }
  return json.loads(json.dumps(key, default=str))


def _sample(source: Any) -> str:
  digest = hashlib.sha256()
  for index in np.linspace(0, len(source) - 1, SAMPLE).astype(int):
    try:
      image = source[int(index)]["image"]
    except (OSError, BadImage):
      image = b""
    digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes())
  return digest.hexdigest()


def differences(have: dict[str, Any], want: dict[str, Any]) -> str:
  names = [name for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
  return "\n  ".join(
    f"{n}: the cache was made with {have.get(n)!r}, this run has {want.get(n)!r}" for n in names
  )


class TokenCache:
  """A cache folder. Files are opened when they are read, so that it can be sent to other processes.

  Attributes:
    key: see `cache_key`.
    epochs, examples: epochs that it holds, or will; examples of each.
    positions: those that are read, the first ones of the training order; of what lies behind nothing is asked.
    command: what makes it, but for --epochs.

  Raises:
    UserError: there is no cache, or none of this version.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(os.path.expanduser(folder)).absolute()
    try:
      about = json.loads((self.folder / ABOUT).read_text())
      self.key, self.command = dict(about["key"]), str(about["command"])
      self.epochs, self.shard_size = int(about["epochs"]), int(about["shard_size"])
      self.examples, self.num_tokens = int(self.key["examples"]), int(self.key["tokens"])
      self.positions = self.epochs * self.examples
      self.dtype = np.dtype("<u2" if int(self.key["vocab_size"]) <= 2**16 else "<u4")
      if about["version"] != VERSION or min(self.shard_size, self.examples, self.num_tokens) < 1:
        raise ValueError(f"version {about['version']!r}, this program reads {VERSION}")
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(
        f"{folder}: no token cache, which has a {ABOUT}; `python -m beit_jax.tokenize` makes one"
      ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(f"{self.folder / ABOUT} cannot be read ({error!r}); make the cache anew") from None
    self.__setstate__({})

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if not name.startswith("_")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._lock, self._readers, self._known = threading.Lock(), {}, {}

  @property
  def shards(self) -> int:
    return -(-self.epochs * self.examples // self.shard_size)

  @property
  def record_size(self) -> int:
    """Bytes of an example, before compression."""
    return 8 + self.num_tokens * self.dtype.itemsize

  def path(self, shard: int) -> Path:
    return self.folder / f"tokens-{shard:06d}.array_record"

  def span(self, shard: int) -> tuple[int, int]:
    """The positions that a shard holds: from, up to but without."""
    return shard * self.shard_size, min((shard + 1) * self.shard_size, self.epochs * self.examples)

  def unfinished(self, *, verify: bool = False) -> list[int]:
    """Shards of the first `positions` that are missing or not as they were written.

    verify: looks at every byte, and not only at the size.
    """
    entries = self._entries
    shards = range(-(-self.positions // self.shard_size))
    return [s for s in shards if self._fault(s, entries.get(s), verify)]

  @property
  def _entries(self) -> dict[int, dict[str, Any]]:
    entries = {}
    try:
      lines = (self.folder / SHARDS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
      lines = []
    for line in lines:
      try:
        entry = json.loads(line)
        entries[entry["shard"]] = entry
      except (ValueError, KeyError, TypeError):  # cut off by a kill
        continue
    return entries

  def _fault(self, shard: int, entry: dict[str, Any] | None, verify: bool) -> str:
    start, stop = self.span(shard)
    path, wanted = self.path(shard), min(stop, self.positions) - start
    if entry is None or not path.is_file() or entry.get("records", 0) < wanted:
      return "missing"
    if entry.get("size") != path.stat().st_size:
      return "damaged: its size has changed"
    return "damaged: its sha256 has changed" if verify and entry.get("sha256") != _sha256(path) else ""

  def write(self, shard: int, keys: np.ndarray, tokens: np.ndarray) -> None:
    """A whole shard: keys [r, 2] = (epoch, index of what was tokenized), tokens [r, N]. Under its name when complete.

    Raises:
      UserError: the disk does not take it.
    """
    from array_record.python.array_record_module import ArrayRecordWriter  # here: few runs need it

    path, temporary = self.path(shard), self.path(shard).with_suffix(".tmp")
    try:
      writer = ArrayRecordWriter(str(temporary), WRITING)
      for key, row in zip(keys.astype("<u4"), tokens.astype(self.dtype), strict=True):
        writer.write(key.tobytes() + row.tobytes())
      writer.close()
      with temporary.open("rb+") as file:
        os.fsync(file.fileno())
      entry = dict(shard=shard, records=len(keys), size=temporary.stat().st_size, sha256=_sha256(temporary))
      os.replace(temporary, path)
      with (self.folder / SHARDS).open("a") as file:
        file.write(f"\n{json.dumps(entry)}\n")  # the line before may have been cut off
        file.flush()
        os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:
      raise UserError(
        f"{path} cannot be written ({error}). The shards before it are finished; make room or mend the disk, and give "
        "the same command again"
      ) from None

  def read(self, seed: int, epoch: int, index: int) -> np.ndarray:
    """The tokens [N] of an example in an epoch, or of the one in its place. Errors: as `find`."""
    return self.find(seed, epoch, index)[1]

  def find(self, seed: int, epoch: int, index: int) -> tuple[int, np.ndarray]:
    """(index of the example that was tokenized for this one, its tokens [N]). From any thread.

    Raises:
      UserError: the shard is missing or damaged, or made by a program with another order.
    """
    position = epoch * self.examples + int(pipeline.places(seed, epoch, self.examples)[index])
    shard, row = divmod(position, self.shard_size)
    record = self._reader(shard).read([row])[0]
    during, found = map(int, np.frombuffer(record, "<u4", 2))
    if during != epoch or (found != index and found not in candidates(index, self.examples)):
      raise UserError(
        f"{self.path(shard)}: record {row} is of example {found} in epoch {during}, expected {index} in {epoch}: "
        "this program has another order of examples than the one that made the cache; make it anew"
      )
    return found, np.frombuffer(record, self.dtype, offset=8)

  def _reader(self, shard: int) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    with self._lock:
      if shard not in self._readers:
        fault = self._fault(shard, self._known.get(shard), verify=True)
        for pause in PAUSES if fault else ():
          time.sleep(pause)
          self._known = self._entries
          fault = self._fault(shard, self._known.get(shard), verify=True)
          if not fault:
            break
        if fault:
          raise UserError(f"{self.path(shard)} is {fault}; this makes it anew: {self.command}")
        for old in list(self._readers)[: 1 - OPEN]:
          del self._readers[old]
        self._readers[shard] = ArrayRecordReader(str(self.path(shard)))
      return self._readers[shard]


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def create(folder: Path, key: dict[str, Any], epochs: int, command: str) -> None:
  """Makes the folder a cache of so many epochs; one that is there already may become longer.

  Raises:
    UserError: the folder holds a cache of something else.
  """
  shard_size = SHARD_SIZE
  if (folder / ABOUT).exists():
    before = TokenCache(folder)
    if before.key != key:
      raise UserError(
        f"--out={folder} holds another cache:\n  {differences(before.key, key)}\nTake another folder, or delete it"
      )
    epochs, shard_size = max(epochs, before.epochs), before.shard_size
  about = dict(version=VERSION, key=key, epochs=epochs, shard_size=shard_size, command=command)
  temporary = folder / f"{ABOUT}.tmp"
  temporary.write_text(json.dumps(about, indent=1) + "\n")
  os.replace(temporary, folder / ABOUT)


def open_for_run(folder: str, key: dict[str, Any], positions: int) -> TokenCache:
  """The cache for a run that reads the first `positions` of the training order.

  Raises:
    UserError: it is of another tokenizer, data or augmentation, or too short, or not finished.
  """
  where = "config key 'tokenizer.cache'"
  try:
    cache = TokenCache(folder)
  except UserError as error:
    raise UserError(f"{where}: {error}") from None
  if cache.key != key:
    raise UserError(
      f"{where}: {folder} holds the tokens of something else:\n  {differences(cache.key, key)}\nGive the run the "
      "values of the cache, make another cache, or leave the key out"
    )
  epochs = -(-positions // cache.examples)
  if epochs > cache.epochs:
    raise UserError(
      f"{where}: {folder} holds {cache.epochs} epochs, this run sees {epochs}. The others are added by: "
      f"{cache.command} --epochs={epochs}"
    )
  cache.positions = positions
  missing = cache.unfinished()
  if missing:
    shards = -(-positions // cache.shard_size)
    raise UserError(
      f"{where}: {folder} is not finished: {len(missing)} of the {shards} shards for this run are missing or "
      f"of another size, first {cache.path(missing[0]).name}. This makes them: {cache.command} --epochs={cache.epochs}"
    )
  return cache


class CachedTokenReader(ViewReader):
  """`Views` for training without the tokenizer's: "targets" [N] comes from a cache. Evaluation is as ever.

  An example that could not be read when the cache was made counts as one that cannot be read now either, so that
  pixels and tokens are those of the same one.
  """

  def __init__(self, views: images.ViewSizes, options: dict[str, Any], cache: TokenCache):
    # How far a JPEG is shrunk in decoding depends on all views.
    wanted = {name: view for name, view in views.items() if name != "token_image" or options["scaled_decode"]}
    super().__init__(wanted, options)
    self._cache, self._whole = cache, ViewReader(views, options)

  def train(self, image: Any, example: dict[str, Any], key: tuple[int, ...]) -> HostBatch:
    """See `Views`.

    Raises:
      BadImage: the cache holds the tokens of another example, which may yet be tried in the place of this one.
      UserError: it holds those of one that could be read then, and cannot now.
    """
    index, read = key[-1], example.get("index", key[-1])
    found, targets = self._cache.find(*key)
    if found == read:
      return {**super().train(image, example, key), "targets": targets}
    order = list(candidates(index, self._cache.examples))
    if order.index(found) > order.index(read):
      raise BadImage(f"example {index}: the cache has the tokens of example {found} in its place")
    raise UserError(
      f"config key 'tokenizer.cache': {self._cache.folder} has the tokens of example {found} in epoch {key[-2]}, which "
      f"cannot be read now ({example.get('replaces')}). Mend the file or the disk and give the same command again; if "
      "it could not be read then either, an earlier version of this program made the cache: make it anew"
    )

  def eval(self, image: Any, example: dict[str, Any]) -> HostBatch:
    return self._whole.eval(image, example)
