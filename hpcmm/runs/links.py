"""What the links of a run's nodes carried, lost and held back while it ran: one JSON file a node, `links/NODE.json`.

The first rank of each node writes it, as :func:`hpcmm.node.links.sample` has it before the rank starts and after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcmm.errors import HpcmmError
from hpcmm.files import names_in, read_json_object, write_json
from hpcmm.runs.run_dir import RunDir

_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,252})\.json")
_MOST_NODES = 10_000
_MOST_BYTES = 1 << 18
_MOST_LINKS = 256
_LARGEST = 1 << 62


@dataclass(frozen=True)
class LinkUse:
    """The link of a node that carried most while the run ran; 0 is not known, or did not happen."""

    name: str
    mbit_per_s: int
    """What the hardware says of itself."""
    bytes: int
    """Sent and received."""
    lost: int
    """Packets with errors, or dropped, on the link or in its queue."""
    held_back: int
    """How often its queue had a packet wait for a shaper."""
    queue: str


@dataclass(frozen=True)
class Network:
    """What is known of the network between a run's nodes beside what the ranks' reports tell."""

    links: Mapping[str, LinkUse] = field(default_factory=dict)
    """By node."""
    measured_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """By node, the bus bandwidth of its best pair when the nodes were checked before the run."""


def write_links(run: RunDir, node: str, start: Mapping[str, Any], end: Mapping[str, Any] | None = None) -> None:
    """Samples before and after the node's first rank.

    A node that cannot write, or whose name no file has, leaves none.
    """
    if _FILE.fullmatch(f"{node}.json"):
        try:
            run.links.mkdir(exist_ok=True)
            write_json(run.links / f"{node}.json", {"start": start} if end is None else {"start": start, "end": end})
        except (OSError, HpcmmError) as error:  # no reason for the rank to fail
            print(f"hpcmm: the use of {node}'s links is not recorded: {error}", flush=True)


def read_network(run: RunDir) -> Network:
    """Files that are missing or damaged leave their part empty."""
    found = {}
    for name in sorted(names_in(run.links, within=run.root, most=_MOST_NODES)):
        if (match := _FILE.fullmatch(name)) and (use := _busiest(run, name)):
            found[match[1]] = use
    rates = read_json_object(run.preflight, within=run.root).get("all_reduce_bytes_per_s")
    known = rates.items() if isinstance(rates, dict) else ()
    return Network(
        found, {node: float(rate) for node, rate in known if isinstance(rate, (int, float)) and 0 < rate < _LARGEST}
    )


def _busiest(run: RunDir, name: str) -> LinkUse | None:
    samples = read_json_object(run.links / name, _MOST_BYTES, within=run.root)
    before, after = (_links_of(samples.get(each)) for each in ("start", "end"))
    uses = [_use(link, before[link], after.get(link, before[link])) for link in sorted(before)[:_MOST_LINKS]]
    return max(uses, key=lambda use: (use.bytes, use.mbit_per_s), default=None)


def _links_of(sample: object) -> dict[str, dict[str, Any]]:
    links = sample.get("links") if isinstance(sample, dict) else None
    found = links.items() if isinstance(links, dict) else ()
    return {name: facts for name, facts in found if isinstance(facts, dict)}


def _use(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> LinkUse:
    def more(*keys: str) -> int:
        return sum(max(0, _count(after.get(key)) - _count(before.get(key))) for key in keys)

    queue = before.get("queue")
    return LinkUse(
        name=name,
        mbit_per_s=_count(before.get("mbit_per_s")),
        bytes=more("rx_bytes", "tx_bytes"),
        lost=more("rx_errors", "tx_errors", "rx_dropped", "tx_dropped", "queue_dropped"),
        held_back=more("held_back"),
        queue=queue if isinstance(queue, str) else "",
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST else 0
