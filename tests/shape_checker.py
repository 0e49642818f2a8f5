"""What `REFAX_CHECK_SHAPES=1` checks signatures with; see `conftest.py`."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is good where a float is wanted, as for other type checkers."""
