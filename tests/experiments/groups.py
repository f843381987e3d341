"""Groups of places for tests."""

from experiments.hosts import Place, free_port


def group_of(count, hosts=None):
    """Places of so many processes, all on this machine."""
    first = Place(0, count, f"127.0.0.1:{free_port()}", hosts or ("here",) * count)
    return [first.of(index) for index in range(count)]
