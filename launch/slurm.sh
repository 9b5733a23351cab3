#!/usr/bin/env bash
# Slurm: submits a job of one process per node, which goes on by itself after the time limit or a preemption.
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
#SBATCH --signal=B:TERM@${flags[warning]}
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
# The warning before the time limit comes here (B:). srun would kill its tasks on it, so scancel passes it on to them.
asked=
trap 'asked=1; scancel --signal=TERM "\$SLURM_JOB_ID"' TERM
srun --ntasks-per-node=1 --cpus-per-task=${flags[cpus]} --kill-on-bad-exit=1 $(quote "${flags[python]}" -m beit_jax.main "${rest[@]}") &
child=\$!
wait "\$child"
status=\$?
if [ -n "\$asked" ]; then # the signal interrupted the wait
  wait "\$child"
  status=\$?
fi
if [ -n "\$asked" ] && [ "\$status" -ne 0 ]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
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
