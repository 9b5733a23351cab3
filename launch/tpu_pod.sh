#!/usr/bin/env bash
# A Cloud TPU slice: creates it, installs the committed code on every worker, trains, and resumes after preemptions.
#
#   launch/tpu_pod.sh create  --name=pod --zone=us-west4-a --type=v5litepod-64 [--spot] [--queued]
#   launch/tpu_pod.sh install --name=pod --zone=us-west4-a --bucket=my-bucket
#   launch/tpu_pod.sh run     --name=pod --zone=us-west4-a --bucket=my-bucket -- --config=configs/beit_base.py \
#     --workdir=gs://my-bucket/base --config.pretrain.data.data_dir=/mnt/bucket/tfds
#   launch/tpu_pod.sh tail|status|stop|delete --name=pod --zone=us-west4-a
#   launch/tpu_pod.sh babysit --name=pod --zone=us-west4-a --type=... [all flags of the above] -- [flags of run]
#
# --type: v2-N v3-N v4-N v5litepod-N v5p-N v6e-N     --version: runtime version (default: depends on the type)
# --project: default: that of gcloud                 --spot: cheaper, may be preempted at any time
# --queued: create requests a queued resource of the same name and waits for it
# --bucket: a Cloud Storage bucket, mounted at /mnt/bucket on every worker, for data. The workdir, which all workers must
#   see, may be there too, or be gs://BUCKET/RUN, which needs no mount
# --worker=0: the worker whose log tail shows        --poll=60: seconds between two checks of babysit
# --dry-run: prints the commands
#
# run: every worker trains detached from the terminal, logs to ~/run.log, and writes its exit status to ~/run.status.
# stop: the run saves and ends. babysit: repeats whatever step is needed until the run ends with status 0 or 2 (a mistake),
# or fails too often right after its start; interrupt babysit before stop. The slice stays until delete.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:---help}
if (($#)); then shift; fi
flags+=([name]='' [zone]='' [project]='' [type]='' [version]='' [bucket]='' [worker]=0 [poll]=60 [spot]=no [queued]=no)
[[ $action != --help ]] || set -- --help
parse "$@"
check name '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' "lower-case letters, digits and dashes, beginning with a letter"
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-central2-b"
check project '[a-z][-a-z0-9:.]+' "optional, a project's id"
check version '[A-Za-z0-9._-]+' "optional, a runtime version"
check bucket '[a-z0-9][a-z0-9._-]*' "optional, a bucket's name, without gs://"
check worker '[0-9]+|all' "a number, or all"
check poll '[0-9]+' "a number of seconds"
name=${flags[name]}
where=("--zone=${flags[zone]}")
[[ -z ${flags[project]} ]] || where+=("--project=${flags[project]}")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

check_type() {
  check type '[a-z0-9]+-[0-9]+' "an accelerator type such as v5litepod-64"
  case ${flags[type]} in
    v2-* | v3-* | v4-*) version='tpu-ubuntu2204-base' ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die "--type=${flags[type]}: must be one of v2-N v3-N v4-N v5litepod-N v5p-N v6e-N (for newer types: launch/gke/gke.sh)" ;;
  esac
  version=${flags[version]:-$version}
}

state() { run "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)'; }
requested() { run "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'; }

# ask state|requested: the state that gcloud reports. MISSING only if gcloud reports that there is none; UNKNOWN if it does
# not answer, for example without a network.
ask() {
  local errors answer
  errors=$(mktemp)
  if answer=$("$1" 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -q -e NOT_FOUND -e 'was not found' "$errors"; then
    echo MISSING
  else
    tail -n 3 "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

on() { run "${tpu[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

create() {
  local spot=()
  [[ ${flags[spot]} == no ]] || spot=(--spot)
  if [[ ${flags[queued]} == yes ]]; then
    run "${queue[@]}" create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=${flags[type]}" \
      "--runtime-version=$version" "${spot[@]}" || return
    [[ ${flags[dry-run]} == yes ]] || wait_granted
  else
    run "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=${flags[type]}" "--version=$version" "${spot[@]}"
  fi
}

# Waits until the queued resource is granted; fails when the request has failed.
wait_granted() {
  local request before=''
  until [[ $(ask state 2>/dev/null) == READY ]]; do
    request=$(ask requested)
    case $request in
      FAILED | SUSPENDED)
        echo "error: the queued resource $name is $request; delete it ($0 delete --queued ...) and create it again" >&2
        return 1
        ;;
    esac
    [[ $request == "$before" ]] || echo "$(date +%T) the queued resource $name is $request"
    before=$request
    sleep "${flags[poll]}"
  done
}

delete() {
  if [[ ${flags[queued]} == yes ]]; then
    run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
  fi
}

# The Python of the images is too old, so uv installs another one.
install() {
  local archive=/tmp/beit_jax-$name.tgz
  local script='set -e; mkdir -p beit_jax; tar -xzf beit_jax.tgz -C beit_jax; python3 -m pip install --quiet --user uv; '
  script+='python3 -m uv venv --quiet --python 3.12 --allow-existing venv; '
  script+='python3 -m uv pip install --quiet --python venv/bin/python -e "./beit_jax[tpu,gcs]"'
  if [[ -n ${flags[bucket]} ]]; then
    local apt=https://packages.cloud.google.com/apt
    script+="; echo \"deb $apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list; "
    script+="curl -fsS $apt/doc/apt-key.gpg | sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc >/dev/null; "
    script+='sudo apt-get update -qq; sudo apt-get install -qq -y gcsfuse; sudo mkdir -p /mnt/bucket; '
    script+="sudo chown \"\$(id -un)\" /mnt/bucket"
  fi
  run git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD &&
    run "${tpu[@]}" scp "$archive" "$name:beit_jax.tgz" "${where[@]}" --worker=all &&
    on all "$script"
}

# The command passes through gcloud's ssh, the login shell there and a detached bash, and is quoted once for each.
train() {
  local inner mount='' bucket=${flags[bucket]}
  [[ -z $bucket ]] ||
    mount="{ mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs --rename-dir-limit=10000 $bucket /mnt/bucket; } && "
  inner="trap : TERM; ../venv/bin/python -m beit_jax.main $(quote "${rest[@]}") >>../run.log 2>&1; echo \$? >../run.status"
  on all "cd beit_jax && if kill -0 \"\$(cat ../run.pid 2>/dev/null)\" 2>/dev/null; then echo 'a run is alive here' >&2; \
exit 1; fi && ${mount}rm -f ../run.status && { setsid nohup bash -c $(quote "$inner") </dev/null >/dev/null 2>&1 & echo \$! >../run.pid; }"
}

alive="if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then echo running; else cat run.status 2>/dev/null || echo none; fi"
stop() { on all "kill -$1 -- \"-\$(cat run.pid 2>/dev/null)\" 2>/dev/null || echo 'nothing runs here'"; }

# The repairs of babysit. Each may fail, and the next check then finds what remains to be done. They use && because
# `set -e` has no effect in a command before `||`.
recreate() { delete && create && install && train; }
reinstall() { stop KILL && install && train; } # worker 0 was recreated or rebooted; others may still run
obtain() {
  local request=MISSING
  [[ ${flags[queued]} == no ]] || request=$(ask requested)
  case $request in
    UNKNOWN) return 1 ;;
    MISSING) create && install && train ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) wait_granted && install && train ;;
    *) recreate ;; # the slice of the request is gone, or the request has failed
  esac
}

early=$((600 + 10#${flags[poll]})) # a run that fails within so many seconds of a restart has made no progress
max_restarts=5                     # of such runs in a row: a bug must not keep a slice busy, which costs money
restarts=0 started=''              # started: $SECONDS at the last restart

restart() {
  [[ -n $started ]] && ((SECONDS - started <= early)) || restarts=0
  ((restarts < max_restarts)) || die "the run failed with status $1 within 10 minutes of each of its last \
$restarts restarts: see $0 tail --name=$name ${where[*]}; the slice still exists, and costs money until it is deleted"
  stop KILL && train || return
  restarts=$((restarts + 1)) started=$SECONDS
}

babysit() {
  local now status repair
  while :; do
    now=$(ask state)
    status='' repair=''
    case $now in
      READY) status=$(on 0 "$alive") || status=unreachable ;;
      PREEMPTED | TERMINATED | STOPPED) repair=recreate ;;
      MISSING) repair=obtain ;;
    esac
    echo "$(date +%T) $name $now $status"
    case $status in
      0) return 0 ;;
      2) die "the run reported a mistake in its command, config or data: see $0 tail --name=$name ${where[*]}" ;;
      none) repair=reinstall ;;
      '' | running | unreachable) ;;
      *) repair=restart ;; # this process failed, or another one of the run
    esac
    if [[ -n $repair ]]; then
      [[ $repair == restart ]] || restarts=0
      "$repair" "$status" || echo "$(date +%T) $name a repair failed; next check in ${flags[poll]} s" >&2
    fi
    sleep "${flags[poll]}"
  done
}

case $action in
  create) check_type && create ;;
  install) install ;;
  run) require_config && train ;;
  tail) on "${flags[worker]}" 'tail -n 100 -F run.log' ;;
  status) state && on all "$alive" ;;
  stop) stop TERM ;;
  delete) delete ;;
  babysit)
    check_type && require_config
    if [[ ${flags[dry-run]} == yes ]]; then # the commands after a preemption
      state && delete && create && install && train && state && on 0 "$alive"
    else
      babysit
    fi
    ;;
  *) die "unknown command '$action': create, install, run, tail, status, stop, babysit or delete; see --help" ;;
esac
