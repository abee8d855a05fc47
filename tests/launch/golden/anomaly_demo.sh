#!/bin/bash
# Rendered by `python -m hpcmm.launch`. It can be submitted once more by hand, with sbatch.
#SBATCH --job-name=anomaly_demo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=2
#SBATCH --time=20
#SBATCH --output=/shared/runs/demo-1/logs/batch.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@120

set -eo pipefail
unset SLURM_CLUSTERS # scontrol and srun ask the job's own cluster, whatever the shell that submitted it asks
export HPCMM_SCRIPT_BEGAN_S=$EPOCHREALTIME
set -u  # only now, for not every site's own lines bear it
export PYTHONPATH=/shared/runs/demo-1/code/hpcmm${PYTHONPATH:+:$PYTHONPATH}
export SUBMITIT_EXECUTOR=slurm

run_dir=/shared/runs/demo-1
job_id=$SLURM_JOB_ID
python=/env/bin/python
port_holder=
outcome= # in place of the exit status, where that does not tell it
at_exit() {
    local status=$?
    echo "$job_id ${outcome:-$status}" >> "$run_dir/exit_status"
    [ -z "$port_holder" ] || kill "$port_holder" 2> /dev/null || true
}
trap at_exit EXIT
trap 'exit 143' TERM # else the status of the last command would be taken for the job's

# USR1, Slurm's warning of an end: the ranks see the file, save a checkpoint and stop; the job goes back into the queue.
# USR2, sent by `scancel --batch --signal=USR2 JOB`: the same, but the job is over then.
goes_on=yes
warned=no
trap 'warned=yes; : > "$run_dir/stop"' USR1
trap 'warned=yes; : > "$run_dir/stop"; goes_on=no' USR2
rm -f "$run_dir/stop" "$run_dir/stopped"
# What allowed the last requeue shall not allow Slurm to repeat one after a node failure.
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0

# submitit names the task's pickle after the job. A job that was submitted by hand takes the run's own copy.
[ -e "$run_dir/submitit/${job_id}_submitted.pkl" ] ||
    cp "$run_dir/submitit/task.pkl" "$run_dir/submitit/${job_id}_submitted.pkl"

if [ -n "${SLURM_HET_SIZE:-}" ]; then
    echo "hpcmm: job $SLURM_JOB_ID is a heterogeneous job, whose ranks would be on the nodes of one component alone: submit it without the others." >&2
    exit 1
fi
# Compiled ops and generated data: once, on one node, before any rank starts.
"$python" -P -m hpcmm.worker prepare "$run_dir"

# This script runs on the first node, where rank 0 will listen.
MASTER_ADDR=${SLURMD_NODENAME:-$(hostname)}
on_first_node=()
# A port of its own, that is kept for rank 0 until it listens there.
exec {port}< <("${on_first_node[@]}" "$python" -P -m hpcmm.worker port --hold)
port_holder=$!
read -r MASTER_PORT <&"$port"
export MASTER_ADDR MASTER_PORT

# srun takes no --cpus-per-task from the job since Slurm 22.05, so it is said again. Without --export=ALL the ranks of a job
# that was submitted with --export=NONE, as some sites do by default, would not see what this script has exported.
export HPCMM_SRUN_BEGAN_S=$EPOCHREALTIME
# When a rank fails, the others end their captures before srun kills them.
srun --export=ALL --kill-on-bad-exit=0 --wait=60 --cpus-per-task=1 \
    --output=/shared/runs/demo-1/logs/rank_%4t.log --open-mode=append --unbuffered \
    "$python" -P -m hpcmm.worker rank "$run_dir" -- \
    "$python" -P -u -m submitit.core._submit "$run_dir/submitit" &
ranks=$!

while :; do
    warned=no
    wait "$ranks" && status=0 || status=$?
    [ "$warned" = yes ] || break # a signal with a trap ends the wait only
done

[ ! -e "$run_dir/stopped" ] || outcome=stopped
if [ "$goes_on" = yes ] && [ -e "$run_dir/stopped" ]; then
    echo "hpcmm: stopped with a checkpoint; job $SLURM_JOB_ID goes back into the queue and then on from there."
    scontrol update JobId="$SLURM_JOB_ID" Requeue=1
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
