"""An exponential moving average of the student, kept beside its training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback


class MovingAverage(TrainerCallback):
    """Averages a student's parameters after every optimizer step: `average = decay * average + (1 - decay) * new`.

    Args:
        student: the model that is trained; the average starts as its copy when training starts.
        decay: in [0, 1); 0.99996 is the paper's for images (arXiv 2510.19266, released code).
    """

    def __init__(self, student: nn.Module, decay: float):
        self.student = student
        self.decay = decay
        self._average: AveragedModel | None = None

    @property
    def has_started(self) -> bool:
        return self._average is not None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self._average is None:
            self._start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._average.update_parameters(self.student)

    def _start(self) -> None:
        self._average = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self._average.update_parameters(self.student)  # the first update copies

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by their names in the student, on the CPU; a tied one once."""
        return {name: p.detach().cpu().contiguous() for name, p in self._average.module.named_parameters()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Goes on from a saved average.

        Raises:
            ValueError: parameters that are missing, or that the student lacks.
        """
        self._start()
        parameters = dict(self._average.module.named_parameters())
        if parameters.keys() != state_dict.keys():
            differing = sorted(parameters.keys() ^ state_dict.keys())
            raise ValueError(
                f"The saved average is of another student: {len(differing)} parameters differ, such as "
                f"{differing[:3]}. Resume with the recipe that wrote the checkpoint."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state_dict[name])

    @contextmanager
    def in_place_of(self, student: nn.Module) -> Iterator[None]:
        """Exchanges the student's parameters with the averaged ones for the time of the block."""
        self._exchange(student)
        try:
            yield
        finally:
            self._exchange(student)

    @torch.no_grad()
    def _exchange(self, student: nn.Module) -> None:
        for own, averaged in zip(student.parameters(), self._average.module.parameters(), strict=True):
            kept = own.clone()
            own.copy_(averaged)
            averaged.copy_(kept)


__all__ = ["MovingAverage"]
