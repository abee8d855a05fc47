#!/bin/bash
# Rendered by `python -m hpcmm.launch`: the analysis that is queued behind a run.
#SBATCH --job-name=run-analysis
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=60
#SBATCH --partition=gpu
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=/shared/runs/demo-1/logs/analysis.log

# A function that the submitting shell exports takes the place of no command of this script.
unset -f : [ apptainer break cp echo exec exit export hostname kill ln local mapfile mkdir mv printf read return rm
unset -f scontrol set shopt sleep source srun tail test timeout trap true type wait
set -eo pipefail
unset SLURM_CLUSTERS # Slurm's commands ask the job's own cluster, whatever the shell that submitted it asks
set -u  # only now, for not every site's own lines bear it
export PYTHONPATH=/shared/runs/demo-1/code/hpcmm${PYTHONPATH:+:$PYTHONPATH}

run_dir=/shared/runs/demo-1
# In the Python that launched, for the job's own may have nothing that the analysis needs.
/env/bin/python /shared/runs/demo-1/code/hpcmm/hpcmm/start.py hpcmm.analyze "$run_dir"
