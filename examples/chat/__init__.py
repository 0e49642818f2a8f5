"""SmolLM2-135M-Instruct, a published language model: talk to it, or fine-tune it."""
