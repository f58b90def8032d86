import pytest

from latentdem.em.schedules import ANNEALINGS, annealing, descending, takes_gradient


@pytest.mark.parametrize("name", [n for n in ANNEALINGS if n not in ("adaptive", "constant")])
def test_annealing_rises_as_the_noise_falls(name):
    values = [annealing(name, level / 50) for level in range(50, -1, -1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.1)
    assert 0.79 < values[-1] <= 1.0


def test_published_schedule():
    assert annealing("paper", 1.0) == pytest.approx(0.1)
    assert annealing("paper", 0.8) == pytest.approx(0.55)
    assert annealing("paper", 0.6) == annealing("paper", 0.0) == pytest.approx(1.0)


def test_adaptive_follows_the_residual():
    assert annealing("adaptive", 0.5, 10.0) < annealing("adaptive", 0.5, 2.0)


def test_constant_is_no_annealing():
    assert {annealing("constant", level / 10, 5.0) for level in range(11)} == {1.0}


def test_unknown_annealing():
    with pytest.raises(ValueError, match=r"annealing must be one of .*found 'steep'"):
        annealing("steep", 0.5)


def test_skip_gradient_counts_of_the_paper():
    taken = sum(takes_gradient(step, 1000, every=16, last=40) for step in range(1000))
    assert taken == 60 + 40
    assert all(takes_gradient(step, 7, every=1, last=0) for step in range(7))


def test_timesteps():
    assert descending(600, 4) == [600, 400, 200, 0]
    assert descending(999, 1) == [999]
    steps = descending(599, 60)
    assert len(set(steps)) == 60
    assert steps[-1] == 0
