#!/usr/bin/env bash
# Train on the GPUs of this machine: one process drives all of them. Refuses to start where JAX sees
# no GPU, rather than train on the CPU.
#
#   launch/local_gpu.sh -- --config=configs/uta_b16.py --workdir=runs/b16
#   launch/local_gpu.sh --gpus=0,1 --image=uta-jax:cuda --mount="$PWD/data" -- \
#       --config=configs/uta_b16.py --workdir=/runs/b16 --config.data.path="$PWD/data/imagenet21k"
#
# All behind -- goes to `uta-jax train`. Without --image, uta-jax must be on the PATH, installed with
# the extra: pip install '.[cuda]'.
#
#   --gpus=LIST         numbers of the GPUs to use, as 0,1 (all)
#   --image=IMAGE       run in this image, built from launch/Dockerfile with --build-arg EXTRA=cuda;
#                       the directory runs/ is /runs in it
#   --mount=PATH        a path that is read in the image, at the same path; repeatable
#   --env=NAME          a variable of this environment, by name, that the image gets as well
#                       (HF_TOKEN, WANDB_API_KEY, ...); repeatable
#   --memory=SHARE      of each GPU's memory that JAX takes at once (0.9)
#   --dry-run           print every command, and run none
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/steps.sh
source "$here/steps.sh"

settings=(gpus image memory) lists=(mount env)
gpus='' image='' memory=0.9
mount=() env=()

check() {
  [[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || fail "--gpus=$gpus: numbers with commas, as 0,1"
  [[ $memory =~ ^(0?\.[0-9]+|1)$ ]] || fail "--memory=$memory: a share, as 0.9"
  local name
  for name in "${env[@]}"; do # a value here would be printed, and seen in the list of processes
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--env takes the name of a variable, no value"
    [[ -n ${!name:-} ]] || fail "--env=$name: not set in this environment"
  done
  check_training "${training[@]}"
}

in_image() {
  local devices=all arguments=(--rm --init --ipc=host)
  [[ -z $gpus ]] || devices="\"device=$gpus\""
  arguments+=("--gpus=$devices" "--user=$(id -u):$(id -g)" "--volume=$PWD/runs:/runs")
  local path name
  for path in "${mount[@]}"; do arguments+=("--volume=$path:$path:ro"); done
  for name in "${env[@]}"; do arguments+=("--env=$name"); done
  step mkdir -p runs
  step docker run "${arguments[@]}" --env=JAX_PLATFORMS=cuda,cpu \
    "--env=XLA_PYTHON_CLIENT_MEM_FRACTION=$memory" "$image" train "${training[@]}"
}

on_this_machine() {
  local settings=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=$memory")
  [[ -z $gpus ]] || settings+=("CUDA_VISIBLE_DEVICES=$gpus")
  step env "${settings[@]}" uta-jax train "${training[@]}"
}

parse "$@"
check
step nvidia-smi --list-gpus 2>/dev/null || fail "no GPU here: nvidia-smi must list one"
if [[ -n $image ]]; then in_image; else on_this_machine; fi
