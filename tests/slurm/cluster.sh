#!/usr/bin/env bash
# A SLURM of one's own: munge, slurmctld and two slurmd, which stand for two nodes, on one machine, as root.
#
#   tests/slurm/cluster.sh start DIR     bring it up; DIR holds its configuration, state and logs
#   tests/slurm/cluster.sh stop DIR      take it down
#
# Commands find it by SLURM_CONF=DIR/slurm.conf. Needs Debian's packages slurm-wlm and munge, or their like.
set -euo pipefail

action=$1
dir=$(realpath -m "$2")
here=$(hostname -s)
port=${CLUSTER_PORT:-17800}
export SLURM_CONF=$dir/slurm.conf

configure() {
    mkdir -p "$dir"/{state,spool.one,spool.two,munge,log}
    chmod 0755 "$dir/munge"
    dd if=/dev/urandom of="$dir/munge/key" bs=64 count=1 status=none
    chmod 0400 "$dir/munge/key"
    local cpus
    cpus=$(nproc)
    cat > "$SLURM_CONF" <<CONF
ClusterName=dsprune
SlurmctldHost=$here(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdSpoolDir=$dir/spool.%n
StateSaveLocation=$dir/state
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
RebootProgram=/bin/true
NodeName=one NodeHostname=$here NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cpus RealMemory=1000 State=UNKNOWN
NodeName=two NodeHostname=$here NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:4
CONF
}

start() {
    for tool in munged slurmctld slurmd sbatch scontrol; do
        command -v "$tool" > /dev/null || { echo "not installed: $tool (apt-get install slurm-wlm munge)" >&2; exit 2; }
    done
    [ "$(id -u)" = 0 ] || { echo "slurmd needs root" >&2; exit 2; }
    configure
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    slurmctld
    slurmd -N one
    slurmd -N two
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format=%T --nodes=one,two 2> /dev/null | sort -u)" = idle ] && exit 0
        sleep 0.5
    done
    echo "the nodes did not come up:" >&2
    sinfo >&2 || true
    tail -n 5 "$dir"/log/*.log >&2
    exit 1
}

stop() {
    local file
    for file in slurmd.one.pid slurmd.two.pid slurmctld.pid munge/pid; do
        [ -f "$dir/$file" ] && kill "$(cat "$dir/$file")" 2> /dev/null || true
    done
}

"$action"
