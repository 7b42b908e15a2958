"""Students. Importing this package registers them with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from .configuration_cab_hybrid import CABHybridConfig
from .configuration_cab_mamba import CABMambaConfig
from .configuration_cab_vision_mamba import CABVisionMambaConfig
from .mixers import BidirectionalProjections, SSMProjections
from .modeling_cab_hybrid import (
    CABHybridForCausalLM,
    CABHybridForSequenceClassification,
    CABHybridModel,
    CABHybridPreTrainedModel,
)
from .modeling_cab_mamba import (
    CABMambaForCausalLM,
    CABMambaForSequenceClassification,
    CABMambaModel,
    CABMambaPreTrainedModel,
)
from .modeling_cab_vision_mamba import (
    CABVisionMambaForImageClassification,
    CABVisionMambaModel,
    CABVisionMambaPreTrainedModel,
)


AutoConfig.register("cab_mamba", CABMambaConfig)
AutoModel.register(CABMambaConfig, CABMambaModel)
AutoModelForCausalLM.register(CABMambaConfig, CABMambaForCausalLM)
AutoModelForSequenceClassification.register(CABMambaConfig, CABMambaForSequenceClassification)
CABMambaConfig.register_for_auto_class()
CABMambaModel.register_for_auto_class("AutoModel")
CABMambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CABMambaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

AutoConfig.register("cab_hybrid", CABHybridConfig)
AutoModel.register(CABHybridConfig, CABHybridModel)
AutoModelForCausalLM.register(CABHybridConfig, CABHybridForCausalLM)
AutoModelForSequenceClassification.register(CABHybridConfig, CABHybridForSequenceClassification)
CABHybridConfig.register_for_auto_class()
CABHybridModel.register_for_auto_class("AutoModel")
CABHybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CABHybridForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

AutoConfig.register("cab_vision_mamba", CABVisionMambaConfig)
AutoModel.register(CABVisionMambaConfig, CABVisionMambaModel)
AutoModelForImageClassification.register(CABVisionMambaConfig, CABVisionMambaForImageClassification)
CABVisionMambaConfig.register_for_auto_class()
CABVisionMambaModel.register_for_auto_class("AutoModel")
CABVisionMambaForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "BidirectionalProjections",
    "CABHybridConfig",
    "CABHybridForCausalLM",
    "CABHybridForSequenceClassification",
    "CABHybridModel",
    "CABHybridPreTrainedModel",
    "CABMambaConfig",
    "CABMambaForCausalLM",
    "CABMambaForSequenceClassification",
    "CABMambaModel",
    "CABMambaPreTrainedModel",
    "CABVisionMambaConfig",
    "CABVisionMambaForImageClassification",
    "CABVisionMambaModel",
    "CABVisionMambaPreTrainedModel",
    "SSMProjections",
]
