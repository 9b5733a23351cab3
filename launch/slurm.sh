#!/usr/bin/env bash
# Slurm: submits a job of one process per node. The job resumes by itself after the time limit, after a preemption, and
# when a process was killed. `scancel JOB` ends it.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 [--partition=P] -- --config=configs/beit_base.py --workdir=/shared/run
#
# --nodes=1 --gpus=8 (per node; also TYPE:N, 0 for none) --time=24:00:00 --cpus=16 (per node) --mem=0 (per node; 0: all)
# --name=beit_jax --partition=P --account=A --qos=Q --constraint=C   as in sbatch
# --setup='module load cuda'   a line to run before the training      --python=python   path on the nodes
# --warning=120   how many seconds before the time limit the run saves; the job is then queued again, also if the run
#                 has not finished saving by then. At most half of --time.
# --print         prints the batch script           --dry-run   prints the command
#
# The repository and the workdir must be on a file system that all nodes share.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags+=([nodes]=1 [gpus]=8 [time]=24:00:00 [cpus]=16 [mem]=0 [name]=beit_jax [partition]='' [account]='' [qos]=''
  [constraint]='' [setup]='' [python]=python [warning]=120 [print]=no)
given=("$@")
parse "$@"
word='[A-Za-z0-9_][A-Za-z0-9_.,:|&-]*'
check nodes '[1-9][0-9]*' "a number of nodes"
check gpus '([A-Za-z0-9_.-]+:)?[0-9]+' "a number of GPUs per node such as 8 or a100:8"
check time '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' "a time such as 90 (minutes), 24:00:00 or 2-12:00:00"
check cpus '[1-9][0-9]*' "a number of CPU cores"
check mem '[0-9]+[KMGT]?' "an amount of memory such as 200G"
check name '[A-Za-z0-9_.-]+' "letters, digits, and _.-"
check warning '[1-9][0-9]*' "a number of seconds"
for name in partition account qos constraint; do check "$name" "$word" "optional, a name"; done
require_config

# The seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.
seconds() {
  local days=0 parts
  [[ $1 == *-* ]] && days=${1%%-*}
  IFS=: read -ra parts <<<"${1#*-}"
  [[ $1 == *-* || ${#parts[@]} == 3 ]] || parts=(0 "${parts[@]}")
  echo $((((10#$days * 24 + 10#${parts[0]}) * 60 + 10#${parts[1]:-0}) * 60 + 10#${parts[2]:-0}))
}
limit=$(seconds "${flags[time]}")
((limit == 0 || flags[warning] * 2 <= limit)) || # 0: no limit
  die "--warning=${flags[warning]}: more than half of --time=${flags[time]} ($limit s); the run would hardly train"

workdir=runs # the default of beit_jax.main
for i in "${!rest[@]}"; do
  [[ ${rest[i]} == --workdir=* ]] && workdir=${rest[i]#*=}
  [[ ${rest[i]} == --workdir ]] && workdir=${rest[i + 1]-}
done
workdir=${workdir/#\~\//$HOME/}
max_fruitless=3
[[ $workdir == *://* ]] && max_fruitless=20 # the checkpoints in a bucket are not seen from here

script() {
  cat <<HEAD
#!/usr/bin/env bash
#SBATCH --job-name=${flags[name]}
#SBATCH --nodes=${flags[nodes]}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=${flags[cpus]}
#SBATCH --mem=${flags[mem]}
#SBATCH --time=${flags[time]}
#SBATCH --signal=B:USR1@${flags[warning]}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=${flags[name]}-%j.log
HEAD
  [[ ${flags[gpus]} == 0 ]] || echo "#SBATCH --gpus-per-node=${flags[gpus]}"
  for name in partition account qos constraint; do
    [[ -z ${flags[$name]} ]] || echo "#SBATCH --$name=${flags[$name]}"
  done
  cat <<BODY
set -u
# Holds how many starts in a row have completed no checkpoint; its modification time is the time of this start.
starts=\$PWD/${flags[name]}-\$SLURM_JOB_ID.starts
cd $(quote "$ROOT") || exit 1
gained() { [ -n "\$(find $(quote "$workdir") -name digest.json -newer "\$starts" -print -quit 2>/dev/null)" ]; }
fruitless=0
[ ! -f "\$starts" ] || gained || fruitless=\$(cat "\$starts")
echo "\$((fruitless += 1))" >"\$starts"
requeue() {
  if gained || [ "\$fruitless" -lt $max_fruitless ]; then
    scontrol requeue "\$SLURM_JOB_ID"
  else
    echo "error: \$1; \$fruitless starts in a row have completed no checkpoint; not queued again; see the lines above" >&2
  fi
}
${flags[setup]:-:}
# Before the time limit Slurm sends USR1 to this shell only (B:). srun would kill its tasks on USR1, so scancel sends them
# TERM instead, once: at a second signal they exit without saving. TERM comes from scancel or a preemption; both also signal
# the tasks, and after a preemption Slurm queues the job again. A run that has not ended shortly before the time limit is
# still saving, compiling or evaluating: the job is queued again then, which ends the run, since after the limit it would be
# too late.
first= caught= timer=
out_of_time() {
  sleep $((flags[warning] - (flags[warning] < 120 ? flags[warning] / 4 : 30)))
  echo "warning: the run did not end within --warning=${flags[warning]} seconds; raise --warning" >&2
  requeue "no time was left"
}
on_signal() {
  caught=1
  [ -z "\$first" ] || return 0
  first=\$1
  [ "\$1" = USR1 ] || return 0
  scancel --signal=TERM "\$SLURM_JOB_ID"
  out_of_time &
  timer=\$!
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
# When one process ends, the others end by themselves, with the status of the one that failed. srun must not kill them
# earlier, which would hide that status. --wait (seconds after the first end) is for processes that hang.
srun --ntasks-per-node=1 --cpus-per-task=${flags[cpus]} --kill-on-bad-exit=0 --wait=600 $(quote "${flags[python]}" -m beit_jax.main "${rest[@]}") &
child=\$!
caught=1
while [ -n "\$caught" ]; do # a signal interrupts the wait
  caught=
  wait "\$child"
  status=\$?
done
[ -z "\$timer" ] || kill "\$timer" 2>/dev/null
[ "\$status" != 0 ] || rm -f "\$starts"
case "\$first:\$status" in
  TERM:* | *:0 | :1 | :2) ;; # stopped from outside; finished; an error or a mistake of the run itself
  *) requeue "status \$status" ;; # 143: a signal; 75: another process died; 137: killed
esac
exit "\$status"
BODY
}

if [[ ${flags[print]} == yes ]]; then
  script
elif [[ ${flags[dry-run]} == yes ]]; then
  for i in "${!given[@]}"; do # replaces --dry-run before the first -- by --print
    [[ ${given[i]} == -- ]] && break
    [[ ${given[i]} == --dry-run ]] && given[i]=--print
  done
  echo "$(quote "$ROOT/launch/slurm.sh" "${given[@]}") | sbatch"
else
  script | sbatch
fi
