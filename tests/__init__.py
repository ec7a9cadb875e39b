"""Tests of reftlab, folder by folder as in the package; contracts/ holds what any such library owes."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""The type checker of the tests: beartype, with an int good where a float is wanted, as PEP 484 says."""
