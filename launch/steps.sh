# shellcheck shell=bash
# Sourced by the scripts beside it: how a command is printed and run, and how a mistake is reported.
#
# A secret never becomes an argument: commands are printed, stored by clusters and seen in process
# lists. Files or the environment carry secrets, and only their names are written down.

dry_run=false
settings=() lists=() switches=() training=()

# parse ARGUMENT...: --KEY=VALUE for the KEYs in settings sets the variable KEY, with _ for -, and adds
# to it for those in lists; --KEY for those in switches makes it true; training is all behind --.
parse() {
  local key
  while (($#)); do
    key=${1%%=*} key=${key#--}
    case $1 in
      --)
        # shellcheck disable=SC2034
        training=("${@:2}")
        return
        ;;
      --dry-run) dry_run=true ;;
      --help | -h) usage && exit ;;
      *)
        if [[ $1 == --*=* && " ${settings[*]} " == *" $key "* ]]; then
          printf -v "${key//-/_}" %s "${1#*=}"
        elif [[ $1 == --*=* && " ${lists[*]} " == *" $key "* ]]; then
          local -n repeated=${key//-/_}
          repeated+=("${1#*=}")
        elif [[ $1 == "--$key" && " ${switches[*]} " == *" $key "* ]]; then
          printf -v "${key//-/_}" true
        else
          fail "unexpected argument $1 (write --KEY=VALUE, and what is for uta-jax after --)"
        fi
        ;;
    esac
    shift
  done
}

# quoted WORD...: the words as a shell would have to read them.
quoted() {
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  printf '%s\n' "${line[*]}"
}

# step COMMAND...: print the command; run it too, unless this is a dry run.
step() {
  quoted "$@"
  "$dry_run" || "$@"
}

# fail MESSAGE: one line, and the exit code of a user's mistake.
fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# need FLAG VALUE WHAT: refuse an empty setting.
need() {
  [[ -n $2 ]] || fail "$1 is missing: $3 (see --help)"
}

# usage: the comment at the head of the script, which is its help.
usage() {
  sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "$0"
}

# check_name NAME: what clouds and clusters accept as the name of a thing.
check_name() {
  [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$1: at most 40 of a-z, 0-9 and -, beginning with a letter, not ending with -"
}

# check_env_file FILE: readable NAME=VALUE lines; no line of it is ever shown.
check_env_file() {
  [[ -r $1 ]] || fail "--env-file=$1: no such file, or not readable"
  local number
  number=$(grep -nvE '^([A-Za-z_][A-Za-z0-9_]*=.*|#.*|)$' "$1" | head -n 1 | cut -d: -f1) || true
  [[ -z $number ]] || fail "--env-file=$1: line $number is not NAME=VALUE"
}

# check_topology v5e:4x4: sets generation, shape, chips, and type, its name in Google's cloud. That
# name counts cores for v4 and v5p, two a chip, and knows no shape: flat slices come in one only.
check_topology() {
  [[ $1 =~ ^(v4|v5p):([1-9][0-9]*(x[1-9][0-9]*){2})$ ||
    $1 =~ ^(v5e|v6e):(1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16)$ ]] ||
    fail "--topology=$1: v4 or v5p and a shape as 2x2x4; v5e or v6e and 1x1, 2x2, 2x4, 4x4 ... 16x16"
  generation=${BASH_REMATCH[1]}
  shape=${BASH_REMATCH[2]}
  chips=$((${shape//x/*}))
  # shellcheck disable=SC2034
  case $generation in
    v4 | v5p) type=$generation-$((2 * chips)) ;;
    v5e) type=v5litepod-$chips ;;
    v6e) type=v6e-$chips ;;
  esac
}

# check_training ARGUMENT...: what uta-jax train cannot do without.
check_training() {
  [[ " $*" == *" --config="* ]] || fail "name a recipe after --, as in: -- --config=configs/uta_b16.py"
  [[ " $*" == *" --workdir="* ]] || fail "name a run's directory after --, as in: -- --workdir=runs/b16"
}
