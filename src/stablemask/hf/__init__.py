"""The bridge to Transformers. Importing it

- registers our model with the Auto classes,
- registers ``attn_implementation="stablemask"`` for every decoder (`attention.py`), also under the
  name "sdpa" for models whose ``config.stablemask`` asks for it,
- refuses what would silently run something else (`guard.py`),
- has saved models refused by programs that do not know StableMask (`saving.py`),
- lets PEFT's adapters keep and bring their settings (`adapters.py`).
"""

from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from ..models import StableMaskConfig, StableMaskForCausalLM, StableMaskModel
from ..models.modeling import ATTN_IMPLEMENTATION
from . import adapters, guard, saving
from .apply import apply_stablemask
from .attention import dispatch_sdpa, stablemask_attention_forward
from .loading import load_model
from .shift import keep_shifts, read_shifts, train_shifts

AutoConfig.register(StableMaskConfig.model_type, StableMaskConfig, exist_ok=True)
AutoModel.register(StableMaskConfig, StableMaskModel, exist_ok=True)
AutoModelForCausalLM.register(StableMaskConfig, StableMaskForCausalLM, exist_ok=True)
# The mask function of that name is registered beside our model.
AttentionInterface.register(ATTN_IMPLEMENTATION, stablemask_attention_forward)
AttentionInterface.register("sdpa", dispatch_sdpa)
guard.install()
adapters.install()
saving.install()

__all__ = ["apply_stablemask", "keep_shifts", "load_model", "read_shifts", "train_shifts"]
