"""The ways to run a step: as it is, all runs and directions at once, compiled, or both."""

from __future__ import annotations

import copy
import logging

from torch import nn
from typing_extensions import Self

from lightning_dtda.replay.compiled import CompiledAlone, CompiledStack
from lightning_dtda.replay.eager import Eager
from lightning_dtda.replay.stacked import Stacked

_log = logging.getLogger(__name__)


class Ways:
    """The implementations of a module's steps, and which of them is in use.

    Args:
        eager: The implementation that works for all steps, and that the others are compared with.
    """

    def __init__(self, eager: Eager) -> None:
        self.eager = eager
        self.stacked = Stacked(eager)
        self._compiled = {True: CompiledStack(eager), False: CompiledAlone(eager)}
        self.is_stacked, self.is_compiled = False, False

    @property
    def chosen(self) -> Eager:
        """The implementation in use."""
        if self.is_compiled:
            return self._compiled[self.is_stacked]
        return self.stacked if self.is_stacked else self.eager

    @property
    def has_compiled(self) -> bool:
        """Whether any step was compiled."""
        return self._compiled[self.is_stacked].has_compiled

    def stack(self, stacked: bool) -> Self:
        """Return the same implementations, of which the stacked one is used or not."""
        other = copy.copy(self)
        other.is_stacked = stacked
        return other

    def compile(self, compiled: bool) -> Self:
        """Return the same implementations, of which the compiled one is used or not; never for recurrent layers."""
        module = self.eager.replica.module
        is_recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
        if compiled and is_recurrent:
            _log.info(
                "Steps of %s are not compiled: each time step of its recurrent layers would be compiled by itself, "
                "which takes longer than it saves.",
                type(module).__name__,
            )
        other = copy.copy(self)
        other.is_compiled = compiled and not is_recurrent
        return other
