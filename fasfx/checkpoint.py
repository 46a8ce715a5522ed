"""Checkpoints: a folder with spike_config.json, graph.txt and model.safetensors. No pickle, no code.

`write` and `read` store a program of any level this way; its ledger and history stay behind, but for the names of
its passes. A converted network is stored as its calibrated program (level RANGED) with the original weights and the
sites' ranges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from fasfx.config import SpikeConfig
from fasfx.errors import CheckpointError, FasfxError
from fasfx.graph_text import parse, text
from fasfx.program import Site, facts
from fasfx.writing import written_beside

if TYPE_CHECKING:
    from fasfx.model import SpikingModel

FORMAT = 2  # 1 had no learned thresholds
SETTINGS, GRAPH, WEIGHTS = "spike_config.json", "graph.txt", "model.safetensors"
_RANGES = "fasfx.sites"
_PLAIN = ("name", "module", "channel", "signed", "fixed", "population", "dynamic", "lift")
_OF_SITES = ("peak", "tail", "moment", "theta", "tuned", "initial")  # tensors that a site holds


def save(model: SpikingModel, folder: Path) -> None:
    """Write a checkpoint beside the target, then rename: a crash or a full disk leaves what was there."""
    if (folder / WEIGHTS).exists() and not (folder / SETTINGS).exists():
        raise CheckpointError(f"{folder} holds a model that would be overwritten: choose another folder")
    with written_beside(folder) as staging:
        if model.config is not None:
            model.config.save_pretrained(staging)
        write(model.ranged, staging)


def write(gm: GraphModule, folder: Path) -> None:
    """Write a program into a folder that is there. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    program = facts(gm)
    tensors, aliases = _unique(_tensors(gm))
    for site in program.sites.values():
        tensors |= {
            f"{_RANGES}.{site.name}.{key}": t.contiguous() for key in _OF_SITES if (t := getattr(site, key)) is not None
        }
    (folder / GRAPH).write_text(text(gm), encoding="utf-8")
    try:
        save_file(tensors, folder / WEIGHTS)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    settings = {
        "format": FORMAT,
        "config": dataclasses.asdict(program.config),
        "constants": program.constants,
        "aliases": aliases,
        "centres": program.centres,
        "ranges": program.ranges,
        "trained": program.trained,
        "through_time": program.through_time,
        "tuned": program.tuned,
        "lifted": program.lifted,
        "tuning": program.tuning,
        "passed": program.passed,
        "sites": [_site_to_json(site) for site in program.sites.values()],
        "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def load(folder: Path) -> SpikingModel:
    """Read a converted network. Raises CheckpointError for a missing, truncated, foreign or newer one."""
    from transformers import AutoConfig

    from fasfx.model import SpikingModel

    ranged = read(folder)
    with _damage(folder):
        named = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["bytes"]
        return SpikingModel(ranged, AutoConfig.from_pretrained(folder) if "config.json" in named else None)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, where torch puts tensors and not where the file's bytes lie.

    The last bits of a product may hang on that.
    """
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(file).items()}


def read(folder: Path) -> GraphModule:
    """The program that `write` wrote. Raises CheckpointError."""
    if not (folder / SETTINGS).is_file():
        raise CheckpointError(f"{folder} is no fasfx checkpoint: it has no {SETTINGS}; make one with `fasfx convert`")
    with _damage(folder):
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        _check(folder, settings)
        tensors = read_tensors(folder / WEIGHTS)
        tensors |= {alias: tensors[name] for alias, name in settings["aliases"].items()}
        gm = parse((folder / GRAPH).read_text(encoding="utf-8"), tensors, SpikeConfig(**settings["config"]))
        facts(gm).constants = settings["constants"]
        facts(gm).ranges = {name: tuple(ends) for name, ends in settings.get("ranges", {}).items()}
        for name in ("centres", "trained", "through_time", "tuned", "lifted", "tuning"):
            setattr(facts(gm), name, settings.get(name, getattr(facts(gm), name)))
        facts(gm).before = settings.get("passed", [])
        token = facts(gm).config.granularity == "token"  # formats before 3 say so for the whole network
        sites = [{"dynamic": token and site["fixed"] is None} | site for site in settings["sites"]]
        facts(gm).sites = {site["name"]: _site_from_json(site, tensors) for site in sites}
    return gm


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever a damaged file causes, as one CheckpointError."""
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, FasfxError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"the checkpoint {folder} is damaged: {type(error).__name__}: {why}") from error


def _check(folder: Path, settings: dict[str, Any]) -> None:
    if settings["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {settings['format']}, this fasfx reads up to {FORMAT}: update fasfx"
        )
    for name, size in settings["bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise CheckpointError(f"{folder / name} has {found} bytes instead of {size}: the checkpoint is truncated")


def _tensors(gm: GraphModule) -> dict[str, Tensor]:
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _unique(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name without repeats, and alias -> name for tied ones."""
    kept: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key], kept[name] = (
                name,
                tensor.contiguous().clone() if not tensor.is_contiguous() else tensor,
            )
    return kept, aliases


def _site_to_json(site: Site) -> dict[str, Any]:
    return {key: getattr(site, key) for key in _PLAIN}


def _site_from_json(stored: dict[str, Any], tensors: dict[str, Tensor]) -> Site:
    ranges: dict[str, Any] = {key: tensors.get(f"{_RANGES}.{stored['name']}.{key}") for key in _OF_SITES}
    return Site(**(stored | {"channel": tuple(stored["channel"])}), **ranges)
