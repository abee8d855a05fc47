#!/bin/bash
# Rendered by `python -m hpcmm.launch`. It can be submitted once more by hand, with sbatch.
#SBATCH --job-name=run
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=60
#SBATCH --output=/shared/runs/demo-1/logs/batch.log
#SBATCH --open-mode=append

set -eo pipefail
set -u  # only now, for not every site's own lines bear it
export PYTHONPATH=/shared/runs/demo-1/code/hpcmm${PYTHONPATH:+:$PYTHONPATH}
export SUBMITIT_EXECUTOR=slurm

run_dir=/shared/runs/demo-1
job_id=$SLURM_JOB_ID
python=/env/bin/python
trap 'echo "$job_id $?" >> "$run_dir/exit_status"' EXIT

# submitit names the task's pickle after the job. A job that was submitted by hand takes the run's own copy.
[ -e "$run_dir/submitit/${job_id}_submitted.pkl" ] ||
    cp "$run_dir/submitit/task.pkl" "$run_dir/submitit/${job_id}_submitted.pkl"

# Compiled ops and generated data: once, on one node, before any rank starts.
"$python" -P -m hpcmm.train.prepare "$run_dir"

# This script runs on the first node, where rank 0 will listen.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$("$python" -P -m hpcmm.bootstrap.free_port)
export MASTER_ADDR MASTER_PORT

# srun takes no --cpus-per-task from the job since Slurm 22.05, so it is said again.
srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task=4 \
    --output=/shared/runs/demo-1/logs/rank_%4t.log --open-mode=append --unbuffered \
    "$python" -P -m hpcmm.capture "$run_dir" -- \
    "$python" -P -u -m submitit.core._submit "$run_dir/submitit"
