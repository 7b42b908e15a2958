"""What an image student is worth beside its teacher."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab_hf.evaluation.metrics import TopKAccuracy
from cab_hf.teachers.teacher import Teacher


def compare_images(
    student: nn.Module, teacher: Teacher | None, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Both models' top-1 and top-5 on the same images, with 95 % intervals, their KL and their agreement.

    Args:
        student: a classifier, put into eval mode for the time.
        teacher: may be None, or without a classifier; then only the student is reported.
        batches: `pixel_values` `(b, c, height, width)`, perhaps `teacher_pixel_values`, and `labels` `(b,)`.

    Returns:
        `student_top1`, `student_top1_ci95`, `student_top5`, ..., the same of the teacher, `kl` (nats an image),
        `agreement`, `n_images`.
    """
    training = student.training
    student.eval()
    logits: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    labels = []
    with torch.no_grad():
        for batch in batches:
            logits["student"].append(student(pixel_values=batch["pixel_values"]).logits.float().cpu())
            if teacher is not None and teacher.has_logits:
                shown = {"pixel_values": batch.get("teacher_pixel_values", batch["pixel_values"])}
                logits["teacher"].append(teacher(shown, logits=True).logits.float().cpu())
            labels.append(batch["labels"].cpu())
    student.train(training)
    all_labels = torch.cat(labels).numpy()
    whole = {name: torch.cat(parts) for name, parts in logits.items() if parts}
    report: dict[str, Any] = {"n_images": len(all_labels)}
    for name, values in whole.items():
        accuracies = TopKAccuracy(keep_in_memory=True).compute(predictions=values.numpy(), references=all_labels)
        report |= {f"{name}_{key}": value for key, value in accuracies.items() if key != "n"}
    if "teacher" in whole:
        log_student, log_teacher = whole["student"].log_softmax(-1), whole["teacher"].log_softmax(-1)
        report["kl"] = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).item()
        same = whole["student"].argmax(-1) == whole["teacher"].argmax(-1)
        report["agreement"] = same.float().mean().item()
    return report
