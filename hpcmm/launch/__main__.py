"""``python -m hpcmm.launch``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hpcmm.errors import HpcmmError
from hpcmm.launch import plan, queue, render_script
from hpcmm.launch.compose import config_groups

EPILOG = """\
examples:
  python -m hpcmm.launch experiment=anomaly_demo            the main job, on the local four-node Slurm
  python -m hpcmm.launch experiment=anomaly_demo wait=true  ... and follow it to its end
  python -m hpcmm.launch cluster=local train.steps=20       four ranks on this machine, no Slurm
  python -m hpcmm.launch cluster=slurm cluster.nodes=4 cluster.gpus_per_node=2 cluster.ranks_per_node=2 \\
      cluster.partition=gpu profile=nsys data=mvtec data.root=/data/mvtec_ad
  python -m hpcmm.launch experiment=anomaly_demo dry_run=true   print the job's script, submit nothing

exit status: 0 the job was accepted (with wait=true: completed), 1 it was not or the configuration is wrong, 130 after
Ctrl-C while following, which leaves the job running.
Every key is documented in hpcmm/config.py; a key that does not exist is refused with the names of those that do.
"""


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"  {name + '=':<12} {', '.join(options)}" for name, options in config_groups().items())
    return argparse.ArgumentParser(
        prog="python -m hpcmm.launch",
        description="Compose a run from conf/, check it, and submit it. Prints the job id, the run directory and what "
        "to run next, and returns at once.\n\nconfig groups and their options:\n" + groups,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra override: a group's option or a key")
    overrides = parser.parse_args(arguments).overrides
    try:
        config, run = plan(overrides)
        if config.dry_run:
            print(render_script(config, run), end="")
            return 0
        submission = queue(config, run)
    except HpcmmError as error:
        print(f"hpcmm: {error}", file=sys.stderr)
        return 1
    print(f"job id:         {submission.job_id}")
    print(f"run directory:  {run.root}")
    if not config.wait:
        print(f"follow rank 0:  tail -F {run.rank_log(0)}")
        print(f"then, analyse:  python -m hpcmm.analyze {run.root}")
        return 0
    from hpcmm.launch.follow import follow  # noqa: PLC0415 -- rich, which a submission alone does not need

    return follow(config, submission)


if __name__ == "__main__":
    sys.exit(main())
