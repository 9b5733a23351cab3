# shellcheck shell=bash
# Shared by the launch scripts: flags, quoting, --dry-run. Source this file; do not run it.
#
# A script adds its flags and their defaults to `flags` and calls `parse "$@"`. Arguments after `--` are for
# beit_jax.main; `parse` puts them into `rest`. A flag whose default is `no` takes no value.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi
# shellcheck disable=SC2034 # used by the scripts
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A flags=([dry-run]=no [help]=no)
rest=()

die() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"; }

parse() {
  local arg name
  while (($#)); do
    arg=$1 && shift
    case $arg in
      --)
        rest=("$@")
        break
        ;;
      --*) name=${arg%%=*} && name=${name#--} ;;
      *) die "unexpected argument '$arg'; flags for beit_jax.main come after --" ;;
    esac
    [[ -v "flags[$name]" ]] || die "unknown flag --$name; see --help (flags for beit_jax.main come after --)"
    if [[ ${flags[$name]} == no || ${flags[$name]} == yes ]]; then
      [[ $arg != *=* ]] || die "--$name takes no value"
      flags[$name]=yes
    elif [[ $arg == *=* ]]; then
      flags[$name]=${arg#*=}
      [[ -n ${flags[$name]} ]] || die "--$name needs a value"
    else
      (($#)) && [[ $1 != -* ]] || die "--$name needs a value"
      flags[$name]=$1 && shift
    fi
  done
  if [[ ${flags[help]} == yes ]]; then
    usage
    exit 0
  fi
}

# check FLAG REGEX WHAT: exits unless the flag is given and matches. It may be empty if WHAT begins with "optional".
check() {
  local value=${flags[$1]}
  [[ -z $value && $3 == optional* ]] && return
  [[ -n $value ]] || die "--$1 is missing: $3"
  [[ $value =~ ^($2)$ ]] || die "--$1=$value: must be ${3#optional, }"
}

require_config() {
  [[ " ${rest[*]-}" == *" --config="* || " ${rest[*]-} " == *" --config "* ]] ||
    die "no --config for beit_jax.main; give its flags after --, as in: -- --config=configs/quickstart.py"
}

# Quotes words for any POSIX shell.
quote() {
  local word out='' tick="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$tick}'"
    out+="${out:+ }$word"
  done
  printf '%s' "$out"
}

run() {
  if [[ ${flags[dry-run]} == yes ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}
