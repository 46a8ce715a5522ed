"""Calibration batches: checked one by one as they stream, or made from what the model brings along."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasfx.capture import is_hugging_face, labels_of, parameters_of, takes_any
from fasfx.devices import device_of, moved
from fasfx.errors import CalibrationError, InputError

Batch = dict[str, Any]
NUM_TEXTS_PER_BATCH = 8
# For a folder with only a config, AutoTokenizer makes an empty tokenizer; one of these tells a real one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
NUM_RANDOM_BATCHES = 4


def first_and_all(model: nn.Module, calibration: Iterable[Any] | None) -> tuple[Batch, Iterator[Batch], int | None]:
    """(the batch to capture with, every batch in order, how many there are if that is known).

    Batches are dicts of model inputs; a tensor or tuple is bound to the names of the model's forward.
    Raises CalibrationError for an empty or unusable calibration, InputError for a batch unlike the first.
    """
    batches = default_batches(model) if calibration is None else calibration
    if isinstance(batches, Mapping | Tensor | str):
        raise CalibrationError(
            f"calibration is one {type(batches).__name__}; pass a list of batches: calibration=[batch, ...]"
        )
    total = len(batches) if isinstance(batches, Sized) else None
    stream = (as_batch(model, batch) for batch in batches)
    first = next(stream, None)
    if first is None:
        raise CalibrationError("the calibration data holds no batches: pass at least one dict of model inputs")
    names = parameters_of(model)
    if (is_hugging_face(model) or not takes_any(model)) and (unknown := sorted(set(first) - set(names))):
        raise InputError(
            f"calibration batch 0 has {', '.join(unknown)}: {type(model).__name__} takes {', '.join(names)}"
        )
    first = {name: first[name] for name in sorted(first, key=[*names, *first].index)}  # as positional arguments
    return first, _checked(first, itertools.chain([first], stream)), total


def as_batch(model: nn.Module, batch: Any) -> Batch:
    """A batch as a plain dict of inputs by name, without labels: only a loss reads them."""
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in labels_of(model)}
    if isinstance(batch, list | tuple) and all(isinstance(value, Tensor) for value in batch):
        return dict(zip(parameters_of(model), batch, strict=False))
    raise CalibrationError(
        f"a calibration batch is a {type(batch).__name__}: pass dicts of model inputs, such as a tokenizer's output "
        f"(return_tensors='pt'); {type(model).__name__} takes {', '.join(parameters_of(model)[:6])}"
    )


def _checked(first: Batch, batches: Iterator[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        check_batch(batch, first, f"calibration batch {number}")
        yield {name: batch[name] for name in first if isinstance(first[name], Tensor)}


def check_batch(batch: Mapping[str, Any], like: Mapping[str, Any], what: str) -> None:
    """Raise InputError unless a batch has the names, dtypes and ranks of another, and no NaN."""
    if missing := sorted(set(like) - set(batch)):
        raise InputError(f"{what} lacks {', '.join(missing)}: every batch needs {', '.join(like)}")
    if extra := sorted(set(batch) - set(like)):
        raise InputError(f"{what} has {', '.join(extra)}, which the first batch has not: it has {', '.join(like)}")
    for name, wanted in like.items():
        value = batch[name]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise InputError(f"{what}: {name} is a {type(value).__name__}, not a tensor")
        if value.dtype != wanted.dtype or value.dim() != wanted.dim():
            raise InputError(
                f"{what}: {name} is {value.dtype} of rank {value.dim()}, in the first batch it is "
                f"{wanted.dtype} of rank {wanted.dim()}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(f"{what}: {name} holds NaN or infinity")


# --- when the user passes nothing ------------------------------------------------------------------------


def default_batches(model: nn.Module) -> list[Batch]:
    """A text model whose tokenizer is beside it gets shipped public-domain sentences; others inputs from the config.

    Raises CalibrationError for a model that is not a Hugging Face one, or whose inputs the config does not tell.
    """
    if not is_hugging_face(model):
        raise CalibrationError(
            f"{type(model).__name__} is no Hugging Face model: pass calibration=[example inputs, ...]"
        )
    if model.main_input_name == "input_ids" and (tokenizer := tokenizer_beside(str(model.name_or_path))) is not None:
        return [moved(batch, device_of(model)) for batch in text_batches(model, tokenizer, sentences())]
    warnings.warn(
        f"no calibration data: thresholds of {type(model).__name__} come from random inputs and will not fit "
        "real ones; pass calibration=[a few batches of real inputs]",
        stacklevel=5,
    )
    return [moved(_random_batch(model, seed), device_of(model)) for seed in range(NUM_RANDOM_BATCHES)]


def sentences() -> list[str]:
    """The public-domain sentences shipped with fasfx."""
    lines = resources.files("fasfx.data").joinpath("calibration.txt").read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def text_batches(model: nn.Module, tokenizer: Any, texts: list[str], length: int | None = None) -> list[Batch]:
    """Texts as batches of the model's inputs, padded, cut at `length` tokens or where the model ends."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = min(length or 512, getattr(model.config, "max_position_embeddings", None) or 512)
    names = parameters_of(model)
    batches = []
    for start in range(0, len(texts), NUM_TEXTS_PER_BATCH):
        chunk = texts[start : start + NUM_TEXTS_PER_BATCH]
        tokens = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        batch = {name: value for name, value in tokens.items() if name in names}
        batches.append(batch | _decoder_inputs(model, batch["input_ids"]) | without_cache(model))
    return batches


def without_cache(model: nn.Module) -> Batch:
    """use_cache=False where the model takes it: a key-value cache is no output of a spiking network."""
    cached = getattr(getattr(model, "config", None), "use_cache", None) and "use_cache" in parameters_of(model)
    return {"use_cache": False} if cached else {}


def tokenizer_beside(source: str) -> Any | None:
    """The tokenizer in a model's folder or hub repository, or None if there is none."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if not source or (folder.is_dir() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES)):
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError):
        return None


def _decoder_inputs(model: nn.Module, input_ids: Tensor) -> Batch:
    config: Any = model.config
    if not config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": input_ids[:, : max(2, input_ids.shape[1] // 2)]}


def _random_batch(model: nn.Module, seed: int) -> Batch:
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_ids":
        limit = min(11, getattr(config, "max_position_embeddings", None) or 11)
        ids = torch.randint(0, config.get_text_config().vocab_size, (3, limit), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return batch | _decoder_inputs(model, ids) | without_cache(model)
    if model.main_input_name == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        return {"pixel_values": torch.randn(3, getattr(config, "num_channels", 3), size, size, generator=generator)}
    raise CalibrationError(
        f"fasfx cannot tell the inputs of {type(model).__name__} from its config: "
        "pass calibration=[example inputs, ...]"
    )
