"""Updates after every step of an optimizer, by torch's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Attached(RemovableHandle):
    """The handle of hooks around an optimizer's steps.

    Args:
        optimizer: the optimizer, or a wrapper such as Accelerate's around one.
        before: called before every step, and when the handle is removed.
        after: called after every step that was not skipped.

    Raises:
        TypeError: ``optimizer`` without step hooks.
    """

    def __init__(
        self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        inner = hooked(optimizer)

        def after_step(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            # A fused optimizer is called for skipped steps too, with the scaler's verdict on it.
            found_inf = getattr(stepped, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                after()

        super().__init__(inner._optimizer_step_post_hooks)
        inner._optimizer_step_post_hooks[self.id] = after_step
        self._before = inner.register_step_pre_hook(lambda *_: before())
        self._release = before

    def remove(self) -> None:
        """End the updates."""
        super().remove()
        self._before.remove()
        self._release()


def hooked(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with hooks inside wrappers that have none.

    Raises:
        TypeError: there is none.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"attach() needs a torch.optim.Optimizer, but got {type(optimizer).__name__}. "
                "Call update() after its step instead."
            )
        optimizer = inner
    return optimizer
