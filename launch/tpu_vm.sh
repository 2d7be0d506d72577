#!/usr/bin/env bash
# Train on a Cloud TPU: create it, install the committed state of this checkout on every host, start
# `uta-jax train` on all of them, show the log of the first, begin again where the run stopped if
# the TPU is preempted, delete the TPU at the end.
#
#   launch/tpu_vm.sh --name=uta-b16 --zone=us-central1-a --topology=v5e:4x4 --spot \
#       --bucket=my-bucket --env-file=secrets.env -- \
#       --config=uta-jax/configs/uta_b16.py --workdir=bucket/runs/b16 --config.mesh.fsdp=16
#
# All behind -- goes to `uta-jax train`, run in the home directory of each host, where the checkout
# lies in uta-jax/ and the bucket, mounted by gcsfuse, in bucket/. The workdir must be in the bucket
# (or on a disk that all hosts share): checkpoints are read and written by all of them, and a TPU
# that is preempted takes its disks along. The package itself reads no gs:// workdir.
#
#   --name=NAME            of the TPU; given again, the same command takes up where it was left
#   --zone=ZONE            as us-central1-a
#   --topology=KIND:SHAPE  as `uta-jax plan` has it: v4, v5e, v5p or v6e, and 4x4, 2x2x4, ...; of a
#                          v4 or v5p slice gcloud takes the number of chips, and chooses the shape
#   --project=PROJECT      default: gcloud's own
#   --version=VERSION      of the TPU's software; default: that of the generation
#   --spot                 cheaper, and can be preempted
#   --queued               wait in the queue for capacity (a queued resource)
#   --bucket=BUCKET        mounted at ~/bucket on every host
#   --env-file=FILE        NAME=VALUE lines (HF_TOKEN, WANDB_API_KEY, ...): copied to the hosts as a
#                          file, never printed, never part of a command
#   --create-flag=FLAG     one more flag for gcloud's create, such as --network=NAME; repeatable
#   --attempts=N           preemptions, lost connections and failed creations to survive (10)
#   --poll=SECONDS         between looks at the TPU's state (60)
#   --queue-hours=HOURS    in the queue before giving up (24)
#   --keep                 leave the TPU where it is at the end
#   --dry-run              print every command of a run without a preemption, and run none
#
# The settings can also come from the environment: UTA_ZONE, UTA_PROJECT, UTA_BUCKET.
# Exit codes: 0 trained to the end; 2 a mistake in the settings or the recipe; 1 anything else.
# With several hosts gcloud wants its key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/steps.sh
source "$here/steps.sh"

settings=(name zone topology project version bucket env-file attempts poll queue-hours)
lists=(create-flag) switches=(spot queued keep)
name='' topology='' version='' env_file=''
zone=${UTA_ZONE:-} project=${UTA_PROJECT:-} bucket=${UTA_BUCKET:-}
attempts=10 poll=60 queue_hours=24
spot=false queued=false keep=false
create_flag=()

check() {
  need --name "$name" "the name of the TPU"
  need "--zone (or UTA_ZONE)" "$zone" "the zone, as us-central1-a"
  need --topology "$topology" "generation and shape, as v5e:4x4"
  check_name "$name"
  check_topology "$topology"
  local number
  for number in "attempts=$attempts" "poll=$poll" "queue-hours=$queue_hours"; do
    [[ ${number#*=} =~ ^[0-9]+$ ]] || fail "--$number: a whole number"
  done
  ((attempts > 0)) || fail "--attempts=0: at least 1"
  if [[ -n $env_file ]]; then check_env_file "$env_file"; fi
  check_training "${training[@]}"
  bucket=${bucket#gs://}
  if [[ -n $(git -C "$here/.." status --porcelain 2>/dev/null) ]]; then
    echo "uncommitted changes stay here: the hosts get the last commit" >&2
  fi
}

# The arguments that say what hardware, shared by both ways of creating it.
hardware() {
  case $generation in
    v4) software=tpu-ubuntu2204-base ;;
    v5e) software=v2-alpha-tpuv5-lite ;;
    v5p) software=v2-alpha-tpuv5 ;;
    v6e) software=v2-alpha-tpuv6e ;;
  esac
  software=${version:-$software}
  place=("--zone=$zone")
  [[ -z $project ]] || place+=("--project=$project")
  wanted=("--accelerator-type=$type")
  if "$spot"; then wanted+=(--spot); fi
}

tpus() { # tpus KIND VERB ARGUMENT...: gcloud in the zone and project of this run
  step gcloud compute tpus "$1" "$2" "${place[@]}" "${@:3}"
}

create() {
  if "$queued"; then
    enqueue && wait_in_queue
  else
    tpus tpu-vm create "$name" "${wanted[@]}" "--version=$software" "${create_flag[@]}"
  fi
}

# state KIND FIELD: the state of the TPU, or of its place in the queue; empty if there is none.
state() {
  local command=(gcloud compute tpus "$1" describe "${place[@]}" "$name" "--format=value($2)")
  quoted "${command[@]}" >&3
  "$dry_run" || "${command[@]}" 2>/dev/null || true
}

# A place in the queue, or the one that is held already.
enqueue() {
  case $(state queued-resources state.state) in
    '') ;;
    ACTIVE | FAILED | SUSPEND*) delete || return ;; # without a TPU: its time is over
    *) return ;;
  esac
  tpus queued-resources create "$name" "--node-id=$name" "${wanted[@]}" \
    "--runtime-version=$software" "${create_flag[@]}"
}

wait_in_queue() {
  local found until=$((SECONDS + queue_hours * 3600))
  while found=$(state queued-resources state.state); do
    case $found in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) break ;;
    esac
    if "$dry_run"; then return; fi
    if ((SECONDS >= until)); then break; fi
    sleep "$poll"
  done
  echo "the queue gave no TPU: ${found:-nothing} after $((SECONDS / 60)) minutes" >&2
  delete
  return 1
}

delete() {
  if "$queued"; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

on() { # on WORKER WORD...: tpu_host.sh there
  tpus tpu-vm ssh "$name" "--worker=$1" "--command=bash uta-jax/launch/tpu_host.sh $(quoted "${@:2}")"
}

copy() { # copy FILE PATH: to every host
  tpus tpu-vm scp "$1" "$name:$2" --worker=all
}

# Install and start on every host; harmless where it was done before.
start() {
  local archive=$scratch/uta-jax.tar.gz
  step git -C "$here/.." archive --format=tar.gz --prefix=uta-jax/ "--output=$archive" HEAD &&
    copy "$archive" uta-jax.tar.gz &&
    { [[ -z $env_file ]] || copy "$env_file" .uta_jax_env; } &&
    tpus tpu-vm ssh "$name" --worker=all "--command=tar -xzf uta-jax.tar.gz" &&
    on all setup ${bucket:+"$bucket"} &&
    on all start "${training[@]}"
}

# The state once it is settled, as far as the hosts may be about to vanish.
settled() {
  local found tries
  for ((tries = 0; tries < 30; tries++)); do
    found=$(state tpu-vm state)
    case $found in
      READY | PREEMPTED | TERMINATED | STOPPED | '') break ;;
    esac
    sleep "$poll"
  done
  echo "$found"
}

finish() { # finish CODE: delete the TPU, unless it is to stay, and end
  if "$keep"; then
    echo "kept, and paid for: launch/tpu_vm.sh did not delete $name in $zone"
  else
    delete || echo "$name in $zone could NOT be deleted: see above" >&2
  fi
  exit "$1"
}

# shellcheck disable=SC2329
interrupted() {
  echo "the training goes on: the same command shows it again; gcloud can delete $name in $zone" >&2
  exit 130
}

main() {
  local attempt code found
  found=$(settled)
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    code=0
    case $found in
      READY) ;;
      *)
        if [[ -n $found ]]; then delete || true; fi
        if ! create; then
          if ((attempt == 1)); then
            echo "not created: see above; --queued waits for capacity" >&2
            exit 1
          fi
          sleep "$poll"
          found=$(settled)
          continue
        fi
        ;;
    esac
    if start; then on 0 watch || code=$?; else code=1; fi
    case $code in
      0 | 2) finish "$code" ;;
      10) sleep "$poll" ;; # hosts of a TPU that is being preempted fail a little before it
    esac
    found=$(settled)
    if ((code == 10)) && [[ $found == READY ]]; then finish 1; fi
    echo "attempt $attempt of $attempts ended with the TPU ${found:-gone}: the run goes on from its newest checkpoint"
  done
  echo "given up after $attempts attempts" >&2
  if [[ -n $found ]]; then finish 1; fi
  exit 1
}

parse "$@"
check
hardware
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap interrupted INT TERM
exec 3>&1 # where commands are printed whose output is read
main
