"""Text from a language model: samplers, the loop that generates, the memory between its steps."""
