#!/usr/bin/env bash
# A Cloud TPU slice: makes it, installs the committed code on every worker, trains, and goes on after preemptions.
#
#   launch/tpu_pod.sh create  --name=pod --zone=us-west4-a --type=v5litepod-64 [--spot] [--queued]
#   launch/tpu_pod.sh install --name=pod --zone=us-west4-a --bucket=my-bucket
#   launch/tpu_pod.sh run     --name=pod --zone=us-west4-a --bucket=my-bucket -- --config=configs/beit_base.py \
#     --workdir=gs://my-bucket/base --config.pretrain.data.data_dir=/mnt/bucket/tfds
#   launch/tpu_pod.sh tail|status|stop|delete --name=pod --zone=us-west4-a
#   launch/tpu_pod.sh babysit --name=pod --zone=us-west4-a --type=... [all flags of the above] -- [flags of run]
#
# --type: v2-N v3-N v4-N v5litepod-N v5p-N v6e-N     --version: of the runtime; that of the type if not given
# --project: gcloud's own if not given               --spot: cheap, and taken away at any time
# --queued: create asks for a queued resource of the same name and waits
# --bucket: a Cloud Storage bucket, mounted at /mnt/bucket on every worker, for data; the workdir, which all workers
#   need to see, may be there too, or be gs://BUCKET/RUN, which needs no mount
# --worker=0: which worker's log tail shows          --poll=60: seconds between two looks of babysit
# --dry-run: shows the commands
#
# run: every worker trains detached and writes ~/run.log; the exit status ends up in ~/run.status. stop: asks it to save
# and end. babysit: does whatever is missing, again and again, until the run has ended with status 0, or 2 (a mistake), or
# has failed at once too often; end it before stop. The slice stays until delete.
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
    *) die "--type=${flags[type]}: there are v2-N v3-N v4-N v5litepod-N v5p-N v6e-N (newer ones: launch/gke/gke.sh)" ;;
  esac
  version=${flags[version]:-$version}
}

state() { run "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)'; }
requested() { run "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'; }

# ask state|requested: what gcloud says; MISSING only if it says that there is none; else, as without network, UNKNOWN.
ask() {
  local errors said
  errors=$(mktemp)
  if said=$("$1" 2>"$errors"); then
    echo "${said:-UNKNOWN}"
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
    [[ ${flags[dry-run]} == yes ]] || granted
  else
    run "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=${flags[type]}" "--version=$version" "${spot[@]}"
  fi
}

# Waits until the queued resource is there; fails when it never will be.
granted() {
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

# The images' Python is too old, so uv brings one.
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

# The command crosses gcloud's ssh, the login shell there and a detached bash: quoted once for each.
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

# What babysit does. Each may fail (`set -e` does not count below `||`, hence the &&); the next look finds what is left.
again() { delete && create && install && train; }
bare() { stop KILL && install && train; } # worker 0 was made anew or rebooted; others may still run
missing() {
  local request=MISSING
  [[ ${flags[queued]} == no ]] || request=$(ask requested)
  case $request in
    UNKNOWN) return 1 ;;
    MISSING) create && install && train ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) granted && install && train ;;
    *) again ;; # the request has outlived its slice, or came to nothing
  esac
}

soon=$((600 + 10#${flags[poll]})) # seconds from a restart to a look that finds it failed: it got nowhere
most_restarts=5                   # of such runs in a row: a bug would keep a slice that costs busy for ever
restarts=0 started=''             # the latter: $SECONDS at the last restart

restart() {
  [[ -n $started ]] && ((SECONDS - started <= soon)) || restarts=0
  ((restarts < most_restarts)) || die "the run failed with status $1 within 10 minutes of each of its last \
$restarts restarts: see $0 tail --name=$name ${where[*]}; the slice is still there, and costs until it is deleted"
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
      PREEMPTED | TERMINATED | STOPPED) repair=again ;;
      MISSING) repair=missing ;;
    esac
    echo "$(date +%T) $name $now $status"
    case $status in
      0) return 0 ;;
      2) die "the run ended with a mistake of its own: see $0 tail --name=$name ${where[*]}" ;;
      none) repair=bare ;;
      '' | running | unreachable) ;;
      *) repair=restart ;; # it failed, or another process of it did
    esac
    if [[ -n $repair ]]; then
      [[ $repair == restart ]] || restarts=0
      "$repair" "$status" || echo "$(date +%T) $name a repair failed; looking again in ${flags[poll]} s" >&2
    fi
    sleep "${flags[poll]}"
  done
}

case $action in
  create) check_type && create ;;
  install) install ;;
  run) needs_config && train ;;
  tail) on "${flags[worker]}" 'tail -n 100 -F run.log' ;;
  status) state && on all "$alive" ;;
  stop) stop TERM ;;
  delete) delete ;;
  babysit)
    check_type && needs_config
    if [[ ${flags[dry-run]} == yes ]]; then # what follows a preemption
      state && delete && create && install && train && state && on 0 "$alive"
    else
      babysit
    fi
    ;;
  *) die "unknown command '$action': create, install, run, tail, status, stop, babysit or delete; see --help" ;;
esac
