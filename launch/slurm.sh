#!/usr/bin/env bash
# Slurm: submits a job of one process per node, which goes on by itself after the time limit or a preemption, and when a
# process was killed. `scancel JOB` ends it.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 [--partition=P] -- --config=configs/beit_base.py --workdir=/shared/run
#
# --nodes=1 --gpus=8 (per node; also TYPE:N, 0 for none) --time=24:00:00 --cpus=16 (per node) --mem=0 (per node; 0: all)
# --name=beit_jax --partition=P --account=A --qos=Q --constraint=C   as in sbatch
# --setup='module load cuda'   a line to run before the training      --python=python   as seen on the nodes
# --warning=120   seconds before the time limit in which the run saves; the job is then queued again
# --print         shows the batch script            --dry-run   shows the command
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
needs_config

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
cd $(quote "$ROOT") || exit 1
${flags[setup]:-:}
# The warning before the time limit is USR1, to this shell alone (B:). srun would kill its tasks on it, so scancel passes it
# on to them, once: at a second signal they leave without saving. TERM is scancel or a preemption; either tells the tasks
# itself, and after a preemption Slurm queues the job again.
first= caught=
heard() {
  caught=1
  [ -z "\$first" ] || return 0
  first=\$1
  [ "\$1" = TERM ] || scancel --signal=TERM "\$SLURM_JOB_ID"
}
trap 'heard USR1' USR1
trap 'heard TERM' TERM
# When one process ends, the others end by themselves, with the status of the one that failed; srun's own kill would come
# first and hide it. --wait (seconds after the first end) is for those that hang.
srun --ntasks-per-node=1 --cpus-per-task=${flags[cpus]} --kill-on-bad-exit=0 --wait=600 $(quote "${flags[python]}" -m beit_jax.main "${rest[@]}") &
child=\$!
caught=1
while [ -n "\$caught" ]; do # every signal interrupts the wait
  caught=
  wait "\$child"
  status=\$?
done
case "\$first:\$status" in
  TERM:* | *:0 | :1 | :2) ;; # told to end; done; a failure or a mistake of the run itself
  USR1:*) scontrol requeue "\$SLURM_JOB_ID" ;;
  *) # 143: the TERM of a preemption reached the tasks only; 75: another process died; 137: killed
    if [ "\${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then # of any kind, the time limit's too
      scontrol requeue "\$SLURM_JOB_ID"
    else
      echo "error: status \$status after \$SLURM_RESTART_COUNT restarts; not queued again: see the lines above" >&2
    fi
    ;;
esac
exit "\$status"
BODY
}

if [[ ${flags[print]} == yes ]]; then
  script
elif [[ ${flags[dry-run]} == yes ]]; then
  for i in "${!given[@]}"; do # up to the first --, --dry-run becomes --print
    [[ ${given[i]} == -- ]] && break
    [[ ${given[i]} == --dry-run ]] && given[i]=--print
  done
  echo "$(quote "$ROOT/launch/slurm.sh" "${given[@]}") | sbatch"
else
  script | sbatch
fi
