"""Copies of networks that hold programs."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

from torch import nn

from fasfx.errors import CheckpointError


class Programmed(nn.Module):
    """A module that holds programs. It can be copied, and not pickled: unpickled graphs lose what is known of nodes."""

    instead: ClassVar[str]  # of pickling

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CheckpointError(f"a {type(self).__name__} cannot be pickled: {self.instead}")
