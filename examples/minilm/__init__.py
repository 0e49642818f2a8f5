"""all-MiniLM-L6-v2, a published sentence encoder: load it, search by meaning, fine-tune."""
