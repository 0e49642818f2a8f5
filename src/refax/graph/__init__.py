"""Layer 2: objects as a GraphDef and States."""
