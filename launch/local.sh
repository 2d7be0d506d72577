#!/usr/bin/env bash
# Several processes of one run on this machine's CPU: for trying out what a pod will do.
#
#   launch/local.sh --processes=2 --devices=4 -- train --config=configs/demo.py --workdir=runs/two \
#       --config.data.path=data/emoji_scenes --config.eval.path=data/emoji_scenes
#
# All behind -- is for `uta-jax`, which must be on the PATH or in .venv, or UTA_JAX say where it is.
# The processes talk over 127.0.0.1, and every line that they print is preceded by the number of its
# process. When one of them fails, the others end, and the exit code is that of the first that failed.
#
#   --processes=N  how many
#   --devices=N    of the CPU, as each process sees it (1)
#   --dry-run      print every command, and run none
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/steps.sh
source "$here/steps.sh"

settings=(processes devices)
processes='' devices=1

check() {
  local number
  for number in "processes=$processes" "devices=$devices"; do
    [[ ${number#*=} =~ ^[1-9][0-9]{0,3}$ ]] || fail "--$number: a whole number from 1 on"
  done
  ((${#training[@]})) || fail "name a command of uta-jax after --, as in: -- train --config=..."
}

# A port of this machine on which nobody listens.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)); do
    if ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "$port" && return; fi
  done
}

command_of() { # command_of NUMBER: sets command
  command=(
    env JAX_PLATFORMS=cpu "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes"
    "JAX_PROCESS_ID=$1" PYTHONUNBUFFERED=1
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "$uta_jax" "${training[@]}"
  )
}

start() {
  local number
  for ((number = 0; number < processes; number++)); do
    command_of "$number"
    quoted "${command[@]}"
    if "$dry_run"; then continue; fi
    "${command[@]}" > >(sed -u "s/^/[$number] /") 2> >(sed -u "s/^/[$number] /" >&2) &
    pids+=($!)
  done
}

end_all() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

runs() { # runs PID: a zombie does not
  case $(ps -o stat= -p "$1") in '' | Z*) return 1 ;; esac
}

# The exit code of the first that failed; the others get 5 seconds to end by themselves.
watch() {
  local code pid still failed=0 left=("${pids[@]}") patience=50
  while ((${#left[@]})); do
    still=()
    for pid in "${left[@]}"; do
      if runs "$pid"; then still+=("$pid") && continue; fi
      code=0
      wait "$pid" || code=$?
      if ((code && !failed)); then failed=$code; fi
    done
    left=("${still[@]}")
    if ((failed && patience-- == 0)); then end_all KILL; fi
    if ((${#left[@]})); then sleep 0.1; fi
  done
  wait
  return "$failed"
}

parse "$@"
check
uta_jax=${UTA_JAX:-uta-jax}
if ! command -v "$uta_jax" >/dev/null && [[ -x .venv/bin/uta-jax ]]; then uta_jax=.venv/bin/uta-jax; fi
port=$(free_port)
pids=()
trap 'end_all TERM' TERM INT
start
watch 2>/dev/null # what bash says of those that were killed would come after their own words
