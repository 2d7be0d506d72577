#!/usr/bin/env bash
# What launch/tpu_vm.sh has every host of a TPU VM do. Not for use by hand.
#
#   tpu_host.sh setup [BUCKET]   Python, the package, and gs://BUCKET at ~/bucket
#   tpu_host.sh start ARG...     uta-jax train ARG... in the background, unless it runs already
#   tpu_host.sh watch            show its log until it ends
#
# Exit codes of watch: 0 trained to the end; 2 a mistake, as uta-jax reports it; 75 told to stop, and
# saved; 10 any other failure. All else is the connection's.
set -euo pipefail

source_dir=$(cd "$(dirname "$0")/.." && pwd)
state=$HOME/uta-jax-run # of the training: its process id, log and exit code
secrets=$HOME/.uta_jax_env
PATH=$HOME/.local/bin:$PATH

setup() {
  chmod 600 "$secrets" 2>/dev/null || true
  # uv brings its own Python: the images of TPU VMs have 3.10, the package needs 3.11.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [[ -x $HOME/venv/bin/python ]] || uv venv --quiet --python 3.11 "$HOME/venv"
  uv pip install --quiet --python "$HOME/venv/bin/python" "${source_dir}[tpu,gcs]"
  if [[ -n ${1:-} ]]; then mount_bucket "$1"; fi
}

mount_bucket() {
  local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse >/dev/null; then
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee "$list" >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  mkdir -p "$HOME/bucket"
  mountpoint -q "$HOME/bucket" || gcsfuse --implicit-dirs "$1" "$HOME/bucket"
}

running() {
  [[ -s $state/pid ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

start() {
  if running; then return; fi
  mkdir -p "$state"
  rm -f "$state/exit_code"
  : >"$state/log"
  setsid nohup bash "$0" train "$@" >"$state/log" 2>&1 </dev/null &
  echo $! >"$state/pid"
}

train() {
  if [[ -r $secrets ]]; then
    set -a
    # shellcheck disable=SC1090
    source "$secrets"
    set +a
  fi
  cd "$HOME"
  local code=0
  # No TPU is an error, and no reason to train on the host's CPU.
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} "$HOME/venv/bin/uta-jax" train "$@" || code=$?
  echo "$code" >"$state/exit_code"
}

watch() {
  local code
  tail -n +1 --pid="$(cat "$state/pid")" -F "$state/log" 2>/dev/null
  code=$(cat "$state/exit_code" 2>/dev/null || echo none)
  echo "uta-jax train: exit code $code"
  case $code in
    0 | 2 | 75) exit "$code" ;;
    *) exit 10 ;;
  esac
}

"$@"
