"""Running spiking networks: spike trains and ONNX Runtime."""

from __future__ import annotations

if __name__ != "fasfx.runtime":
    raise ImportError("import fasfx.runtime, not runtime: the folder is mapped into the fasfx package")

from fasfx.runtime.kernels import missing_kernels
from fasfx.runtime.onnx import OnnxModel
from fasfx.runtime.raster import raster
from fasfx.runtime.spikes import SpikeTrain
from fasfx.runtime.ticks import NetworkState, Settled

__all__ = ["NetworkState", "OnnxModel", "Settled", "SpikeTrain", "missing_kernels", "raster"]
