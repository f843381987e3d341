"""The checker behind `pytest --check-shapes`: beartype, to which an int is a float."""

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """`function`, checked, but no constructor and no function of an api.

    Configurations and apis refuse values by errors of their own; jax makes pytrees also of what
    stands for arrays, such as their shapes or shardings.
    """
    refuses = function.__name__ == "__init__" or function.__module__.endswith(".api")
    return function if refuses else _check(function)
