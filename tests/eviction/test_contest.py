from kvtier.eviction.contest import WINDOW_KEYS, Contest


def window(contest: Contest, current: str, **hits: int):
    """Note a window of batches of 8 keys and return what is decided at its end."""
    for _ in range(WINDOW_KEYS // 8 - 1):
        contest.note(8, hits)
        assert contest.decide(current) is None
    contest.note(8, hits)
    return contest.decide(current)


def test_a_better_policy_wins_the_second_time():
    contest = Contest(["lru", "arc"])
    assert window(contest, "lru", lru=1, arc=2) is None
    switch = window(contest, "lru", lru=1, arc=2)
    assert switch is not None
    assert switch == ("lru", "arc", 1 / 8, 2 / 8)


def test_a_policy_that_is_better_once_does_not_win():
    contest = Contest(["lru", "arc"])
    assert window(contest, "lru", lru=2, arc=3) is None
    assert window(contest, "lru", lru=6, arc=2) is None
    assert window(contest, "lru", lru=2, arc=3) is None


def test_the_best_of_several_wins():
    contest = Contest(["lru", "arc", "prefix"])
    window(contest, "lru", lru=1, arc=2, prefix=3)
    assert window(contest, "lru", lru=1, arc=2, prefix=3).chosen == "prefix"


def test_who_won_must_be_beaten_twice_again():
    contest = Contest(["lru", "arc"])
    window(contest, "lru", lru=1, arc=2)
    assert window(contest, "lru", lru=1, arc=2).chosen == "arc"
    decided = [window(contest, "arc", lru=4, arc=1) for _ in range(4)]
    assert [switch is not None for switch in decided] == [False, True, False, True]


def test_a_small_gain_is_none():
    contest = Contest(["lru", "arc"])
    for number in range(600):
        contest.note(8, {"lru": 4, "arc": 4 + (number % 50 == 0)})
        assert contest.decide("lru") is None


def test_a_gain_that_one_batch_made_is_chance():
    contest = Contest(["lru", "arc"])
    for number in range(600):
        contest.note(8, {"lru": 0, "arc": 8 if number % 120 == 0 else 0})
        assert contest.decide("lru") is None


def test_cleared_it_has_seen_nothing():
    contest = Contest(["lru", "arc"])
    window(contest, "lru", lru=1, arc=2)
    contest.clear()
    assert contest.rate("arc") == 0.0
    assert window(contest, "lru", lru=1, arc=2) is None
