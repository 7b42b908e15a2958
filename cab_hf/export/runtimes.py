"""What an export says in the runtimes of one environment. A script that imports nothing of this package.

    python runtimes.py EXPORT PROBE.json ANSWERS.json

It writes, for each runtime that is installed and that the export has files for, its version and what it says of each
prompt: the log-probabilities of the prompt's own tokens (from the second on; None where the runtime does not tell
them), the greedy continuation without `banned` tokens, and its log-probabilities. `skipped` says why a runtime was not
asked.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path


def numbers(version):
    return tuple(int(part) for part in version.split(".")[:2])


def with_transformers(folder, prompts, new_tokens, banned):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    model.generation_config.eos_token_id = None
    options["suppress_tokens"] = banned or None
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        greedy = out.sequences[0, len(prompt) :].tolist()
        said = [step[0].log_softmax(-1)[token].item() for step, token in zip(out.logits, greedy)]
        rows.append([logits.gather(1, ids[0, 1:, None])[:, 0].tolist(), greedy, said])
    return rows


def with_onnxruntime(folder, prompts, new_tokens, banned):
    import numpy
    import onnxruntime

    session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"])
    (length,) = (part for part in session.get_inputs()[0].shape if isinstance(part, int))
    name, rows = session.get_inputs()[0].name, []

    def scores(ids):
        padded = numpy.array([ids + [0] * (length - len(ids))], dtype=numpy.int64)
        logits = session.run(None, {name: padded})[0][0, : len(ids)].astype(numpy.float64)
        largest = logits.max(-1, keepdims=True)
        return logits - largest - numpy.log(numpy.exp(logits - largest).sum(-1, keepdims=True))

    for prompt in prompts:
        prompt = prompt[: length - new_tokens]
        found = scores(prompt)
        told = [float(found[place, token]) for place, token in enumerate(prompt[1:])]
        ids, said = list(prompt), []
        for _ in range(new_tokens):
            last = scores(ids)[-1]
            allowed = last.copy()
            allowed[banned] = -numpy.inf
            ids.append(int(allowed.argmax()))
            said.append(float(last[ids[-1]]))
        rows.append([told, ids[len(prompt) :], said])
    return rows


def with_llama_cpp(folder, prompts, new_tokens, banned):
    import xllamacpp

    (path,) = sorted(Path(folder).glob("*.gguf"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(path), 1024, 1, 0
    parameters.warmup, parameters.fit_params = False, False
    server, rows = xllamacpp.Server(parameters), []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = server.handle_completions(request)
        if answer["usage"]["prompt_tokens"] != len(prompt):
            raise ValueError(f"llama.cpp read {answer['usage']['prompt_tokens']} tokens of {len(prompt)}")
        said = answer["choices"][0]["logprobs"]["content"]
        rows.append([None, [token["id"] for token in said], [token["logprob"] for token in said]])
    return rows


def with_vllm(folder, prompts, new_tokens, banned):
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + new_tokens
    options = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": longest}
    options["gpu_memory_utilization"] = 0.3  # of a CPU's memory, too
    model = LLM(model=str(folder), skip_tokenizer_init=True, disable_log_stats=True, **options)
    asked = {"temperature": 0.0, "max_tokens": new_tokens, "min_tokens": new_tokens, "detokenize": False}
    settings = SamplingParams(**asked, logprobs=0, prompt_logprobs=0)
    rows = []
    for prompt, answer in zip(prompts, model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)):
        told = [step[token].logprob for step, token in zip(answer.prompt_logprobs[1:], prompt[1:])]
        greedy = list(answer.outputs[0].token_ids)
        said = [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, greedy)]
        rows.append([told, greedy, said])
    return rows


RUNTIMES = {
    "transformers": ("transformers", "config.json", with_transformers),
    "vLLM": ("vllm", "config.json", with_vllm),
    "onnxruntime": ("onnxruntime", "model.onnx", with_onnxruntime),
    "llama.cpp": ("xllamacpp", "*.gguf", with_llama_cpp),
}


def main():
    folder, probe, answers = map(Path, sys.argv[1:])
    probe = json.loads(probe.read_text(encoding="utf-8"))
    least = "0.0"
    if (folder / "config.json").is_file():
        least = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
            "least_transformers_version", least
        )
    found = {}
    for name, (package, files, answer) in RUNTIMES.items():
        if not any(folder.glob(files)) or importlib.util.find_spec(package) is None:
            continue
        version = next(
            importlib.metadata.version(one)
            for one in importlib.metadata.packages_distributions().get(package, [package])
        )
        result = {"version": version}
        if name == "transformers" and numbers(version) < numbers(least):
            result["skipped"] = f"this export needs transformers {least} or newer"
        else:
            result["rows"] = answer(folder, probe["prompts"], probe["new_tokens"], probe["banned"])
        found[name] = result
    answers.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
