"""Students. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_cab_mamba import CABMambaConfig
from .modeling_cab_mamba import CABMambaForCausalLM, CABMambaModel, CABMambaPreTrainedModel


AutoConfig.register("cab_mamba", CABMambaConfig)
AutoModel.register(CABMambaConfig, CABMambaModel)
AutoModelForCausalLM.register(CABMambaConfig, CABMambaForCausalLM)
CABMambaConfig.register_for_auto_class()
CABMambaModel.register_for_auto_class("AutoModel")
CABMambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["CABMambaConfig", "CABMambaForCausalLM", "CABMambaModel", "CABMambaPreTrainedModel"]
