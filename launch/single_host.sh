#!/usr/bin/env bash
# One machine with any number of GPUs, or none: a single process uses all of them.
#
#   launch/single_host.sh [--gpus=0,1] [--python=PYTHON] [--dry-run] -- --config=configs/beit_base.py --workdir=runs/base
#
# Paths are relative to the repository. --gpus: the GPUs to use. XLA_PYTHON_CLIENT_MEM_FRACTION (default 0.92) is the
# fraction of GPU memory that JAX allocates at the start.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags+=([gpus]='' [python]=python)
# `--` may be omitted: everything from --config on is for beit_jax.main.
args=()
while (($#)) && [[ $1 != -- && $1 != --config* && $1 != --workdir* ]]; do args+=("$1") && shift; done
if (($#)) && [[ $1 == -- ]]; then shift; fi
parse "${args[@]}" -- "$@"
check gpus '[0-9]+(,[0-9]+)*' "optional, numbers of GPUs such as 0,1"
require_config

command=(env "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
if [[ -n ${flags[gpus]} ]]; then command+=("CUDA_VISIBLE_DEVICES=${flags[gpus]}"); fi
run cd "$ROOT"
run "${command[@]}" "${flags[python]}" -m beit_jax.main "${rest[@]}"
