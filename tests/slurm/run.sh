#!/usr/bin/env bash
# Run launch/slurm.sbatch under a real Slurm: a cluster of one node in a temporary folder, started by
# hand and taken down at the end. By hand, not by the suite; as root, on Debian or Ubuntu:
#
#   apt-get install slurmctld slurmd slurm-client munge
#   tests/slurm/run.sh [TASKS] [ARGUMENT of uta-jax train ...]
#
# TASKS (2) processes on this machine's CPU train configs/demo.py, shrunk by config.runlocal, or what
# the arguments say. UTA_JAX names the command (uta-jax); STOP_AFTER=SECONDS has Slurm tell the tasks
# to stop, so that the job saves, is queued again and goes on. The exit code is the job's.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
tasks=${1:-2}
shift || true
for program in munged slurmctld slurmd sbatch; do
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null ||
    { echo "$program is missing: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 2; }
done
[[ $(id -u) == 0 ]] || { echo "slurmd starts the tasks of other users: run this as root" >&2; exit 2; }
PATH=$PATH:/usr/sbin

cluster=$(mktemp -d)
chmod 755 "$cluster"
export SLURM_CONF=$cluster/slurm.conf
pids=()

# shellcheck disable=SC2329
down() {
  # Daemons of this cluster alone, the last one first.
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
  done
  rm -rf "$cluster"
}
trap down EXIT

up() { # up NAME COMMAND...: a daemon in the foreground of the background
  "${@:2}" >"$cluster/$1.out" 2>&1 &
  pids+=($!)
}

host=$(hostname -s)
mkdir -m 700 "$cluster/munge"
dd if=/dev/urandom of="$cluster/munge/key" bs=1024 count=1 status=none
chmod 600 "$cluster/munge/key"
mkdir "$cluster/state" "$cluster/spool"
cat >"$SLURM_CONF" <<CONF
ClusterName=throwaway
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$cluster/munge/socket
CredType=cred/munge
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES OverSubscribe=FORCE:$tasks State=UP
CONF

up munged munged --foreground --force --key-file="$cluster/munge/key" --socket="$cluster/munge/socket" \
  --pid-file="$cluster/munge/pid" --log-file="$cluster/munge/log" --seed-file="$cluster/munge/seed"
until [[ -S $cluster/munge/socket ]]; do sleep 0.1; done
up slurmctld slurmctld -D
up slurmd slurmd -D
for ((second = 0; second < 60; second++)); do
  if [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]]; then break; fi
  sleep 1
done
sinfo --noheader --format='a cluster of one node: %n, %c CPUs, %t'

cd "$cluster"
export UTA_JAX=${UTA_JAX:-uta-jax} JAX_PLATFORMS=cpu
arguments=("--workdir=$cluster/run")
(($#)) || set -- "--config=$root/configs/demo.py" --config.runlocal=True
if [[ -n ${STOP_AFTER:-} ]]; then
  { sleep "$STOP_AFTER" && scancel --signal=TERM 1; } &
fi
code=0
"$root/launch/slurm.sbatch" --ntasks-per-node="$tasks" --oversubscribe --overcommit --wait -- \
  "${arguments[@]}" "$@" || code=$?
cat "$cluster"/uta-jax-*.log || tail -n 30 "$cluster"/*.out
if [[ -f $cluster/run/metrics.jsonl ]]; then tail -n 2 "$cluster/run/metrics.jsonl"; fi
echo "the job ended with exit code $code"
exit "$code"
