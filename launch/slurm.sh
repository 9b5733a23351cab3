#!/usr/bin/env bash
# Slurm: submits a job of one process per node. The job resumes by itself after the time limit, after a preemption, and
# when a process was killed. `scancel JOB` ends it.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 [--partition=P] -- --config=configs/beit_base.py --workdir=/shared/run
#
# --nodes=1 --gpus=8 (per node; also TYPE:N, 0 for none) --time=24:00:00 --cpus=16 (per node) --mem=0 (per node; 0: all)
# --name=beit_jax --partition=P --account=A --qos=Q --constraint=C   as in sbatch
# --setup='module load cuda'   a line to run before the training      --python=python   path on the nodes
# --warning=120   how many seconds before the time limit the run saves; the job is then queued again
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
# Before the time limit Slurm sends USR1 to this shell only (B:). srun would kill its tasks on USR1, so scancel sends them
# TERM instead, once: at a second signal they exit without saving. TERM comes from scancel or a preemption; both also signal
# the tasks, and after a preemption Slurm queues the job again.
first= caught=
on_signal() {
  caught=1
  [ -z "\$first" ] || return 0
  first=\$1
  [ "\$1" = TERM ] || scancel --signal=TERM "\$SLURM_JOB_ID"
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
case "\$first:\$status" in
  TERM:* | *:0 | :1 | :2) ;; # stopped from outside; finished; an error or a mistake of the run itself
  USR1:*) scontrol requeue "\$SLURM_JOB_ID" ;;
  *) # 143: only the tasks got the TERM of a preemption; 75: another process died; 137: killed
    if [ "\${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then # counts restarts for any reason
      scontrol requeue "\$SLURM_JOB_ID"
    else
      echo "error: status \$status after \$SLURM_RESTART_COUNT restarts; not queued again; see the lines above" >&2
    fi
    ;;
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
