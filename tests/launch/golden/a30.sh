#!/bin/bash
# Rendered by `python -m hpcmm.launch`. It can be submitted once more by hand, with sbatch.
#SBATCH --job-name=run
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=a30:2
#SBATCH --mem=131072M
#SBATCH --time=240
#SBATCH --partition=gpu
#SBATCH --output=/shared/runs/demo-1/logs/batch.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@120

# A function that the submitting shell exports takes the place of no command of this script.
unset -f : [ apptainer break cp echo exec exit export hostname kill ln local mapfile mkdir mv printf read return rm
unset -f scontrol set shopt sleep source srun tail test timeout trap true type wait
set -eo pipefail
unset SLURM_CLUSTERS # Slurm's commands ask the job's own cluster, whatever the shell that submitted it asks
export HPCMM_SCRIPT_BEGAN_S=$EPOCHREALTIME
signalled= # what came before this script knew what to do
trap 'signalled=USR1' USR1
trap 'signalled=USR2' USR2
set -u  # only now, for not every site's own lines bear it
export NCCL_DEBUG=WARN
export NCCL_IB_DISABLE=1
export NCCL_SOCKET_IFNAME='^lo,docker'
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export PYTHONPATH=/shared/runs/demo-1/code/hpcmm${PYTHONPATH:+:$PYTHONPATH}
export SUBMITIT_EXECUTOR=slurm

run_dir=/shared/runs/demo-1
job_id=$SLURM_JOB_ID
python=/env/bin/python
start=/shared/runs/demo-1/code/hpcmm/hpcmm/start.py
port_holder=
ranks= # the process id of their srun
# Whether the job is to go back into the queue; whether a signal came while the ranks ran.
goes_on=yes
warned=no

# Nothing that only keeps the books, such as a line on a full disk, may end the job or change its exit status.
say() { echo "hpcmm: $*" || true; }
noted=
outcome= # in place of the exit status, where that does not tell it
note() { # OUTCOME
    noted=$1
    echo "$job_id $1" >> "$run_dir/exit_status" || say "$run_dir/exit_status cannot be written: job $job_id, $1."
}
at_exit() {
    local status=$?
    [ -n "$noted" ] || note "${outcome:-$status}"
    [ -z "$port_holder" ] || kill "$port_holder" 2> /dev/null || true
    exit "$status"
}
trap at_exit EXIT
trap 'exit 143' TERM # else the status of the last command would be taken for the job's
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    note restarted # what was noted before is no end of the job
    noted=
fi

# USR1, Slurm's warning of an end: the ranks see the file, save a checkpoint and stop; the job goes back into the queue.
# USR2, sent by `scancel --batch --signal=USR2 JOB`: the same, but the job is over then.
ask_to_stop() {
    warned=yes
    : > "$run_dir/stop" || say "$run_dir/stop cannot be made, so the ranks do not hear that they are to stop."
}
trap ask_to_stop USR1
trap 'goes_on=no; ask_to_stop' USR2
rm -f "$run_dir/stop" "$run_dir/stopped" || {
    goes_on=no # or it would stop and start for ever
    say "$run_dir/stop and $run_dir/stopped cannot be removed: the ranks may take them for today's."
}
[ -z "$signalled" ] || kill -s "$signalled" $$

# Slurm may be busy or start anew. So it is asked for ten minutes, with ever longer pauses, but not again for what it has
# refused, nor once the job is to end.
insist() { # COMMAND...: leaves Slurm's words in $words
    local pause_s=1 until_s=$((SECONDS + 600))
    until words=$("$@" 2>&1); do
        words=${words//$'\n'/; }
        [[ ! $words =~ denied|disabled|"nvalid job"|"not permitted"|"not found"|already ]] || return 1
        [ "$goes_on" = yes ] && [ "$SECONDS" -lt "$until_s" ] || return 1
        [ "$pause_s" != 1 ] || say "$1 ${2:-} failed ($words); it is asked again."
        sleep "$pause_s" & wait $! || true # a signal with a trap ends the wait
        pause_s=$((pause_s < 32 ? 2 * pause_s : 60))
    done
}
back_into_queue() { # WHY
    if insist scontrol update JobId="$job_id" Requeue=1 && insist scontrol requeue "$job_id"; then
        say "$1; job $job_id goes back into the queue and then on from there."
    else
        say "$1, but Slurm did not queue job $job_id again ($words). Unless squeue shows it, go on from there with" \
            'sbatch /shared/runs/demo-1/submission.sh'
        return 1
    fi
}
# What allowed the last requeue shall not allow Slurm to repeat one after a node failure.
forbids=
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    { insist scontrol update JobId="$job_id" Requeue=0 || say "Slurm may repeat job $job_id after a node failure ($words)."; } &
    forbids=$!
fi

# submitit names the task's pickle after the job, and so the run knows its jobs. A job that was submitted by hand takes the
# run's own copy.
pickle=$run_dir/submitit/${job_id}_submitted.pkl
[ -e "$pickle" ] || { cp "$run_dir/submitit/task.pkl" "$pickle.part" && mv "$pickle.part" "$pickle"; } ||
    ln "$run_dir/submitit/task.pkl" "$pickle" || { # which needs no room
    say "$pickle cannot be made from task.pkl beside it (see above), so no handle of this job would find it."
    exit 1
}

if [ -n "${SLURM_HET_SIZE:-}" ]; then
    echo "hpcmm: job $SLURM_JOB_ID is a heterogeneous job, whose ranks would be on the nodes of one component alone: submit it without the others." >&2
    exit 1
fi
# Compiled ops and generated data: once, on one node, before any rank starts.
"$python" "$start" hpcmm.worker prepare "$run_dir"

# This script runs on the first node, where rank 0 will listen.
MASTER_ADDR=${SLURMD_NODENAME:-$(hostname)}
on_first_node=()
# A port of its own, that is kept for rank 0 until it listens there.
exec {port}< <("${on_first_node[@]}" "$python" "$start" hpcmm.worker port --hold)
port_holder=$!
read -r MASTER_PORT <&"$port"
export MASTER_ADDR MASTER_PORT

# Each rank that ends well leaves a mark there, by a link, which needs no room.
ended=$run_dir/ended/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
rm -rf "$ended" || true # of a job with the same number, which a controller that counts anew gives
{ mkdir -p "$ended" && : >| "$ended/mark"; } || {
    say "$ended cannot be made, so srun alone tells whether the ranks ended well."
    rm -rf "$ended" || true
    ended=
}

# srun takes no --cpus-per-task from the job since Slurm 22.05, so it is said again. Without --export=ALL the ranks of a job
# that was submitted with --export=NONE, as some sites do by default, would not see what this script has exported.
export HPCMM_SRUN_BEGAN_S=$EPOCHREALTIME
srun --export=ALL --kill-on-bad-exit=1 --wait=60 --cpus-per-task=8 \
    --output=/shared/runs/demo-1/logs/rank_%4t.log --open-mode=append --unbuffered \
    --cpu-bind=cores --gpu-bind=none \
    "$python" "$start" hpcmm.worker rank "$run_dir" &
ranks=$!

while :; do
    warned=no
    wait "$ranks" && status=0 || status=$?
    [ "$warned" = yes ] || break # a signal with a trap ends the wait only
done

# srun's 0 leaves out ranks of which it has heard nothing, as on a node that Slurm gave up: it stands if all ranks have left
# their marks, which a shared file system may show late.
all_ended_well() ( # in a shell of its own, for cluster.setup may have changed how names are found
    set +f
    shopt -u nullglob failglob
    GLOBIGNORE=
    set -- "$ended"/*_of_*
    [ "$#" = "${1##*_of_}" ]
)
if [ "$status" = 0 ] && [ -n "$ended" ]; then
    for ((looks = 0; looks < 60; looks++)); do
        ! all_ended_well || break
        sleep 1 & wait $! || true
    done
    if all_ended_well; then
        rm -rf "$ended" || true
    else
        status=1
        say "srun reports no failure, but not all ranks are known to have ended well: a node may have failed."
    fi
fi

# The job's exit status is that of the rank that failed first, not of those that srun ended for it.
if [ "$status" != 0 ] && read -r own < "$run_dir/failures/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/status"; then
    [[ ! $own =~ ^[1-9][0-9]{0,2}$ ]] || status=$own
fi 2> /dev/null

if [ -e "$run_dir/stopped" ]; then
    trap 'goes_on=no' TERM # Slurm sends it when the job is queued again, and at the time limit
    note stopped
    [ -z "$forbids" ] || kill "$forbids" 2> /dev/null || true
    # What waits for this job to complete must not start if it was meant to go on and does not.
    [ "$goes_on" = no ] || back_into_queue "stopped with a checkpoint" || [ "$goes_on$status" != yes0 ] || status=1
fi
exit "$status"
