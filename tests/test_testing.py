"""What the tests of derivatives refuse, and what they tell about operators besides a wrong derivative."""

import inspect
import warnings

import numpy as np
import pytest

from vmad_lit import Builder, autooperator, operator
from vmad_lit.core.branches import UntakenBranch
from vmad_lit.core.error import BadArgument
from vmad_lit.lib import unary
from vmad_lit.testing import (
    OPTIONS,
    check,
    check_dot_product,
    check_gradient,
    check_ownership,
    check_second_order,
    check_taylor,
)


class Square:
    ain, aout = "x", "y"

    def apl(node, x):
        return dict(y=x**2)

    def vjp(node, _y, x):
        return dict(_x=_y * 2 * x)

    def jvp(node, x_, x):
        return dict(y_=2 * x * x_)

    def hvp(node, _y, x_):
        return dict(_x_=2 * _y * x_)


square = operator(Square)
X = np.array([0.5, 2.0, 3.0])


def cube(x):
    return x * x * x


@autooperator("x -> y")
def doubled(x):
    return square(x) * 2.0


def model():
    with Builder() as m:
        m.output(y=square(m.input("x")))
    return m


SUBJECTS = [square, cube, doubled]


# -- Options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("test", [check, check_taylor, check_second_order])
@pytest.mark.parametrize(
    "steps",
    [[], [0.0], [0.1], [0.1, 0.05], [0.1, 0.0, -0.1], [0.01, 0.02, 0.04], [0.1, 0.1, 0.1], [1.0, np.nan, 0.1]]
    + [[np.inf, 1.0, 0.1], 0.1, "abc", [[0.1, 0.01, 0.001]]],
    ids=repr,
)
def test_steps_from_which_no_slope_can_be_told(subject, test, steps):
    with pytest.raises(BadArgument, match="steps are "):
        test(subject, X, steps=steps)


@pytest.mark.parametrize("test", [check, check_taylor])
def test_steps_that_are_lost_in_rounding(test):
    with pytest.raises(AssertionError, match="the steps are so small that all changes are lost in rounding"):
        test(cube, X, steps=[1e-30, 1e-31, 1e-32])


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize(
    "test", [check, check_taylor, check_dot_product, check_second_order, check_ownership]
)
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rtoll=1e-3), "rtoll"),
        (dict(stepps=[0.1, 0.01, 0.001]), "stepps"),
        (dict(constant="z"), "has no argument 'z'; known are 'x'"),
        (dict(constant=("x", "z")), "has no argument 'z'"),
        (dict(replicated="z"), "has no argument or result 'z'; known are 'x', 'y'"),
    ],
    ids=str,
)
def test_misspelt_options(subject, test, options, message):
    with pytest.raises(BadArgument, match=message):
        test(subject, X, **options)


@pytest.mark.parametrize("test", [check, check_taylor, check_dot_product])
def test_inputs_that_the_model_does_not_have(test):
    with pytest.raises(BadArgument, match="has no input 'rtoll'"):
        test(model(), dict(x=X), rtoll=1e-3)
    with pytest.raises(BadArgument, match="has no input 'xx'; did you mean 'x'"):
        test(model(), dict(x=X, xx=X))


@pytest.mark.parametrize("rtol", [0.0, -1.0, 1.0, np.inf, np.nan])
def test_tolerances_with_which_everything_or_nothing_passes(rtol):
    for test in check, check_dot_product:
        with pytest.raises(BadArgument, match="rtol is a number between 0 and 1"):
            test(square, X, rtol=rtol)


def test_the_options_that_messages_list_are_those_of_check():
    parameters = inspect.signature(check).parameters.values()
    assert OPTIONS == tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


# -- Subjects with nothing to vary -----------------------------------------------------------------------------------------


class Swarm:
    """Positions and momenta, of a type that nobody has registered."""

    def __init__(self, x, p):
        self.x, self.p = x, p


class Kick:
    ain, aout = ("s", "scale"), "t"

    def apl(node, s, scale, name):
        return dict(t=Swarm(s.x, s.p - s.x))

    def vjp(node, _t):
        return dict(_s=Swarm(_t.x - _t.p, _t.p), _scale=0.0)


UNKNOWN = (
    r"has no input that could be varied; expected was a number, .*, and given was .*"
    r"'s': Swarm, a type whose parts are not known; .* take_apart.* vmad_lit\.core\.valuetypes\.register\(Swarm\)"
)


@pytest.mark.parametrize(
    "test", [check, check_taylor, check_dot_product, check_second_order, check_ownership]
)
def test_a_type_that_is_not_registered(test):
    """The message names the argument and its type, and says how to make it known."""
    swarm, kick = Swarm(X, X), operator(Kick)
    with pytest.raises(BadArgument, match=UNKNOWN) as caught:
        test(kick, swarm, 2.0, name="all", constant="scale")
    assert "'scale': 2.0 (held constant), 'name': 'all'" in str(caught.value)
    with pytest.raises(BadArgument, match=UNKNOWN):
        test(lambda s: kick(s, 2.0, "all"), swarm)
    with Builder() as m:
        m.output(t=kick(m.input("s"), 2.0, "all"))
    with pytest.raises(BadArgument, match=UNKNOWN):
        test(m, dict(s=swarm))


def test_nothing_to_vary_in_a_plain_function():
    with pytest.raises(BadArgument, match="'x0': Swarm, a type whose parts are not known"):
        check_gradient(lambda s: 1.0, Swarm(X, X), gradient=lambda s: s)
    with pytest.raises(BadArgument, match="and given was nothing"):
        check_gradient(lambda: 1.0, gradient=lambda: [])
    with pytest.raises(BadArgument, match=r"given was 'x': .* \(held constant\)$"):
        check(square, X, constant="x")


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6, 1e12, 1e15])
def test_a_wrong_derivative_is_found_whatever_the_size_of_the_input(size):
    """Or the test says that it has no power, since all steps are lost in rounding."""

    class wrong(Square):
        def jvp(node, x_, x):
            return dict(y_=5 * x * x_)

        def vjp(node, _y, x):
            return dict(_x=5 * x * _y)

    message = "slopes 1.0" if size < 1e10 else "this test proves nothing; larger ones can be given as steps="
    with pytest.raises(AssertionError, match=message):
        check_taylor(operator(wrong), X * size)
    with pytest.raises(AssertionError, match=message):
        check_gradient(lambda x: np.sum(x**2), X * size, gradient=lambda x: 5 * x)
    with pytest.raises(AssertionError, match="slopes 1.0"):
        check_taylor(operator(wrong), X * size, steps=[max(size, 1.0) * h for h in (0.01, 0.003, 0.001)])


def test_a_derivative_that_is_mere_rounding_is_no_lack_of_power():
    check_taylor(lambda x: x * (1.0 / 3.0) + x * (-1.0 / 3.0) + 1e6, X, allow_zero=True)


# -- What operators do besides ---------------------------------------------------------------------------------------------


def test_an_operator_that_changes_what_it_is_given():
    class ofx(Square):
        def apl(node, x):
            x *= 1.5
            return dict(y=x**2)

    class of_y(Square):
        def vjp(node, _y, x):
            _y *= 2 * x
            return dict(_x=_y)

    class ofx_(Square):
        def jvp(node, x_, x):
            x_ *= 2 * x
            return dict(y_=x_)

    for cls, name in (ofx, "x"), (of_y, "_y"), (ofx_, "x_"):
        for subject in operator(cls), lambda x: operator(cls)(x):
            with pytest.raises(
                AssertionError, match=f"operator {cls.__name__}, declared at .*changes its argument '{name}'"
            ):
                check(subject, X.copy())


def test_changes_are_looked_for_however_often_the_operator_was_called():
    @operator
    class sometimes(Square):
        def vjp(node, _y, x):
            if x.min() > 0.4:
                _y[...] = 2 * x * _y
                return dict(_x=_y)
            return dict(_x=2 * x * _y)

    with Builder() as m:
        m.output(y=sometimes(m.input("x")))
    for _ in range(5):
        m.compute_with_vjp(dict(x=X * 0.1), dict(_y=np.ones(3)))
    with pytest.raises(
        AssertionError, match="vjp of operator sometimes, .*changes its argument '_y' in place"
    ):
        check(sometimes, X)


def test_a_trusted_operator_that_changes_what_it_is_given():
    class trusted(Square):
        trusted = True

        def jvp(node, x_, x):
            x_ *= 2 * x
            return dict(y_=x_)

    with pytest.raises(AssertionError, match="changed a tangent or cotangent in place"):
        check(operator(trusted), X)


@pytest.mark.parametrize("place", ["list", "node", "class"])
def test_an_operator_that_keeps_a_value_outside_of_the_tape(place):
    kept = []

    class keeps(Square):
        def apl(node, x):
            if place == "node":
                node.cache = x
            elif place == "class":
                keeps.last = x
            else:
                kept.append(x)
            return dict(y=x**2)

        def vjp(node, _y):
            original = node.forward or node
            x = original.cache if place == "node" else keeps.last if place == "class" else kept[-1]
            return dict(_x=2 * x * _y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntakenBranch)
        with pytest.raises(
            AssertionError, match="something that the derivative needs is kept outside of the tape"
        ):
            check(operator(keeps), X)


def test_an_operator_that_keeps_the_first_value_for_ever():
    """Two tapes agree with what each gives alone, since all of them are wrong alike; jvp and vjp do not."""
    kept = {}

    class first(Square):
        def apl(node, x):
            kept.setdefault("x", x.copy())
            return dict(y=x**2)

        def vjp(node, _y):
            return dict(_x=2 * kept["x"] * _y)

        hvp = None

    with pytest.raises(AssertionError, match="is kept from the first"):
        check(operator(first), X)


# -- Branches --------------------------------------------------------------------------------------------------------------


def told(subject, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(subject, *args, **options)
    return [str(w.message) for w in caught if w.category is UntakenBranch]


def test_a_branch_that_was_not_taken():
    @operator
    class branched(Square):
        def vjp(node, _y, x):
            if x.min() > 0:
                return dict(_x=_y * 2 * x)
            return dict(_x=_y * 5)  # wrong

    (text,) = told(branched, X)
    assert "'if x.min() > 0:' in vjp, at " in text and text.startswith(
        "branched: this test saw only one side"
    )
    (text,) = told(lambda x: branched(unary.exp(x)), X)
    assert f"{__file__}:" in text


def test_branches_within_a_line_and_in_all_functions():
    class inline(Square):
        def apl(node, x):
            return dict(y=x**2 if x.min() > 0 else x**3)

        def jvp(node, x_, x):
            return dict(y_=2 * x * (x.min() > 0 and x_))

        def hvp(node, _y, x_):
            while x_ is None:
                x_ = 0.0
            return dict(_x_=2 * _y * x_)

    @autooperator("x -> y")
    def inside(x):
        return operator(inline)(x)

    assert sorted(text.split(" in ")[-1][:3] for text in told(operator(inline), X)) == ["apl", "hvp", "jvp"]
    assert len(told(inside, X)) == 3


def test_nothing_is_told_of_what_was_seen():
    @operator
    class seen(Square):
        def vjp(node, _y, x):
            total = 0.0
            for i in range(3):
                if i < 2:
                    total = total + _y * x
            return dict(_x=total)

    assert told(seen, X) == [] and told(square, X) == [] and told(cube, X) == []


def test_a_debugger_is_left_in_peace():
    import sys

    @operator
    class branched(Square):
        def vjp(node, _y, x):
            return dict(_x=_y * 2 * x if x.min() > 0 else 5.0)

    def tracer(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        texts, after = told(branched, X), sys.gettrace()
    finally:
        sys.settrace(before)
    assert texts == [] and after is tracer


# -- Where there is nothing to test ------------------------------------------------------------------------------------------


def rooted(x):
    return unary.exp(x) * unary.sqrt(x)


def normed(x):
    return unary.sqrt(x * x)


def shifted(x, y):
    return x * 2.0 + y


@operator
class root_of_three_halves:
    """x^1.5, whose slope is zero where its curvature is infinite."""

    ain, aout = "x", "y"

    def apl(node, x):
        return x**1.5

    def jvp(node, x_, x):
        return 1.5 * np.sqrt(x) * x_

    def vjp(node, _y, x):
        return 1.5 * np.sqrt(x) * _y

    def hvp(node, _y, x_, x):
        return 0.75 / np.sqrt(x) * _y * x_


ZERO = np.array([4.0, 0.0])
POINTS = [
    (unary.log, (ZERO,), "the value of 'y' is not finite at this point, first after log-0;"),
    (
        unary.sqrt,
        (ZERO,),
        "the tangent of the result 'y' is not finite at this point, first after sqrt-jvp-0;",
    ),
    (
        normed,
        (ZERO,),
        r"the cotangent of the input 'x' .*, first after sqrt-vjp-0, built at .*test_testing.py:",
    ),
    (
        rooted,
        (ZERO,),
        "the tangent of the result 'y' .*, first after sqrt-jvp-1, built at .*test_testing.py:",
    ),
    (rooted, (np.array([1.0, 1e4]),), "the value of 'y' .*, first after exp-0, built at .*test_testing.py:"),
    (shifted, (X, np.array([1.0, np.nan, 2.0])), "the value of 'y' .* point, as is the input 'y';"),
    (unary.log, (np.array([1.0, 1e-6]),), "at x \\+ h v, with h=.*, values or derivatives are not finite"),
]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("subject, point, told", POINTS)
def test_a_point_that_is_not_finite_is_blamed_and_not_the_operator(subject, point, told):
    with pytest.raises(AssertionError, match=f"^{subject.__name__}: {told}"):
        check(subject, *point)
    others = [check_dot_product] * ("h v" not in told) + [check_taylor] * ("cotangent" not in told)
    for test in others + [check_second_order] * ("value" in told and "h v" not in told):
        with pytest.raises(AssertionError, match="not finite"):
            test(subject, *point)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_second_derivative_that_is_not_finite_is_named():
    with pytest.raises(AssertionError, match="the change of the cotangent of the input 'x' is not finite"):
        check_second_order(root_of_three_halves, np.array([1.0, 0.0]))
    with pytest.raises(
        AssertionError, match=r"root_of_three_halves: at x \+ h v, with h=1.0e-03, values or deriv"
    ):
        check(root_of_three_halves, np.array([1.0, 0.0]))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_gradients_of_plain_functions_that_are_not_finite_are_named():
    objective, slope = lambda x: np.sum(np.sqrt(x)), lambda x: 0.5 / np.sqrt(x)
    with pytest.raises(AssertionError, match="the cotangent of the input 'x0' is not finite at this point;"):
        check_gradient(objective, ZERO, gradient=slope)
    with pytest.raises(AssertionError, match="the value of 'y' is not finite at this point;"):
        check_gradient(lambda x: np.sum(np.log(x)), ZERO, gradient=lambda x: 1 / x)
    check_gradient(objective, ZERO + 1, gradient=slope)
