# What we take from transformers, for the type checker alone. The package's own list imports every model that
# it has, 2,500 files, a good part of the checker's time. A name that is missing here is an error of pyright:
# add it, with the module that defines it.
from transformers import dynamic_module_utils as dynamic_module_utils
from transformers import modeling_outputs as modeling_outputs
from transformers import optimization as optimization
from transformers import trainer as trainer
from transformers import trainer_callback as trainer_callback
from transformers import utils as utils
from transformers.cache_utils import DynamicCache as DynamicCache
from transformers.cache_utils import StaticCache as StaticCache
from transformers.configuration_utils import PreTrainedConfig as PreTrainedConfig
from transformers.data.data_collator import default_data_collator as default_data_collator
from transformers.generation.configuration_utils import CompileConfig as CompileConfig
from transformers.generation.configuration_utils import GenerationConfig as GenerationConfig
from transformers.generation.utils import GenerationMixin as GenerationMixin
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING as CONFIG_MAPPING
from transformers.models.auto.configuration_auto import AutoConfig as AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import AutoModel as AutoModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM as AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.models.bart.configuration_bart import BartConfig as BartConfig
from transformers.models.bart.modeling_bart import (
    BartForConditionalGeneration as BartForConditionalGeneration,
)
from transformers.models.bert.configuration_bert import BertConfig as BertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM as BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLMHeadModel as BertLMHeadModel
from transformers.models.bert.modeling_bert import BertModel as BertModel
from transformers.models.gpt2.configuration_gpt2 import GPT2Config as GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from transformers.models.llama.configuration_llama import LlamaConfig as LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel as LlamaModel
from transformers.models.mixtral.configuration_mixtral import MixtralConfig as MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM as MixtralForCausalLM
from transformers.models.opt.configuration_opt import OPTConfig as OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM as OPTForCausalLM
from transformers.models.phi.configuration_phi import PhiConfig as PhiConfig
from transformers.models.phi.modeling_phi import PhiForCausalLM as PhiForCausalLM
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig as Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM as Qwen2MoeForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config as Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM as Qwen3ForCausalLM
from transformers.models.t5.configuration_t5 import T5Config as T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration as T5ForConditionalGeneration
from transformers.models.vit.configuration_vit import ViTConfig as ViTConfig
from transformers.models.vit.modeling_vit import ViTModel as ViTModel
from transformers.models.wav2vec2.configuration_wav2vec2 import Wav2Vec2Config as Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2ForCTC as Wav2Vec2ForCTC
from transformers.optimization import get_cosine_schedule_with_warmup as get_cosine_schedule_with_warmup
from transformers.optimization import get_linear_schedule_with_warmup as get_linear_schedule_with_warmup
from transformers.optimization import get_scheduler as get_scheduler
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast as PreTrainedTokenizerFast
from transformers.trainer import Trainer as Trainer
from transformers.trainer_callback import TrainerCallback as TrainerCallback
from transformers.trainer_callback import TrainerControl as TrainerControl
from transformers.trainer_callback import TrainerState as TrainerState
from transformers.trainer_utils import set_seed as set_seed
from transformers.training_args import TrainingArguments as TrainingArguments
from transformers.utils import logging as logging

__version__: str
