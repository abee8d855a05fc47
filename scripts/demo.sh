#!/usr/bin/env bash
# The demo from nothing: set up, start the local Slurm cluster, train under nsys, analyse, stop the cluster.
# Where Slurm cannot run, the same with four processes of submitit's local executor.
#
#   scripts/demo.sh        HPCMM_KEEP_CLUSTER=1 leaves the cluster up
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin
python=.venv/bin/python
overrides=(experiment=anomaly_demo wait=true)
started_cluster=false
child=

say() { echo "demo: $*" >&2; }

finish() {
    local status=$?
    trap '' INT TERM HUP
    if [[ -n $child ]] && kill "$child" 2>/dev/null; then wait "$child" || true; fi
    if $started_cluster && [[ ${HPCMM_KEEP_CLUSTER:-} != 1 ]]; then slurm/local/down || status=1; fi
    exit "$status"
}

follow() { # runs a command so that a signal to this script ends it at once, and not after the command
    "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

without_slurm() { # why
    say "$1, so the demo runs as four processes on this machine, without Slurm."
    overrides+=(cluster=local)
}

choose_cluster() {
    local status=0
    if [[ $EUID -ne 0 ]]; then
        without_slurm "The local Slurm cluster needs root"
    elif ! command -v slurmctld >/dev/null; then
        without_slurm "Slurm is not installed"
    elif ! slurm/local/status >/dev/null 2>&1; then
        started_cluster=true # also when it comes up only in part
        slurm/local/up || status=$?
        if [[ $status -eq 3 ]]; then
            started_cluster=false
            without_slurm "The local Slurm cluster cannot run here"
        elif [[ $status -ne 0 ]]; then
            exit "$status"
        fi
    fi
}

trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

scripts/setup.sh
choose_cluster
if [[ " ${overrides[*]} " != *" cluster=local "* ]]; then
    export SLURM_CONF=${HPCMM_CLUSTER_DIR:-/var/lib/hpcmm-cluster}/etc/slurm.conf
fi
if ! command -v nsys >/dev/null; then
    say "nsys is not on the PATH, so the demo trains without it and cannot show where the time of a step goes."
    follow "$python" -m hpcmm.launch "${overrides[@]}" profile=off
    exit
fi
follow "$python" -m hpcmm.launch "${overrides[@]}"
follow "$python" -m hpcmm.analyze runs/latest
