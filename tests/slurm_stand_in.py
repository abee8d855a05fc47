"""Stand-ins of squeue and sacct that part fields as they are asked to, for tests that write rows down."""

RETELL = r"""#!/bin/bash
if [ -z "$RETOLD" ]; then
    for word; do
        case $word in
        --format=%i*) separator=${word#--format=%i}; separator=${separator%%%*}; fields=${word//[^%]/} ;;
        --format=JobID,*) fields=,${word//[^,]/} ;;
        --delimiter=?????*) separator=${word#*=} ;;
        esac
    done
    if [ -n "$separator" ]; then
        printf "JOBID$separator"
        for ((field = 1; field < ${#fields}; field++)); do printf "FIELD$separator"; done
        echo
        RETOLD=1 "$0" "$@" | LC_ALL=C sed -e $'s/^\([^\x1f]*\x1f\)\{'$((${#fields} - 2))$'\}[^\x1f]*$/&\x1f/' \
            -e $'/\x1f/s/$/\x1f/' -e $'s/\x1f/'"$separator/g"
        exit ${PIPESTATUS[0]}
    fi
fi
"""


def parted_as_asked(script: str) -> str:
    """A shell script that writes rows whose fields are parted by 0x1f; each gets the separator that is asked for.

    The header comes first, as Slurm prints it. A row may lack its last field, the user's number.
    """
    return RETELL + script.partition("\n")[2]
