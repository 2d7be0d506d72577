#!/usr/bin/env bash
# Several processes of one run on this machine's CPU: for trying out what a pod will do.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh --processes=N [--devices=M] [--dry-run] -- COMMAND [ARGUMENT ...]

Starts N processes of `uta-jax COMMAND`, with M devices each (default 1), that talk over 127.0.0.1.
Every line they print is preceded by the number of its process. When one of them fails, the others
are ended, and the exit code is that of the first that failed.

Example:
  launch/local.sh --processes=2 --devices=4 -- train --config=configs/demo.py --workdir=runs/two \
      --config.data.path=data/emoji_scenes --config.eval.path=data/emoji_scenes
TEXT
}

die() { echo "launch/local.sh: $1 (see launch/local.sh --help)" >&2; exit 2; }

processes="" devices=1 dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --devices=*) devices="${1#*=}" ;;
    --dry-run) dry_run=1 ;;
    -h|--help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unexpected argument '$1'" ;;
  esac
  shift
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || die "--processes='$processes' must be a number >= 1"
[[ "$devices" =~ ^[1-9][0-9]*$ ]] || die "--devices='$devices' must be a number >= 1"
[ $# -gt 0 ] || die "name a command after --"

python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    printf 'JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=%s JAX_NUM_PROCESSES=%s JAX_PROCESS_ID=%s XLA_FLAGS=%q %q -m uta_jax' \
      "$JAX_COORDINATOR_ADDRESS" "$processes" "$i" "$XLA_FLAGS" "$python"
    printf ' %q' "$@"; echo
  done
  exit 0
fi

pids=()
end_all() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'end_all TERM' TERM INT

for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i "$python" -u -m uta_jax "$@" \
    > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done

# Whether process $1 still runs; a zombie does not.
runs() { case "$(ps -o stat= -p "$1")" in "" | Z*) return 1 ;; esac; }

failed=0 left=("${pids[@]}") patience=100 # tenths of a second in which the others end by themselves
while [ ${#left[@]} -gt 0 ]; do
  still=()
  for pid in "${left[@]}"; do
    if runs "$pid"; then still+=("$pid"); continue; fi
    code=0
    wait "$pid" || code=$?
    if [ "$code" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=$code; fi
  done
  left=(${still[@]+"${still[@]}"})
  if [ "$failed" -ne 0 ] && [ $((patience--)) -eq 0 ]; then end_all KILL; fi
  [ ${#left[@]} -eq 0 ] || sleep 0.1
done
wait
exit "$failed"
