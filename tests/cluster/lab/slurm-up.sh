#!/bin/bash
# A real three-node Slurm on this machine, as root. LAB=folder (default ./slurm-lab). NETNS=1: one network namespace per node.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
D=$(mkdir -p "${LAB:-slurm-lab}" && cd "${LAB:-slurm-lab}" && pwd)
mkdir -p "$D"/{state,log,spool,dev}; chown slurm:slurm "$D/state" "$D/log"; chmod 755 "$D"
for i in 0 1 2 3; do [ -e "$D/dev/gpu$i" ] || mknod "$D/dev/gpu$i" c 1 3; done
mkdir -p /run/munge; chown munge:munge /run/munge; chmod 755 /run/munge
pgrep -x munged >/dev/null || { : > "$D/munged-is-ours"; su -s /bin/sh munge -c /usr/sbin/munged; }
for _ in $(seq 50); do [ -S /run/munge/munge.socket.2 ] && break; sleep 0.1; done
host=$(hostname -s)
if [ "${NETNS:-0}" = 1 ]; then
  "$here/netns.sh" up 3; ctl="$host(10.77.0.254)"; nodes='NodeName=h[1-3] NodeAddr=10.77.0.[1-3] Port=17001'; names='h1 h2 h3'; list='h[1-3]'
else
  ctl="$host(127.0.0.1)"; nodes="NodeName=n[1-3] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17003]"; names='n1 n2 n3'; list='n[1-3]'
fi
cat > "$D/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$ctl
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=10
SlurmUser=slurm
SlurmdUser=root
SlurmctldPort=16817
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmdSpoolDir=$D/spool/%n
StateSaveLocation=$D/state
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=86400
SlurmdTimeout=10
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
GresTypes=gpu
$nodes CPUs=4 RealMemory=4000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=$list Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=$list MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
echo "NodeName=$list Name=gpu File=$D/dev/gpu[0-3]" > "$D/gres.conf"; : > "$D/cgroup.conf"
export SLURM_CONF="$D/slurm.conf"
[ -s "$D/slurmctld.pid" ] && kill -0 "$(cat "$D/slurmctld.pid")" 2>/dev/null || slurmctld -f "$SLURM_CONF"
for n in $names; do
  p="$D/slurmd-$n.pid"; [ -s "$p" ] && kill -0 "$(cat "$p")" 2>/dev/null && continue
  if [ "${NETNS:-0}" = 1 ]; then "$here/netns.sh" exec "$n" slurmd -f "$SLURM_CONF" -N "$n"; else slurmd -f "$SLURM_CONF" -N "$n"; fi
done
for _ in $(seq 30); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo -N -l; echo "export SLURM_CONF=$D/slurm.conf"
