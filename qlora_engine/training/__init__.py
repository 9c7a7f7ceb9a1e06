"""Fine-tuning on transformers' Trainer: data, loss without full logits, recompute budget, resumable runs."""
