"""Turn any pretrained Transformer into a Mamba: distillation through the attention bridge (arXiv 2510.19266)."""

from .models import CABMambaConfig, CABMambaForCausalLM, CABMambaModel


__version__ = "0.1.0"

__all__ = ["CABMambaConfig", "CABMambaForCausalLM", "CABMambaModel", "__version__"]
