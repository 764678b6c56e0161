"""What a pipeline asks of the compiled step over the state table: model/step.py does it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StepInputs, StepOutputs


class Engine(Protocol):
    """One network's step, and the rows that it steps, by slot."""

    def step(self, inputs: StepInputs) -> StepOutputs: ...
    def undo(self) -> None: ...
    def read(self, slots: NDArray[np.int32]) -> NDArray[np.float32]: ...
    def write(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None: ...
