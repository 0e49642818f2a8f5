"""Looking inside: what a model computes, where it goes wrong, and where the time goes."""
