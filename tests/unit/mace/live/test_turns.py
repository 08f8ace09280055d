"""The choice of the host whose message is processed next."""

from mace.live.turns import SHARE, TURN_S, Turns


def order(turns, cost_s, most=1_000, held=()):
    found = []
    while (next_ := turns.take(lambda host: host in held)) is not None and len(found) < most:
        found.append(next_[0])
        turns.charge(next_[0], cost_s[next_[0]])
    return found


def filled(**messages):
    turns = Turns(10_000, 1 << 30)
    for host, count in messages.items():
        for number in range(count):
            turns.put(host, number, 1)
    return turns


def test_a_host_with_a_thousand_messages_gets_one_turn_per_round():
    found = order(filled(loud=1_000, quiet=3), {"loud": TURN_S, "quiet": TURN_S})
    assert found[:6] == ["loud", "quiet"] * 3


def test_a_long_turn_is_followed_by_rounds_of_the_others():
    found = order(filled(slow=100, a=200, b=200), {"slow": 10 * TURN_S, "a": TURN_S, "b": TURN_S})
    assert found[:220].count("slow") in range(9, 12)


def test_small_messages_share_a_turn_and_come_in_their_order():
    turns = filled(a=20, b=20)
    hosts, numbers = [], []
    while (found := turns.take(lambda _: False)) is not None:
        hosts.append(found[0])
        numbers.append(found)
        turns.charge(found[0], TURN_S / 4)
    assert hosts[:12] == ["a"] * 4 + ["b"] * 4 + ["a"] * 4
    assert [n for host, n in numbers if host == "a"] == list(range(20))


def test_debts_end_when_no_host_waits():
    turns = filled(a=1)
    assert order(turns, {"a": 1_000 * TURN_S}) == ["a"]
    assert len(turns) == 0
    turns.put("a", 1, 1)
    turns.put("b", 1, 1)
    assert order(turns, {"a": 0, "b": 0}) == ["a", "b"]


def test_a_blocked_host_does_not_block_the_others():
    turns = filled(full=5, free=5)
    assert order(turns, {"free": TURN_S}, held={"full"}) == ["free"] * 5
    assert len(turns) == 5
    assert order(turns, {"full": TURN_S}) == ["full"] * 5


def test_a_host_may_fill_only_its_share_of_the_queue():
    turns = Turns(800, 8_000)
    for number in range(500):
        turns.put("many", number, 1)
    for number in range(5):
        turns.put("large", number, 999)
    turns.put("quiet", 0, 1)
    assert (len(turns), turns.let_fall) == (800 // SHARE + 1 + 1, 400 + 4)
    assert not turns.is_full


def test_all_hosts_together_may_fill_the_queue():
    turns = Turns(80, 1 << 20)
    for host in range(8):
        for number in range(10):
            turns.put(f"host-{host}", number, 1)
    assert (turns.is_full, turns.let_fall) == (True, 0)
    assert turns.take(lambda _: False) is not None
    assert not turns.is_full
