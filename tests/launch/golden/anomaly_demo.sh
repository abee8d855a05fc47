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

set -euo pipefail
export SUBMITIT_EXECUTOR=slurm

run_dir=/shared/runs/demo-1
python=/env/bin/python

# submitit names the task's pickle after the job. A job that was submitted by hand takes the run's own copy.
[ -e "$run_dir/submitit/${SLURM_JOB_ID}_submitted.pkl" ] ||
    cp "$run_dir/submitit/task.pkl" "$run_dir/submitit/${SLURM_JOB_ID}_submitted.pkl"

# Compiled ops and generated data: once, on one node, before any rank starts.
"$python" -m hpcmm.train.prepare "$run_dir"

# This script runs on the first node, where rank 0 will listen.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$("$python" -m hpcmm.bootstrap.free_port)
export MASTER_ADDR MASTER_PORT

# srun takes no --cpus-per-task from the job since Slurm 22.05, so it is said again.
srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task=1 \
    --output=/shared/runs/demo-1/logs/rank_%4t.log --open-mode=append --unbuffered \
    /env/bin/python -m hpcmm.capture /shared/runs/demo-1 -- /env/bin/python -u -m submitit.core._submit /shared/runs/demo-1/submitit
