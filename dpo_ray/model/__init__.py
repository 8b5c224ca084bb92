"""Models: loading, log-probabilities, adapters and export.

architecture   configuration and digest of a Hugging Face model, without its weights
load           load_sharded: build, parallelize and load a model, step by step
scorer         Scorer: a sharded model whose forward pass returns log-probabilities and losses
adapters       LoRA adapters (peft)
quantized      frozen 4-bit weights (QLoRA)
export         full weights: to a Hugging Face directory or to the rollout engines
"""
