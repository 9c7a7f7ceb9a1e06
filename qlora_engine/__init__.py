"""qlora-engine: low-bit bases with LoRA factors that correct them."""
