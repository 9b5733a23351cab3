"""A workdir in a bucket, with the stand-in of tests/bucket.py on the loopback address."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax import train, trees
from beit_jax.errors import UserError
from beit_jax.predict import __main__ as predict
from beit_jax.run import checkpoint, files
from beit_jax.run.checkpointer import SLOW_SAVE
from beit_jax.runtime import bucket as storage
from beit_jax.runtime import lock
from tests import kills, tiny
from tests.bucket import Bucket
from tests.conftest import ROOT

# The fixture imports these.
if not all(importlib.util.find_spec(name) for name in ("gcsfs", "google.cloud.storage")):
  pytest.skip("no gcsfs or google-cloud-storage: pip install -e '.[gcs]'", allow_module_level=True)

SLOW = pytest.mark.slow
OFFLINE = {"NO_GCE_CHECK": "true", "HOME": "/nowhere", "CLOUDSDK_CONFIG": "/nowhere"}  # no credentials


@pytest.fixture(scope="module")
def bucket():
  """One bucket for all tests, since the libraries cache their clients; each test uses its own folder."""
  with Bucket() as served, pytest.MonkeyPatch.context() as patch:
    for key, value in served.environment.items():
      patch.setenv(key, value)
    yield served
    storage.close()


def _config(**changes):
  keys = {"checkpoint.every_steps": 1, "checkpoint.keep": 2, "eval.every_steps": 2}
  return tiny.config("classify", **{"total_steps": 4, "optimizer.ema_decay": 0.9, **keys, **changes})


@pytest.fixture(scope="module")
def run(bucket):
  workdir = storage.path("gs://bucket/whole")
  train.run(_config(figures=True, **{"checkpoint.best": "loss"}), workdir)
  return workdir


def _copy(bucket, name, target):
  """Copies the objects below `name` to another name in the bucket, or to a folder on disk."""
  for key in bucket.names(f"{name}/"):
    rest = key.removeprefix(f"{name}/")
    if isinstance(target, Path):
      (target / rest).parent.mkdir(parents=True, exist_ok=True)
      (target / rest).write_bytes(bucket.read(key))
    else:
      bucket.write(f"{target}/{rest}", bucket.read(key))
  return target


def _rows(bucket, name):
  rows = [json.loads(line) for line in bucket.read(f"{name}/metrics.jsonl").splitlines()]
  return [{key: value for key, value in row.items() if key not in kills.TIMINGS} for row in rows]


# The run.


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_folders_count_in_the_pages_of_the_stand_in(size, bucket):
  for name in ("a/1", "a/2", "b", "c/1", "d"):
    bucket.write(f"pages/{name}", b"")
  query, pages = {"prefix": "pages/", "delimiter": "/", "maxResults": size}, []
  while True:
    url = f"{bucket.url}/storage/v1/b/bucket/o?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url) as answer:
      page = json.load(answer)
    pages.append(sorted([item["name"] for item in page["items"]] + page["prefixes"]))
    if "nextPageToken" not in page:
      break
    query["pageToken"] = page["nextPageToken"]
  assert sum(pages, []) == ["pages/a/", "pages/b", "pages/c/", "pages/d"]
  assert [len(page) for page in pages] == [min(size, 4 - i) for i in range(0, 4, size)]


def test_a_run_in_a_bucket_equals_a_run_on_disk(bucket, run, tmp_path):
  """Same rows, same arrays, same files; a copy of the bucket on disk is a run that verifies."""
  train.run(_config(figures=True, **{"checkpoint.best": "loss"}), tmp_path / "local")
  kills.compare(tmp_path / "local", _copy(bucket, "whole", tmp_path / "copy"), exact=True)

  def other_files(folder):
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return {name for name in names if not name.startswith(("checkpoints/", "best/", "tensorboard/"))}

  # In a bucket, the lock is deleted at the end of the run.
  assert other_files(tmp_path / "copy") | {"lock.json"} == other_files(tmp_path / "local")
  assert len([name for name in bucket.names("whole/tensorboard/") if "tfevents" in name]) == 1
  assert checkpoint.find(tmp_path / "copy" / "best").name == checkpoint.find(run / "best").name
  assert (
    beit_jax.load(tmp_path / "copy").description["sha256"]
    == beit_jax.load("gs://bucket/whole").description["sha256"]
  )


def test_a_finished_run_is_not_repeated(bucket, run):
  before = {name: bucket.objects[name] for name in bucket.names("whole/")}
  assert train.run(_config(figures=True, **{"checkpoint.best": "loss"}), run)["step"] == 4
  assert before == {name: bucket.objects[name] for name in bucket.names("whole/")}


def test_metrics_are_uploaded_before_the_checkpoint_is_sealed(bucket, monkeypatch):
  """When a digest appears, the rows up to its step are in the bucket; older checkpoints are deleted only then."""
  seen, original = [], Bucket.write

  def write(self, name, data):
    original(self, name, data)
    if name.endswith("/digest.json"):
      steps = {
        int(key.split("/")[2]) for key in bucket.names("order/checkpoints/") if key.endswith("digest.json")
      }
      seen.append((int(name.split("/")[2]), max(row["step"] for row in _rows(bucket, "order")), steps))

  monkeypatch.setattr(Bucket, "write", write)
  train.run(_config(**{"checkpoint.keep": 1}), storage.path("gs://bucket/order"))
  assert [step for step, _, _ in seen] == [1, 2, 3, 4]
  assert all(logged >= step for step, logged, _ in seen), seen
  assert all(step - 1 in steps for step, _, steps in seen[1:]), seen


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(bucket, caplog):

  def refuse(method, path):
    return 403 if method == "DELETE" and "kept/checkpoints/1" in urllib.parse.unquote(path) else None

  bucket.refuse = refuse
  try:
    train.run(_config(**{"checkpoint.keep": 1}), storage.path("gs://bucket/kept"))
  finally:
    bucket.refuse = None
  assert checkpoint.find("gs://bucket/kept").name == "4"
  assert "checkpoints/1 could not be deleted" in caplog.text


def test_resume_in_a_bucket(bucket, run):
  """If the newest checkpoint is damaged, it is moved away and the one before is used."""
  _copy(bucket, "whole", "again")
  bucket.objects.pop("again/result.json")
  broken = next(key for key in bucket.names("again/checkpoints/4/params/") if "/d/" in key)
  bucket.write(broken, bucket.read(broken)[:-1] + b"?")
  train.run(_config(figures=True, **{"checkpoint.best": "loss"}), storage.path("gs://bucket/again"))
  assert bucket.names("again/damaged/4-") and _rows(bucket, "again") == _rows(bucket, "whole")
  one, two = (
    trees.flatten(checkpoint.load_params(checkpoint.find(path), "rest"))
    for path in (run, "gs://bucket/again")
  )
  assert all(np.array_equal(one[name], two[name]) for name in one)


def test_every_object_is_verified(bucket, run):
  """A checkpoint with a missing, shortened, changed, longer or additional object is never restored."""
  newest, count = checkpoint.find(run), 0
  for key in bucket.names("whole/checkpoints/4/"):
    data = bucket.read(key)
    flipped = bytes([data[len(data) // 2] ^ 1])
    for case in (
      None,
      data[:-1],
      b"",
      data + b" ",
      data[: len(data) // 2] + flipped + data[len(data) // 2 + 1 :],
    ):
      if key.endswith("digest.json") and case in (data[:-1], data + b" "):
        continue  # the same JSON
      bucket.write(key, case) if case is not None else bucket.objects.pop(key)
      assert checkpoint.fault(newest) is not None, (key, case)
      bucket.write(key, data)
      count += 1
    assert checkpoint.fault(newest) is None
  bucket.write("whole/checkpoints/4/extra", b"")
  assert "not in the digest" in checkpoint.fault(newest)
  bucket.objects.pop("whole/checkpoints/4/extra")
  assert count > 100 and checkpoint.find(run) == newest


@SLOW
def test_a_run_copied_up_from_disk_is_verified_by_its_sha256(bucket, tmp_path):
  train.run(_config(), tmp_path / "up")
  for path in (p for p in (tmp_path / "up").rglob("*") if p.is_file()):
    bucket.write(f"up/{path.relative_to(tmp_path / 'up')}", path.read_bytes())
  assert checkpoint.find("gs://bucket/up").name == "4"
  assert beit_jax.load("gs://bucket/up").kind == "classifier"
  key = next(key for key in bucket.names("up/checkpoints/4/params/") if "/d/" in key)
  bucket.write(key, bucket.read(key)[::-1])
  assert checkpoint.find("gs://bucket/up").name == "3"


@SLOW
def test_weights_from_a_bucket(bucket, run, tmp_path):
  """init_from a run, from single files with the files beside them, and resume give the same as from disk."""
  wanted = beit_jax.load("gs://bucket/whole")
  beit_jax.save(wanted, tmp_path / "hf", format="hf")
  beit_jax.save(wanted, tmp_path / "model.safetensors", format="unilm")
  for path in [*(tmp_path / "hf").iterdir(), tmp_path / "model.safetensors"]:
    bucket.write(f"weights/{path.relative_to(tmp_path)}", path.read_bytes())
  for name in ("hf", "hf/model.safetensors", "model.safetensors"):
    found = beit_jax.load(f"gs://bucket/weights/{name}")
    leaves = trees.flatten(found.params)
    assert all(np.array_equal(leaves[name], leaf) for name, leaf in trees.flatten(wanted.params).items())
  train.run(_config(total_steps=1, init_from="gs://bucket/whole"), tmp_path / "tuned")
  train.run(_config(total_steps=5, resume="gs://bucket/whole"), tmp_path / "resumed")
  assert checkpoint.find(tmp_path / "resumed").name == "5"
  with pytest.raises(UserError, match="no such file or folder"):
    beit_jax.load("gs://bucket/nothing")
  with pytest.raises(UserError, match="on disk only"):
    beit_jax.save(wanted, "gs://bucket/there", format="orbax")


STAGES = """
from ml_collections import ConfigDict
from tests import tiny

def get_config():
  tokenizer = tiny.raw("dvae", total_steps=1)
  keys = {"tokenizer.init_from": "stage:tokenizer", "optimizer.warmup_steps": 0}
  pretrain = tiny.raw("beit", total_steps=1, **keys)
  stages = dict(tokenizer=tokenizer, pretrain=pretrain)
  summary = (("loss of pre-training", "pretrain.last.loss", ".2f"),)
  return ConfigDict(dict(stages=tuple(stages), summary=summary, **stages))
"""


@SLOW
def test_stages_in_a_bucket(bucket, tmp_path, capsys, monkeypatch):
  """A later stage finds the weights of an earlier one; the doctor finds no problem, before and after."""
  from beit_jax import main
  from beit_jax.doctor import __main__ as doctor
  from beit_jax.doctor import host

  monkeypatch.setattr(host, "TPU_LOCK", tmp_path / "libtpu_lockfile")  # whatever this machine has
  for name in ("nvidia_gpus", "tpu_chips"):
    monkeypatch.setattr(host, name, list)

  (tmp_path / "config.py").write_text(STAGES)
  argv = [f"--config={tmp_path / 'config.py'}", "--workdir=gs://bucket/stages"]

  def diagnose():
    return doctor.main(argv), capsys.readouterr().out

  for answer in ("starts from scratch", "finished earlier"):
    status, text = diagnose()
    assert status == 0 and "gs://bucket/stages: can be written" in text and answer in text, text
    assert main.main(argv) == 0
  _foreign(bucket, "stages/pretrain")
  status, text = diagnose()
  assert status == 1 and "process 77 on elsewhere" in text, text
  assert storage._staging is None
  Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "black.png")
  argv = ["gs://bucket/stages/pretrain", str(tmp_path / "black.png"), f"--out={tmp_path / 'seen'}"]
  assert predict.main(argv) == 0  # the tokenizer of the checkpoint is in the bucket too
  assert predict.main([*argv, "--out=gs://bucket/seen"]) == 2
  said = json.loads(bucket.read("stages/pretrain/checkpoints/1/description.json"))["config"]["tokenizer"]
  assert said["init_from"] == "gs://bucket/stages/tokenizer"
  assert "loss of pre-training" in bucket.read("stages/summary.txt").decode()
  assert "command: " in bucket.read("stages/log.txt").decode()


@SLOW
def test_an_evaluation_writes_its_files_to_the_bucket(bucket, run):
  result = train.run(
    _config(eval_only=True, init_from="gs://bucket/whole"), storage.path("gs://bucket/evaluated")
  )
  assert json.loads(bucket.read("evaluated/eval.json"))["eval"] == result["eval"]
  assert b"class" in bucket.read("evaluated/per_class.csv")


@SLOW
def test_a_batch_that_is_not_finite_is_uploaded(bucket, monkeypatch):
  from tests.run.test_robustness import inject_nan

  inject_nan(monkeypatch, "loss", [1, 2, 3, 4, 5])
  with pytest.raises(UserError, match="gs://bucket/bad/bad_batch_6.npz"):
    train.run(_config(total_steps=8), storage.path("gs://bucket/bad"))
  storage.push()
  assert bucket.read("bad/bad_batch_6.npz")[:2] == b"PK"


@SLOW
def test_a_save_that_fails_is_repeated(bucket, run, monkeypatch, caplog):
  from gcsfs.retry import HttpError

  original, left = files.write_json, [HttpError({"code": 503, "message": "away"})]

  def write(path, value):
    if left and path.name == checkpoint.DIGEST and "/2/" in str(path):
      raise left.pop()
    original(path, value)

  monkeypatch.setattr(files, "write_json", write)
  train.run(_config(**{"eval.every_steps": 2}), storage.path("gs://bucket/repeat"))
  assert "it will be tried again" in caplog.text and not left
  assert _rows(bucket, "repeat") == _rows(bucket, "whole")
  left.append(HttpError({"code": 403, "message": "no longer allowed"}))
  with pytest.raises(UserError, match="no longer allowed"):
    train.run(_config(), storage.path("gs://bucket/forbidden"))


# Several processes.


@SLOW
def test_two_processes_and_one_write_and_read_the_same(bucket, tmp_path):
  """Two processes x 4 devices, then one with 8, then two again: losses equal those of one on disk, to 1e-6."""
  from tests.runtime import test_distributed as several

  (tmp_path / "config.py").write_text(several.CONFIG)
  env = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}

  def go(workdir, count, steps):
    command = ["-m", "beit_jax.main", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    # A constant rate, or the length of the run would change it.
    command += [f"--config.total_steps={steps}", "--config.optimizer.min_lr=0.001"]
    devices = {"JAX_NUM_CPU_DEVICES": str(8 // count)}
    results = several._start(command, range(count), count, timeout=400, env=env | devices)
    assert [status for status, _ in results] == [0] * count, results

  go(tmp_path / "whole", 1, 10)
  for count, steps in ((2, 4), (1, 7), (2, 10)):
    go("gs://bucket/several", count, steps)
  rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
  found = _rows(bucket, "several")
  losses = [[row["loss"] for row in some if "loss" in row] for some in (rows, found)]
  assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[1]) == 10


# The lock.


def _foreign(bucket, name):
  text = json.dumps(dict(host="elsewhere", pid=77, started="today", command="train", machine="another"))
  bucket.write(f"{name}/lock.json", text.encode())


def test_an_expired_lease_is_taken_over(bucket, monkeypatch, caplog):
  monkeypatch.setattr(lock, "LEASE", 3.0)
  monkeypatch.setattr(lock, "RENEW_INTERVAL", 0.1)
  _foreign(bucket, "stale")
  workdir = storage.path("gs://bucket/stale")
  assert lock.held(workdir)
  with lock.exclusive_lock(workdir):
    assert "process 77 on elsewhere ended without releasing its lock" in caplog.text
    first = bucket.objects["stale/lock.json"][1]
    assert lock.holder(workdir)["pid"] == os.getpid() and lock.held(workdir)
    with pytest.raises(UserError, match=f"another run writes here: process {os.getpid()}"):
      train.run(_config(), workdir)
    deadline = time.monotonic() + 20
    while bucket.objects["stale/lock.json"][1] == first:
      assert time.monotonic() < deadline
      time.sleep(0.01)
  assert not bucket.names("stale/") and not lock.held(workdir)


def test_a_renewed_lease_is_respected(bucket, monkeypatch):
  monkeypatch.setattr(lock, "LEASE", 2.0)
  monkeypatch.setattr(lock, "RENEW_INTERVAL", 0.1)
  _foreign(bucket, "living")
  over = threading.Event()

  def live():
    while not over.wait(0.5):
      _foreign(bucket, "living")

  thread = threading.Thread(target=live)
  thread.start()
  try:
    with pytest.raises(UserError, match="process 77 on elsewhere"):
      train.run(_config(), storage.path("gs://bucket/living"))
  finally:
    over.set()
    thread.join()
  assert json.loads(bucket.read("living/lock.json"))["pid"] == 77


@pytest.mark.parametrize("killed", [False, True])
def test_a_process_that_is_replaced_has_time_to_end(killed, bucket, monkeypatch):
  """The holder renews its lease once and then ends, regularly or by a kill: the replacement waits and starts."""
  monkeypatch.setattr(lock, "LEASE", 2.0)
  monkeypatch.setattr(lock, "RENEW_INTERVAL", 0.1)
  _foreign(bucket, "replaced")
  workdir = storage.path("gs://bucket/replaced")
  timers = [threading.Timer(0.5, _foreign, (bucket, "replaced"))]
  if not killed:
    timers.append(
      threading.Timer(1.0, lambda: storage.delete(workdir / lock.LOCK, storage.read(workdir / lock.LOCK)[1]))
    )
  for timer in timers:
    timer.start()
  with lock.exclusive_lock(workdir):
    assert lock.holder(workdir)["pid"] == os.getpid()
  for timer in timers:
    timer.join()


def test_everything_is_uploaded_before_the_lock_is_released(bucket, monkeypatch):
  """Another run may start at once."""
  workdir = storage.path("gs://bucket/ending")
  seen = []
  monkeypatch.setattr(
    storage, "delete", lambda path, generation: seen.append(bucket.read("ending/metrics.jsonl"))
  )
  with lock.exclusive_lock(workdir):
    storage.local(workdir / "metrics.jsonl").write_text("the last line")
  assert seen == [b"the last line"]


def test_a_process_that_has_lost_its_lease_exits(bucket, tmp_path):
  script = (
    "import sys, time\nfrom beit_jax.runtime import bucket as storage, lock, logs\n"
    "lock.RENEW_INTERVAL = 0.2\nlogs.setup()\n"
    "with lock.exclusive_lock(storage.path('gs://bucket/lost')):\n  print('held', flush=True)\n  time.sleep(600)\n"
  )
  command = [sys.executable, "-c", script]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
  assert process.stdout.readline() == "held\n"
  _foreign(bucket, "lost")
  _, error = process.communicate(timeout=60)
  assert process.returncode == 75 and "taken over by process 77" in error
  assert json.loads(bucket.read("lost/lock.json"))["pid"] == 77


# Mistakes.


@pytest.mark.parametrize(
  "flags, facts",
  [
    (("--workdir=gs://other/run",), ("gs://other: there is no such bucket",)),
    (("--workdir=gs://bucket",), ("gs://bucket: expected gs://BUCKET/FOLDER",)),
    (("--workdir=s3://bucket/run",), ("s3://bucket/run", "s3:// is not supported")),
    (("--config.data.data_dir=gs://bucket/data",), ("'data.data_dir'", "gcsfuse BUCKET", "--bucket")),
    (("--config.init_from=gs://other/run",), ("gs://other: there is no such bucket",)),
  ],
)
def test_a_mistake_is_one_clear_error(bucket, flags, facts, capsys, tmp_path):
  from beit_jax import main

  if not flags[0].startswith("--workdir"):
    flags += (f"--workdir={tmp_path}/run",)
  assert main.main([f"--config={ROOT}/tests/kills_config.py", *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("error: ") == 1 and all(fact in error for fact in facts), error


def test_missing_access_is_named(bucket, monkeypatch):
  storage._bucket.cache_clear()
  monkeypatch.setattr(
    bucket, "refuse", lambda method, path: 403 if path.startswith("/storage/v1/b/bucket?") else 0
  )
  with pytest.raises(UserError, match="access is denied .*Storage Legacy Bucket Reader"):
    storage.path("gs://bucket/run")
  monkeypatch.setattr(bucket, "refuse", lambda method, path: 403 if method == "POST" else 0)
  with pytest.raises(UserError, match="nothing can be written there .*Storage Object User"):
    storage.check_writable(storage.path("gs://bucket/run"))


def test_missing_credentials_are_named(bucket):
  env = {key: value for key, value in os.environ.items() if key not in bucket.environment} | OFFLINE
  env.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
  script = "from beit_jax import main; import sys; sys.exit(main.main(sys.argv[1:]))"
  command = [
    sys.executable,
    "-c",
    script,
    f"--config={ROOT}/tests/kills_config.py",
    "--workdir=gs://bucket/run",
  ]
  found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
  assert found.returncode == 2 and found.stderr.count("error: ") == 1, found.stderr
  assert "no usable credentials" in found.stderr and "gcloud auth application-default login" in found.stderr


@pytest.mark.parametrize("package", ["gcsfs", "google.cloud.storage"])
def test_missing_packages_are_named(package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.delattr("google.cloud.storage")
  storage._bucket.cache_clear()
  with pytest.raises(
    UserError, match=r"gcsfs and google-cloud-storage are needed .*; pip install -e '.\[gcs\]'"
  ):
    storage.path("gs://bucket/run")


# Stopped and resumed.


def _start(folder):
  """A run of tests/kills_config.py, 30 steps, a checkpoint every 5."""
  env = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    SLOW_SAVE: "0.1",
    kills.MARK: "cloud",
  }
  env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
  env |= {"XLA_FLAGS": ""}
  command = [
    sys.executable,
    "-m",
    "beit_jax.main",
    f"--config={ROOT}/tests/kills_config.py",
    f"--workdir={folder}",
  ]
  command += ["--config.total_steps=30", "--config.checkpoint.every_steps=5", "--config.eval.every_steps=15"]
  with Path(os.environ["CLOUD_OUTPUT"]).open("a") as output:
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)


def _until(process, reached):
  deadline = time.monotonic() + 300
  while not reached():
    assert process.poll() is None, Path(os.environ["CLOUD_OUTPUT"]).read_text()[-2000:]
    assert time.monotonic() < deadline
    time.sleep(0.005)


def _stop_and_kill(bucket, tmp_path, monkeypatch):
  """After SIGTERM, and SIGKILL in a step and in a save, the run equals an uninterrupted one on disk, to the bit."""
  monkeypatch.setenv("CLOUD_OUTPUT", str(tmp_path / "output.txt"))
  assert _start(tmp_path / "whole").wait(300) == 0

  def steps(suffix=""):
    names = bucket.names("stopped/checkpoints/")
    return {int(name.split("/")[2]) for name in names if name.endswith(suffix)}

  def sealed():
    return steps("digest.json")

  process = _start("gs://bucket/stopped")
  _until(process, lambda: max(sealed(), default=0) >= 5)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143
  first = max(sealed())
  assert max(row["step"] for row in _rows(bucket, "stopped")) == first < 30
  assert "stopped by SIGTERM" in bucket.read("stopped/log.txt").decode() and not bucket.read(
    "stopped/lock.json"
  )

  process = _start("gs://bucket/stopped")
  _until(process, lambda: steps() - sealed() and max(steps()) > first)
  process.kill()  # in a save
  process.wait()
  left = max(sealed())
  assert left < max(steps()) and bucket.read("stopped/lock.json")

  process = _start("gs://bucket/stopped")
  _until(process, lambda: max(sealed()) > left)
  process.kill()
  process.wait()

  assert _start("gs://bucket/stopped").wait(300) == 0, (tmp_path / "output.txt").read_text()[-2000:]
  assert bucket.names("stopped/damaged/") and not kills.left_behind("cloud")
  kills.compare(tmp_path / "whole", _copy(bucket, "stopped", tmp_path / "copy"), exact=True)


@SLOW
def test_stopped_and_killed_and_resumed_exactly(bucket, tmp_path, monkeypatch):
  _stop_and_kill(bucket, tmp_path, monkeypatch)
  assert checkpoint.fault(storage.path("gs://bucket/stopped/checkpoints/30")) is None


class FakeGcsServer:
  """A context manager that runs the emulator fake-gcs-server, which others wrote and test, with one bucket."""

  def __init__(self, program, output):
    self.url, self._output = f"http://127.0.0.1:{kills.free_port()}", output
    port = self.url.rpartition(":")[2]
    flags = ("-scheme=http", "-host=127.0.0.1", f"-public-host=127.0.0.1:{port}", f"-external-url={self.url}")
    self._command = [program, "-backend=memory", f"-port={port}", *flags]

  def __enter__(self):
    with self._output.open("w") as output:
      self._process = subprocess.Popen(self._command, stdout=output, stderr=output)
    deadline = time.monotonic() + 20
    while True:
      try:
        self._request("b", data=b'{"name": "bucket"}')
        return self
      except OSError:
        assert time.monotonic() < deadline, self._output.read_text()
        time.sleep(0.1)

  def __exit__(self, *_):
    self._process.terminate()
    self._process.wait()

  def _request(self, path, data=None):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{self.url}/storage/v1/{path}", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
      return answer.read()

  def names(self, prefix=""):
    listing = json.loads(self._request(f"b/bucket/o?prefix={urllib.parse.quote(prefix, safe='')}"))
    return sorted(item["name"] for item in listing.get("items", []))

  def read(self, name):
    try:
      return self._request(f"b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media")
    except urllib.error.HTTPError as error:
      assert error.code == 404
      return None


@SLOW
@pytest.mark.skipif(
  "BEIT_JAX_TEST_FAKE_GCS" not in os.environ, reason="set it to the path of a fake-gcs-server"
)
def test_stopped_and_killed_and_resumed_in_fake_gcs_server(tmp_path, monkeypatch):
  with FakeGcsServer(os.environ["BEIT_JAX_TEST_FAKE_GCS"], tmp_path / "server.txt") as served:
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
      monkeypatch.setenv(name, served.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    _stop_and_kill(served, tmp_path, monkeypatch)
