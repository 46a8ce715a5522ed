"""Whether a spiking layer does anything: it may never fire, always fire, or only copy the spikes it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fasfx.errors import LivenessError
from fasfx.runtime.counting import Sent

NEVER, ALWAYS, COPIES = "never fires", "always fires", "only copies"
MOST = 5  # sites that an error names


def problems(sent: Mapping[str, Sequence[Sent]], upstream: Mapping[str, set[str]]) -> dict[str, str]:
    """Site -> what is wrong with it, for those that carry no information of their own.

    never fires:  no spike in any step.
    always fires: every neuron sends the same spikes, whatever it is given, as one does that is always at its threshold.
    only copies:  it sends the counts of the site before it, one by one.
    sent: for every site, what it sent for each batch.   upstream: the sites before it with no other in between.
    """
    found = {}
    for site, batches in sent.items():
        low = torch.stack([torch.cat(one.low) for one in batches]).amin(0)
        high = torch.stack([torch.cat(one.high) for one in batches]).amax(0)
        if torch.equal(low, high):
            found[site] = ALWAYS if bool(high.any()) else NEVER
            continue
        digests = [one.digest.digest() for one in batches]
        for other in sorted(upstream[site]):
            if digests == [one.digest.digest() for one in sent[other]]:
                found[site] = f"{COPIES} {other}"
    return found


def require_alive(found: Mapping[str, str], modules: Mapping[str, str]) -> None:
    """Raise LivenessError naming up to five sites that carry no information of their own."""
    if found:
        listed = "\n  ".join(
            f"{site} in {modules[site] or 'the model'} {what}" for site, what in [*found.items()][:MOST]
        )
        more = f"\n  and {len(found) - MOST} more" if len(found) > MOST else ""
        raise LivenessError(
            f"strict=True and {len(found)} sites carry no information on these batches:\n  {listed}{more}\n"
            "Measure on more batches; if it stays, calibrate on data like these, or leave the module out with skip"
        )
