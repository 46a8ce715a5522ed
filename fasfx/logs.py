"""What the passes tell while they work: FASFX_LOGS=passes,+rules,-declined, in the style of TORCH_LOGS.

A name shows that channel, a + before it shows more, a - only errors; `all` stands for every channel.
"""

from __future__ import annotations

import logging
import os

from fasfx.errors import ConfigError

VARIABLE = "FASFX_LOGS"
CHANNELS = {
    "passes": "each pass: level, time and nodes; + the program after it",
    "rules": "each application of a rule: pass, rule, node; + the line of the model",
    "declined": "each rule that matched and did not rewrite, and why",
    "levels": "each level that was checked; + every check",
}
_MARKS = {"+": logging.DEBUG, "-": logging.ERROR}


def channel(name: str) -> logging.Logger:
    """The logger of one of CHANNELS, an ordinary one of the standard library: `fasfx.<name>`."""
    assert name in CHANNELS
    return logging.getLogger(f"fasfx.{name}")


def configure(settings: str) -> None:
    """Show the channels that the settings name, on stderr. Raises ConfigError for an unknown name."""
    levels: dict[str, int] = {}
    for word in filter(None, settings.replace(" ", "").split(",")):
        level, name = _MARKS.get(word[0], logging.INFO), word.lstrip("+-")
        if name not in CHANNELS and name != "all":
            raise ConfigError(
                f"{VARIABLE}={settings!r}: there is no log {name!r}: choose among {', '.join(CHANNELS)} and all; "
                "+name shows more, -name only errors"
            )
        levels |= dict.fromkeys(CHANNELS, level) if name == "all" else {name: level}
    root = logging.getLogger("fasfx")
    if levels and not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        root.addHandler(handler)
    for name, level in levels.items():
        channel(name).setLevel(level)


configure(os.environ.get(VARIABLE, ""))
