"""The checker behind `pytest --check-shapes`: beartype, to which an int is a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
