"""Ctrl-C and SIGTERM while a run trains: the step is finished, a checkpoint written, then it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from qlora_engine import distributed


class Interruptible(TrainerCallback):  # type: ignore[misc]
    """Ends a run of one process between two steps, with a checkpoint, when it is asked to.

    Several processes would have to agree on the step; they end at once, as torchrun wants it.

    Args:
        say: Called with what happens at the first signal; the second one ends the run at once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals over.

        Raises:
            KeyboardInterrupt: after the checkpoint, or at the second signal.
        """
        if distributed.world().size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("stopping after this step, with a checkpoint; once more: at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch that was cut short is not evaluated, and its checkpoint is written."""
        if self.asked:
            control.should_save = control.should_evaluate = False
