"""Malicious files, damaged files and random damage: each gives a UserError, executes nothing and leaves nothing.

BEIT_FUZZ=20000 python -m pytest tests/weights/test_hostile_files.py -k random   # the full harness; the default is 300
"""

import copy
import json
import os
import pickletools
import random
import struct
import zipfile

import numpy as np
import pytest

from beit_jax.errors import UserError
from beit_jax.run import checkpoint, files
from beit_jax.weights import io as weights_io
from beit_jax.weights import unilm
from beit_jax.weights.files import pickles, safetensors, torchfile
from tests import reference
from tests.limits import Limits

GOLDEN = reference.HERE
FUZZ = int(os.environ.get("BEIT_FUZZ", "300"))


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path, monkeypatch):
  """Runs the test in an empty folder, which must only contain the files that it wrote under `given/` afterwards."""
  (tmp_path / "given").mkdir()
  monkeypatch.chdir(tmp_path)
  yield
  assert [p.name for p in tmp_path.iterdir()] == ["given"]


def _archive(path, pickle, entries=(), **options):
  with zipfile.ZipFile(path, "w", **options) as archive:
    archive.writestr("x/data.pkl", pickle)
    for name, data in entries:
      archive.writestr(name, data)
  return path


def _text(value):
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def _global(name):
  module, _, name = name.rpartition(".")
  return f"c{module}\n{name}\n".encode()


STORAGE = b"((" + _text("storage") + _global("torch.FloatStorage") + _text("0") + _text("cpu") + b"K\x04tQ"
TENSOR = _global("torch._utils._rebuild_tensor_v2") + STORAGE
SYSTEM = _global("os.system") + b"(" + _text("touch PWNED") + b"tR"
NESTED = b"\x80\x02" + SYSTEM + b"."

HOSTILE = {
  "a call": (SYSTEM, "os.system"),
  "a call by stack": (_text("builtins") + _text("eval") + b"\x93(" + _text("1") + b"tR", "builtins.eval"),
  "a class of another kind": (b"(ios\nsystem\n", "INST"),
  "an object on the stack": (b"(" + _global("argparse.Namespace") + b"o", "OBJ"),
  "a new object with keywords": (_global("argparse.Namespace") + b")}\x92", "found argparse.Namespace"),
  "an extension code": (b"\x82\x01", "EXT1"),
  "a large extension code": (b"\x84\x01\x00\x00\x00", "EXT4"),
  "a changed function": (
    _global("torch._utils._rebuild_tensor_v2") + b"}" + _text("__code__") + b"Ksb",
    "sets the state",
  ),
  "a changed list": (b"]}" + _text("append") + b"K\x01sb", "sets the state of something other"),
  "a text that is called": (
    _text("os.system") + b"(" + _text("x") + b"tR",
    "calls something that is not a global name",
  ),
  "a storage that is called": (_global("torch.FloatStorage") + b"(K\x01tR", "found torch.FloatStorage"),
  "a nested pickle": (
    _global("torch.storage._load_from_bytes") + b"(C" + bytes([len(NESTED)]) + NESTED + b"tR",
    "torch.storage._load_from_bytes",
  ),
  "a partial": (_global("functools.partial") + b"(" + SYSTEM + b"tR", "os.system"),
  "a getattr": (
    _global("builtins.getattr") + b"(" + _global("argparse.Namespace") + _text("x") + b"tR",
    "getattr",
  ),
  "a numpy constructor": (_global("numpy.core.multiarray._reconstruct") + b")R", "_reconstruct"),
  "a huge tensor": (TENSOR + b"K\x00(\x8a\x06\x00\x00\x00\x00\x00\x10t(K\x01t\x89)tR", "in a storage of 4"),
  "a tensor beyond its storage": (TENSOR + b"K\x03(K\x02t(K\x01t\x89)tR", "in a storage of 4"),
  "a tensor of repeated numbers": (
    TENSOR + b"K\x00(M\xff\xffM\xff\xfft(K\x00K\x00t\x89)tR",
    "in a storage of 4",
  ),
  "a tensor with negative steps": (
    TENSOR + b"K\x03(K\x02t(J\xff\xff\xff\xfft\x89)tR",
    "sizes are not valid numbers",
  ),
  "a storage of many bytes": (TENSOR.replace(b"K\x04", b"\x8a\x06" + b"\xff" * 5 + b"\x0f"), "should have"),
  "a text of 2^60 bytes": (b"\x8d" + struct.pack("<Q", 2**60) + b"x", "damaged"),
  "a number of 2^31 bytes": (b"\x8b\xff\xff\xff\x7f", "damaged"),
  "a deep key": (b"}" + b")" + b"\x85" * 200_000 + b"K\x01s", "no state dict in it"),
  "a deep global": (
    b")" + b"\x85q\x00h\x00\x86" * 60 + _text("x") + b"\x93",
    "a global name that is no text",
  ),
  "a long global": (_text("x" * 600) + _text("y") + b"\x93", "more than 512 characters"),
  "a call of a result": (
    _global("builtins.getattr") + b"(" + _global("a.B") + _text("c") + b"tR(" + _text("d") + b"tR",
    "found builtins.getattr",
  ),
  "a deep reference": (b")" + b"\x85q\x00h\x00\x86" * 60 + b"Q", "unknown reference"),
  "a tensor of ten thousand axes": (
    TENSOR + b"K\x00(" + (b"\x8a\xff" + b"\x7f" * 255) * 10_000 + b"t(K\x01t\x89)tR",
    "sizes are not valid numbers",
  ),
  "a list used again and again": (
    b"]q\x00(" + b"N" * 100_000 + b"e0(" + (_global("torch.Size") + b"h\x00\x85R") * 5000 + b"l",
    "copies far more elements",
  ),
  "numbers that collide": (
    b"}("
    + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 30_000))
    + b"u",
    "no state dict in it",
  ),
  "a memo that is empty": (b"h\x07", "damaged"),
  "an empty stack": (b"0", "damaged"),
  "an unknown reference": (b"(" + _text("file") + _text("/etc/passwd") + b"tQ", "unknown reference"),
  "a text reference": (b"P/etc/passwd\n", "PERSID"),
  "an out-of-band buffer": (b"\x97", "NEXT_BUFFER"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path):
  """The pickle is refused in the zip archive and in the stream format."""
  body, message = HOSTILE[name]
  path = tmp_path / "given" / "x.pth"
  _archive(path, b"\x80\x02" + body + b".", [("x/data/0", b"\0" * 16)])
  with pytest.raises(UserError) as error:
    weights_io.load(path)
  assert message in str(error.value) and str(path) in str(error.value)
  head = b"".join(b"\x80\x02" + x + b"." for x in _stream_head())
  path.write_bytes(head + b"\x80\x02" + body + b".")
  with pytest.raises(UserError):
    weights_io.load(path)


def _stream_head():
  magic = torchfile.MAGIC.to_bytes(10, "little")
  return (b"\x8a" + bytes([len(magic)]) + magic, b"M\xe9\x03", b"}" + _text("little_endian") + b"\x88s")


def test_golden_malicious_file_is_refused():
  with pytest.raises(UserError, match="posix.system.*nothing was executed"):
    weights_io.load(GOLDEN / "malicious_encoder.pkl")


def test_pickles_can_only_call_our_own_functions():
  """The only functions that a pickle can call are seven of our own, one for each of these names."""
  assert set(pickles.CALLS) == {
    "collections.OrderedDict",
    "collections.defaultdict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Size",
  }
  for code in pickletools.opcodes:  # every opcode is either known or refused by its name
    assert code.name.isidentifier()


def test_module_that_contains_itself_is_refused(tmp_path):
  """Collecting the tensors of a module ends, although the module contains itself."""
  encoder = (
    _global("dall_e.encoder.Encoder")
    + b")\x81q\x00}"
    + _text("_modules")
    + b"}"
    + _text("again")
    + b"h\x00ssb"
  )
  path = _archive(tmp_path / "given" / "x.pkl", b"\x80\x02" + encoder + b".")
  with pytest.raises(UserError, match="no state dict in it; found dall_e.encoder.Encoder"):
    weights_io.load(path)


def test_unknown_objects_do_nothing(tmp_path, monkeypatch):
  """Calls, states, items and appended values of unknown globals are absorbed; no module is imported for them."""
  (tmp_path / "given" / "evil.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(tmp_path / "given")
  evil = _global("evil.Thing")
  bodies = (
    evil + b")R",
    evil + b")\x81}" + _text("x") + b"K\x01sb",
    evil + b")R" + _text("k") + b"K\x01s",
    evil + b")R(K\x01K\x02e",
    evil + b")}\x92",
    evil + b")R)R",
    b"\x8f(" + evil + b"\x90",
    b"(" + evil + b"\x91",
    b"(" + _text("storage") + evil + _text("0") + _text("cpu") + b"K\x04tQ",
  )
  for i, body in enumerate(bodies):
    state = b"}" + _text("a") + TENSOR + b"K\x00(K\x04t(K\x01t\x89)tRs"
    path = _archive(
      tmp_path / "given" / f"{i}.pth",
      b"\x80\x02}" + _text("model") + state + b"s" + _text("other") + body + b"s.",
      [("x/data/0", b"\0" * 16)],
    )
    content = torchfile.load(path)
    assert isinstance(content["other"], torchfile.Inert) and content["model"]["a"].read().shape == (4,)


def test_growing_module_names_are_refused(tmp_path):
  """The joined names of nested modules are limited, although each part is stored only once."""
  name = _text("x" * 500) + b"q\x01"
  body = _global("dall_e.encoder.Encoder") + b"q\x00)\x81}" + _text("_modules") + b"}" + name
  for _ in range(50):
    body += b"h\x00)\x81}" + _text("_modules") + b"}h\x01"
  body += b"N" + b"ssb" * 51
  path = _archive(tmp_path / "given" / "x.pkl", b"\x80\x02" + body + b".")
  with pytest.raises(UserError, match="longer than"):
    weights_io.load(path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"blocks.3000.mlp.fc1.weight": (8, 4)}, "not numbered from 0 without a gap"),
    ({"blocks." + "9" * 5000 + ".mlp.fc1.weight": (8, 4)}, "not numbered from 0 without a gap"),
    ({"blocks.0.attn.relative_position_bias_table": (299 * 299 + 3, 1)}, "more than 64 x 64 patches"),
    ({"blocks.0.attn.relative_position_bias_table": (299 * 299 + 3, 0)}, "not a BEiT"),
    ({"patch_embed.proj.weight": (4, 3, 0, 0)}, "not a BEiT"),
    ({"cls_token": (1, 1, 0)}, "not a BEiT"),
    ({"pos_embed": (5,), "blocks.0.attn.qkv.bias": (12,)}, "not a BEiT|pos_embed"),
    ({"blocks.0.attn.qkv.bias": ()}, "expected .3 x width"),
  ],
)
def test_shapes_of_impossible_models_are_refused(changes, message, tmp_path):
  """A small file that describes an absurdly large model is refused before anything of that size is allocated."""
  shapes = {
    "cls_token": (1, 1, 4),
    "patch_embed.proj.weight": (4, 3, 2, 2),
    "blocks.0.mlp.fc1.weight": (8, 4),
    "pos_embed": (1, 5, 4),
    **changes,
  }
  path = tmp_path / "given" / "x.safetensors"
  safetensors.write(path, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, {})
  with pytest.raises(UserError, match=message):
    weights_io.load(path, num_heads=1)


def _write_valid_file(path):
  torchfile.save(path, {"a": np.arange(1000, dtype=np.float32), "b": np.ones((3, 4), np.float32)}, {})
  return path


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share, tmp_path):
  for name in ("mim_plus.pth", "dalle_encoder_small_legacy.pkl"):
    data = (GOLDEN / name).read_bytes()
    path = tmp_path / "given" / name
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError):
      weights_io.load(path)


def _patched(path, find, replace, count=1):
  data = path.read_bytes()
  assert find in data
  path.write_bytes(data.replace(find, replace, count))
  return path


def test_archives_with_false_sizes_are_refused(tmp_path):
  path = _write_valid_file(tmp_path / "given" / "x.pth")
  with zipfile.ZipFile(path) as archive:
    info = archive.getinfo("archive/data/0")
  sizes = struct.pack("<LL", info.file_size, info.file_size)
  data = path.read_bytes()
  central = data.index(b"PK\x01\x02")
  for claim in (0xFFFFFFF0, 4001):
    lie = data[central:].replace(sizes, struct.pack("<LL", claim, claim))
    path.write_bytes(data[:central] + lie)
    with pytest.raises(UserError, match="claims|should have|overlap"):
      torchfile.load(path)["model"]["a"].read()


def test_compressed_duplicate_and_foreign_archives_are_refused(tmp_path):
  path = tmp_path / "given" / "x.pth"
  _archive(
    path,
    b"\x80\x02" + b"]" * 10 + b"0" * 9 + b".",
    [("x/data/0", b"\0" * 10**6)],
    compression=zipfile.ZIP_DEFLATED,
  )
  with pytest.raises(UserError, match="is compressed"):
    weights_io.load(path)
  with pytest.warns(UserWarning, match="Duplicate"):
    _archive(path, b"\x80\x02}.", [("x/data/0", b"1"), ("x/data/0", b"2")])
  with pytest.raises(UserError, match="occurs twice"):
    weights_io.load(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("hello.txt", "hello")
  with pytest.raises(UserError, match="has one data.pkl, this one has 0"):
    weights_io.load(path)
  _archive(path, b"\x80\x02}.", [("x/byteorder", b"big")])
  with pytest.raises(UserError, match="big-endian"):
    weights_io.load(path)


def test_overlapping_archive_entries_are_refused(tmp_path):
  """Two entries share the same bytes, which lets a small archive claim to be a large one."""
  path = _write_valid_file(tmp_path / "given" / "x.pth")
  with zipfile.ZipFile(path) as archive:
    first, second = (archive.getinfo(f"archive/data/{i}").header_offset for i in (0, 1))
  data = path.read_bytes()
  central = data.index(b"PK\x01\x02")
  path.write_bytes(
    data[:central] + data[central:].replace(struct.pack("<L", second), struct.pack("<L", first), 1)
  )
  with pytest.raises(UserError, match="overlap|not where|damaged"):
    torchfile.load(path)


def test_flipped_bits_are_found_by_the_checksum(tmp_path):
  path = _write_valid_file(tmp_path / "given" / "x.pth")
  _patched(path, np.float32(500).tobytes() + np.float32(501).tobytes(), b"\0" * 8)
  with pytest.raises(UserError, match="checksum"):
    torchfile.load(path)["model"]["a"].read()


HEADERS = {
  "a length beyond the file": (2**40, b"{}"),
  "not JSON": (None, b"{" + b"x" * 20),
  "nested too deep": (None, b'{"a":' + b"[" * 100_000),
  "a list": (None, b'{"a": 1'),
  "an unknown type": (None, {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}),
  "a wrong size": (None, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
  "a shape below zero": (None, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
  "a shape of many axes": (None, {"a": {"dtype": "F32", "shape": [10**4000] * 1000, "data_offsets": [0, 8]}}),
  "a shape of booleans": (None, {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}),
  "offsets backwards": (None, {"a": {"dtype": "F32", "shape": [], "data_offsets": [8, 4]}}),
  "beyond the end": (None, {"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}),
  "a huge shape": (None, {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
  "an overlap": (
    None,
    {
      "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
      "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
  ),
  "a gap": (None, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
  "bytes of no tensor": (None, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
  "a name twice": (
    None,
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
    b'"data_offsets":[0,8]}}',
  ),
  "metadata that are not strings": (None, {"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_invalid_safetensors_headers_are_refused(name, tmp_path):
  length, header = HEADERS[name]
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  path = tmp_path / "given" / "x.safetensors"
  path.write_bytes(struct.pack("<Q", length or len(raw)) + raw + b"\0" * 8)
  with pytest.raises(UserError, match="damaged or not a safetensors file"):
    weights_io.load(path)


@pytest.mark.parametrize("name", ["mim_plus.pth", "dalle_encoder_small_legacy.pkl", "safetensors"])
def test_random_damage_gives_a_value_or_a_user_error(name, tmp_path):
  """Random bytes are changed, removed or doubled: the file gives a value or a UserError within 5 s and 1 GiB."""
  path = tmp_path / "given" / "x"
  if name == "safetensors":
    safetensors.write(path, {"a": np.ones((3, 4), np.float32), "b": np.arange(5)}, {"k": "v"})
    data, read = path.read_bytes(), lambda p: [t.read() for t in safetensors.read(p)[0].values()]
  else:
    data, read = (GOLDEN / name).read_bytes(), _read_all
  rng = np.random.default_rng(0)
  failures = 0
  read(path) if name == "safetensors" else read(GOLDEN / name)
  limits = Limits(f"weights, {name}")
  for i in range(FUZZ):
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 4)):
      # Half of the damage hits the structure, which is at the beginning and the end of a file.
      edge = min(len(damaged), 4000)
      at = int(rng.integers(edge)) if rng.random() < 0.25 else len(damaged) - 1 - int(rng.integers(edge))
      at = int(rng.integers(len(damaged))) if rng.random() < 0.5 else at
      kind = rng.integers(3)
      if kind == 0:
        damaged[at] = int(rng.integers(256))
      elif kind == 1:
        del damaged[at : at + int(rng.integers(1, 9))]
      else:
        damaged[at:at] = damaged[at : at + int(rng.integers(1, 9))]
    path.write_bytes(damaged)
    with limits.case(f"file {i}"):
      try:
        read(path)
      except UserError:
        failures += 1
  limits.report(refused=failures)
  assert failures > FUZZ // 20  # otherwise the damage never matters


# Well-formed files with wrong contents, which pass through all of `load`.

ODD = (
  *(
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    10**9,
    10**30,
    2**63,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
  ),
  *("a" * 1000, [], [0], [1, 2], [-1, -1], [10**9, 10**9], {}, {"a": 1}, [[1]], [None]),
)


def _paths(tree, above=()):
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
    yield (*above, key)
    if isinstance(value, dict | list):
      yield from _paths(value, (*above, key))


def _mutated(rng, tree):
  """A copy of a JSON value in which one to three values are removed, renamed, slightly changed or replaced."""
  tree = copy.deepcopy(tree)
  for _ in range(rng.choice((1, 1, 2, 3))):
    *above, last = rng.choice(list(_paths(tree)) or [(None,)])
    node = tree
    for key in above:
      node = node[key]
    if last is None:
      break
    value, what = node[last], rng.random()
    if what < 0.2:
      del node[last]
    elif what < 0.35 and isinstance(node, dict):
      node[rng.choice(("x", "kind", "module"))] = node.pop(last)
    elif what < 0.7 and type(value) in (int, float) and abs(value) < 2**60:
      node[last] = rng.choice((value * 2, value + 1, value - 1, -value, value * 1000))
    elif what < 0.7 and isinstance(value, str | list):
      node[last] = value[::-1]
    else:
      node[last] = copy.deepcopy(rng.choice(ODD))
  return tree


def _own_folder(model, path):
  weights_io.save(model, path / "x", format="orbax")
  described = json.loads((path / "x" / "description.json").read_text())

  def damage(rng):
    files.write_json(path / "x" / "description.json", _mutated(rng, described))
    checkpoint.write_digest(path / "x")
    return path / "x"

  return damage


def _hf_folder(model, path):
  weights_io.save(model, path / "x", format="hf")
  texts = {
    name: json.loads((path / "x" / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")
  }

  def damage(rng):
    name = rng.choice(sorted(texts))
    text = _mutated(rng, texts[name])
    if name == "config" and rng.random() < 0.6:
      within = json.loads(texts[name]["beit_jax"])
      ours = {"beit_jax": json.dumps(_mutated(rng, within))} if rng.random() < 0.5 else {}
      text = {key: value for key, value in text.items() if key != "beit_jax"} | ours
    for other in texts:
      (path / "x" / f"{other}.json").write_text(json.dumps(text if other == name else texts[other]))
    return path / "x"

  return damage


def _header(model, path):
  weights_io.save(model, path / "x.safetensors", format="unilm")
  data = (path / "x.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]

  def damage(rng):
    other = _mutated(rng, header)
    if rng.random() < 0.4:
      within = _mutated(rng, json.loads(header["__metadata__"]["beit_jax"]))
      other = {**header, "__metadata__": {"format": "pt", "beit_jax": json.dumps(within)}}
    text = json.dumps(other).encode()
    (path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    return path / "x.safetensors"

  return damage


def _inner_pickle(_, path, source=GOLDEN / "mim_plus.pth"):
  with zipfile.ZipFile(source) as archive:
    entries = {info.filename: archive.read(info) for info in archive.infolist()}

  def damage(rng):
    with zipfile.ZipFile(path / "x.pth", "w") as archive:
      for name, data in entries.items():
        if name.endswith("data.pkl"):
          data = bytearray(data)
          for _ in range(rng.choice((1, 1, 2, 4))):
            at, count = rng.randrange(len(data)), rng.randrange(1, 9)
            data[at : at + rng.choice((0, 1, count))] = rng.choice(
              (rng.randbytes(1), b"", data[at : at + count])
            )
        archive.writestr(name, bytes(data))
    return path / "x.pth"

  return damage


def _training_checkpoint(model, path):
  """As `_inner_pickle`, for a file of PyTorch with objects of many classes beside the state dict."""
  torch = pytest.importorskip("torch")
  state = {name: torch.from_numpy(np.array(value)) for name, value in unilm.export_beit(model).items()}
  objects = [
    random.getstate(),
    np.random.get_state(),
    {1, 2},
    frozenset("a"),
    np.float64(1),
    random.Random(0),
  ]
  content = {"net": state, "objects": objects, "module": torch.nn.Linear(2, 2), (1, 2): 3, "x": torch.Tensor}
  torch.save(content, path / "source.pth", pickle_protocol=4)
  return _inner_pickle(model, path, path / "source.pth")


@pytest.mark.parametrize("make", [_own_folder, _hf_folder, _header, _inner_pickle, _training_checkpoint])
def test_random_contents_give_a_model_or_a_user_error(make, tmp_path):
  """Files with correct checksums, lengths and digests but wrong contents give a model or a UserError."""
  weights_io.load(GOLDEN / "mim_plus.pth")
  damage = make(weights_io.load(GOLDEN / "mim_plus.pth"), tmp_path / "given")
  limits, failures = Limits(f"weights, {make.__name__}"), 0
  for i in range(max(FUZZ // 10, 1)):
    path = damage(random.Random(f"contents {i}"))
    with limits.case(f"file {i}"):
      try:
        weights_io.load(path)
      except UserError as error:
        failures += 1
        assert len(str(error)) < 10_000
  limits.report(refused=failures)
  assert failures > FUZZ // 100


def test_description_with_excessive_sizes_is_refused(tmp_path):
  """Fields are checked before the model is built, and claimed array sizes before the arrays are read."""
  damage = _own_folder(weights_io.load(GOLDEN / "mim_plus.pth"), tmp_path / "given")
  folder = damage(random.Random(0))
  for key, value in (("depth", 10**9), ("width", 10**9), ("patch_size", 0), ("image_size", [10**6, 10**6])):
    text = weights_io.load(GOLDEN / "mim_plus.pth").describe()
    text["module"]["encoder"][key] = value
    files.write_json(folder / "description.json", text)
    checkpoint.write_digest(folder)
    with pytest.raises(UserError, match=f"field '{key}'"):
      weights_io.load(folder)
  with pytest.raises(UserError, match="claims 1,000,000,000,000 bytes of arrays"):
    checkpoint._check_claimed_size(folder / "params", 10**12)


def _read_all(path):
  value = torchfile.load(path)
  if isinstance(value, torchfile.Inert):
    return [t.read() for t in torchfile.module_tensors(value).values()]
  tensors = value.get("model") if isinstance(value, dict) else None
  return (
    [t.read() for t in tensors.values() if isinstance(t, torchfile.Tensor)]
    if isinstance(tensors, dict)
    else []
  )
