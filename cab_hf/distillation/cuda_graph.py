"""A training step that the host starts with one call: teacher, student and backward pass as a CUDA graph."""

import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.utils import logging

from cab_hf.models.decoding import capturing


logger = logging.get_logger(__name__)

WARM_UP_STEPS = 3
BUCKET_BYTES = 2**28
"""Of gradients that travel together: far more than a message costs, far less than all gradients of a large model."""


@torch.no_grad()
def sum_over_processes(gradients: list[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Adds up gradients over all processes, in place.

    Behind a CUDA graph, and not inside of it beside the backward pass, they come as a few large messages.

    Args:
        gradients: of any shapes, the same ones in the same order on every process.
        bucket_bytes: how much is copied together and sent at once. A larger tensor is sent as it is.
    """
    for bucket in _buckets(gradients, bucket_bytes):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            torch.distributed.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket)])


def _buckets(gradients: list[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = sum(one.nbytes for one in bucket) + gradient.nbytes
        if bucket and (size > bucket_bytes or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


class GraphedStep:
    """Captures forward and backward passes of batches of one shape, and replays them.

    A small model's step is bound by the host, which launches thousands of kernels; a graph launches them all at once.
    A step that can't be captured runs without a graph, with a warning.

    Args:
        model: the trained module, without DDP around it.
        distil: `(model, inputs, weights, active, counts) -> DistillationOutput`, everything up to the loss.
        accumulates: whether several calls add up their gradients before an optimizer step.

    Raises:
        ValueError: when batches have other shapes than the first one.
    """

    def __init__(self, model: nn.Module, distil: Callable, accumulates: bool):
        self.model = model
        self.distil = distil
        self.accumulates = accumulates
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shapes: dict[str, torch.Size] | None = None
        self.active: frozenset[str] | None = None

    def __call__(
        self, inputs: dict[str, Tensor], weights: Tensor, active: frozenset[str], counts: Tensor, reduces: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Leaves gradients in the parameters; returns loss and parts, which the next call overwrites.

        With `reduces` the gradients are then added up over all processes.
        """
        shapes = {name: value.shape for name, value in inputs.items()}
        if self.shapes is not None and shapes != self.shapes:
            raise ValueError(
                f"`cuda_graph=True` needs batches of one shape; the first had {self.shapes}, this one has {shapes}. "
                "Use packed blocks with `dataloader_drop_last=True`, or set `cuda_graph=False`."
            )
        if active != self.active:
            self.shapes, self.active = shapes, active
            self._capture(inputs, weights, counts)
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.weights.copy_(weights, non_blocking=True)
        self.counts.copy_(counts, non_blocking=True)
        if self.graph is None:
            self._run_again()
        else:
            self.graph.replay()
        self._hand_over_gradients()
        if reduces:
            sum_over_processes([one.grad for one in self.parameters if one.grad is not None])
        return self.loss, self.parts

    def _capture(self, inputs: dict[str, Tensor], weights: Tensor, counts: Tensor) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.weights, self.counts = weights.clone(), counts.clone()
        earlier = [parameter.grad for parameter in self.parameters]
        # What is left of an earlier forward pass ties parameters to its stream, where nothing can be captured.
        gc.collect()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP_STEPS):
                self._clear_gradients()
                self._run()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._clear_gradients()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with capturing(self.graph):
                self.loss, self.parts = self._run()
        except Exception as error:  # what could run has just run
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            logger.warning(
                f"`cuda_graph` is True, but the step can't be captured ({reason}). It runs without a graph."
            )
            self.graph = None
        self.gradients = [parameter.grad for parameter in self.parameters]
        self._put_back(earlier)

    def _run_again(self) -> None:
        """What a replay does, kernel by kernel."""
        earlier = [parameter.grad for parameter in self.parameters]
        self.gradients = []  # those of the last step, which would lie beside the new ones
        self._clear_gradients()
        self.loss, self.parts = self._run()
        self.gradients = [parameter.grad for parameter in self.parameters]
        self._put_back(earlier)

    def _put_back(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient

    def _run(self) -> tuple[Tensor, Tensor]:
        outputs = self.distil(self.model, self.inputs, self.weights, self.active, self.counts)
        outputs.loss.backward()
        return outputs.loss.detach(), outputs.parts

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _hand_over_gradients(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients):
            if gradient is None:
                continue
            if not self.accumulates:
                parameter.grad = gradient
            elif parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad += gradient
