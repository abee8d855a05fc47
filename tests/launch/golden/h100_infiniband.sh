#!/bin/bash
# Rendered by `python -m hpcmm.launch`. It can be submitted once more by hand, with sbatch.
#SBATCH --job-name=run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=h100:8
#SBATCH --time=240
#SBATCH --partition=h100
#SBATCH --output=/shared/runs/demo-1/logs/batch.log
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --mem=0

set -eo pipefail
ulimit -l unlimited
set -u  # only now, for not every site's own lines bear it
export NCCL_DEBUG=WARN
export NCCL_IB_HCA=mlx5
export NCCL_SOCKET_IFNAME=ib0
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
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
srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task=12 \
    --output=/shared/runs/demo-1/logs/rank_%4t.log --open-mode=append --unbuffered \
    --cpu-bind=cores --mem-bind=local --gpu-bind=none \
    "$python" -P -m hpcmm.capture "$run_dir" -- \
    "$python" -P -u -m submitit.core._submit "$run_dir/submitit"
