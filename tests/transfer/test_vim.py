"""Vim checkpoints: the student against Vim's forward pass, restated in float64 from the state dict alone."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import random_images

from cab_hf.models import CABVisionMambaForImageClassification
from cab_hf.transfer import convert_vim_checkpoint, vim_from_state_dict


WIDTH, MIXER, STATE, RANK, KERNEL, PATCH, CLASSES = 12, 20, 5, 3, 3, 4, 7
BRANCHES = ("", "_b")


def vim_weights(depth=2, patches=9, seed=0):
    """Random weights under Vim's names, of sizes that no default has."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=0.4):
        return torch.randn(shape, generator=generator) * scale

    state = {
        "patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": random(WIDTH),
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, patches + 1, WIDTH),
        "norm_f.weight": 1 + random(WIDTH),
        "head.weight": random(CLASSES, WIDTH),
        "head.bias": random(CLASSES),
    }
    for i in range(depth):
        state[f"layers.{i}.norm.weight"] = 1 + random(WIDTH)
        mixer = {"in_proj.weight": random(2 * MIXER, WIDTH), "out_proj.weight": random(WIDTH, MIXER)}
        for b in BRANCHES:
            mixer |= {
                f"A{b}_log": random(MIXER, STATE),
                f"D{b}": random(MIXER),
                f"conv1d{b}.weight": random(MIXER, 1, KERNEL),
                f"conv1d{b}.bias": random(MIXER),
                f"x_proj{b}.weight": random(RANK + 2 * STATE, MIXER),
                f"dt_proj{b}.weight": random(MIXER, RANK),
                f"dt_proj{b}.bias": random(MIXER),
            }
        state |= {f"layers.{i}.mixer.{name}": value for name, value in mixer.items()}
    return state


def naive_rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def naive_branch(w, b, xz):
    """One branch of bimamba v2 on `xz` `(t, 2e)`, in the order in which it reads: `(t, e)`, gated."""
    x, z = xz[:, :MIXER], xz[:, MIXER:]
    padded = torch.cat([x.new_zeros(KERNEL - 1, MIXER), x])
    taps = w[f"conv1d{b}.weight"][:, 0]
    x = torch.stack([(padded[t : t + KERNEL].T * taps).sum(-1) for t in range(len(x))]) + w[f"conv1d{b}.bias"]
    x = x * torch.sigmoid(x)
    state, outputs = x.new_zeros(MIXER, STATE), []
    for t in range(len(x)):
        low_rank, B, C = (w[f"x_proj{b}.weight"] @ x[t]).split([RANK, STATE, STATE])
        step = torch.log1p(torch.exp(w[f"dt_proj{b}.weight"] @ low_rank + w[f"dt_proj{b}.bias"]))
        decay = torch.exp(-torch.exp(w[f"A{b}_log"]) * step[:, None])
        state = decay * state + step[:, None] * B[None] * x[t][:, None]
        outputs.append((state @ C + w[f"D{b}"] * x[t]) * z[t] * torch.sigmoid(z[t]))
    return torch.stack(outputs)


def naive_vim(state, image):
    """Vim's logits of one image, `(CLASSES,)`."""
    state = {name: value.double() for name, value in state.items()}
    patches = []
    for top in range(0, image.shape[1], PATCH):
        for left in range(0, image.shape[2], PATCH):
            patch = image[:, top : top + PATCH, left : left + PATCH].double()
            patches.append((state["patch_embed.proj.weight"] * patch).sum(dim=(1, 2, 3)))
    tokens = torch.stack(patches) + state["patch_embed.proj.bias"]
    middle = len(tokens) // 2
    tokens = torch.cat([tokens[:middle], state["cls_token"][0], tokens[middle:]]) + state["pos_embed"][0]
    residual, hidden = torch.zeros_like(tokens), tokens
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    for i in range(depth):
        w = {name.split(".mixer.")[1]: value for name, value in state.items() if name.startswith(f"layers.{i}.mixer.")}
        residual = residual + hidden
        xz = naive_rms_norm(residual, state[f"layers.{i}.norm.weight"]) @ w["in_proj.weight"].T
        both = naive_branch(w, "", xz) + naive_branch(w, "_b", xz.flip(0)).flip(0)
        hidden = both / 2 @ w["out_proj.weight"].T
    last = naive_rms_norm(residual + hidden, state["norm_f.weight"])[middle]
    return state["head.weight"] @ last + state["head.bias"]


@pytest.mark.parametrize(("size", "patches"), [(12, 9), ((8, 12), 6)])
@torch.no_grad()
def test_logits_are_vims(size, patches):
    state = vim_weights(patches=patches)
    student = vim_from_state_dict(state, image_size=size)
    images = random_images(2, 3, *student.config.image_height_and_width)
    expected = torch.stack([naive_vim(state, image) for image in images])
    torch.testing.assert_close(student(images).logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.3 and expected[0].sub(expected[1]).abs().max() > 0.1
    for name, value in state.items():  # every weight has its place and its say
        generator = torch.Generator().manual_seed(1)
        changed = state | {name: value + torch.randn(value.shape, generator=generator) * 0.1}
        found = vim_from_state_dict(changed, image_size=size)(images[:1]).logits[0].double()
        assert (found - expected[0]).abs().max() > 1e-6, name


def test_gradients_are_vims():
    state = vim_weights()
    image = random_images(1, 3, 12, 12)[0]
    student = vim_from_state_dict(state, image_size=12)
    target = torch.randn(CLASSES, generator=torch.Generator().manual_seed(3))
    (student(image[None]).logits[0] * target).sum().backward()
    leaves = {name: value.double().requires_grad_() for name, value in state.items()}
    (naive_vim(leaves, image) * target).sum().backward()
    for own, name in (
        ("embeddings.class_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
        ("layers.0.mixer.A_log", "layers.0.mixer.A_log"),
        ("layers.0.mixer.backward.A_log", "layers.0.mixer.A_b_log"),
        ("layers.0.mixer.in_proj.weight", "layers.0.mixer.in_proj.weight"),
        ("layers.1.mixer.backward.conv1d.weight", "layers.1.mixer.conv1d_b.weight"),
        ("layers.1.mixer.backward.dt_proj.bias", "layers.1.mixer.dt_proj_b.bias"),
        ("layers.1.mixer.x_proj.weight", "layers.1.mixer.x_proj.weight"),
        ("layers.1.norm.weight", "layers.1.norm.weight"),
    ):
        found, expected = student.backbone.get_parameter(own).grad.double(), leaves[name].grad
        assert expected.abs().max() > 1e-4, name
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_sizes_are_read_from_the_weights():
    student = vim_from_state_dict(vim_weights(depth=3), image_size=12, drop_path_rate=0.1)
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.mixer_width) == (WIDTH, 3, MIXER)
    assert (config.state_size, config.time_step_rank, config.conv_kernel) == (STATE, RANK, KERNEL)
    assert (config.patch_size, config.grid, config.num_labels) == (PATCH, (3, 3), CLASSES)
    assert (config.class_token, config.pooling, config.norm_type) == ("middle", "class_token", "rms_norm")
    assert (config.layer_norm_epsilon, config.residual_in_fp32, config.drop_path_rate) == (1e-5, True, 0.1)
    assert not student.training and {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    half = {name: value.half() for name, value in vim_weights().items()}
    assert vim_from_state_dict(half, image_size=12).classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["model", "model and args", "plain", "safetensors"])
@torch.no_grad()
def test_files(kind, tmp_path):
    state, images = vim_weights(), random_images(2, 3, 12, 12)
    path = tmp_path / f"vim.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
        arguments = {"args": argparse.Namespace(model=name), "epoch": 3} if kind == "model and args" else {}
        torch.save(state if kind == "plain" else {"model": state} | arguments, path)
    student = convert_vim_checkpoint(path, tmp_path / "student", image_size=12)
    loaded = CABVisionMambaForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(images).logits, student(images).logits)
    assert torch.equal(student(images).logits, vim_from_state_dict(state, image_size=12)(images).logits)


def test_heads(monkeypatch):
    warnings = []
    monkeypatch.setattr("cab_hf.transfer.vim.logger.warning", warnings.append)
    state = vim_weights()
    labels = {index: f"kind {index}" for index in range(CLASSES)}
    named = vim_from_state_dict(state, image_size=12, id2label=labels, label2id={v: k for k, v in labels.items()})
    assert named.config.id2label == labels and torch.equal(named.classifier.weight, state["head.weight"])
    assert torch.equal(
        vim_from_state_dict(state, image_size=12, num_labels=CLASSES).classifier.bias, state["head.bias"]
    )
    assert not warnings
    assert vim_from_state_dict(state, image_size=12, num_labels=2).classifier.weight.shape == (2, WIDTH)
    assert "2 labels starts at random" in warnings[0] and "its head has 7" in warnings.pop()
    headless = {name: value for name, value in state.items() if "head" not in name}
    assert vim_from_state_dict(headless, image_size=12, num_labels=2).classifier.weight.shape == (2, WIDTH)
    assert "it has no head" in warnings.pop()
    assert not list(vim_from_state_dict(headless, image_size=12, num_labels=0).classifier.parameters())
    assert not warnings
    with pytest.raises(ValueError, match="missing are head.bias, head.weight.*needs num_labels"):
        vim_from_state_dict(headless, image_size=12)


def test_other_layouts(tmp_path):
    state = vim_weights()
    one_direction = {name: value for name, value in state.items() if "_b" not in name}
    for changed, message in (
        (one_direction, r"missing are layers.0.mixer.A_b_log.* and 6 more"),
        (state | {"rope.freqs_cos": torch.ones(2)}, "unknown are rope.freqs_cos.*class token in the middle"),
        (state | {"dist_token": torch.ones(2), "head_dist.weight": torch.ones(2)}, "dist_token, head_dist.weight"),
        (state | {"cls_token_head": torch.ones(2)}, "unknown are cls_token_head"),
        ({k: v for k, v in state.items() if "norm_f" not in k}, "missing are norm_f.weight"),
        ({k: v for k, v in state.items() if "layers.0" not in k}, "missing are layers.0.mixer"),
        ({}, "no layers"),
    ):
        with pytest.raises(ValueError, match=message):
            vim_from_state_dict(changed, image_size=12)
    with pytest.raises(ValueError, match=r"10 positions.*\(20, 20\) pixels.*have 25.*image_size=12 would.*stride"):
        vim_from_state_dict(state, image_size=20)
    with pytest.raises(ValueError, match="7 positions, but images of"):
        vim_from_state_dict(vim_weights(patches=6), image_size=12)
    for name in ("vim_tiny_bimambav2_with_cls_token_div2", "vim_tiny_bimambav2_with_midclstok"):
        torch.save({"model": state, "args": argparse.Namespace(model=name)}, tmp_path / "vim.pth")
        with pytest.raises(ValueError, match=f"'{name}', which has another layout"):
            convert_vim_checkpoint(tmp_path / "vim.pth", tmp_path / "student", image_size=12)
    assert not (tmp_path / "student").exists()
