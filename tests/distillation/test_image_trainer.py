"""DistillationTrainer with image models: every loss against a naive restatement, many teachers, odd data."""

import copy
from typing import Any

import pytest
import torch
from tiny_distillation import (
    NO_LOSS,
    SIX_LOSSES,
    assert_gradients_close,
    assert_logs_close,
    tiny_student,
    tiny_teacher,
)
from tiny_images import (
    CLASSES,
    FAMILIES,
    image_rows,
    image_step,
    make_image_trainer,
    moved_tokens,
    naive_bridge_loss,
    naive_image_losses,
    naive_image_teacher,
    stacked,
    tiny_image_student,
    tiny_image_teacher,
)
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

from cab_hf.data.augmentation import two_sizes
from cab_hf.distillation.training_args import LOSSES


MIXERS = ("mamba", "mamba2")
LAYERS = (0, 2)
"""floor(i * 4 / 2): the tiny teacher's layers that teach the tiny student's."""
BRIDGE = {**NO_LOSS, "bridge_weight": 1.0}


def weighted(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum(weights[f"{name}_weight"] * part for name, part in parts.items())


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter; zeros where the loss does not reach one."""
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients)}


def assert_step_is_naive(
    folder: Any, family: str, rows: Any, student: nn.Module, weights: dict, **options: Any
) -> None:
    """One trainer step has the values and gradients of the naive restatement."""
    naive = {"relative": options.get("relative_loss", True), "temperature": options.get("temperature", 1.0)}
    naive |= {"kind": options.get("target_map", "none"), "extra": FAMILIES[family][3]}
    trainer, recorder = make_image_trainer(
        folder, rows=rows, student=student, teacher=tiny_image_teacher(family), **weights, **options
    )
    model = copy.deepcopy(trainer.model)
    trainer.train()
    images, labels = stacked(rows)
    parts = naive_image_losses(
        model, naive_image_teacher(tiny_image_teacher(family), images), images, labels, LAYERS, **naive
    )
    loss = weighted(parts, weights)
    for name in (*LOSSES, "loss"):
        value = {**parts, "loss": loss}[name].item()
        if name == "loss" or weights[f"{name}_weight"]:
            assert value > 1e-4 and recorder.logs[0][name] == pytest.approx(value, rel=3e-4), name
        else:
            assert name not in recorder.logs[0]
    assert_gradients_close(recorder.gradients[0], gradients_of(model, loss), 3e-4)


# The bridge


@pytest.mark.parametrize("class_token", ["middle", "first", "none"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_bridge_is_the_papers(tmp_path, mixer, class_token):
    rows = image_rows(3)
    images = stacked(rows)[0]
    theirs = naive_image_teacher(tiny_image_teacher(), images)
    for kind in ("none", "softmax", "relu", "exp", "elu1"):
        for relative in (False, True):
            student = tiny_image_student(mixer, class_token)
            trainer, recorder = make_image_trainer(
                tmp_path, rows=rows, student=student, target_map=kind, relative_loss=relative, **BRIDGE
            )
            model = copy.deepcopy(trainer.model)
            trainer.train()
            queries, keys = (
                [moved_tokens(tensors[layer], 1, student.config) for layer in LAYERS]
                for tensors in (theirs.queries, theirs.keys)
            )
            loss = naive_bridge_loss(model, queries, keys, images, kind, relative)
            assert recorder.logs[0]["bridge"] == recorder.logs[0]["loss"]
            assert recorder.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-4), (kind, relative)
            assert_gradients_close(recorder.gradients[0], gradients_of(model, loss), 3e-4)


def test_a_wrong_order_of_tokens_would_show():
    """The naive bridge tells token orders and directions apart, so that the test above can fail."""
    images = stacked(image_rows(3))[0]
    theirs = naive_image_teacher(tiny_image_teacher(), images)
    student = tiny_image_student()
    queries, keys = ([moved_tokens(x[i], 1, student.config) for i in LAYERS] for x in (theirs.queries, theirs.keys))
    for tensors, unmoved in ((queries, theirs.queries), (keys, theirs.keys)):
        assert (tensors[1] - unmoved[LAYERS[1]]).abs().max() > 0.1
        assert (tensors[1] - tensors[1].flip(1)).abs().max() > 0.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_bridge_alone_teaches_both_directions(tmp_path, mixer):
    trainer, recorder = make_image_trainer(
        tmp_path, student=tiny_image_student(mixer), max_steps=10, lr_scheduler_type="constant", **BRIDGE
    )
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert recorder.logs[9]["bridge"] < 0.8 * recorder.logs[0]["bridge"]
    after = trainer.model.state_dict()
    for layer in range(2):
        for direction in range(2):
            for place in ("up", "down"):
                for role in ("key", "query"):
                    for what in ("weight", "bias"):
                        name = f"bridge.layers.{layer}.{direction}.{place}.{role}.{what}"
                        assert recorder.gradients[0][name].abs().max() > 0 and not torch.equal(
                            after[name], before[name]
                        )
    # The rows that write B and C, of either direction, in the last layer: nothing else there reaches them.
    gradients, layer, states, width = recorder.gradients[0], "student.backbone.layers.1.mixer.", 6, 32
    if mixer == "mamba":
        written = [gradients[f"{layer}{branch}x_proj.weight"][-2 * states :] for branch in ("", "backward.")]
    else:
        written = [gradients[f"{layer}in_proj.weight"][2 * width : 2 * width + 2 * states]]
        written += [gradients[f"{layer}{branch}conv1d.weight"][width:, 0] for branch in ("", "backward.")]
    for rows in written:
        assert (rows.abs().amax(dim=1) > 1e-7).all()
    # What comes after the last B and C learns nothing from them.
    for name in ("student.classifier.weight", "student.backbone.norm_f.weight", f"{layer}out_proj.weight"):
        assert (gradients[name] == 0).all() and torch.equal(after[name], before[name])


def test_a_student_of_one_direction_has_one_bridge(tmp_path):
    student = tiny_image_student(bidirectional=False)
    trainer, recorder = make_image_trainer(tmp_path, student=student, **SIX_LOSSES)
    assert all(len(directions) == 1 for directions in trainer.model.bridge.layers)
    trainer.train()
    assert all(recorder.logs[0][name] > 0 for name in LOSSES)


# All losses


@pytest.mark.parametrize("class_token", ["middle", "first", "none"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_is_the_naive_restatement(tmp_path, mixer, class_token):
    student = tiny_image_student(mixer, class_token)
    assert_step_is_naive(tmp_path, "vit", image_rows(), student, SIX_LOSSES, relative_loss=mixer == "mamba")


@pytest.mark.parametrize("options", [{"temperature": 2.5}, {"target_map": "softmax"}])
def test_options_are_the_naive_restatement(tmp_path, options):
    assert_step_is_naive(tmp_path, "vit", image_rows(), tiny_image_student(), SIX_LOSSES, **options)


def test_soft_labels_are_the_naive_restatement(tmp_path):
    rows = image_rows()
    for index, row in enumerate(rows):
        row["labels"] = torch.randn(CLASSES, generator=torch.Generator().manual_seed(index)).softmax(-1).tolist()
    assert_step_is_naive(tmp_path, "vit", rows, tiny_image_student(), SIX_LOSSES)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("vit", "beit", "clip", "siglip")])
def test_teachers_with_other_tokens_are_the_naive_restatement(tmp_path, family):
    assert_step_is_naive(tmp_path, family, image_rows(), tiny_image_student("mamba"), SIX_LOSSES)


def test_registers_are_kept_by_a_student_with_as_many(tmp_path):
    student = tiny_image_student(num_register_tokens=3)
    assert_step_is_naive(tmp_path, "dinov2 registers", image_rows(), student, SIX_LOSSES)
    with pytest.raises(ValueError, match="2 register tokens and the teacher 3.*num_register_tokens=3 or 0"):
        image_step(
            tmp_path, student=tiny_image_student(num_register_tokens=2), teacher=tiny_image_teacher("dinov2 registers")
        )


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_do_not_depend_on_batch_and_accumulation(tmp_path, mixer):
    rows = image_rows()
    rows[2]["labels"] = rows[5]["labels"] = -100
    steps = [
        image_step(
            tmp_path,
            rows=rows,
            student=tiny_image_student(mixer),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            **SIX_LOSSES,
        )
        for batch in (8, 4, 1)
    ]
    for gradients, logs in steps[1:]:
        assert_gradients_close(gradients, steps[0][0])
        assert_logs_close(logs, steps[0][1])
    images, labels = stacked(rows)
    student = tiny_image_student(mixer)
    ce = nn.functional.cross_entropy(student(images).logits[labels >= 0], labels[labels >= 0])
    assert steps[0][1]["ce"] == pytest.approx(ce.item(), rel=1e-5)


# Evaluation


@pytest.mark.parametrize("batch", [8, 3, 1])
def test_evaluation_is_a_direct_count(tmp_path, batch):
    rows, teacher, student = image_rows(11), tiny_image_teacher(), tiny_image_student()
    images = stacked(rows)[0]
    with torch.no_grad():
        ours, theirs = student(images).logits, teacher.eval()(images).logits
    for index, row in enumerate(rows):  # so that some labels are each model's first choice, and some among five
        row["labels"] = (
            int(ours[index].argsort(descending=True)[index % 7]) if index % 2 else int(theirs[index].argmax())
        )
    rows[4]["labels"] = -100
    labels = [row["labels"] for row in rows]
    trainer, _ = make_image_trainer(
        tmp_path,
        student=student,
        teacher=copy.deepcopy(teacher),
        per_device_eval_batch_size=batch,
        relative_loss=False,
        **SIX_LOSSES,
    )
    metrics = trainer.evaluate(rows)
    known = [index for index in range(11) if labels[index] >= 0]
    order = ours.argsort(dim=-1, descending=True).tolist()
    first, among_five = (sum(labels[i] in order[i][:count] for i in known) for count in (1, 5))
    taught = sum(labels[i] == int(theirs[i].argmax()) for i in known)
    agreeing = sum(order[i][0] == int(theirs[i].argmax()) for i in range(11))
    assert 0 < first < among_five < len(known) == 10 and first < taught < len(known) and 0 < agreeing < 11
    assert metrics["eval_accuracy"] == pytest.approx(first / 10)
    assert metrics["eval_top5_accuracy"] == pytest.approx(among_five / 10)
    assert metrics["eval_teacher_accuracy"] == pytest.approx(taught / 10)
    assert metrics["eval_agreement"] == pytest.approx(agreeing / 11)
    assert metrics["eval_images"] == 11
    naive = naive_image_teacher(tiny_image_teacher(), images)
    parts = naive_image_losses(trainer.model, naive, images, torch.tensor(labels), LAYERS)
    for name, part in {**parts, "loss": weighted(parts, SIX_LOSSES)}.items():
        assert metrics[f"eval_{name}"] == pytest.approx(part.item(), rel=3e-4), name
    assert "eval_perplexity" not in metrics and "eval_tokens" not in metrics


def test_evaluation_measures_what_training_does(tmp_path):
    trainer, recorder = make_image_trainer(tmp_path, **SIX_LOSSES)
    metrics = trainer.evaluate(image_rows())
    trainer.train()
    for name in (*LOSSES, "loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(recorder.logs[1][name], rel=1e-5), name


def test_evaluation_of_mixed_labels_counts_their_largest(tmp_path):
    rows = image_rows(5)
    hard = make_image_trainer(tmp_path, ce_weight=1.0)[0].evaluate(rows)
    soft = [{**row, "labels": nn.functional.one_hot(torch.tensor(row["labels"]), CLASSES).float()} for row in rows]
    metrics = make_image_trainer(tmp_path, ce_weight=1.0)[0].evaluate(soft)
    for name in ("accuracy", "top5_accuracy", "teacher_accuracy", "ce"):
        assert metrics[f"eval_{name}"] == pytest.approx(hard[f"eval_{name}"]), name


def test_fewer_than_five_classes(tmp_path):
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    rows = [{**row, "labels": row["labels"] % 3} for row in image_rows(6)]
    trainer, _ = make_image_trainer(
        tmp_path, rows=rows, student=tiny_image_student(**names), teacher=tiny_image_teacher(**names)
    )
    assert trainer.evaluate(rows)["eval_top5_accuracy"] == 1.0


# Teachers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_teachers_bridge_is_the_papers(tmp_path, family):
    extra = FAMILIES[family][3]
    student = tiny_image_student("mamba", "middle" if extra else "none")
    rows = image_rows(4)
    images, labels = stacked(rows)
    theirs = naive_image_teacher(tiny_image_teacher(family), images)
    trainer, recorder = make_image_trainer(
        tmp_path,
        rows=rows,
        student=student,
        teacher=tiny_image_teacher(family),
        relative_loss=False,
        kl_weight=0.0 if theirs.logits is None else 1.0,
        ce_weight=0.5,
        bridge_weight=1.0,
    )
    model = copy.deepcopy(trainer.model)
    metrics = trainer.evaluate(rows)
    trainer.train()
    queries, keys = (
        [moved_tokens(tensors[layer], extra, student.config) for layer in LAYERS]
        for tensors in (theirs.queries, theirs.keys)
    )
    bridge = naive_bridge_loss(model, queries, keys, images).item()
    assert bridge > 1e-3
    assert recorder.logs[1]["bridge"] == pytest.approx(bridge, rel=2e-4)
    assert metrics["eval_bridge"] == pytest.approx(bridge, rel=2e-4)
    ce = nn.functional.cross_entropy(model.student(images).logits, labels).item()
    assert recorder.logs[1]["ce"] == pytest.approx(ce, rel=1e-4)
    compared = {"eval_kl", "eval_agreement", "eval_teacher_accuracy"}
    assert compared & metrics.keys() == (set() if theirs.logits is None else compared)
    assert "eval_accuracy" in metrics


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_headless_teacher_has_no_kl(tmp_path, family):
    student = tiny_image_student(class_token="none")
    with pytest.raises(ValueError) as error:
        make_image_trainer(tmp_path, student=student, teacher=tiny_image_teacher(family))
    assert all(word in str(error.value) for word in ("kl_weight", "1.0", "no classifier", "`kl_weight=0.0`"))


def test_a_teacher_without_a_class_token_can_not_teach_one(tmp_path):
    with pytest.raises(ValueError, match="student has a class token.*class_token='none'"):
        image_step(tmp_path, teacher=tiny_image_teacher("siglip"), **BRIDGE)


def test_a_teacher_of_windows_is_refused(tmp_path):
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "num_heads": [2, 4], "depths": [1, 1], "patch_size": 2}
    windows = SwinForImageClassification(SwinConfig(image_size=16, window_size=2, **sizes))
    with pytest.raises(ValueError, match="SwinForImageClassification.*windows.*ViT"):
        make_image_trainer(tmp_path, teacher=windows, **BRIDGE)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "siglip"])
def test_a_teacher_of_another_size_and_grid(tmp_path, mixer, family):
    """The student sees 8 x 8 pixels in 2 x 2 patches, the teacher 12 x 12 in 3 x 3."""
    extra = FAMILIES[family][3]
    student = tiny_image_student(mixer, "middle" if extra else "none")
    rows = image_rows(4, size=12)
    seen = []

    def transform(batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        seen.append(training)
        ours, theirs = two_sizes(batch["pixel_values"], 8, 12)
        return {**batch, "pixel_values": ours, "teacher_pixel_values": theirs}

    trainer, recorder = make_image_trainer(
        tmp_path,
        rows=rows,
        student=student,
        teacher=tiny_image_teacher(family, image_size=12),
        batch_transform=transform,
        kl_weight=0.0,
        bridge_weight=1.0,
        output_weight=0.5,
        relative_loss=False,
    )
    model = copy.deepcopy(trainer.model)
    metrics = trainer.evaluate(rows)
    trainer.train()
    assert seen == [False, True]
    images = two_sizes(stacked(rows)[0], 8, 12)
    theirs = naive_image_teacher(tiny_image_teacher(family, image_size=12), images[1])
    queries, keys, outputs = (
        [moved_tokens(tensors[layer], extra, student.config, (3, 3)) for layer in LAYERS]
        for tensors in (theirs.queries, theirs.keys, theirs.outputs)
    )
    bridge = naive_bridge_loss(model, queries, keys, images[0])
    written = model.student.backbone(images[0], output_projections=True).projections
    output = sum((ours.output - theirs).square().mean() / 2 for ours, theirs in zip(written, outputs))
    for name, value in (("bridge", bridge), ("output", output), ("loss", bridge + 0.5 * output)):
        assert recorder.logs[1][name] == pytest.approx(value.item(), rel=2e-4), name
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=2e-4), name
    assert_gradients_close(recorder.gradients[0], gradients_of(model, bridge + 0.5 * output), 3e-4)


def test_maps_of_unequal_grids_are_refused(tmp_path):
    rows = [
        {**small, "teacher_pixel_values": large["pixel_values"]}
        for small, large in zip(image_rows(4), image_rows(4, size=12))
    ]
    teacher = tiny_image_teacher(image_size=12)
    trainer, _ = make_image_trainer(tmp_path, rows=rows, teacher=teacher, **{**NO_LOSS, "attention_weight": 1.0})
    with pytest.raises(ValueError, match=r"\(3, 3\) patches.*\(2, 2\).*attention_weight=0.0"):
        trainer.train()


def test_a_column_of_the_teachers_images_is_used(tmp_path):
    rows = [{**row, "teacher_pixel_values": row["pixel_values"].flip(-1)} for row in image_rows(4)]
    images, teacher = stacked(rows)[0], tiny_image_teacher()
    logs = image_step(tmp_path, rows=rows, **{**NO_LOSS, "kl_weight": 1.0})[1]
    with torch.no_grad():
        ours, theirs = (
            x.log_softmax(-1) for x in (tiny_image_student()(images).logits, teacher(images.flip(-1)).logits)
        )
    assert logs["kl"] == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-4)


def test_other_labels_than_the_teachers(tmp_path):
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    with pytest.raises(ValueError) as error:
        make_image_trainer(tmp_path, student=tiny_image_student(**names))
    assert all(word in str(error.value) for word in ("num_labels=3", "num_labels=7", "kl_weight=0.0"))
    # The way out that the error names trains and is evaluated; what can't be compared is left out.
    rows = [{**row, "labels": row["labels"] % 3} for row in image_rows()]
    trainer, recorder = make_image_trainer(
        tmp_path, rows=rows, student=tiny_image_student(**names), kl_weight=0.0, ce_weight=1.0, bridge_weight=1.0
    )
    trainer.train()
    metrics = trainer.evaluate(rows)
    assert recorder.logs[0]["ce"] > 0 and metrics["eval_accuracy"] >= 0
    assert not {"eval_kl", "eval_agreement", "eval_teacher_accuracy"} & metrics.keys()


def test_inputs_of_two_kinds_are_refused(tmp_path):
    for student, teacher in ((tiny_student(), tiny_image_teacher()), (tiny_image_student(), tiny_teacher())):
        with pytest.raises(ValueError) as error:
            make_image_trainer(tmp_path, student=student, teacher=teacher)
        for word in ("pixel_values", "input_ids", "CABMambaForCausalLM", "CABVisionMambaForImageClassification"):
            assert word in str(error.value)


# Odd things


@pytest.mark.parametrize("mixer", MIXERS)
def test_batches_of_one_and_a_smaller_last_one(tmp_path, mixer):
    rows = image_rows(5)
    for batch in (1, 3):
        trainer, recorder = make_image_trainer(
            tmp_path,
            rows=rows,
            student=tiny_image_student(mixer),
            per_device_train_batch_size=batch,
            max_steps=-1,
            num_train_epochs=1,
            **SIX_LOSSES,
        )
        trainer.train()
        assert len(recorder.gradients) == -(-5 // batch)
        for log in recorder.logs[:-1]:
            assert log["loss"] == pytest.approx(
                sum(SIX_LOSSES[f"{name}_weight"] * log[name] for name in LOSSES), rel=1e-5
            )
            assert all(0 < log[name] < 1e3 for name in LOSSES)


def test_a_step_without_any_label(tmp_path):
    rows = [{**row, "labels": -100} for row in image_rows(4)]
    gradients, logs = image_step(tmp_path, rows=rows, ce_weight=1.0, bridge_weight=0.0)
    assert logs["ce"] == 0.0 and logs["loss"] == pytest.approx(logs["kl"]) and logs["kl"] > 0
    plain = image_step(tmp_path, rows=rows, bridge_weight=0.0)[0]
    assert_gradients_close(gradients, plain)
    metrics = make_image_trainer(tmp_path)[0].evaluate(rows)
    assert metrics["eval_images"] == 4 and "eval_accuracy" not in metrics


def test_images_without_labels(tmp_path):
    rows = image_rows(8, labelled=False)
    gradients, logs = image_step(tmp_path, rows=rows)
    labelled = image_step(tmp_path, rows=image_rows(8))
    assert_gradients_close(gradients, labelled[0])
    assert logs["kl"] == labelled[1]["kl"]
    trainer, _ = make_image_trainer(tmp_path, rows=rows)
    metrics = trainer.evaluate(rows)
    assert {"eval_kl", "eval_agreement", "eval_bridge"} <= metrics.keys()
    assert not {"eval_accuracy", "eval_top5_accuracy", "eval_teacher_accuracy"} & metrics.keys()


def test_a_cross_entropy_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="labels are missing.*ce_weight=0.0"):
        image_step(tmp_path, rows=image_rows(labelled=False), ce_weight=1.0)


def test_pixels_that_are_not_normalised_are_refused(tmp_path):
    rows = [{**row, "pixel_values": row["pixel_values"].abs().mul(50).to(torch.uint8)} for row in image_rows()]
    with pytest.raises(ValueError, match="torch.uint8.*batch_transform"):
        image_step(tmp_path, rows=rows)

    def normalised(batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        return {**batch, "pixel_values": batch["pixel_values"] / 255}

    assert image_step(tmp_path, rows=rows, batch_transform=normalised)[1]["kl"] > 0


def test_a_column_named_label_holds_the_labels(tmp_path):
    """Most image data sets call it so, and the Trainer's collator renames it."""
    rows = [{"pixel_values": row["pixel_values"], "label": row["labels"], "file": "a.png"} for row in image_rows()]
    named, plain = (image_step(tmp_path, rows=given, ce_weight=1.0) for given in (rows, image_rows()))
    assert_gradients_close(named[0], plain[0])
    assert named[1]["ce"] == plain[1]["ce"]


@pytest.mark.parametrize(
    ("depth", "rule", "layers"),
    [(6, "floor", [0, 0, 1, 2, 2, 3]), (3, "last", [0, 1, 3]), (1, "floor", [0]), (2, "3,1", [3, 1])],
)
def test_depths_of_any_kind(tmp_path, depth, rule, layers):
    rows = image_rows(4)
    images = stacked(rows)[0]
    student = tiny_image_student("mamba", num_hidden_layers=depth)
    trainer, recorder = make_image_trainer(tmp_path, rows=rows, student=student, layer_map=rule, **BRIDGE)
    assert trainer.model.layer_map == layers
    model = copy.deepcopy(trainer.model)
    trainer.train()
    theirs = naive_image_teacher(tiny_image_teacher(), images)
    queries, keys = (
        [moved_tokens(tensors[layer], 1, student.config) for layer in layers]
        for tensors in (theirs.queries, theirs.keys)
    )
    expected = naive_bridge_loss(model, queries, keys, images, relative=True)
    assert recorder.logs[0]["bridge"] == pytest.approx(expected.item(), rel=2e-4)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, mixer, reentrant):
    plain = image_step(tmp_path, student=tiny_image_student(mixer), **SIX_LOSSES)
    student = tiny_image_student(mixer)
    recomputed = image_step(
        tmp_path,
        student=student,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
        **SIX_LOSSES,
    )
    assert student.is_activation_checkpointing
    assert_gradients_close(recomputed[0], plain[0])
    assert_logs_close(recomputed[1], plain[1])


@pytest.mark.parametrize("options", [{"bf16": True}, {"teacher_dtype": "bfloat16"}])
def test_half_precision_is_near(tmp_path, options):
    plain = image_step(tmp_path, **SIX_LOSSES)[1]
    gradients, logs = image_step(tmp_path, **SIX_LOSSES, **options)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())
    for name in LOSSES:
        assert logs[name] == pytest.approx(plain[name], rel=0.05), name


def test_the_batch_transform_sees_training_and_evaluation_apart(tmp_path):
    seen = []

    def transform(batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        seen.append((training, len(batch["pixel_values"])))
        if not training:
            return batch
        return {**batch, "labels": nn.functional.one_hot(batch["labels"], CLASSES).float()}

    trainer, recorder = make_image_trainer(
        tmp_path,
        batch_transform=transform,
        eval_dataset=image_rows(3),
        eval_strategy="steps",
        eval_steps=1,
        ce_weight=1.0,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    step = [(True, 4), (True, 4), (False, 3)]
    assert seen == [(False, 4), (False, 4), *step, *step]  # first the scales of relative losses
    plain = image_step(tmp_path, ce_weight=1.0)[1]
    assert recorder.logs[0]["ce"] == pytest.approx(plain["ce"], rel=1e-5)
