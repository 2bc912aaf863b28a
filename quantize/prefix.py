"""Running a module on one batch again and again, each time changed from a later layer on, without what lies before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from pocketsam.quantize.hooks import Hook, hooked


class Prefix:
    """A module and a batch, with the results of the parts that were finished before the layer last asked for.

    Half of the work of asking for all layers. Of parts within a part that is finished nothing is kept, so of a
    transformer it is one map for each block.
    """

    def __init__(self, module: nn.Module, batch: Tensor) -> None:
        self._module, self._batch = module, batch
        parts = [part for part in module.modules() if part is not module]
        calls: Counter[nn.Module] = Counter()
        with hooked((part, "before", lambda part, _: calls.update([part])) for part in parts):
            module(batch)
        # A part that runs twice has no one result.
        self._parts = [part for part in parts if calls[part] == 1]
        self._known: dict[nn.Module, Any] = {}

    def run(self, first: nn.Module, hooks: Iterable[Hook]) -> Any:
        """What the module makes of the batch with hooks.

        Args:
            first: the part that runs before all others that hooks change; not before that of an earlier call.
        """
        reached = False

        def reach(part: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal reached
            reached = True

        def keep(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not reached:
                self._keep(part, output)

        looks: list[Hook] = [(first, "before", reach), *((part, "after", keep) for part in self._parts)]
        known = list(self._known)
        for part in known:
            part.forward = partial(_known, self._known[part])
        try:
            with hooked([*looks, *hooks]):
                return self._module(self._batch)
        finally:
            for part in known:
                del part.forward

    def _keep(self, part: nn.Module, output: Any) -> None:
        for inner in part.modules():
            self._known.pop(inner, None)
        self._known[part] = output


def _known(output: Any, *_: Any, **__: Any) -> Any:
    return output
