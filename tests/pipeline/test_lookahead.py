"""The width that pays is found and kept, whatever the machine and the audio are like."""

from collections.abc import Callable

import pytest

from pipeline.lookahead import WIDTHS, Lookahead


class Machine:
    """A clock that a pass moves on by what it costs."""

    def __init__(self, cost: Callable[[int], float], tokens: Callable[[int], int]) -> None:
        self.now, self.cost, self.tokens = 0.0, cost, tokens

    def run(self, lookahead: Lookahead, passes: int) -> list[int]:
        widths: list[int] = []
        for _ in range(passes):
            widths.append(lookahead.begin())
            self.now += self.cost(widths[-1])
            lookahead.end(self.tokens(widths[-1]))
        return widths


@pytest.mark.parametrize(
    ("cost", "tokens", "best"),
    [
        (lambda width: 1.0, lambda width: width, 8),  # bound by reading weights, all guesses right
        (lambda width: 1.0, lambda width: 1, 1),  # no guess right: the first of equals is the cheapest
        (lambda width: width, lambda width: 1, 1),  # bound by arithmetic
        (lambda width: 1.0 + 0.2 * width, lambda width: {1: 10, 2: 16, 4: 24, 8: 30}[width], 4),  # in between
    ],
    ids=["weights", "hopeless", "arithmetic", "between"],
)
def test_the_best_width_is_found(cost: Callable[[int], float], tokens: Callable[[int], int], best: int) -> None:
    machine = Machine(cost, tokens)
    lookahead = Lookahead(clock=lambda: machine.now)
    widths = machine.run(lookahead, 500)
    assert lookahead.best == best
    assert widths[100:].count(best) >= 0.9 * 400


def test_it_notices_when_things_change() -> None:
    machine = Machine(lambda width: 1.0 + width, lambda width: 1)
    lookahead = Lookahead(clock=lambda: machine.now)
    machine.run(lookahead, 200)
    assert lookahead.best == 1
    machine.cost, machine.tokens = (lambda width: 1.0), (lambda width: width)
    machine.run(lookahead, 1500)
    assert lookahead.best == 8


def test_every_width_is_tried_and_one_that_is_set_is_kept() -> None:
    machine = Machine(lambda width: 1.0, lambda width: 1)
    assert set(machine.run(Lookahead(clock=lambda: machine.now), 50)) == set(WIDTHS)
    assert set(machine.run(Lookahead((5,), clock=lambda: machine.now), 200)) == {5}
