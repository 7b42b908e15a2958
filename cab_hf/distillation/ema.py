"""An exponential moving average of the student, kept beside its training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback


class MovingAverage(TrainerCallback):
    """Averages a student's parameters after every optimizer step: `average = decay * average + (1 - decay) * new`.

    The average is float32 at least: in half precision the steps of a slow average would be rounded away. Parameters
    that are frozen when training starts are their own average, and are not kept twice.

    Args:
        student: the model that is trained; the average starts as its copy when training starts.
        decay: in [0, 1); 0.99996 is the paper's for images (arXiv 2510.19266, released code).
    """

    def __init__(self, student: nn.Module, decay: float):
        self.student = student
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._update = get_ema_multi_avg_fn(decay)

    @property
    def has_started(self) -> bool:
        return bool(self._average)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self.has_started:
            self._start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        parameters = dict(self.student.named_parameters())
        new = [parameters[name].detach().to(average.dtype) for name, average in self._average.items()]
        self._update(list(self._average.values()), new, None)

    def _start(self) -> None:
        self._average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.student.named_parameters()
            if p.requires_grad
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by their names in the student, on the CPU; a tied one once, a frozen one not."""
        return {name: average.cpu().contiguous() for name, average in self._average.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Goes on from a saved average.

        Raises:
            ValueError: parameters that are missing, or that the student lacks.
        """
        self._start()
        if self._average.keys() != state_dict.keys():
            differing = sorted(self._average.keys() ^ state_dict.keys())
            raise ValueError(
                f"The saved average is of another student: {len(differing)} parameters differ, such as "
                f"{differing[:3]}. Resume with the recipe that wrote the checkpoint."
            )
        for name, average in self._average.items():
            average.copy_(state_dict[name])

    @contextmanager
    def in_place_of(self, student: nn.Module) -> Iterator[None]:
        """Gives the student the averaged parameters, in its dtypes, for the time of the block."""
        parameters = dict(student.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self._average}
        _copy(self._average, parameters)
        try:
            yield
        finally:
            _copy(kept, parameters)


@torch.no_grad()
def _copy(values: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """In place: optimizers, wrappers and CUDA graphs hold the parameters."""
    for name, value in values.items():
        parameters[name].copy_(value)


__all__ = ["MovingAverage"]
