"""Opening a session on one execution provider, and on no other in its place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasfx.errors import ConfigError, RuntimeUnavailableError

if TYPE_CHECKING:
    import onnxruntime

CPU, CUDA, WEBGPU = "CPUExecutionProvider", "CUDAExecutionProvider", "WebGpuExecutionProvider"
PLUGIN = "onnxruntime_ep_webgpu"  # a package that brings WebGPU to the plain onnxruntime
IN_FLOAT = "1"  # else a CPU rounds counts in float to int8 once more, block by block, before they meet int8 weights
FOLDED = "session.disable_quant_qdq"  # "1": int8 weights and int32 biases become float once, not in every call
SLOW = "SkipLayerNormFusion"  # ONNX Runtime's fused sum and norm takes longer on a CPU than the two do


def session_options(threads: int | None) -> Any:
    """onnxruntime.SessionOptions with so many intra-op threads, which do not spin; None: ONNX Runtime's choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("optimization.disable_specified_optimizers", SLOW)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", IN_FLOAT)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(file: Path, device: str | None, options: Any) -> onnxruntime.InferenceSession:
    """A session of an ONNX file on a device: None or "cpu", "cuda", "webgpu".

    ONNX Runtime itself places what a GPU provider has no kernel for on the CPU: `OnnxModel.profile` tells.
    Raises ConfigError for another device, RuntimeUnavailableError if its provider or adapter is missing, and what
    ONNX Runtime raises for a file that it cannot read.
    """
    known = DEVICES.get(device or "cpu")
    if known is None:
        raise ConfigError(f"device={device!r}: choose {', '.join(DEVICES)}")
    provider, opener = known
    session = opener(file, options)
    session.disable_fallback()  # or a run that fails on a GPU would go on, and stay, on the CPU
    if provider not in session.get_providers():
        raise RuntimeUnavailableError(
            f"ONNX Runtime could not start {provider} and would run on {', '.join(session.get_providers())}: "
            "its log says why"
        )
    return session


def _on_cpu(file: Path, options: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(file, options, providers=[CPU])


def _on_cuda(file: Path, options: Any) -> Any:
    import onnxruntime as ort

    if CUDA not in (available := ort.get_available_providers()):
        raise RuntimeUnavailableError(
            f"this ONNX Runtime has no {CUDA} (it has {', '.join(available)}): install onnxruntime-gpu in its place"
        )
    options.add_session_config_entry(FOLDED, "1")  # CUDA has no integer products for them, and no kernel for the biases
    return ort.InferenceSession(file, options, providers=[CUDA, CPU])


def _on_webgpu(file: Path, options: Any) -> Any:
    import onnxruntime as ort

    devices = [device for device in _devices() if device.ep_name == WEBGPU]
    if not devices:
        raise RuntimeUnavailableError(f"{WEBGPU} finds no GPU: it needs a driver for Vulkan, Metal or Direct3D 12")
    options.add_provider_for_devices(devices[:1], {"enableInt64": "1"})
    try:
        return ort.InferenceSession(file, options)
    except Exception as error:
        if type(error).__name__ != "EPFail":
            raise
        raise RuntimeUnavailableError(f"{WEBGPU} does not start: {str(error).rpartition(chr(10))[2]}") from error


def _devices() -> Any:
    """ONNX Runtime's devices, the plug-in's among them; a library can be registered once in a process."""
    import onnxruntime as ort

    if not any(device.ep_name == WEBGPU for device in ort.get_ep_devices()):
        try:
            plugin = importlib.import_module(PLUGIN)
        except ImportError as error:
            raise RuntimeUnavailableError(f"{WEBGPU} is missing: pip install onnxruntime-ep-webgpu") from error
        ort.register_execution_provider_library(PLUGIN, plugin.get_library_path())
    return ort.get_ep_devices()


Opener = Callable[[Path, Any], Any]
DEVICES: dict[str, tuple[str, Opener]] = {
    "cpu": (CPU, _on_cpu),
    "cuda": (CUDA, _on_cuda),
    "webgpu": (WEBGPU, _on_webgpu),
}
