#!/usr/bin/env bash
# One machine with any number of GPUs (or none): sets memory behaviour, then runs beit_jax.main with your flags.
#   launch/single_host.sh --config=configs/beit_base.py --workdir=runs/beit_base
# `--dry-run` as the first flag prints the command instead of running it.
set -euo pipefail
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
command=(python -m beit_jax.main)
if [ "${1:-}" = "--dry-run" ]; then
  shift
  echo "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION ${command[*]} $*"
  exit 0
fi
exec "${command[@]}" "$@"
