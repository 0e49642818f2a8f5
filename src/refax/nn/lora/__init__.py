"""LoRA: a thin learned product beside a layer, in one layer and in a whole model."""
