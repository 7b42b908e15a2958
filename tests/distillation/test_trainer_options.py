"""The Trainer's own options: honoured for student and bridge as one, or refused when the arguments are made."""

import logging

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from tiny_distillation import VOCAB, DistillationTrainer, make_arguments, ragged_rows, tiny_student, tiny_teacher
from tiny_images import image_rows, make_image_trainer


def trained(folder, **options):
    args = make_arguments(folder, **options)
    trainer = DistillationTrainer(tiny_student(), tiny_teacher(), args, train_dataset=ragged_rows())
    return trainer, trainer.train().training_loss


def test_neftune_disturbs_the_students_embeddings_alone(tmp_path):
    plain, loss = trained(tmp_path)
    trainer, noisy = trained(tmp_path, neftune_noise_alpha=5.0)
    assert noisy != loss and abs(noisy - loss) < 1
    assert not trainer.student.get_input_embeddings()._forward_hooks
    ids = torch.randint(VOCAB, (2, 5))
    assert torch.equal(plain.teacher.model(ids).logits, trainer.teacher.model(ids).logits)


def test_tokens_seen_are_counted(tmp_path):
    for kind, count in (("all", 88), ("non_padding", 49)):
        assert trained(tmp_path, include_num_input_tokens_seen=kind)[0].state.num_input_tokens_seen == count


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        {"torch_empty_cache_steps": 1},
        {"auto_find_batch_size": True},
        {"average_tokens_across_devices": True},
        {"debug": "underflow_overflow"},
        {"use_cache": True},
    ],
)
def test_options_that_change_no_loss(options, tmp_path):
    assert trained(tmp_path, **options)[1] == pytest.approx(trained(tmp_path)[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_liger_kernel": True}, "`use_liger_kernel` is True"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "`parallelism_config`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1"),
    ],
)
def test_options_that_can_not_be_honoured(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **options)


def test_methods_that_would_write_or_round_the_wrong_thing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, _ = trained(tmp_path, bf16_full_eval=True)
    assert "would round the student's weights" in caplog.text
    before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    trainer.evaluate(ragged_rows())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.student.state_dict().items())
    with pytest.raises(ValueError, match="`push_to_hub`, or `cab-hf card"):
        trainer.create_model_card()
    with pytest.raises(ValueError, match="`neftune_noise_alpha` is 5.0"):
        make_image_trainer(tmp_path, image_rows(), neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="`preprocess_logits_for_metrics` is not used here"):
        DistillationTrainer(
            tiny_student(), tiny_teacher(), make_arguments(tmp_path), preprocess_logits_for_metrics=lambda x, y: x
        )
