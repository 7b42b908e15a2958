"""On a CUDA device: mixers and models against mamba_ssm's own modules and against the torch path."""

import pytest
import torch

from cab_hf import CABMambaConfig, CABMambaForCausalLM, CABVisionMambaConfig, CABVisionMambaForImageClassification
from cab_hf.models import ssm_kernels
from cab_hf.models.mixers import S6Mixer, SSDMixer
from cab_hf.teachers.demo import random_llama
from cab_hf.teachers.sampling import sample_documents


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def scattered(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters far from their start, so that a wrong use of one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module.cuda()


def gradients(module: torch.nn.Module, output: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    inputs = torch.autograd.grad((output * weight).sum(), [x, *module.parameters()])
    return dict(zip(["input", *(name for name, _ in module.named_parameters())], inputs))


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name].reshape(value.shape)
        error = (value - other).norm() / other.norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def config(mixer_type: str, **overrides) -> CABMambaConfig:
    fields = {
        "vocab_size": 99,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "mixer_type": mixer_type,
        "head_dim": 32,
        "n_groups": 2,
        "state_size": 16,
        "chunk_size": 64,
        "transition_init": "s4d",
    }
    return CABMambaConfig(**(fields | overrides))


def test_ssd_mixer_equals_mamba_ssm():
    mamba2 = pytest.importorskip("mamba_ssm.modules.mamba2")
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs = mamba2.Mamba2(
        d_model=64, d_state=16, d_conv=4, expand=2, headdim=16, ngroups=2, chunk_size=64, use_mem_eff_path=False
    )
    scattered(theirs)
    ours = SSDMixer(config("mamba2", head_dim=16), 0).cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 130, 64, device="cuda", requires_grad=True)
    # Triton's float32 products are tf32: 1e-2 on both sides of the comparison.
    assert_close(gradients(ours, ours(x)[0], x), gradients(theirs, theirs(x), x), 1e-2)
    assert_close({"output": ours(x)[0]}, {"output": theirs(x)}, 1e-3)


def test_s6_mixer_equals_mamba_ssm():
    mamba = pytest.importorskip("mamba_ssm.modules.mamba_simple")
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs = scattered(mamba.Mamba(d_model=64, d_state=16, d_conv=4, expand=2, use_fast_path=False))
    ours = S6Mixer(config("mamba", time_step_rank=4), 0).cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 130, 64, device="cuda", requires_grad=True)
    assert_close({"output": ours(x)[0]}, {"output": theirs(x)}, 1e-4)
    assert_close(gradients(ours, ours(x)[0], x), gradients(theirs, theirs(x), x), 1e-3)


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
def test_kernels_equal_torch(mixer_type, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = scattered(CABMambaForCausalLM(config(mixer_type))).eval()
    ids = torch.randint(99, (2, 77), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    logits, states = {}, {}
    for backend in ("torch", "auto"):
        monkeypatch.setenv("CAB_SSM_BACKEND", backend)
        logits[backend] = model(input_ids=ids, attention_mask=mask).logits
        prefill = model(input_ids=ids[:, :70], attention_mask=mask[:, :70], use_cache=True)
        steps = [
            model(input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=prefill.cache).logits
            for t in range(70, 77)
        ]
        states[backend] = torch.cat(steps, dim=1)
    real = mask.bool()
    error = (logits["auto"] - logits["torch"])[real].norm() / logits["torch"][real].norm()
    assert error < (1e-4 if mixer_type == "mamba" else 3e-3)
    error = (states["auto"] - logits["torch"][:, 70:]).norm() / logits["torch"][:, 70:].norm()
    assert error < (1e-4 if mixer_type == "mamba" else 3e-3)


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
def test_bfloat16_autocast_is_near_float32(mixer_type):
    model = scattered(CABMambaForCausalLM(config(mixer_type))).train()
    ids = torch.randint(99, (2, 77), device="cuda")
    exact = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cuda", torch.bfloat16):
        rounded = model(input_ids=ids, labels=ids).loss
    rounded.backward()
    assert abs(rounded - exact) < 0.05 * exact
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
def test_bidirectional_kernels_equal_torch(mixer_type, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = {"image_size": 20, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_labels": 7}
    mixers = {"mixer_type": mixer_type, "state_size": 16, "head_dim": 16, "transition_init": "s4d"}
    model = scattered(CABVisionMambaForImageClassification(CABVisionMambaConfig(**sizes, **mixers)))
    images = torch.randn(3, 3, 20, 20, device="cuda", requires_grad=True)
    found = {}
    for backend in ("torch", "auto"):
        monkeypatch.setenv("CAB_SSM_BACKEND", backend)
        logits = model(pixel_values=images).logits
        found[backend] = {"logits": logits} | gradients(model, logits, images)
    assert_close(found["auto"], found["torch"], 1e-3 if mixer_type == "mamba" else 1e-2)


def test_compiled_samples_are_the_models_own():
    model, tokenizer = random_llama()
    model.cuda()
    options = {"length": 24, "batch_size": 4, "temperature": 1e-3}  # next to nothing is left to chance
    texts = [
        sample_documents(model, tokenizer, 300, torch_compile=compiles, **options)["input_ids"]
        for compiles in (False, True)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mixer_type", ["mamba", "mamba2"])
def test_a_whole_graph_holds_the_kernels(mixer_type, monkeypatch):
    monkeypatch.setattr(ssm_kernels, "_TRAINS_BY_OPERATORS", True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.compiler.reset()
    model = scattered(CABMambaForCausalLM(config(mixer_type))).train()
    ids = torch.randint(99, (2, 77), device="cuda")
    found = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        output = call(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        found.append({"logits": output.logits} | {name: one.grad.clone() for name, one in model.named_parameters()})
    assert_close(found[1], found[0], 1e-3 if mixer_type == "mamba" else 1e-2)
