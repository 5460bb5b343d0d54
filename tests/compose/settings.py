"""A small setting of every registered pass, which does something to the models of `subjects`: what the matrix is made of."""

from __future__ import annotations

from dataclasses import dataclass

from elision.passes import REGISTRY

FAMILIES = ("core", "layers", "tokens", "kv", "weights", "speculate")


@dataclass(frozen=True)
class Setting:
    """``passes``: as text; MODEL stands for the path of another compiled model. ``means``: what it says by itself (`matrix`):
    ``same`` the same model, ``layers`` one without some layers, ``weights`` one with other weights, ``tokens`` the same greedy
    tokens; or nothing of that (empty). ``gone``: the layers, or halves as ``1.attn``, that ``layers`` leaves out. ``whole``:
    whether it asks which layers there are, so that one that does nothing is not one less."""

    passes: tuple[str, ...]
    means: str = ""
    gone: tuple[str, ...] = ()
    whole: bool = False

    @property
    def family(self) -> str:
        return REGISTRY[self.passes[0].partition(":")[0]].family


def _one(text: str, means: str = "", gone: tuple[str, ...] = (), whole: bool = False) -> Setting:
    return Setting((text,), means, gone, whole)


#: By label: the name of the pass, or of a variant of it.
SETTINGS: dict[str, Setting] = {
    "insert-cache": _one("insert-cache", "same"),
    "insert-cache:int8": _one("insert-cache:dtype=int8"),
    "clean": _one("clean", "same"),
    "skip-layers": _one("skip-layers:layers=3", "layers", ("3",)),
    "shortgpt": _one("shortgpt:share=0.25,layers=0", "layers", ("0",)),
    "evopress": _one("evopress:share=0.25,attn=0,mlp=2", "layers", ("0.attn", "2.mlp")),
    "unified-skip": _one("unified-skip:keep=2", whole=True),
    "calm": _one("calm:exits=2,threshold=0.035,rule=softmax"),
    "calm:mask": _one("calm:exits=2,threshold=0.035,rule=softmax,fill=mask"),
    "calm:defer": _one("calm:exits=2,threshold=0.035,rule=softmax,fill=defer"),
    "first-router": _one("first-router:share=0.6,layers=2,threshold=0.9", whole=True),
    "skipdecode": _one("skipdecode:most=4,least=2,length=80,stages=3", whole=True),
    "tome": _one("tome:n=2"),
    "evit": _one("evit:keep=0.6"),
    "zero-tprune": _one("zero-tprune:keep=0.6"),
    "fastv": _one("fastv:layer=1,keep=0.5", whole=True),
    "g-search": _one("g-search:layers=1+2,keep=70+40", whole=True),
    "llmlingua": _one("llmlingua:keep=0.6,segment=10,first=4,last=6"),
    "tcra": _one("tcra:keep=0.7,segment=10,first=4,last=6"),
    "streaming-llm": _one("streaming-llm:window=21,sinks=3"),
    "h2o": _one("h2o:budget=24,recent=8,sinks=1"),
    "h2o:every=1": _one("h2o:budget=24,recent=8,every=1"),
    "a2sf": _one("a2sf:budget=24,recent=8,sinks=1,alpha=0.9"),
    "keyformer": _one("keyformer:budget=24,recent=8,sinks=1,steps=40"),
    "ems": _one("ems:budget=24,window=8,theta=0.5"),
    "snapkv": _one("snapkv:budget=24,window=8"),
    "kv-quant": _one("kv-quant"),
    "kivi": _one("kivi:bits=2,group=16,residual=16"),
    "gear": _one("gear:bits=2,block=16,rank=1"),
    "quest": _one("quest:budget=32,page=8,dense=1", whole=True),
    "duo-attention": _one("duo-attention:heads=2+4,sinks=2,window=12", whole=True),
    "tidal-decode": _one("tidal-decode:budget=12,layers=1", whole=True),
    "stored": _one("stored", "same"),
    "bf16": _one("bf16", "weights"),
    "int8": _one("int8", "weights"),
    "int4": _one("int4", "weights"),
    "gptq": _one("gptq:tokens=240", "weights"),
    "smoothquant-plus": _one("smoothquant-plus:tokens=240,alpha=0.5", "weights"),
    "a8": _one("a8"),
    "int8 a8": Setting(("int8", "a8")),
    "prompt-lookup": _one("prompt-lookup:match=1", "tokens"),
    "pain-trie": _one("pain-trie:nodes=20", "tokens"),
    "token-recycling": _one("token-recycling:nodes=20", "tokens"),
    "aded": _one("aded", "tokens"),
    "layer-skip-draft": _one("layer-skip-draft:layers=1", "tokens"),
    "spec-sampling": _one("spec-sampling:model=MODEL", "tokens"),
    "spectr": _one("spectr:exit=2", "tokens"),
    "dyspec": _one("dyspec:exit=2", "tokens"),
    "del": _one("del:exits=1+2", "tokens"),
}
