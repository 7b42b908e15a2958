"""Controls: a window against a mask of its own, and a student without its mixers against its parts."""

import pytest
import torch
from test_length import models
from tiny_models import tiny_model

from cab_hf.evaluation.controls import with_window, without_mixers
from cab_hf.evaluation.language import logits_in_pieces
from cab_hf.evaluation.tiny_families import tiny_model as tiny_family


TOKENS = torch.randint(1, 99, (2, 24), generator=torch.Generator().manual_seed(3))


def seen(length: int, window: int, sinks: int) -> torch.Tensor:
    return torch.tensor([[j <= i and (i - j < window or j < sinks) for j in range(length)] for i in range(length)])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("window, sinks", [(3, 2), (5, 0), (1, 1)])
@torch.no_grad()
def test_a_window_is_the_mask_of_it(family, window, sinks):
    teacher = tiny_family(family).eval()
    teacher.set_attn_implementation("eager")
    hidden = torch.zeros(24, 24).masked_fill(~seen(24, window, sinks), torch.finfo(torch.float32).min)
    expected = teacher(TOKENS, attention_mask=hidden.expand(2, 1, 24, 24)).logits
    whole = teacher(TOKENS).logits
    limited = with_window(teacher, window, sinks)
    torch.testing.assert_close(limited(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - whole).abs().max() > 1e-3
    torch.testing.assert_close(teacher(TOKENS).logits, whole)  # the teacher itself is left alone
    pieces = torch.cat([logits for _, logits in logits_in_pieces(limited, TOKENS, piece=7)], 1)
    torch.testing.assert_close(pieces, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_window_in_rows_of_several_documents():
    teacher = tiny_family("llama").eval()
    limited = with_window(teacher, 3, 2)
    apart = torch.cat([limited(TOKENS[:, :10]).logits, limited(TOKENS[:, 10:]).logits], 1)
    positions = torch.tensor([[*range(10), *range(14)]] * 2)
    packed = limited(TOKENS, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="window is 0 and sinks 4"):
        with_window(tiny_family("llama"), 0)


@torch.no_grad()
def test_a_student_without_its_mixers():
    student = tiny_model(mixer_type="mamba2")
    before, zeroed = student(TOKENS).logits, without_mixers(student)
    # Nothing carries tokens over to later ones, so that each is read as if it were alone.
    alone = torch.cat([zeroed(TOKENS[:, at : at + 1], use_cache=False).logits for at in range(24)], 1)
    torch.testing.assert_close(zeroed(TOKENS).logits, alone)
    torch.testing.assert_close(student(TOKENS).logits, before)
    hybrid = models()["hybrid"]
    kept = without_mixers(hybrid)
    assert (kept(TOKENS).logits - hybrid(TOKENS).logits).abs().max() > 1e-4
    changed = TOKENS.clone()
    changed[:, 0] += 1
    # The attention that stays still reads the first token.
    assert (kept(TOKENS).logits - kept(changed).logits)[:, -1].abs().max() > 1e-6
    with pytest.raises(ValueError, match="LlamaForCausalLM has no mixers"):
        without_mixers(models()["llama"])
