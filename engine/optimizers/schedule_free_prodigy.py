"""Prodigy with schedule-free averaging; its library is imported only by runs that use it."""

from __future__ import annotations

from typing import Any

from pytorch_optimizer import ScheduleFreeWrapper
from torch.optim import Optimizer


class ScheduleFreeProdigy(ScheduleFreeWrapper):  # type: ignore[misc]
    """Prodigy with schedule-free averaging, as one optimizer with one state: that of Prodigy, and z in it.

    The library's wrapper keeps two; whoever copies, undoes or saves `state` would miss one of them. The share of each
    step in the average follows lr · d, so that the steps before d is found hardly count.
    """

    def __init__(self, prodigy: Optimizer) -> None:
        """Wrap a Prodigy without momentum of its own; its groups remember β as `momentum`."""
        super().__init__(prodigy)
        self.train_mode = True
        for group in self.param_groups:
            group["momentum"] = self.momentum

    @property
    def state(self) -> Any:
        """Prodigy's own state, with z for each weight."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore the state that the wrapper would begin for itself."""

    def state_dict(self) -> dict[str, Any]:
        """Return Prodigy's state, which has all there is."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.optimizer.load_state_dict(state_dict)

    def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
        """Begin the state of weights that have none, Prodigy's first: it takes an empty one for a sign to do so."""
        inner: Any = self.optimizer
        inner.init_group(group)
        super().init_group(group, **kwargs)
