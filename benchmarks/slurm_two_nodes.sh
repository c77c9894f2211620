#!/usr/bin/env bash
# A Slurm of two nodes on this machine, to try clusters/slurm on. Needs root and Debian's packages slurm-wlm and munge:
#
#   benchmarks/slurm_two_nodes.sh COMMAND…    runs COMMAND with sbatch, squeue, … for this Slurm, and ends it
#
# Its files are in /tmp/slurm-two-nodes, the log of each daemon among them.
set -euo pipefail

folder=/tmp/slurm-two-nodes
rm -rf "$folder"
mkdir -m 755 "$folder" "$folder/state" "$folder/munge"
export SLURM_CONF="$folder/slurm.conf"
host="$(hostname -s)"

cat > "$SLURM_CONF" <<CONF
ClusterName=two
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=27001
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdSpoolDir=$folder/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=27002 CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=27003 CPUs=2 RealMemory=4000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=2 State=UP
CONF

dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none
chmod 400 "$folder/munge/key"

daemons=()
finish() {
  for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
}
trap finish EXIT

munged --foreground --force --key-file "$folder/munge/key" --socket "$folder/munge/socket" \
  --pid-file "$folder/munge/pid" --seed-file "$folder/munge/seed" --log-file "$folder/munge/log" >"$folder/munged.log" 2>&1 & daemons+=($!)
until [ -S "$folder/munge/socket" ]; do sleep 0.2; done
slurmctld -D >"$folder/slurmctld.log" 2>&1 & daemons+=($!)
for node in n1 n2; do
  mkdir "$folder/spool-$node"
  slurmd -D -N "$node" >"$folder/slurmd-$node.log" 2>&1 & daemons+=($!)
done
until sinfo --noheader --responding --states=idle --format=%D 2>/dev/null | grep -qx 2; do sleep 0.5; done
"$@"
