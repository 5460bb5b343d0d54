"""Passes: one method, one file, in the folder of its family. Importing this package registers all of them."""

from elision.passes.base import REGISTRY, Pass, from_text
from elision.passes.cache import InsertCache
from elision.passes.clean import Clean
from elision.passes.kv.a2sf import A2SF
from elision.passes.kv.duo_attention import DuoAttention
from elision.passes.kv.ems import EMS
from elision.passes.kv.gear import GEAR
from elision.passes.kv.h2o import H2O
from elision.passes.kv.keyformer import Keyformer
from elision.passes.kv.kivi import KIVI
from elision.passes.kv.kv_quant import QuantisedKV
from elision.passes.kv.quest import Quest
from elision.passes.kv.snapkv import SnapKV
from elision.passes.kv.streaming_llm import StreamingLLM
from elision.passes.kv.tidal_decode import TidalDecode
from elision.passes.layers.calm import CALM
from elision.passes.layers.evopress import EvoPress
from elision.passes.layers.first_router import FirstRouter
from elision.passes.layers.shortgpt import ShortGPT
from elision.passes.layers.skip_layers import SkipLayers
from elision.passes.layers.skipdecode import SkipDecode
from elision.passes.layers.unified_skip import UnifiedSkip
from elision.passes.speculate.aded import Aded
from elision.passes.speculate.dynamic_exit import Del
from elision.passes.speculate.dyspec import DySpec
from elision.passes.speculate.layer_skip_draft import LayerSkipDraft
from elision.passes.speculate.pain_trie import PainTrie
from elision.passes.speculate.prompt_lookup import PromptLookup
from elision.passes.speculate.spec_sampling import SpecSampling
from elision.passes.speculate.spectr import SpecTr
from elision.passes.speculate.token_recycling import TokenRecycling
from elision.passes.tokens.evit import EViT
from elision.passes.tokens.fastv import FastV
from elision.passes.tokens.g_search import GSearch
from elision.passes.tokens.llmlingua import LLMLingua
from elision.passes.tokens.tcra import TCRA
from elision.passes.tokens.tome import ToMe
from elision.passes.tokens.zero_tprune import ZeroTPrune
from elision.passes.weights.a8 import Int8Activations
from elision.passes.weights.bf16 import BFloat16Weights
from elision.passes.weights.gptq import GPTQ
from elision.passes.weights.int4 import Int4Weights
from elision.passes.weights.int8 import Int8Weights
from elision.passes.weights.smoothquant_plus import SmoothQuantPlus
from elision.passes.weights.stored import StoredWeights

__all__ = [
    "A2SF",
    "GEAR",
    "EMS",
    "CALM",
    "GPTQ",
    "GSearch",
    "H2O",
    "KIVI",
    "LLMLingua",
    "REGISTRY",
    "Aded",
    "BFloat16Weights",
    "Clean",
    "Del",
    "DuoAttention",
    "DySpec",
    "EViT",
    "EvoPress",
    "FirstRouter",
    "FastV",
    "InsertCache",
    "Int4Weights",
    "Int8Activations",
    "Int8Weights",
    "Keyformer",
    "LayerSkipDraft",
    "PainTrie",
    "Pass",
    "PromptLookup",
    "ShortGPT",
    "QuantisedKV",
    "Quest",
    "SkipDecode",
    "SkipLayers",
    "SmoothQuantPlus",
    "SpecSampling",
    "SpecTr",
    "SnapKV",
    "StoredWeights",
    "TCRA",
    "ToMe",
    "StreamingLLM",
    "TidalDecode",
    "TokenRecycling",
    "UnifiedSkip",
    "ZeroTPrune",
    "from_text",
]
