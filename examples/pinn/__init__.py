"""A network solves Burgers' equation and finds its viscosity, from a few noisy measurements."""
