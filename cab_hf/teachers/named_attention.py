"""Attention that a module computes itself: its projections by their usual names.

Shapes: `b` batch, `t` token, `h` head, `p` head_dim.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cab_hf.teachers.attention_interface import AttentionCall, TeacherAttention


_NAMES = {
    "query": ("q", "q_proj", "query", "query_proj", "q_lin", "linear_q"),
    "key": ("k", "k_proj", "key", "key_proj", "k_lin", "linear_k"),
    "value": ("v", "v_proj", "value", "value_proj", "v_lin", "linear_v"),
    "output": ("o", "o_proj", "out_proj", "out_lin", "linear_out", "out"),
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")


def named_projections(module: nn.Module) -> dict[str, nn.Module | None] | None:
    """Query, key, value and, if it is inside, output of a module; None where one of the first three lacks."""
    children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}
    found = {part: next((children[n] for n in names if n in children), None) for part, names in _NAMES.items()}
    return None if None in (found["query"], found["key"], found["value"]) else found


def num_heads(module: nn.Module) -> int | None:
    """Query heads of an attention module, as it calls them."""
    return next((vars(module)[name] for name in _HEADS if isinstance(vars(module).get(name), int)), None)


def is_cross_attention(path: str) -> bool:
    return any(part in path.lower() for part in ("cross", "encoder_attn", "encdec"))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with query, key and value of usual names and a number of heads, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if not is_cross_attention(path) and num_heads(module) and named_projections(module) is not None
    }


@contextmanager
def named_calls(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[nn.Module, AttentionCall]]]:
    """Collects what such modules project inside the block, as `collected_calls` does of the attention interface.

    Queries and keys are those of the projections: whatever the module does to them is not seen.
    """
    calls: list[tuple[nn.Module, AttentionCall]] = []
    seen: dict[tuple[str, str], Tensor] = {}

    def note(path: str, part: str, child: nn.Module, args: tuple, output: Tensor) -> None:
        seen[path, part] = args[0] if part == "output" else output

    def finish(path: str, module: nn.Module, args: tuple, output: object) -> None:
        heads = num_heads(module)
        head_dim = seen[path, "query"].shape[-1] // heads
        query, key = (
            seen.pop((path, part)).unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in ("query", "key")
        )
        own = output if isinstance(output, Tensor) else output[0]
        flat = seen.pop((path, "output"), own)
        calls.append((module, AttentionCall(TeacherAttention(query, key, flat.unflatten(-1, (heads, -1))), None)))

    with ExitStack() as stack:
        for path, module in modules.items():
            for part, child in named_projections(module).items():
                if child is not None and part != "value":
                    stack.callback(child.register_forward_hook(functools.partial(note, path, part)).remove)
            stack.callback(module.register_forward_hook(functools.partial(finish, path)).remove)
        yield calls
