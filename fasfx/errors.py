"""Errors a user can meet. Each names what is wrong, where, and what to do next."""

from __future__ import annotations


class FasfxError(Exception):
    """Base of every error fasfx raises on purpose; the command line answers it with exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


class ConfigError(FasfxError, ValueError):
    """A SpikeConfig field has a value that fasfx cannot use."""


class CaptureError(FasfxError):
    """torch.export could not turn the model into a graph."""


class InputError(FasfxError, ValueError):
    """A batch does not fit the model: a missing or extra name, a wrong dtype or rank."""


class CalibrationError(FasfxError, ValueError):
    """The calibration data cannot give thresholds: empty, NaN, or not the model's inputs."""


class DataError(FasfxError, ValueError):
    """A file of texts cannot be used: not readable, no texts, no labels, one class only; names the file and line."""


class LevelError(FasfxError):
    """A pass left a graph that is not at the level it promised; names the pass and the nodes."""


class RewriteError(FasfxError):
    """A rewrite rule is malformed, or its replacement does not fit the graph."""


class PromiseError(FasfxError):
    """A pass broke what it promises; names the pass and the nodes."""


class GraphTextError(FasfxError, ValueError):
    """A graph text cannot be parsed; names the line."""


class CoverageError(FasfxError):
    """`strict=True` and some multiply-accumulate work is not driven by spikes."""


class LivenessError(FasfxError):
    """`strict=True` and a site never fires, always fires or only copies another."""


class CheckpointError(FasfxError):
    """A checkpoint folder is missing, truncated, from a newer format, or cannot be written."""


class RuntimeUnavailableError(FasfxError):
    """An execution provider or package that the call needs is not there."""


class MissingDataError(FasfxError):
    """A benchmark or demo needs a package with weights or texts; names the pip command."""
