"""A network that vanishes without a word, between two network namespaces as hosts. Needs root and Linux:

BEIT_JAX_TEST_NETWORK=1 python -m pytest -n 0 -m slow tests/system/test_network_cut.py
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import kills
from tests.conftest import ROOT

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not os.environ.get("BEIT_JAX_TEST_NETWORK"), reason="set BEIT_JAX_TEST_NETWORK=1 as root"
  ),
]
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*arguments):
  subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts():
  """Names of two namespaces that are joined by a cable; in each, this machine's name has an address of its own."""
  names = [f"beit_jax_{os.getpid()}_{i}" for i in range(2)]
  files = [Path("/etc/netns") / name / "hosts" for name in names]
  try:
    for name, file, address in zip(names, files, ADDRESSES, strict=True):
      _ip("netns", "add", name)
      file.parent.mkdir(parents=True)
      file.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    _ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
    for i, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
      _ip("-n", name, "address", "add", f"{address}/24", "dev", f"v{i}")
      for device in ("lo", f"v{i}"):
        _ip("-n", name, "link", "set", device, "up")
    yield names
  finally:
    for name, file in zip(names, files, strict=True):
      subprocess.run(["ip", "netns", "delete", name])
      file.unlink(missing_ok=True)
      file.parent.rmdir()


def test_both_processes_name_the_lost_one(hosts, tmp_path):
  workdir, env = (
    tmp_path / "run",
    {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"},
  )
  started = []
  try:
    for i, host in enumerate(hosts):
      command = ["ip", "netns", "exec", host, sys.executable, "-m", "beit_jax.main", f"--workdir={workdir}"]
      command += [f"--config={ROOT}/tests/kills_config.py", "--config.data.workers=0", "--config.mesh.data=2"]
      command += [
        "--config.total_steps=100000",
        "--config.checkpoint.every_steps=1000",
        "--config.eval.split=",
      ]
      command += [
        "--config.checkpoint.best=",
        f"--coordinator={ADDRESSES[0]}:9731",
        "--num_processes=2",
        f"--process_id={i}",
      ]
      with (tmp_path / f"{i}.txt").open("w") as output:
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output))
    end = time.monotonic() + 300
    while kills.logged_steps(workdir) < 5:
      assert time.monotonic() < end and all(p.poll() is None for p in started), _outputs(tmp_path)
      time.sleep(0.1)
    for i, host in enumerate(hosts):  # packets go to a card that does not exist
      lost = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
      _ip("-n", host, "neighbor", "replace", ADDRESSES[1 - i], "dev", f"v{i}", *lost)
    began = time.monotonic()
    assert [process.wait(60) for process in started] == [75, 75], _outputs(tmp_path)
    print(f"ended after {time.monotonic() - began:.0f} s")
    for i in range(2):
      assert f"error: process {1 - i} (" in (tmp_path / f"{i}.txt").read_text(), _outputs(tmp_path)
  finally:
    for process in started:
      process.kill()
      process.wait()


def _outputs(folder):
  return "\n".join((folder / f"{i}.txt").read_text()[-3000:] for i in range(2))
