from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "cab_hf/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "cuda": ["mamba-ssm>=2.3", "causal-conv1d>=1.6"],
    "peft": ["peft>=0.18"],
    "plots": ["matplotlib>=3.8"],
    "vision": ["kornia>=0.8", "pillow>=10"],
    "tasks": ["lm_eval>=0.4.13"],
    "export": ["gguf>=0.17", "onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
    "serve": ["gguf>=0.17", "onnxruntime>=1.22", "xllamacpp>=2026.10"],
    "demo": ["gguf>=0.17", "kornia>=0.8", "matplotlib>=3.8", "pillow>=10", "scikit-learn>=1.4"],
    "docs": (HERE / "docs/requirements.txt").read_text().split(),
    "test": [
        "pytest>=8",
        "setuptools>=77",
        "trl>=1.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.7",
        "hypothesis>=6",
        "lm_eval>=0.4.13",
        "import-linter>=2",
        "ruff>=0.14",
        "peft>=0.18",
        "gguf>=0.17",
        "onnx>=1.18",
        "onnxruntime>=1.22",
        "onnxscript>=0.5",
        "xllamacpp>=2026.10; platform_system == 'Linux'",
        "kornia>=0.8",
        "matplotlib>=3.8",
        "pillow>=10",
        "scikit-learn>=1.4",
        "triton>=3.4; platform_system == 'Linux'",
    ],
}

setup(
    name="cab-hf",
    version=VERSION,
    description="Turn any pretrained Transformer into a Mamba: distillation through the attention bridge",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["cab_hf", "cab_hf.*"]), "cab_hf.model_cards", "cab_hf.training_args"],
    package_dir={"cab_hf.model_cards": "model_cards", "cab_hf.training_args": "training_args"},
    package_data={"cab_hf.model_cards": ["template.md"], "cab_hf.training_args": ["*.yaml", "accelerate/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=5.24,<6",
        "accelerate>=1.10",
        "datasets>=4",
        "evaluate>=0.4.6",
        "huggingface_hub>=1",
        "safetensors>=0.6",
        "pyyaml>=6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cab-hf = cab_hf.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
