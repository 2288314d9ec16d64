"""What keys do to what is seen."""

from forwarder.summary import InstanceStatus
from forwarder.top.columns import SHOWN
from forwarder.top.model import Model
from tests.forwarder.top.answers import carrier, instance, session, tunnel

SORTS = {column.heading: number for number, column in enumerate(SHOWN)}


def two_tunnels(uptime_s: float = 1.0, more: int = 0) -> InstanceStatus:
    """`more` is what the second carrier of web has carried."""
    carriers = [carrier(2, rtt_ms=5.0), carrier(10, counts=(more, 0), rtt_ms=50.0), carrier(1, state="connecting")]
    ssh = tunnel("ssh", session("b", carrier(0)), session("c", carrier(0), key_id="phone"), state="degraded")
    return instance(uptime_s, tunnel("web", session("a", *carriers), counts=(more, 0)), ssh)


def model(*keys: str) -> Model:
    """After an answer and these keys."""
    made = Model("client.toml", 1.0)
    made.on_answer(two_tunnels())
    press(made, *keys)
    return made


def press(made: Model, *keys: str) -> None:
    for key in keys:
        made.on_key(key)
        made.window(10)


def names(made: Model) -> list[str]:
    return ["  " * row.depth + row.name.split(" 10.")[0] for row in made.rows]


def chosen(made: Model) -> str:
    return made.rows[made.window(10)[1]].name


def test_a_row_is_a_tunnel_until_it_is_expanded() -> None:
    assert names(model()) == ["ssh stripe", "web stripe"]
    assert names(model("enter")) == ["ssh stripe", "  laptop", "  phone", "web stripe"]
    assert names(model("enter", "enter")) == ["ssh stripe", "web stripe"]


def test_a_tunnel_with_one_session_shows_its_carriers_at_once() -> None:
    carriers = ["    stripe 1", "    stripe 2", "    stripe 10"]
    assert names(model("down", "space")) == ["ssh stripe", "web stripe", "  laptop", *carriers]
    assert names(model("down", "space", "down", "enter")) == ["ssh stripe", "web stripe", "  laptop"]


def test_on_a_carrier_its_session_is_folded() -> None:
    made = model("down", "space", "end", "enter")
    assert names(made) == ["ssh stripe", "web stripe", "  laptop"]
    assert chosen(made).startswith("laptop")


def test_all_are_expanded_and_folded() -> None:
    assert len(names(model("a"))) == 2 + 3 + 5
    assert len(names(model("enter", "a"))) == 10
    assert len(names(model("a", "a"))) == 2


def test_a_single_tunnel_is_expanded_from_the_start_but_not_again() -> None:
    made = Model("client.toml", 1.0)
    made.on_answer(instance(1.0, tunnel("web", session("a", carrier(0)))))
    assert names(made) == ["web stripe", "  laptop"]
    press(made, "enter")
    made.on_answer(instance(2.0, tunnel("web", session("a", carrier(0)))))
    assert names(made) == ["web stripe"]


def test_rows_are_sorted_within_their_level_and_what_is_not_known_is_last() -> None:
    made = model("a")
    made.sort = SORTS["rtt"]
    press(made, "r")
    assert stripes_of_web(made) == ["stripe 2", "stripe 10", "stripe 1"]
    press(made, "r")
    assert stripes_of_web(made) == ["stripe 10", "stripe 2", "stripe 1"]


def stripes_of_web(made: Model) -> list[str]:
    return [row.name for row in made.rows if row.key[0] == "web" and row.depth == 2]


def test_states_are_sorted_by_how_bad_they_are() -> None:
    made = model("right")
    assert SHOWN[made.sort].heading == "state"
    assert names(made) == ["ssh stripe", "web stripe"]
    press(made, "r")
    assert names(made) == ["web stripe", "ssh stripe"]


def test_columns_to_sort_by_are_those_that_are_seen() -> None:
    made = model()
    made.columns = [0, 1, 5]
    press(made, "s", "s")
    assert made.sort == 5
    press(made, "right")
    assert made.sort == 0
    press(made, "left")
    assert made.sort == 5
    made.columns = [0, 1]
    press(made, "s")
    assert made.sort == 1


def test_cursor_stays_with_its_row_when_rows_move() -> None:
    made = model("down", "space", "end")
    assert chosen(made) == "stripe 10"
    made.sort = SORTS["in"]
    made.on_answer(two_tunnels(2.0, more=1000))
    assert names(made)[:4] == ["web stripe", "  laptop", "    stripe 10", "    stripe 1"]
    assert chosen(made) == "stripe 10"


def test_cursor_stays_in_the_list_when_its_row_goes() -> None:
    made = model("a", "end")
    made.on_answer(instance(2.0, tunnel("web")))
    assert chosen(made) == "web stripe"
    press(made, "up", "page up", "down", "page down")
    assert chosen(made) == "web stripe"


def test_window_follows_the_cursor_through_a_thousand_rows() -> None:
    made = Model("client.toml", 1.0)
    made.on_answer(instance(1.0, tunnel("web", session("a", *(carrier(number) for number in range(1000))))))
    press(made, "a")
    assert made.window(20) == (0, 0)
    press(made, "end")
    assert made.window(20) == (982, 1001)
    made.on_key("page up")
    assert made.window(20) == (982, 982)
    made.on_key("up")
    assert made.window(20) == (981, 981)
    press(made, "home")
    assert made.window(20) == (0, 0)
    assert made.window(0)[1] == 0


def test_silence_has_no_rows_and_what_was_expanded_comes_back() -> None:
    made = model("down", "space", "end")
    made.on_silence("no instance is running")
    assert (made.rows, made.status, made.silence) == ([], None, "no instance is running")
    press(made, "enter", "a", "down", "end", "s", "left")
    made.on_answer(two_tunnels(9.0))
    assert chosen(made) == "stripe 10"


def test_interval_goes_up_and_down_within_bounds() -> None:
    made = model("+")
    assert made.interval_s == 2.0
    press(made, *"-----")
    assert made.interval_s == 0.5
    made.interval_s = 3.0
    press(made, "-")
    assert made.interval_s == 2.0
    made.interval_s = 3600.0
    press(made, "+")
    assert made.interval_s == 3600.0


def test_help_is_left_by_any_key_which_does_nothing_else() -> None:
    made = model("?")
    assert made.help
    press(made, "p")
    assert (made.help, made.paused) == (False, False)
    press(made, "p", "bogus", "\N{SNOWMAN}")
    assert made.paused and not made.done
    press(made, "h", "q")
    assert made.done
