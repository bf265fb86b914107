#!/usr/bin/env bash
# A real SLURM of one node for tests, as root: single-node.sh start|stop|env|controller-stop|controller-start
#   CLUSTER_TEST_DIR   where its configuration, state and logs are (needed)
#   USER_SIGNAL     on: a job that is preempted gets its own signal (sbatch --signal); off: SIGTERM alone
# `eval "$(single-node.sh env)"` sets SLURM_CONF for sbatch, squeue and the others. The node says that it has eight CPUs, whatever it has,
# so that several jobs run at a time.
set -euo pipefail
dir=${CLUSTER_TEST_DIR:?folder of the state}
conf=$dir/slurm.conf
pid_of() { [ -f "$dir/$1.pid" ] && cat "$dir/$1.pid" || true; }

controller_start() {
  slurmctld "$@"
  for _ in $(seq 40); do scontrol ping 2>/dev/null | grep -q UP && return; sleep 0.5; done
  echo "slurmctld does not answer" >&2; tail -20 "$dir/log/slurmctld.log" >&2; exit 1
}

daemon_stop() {
  local pid; pid=$(pid_of "$1")
  [ -n "$pid" ] && kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 60); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.5; done
  kill -9 "$pid" 2>/dev/null || true
}

export SLURM_CONF=$conf
case "${1:-}" in
start)
  mkdir -p "$dir"/{state,spool,log} /run/munge
  host=$(hostname -s) mem=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 * 9 / 10))
  parameters=$([ "${USER_SIGNAL:-off}" = on ] && echo "PreemptParameters=send_user_signal" || true)
  cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=200000,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$parameters
NodeName=$host CPUs=8 RealMemory=$mem State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10
CONF
  [ -f /etc/munge/munge.key ] || /usr/sbin/mungekey
  chown munge:munge /run/munge /etc/munge /etc/munge/munge.key
  if ! munge -n >/dev/null 2>&1; then
    runuser -u munge -- /usr/sbin/munged
    cp /run/munge/munged.pid "$dir/munged.pid"
  fi
  controller_start -c
  slurmd
  for _ in $(seq 40); do sinfo -h -o %T | grep -q idle && break; sleep 0.5; done
  sinfo
  ;;
stop)
  scancel --full --signal=KILL --user=root 2>/dev/null || true
  scancel --user=root 2>/dev/null || true
  for _ in $(seq 80); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.5; done
  for daemon in slurmd slurmctld munged; do daemon_stop "$daemon"; done
  ;;
controller-stop) daemon_stop slurmctld ;;
controller-start) controller_start ;;
env) echo "export SLURM_CONF=$conf" ;;
*) sed -n 2,6p "$0" >&2; exit 2 ;;
esac
