"""Looking at a model and a run: tables, pictures, bytes, profiles, progress bars; and what errors tell."""

import html.parser
import io
import re
import sys
import time

import numpy as np
import pytest

from vmad_lit import Builder, ListPlaceholder, autooperator, operator
from vmad_lit.core import error
from vmad_lit.core.chain import checkpoint
from vmad_lit.core.model import Model
from vmad_lit.core.operator import ZeroGradient
from vmad_lit.core.profile import Profile, progress
from vmad_lit.core.valuetypes import nbytes_of
from vmad_lit.lib import linalg


@operator
class scale:
    """Records its input, and takes its time if told to."""

    ain, aout = "x", "y"

    def apl(node, x, w=2.0, seconds=0.0):
        time.sleep(seconds)
        return dict(y=x * w)

    def vjp(node, _y, x, w):
        return dict(_x=_y * w)

    def jvp(node, x_, x, w):
        return dict(y_=x_ * w)


@operator
class times:
    """A product with all three derivatives."""

    ain, aout = ("a", "b"), "y"

    def apl(node, a, b):
        return a * b

    def vjp(node, _y, a, b):
        return dict(_a=_y * b, _b=np.sum(_y * a) if np.ndim(b) == 0 else _y * a)

    def jvp(node, a_, b_, a, b):
        return a_ * b + a * b_

    def hvp(node, _y, a_, b_):
        return dict(_a_=_y * b_, _b_=_y * a_)


@autooperator("x -> y")
def step(x, w, seconds=0.0):
    return scale(scale(x, w), w, seconds)


@autooperator("x -> y")
def outer(x, n):
    for _ in range(n):
        x = step(x, w=0.5)
    return x


def nested(n=3):
    with Builder() as m:
        m.output(y=linalg.sum(outer(m.input("x"), n=n)))
    return m


def long_chain(n, w=2.0):
    with Builder() as m:
        x = m.input("x")
        for _ in range(n):
            x = scale(x, w)
        m.output(y=x)
    return m


class Balance(html.parser.HTMLParser):
    """Checks that what is opened is closed, and collects the text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.count = [], "", 0
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        self.count += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# Tables


def test_long_tables_are_short_and_fast():
    large, m = long_chain(100_000), long_chain(20_000, 1.0)
    y, tape = m.compute("y", dict(x=np.ones(2)), return_tape=True)
    for thing, n in (large, 100_000), (m, 20_000), (tape, 20_000), (tape.get_vjp(), 20_000):
        begin = time.perf_counter()
        source = thing._repr_html_()
        assert (
            time.perf_counter() - begin < 20
        )  # a generous limit for a busy machine; quadratic work takes minutes
        page = Balance(source)
        assert f"({n - 100} more rows)" in page.text and page.count == 102 and len(source) < 100_000
    source = large._repr_html_()
    assert "scale-0" in source and "scale-99999" in source and "scale-50000" not in source


def test_tables_are_escaped():
    with Builder() as m:
        x = m.input("<b>x</b>")
        m.output(**{"y&": scale(x)})
    y, tape = m.compute("y&", {"<b>x</b>": np.ones(2)}, return_tape=True)
    for thing in m, tape:
        source = thing._repr_html_()
        assert "<b>" not in source and "&lt;b&gt;" in source
        assert "<b>x</b>" in Balance(source).text


def test_the_table_of_a_tape_shows_shapes_bytes_and_inner_tapes():
    m = nested()
    y, tape = m.compute("y", dict(x=np.ones((3, 4), "f4")), return_tape=True)
    page = Balance(tape._repr_html_())
    assert "ndarray float32[3, 4]" in page.text and "test_seeing.py:" in page.text
    assert page.text.count("tape of ") == 1 + 1 + 3  # the model, the loop, its steps
    assert f"{tape.nbytes} B recorded" in page.text
    assert "test_seeing.py:" in repr(tape[0]) and "recorded" in repr(tape[0])


def test_a_record_is_a_table_with_the_tapes_inside():
    m = nested(2)
    y, tape = m.compute("y", dict(x=np.ones(5)), return_tape=True)
    first = Balance(tape[0]._repr_html_())
    assert first.text.startswith("outer-0(x, 2) -> outer-0.y at test_seeing.py:")
    assert first.text.count("tape of ") == 1 + 2  # the loop, its steps
    assert "ndarray float64[5]" in first.text
    assert "<table>" in tape[1]._repr_html_() and "tape of" not in tape[1]._repr_html_()


def test_many_inner_tapes_are_not_all_written_out():
    m = nested(90)
    y, tape = m.compute("y", dict(x=np.ones(2)), return_tape=True)
    assert Balance(tape._repr_html_()).count < 1000


def test_the_repr_of_a_node_with_a_long_list_is_short():
    with Builder() as m:
        m.output(y=linalg.stack(m.input(*(f"x{i}" for i in range(5000))), axis=0))
    assert "x0, x1, x2, ... 4996 more, x4999" in repr(m[0]) and len(repr(m[0])) < 300


# Bytes


def test_an_array_is_weighed_once():
    a = np.ones(1000)
    assert nbytes_of(a, {}) == 8000
    assert nbytes_of([a, a[:5], {"b": a.reshape(10, 100)}, (a.T,)], {}) == 8000
    assert nbytes_of(a[:5], {}) == 8000  # a slice keeps all of it alive
    assert nbytes_of([np.broadcast_to(np.ones(1), (100,)), 1.0, "text", None, ZeroGradient], {}) == 8

    class Holder:
        def __init__(self):
            self.indices, self.n = a, 5

    assert nbytes_of([Holder(), a], {}) == 8000


def test_the_bytes_of_a_tape():
    m = long_chain(3)
    y, tape = m.compute("y", dict(x=np.ones(100)), return_tape=True)
    assert tape.nbytes == 3 * 800  # the inputs of the three nodes
    with Builder() as m:
        x = m.input("x")
        m.output(y=[scale(x), scale(x, 3.0)])
    y, tape = m.compute("y", dict(x=np.ones(100)), return_tape=True)
    assert tape.nbytes == 800
    m = nested(3)
    y, tape = m.compute("y", dict(x=np.ones(100)), return_tape=True)
    assert tape.nbytes == 6 * 800


@pytest.mark.parametrize("ram", [1, 2, 5])
def test_the_bytes_of_a_chain_follow_its_states(ram):
    pytest.importorskip("checkpoint_schedules")

    @autooperator("x -> y")
    def axpy(x):
        return scale(x)

    with Builder() as m:
        m.output(y=checkpoint(axpy, n=20, ram=ram)(m.input("x")))
    y, tape = m.compute("y", dict(x=np.ones(1000)), return_tape=True)
    assert ram * 8000 <= tape.nbytes <= (ram + 2) * 8000


@pytest.mark.collective
def test_the_bytes_of_fields():
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm

    pm = fastpm.ParticleMesh([8, 8], 1.0)
    with Builder() as m:
        m.output(y=scale(m.input("x")))
    field = pm.create("real", value=1.0)
    y, tape = m.compute("y", dict(x=field), return_tape=True)
    assert field.value.nbytes <= tape.nbytes <= 3 * max(field.value.nbytes, 64)
    assert nbytes_of([field, field, field.value], {}) == nbytes_of(field, {})


# Pictures


def parse_dot(source):
    """Nodes, arrows and clusters of a picture; fails if it is not in the form that we write."""
    string = r'"(?:[^"\\]|\\.)*"'
    nodes, arrows, clusters, depth = {}, [], [], 0
    for line in source.splitlines()[2:]:
        line = line.strip()
        if match := re.fullmatch(rf"({string}) -> ({string})(?: \[label={string}\])?;", line):
            arrows.append(match.groups())
        elif match := re.fullmatch(rf"subgraph ({string}) {{", line):
            assert match[1].startswith('"cluster')
            clusters.append(match[1])
            depth += 1
        elif line == "}":
            depth -= 1
        elif match := re.fullmatch(
            rf"({string}) \[label=({string})(?:, (?:style=rounded|shape=note))?\];", line
        ):
            nodes[match[1]] = depth
        else:
            assert re.fullmatch(rf"label={string};", line), line
    assert depth == -1  # the last brace closes the picture
    assert {end for arrow in arrows for end in arrow} <= nodes.keys()
    return nodes, arrows, clusters


def test_pictures_of_models_and_derived_models():
    with Builder() as m:
        x = m.input('a "quoted" \\ name')
        m.output(y=linalg.stack([scale(x), x + 1.0], axis=0))
    y, tape = m.compute("y", {'a "quoted" \\ name': np.ones(2)}, return_tape=True)
    for model in m, tape.get_vjp(), tape.get_jvp():
        nodes, arrows, clusters = parse_dot(model.to_dot())
        assert len(nodes) >= len(model) + 2 and arrows and not clusters
    nodes, _, _ = parse_dot(tape.get_vjp().to_dot())
    assert any("tape[" in node for node in nodes)


def test_clusters():
    m = nested(2)
    assert parse_dot(m.to_dot())[2] == []
    nodes, arrows, clusters = parse_dot(m.to_dot(depth=1))
    assert clusters == ['"cluster outer-0"']
    nodes, arrows, clusters = parse_dot(m.to_dot(depth=9))
    assert len(clusters) == 3 and sum("scale" in node for node in nodes) == 4
    # From the input one gets to the output
    reached = {'"in: x"'}
    for _ in nodes:
        reached |= {b for a, b in arrows if a in reached}
    assert '"out: y"' in reached and len(reached) == len(nodes)
    m.compute("y", dict(x=1.0))


def test_an_autooperator_whose_hyper_parameter_is_a_symbol_stays_closed():
    with Builder() as m:
        x, w = m.input("x", "w")
        m.output(y=step(x, w))
    assert parse_dot(m.to_dot(depth=3))[2] == []


# Profiles


def test_a_profile_counts_times_and_weighs_all_levels():
    m, init = nested(3), dict(x=np.ones(1000))
    with Profile() as p:
        m.compute_with_vjp(init, dict(_y=1.0))
        m.compute_with_jvp("y", init, dict(x_=np.ones(1000)))
    rows = {row.name: row for row in p.by_operator()}
    assert rows["scale"].calls == 12 and rows["scale-vjp"].calls == 6 and rows["scale-jvp"].calls == 6
    assert rows["step"].calls == 6 and rows["outer"].calls == 2
    assert rows["scale"].made == 12 * 8000 and rows["scale"].recorded >= 11 * 8000
    assert rows["step"].made == rows["outer"].made == rows["outer"].recorded == 0
    for row in rows.values():
        assert 0 <= row.own <= row.total
    assert rows["outer"].total >= rows["step"].total >= rows["scale"].total
    assert np.isclose(p.root.own + sum(row.own for row in rows.values()), p.root.total)
    depths = [(row.name, row.depth) for row in p.by_node()][:8]
    assert depths == [
        ("outer-0", 0),
        ("step-0", 1),
        ("scale-0", 2),
        ("scale-1", 2),
        ("step-1", 1),
        ("scale-0", 2),
        ("scale-1", 2),
        ("step-2", 1),
    ]
    assert all("test_seeing.py:" in row.place for row in p.by_node())
    text = str(p)
    assert text.splitlines()[1].split() == [
        "calls",
        "own",
        "ms",
        "total",
        "ms",
        "made",
        "recorded",
        "built",
        "at",
    ]
    assert "own ms" in Balance(p._repr_html_()).text
    with pytest.raises(ValueError, match="'operator' or by 'node'"):
        p.table("colour")


def test_time_goes_to_the_node_that_takes_it():
    with Builder() as m:
        m.output(y=step(m.input("x"), 2.0, seconds=0.05))
    with Profile() as p:
        m.compute("y", dict(x=1.0))
    slow = {row.name: row for row in p.by_node()}
    assert slow["scale-1"].own >= 0.05 and slow["step-0"].total >= 0.05
    assert slow["step-0"].own < 0.03 and slow["scale-0"].own < 0.03
    assert p.by_operator()[0].name == "scale"


def test_results_that_are_views_are_not_made():
    with Builder() as m:
        m.output(y=linalg.reshape(scale(m.input("x")), (10, 10)))
    with Profile() as p:
        m.compute("y", dict(x=np.ones(100)))
    made = {row.name: row.made for row in p.by_node()}
    assert made == {"scale-0": 800, "reshape-1": 0}


def test_a_profile_changes_nothing_and_leaves_nothing_behind():
    m, init = nested(3), dict(x=np.linspace(0, 1, 7))
    before = m.compute_with_vjp(init, dict(_y=1.0))
    runner = Model.runner
    with Profile() as p, Profile() as q:
        during = m.compute_with_vjp(init, dict(_y=1.0))
        m.compute("y", init, monitor=lambda *args: None)
    assert Model.runner is runner
    np.testing.assert_array_equal(before[1][0], during[1][0])
    assert [row[:2] for row in p.by_node()] == [row[:2] for row in q.by_node()]
    calls = [row.calls for row in p.by_node()]
    m.compute_with_vjp(init, dict(_y=1.0))
    assert [row.calls for row in p.by_node()] == calls
    with p:  # it goes on counting
        m.compute_with_vjp(init, dict(_y=1.0))
    assert sum(row.calls for row in p.by_node()) > sum(calls)


def test_a_profile_survives_an_exception():
    with Builder() as m:
        m.output(y=linalg.reshape(scale(m.input("x")), (7,)))
    p = Profile()
    with pytest.raises(ValueError) as caught, p:
        m.compute("y", dict(x=np.ones(3)))
    assert len(caught.value.__notes__) == 1 and "reshape-1" in caught.value.__notes__[0]
    assert [row.name for row in p.by_node()] == ["scale-0", "reshape-1"] and len(p._stack) == 1
    assert Model.runner is Model.__dict__["runner"].__func__


def test_a_profile_keeps_no_array_alive():
    import weakref

    x = np.ones(1000)
    ref = weakref.ref(x)
    with Profile() as p:
        nested(2).compute_with_vjp(dict(x=x), dict(_y=1.0))
        del x
        assert ref() is None
    assert p.root.total > 0


def test_chains_and_forgetful_autooperators_are_measured_inside():
    pytest.importorskip("checkpoint_schedules")

    @autooperator("x -> y")
    def axpy(x):
        return scale(x)

    with Builder() as m:
        m.output(y=axpy.forgetful(checkpoint(axpy, n=8, ram=2)(m.input("x"))))
    with Profile() as p:
        m.compute_with_vjp(dict(x=1.0), dict(_y=1.0))
    rows = {row.name: row for row in p.by_operator()}
    assert rows["scale"].calls > 9 and rows["scale-vjp"].calls == 9


def test_the_picture_of_a_profile(monkeypatch):
    pytest.importorskip("matplotlib")
    with Profile() as p:
        nested().compute("y", dict(x=np.ones(3)))
    figure = p.plot()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][-1] == p.by_operator()[0].name
    from matplotlib import pyplot

    pyplot.close(figure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib .* pip install 'vmad_lit\[output\]'"):
        p.plot()


@pytest.mark.collective
def test_profiles_over_ranks():
    MPI = pytest.importorskip("mpi4py.MPI")
    comm = MPI.COMM_WORLD
    with Profile() as p:
        nested(1).compute("y", dict(x=np.ones(10 * (comm.rank + 1))))
        if comm.rank == comm.size - 1:
            long_chain(1).compute("y", dict(x=np.ones(5)))  # only on one rank
    mean, largest = p.over_ranks(comm)
    names = comm.allgather([row.name for row in mean.by_node()])
    assert all(n == names[0] for n in names) and "scale-0" in names[0]
    made = {
        (row.depth, row.name): (row.made, most.made) for row, most in zip(mean.by_node(), largest.by_node())
    }
    assert made[2, "scale-0"] == (40 * (comm.size + 1), 80 * comm.size)
    assert made[0, "scale-0"] == (40 / comm.size, 40)
    mine, most = (row.total for row in (p.by_node()[0], largest.by_node()[0]))
    assert mine <= most and most == comm.allreduce(mine, MPI.MAX)
    str(mean), largest._repr_html_()


# Progress


@pytest.mark.collective
def test_progress_knows_the_total_of_every_sweep():
    m, init, log, totals = long_chain(7), dict(x=np.ones(2)), io.StringIO(), []

    class Bar:
        def __init__(self, total, desc, **options):
            self.row = [desc, total, 0, False]
            totals.append(self.row)

        def update(self):
            self.row[2] += 1

        def close(self):
            self.row[3] = True

    def watched():
        monitor = progress(everywhere=True, always=True)
        monitor._make = Bar
        return monitor

    m.compute("y", init, monitor=watched())
    m.compute_with_vjp(init, dict(_y=np.ones(2)), monitor=watched())
    m.compute_with_jvp("y", init, dict(x_=np.ones(2)), monitor=watched())
    m.compute_with_gnDp("y", init, dict(x_=np.ones(2)), monitor=watched())
    assert totals == [
        [kind, 7, 7, True]
        for kind in ("forward", "forward", "vjp", "forward", "jvp", "forward", "jvp", "vjp")
    ]
    del totals[:]
    monitor = watched()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            m.compute("y", init, monitor=lambda *args: (monitor(*args), 1 / 0))
    assert totals == [["forward", 7, 1, True], ["forward", 7, 1, False]]
    m.compute("y", init, monitor=progress(always=True, everywhere=True, file=log, mininterval=0, leave=True))
    assert "forward" in log.getvalue() and "7/7" in log.getvalue()


@pytest.mark.collective
def test_progress_is_quiet_without_a_terminal_and_on_other_ranks():
    m, init, log = long_chain(3), dict(x=1.0), io.StringIO()
    m.compute("y", init, monitor=progress(file=log))
    assert log.getvalue() == ""
    m.compute("y", init, monitor=progress(always=True, file=log))
    mpi = sys.modules.get("mpi4py.MPI")
    assert bool(log.getvalue()) == (mpi is None or mpi.COMM_WORLD.rank == 0)


# Errors: the note on an exception inside an operator


@operator
class touchy:
    """Fails in one of its functions."""

    ain, aout = "x", "y"

    def apl(node, x, where):
        if where == "apl":
            raise KeyError("apl")
        return dict(y=x * 1.0)

    def vjp(node, _y, where):
        if where == "vjp":
            raise KeyError("vjp")
        return dict(_x=_y)

    def jvp(node, x_, where):
        if where == "jvp":
            raise KeyError("jvp")
        return dict(y_=x_)

    def hvp(node, _y, x_, where):
        if where == "hvp":
            raise KeyError("hvp")
        return dict(_x_=ZeroGradient)


@autooperator("x -> y")
def inner(x, where):
    return touchy(x, where)


@autooperator("x -> y")
def middle(x, where):
    return inner(x, where)


KINDS = ["apl", "vjp", "jvp", "hvp"]


def fail(m, kind):
    init, x_ = dict(x=np.ones(3)), dict(x_=np.ones(3))
    with pytest.raises(KeyError) as caught:
        if kind == "jvp":
            m.compute_with_jvp("y", init, x_)
        elif kind == "hvp":
            m.compute_with_hvp("y", init, dict(x_, _y=np.ones(3)))
        else:
            m.compute_with_vjp(init, dict(_y=np.ones(3)))
    assert type(caught.value) is KeyError and caught.value.args == (kind,)
    return caught.value.__notes__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forgetful", [False, True])
def test_one_note_for_each_level(kind, forgetful):
    with Builder() as m:
        op = middle.forgetful if forgetful else middle
        m.output(y=op(m.input("x"), kind))
        line = sys._getframe().f_lineno - 1
    notes = fail(m, kind)
    names = [re.match(r"in (\w+)", note)[1] for note in notes]
    assert names == ["touchy", "inner", "middle"]
    assert all("float64[3]" in note and "test_seeing.py:" in note for note in notes)
    assert notes[-1].endswith(f"test_seeing.py:{line}")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_one_note_for_each_level_of_a_chain(kind):
    pytest.importorskip("checkpoint_schedules")
    with Builder() as m:
        m.output(y=checkpoint(inner, n=5, ram=2)(m.input("x"), kind))
    names = [re.match(r"in (\w+)", note)[1] for note in fail(m, kind)]
    assert names == ["touchy", "inner_chain"]


def test_a_note_can_be_made_of_any_arguments():
    @operator
    class awkward:
        ain, aout = "x", "y"

        def apl(node, x, shape, options=None):
            raise KeyError("apl")

    from vmad_lit.core.symbol import Literal

    with Builder() as m:
        constant = Literal(np.ones(3))
        m.output(y=awkward([m.input("x"), 2.0], [constant.shape, 1]))
    with pytest.raises(KeyError) as caught:
        m.compute("y", dict(x=1.0))
    (note,) = caught.value.__notes__
    assert "x: list of 2" in note and "awkward-0" in note


# Errors: names


def simple():
    with Builder() as m:
        position, mass = m.input("position", "mass")
        m.output(energy=linalg.sum(times(times(position, position), mass)), momentum=times(position, mass))
    return m, dict(position=np.ones(3), mass=2.0)


def complaint(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is kind
    assert any(frame.path.name == "test_seeing.py" for frame in caught.traceback)  # the line of the user
    return str(caught.value)


def test_misspelt_names():
    m, init = simple()
    x_ = dict(position_=np.ones(3))
    unexpected, hint = error.UnexpectedOutput, "did you mean 'energy'?"
    assert hint in complaint(unexpected, m.compute, "enrgy", init)
    assert hint in complaint(unexpected, m.compute, ["energy", "enrgy"], init, return_tape=True)
    assert hint in complaint(unexpected, m.compute_with_vjp, init, dict(_enrgy=1.0))
    assert hint in complaint(unexpected, m.compute_with_jvp, "enrgy", init, x_)
    assert hint in complaint(unexpected, m.compute_with_gnDp, ["enrgy"], init, x_)
    assert hint in complaint(unexpected, m.compute_with_hvp, "enrgy", init, x_)
    bad, hint = error.BadArgument, "did you mean 'position_'?"
    for run in m.compute_with_jvp, m.compute_with_gnDp, m.compute_with_hvp:
        assert hint in complaint(bad, run, "energy", init, dict(positon_=np.ones(3)))
    assert "did you mean '_energy'?" in complaint(bad, m.compute_with_vjp, init, dict(energy=1.0))
    assert "did you mean 'position_'?" in complaint(
        bad, m.compute_with_jvp, "energy", init, dict(position=1.0)
    )
    _, tape = m.compute(["energy"], init, return_tape=True)
    vjp, jvp, hvp = tape.get_vjp(), tape.get_jvp(), tape.get_hvp()
    seeds = dict(_energy=1.0, _momentum=0)
    assert "did you mean '_mass'?" in complaint(unexpected, vjp.compute, "_mas", seeds)
    assert "did you mean '_enrgy'?" in complaint(
        error.ResolveError, vjp.compute, "_mass", dict(_enrgy=1.0, _momentum=0)
    )
    assert "did you mean 'energy_'?" in complaint(unexpected, jvp.compute, "enrgy_", x_)
    assert "did you mean '_energy_'?" in complaint(
        bad, hvp.compute, "_mass_", dict(seeds, position_=np.ones(3), mass_=0, _enrgy_=1.0)
    )


def test_extra_inputs_are_welcome_and_missing_ones_are_guessed():
    m, init = simple()
    assert m.compute("energy", dict(init, colour="red")) == 6.0
    text = complaint(error.ResolveError, m.compute, "energy", dict(positon=np.ones(3), mass=1.0))
    assert "'position' is needed" in text and "did you mean 'positon'?" in text


# Errors: the shapes of tangents and cotangents


def test_cotangents_of_another_shape_are_refused():
    m, init = simple()
    bad = error.BadArgument
    text = complaint(bad, m.compute_with_vjp, init, dict(_momentum=np.ones(4)))
    assert "'_momentum' is ndarray float64[4]" in text and "ndarray float64[3]" in text
    assert "'_energy'" in complaint(bad, m.compute_with_vjp, init, dict(_energy=np.ones(3)))
    assert "'_momentum'" in complaint(bad, m.compute_with_vjp, init, dict(_momentum=[1.0, 2.0]))
    assert "'_momentum'" in complaint(bad, m.compute_with_vjp, init, dict(_momentum=np.ones((3, 1))))
    assert "'_momentum'" in complaint(bad, m.compute_with_hvp, "momentum", init, dict(_momentum=np.ones(4)))
    _, tape = m.compute("energy", init, return_tape=True)
    vjp, jvp, hvp = tape.get_vjp(), tape.get_jvp(), tape.get_hvp()
    assert "'_momentum'" in complaint(bad, vjp.compute, "_mass", dict(_energy=1.0, _momentum=np.ones(4)))
    assert "'position_'" in complaint(bad, jvp.compute, "energy_", dict(position_=np.ones((3, 3)), mass_=0))
    for run in m.compute_with_jvp, m.compute_with_gnDp, m.compute_with_hvp:
        assert "'position_'" in complaint(bad, run, "energy", init, dict(position_=np.ones(2)))
        assert "'mass_'" in complaint(
            bad, run, "energy", init, dict(mass_=np.ones(2))
        )  # its value is a number
    seeds = dict(position_=np.ones(3), mass_=0, _energy=1.0, _momentum=0)
    assert "'_momentum_'" in complaint(bad, hvp.compute, "_mass_", dict(seeds, _momentum_=np.ones(4)))


def test_items_of_lists_are_named():
    @operator
    class halves:
        ain, aout = "x", "y"

        def apl(node, x):
            return dict(y=[x[: len(x) // 2], x[len(x) // 2 :]])

        def vjp(node, _y):
            return dict(_x=np.concatenate(_y))

    with Builder() as m:
        m.output(y=halves(m.input("x"), y=ListPlaceholder(2)), parts=m.input("parts"))
    init = dict(x=np.ones(4), parts=[np.ones(2), [np.ones(3), 1.0]])
    bad = error.BadArgument
    assert "'_y[1]' is ndarray float64[3]" in complaint(
        bad, m.compute_with_vjp, init, dict(_y=[np.ones(2), np.ones(3)])
    )
    assert "belongs to a list of 2" in complaint(bad, m.compute_with_vjp, init, dict(_y=[np.ones(2)]))
    assert "'_y'" in complaint(bad, m.compute_with_vjp, init, dict(_y=np.ones(4)))
    assert "'parts_[1][0]'" in complaint(
        bad, m.compute_with_jvp, "y", init, dict(parts_=[np.ones(2), [np.ones(2), 1.0]])
    )
    assert "'_parts[0]'" in complaint(
        bad, m.compute_with_vjp, init, dict(_parts=[np.ones(3), [np.ones(3), 1.0]])
    )
    _, (_x, _) = m.compute_with_vjp(init, dict(_y=[np.ones(2), np.ones(2)]))
    np.testing.assert_array_equal(_x, np.ones(4))
    _, (_x, _) = m.compute_with_vjp(init, dict(_y=[1.0, 2.0]))  # numbers for arrays
    np.testing.assert_array_equal(_x, [1, 1, 2, 2])


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "i8"])
def test_a_number_stands_for_an_array_of_it(dtype):
    with Builder() as m:
        x = m.input("x")
        m.output(y=x + x)
    x = np.ones((2, 3), dtype)
    (y,), (_x,) = m.compute_with_vjp(dict(x=x), dict(_y=1.0))
    np.testing.assert_array_equal(_x, np.full((2, 3), 2.0))
    assert _x.dtype == (dtype if dtype != "i8" else "f8")
    (y,), (same,) = m.compute_with_vjp(dict(x=x), dict(_y=np.ones((), dtype)))
    np.testing.assert_array_equal(_x, same)
    _, y_ = m.compute_with_jvp("y", dict(x=x), dict(x_=1.0))
    np.testing.assert_array_equal(y_, np.full((2, 3), 2.0))
    _, tape = m.compute("y", dict(x=x), return_tape=True)
    np.testing.assert_array_equal(tape.get_vjp().compute("_x", dict(_y=1.0)), _x)
    assert m.compute_with_vjp(dict(x=x), dict(_y=0))[1][0] is ZeroGradient


@pytest.mark.collective
def test_fields_of_another_mesh_are_refused():
    pytest.importorskip("pmesh")
    from vmad_lit.lib import fastpm

    pm, other = (fastpm.ParticleMesh([n, n], 1.0) for n in (8, 12))
    with Builder() as m:
        m.output(y=scale(m.input("x")))
    field, wrong = (mesh.create("real", value=1.0) for mesh in (pm, other))
    text = complaint(error.BadArgument, m.compute_with_vjp, dict(x=field), dict(_y=wrong))
    assert "'_y' is RealField" in text and "of [8, 8]" in text
    assert "'x_'" in complaint(error.BadArgument, m.compute_with_jvp, "y", dict(x=field), dict(x_=wrong))
    assert "'_y'" in complaint(error.BadArgument, m.compute_with_vjp, dict(x=field), dict(_y=field.r2c()))
    _, (_x,) = m.compute_with_vjp(dict(x=field), dict(_y=field))
    np.testing.assert_array_equal(_x.value, 2.0)


def test_values_that_nobody_knows_are_let_in():
    class Pair:
        def __init__(self, a):
            self.a = a

        def __mul__(self, w):
            return Pair(self.a * w)

    with Builder() as m:
        m.output(y=scale(m.input("x")))
    (y,), (_x,) = m.compute_with_vjp(dict(x=Pair(1.0)), dict(_y=Pair(3.0)))
    assert _x.a == 6.0
