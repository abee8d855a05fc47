"""What to try against each kind of loss: an override of this project's configuration, or a shell line.

Each is explained in ``docs/bottlenecks.md`` under the name of its kind.
"""

from __future__ import annotations

import shlex
from typing import Any

from hpcmm.analysis.findings import Finding


def suggest(finding: Finding, config: dict[str, Any]) -> str:  # noqa: PLR0911 -- one answer a kind
    """One override or command for ``finding``; ``config`` is the run's own configuration, as far as it is known."""
    match finding.kind:
        case "data":
            return f"data.num_workers={max(2, 2 * _number(config, 'data', 'num_workers', 0))}"
        case "compute" if finding.node:
            return f"cluster.exclude={finding.node}"
        case "stall":
            return f"srun -w {shlex.quote(finding.node)} dmesg -T | grep -iE 'throttl|oom|hung|link'"
        case "checkpoint":
            return f"train.checkpoint_every={max(4 * _number(config, 'train', 'checkpoint_every', 0), 100)}"
        case "subprocess":
            return "grep 'within step' analysis/waitpid.csv"
        case "transfer":
            # Fewer synchronisations a sample; it costs nothing but memory for the accumulated gradients.
            return f"train.gradient_accumulation_steps={2 * _number(config, 'train', 'gradient_accumulation_steps', 1)}"
        case "imbalance":
            return f"cluster.cpus_per_rank={_number(config, 'cluster', 'cpus_per_rank', 1) + 1}"
        case _:
            return f"train.log_every={max(4 * _number(config, 'train', 'log_every', 10), 50)}"


def _number(config: dict[str, Any], section: str, key: str, default: int) -> int:
    value = config.get(section)
    value = value.get(key, default) if isinstance(value, dict) else default
    return value if isinstance(value, int) and not isinstance(value, bool) else default
