#!/usr/bin/env bash
# Train on the TPUs of a GKE cluster: fill in launch/gke_jobset.yaml, apply it, and name the `xpk`
# line that does about the same.
#
#   launch/gke.sh --name=uta-b16 --topology=v5e:4x4 --image=REGISTRY/uta-jax:tpu \
#       --bucket=my-bucket --secret=uta-jax -- \
#       --config=configs/uta_b16.py --workdir=/bucket/runs/b16 --config.mesh.fsdp=16
#
# All behind -- goes to `uta-jax train`, in the image of launch/Dockerfile, with the bucket mounted
# at /bucket. The workdir must be there: every host reads and writes its checkpoints. The cluster
# needs JobSet and the GCS FUSE driver; kubectl must point at it.
#
#   --name=NAME             of the JobSet
#   --topology=KIND:SHAPE   as `uta-jax plan` has it: v4, v5e, v5p or v6e, and 4x4, 2x2x4, ...
#   --image=IMAGE           built from launch/Dockerfile with --build-arg EXTRA=tpu
#   --bucket=BUCKET         mounted at /bucket
#   --secret=NAME           a Secret whose keys become environment variables; it is made once, with
#                           kubectl create secret generic NAME --from-env-file=secrets.env
#   --service-account=NAME  that may use the bucket (default)
#   --chips-per-host=N      default: 4, or all chips where there are fewer
#   --restarts=N            preemptions and failures to survive (20)
#   --namespace=NAME        default: kubectl's own
#   --cluster=NAME          only for the xpk line
#   --render                print the filled-in YAML, and do nothing else
#   --delete                delete the JobSet instead
#   --dry-run               print every command, and run none
#
# The settings can also come from the environment: UTA_IMAGE, UTA_BUCKET.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/steps.sh
source "$here/steps.sh"

settings=(name topology image bucket secret service-account chips-per-host restarts namespace cluster)
switches=(render delete)
name='' topology='' chips_per_host='' namespace='' cluster=CLUSTER
image=${UTA_IMAGE:-} bucket=${UTA_BUCKET:-}
secret=uta-jax service_account=default restarts=20
render=false delete=false

check() {
  need --topology "$topology" "generation and shape, as v5e:4x4"
  need "--image (or UTA_IMAGE)" "$image" "the image built from launch/Dockerfile"
  need "--bucket (or UTA_BUCKET)" "$bucket" "the bucket for the workdir"
  check_topology "$topology"
  check_training "${training[@]}"
  chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
  local setting
  for setting in "chips-per-host=$chips_per_host" "restarts=$restarts"; do
    [[ ${setting#*=} =~ ^[0-9]+$ ]] || fail "--$setting: a whole number"
  done
  ((chips_per_host && chips % chips_per_host == 0)) ||
    fail "--chips-per-host=$chips_per_host does not divide the $chips chips of $topology"
  bucket=${bucket#gs://}
  for setting in "image=$image" "bucket=$bucket" "secret=$secret" "service-account=$service_account"; do
    [[ ${setting#*=} =~ ^[A-Za-z0-9._/:@-]+$ ]] || fail "--$setting: letters, digits and ._/:@- only"
  done
}

# The words as a JSON list, which YAML reads as well.
json() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "control characters in ${word@Q}"
    # A $( ) in the arguments of a container is a variable to Kubernetes: $$ is a plain $.
    word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//\$/\$\$}
    list+="${list:+, }\"$word\""
  done
  printf '[%s]' "$list"
}

accelerator() {
  case $generation in
    v4) echo tpu-v4-podslice ;;
    v5e) echo tpu-v5-lite-podslice ;;
    v5p) echo tpu-v5p-slice ;;
    v6e) echo tpu-v6e-slice ;;
  esac
}

render() {
  local text value key
  text=$(<"$here/gke_jobset.yaml")
  for key in NAME IMAGE BUCKET SECRET TOPOLOGY RESTARTS ACCELERATOR HOSTS CHIPS SERVICE_ACCOUNT ARGS; do
    case $key in
      NAME) value=$name ;;
      IMAGE) value=$image ;;
      BUCKET) value=$bucket ;;
      SECRET) value=$secret ;;
      TOPOLOGY) value=$shape ;;
      RESTARTS) value=$restarts ;;
      ACCELERATOR) value=$(accelerator) ;;
      HOSTS) value=$((chips / chips_per_host)) ;;
      CHIPS) value=$chips_per_host ;;
      SERVICE_ACCOUNT) value=$service_account ;;
      ARGS) value=$(json train "${training[@]}") ;;
    esac
    text=${text//"\${$key}"/"$value"}
  done
  printf '%s\n' "$text"
}

xpk_line() {
  quoted xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$type" \
    "--docker-image=$image" "--max-restarts=$restarts" "--command=uta-jax train $(quoted "${training[@]}")"
}

main() {
  local kubectl=(kubectl ${namespace:+"--namespace=$namespace"})
  need --name "$name" "the name of the JobSet"
  check_name "$name"
  if "$delete"; then
    step "${kubectl[@]}" delete jobset "$name"
    exit
  fi
  check
  if "$render"; then
    render
    exit
  fi
  rendered=$(mktemp -d)
  trap 'rm -rf "$rendered"' EXIT
  render >"$rendered/jobset.yaml"
  step "${kubectl[@]}" apply "--filename=$rendered/jobset.yaml"
  step "${kubectl[@]}" wait "--for=create" "--timeout=10m" pod "--selector=jobset.sigs.k8s.io/jobset-name=$name"
  step "${kubectl[@]}" logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" \
    --container=train --pod-running-timeout=24h
  printf '# the same by xpk, which mounts storage by --storage and takes secrets by --env-file:\n# '
  xpk_line
}

parse "$@"
main
