"""Training: finite steps in every precision, gradients through checkpointing, compiling and adapters, offloading."""

import shutil
import weakref

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MIXER_TYPES, VARIANTS, largest_difference, random_ids, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from cab_hf.models import CABMambaForCausalLM, mixers


LORA_TARGETS = ["in_proj", "x_proj", "dt_proj", "out_proj", "up_proj", "down_proj", "gate_proj"]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@pytest.mark.parametrize("precision", ["float32", "bf16 autocast", "bf16 but for the transition", "bf16"])
def test_a_hundred_steps_stay_finite_and_learn(mixer_type, precision, tmp_path):
    """The task: a walk with a fixed stride a row, which only the context tells."""
    torch.manual_seed(0)
    model = tiny_model(
        mixer_type=mixer_type, vocab_size=17, hidden_size=16, state_size=4, intermediate_size=16, chunk_size=8
    ).train()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    elif precision == "bf16 but for the transition":
        model.save_pretrained(tmp_path)
        model = CABMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        start, stride = torch.randint(17, (8, 1)), torch.randint(1, 4, (8, 1))
        ids = (start + stride * torch.arange(10)) % 17
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert sum(losses[-10:]) / 10 < 0.4 * losses[0], losses[::10]
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    """What DDP needs without `find_unused_parameters`."""
    model = tiny_model(**VARIANTS[name]).train()
    ids = random_ids(2, 7)
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_gradients_also_through_projections(name, use_reentrant, monkeypatch):
    model = tiny_model(**VARIANTS[name]).train()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    calls = []
    convolve = mixers.causal_conv1d
    monkeypatch.setattr(mixers, "causal_conv1d", lambda *args, **kwargs: calls.append(1) or convolve(*args, **kwargs))

    def step() -> tuple[dict[str, torch.Tensor], int]:
        calls.clear()
        output = model(ids, attention_mask=mask, labels=ids, output_projections=True, output_hidden_states=True)
        loss = output.loss + sum(field.square().mean() for shown in output.projections for field in shown)
        loss = loss + sum(hidden.square().mean() for hidden in output.hidden_states)
        loss.backward()
        return gradients(model), len(calls)

    expected, plain_calls = step()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found, checkpointed_calls = step()
    assert checkpointed_calls == 2 * plain_calls == 4
    for parameter, gradient in found.items():
        assert largest_difference(gradient, expected[parameter]) < 1e-5 * max(1, expected[parameter].abs().max())
    assert model(ids, use_cache=True).cache is None
    # each field alone reaches the weights
    for index in range(4):
        shown = model(ids, output_projections=True).projections[0]
        shown[index].square().sum().backward()
        assert float(model.backbone.layers[0].mixer.in_proj.weight.grad.abs().max()) > 0
        model.zero_grad()


@torch.no_grad()
def test_activations_nobody_asked_for_are_let_go():
    """A layer's projections do not outlive it: they would fill the memory that checkpointing saves."""
    model = tiny_model(**{**VARIANTS["mixed"], "mixer_types": None, "num_hidden_layers": 4})
    alive, seen = [], []

    def watch(module, args, output):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(output[1].output))

    for layer in model.backbone.layers:
        layer.mixer.register_forward_hook(watch)
    model(random_ids(2, 9), use_cache=False)
    assert max(alive) <= 1
    alive.clear(), seen.clear()
    model(random_ids(2, 9), use_cache=False, output_projections=True)
    assert alive == [0, 1, 2, 3]


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_compiles_without_a_graph_break(mixer_type):
    torch._dynamo.reset()
    model, ids = tiny_model(mixer_type=mixer_type, num_hidden_layers=1), random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    for options in (
        {"attention_mask": mask, "use_cache": True, "past_key_values": None},
        {"seq_idx": seq_idx, "output_attentions": True, "output_projections": True},
    ):
        with torch.no_grad():
            ours, theirs = compiled(ids, **options), model(ids, **options)
        assert largest_difference(ours.logits, theirs.logits) < 1e-4, options
        if "seq_idx" in options:
            assert largest_difference(ours.projections[0].B, theirs.projections[0].B) < 1e-4
            assert largest_difference(ours.attentions[0], theirs.attentions[0]) < 1e-4


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_compiled_training_step_has_the_same_gradients(mixer_type):
    torch._dynamo.reset()
    model = tiny_model(mixer_type=mixer_type, num_hidden_layers=1, intermediate_size=24).train()
    ids, results = random_ids(2, 9), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = forward(ids, labels=ids).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    for name, expected in results[0].items():
        assert largest_difference(results[1][name], expected) < 1e-4 * max(1, expected.abs().max()), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
@torch.no_grad()
def test_inductor_computes_the_same(mixer_type):
    torch._dynamo.reset()
    model, ids = tiny_model(mixer_type=mixer_type, num_hidden_layers=1), random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True)
    assert largest_difference(compiled(ids, use_cache=False).logits, model(ids).logits) < 1e-4


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_compiled_step_of_decoding_minds_its_mask(mixer_type):
    """Compiled code can't look at the mask, so it must carry it through."""
    torch._dynamo.reset()
    model, ids = tiny_model(mixer_type=mixer_type, num_hidden_layers=1), random_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 6] = 0
    logits = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="eager")):
        with torch.no_grad():
            cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache
            for end in (7, 8):
                step = forward(ids[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        logits.append(step.logits)
    assert largest_difference(*logits) < 1e-4
    with torch.no_grad():
        alone = model(torch.cat([ids[:1, :6], ids[:1, 7:]], dim=1)).logits[:, -1:]
    assert largest_difference(logits[1][:1], alone) < 1e-4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
@pytest.mark.parametrize("name", ["s6", "ssd 2 groups, gated mlp", "s6 positions, plain mlp", "mixed"])
def test_lora_reaches_every_target_and_merges(name):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=LORA_TARGETS, r=2, lora_alpha=8, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(**VARIANTS[name]), config).train()
    targets = {n.split(".lora_A")[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if ".lora_A" in n}
    kinds = VARIANTS[name].get("mixer_types", [VARIANTS[name].get("mixer_type")])
    assert targets >= {"in_proj", "out_proj"} and ({"x_proj", "dt_proj"} <= targets) == ("mamba" in kinds)
    ids = random_ids(2, 9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for part in ("lora_B", "lora_A"):  # A's gradient is zero as long as B is
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and "lora_" in parameter_name
                if part in parameter_name:
                    assert float(parameter.grad.abs().max()) > 0, parameter_name
        optimizer.step()
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert largest_difference(model(input_ids=ids).logits, adapted) > 1e-3
        merged = model.merge_and_unload()
        assert isinstance(merged, CABMambaForCausalLM)
        assert largest_difference(merged(ids).logits, adapted) < 1e-4 * float(adapted.abs().max())


@pytest.mark.parametrize("name", ["s6", "ssd 2 groups, gated mlp", "ssd parallel, shared norm"])
@torch.no_grad()
def test_offloaded_weights_come_back_when_they_are_needed(name):
    model, ids = tiny_model(**VARIANTS[name]), random_ids(2, 6)
    expected = model(ids).logits
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids, **settings)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.backbone.layers[0].mixer.conv1d.weight.device.type == "meta"
    assert largest_difference(model(ids).logits, expected) < 1e-6
    assert torch.equal(model.generate(ids, **settings), text)


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_plain_trainer_trains_and_evaluates(mixer_type, tmp_path):
    model = tiny_model(mixer_type=mixer_type)
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(5, 6)]
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    settings = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    arguments = TrainingArguments(
        use_cpu=True, use_cache=True, disable_tqdm=True, activation_checkpointing=True, **settings
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert shapes == [(5, 6, 99)]


@pytest.mark.parametrize("mixer_type", MIXER_TYPES)
def test_a_model_built_in_half_precision_keeps_its_transition(mixer_type):
    model = AutoModelForCausalLM.from_config(tiny_model(mixer_type=mixer_type).config, dtype=torch.bfloat16)
    dtypes = {name.split("mixer.")[1]: p.dtype for name, p in model.named_parameters() if ".0.mixer." in name}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"A_log", "D"} | ({"dt_bias"} if mixer_type == "mamba2" else {"dt_proj.weight", "dt_proj.bias"})
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert bool(model(random_ids(2, 5)).logits.isfinite().all())
