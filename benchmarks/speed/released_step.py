"""Images a second and peak memory of one training step, ours and the released research code's, on the same shapes.

    git clone https://github.com/wph6/CAB
    python benchmarks/speed/released_step.py --released CAB --output benchmarks/speed/results/released_step_h200.json

The pair is DeiT-Tiny into Vim-Tiny with the released `run_distill.sh`'s losses and batch. Weights and images are
random, and the images are on the device, normalised: neither side loads or augments. "script" is the released loop
itself (`engine.train_one_epoch`, with its moving average, its host reads and its wait at every step), "bare" the least
that trains: model, losses, backward pass, optimizer. Ours is our recipe for the same pair under the Trainer, with its
moving average and gradient clipping.

The released folder stays as it is. It needs timm and einops. In place of its own builds of the kernels (mamba_ssm
1.1.1, causal_conv1d 1.4) it runs on those of the installed packages, which ours runs on, too; causal_conv1d's calls
have changed since and are translated here.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers.generation
from distillation_step import StepTimer, fresh_memory, row, save_report, step_parser, step_report, synchronise, timed
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from cab_hf.distillation.trainer import DistillationTrainer
from cab_hf.models import CABVisionMambaConfig, CABVisionMambaForImageClassification
from cab_hf.recipes import parse_recipe


RECIPE = "training_args/deit_tiny_vim_tiny_10pct.yaml"
NUM_LABELS = 1000
DEIT_TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
DROP_PATH = 0.1  # of the released student, whatever `--drop-path` says: the option does not reach it
SCRIPT = SimpleNamespace(  # `run_distill.sh` and the defaults of `main_vit2vim.py`
    model="dual_vit2vim_deit_tiny_patch16",
    mode="softdistill",
    kernel_type="softmax",
    atd_weight=3.0,
    ema_decay=0.99996,
    bce_loss=False,
    if_nan2num=False,
    if_continue_inf=False,
    opt="adamw",
    opt_eps=1e-8,
    opt_betas=None,
    momentum=0.9,
    weight_decay=0.05,
    lr=5e-4,
)
KERNELS = "causal_conv1d_cuda"
GRAPH = ["--cuda_graph", "true"]
FLOAT32 = ["--bf16", "false"]
OURS = {
    "ours, bfloat16": [],
    "ours, bfloat16, cuda graph": GRAPH,
    "ours, bfloat16, cuda graph, torch.compile": [*GRAPH, "--torch_compile", "true"],
    "ours, float32": FLOAT32,
    "ours, float32, cuda graph": [*FLOAT32, *GRAPH],
}
RELEASED = {  # bfloat16 is no option of the released script, float32 is what `run_distill.sh` takes
    "released, float32, script": torch.float32,
    "released, float16, script": torch.float16,
    "released, bfloat16, script": torch.bfloat16,
    "released, float32, bare": torch.float32,
    "released, bfloat16, bare": torch.bfloat16,
}
BRIDGE_GRADIENTS = "released, gradients of its bridge loss"
# What compiles comes last: it takes longest to start.
VARIANTS = sorted([*OURS, *RELEASED, BRIDGE_GRADIENTS], key=lambda name: "torch.compile" in name)


class Indices(Dataset):
    """Examples without content: the collator holds the images."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


class Marked:
    """The released loop's data loader: one batch again and again, the time marked after warm-up and each span."""

    def __init__(self, batch: tuple[Tensor, Tensor], options: argparse.Namespace):
        self.batch, self.warm_up, self.span, self.marks = batch, options.warm_up, options.span, []
        self.steps = options.warm_up + options.spans * options.span

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self.steps + 1):
            if step >= self.warm_up and (step - self.warm_up) % self.span == 0:
                synchronise()
                self.marks.append(time.perf_counter())
            if step < self.steps:
                yield self.batch

    def seconds(self) -> list[float]:
        return [(later - earlier) / self.span for earlier, later in zip(self.marks, self.marks[1:])]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Normalised pixels `(b, 3, side, side)` and labels `(b,)`, the same on both sides."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(options.batch, 3, options.image_size, options.image_size, generator=generator)
    labels = torch.randint(NUM_LABELS, (options.batch,), generator=generator)
    return pixels.to(device()), labels.to(device())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Ours


def our_row(variant: list[str], options: argparse.Namespace) -> dict:
    steps = options.warm_up + options.spans * options.span
    settings = {
        "per_device_train_batch_size": options.batch,
        "max_steps": steps,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": "false",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    here = [] if device().type == "cuda" else ["--use_cpu", "true", "--cuda_graph", "false"]
    common = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    recipe = parse_recipe([options.recipe, *common, *variant, *here])
    silent = {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no"}
    args = replace(recipe.stages[0].args, output_dir=tempfile.mkdtemp(), **silent)
    size = {"image_size": options.image_size, "num_labels": NUM_LABELS}
    torch.manual_seed(0)
    teacher = ViTForImageClassification(ViTConfig(**DEIT_TINY, **size))
    config = recipe.model.student_config | {"drop_path_rate": DROP_PATH, "mixer_type": recipe.model.mixer_type}
    student = CABVisionMambaForImageClassification(CABVisionMambaConfig(**size, **config))
    pixels, _ = random_batch(options)
    timer = StepTimer(options.warm_up, options.span)
    fresh_memory()
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=Indices(),
        data_collator=lambda rows: {"pixel_values": pixels},
        callbacks=[timer],
    )
    trainer.train()
    result = row(timer.seconds(), options.batch)
    return result | parameters(teacher, student, trainer.model.bridge)


def parameters(teacher: nn.Module, student: nn.Module, bridge: nn.Module) -> dict[str, dict[str, int]]:
    return {"parameters": {"teacher": count(teacher), "student": count(student), "bridge": count(bridge)}}


# The released code


def earlier_calls(kernels: ModuleType) -> ModuleType:
    """causal_conv1d 1.4's calls, which return new tensors, over later kernels, which fill given ones."""

    def forward(x, weight, bias, seq_idx, initial_states, final_states, silu):
        out = torch.empty_like(x)
        kernels.causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states, silu)
        return out

    def backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu):
        dx = torch.empty_like(x) if dx is None else dx
        dweight, dbias = (torch.zeros_like(one, dtype=torch.float32) for one in (weight, bias))
        kernels.causal_conv1d_bwd(
            x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, None, silu
        )
        return dx, dweight.type_as(weight), dbias.type_as(bias), None

    calls = ModuleType(KERNELS)
    calls.causal_conv1d_fwd, calls.causal_conv1d_bwd = forward, backward
    return calls


@contextlib.contextmanager
def released_modules(folder: Path) -> Iterator[None]:
    """Imports find the released packages first; afterwards the installed `mamba_ssm` is itself again."""
    importlib.import_module("causal_conv1d")  # binds its own kernels before their calls are translated
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "mamba_ssm"}
    kernels = importlib.import_module(KERNELS)
    paths = [str(folder / "vision_CAB"), str(folder / "vision_CAB" / "mamba-1p1p1")]
    sys.modules[KERNELS] = earlier_calls(kernels)
    sys.path[:0] = paths
    # Gone from transformers 5, imported by the released package and not used here.
    for name in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput"):
        setattr(transformers.generation, name, transformers.generation.GenerateDecoderOnlyOutput)
    try:
        yield
    finally:
        sys.modules[KERNELS] = kernels
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]
        sys.modules.update(ours)
        for path in paths:
            sys.path.remove(path)


def import_released(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The released training loop and its models.

    Raises:
        ImportError: kernels, timm or einops are missing; the released code itself would go on without kernels.
    """
    if "engine" not in sys.modules:
        with released_modules(folder):
            importlib.import_module("mamba_ssm.ops.selective_scan_interface")
            importlib.import_module("mamba_ssm.ops.triton.layer_norm")
            importlib.import_module("Vim.models_dual_vit2vim")
            importlib.import_module("engine")
    return sys.modules["engine"], sys.modules["Vim.models_dual_vit2vim"]


def released_model(models: ModuleType, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    build = getattr(models, SCRIPT.model)
    model = build(
        mode=SCRIPT.mode, kernel_type=SCRIPT.kernel_type, num_classes=NUM_LABELS, img_size=options.image_size
    ).to(device())
    model.teacher.requires_grad_(False)
    return model.train()


def released_row(name: str, options: argparse.Namespace) -> dict:
    engine, models = import_released(options.released)
    timm = importlib.import_module("timm")
    dtype = RELEASED[name]
    fresh_memory()
    model = released_model(models, options)
    settings = SimpleNamespace(**vars(SCRIPT) | {"lr": SCRIPT.lr * options.batch / 512})
    optimizer = importlib.import_module("timm.optim").create_optimizer(settings, model)
    pixels, labels = random_batch(options)

    def autocast() -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device().type, dtype)

    if name.endswith("bare"):
        seconds = timed(bare_step(model, optimizer, pixels, autocast), options.warm_up, options.spans, options.span)
    else:
        loader = Marked((pixels, labels), options)
        with contextlib.redirect_stdout(io.StringIO()):
            engine.train_one_epoch(
                model,
                nn.CrossEntropyLoss(),
                loader,
                optimizer,
                device(),
                0,
                timm.utils.NativeScaler() if dtype is torch.float16 else "none",
                autocast,
                None,
                timm.utils.ModelEma(model, decay=SCRIPT.ema_decay),
                set_training_mode=True,
                args=settings,
            )
        seconds = loader.seconds()
    return row(seconds, options.batch) | parameters(model.teacher, model.student, model.aligner)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, autocast: Callable) -> Callable:
    def step() -> None:
        with autocast():
            _, soft_loss, bridge_loss = model(pixels)
            loss = soft_loss + SCRIPT.atd_weight * bridge_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bridge_gradients(options: argparse.Namespace) -> dict[str, float]:
    """Norms of what the released bridge loss alone gives to the student and to the bridge."""
    model = released_model(import_released(options.released)[1], options)
    pixels, _ = random_batch(options)
    _, _, bridge_loss = model(pixels)
    bridge_loss.backward()
    norms = {}
    for name in ("student", "aligner"):
        gradients = [p.grad.norm() for p in getattr(model, name).parameters() if p.grad is not None]
        norms[name] = torch.stack(gradients).norm().item() if gradients else 0.0
    return norms


def measure(name: str, options: argparse.Namespace) -> dict:
    if name == BRIDGE_GRADIENTS:
        return bridge_gradients(options)
    result = our_row(OURS[name], options) if name in OURS else released_row(name, options)
    return {key.replace("tokens", "images"): value for key, value in result.items()}


def main() -> None:
    parser = step_parser(__doc__, VARIANTS)
    parser.add_argument("--released", type=Path, required=True, help="folder of the released code")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--batch", type=int, default=64, help="64 is run_distill.sh's")
    parser.add_argument("--image_size", type=int, default=224)
    parser.set_defaults(warm_up=5)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # the released script sets it
    facts = {"recipe": options.recipe, "batch": options.batch, "image_size": options.image_size}
    report = step_report(options, **facts, float32_matmul_precision=torch.get_float32_matmul_precision())
    for name in options.variants:
        try:
            report["results"][name] = measure(name, options)
        except (Exception, SystemExit) as error:  # a variant that does not run is a result, too
            report["results"][name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{name}: {report['results'][name]}", flush=True)
        save_report(options, report)


if __name__ == "__main__":
    main()
