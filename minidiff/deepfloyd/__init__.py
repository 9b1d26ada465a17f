"""DeepFloyd IF's own parts, in reading order: tokenizer, t5, prompts, unet, stages, and the trainer of the cascade."""
