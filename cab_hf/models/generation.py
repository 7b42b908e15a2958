"""How a student of states generates: what its cache has read, where its positions end, and prefill in chunks.

Shape legend: `b` batch, `t` token.
"""

from os import PathLike

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .states import load_state, save_state


UNKNOWN_POSITIONS = (
    "A student with learned positions that continues from a cache needs `position_ids` (b, t) or the `attention_mask` "
    "(b, past + t) of the whole sequence; got neither."
)


def tokens_read(cache: Cache, *noted: str) -> tuple[int, torch.LongTensor | None]:
    """How many tokens a cache has read, and the last of them `(b, 1)`; None of embeddings.

    A forward pass notes them as `read`. A compiled one can't, so that `generate` notes as `reading` what it will read.
    """
    if not cache.has_previous_state():
        return 0, None
    return max((vars(cache).get(name, (0, None)) for name in noted or ("read", "reading")), key=lambda one: one[0])


class StatefulGenerationMixin(GenerationMixin):
    """`generate` for a model whose cache holds states instead of keys."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        # Before 5.24 transformers called it so.
        cache = kwargs.pop("cache_params", None) if cache is None else cache
        if cache is not None:
            kwargs["cache"] = cache
            cache.read = tokens_read(cache)
            cache.reading = (cache.read[0] + (next_sequence_length or input_ids.shape[1]), input_ids[:, -1:])
            if next_sequence_length == 1 and cache.read[0] and not self.config.max_position_embeddings:
                # a token that was made here: it is no padding, and needs no position
                cache.goes_on = vars(cache).get("has_begun", False)
                token = cache.reading[1].clone(memory_format=torch.contiguous_format)
                on_meta = self.device.type == "meta"  # weights that are offloaded
                return kwargs | {"input_ids": token if on_meta else token.to(self.device)}
        # Positions follow from the mask, on whichever side of the prompt its padding is.
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            position_ids=None if attention_mask is not None else position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def save_state(self, cache: Cache, file: str | PathLike) -> None:
        """Writes what a cache remembers of a prompt as a safetensors file, with the model's fingerprint.

        Example:
            >>> import tempfile, torch
            >>> from cab_hf import CABMambaConfig, CABMambaForCausalLM
            >>> model = CABMambaForCausalLM(CABMambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)).eval()
            >>> prompt = torch.arange(20)[None]
            >>> file = tempfile.mkdtemp() + "/prompt.safetensors"
            >>> model.save_state(model(prompt, use_cache=True).cache, file)
            >>> question = torch.tensor([[7, 8]])
            >>> model.generate(question, cache=model.load_state(file), max_new_tokens=3).shape
            torch.Size([1, 5])
        """
        save_state(self, cache, file)

    def load_state(self, file: str | PathLike) -> Cache:
        """The cache of a prompt that [`save_state`] wrote, for `generate(..., cache=cache)`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut, of another kind or of another model; one line says which.
        """
        return load_state(self, file)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict):
        """None for a student without learned positions, whose states count for themselves."""
        if self.config.max_position_embeddings is None:
            return None
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ) -> ModelOutput:
        """As in transformers, which counts a cache's tokens by its keys; here the mask says how many there are.

        Raises:
            ValueError: no token that the cache has not read, or more tokens than there are positions.
        """
        cache = model_kwargs.get("cache", model_kwargs.get("cache_params"))
        mask, embeds = (model_kwargs.get(name) for name in ("attention_mask", "inputs_embeds"))
        length = (input_ids if embeds is None else embeds).shape[1]
        given = input_ids.shape[1]
        # Masks of ones are dropped by `generate`, which notes their length.
        total = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        past = 0 if cache is None else self._read_before(cache, input_ids if embeds is None else None, length, total)
        if past:
            input_ids, length = input_ids[:, past:], length - past
            mask = input_ids.new_ones(len(input_ids), total) if mask is None else mask
            model_kwargs = model_kwargs | {"attention_mask": mask}
            if embeds is not None:
                model_kwargs["inputs_embeds"] = embeds[:, past:]
        elif (
            total == length
            and self.config.max_position_embeddings
            and cache is not None
            and cache.has_previous_state()
        ):
            raise ValueError(UNKNOWN_POSITIONS)
        table, new = self.config.max_position_embeddings, max(generation_config.max_length - given, 0)
        real = total if mask is None else int((mask != 0).sum(dim=-1).max())
        if table is not None and real + new - 1 > table:
            raise ValueError(
                f"{real} tokens and {new} new ones (`max_new_tokens`, `max_length`) need more positions than the "
                f"`max_position_embeddings` of {table}. Ask for at most {max(table - real + 1, 0)} new tokens, or "
                "shorten the prompt."
            )
        if cache is not None:
            cache.has_begun = False
        size = generation_config.prefill_chunk_size
        if size is None or cache is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        mask = input_ids.new_ones(len(input_ids), total) if mask is None else mask
        for start in range(0, length, size if embeds is None else length):
            end = start + size if embeds is None else length
            seen = {"attention_mask": mask[:, : total - length + end], "position_ids": None}
            inputs = self.prepare_inputs_for_generation(
                input_ids[:, start:end], is_first_iteration=is_first_iteration, **(model_kwargs | seen)
            )
            output = self(**inputs, return_dict=True)
        return output

    @staticmethod
    def _read_before(cache: Cache, input_ids: torch.LongTensor | None, length: int, total: int) -> int:
        """How many of the given tokens the cache has read: those of a whole text, none where only new ones are given.

        Args:
            input_ids: `(b, length)`; None where embeddings are given.
            total: length of the mask; where it is longer than the tokens, these are new.
        """
        count, last = tokens_read(cache)
        if total != length or not 0 < count <= length:
            return 0
        if last is not None and input_ids is not None and not torch.equal(input_ids[:, count - 1 : count], last):
            return 0
        if count == length:
            raise ValueError(
                f"`cache` has read all {length} tokens of `input_ids`. Pass at least one that it has not, alone or "
                "behind the others."
            )
        return count
