"""Vision students: tokens, positions, pooling, labels, weights, training, and a folder that is enough."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import MIXER_TYPES, VISION_VARIANTS, largest_difference, random_images, shake, tiny_vision_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from cab_hf.models import CABVisionMambaConfig, CABVisionMambaForImageClassification, CABVisionMambaModel, mixers
from cab_hf.models.mixers import BidirectionalProjections, SSMProjections
from cab_hf.models.modeling_cab_vision_mamba import drop_path


LABELS = torch.tensor([1, 4])
PLACES = {"first": 0, "middle": 3, "none": None}  # among the 2 x 3 patches of the tiny model


# Sizes


@pytest.mark.parametrize("width, published", [(192, 7_148_008), (384, 25_796_584)], ids=["Vim-Tiny", "Vim-Small"])
def test_vim_has_its_published_size(width, published):
    inner, state, rank, taps = 2 * width, 16, width // 16, 4
    convolution = inner * taps + inner
    x_proj, dt_proj = inner * (rank + 2 * state), rank * inner + inner
    direction = convolution + x_proj + dt_proj + inner * state + inner  # and A, D
    block = width + width * 2 * inner + 2 * direction + inner * width  # norm, in_proj, out_proj
    patches, class_token, positions = 3 * 16 * 16 * width + width, width, (14 * 14 + 1) * width
    head = width * 1000 + 1000
    assert 24 * block + patches + class_token + positions + width + head == published
    with torch.device("meta"):
        model = CABVisionMambaForImageClassification(CABVisionMambaConfig(hidden_size=width, num_labels=1000))
    assert model.num_parameters() == published
    assert sum(parameter.numel() for parameter in model.backbone.layers[0].parameters()) == block
    assert sum(parameter.numel() for parameter in model.backbone.layers[0].mixer.backward.parameters()) == direction


# What the model computes


def naive_norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def naive_tokens(model: CABVisionMambaModel, images: torch.Tensor) -> torch.Tensor:
    """Embeddings of an image of the trained size, token after token."""
    config, embeddings, patch = model.config, model.embeddings, model.config.patch_size
    kernel, bias = embeddings.patch_embedding.weight, embeddings.patch_embedding.bias
    tokens = []
    for row in range(images.shape[2] // patch):
        for column in range(images.shape[3] // patch):
            pixels = images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(torch.einsum("bchw,dchw->bd", pixels, kernel) + bias)
    place = PLACES[config.class_token]
    if place is not None:
        tokens.insert(place, embeddings.class_token[0].expand(len(images), -1))
    if config.use_absolute_positions:
        tokens = [token + position for token, position in zip(tokens, embeddings.position_embeddings[0], strict=True)]
    for register in range(config.num_register_tokens):
        tokens.insert(place + 1 + register, embeddings.register_tokens[0, register].expand(len(images), -1))
    return torch.stack(tokens, dim=1)


def naive_pool(config: CABVisionMambaConfig, hidden: torch.Tensor) -> torch.Tensor:
    tokens, place = list(hidden.unbind(dim=1)), PLACES[config.class_token]
    class_token = None if place is None else tokens.pop(place)
    registers = [tokens.pop(place) for _ in range(config.num_register_tokens)]
    mean = sum(tokens) / len(tokens)
    return torch.cat(
        {
            "class_token": [class_token],
            "mean": [mean],
            "class_token_and_mean": [class_token, mean],
            "class_token_and_registers": [class_token, *registers],
        }[config.pooling],
        dim=-1,
    )


@pytest.mark.parametrize("name", VISION_VARIANTS)
@torch.no_grad()
def test_the_model_is_the_sum_of_its_parts(name):
    model, images = tiny_vision_model(**VISION_VARIANTS[name]), random_images(2)
    backbone, config = model.backbone, model.config
    output = model(images, output_hidden_states=True, output_projections=True, output_attentions=True)
    hidden = naive_tokens(backbone, images)
    states = [hidden]
    for layer, shown, attention_map in zip(backbone.layers, output.projections, output.attentions, strict=True):
        mixed, projections = layer.mixer(naive_norm(layer.norm, hidden))
        hidden = hidden + mixed * (1.0 if config.layer_scale_init is None else layer.mixer_scale)
        if config.intermediate_size:
            inner = layer.mlp(naive_norm(layer.mlp_norm, hidden))
            hidden = hidden + inner * (1.0 if config.layer_scale_init is None else layer.mlp_scale)
        states.append(hidden)
        assert type(shown) is (BidirectionalProjections if config.bidirectional else SSMProjections)
        for found, expected in zip(shown, projections, strict=True):
            assert largest_difference(found, expected) < 1e-4
        tokens = hidden.shape[1]
        assert attention_map.shape == (2, 4, tokens, tokens)
        assert bool((attention_map.triu(1) != 0).any()) == config.bidirectional
    states[-1] = naive_norm(backbone.norm_f, hidden)
    for found, expected in zip(output.hidden_states, states, strict=True):
        assert largest_difference(found, expected) < 1e-4
    pooled = naive_pool(config, states[-1])
    assert largest_difference(output.logits, pooled @ model.classifier.weight.T + model.classifier.bias) < 1e-4
    base = backbone(images)
    assert largest_difference(base.last_hidden_state, states[-1]) < 1e-4
    assert largest_difference(base.pooler_output, pooled) < 1e-4 and pooled.shape[1] == config.pooled_size
    assert base.projections is base.hidden_states is base.attentions is None
    logits, *rest = model(images, return_dict=False)
    assert torch.equal(logits, output.logits) and rest == []


def test_every_parameter_gets_a_gradient():
    """What DDP needs without `find_unused_parameters`; where pooling leaves tokens out, mixers still carry them."""
    for name, variant in VISION_VARIANTS.items():
        model = tiny_vision_model(**variant).train()
        model(random_images(2), labels=LABELS).loss.backward()
        without = [key for key, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
        assert without == [], name


@pytest.mark.parametrize("labels", [0, 1, 7])
def test_the_classifier_follows_the_labels(labels):
    model = tiny_vision_model(num_labels=labels)
    output = model(random_images(2))
    assert output.logits.shape == (2, labels or 16) and output.loss is None
    assert isinstance(model.classifier, torch.nn.Linear) == (labels > 0)


# Image sizes


@pytest.mark.parametrize("class_token", PLACES)
@pytest.mark.parametrize("size", [(16, 16), (4, 20), (12, 8)])
@torch.no_grad()
def test_positions_of_another_size(class_token, size):
    """The patches' positions are resized on the grid; the class token keeps its own, wherever it then stands."""
    model = tiny_vision_model(class_token=class_token).backbone
    learned, (rows, columns) = model.embeddings.position_embeddings, (size[0] // 4, size[1] // 4)
    found = model.embeddings.positions(rows, columns)
    place, old_place = model.config.class_token_index(rows * columns), PLACES[class_token]
    patches = found
    if place is not None:
        assert place == {"first": 0, "middle": rows * columns // 2}[class_token]
        assert torch.equal(found[:, place], learned[:, old_place])
        patches = torch.cat([found[:, :place], found[:, place + 1 :]], dim=1)
        learned = torch.cat([learned[:, :old_place], learned[:, old_place + 1 :]], dim=1)
    for channel in range(16):
        grid = learned[..., channel].view(1, 1, 2, 3)
        resized = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        assert largest_difference(patches[..., channel].flatten(), resized.flatten()) < 1e-6
    output = model(random_images(2, 3, *size), output_attentions=True)
    tokens = rows * columns + (class_token != "none")
    assert output.last_hidden_state.shape == (2, tokens, 16) and output.attentions[0].shape[-1] == tokens
    # the class token is where the mixers and the pooling look for it
    if place is not None:
        assert torch.equal(output.pooler_output, output.last_hidden_state[:, place])
    # the trained size is not touched
    assert model.embeddings.positions(2, 3) is model.embeddings.position_embeddings


@torch.no_grad()
def test_positions_are_resized_as_a_vit_does():
    vit = ViTModel(
        ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    model = tiny_vision_model(class_token="first", image_size=16).backbone
    model.embeddings.position_embeddings.copy_(vit.embeddings.position_embeddings.normal_())
    for height, width in ((24, 24), (16, 16), (8, 20)):
        tokens = torch.zeros(1, 1 + height * width // 16, 16)
        expected = vit.embeddings.interpolate_pos_encoding(tokens, height, width)
        assert largest_difference(model.embeddings.positions(height // 4, width // 4), expected) < 1e-6


@torch.no_grad()
def test_positions_are_resized_in_float32():
    model = tiny_vision_model(class_token="none").backbone
    model.embeddings.position_embeddings.data = model.embeddings.position_embeddings.bfloat16()
    rounded = model.embeddings.positions(4, 5)
    model.embeddings.position_embeddings.data = model.embeddings.position_embeddings.float()
    assert torch.equal(rounded, model.embeddings.positions(4, 5).bfloat16())


@pytest.mark.parametrize(
    "shape, words",
    [
        ((2, 1, 8, 12), ["(2, 1, 8, 12)", "num_channels=3"]),
        ((3, 8, 12), ["(3, 8, 12)", "(batch, 3, height, width)"]),
        ((2, 3, 10, 12), ["height of 10 pixels", "patches of 4", "8 and 12"]),
        ((2, 3, 8, 15), ["width of 15 pixels", "patches of 4", "12 and 16"]),
        ((2, 3, 3, 12), ["height of 3 pixels", "are 4."]),
        ((2, 3, 8, 0), ["width of 0 pixels", "are 4."]),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(shape, words):
    with pytest.raises(ValueError) as error:
        tiny_vision_model()(torch.zeros(shape))
    for word in words:
        assert word in str(error.value)


def test_images_must_be_given():
    with pytest.raises(ValueError, match="`pixel_values`.*got None"):
        tiny_vision_model()()


# Labels


@torch.no_grad()
def test_labels_are_classes_or_probabilities():
    model, images = tiny_vision_model(), random_images(2)
    logits = model(images).logits
    chosen = F.log_softmax(logits.double(), dim=-1)
    hard = model(images, labels=LABELS).loss
    assert float(hard) == pytest.approx(-float(chosen[[0, 1], LABELS].mean()), rel=1e-5)
    mixed = torch.tensor([[0.3, 0.0, 0.7, 0, 0, 0, 0], [0, 0, 0, 0, 0.9, 0.1, 0]])
    soft = model(images, labels=mixed).loss
    assert float(soft) == pytest.approx(-float((mixed * chosen).sum(dim=-1).mean()), rel=1e-5)
    assert float(model(images, labels=F.one_hot(LABELS, 7).float()).loss) == pytest.approx(float(hard), rel=1e-5)
    # and the same before any integer label has been seen
    fresh = tiny_vision_model()
    assert torch.equal(fresh(images, labels=mixed).loss, soft) and fresh.config.problem_type is None
    multi = tiny_vision_model(problem_type="multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(logits, mixed)
    assert float(multi(images, labels=mixed).loss) == pytest.approx(float(expected), rel=1e-5)
    single = tiny_vision_model(num_labels=1)
    target = torch.tensor([0.5, -1.0])
    expected = (single(images).logits[:, 0] - target).square().mean()
    assert float(single(images, labels=target).loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "shape"),
    [({}, (2, 3)), ({"problem_type": "regression"}, (2,)), ({"problem_type": "multi_label_classification"}, (2, 1))],
)
def test_floating_labels_of_another_shape_are_refused(config, shape):
    with pytest.raises(ValueError, match=rf"`labels`.*{re.escape(str(shape))}.*\(2, 7\).*class indices"):
        tiny_vision_model(**config)(random_images(2), labels=torch.rand(shape))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_class_indices_of_any_whole_numbers(dtype):
    model, images = tiny_vision_model(), random_images(2)
    assert torch.equal(model(images, labels=LABELS.to(dtype)).loss, tiny_vision_model()(images, labels=LABELS).loss)


# Weights


@pytest.mark.parametrize("name", VISION_VARIANTS)
@torch.no_grad()
def test_save_and_load_is_exact(name, tmp_path):
    model, images = tiny_vision_model(**VISION_VARIANTS[name]), random_images(2)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CABVisionMambaForImageClassification
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(loaded, model.state_dict())
    assert torch.equal(loaded(images).logits, model(images).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is CABVisionMambaModel
    assert torch.equal(base(images).last_hidden_state, model.backbone(images).last_hidden_state)
    rebuilt = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(images).logits, model(images).logits)


def assert_same_weights(model, expected: dict[str, torch.Tensor], but: str = "") -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if name != but:
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "name", ["s6, first, register, gated mlp", "ssd, first, layer scale, plain mlp"], ids=MIXER_TYPES
)
def test_a_missing_key_starts_anew_and_leaves_the_others_alone(name, tmp_path):
    model = tiny_vision_model(**VISION_VARIANTS[name], num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for key in weights:
        kept = {other: value for other, value in weights.items() if other != key}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, report = CABVisionMambaForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == {key}
        assert_same_weights(loaded, weights, but=key)
        found = loaded.state_dict()[key]
        assert bool(found.isfinite().all()) and not torch.equal(found, weights[key]), key
        if key.endswith("_scale"):
            assert bool((found == 0.5).all())
        elif key.endswith(("token", "tokens", "position_embeddings", "classifier.weight", "patch_embedding.weight")):
            assert 0.01 < float(found.std()) < 0.03, key
        elif key.endswith(("classifier.bias", "patch_embedding.bias")):
            assert bool((found == 0).all())


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_half_precision_keeps_what_decides_the_transition(mixer_type, tmp_path):
    model, images = tiny_vision_model(mixer_type=mixer_type, intermediate_size=24), random_images(2)
    model.save_pretrained(tmp_path)
    loaded = CABVisionMambaForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    names = ("A_log", "D", "dt_bias", "dt_proj.weight", "dt_proj.bias")
    for name, value in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, value if name.endswith(names) else value.bfloat16()), name
    kept = [name for name, value in loaded.state_dict().items() if value.dtype == torch.float32]
    assert len(kept) == 2 * 2 * (4 if mixer_type == "mamba" else 3)  # layers, directions
    logits = loaded(images).logits  # from float32 images
    assert logits.dtype == torch.bfloat16
    assert float((logits.float() - model(images).logits).std() / model(images).logits.std()) < 0.05


# Training


def test_stochastic_depth_leaves_samples_out_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3)
    dropped = drop_path(branch, 0.25)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)


def test_stochastic_depth_is_for_training_only():
    images = random_images(8)
    model = tiny_vision_model(drop_path_rate=0.5, intermediate_size=24)
    assert torch.equal(model(images).logits, tiny_vision_model(intermediate_size=24)(images).logits)
    assert [layer.drop_path_rate for layer in model.backbone.layers] == [0.0, 0.5]
    first, last = model.train().backbone.layers
    tokens = model.backbone.embeddings(images)
    torch.manual_seed(0)
    assert torch.equal(first(tokens)[0], first(tokens)[0])
    # a sample's mixer or MLP is left out whole, or scaled up; the draws are known, the mixer's comes first
    torch.manual_seed(1)
    kept_mixer, kept_mlp = (torch.rand(8, 1, 1) >= 0.5 for _ in range(2))
    torch.manual_seed(1)
    found = last(tokens)[0]
    middle = tokens + 2.0 * kept_mixer * last.mixer(last.norm(tokens))[0]
    expected = middle + 2.0 * kept_mlp * last.mlp(last.mlp_norm(middle))
    assert largest_difference(found, expected) < 1e-5
    assert 0 < int(kept_mixer.sum()) < 8 and 0 < int(kept_mlp.sum()) < 8


@pytest.mark.parametrize("name", VISION_VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_gradients_also_through_projections(name, use_reentrant, monkeypatch):
    """Also with stochastic depth: the second pass leaves out the samples that the first one left out."""
    model = tiny_vision_model(**VISION_VARIANTS[name], drop_path_rate=0.3).train()
    calls, convolve = [], mixers.causal_conv1d
    monkeypatch.setattr(mixers, "causal_conv1d", lambda *args, **kwargs: calls.append(1) or convolve(*args, **kwargs))
    results, counts = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        calls.clear()
        torch.manual_seed(3)
        output = model(random_images(2), labels=LABELS, output_projections=True)
        loss = output.loss + sum(field.square().mean() for shown in output.projections for field in shown)
        loss.backward()
        results.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
        counts.append(len(calls))
        model.zero_grad()
    assert counts[1] == 2 * counts[0] == (8 if model.config.bidirectional else 4)
    for key, expected in results[0].items():
        assert largest_difference(results[1][key], expected) < 1e-5 * max(1.0, float(expected.abs().max())), key
    # each field alone reaches the weights
    for index in range(len(output.projections[0])):
        model(random_images(2), output_projections=True).projections[0][index].square().sum().backward()
        assert float(model.backbone.layers[0].mixer.in_proj.weight.grad.abs().max()) > 0
        model.zero_grad()


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_steps_in_bf16_stay_finite_and_learn(mixer_type):
    model = tiny_vision_model(mixer_type=mixer_type, drop_path_rate=0.1).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    images, labels = random_images(7), torch.arange(7)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, labels=labels).loss
        loss.backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0], losses


def train(folder, rows, steps: int, config: dict, **arguments) -> CABVisionMambaForImageClassification:
    model = tiny_vision_model(**config)
    options = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options = {**options, "report_to": [], **arguments}
    options = {"max_steps": steps, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options}
    trainer = Trainer(model, TrainingArguments(folder, **options), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    return model


NUMBERS = random_images(6, 7, 1, 1, seed=3).flatten(1)
PROBLEMS = {
    "classes": ({}, torch.arange(6), F.cross_entropy),
    "probabilities": ({}, NUMBERS.softmax(-1), F.cross_entropy),
    "many of many": (
        {"problem_type": "multi_label_classification"},
        (NUMBERS > 0).float(),
        F.binary_cross_entropy_with_logits,
    ),
    "many of many, whole": (
        {"problem_type": "multi_label_classification"},
        (NUMBERS > 0).long(),
        lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels.float()),
    ),
    "regression": ({"problem_type": "regression"}, NUMBERS, F.mse_loss),
    "regression of one": (
        {"num_labels": 1},
        NUMBERS[:, 0],
        lambda logits, labels: (logits[:, 0] - labels).square().mean(),
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_plain_trainer_trains_it(problem, tmp_path):
    config, labels, loss = PROBLEMS[problem]
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(random_images(6), labels)]
    if labels.ndim == 1:
        rows = [{**row, "labels": row["labels"].item()} for row in rows]
    before = tiny_vision_model(**config).state_dict()
    whole = train(tmp_path, rows, 2, config, per_device_train_batch_size=6)
    assert all(not torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    # by hand, and with the batch in parts
    by_hand = tiny_vision_model(**config).train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        loss(by_hand(random_images(6)).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    models = [whole]
    for size in (1, 2):
        models.append(
            train(tmp_path, rows, 2, config, per_device_train_batch_size=size, gradient_accumulation_steps=6 // size)
        )
    for name, value in by_hand.state_dict().items():
        for model in models:
            difference = largest_difference(model.state_dict()[name], value)
            assert difference < 1e-4 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_compiles_without_a_graph_break(mixer_type):
    torch._dynamo.reset()
    model = tiny_vision_model(mixer_type=mixer_type, num_hidden_layers=1).train()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        output = forward(random_images(2), labels=LABELS, output_projections=True)
        (output.loss + output.projections[0].backward_B.square().mean()).backward()
        results.append({"logits": output.logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    for name, expected in results[0].items():
        assert largest_difference(results[1][name], expected) < 1e-4 * max(1.0, float(expected.abs().max())), name


def test_a_shaken_model_differs_from_a_fresh_one():
    """The comparisons above can fail."""
    first, second = tiny_vision_model().state_dict(), shake(tiny_vision_model(), seed=1).state_dict()
    assert not any(torch.equal(first[name], second[name]) for name in first)
