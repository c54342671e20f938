#!/bin/sh
# A SLURM cluster of one node of two CPUs, this machine, without systemd and cgroups.
# `sh tests/cluster/slurm.sh start FOLDER` as root, then SLURM_CONF=FOLDER/slurm.conf makes srun, sbatch and squeue speak
# with it; `stop FOLDER` ends it. All that it writes is in FOLDER; its ports are CONTROL_PORT and NODE_PORT.
# Debian's packages: slurm-wlm, munge.
set -eu

action=$1
folder=$2
export SLURM_CONF="$folder/slurm.conf"

end() { # the process of a file FOLDER/NAME.pid, and no other
  [ -s "$folder/$1.pid" ] || return 0
  pid=$(cat "$folder/$1.pid")
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid"
}

if [ "$action" = stop ]; then
  scancel --state=PENDING --state=RUNNING 2>/dev/null || true
  for name in slurmd slurmctld munged; do end "$name"; done
  exit 0
fi

node=$(hostname -s)
mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
chmod 700 "$folder/munge"
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 600 "$folder/munge/key"
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${CONTROL_PORT:-16817}
SlurmdPort=${NODE_PORT:-16818}
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$node Default=YES State=UP
CONF
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld -c
slurmd
for _ in $(seq 100); do
  [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && exit 0
  sleep 0.2
done
echo "expected the node to be idle, got: $(sinfo --noheader --format='%T %E' 2>&1)" >&2
tail -n 5 "$folder/slurmctld.log" "$folder/slurmd.log" >&2
sh "$0" stop "$folder"
exit 1
