"""The passes in order: PIPELINE is the table of contents. One pass per file."""

from __future__ import annotations

if __name__ != "fasfx.passes":
    raise ImportError("import fasfx.passes, not passes: the folder is mapped into the fasfx package")

from fasfx.passes.centre import Centre
from fasfx.passes.clip import Clip
from fasfx.passes.fold import Fold
from fasfx.passes.lower import Lower
from fasfx.passes.normalise import Normalise
from fasfx.passes.observe import Observe
from fasfx.passes.rotate import Rotate
from fasfx.passes.round import Round
from fasfx.passes.smooth import Smooth
from fasfx.passes.substitute import Substitute
from fasfx.runner import Pass

PIPELINE: tuple[type[Pass], ...] = (
    Normalise,
    Rotate,
    Centre,
    Observe,
    Smooth,
    Round,
    Clip,
    Substitute,
    Fold,
    Lower,
)

__all__ = [
    "PIPELINE",
    "Centre",
    "Clip",
    "Fold",
    "Lower",
    "Normalise",
    "Observe",
    "Rotate",
    "Round",
    "Smooth",
    "Substitute",
]
