"""Three countings of energy, as data: each with its formula and its source.

Every quantity is a column of fasfx.energy's table: what one operator does for all batches together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fasfx.config import SpikeConfig
from fasfx.ops import CODES

if TYPE_CHECKING:
    from pandas import DataFrame, Series

MAC, AC = 4.6, 0.9  # pJ in float32: a multiplication (3.7) and an addition, and the addition alone
MULTIPLY_8, ADD_8 = 0.2, 0.03  # pJ in int8
MEMORY = 12.5  # pJ for a byte: 100 pJ for 64 bits from a memory of 1 MB
FLOAT, POTENTIAL = 4, 4  # bytes of a float32 number and of a membrane potential
HOROWITZ = "Horowitz, ISSCC 2014 (45 nm)"


@dataclass(frozen=True)
class Counting:
    """One way to count.

    formula: of the original network, and of the spiking one.
    original, spiking, left: (table, bits) -> pJ of every row; left is the part of `spiking` that no spike drives.
    """

    name: str
    formula: tuple[str, str]
    source: str
    original: Callable[[DataFrame, int], Series]
    spiking: Callable[[DataFrame, int], Series]
    left: Callable[[DataFrame, int], Series]


def bits_of(config: SpikeConfig) -> int:
    """Bits, to the nearest whole number, of the uniform quantiser that errs as much as the neurons of a value.

    One of b bits has 2^b - 1 values on [-theta, theta], so it errs by at most theta / (2^b - 2).
    """
    bound = CODES[config.code].error_bound(1.0, config.steps, config.levels)
    return round(math.log2(1 / bound + 2))


def mac(bits: int) -> float:
    """pJ of an integer multiply-accumulate: a multiplier grows with the square of its bits, an adder with them."""
    return MULTIPLY_8 * (bits / 8) ** 2 + ac(bits)


def ac(bits: int) -> float:
    """pJ of an integer accumulate."""
    return ADD_8 * bits / 8


def _float(table: DataFrame) -> Series:
    """Multiply-accumulates and functions that the spiking network computes in float."""
    return table["float_macs"] + table["float_functions"]


def _quantised(table: DataFrame, bits: int) -> Series:
    in_float = table["float_macs"] + table["functions"]
    return mac(bits) * (table["macs"] - table["float_macs"]) + MAC * in_float


def _traffic(table: DataFrame, bits: int) -> Series:
    """pJ for the original's weights, one for every multiply-accumulate, and for values, written once and read once."""
    number = bits / 8
    integers = number * (table["macs"] - table["float_macs"]) + 2 * number * table["values"]
    return MEMORY * (integers + FLOAT * table["float_macs"])


def _spiking_traffic(table: DataFrame, bits: int) -> Series:
    """pJ for weights, one for every accumulate, and for potentials, read and written by every neuron in every step."""
    spikes = bits / 8 * table["acs"] + 2 * POTENTIAL * table["neuron_steps"]
    return MEMORY * (spikes + FLOAT * table["float_macs"])


COUNTINGS = (
    Counting(
        "papers",
        ("4.6 macs", "0.9 acs + 4.6 float_macs"),
        f"{HOROWITZ}; the convention of FAS, arXiv 2502.04405, and most papers: functions in float cost nothing",
        original=lambda table, bits: MAC * table["macs"],
        spiking=lambda table, bits: AC * table["acs"] + MAC * table["float_macs"],
        left=lambda table, bits: MAC * table["float_macs"],
    ),
    Counting(
        "quantised",
        (
            "(0.2 (b/8)^2 + 0.03 b/8) (macs - float_macs) + 4.6 (float_macs + functions)",
            "0.03 b/8 acs + 4.6 (float_macs + float_functions)",
        ),
        f"{HOROWITZ}: 0.23 and 0.03 pJ at b = 8; the original quantised to the spikes' own precision of b bits, its "
        "functions in float: one float multiply-accumulate for every value they give, which is the least they cost",
        original=_quantised,
        spiking=lambda table, bits: ac(bits) * table["acs"] + MAC * _float(table),
        left=lambda table, bits: MAC * _float(table),
    ),
    Counting(
        "memory",
        (
            "quantised + 12.5 (b/8 (macs - float_macs) + 2 b/8 values + 4 float_macs)",
            "quantised + 12.5 (b/8 acs + 8 neuron_steps + 4 float_macs)",
        ),
        f"{HOROWITZ}: 100 pJ for 64 bits from 1 MB of SRAM; every operation reads its weight, every value is written "
        "and read once, every neuron reads and writes its potential of 4 bytes in every step (as in SpikingJelly 2)",
        original=lambda table, bits: _quantised(table, bits) + _traffic(table, bits),
        spiking=lambda table, bits: ac(bits) * table["acs"] + MAC * _float(table) + _spiking_traffic(table, bits),
        left=lambda table, bits: MAC * _float(table) + MEMORY * FLOAT * table["float_macs"],
    ),
)
