"""Which tokens KL and cross-entropy count: those with a label."""

import pytest
import torch
from tiny_distillation import (
    NO_LOSS,
    assert_gradients_close,
    make_trainer,
    one_step,
    ragged_rows,
    real_tokens,
    tiny_student,
    tiny_teacher,
)


@pytest.mark.parametrize("side", ["left", "right"])
def test_kl_and_cross_entropy_count_where_labels_do(tmp_path, side):
    """Labels of some tokens alone, as those of an assistant: the parts of the others change neither of the two."""
    rows = ragged_rows(side=side)
    for index, row in enumerate(rows):
        row["labels"][torch.rand(len(row["labels"]), generator=torch.Generator().manual_seed(index)) < 0.5] = -100
    options = {"rows": rows, **NO_LOSS, "kl_weight": 1.0, "ce_weight": 0.3}
    gradients, logs = one_step(tmp_path, **options)
    kl, ce, count = 0.0, 0.0, 0
    teacher, student = tiny_teacher(), tiny_student().train()
    for row, tokens in zip(rows, real_tokens(rows)):
        labels = row["labels"][row["attention_mask"] != 0]
        places = [place for place in range(len(tokens) - 1) if labels[place + 1] != -100]
        theirs, ours = (model(tokens[None]).logits[0, places].log_softmax(-1) for model in (teacher, student))
        kl = kl + (theirs.exp() * (theirs - ours)).sum()
        ce = ce - ours[range(len(places)), tokens[[place + 1 for place in places]]].sum()
        count += len(places)
    assert logs["kl"] == pytest.approx(kl.item() / count, rel=1e-4)
    assert logs["ce"] == pytest.approx(ce.item() / count, rel=1e-4)
    ((kl + 0.3 * ce) / count).backward()
    truth = {f"student.{name}": one.grad for name, one in student.named_parameters() if one.grad is not None}
    assert_gradients_close({name: one for name, one in gradients.items() if name in truth}, truth)
    metrics = make_trainer(tmp_path, **options)[0].evaluate(rows)
    assert metrics["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-4)
