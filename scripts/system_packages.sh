#!/usr/bin/env bash
# Install the system's side of hpcmm: Slurm and what its accounting needs, nsys, a C++ compiler, and espeak-ng, which
# speaks the sounds of the omni-modal demo. No service is started or enabled. Where something cannot be installed, one
# sentence says what it is, and the exit status is still 0.
#
#   scripts/system_packages.sh [--with-test-tools]
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
non_free=/etc/apt/sources.list.d/hpcmm-non-free.sources
policy=/usr/sbin/policy-rc.d
units=(slurmctld slurmd slurmdbd munge mariadb)

# package:program, so that what came from elsewhere than apt counts too
wanted=(
    slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch munge:munged slurmdbd:slurmdbd
    mariadb-server:mariadbd iproute2:tc g++:g++
)

say() { echo "setup: $*" >&2; }

has() { command -v "$1" >/dev/null; }

candidate() { # whether apt could install the package
    local version
    version=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    [[ -n $version && $version != "(none)" ]]
}

apt() {
    local options=(-qq -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold)
    DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" "$@" </dev/null
}

read_package_lists() {
    say "Reading apt's lists of packages ..."
    apt update >/dev/null || say "apt-get update failed, so the lists that are there are used."
}

install_quietly() { # packages; what apt prints is shown only when it fails
    local log
    log=$(mktemp)
    if apt install -y --no-install-recommends "$@" >"$log" 2>&1; then
        rm -f "$log"
        return 0
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
    return 1
}

forbid_services() { # while packages are installed; undone on exit
    [[ -e $policy ]] && return
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
}

known_units() { # those of ours that systemd knows, where it runs
    [[ -d /run/systemd/system ]] || return 0
    local unit
    for unit in "${units[@]}"; do
        systemctl cat "$unit.service" >/dev/null 2>&1 && echo "$unit.service"
    done
    return 0
}

leave_new_units_off() { # units that were known before
    local unit
    for unit in $(known_units); do
        if [[ " $1 " != *" $unit "* ]]; then
            systemctl disable --now --quiet "$unit" || say "$unit could not be disabled; do it by hand."
        fi
    done
}

install_missing() {
    local package
    for package in "$@"; do
        candidate "$package" && continue
        read_package_lists
        break
    done
    say "Installing $* ..."
    # The lists may name versions that the mirror no longer has: read them again once.
    install_quietly "$@" || { read_package_lists && install_quietly "$@"; }
}

add_non_free() { # to the machine's sources; false when they name no Debian mirror
    local text
    [[ -e $non_free ]] && return
    [[ -n $(apt-get indextargets "Origin: Debian" "Component: main") ]] || read_package_lists
    text=$(python3 "$here/non_free_sources.py") && [[ -n $text ]] && printf '%s\n' "$text" >"$non_free"
}

install_nsys() {
    local existed=false
    [[ -e $non_free ]] && existed=true
    if ! candidate nsight-systems && add_non_free; then read_package_lists; fi
    if candidate nsight-systems && install_missing nsight-systems && has nsys; then return; fi
    $existed || rm -f "$non_free"
    say "nsys (Debian's nsight-systems, in non-free) cannot be installed here; runs work without it, but have no reports."
}

install_speech() { # apart from what is needed by all, so that its lack does not keep the rest from being installed
    if install_missing espeak-ng && has espeak-ng; then return; fi
    say "espeak-ng cannot be installed here; all works without it but the omni-modal demo, whose sounds it speaks."
}

main() {
    if [[ ${1:-} == --with-test-tools ]]; then wanted+=(chromium:chromium); fi
    local missing=() entry before nsys= speech=
    for entry in "${wanted[@]}"; do
        has "${entry#*:}" || missing+=("${entry%%:*}")
    done
    has nsys || nsys=nsight-systems
    has espeak-ng || speech=espeak-ng
    if [[ ${#missing[@]} -eq 0 && -z $nsys$speech ]]; then return; fi
    if [[ $EUID -ne 0 ]] || ! has apt-get; then
        say "Not installed, and only root with apt can: ${missing[*]} $nsys $speech; the rest is set up without."
        return
    fi
    before=$(known_units | tr '\n' ' ')
    forbid_services
    if [[ ${#missing[@]} -gt 0 ]] && ! install_missing "${missing[@]}"; then
        say "apt could not install all of ${missing[*]}; the rest is set up without."
    fi
    if [[ -n $nsys ]]; then install_nsys; fi
    if [[ -n $speech ]]; then install_speech; fi
    leave_new_units_off "$before"
}

main "$@"
