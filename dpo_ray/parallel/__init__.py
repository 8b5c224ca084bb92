"""How a model is laid over ranks: FSDP2, tensor and context parallelism, activation memory."""
