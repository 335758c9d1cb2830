"""`dam bench --against`: a function of the user's own beside dam's, compared with float64 before it is timed."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import dam
from dam import cli
from dam.benchmarks import against, checkout, correct, harness, memory, options, peers, report
from tests import fresh, release
from tests.ops import helpers

SIZES = {"rows": 70, "vocabulary": 500, "hidden": 16, "groups": 40, "trajectories": 12, "steps": 8}
SIZES |= {"sequences": 4, "length": 8}

MINE = """
    import torch
    import torch.nn.functional as F


    def cross_entropy(logits, target, weight):
        return (weight[:, 0] * F.cross_entropy(logits.float(), target[:, 0], reduction="none")).mean()


    def with_gradient(logits, target, weight):
        p = torch.softmax(logits.float(), dim=1)
        hot = F.one_hot(target[:, 0], logits.shape[1])
        loss = -(weight[:, 0] * p.log().gather(1, target)[:, 0]).mean()
        return loss, (weight * (p - hot) / len(p)).to(logits.dtype)


    def unweighted(logits, target, weight):
        return F.cross_entropy(logits.float(), target[:, 0])


    def fails(logits, target, weight):
        return logits[len(logits)].sum()


    def overwrites(logits, target, weight):
        logits.data.mul_(2)
        return logits.sum()


    def draws(logits):
        return torch.multinomial(torch.softmax(logits.float(), dim=1), 1)


    number = 3
"""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("mine", None)


def cases_of(op, dtype=torch.float32, **others):
    cases = harness.cases_of(op)
    return cases(dtype, **{name: SIZES[name] for name in harness.sizes_of(cases)} | others)


# What is right and what is wrong

# Functions of bfloat16 that round what they make on the way.
IN_16_BITS = {
    "jump": ("torch.logsumexp",),
    "adjoint_weights": ("flip, cumsum, softmax",),
    "backward_kolmogorov": ("closed form in torch",),
    "matching_loss": ("c-DTM's formula",),
    "linear_log_prob": ("matmul, log_softmax + gather",),
    "linear_matching_loss": ("matmul, cross entropy", "matmul, c-DTM"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", harness.ops())
def test_what_is_measured_is_right(op, dtype):
    for case in cases_of(op, dtype):
        for name, call in case.functions.items():
            try:
                found = case.checked(call)
            except RuntimeError as error:
                assert "Unsupported dtype" in str(error) and name != "dam"  # Fourier transforms in 16 bits
                continue
            assert found and all(check.passed for check in found), (case.label, name, list(map(str, found)))
            # The gradients asked for are compared.
            assert {f"gradient in {x}" for x in call.wrt} == {c.what for c in found if "gradient" in c.what}
            # Who computes in 16 bits is named, by results that are of 16 bits or of formulas that round to them.
            in_16_bits = {name for name in IN_16_BITS.get(op, ()) if dtype == torch.bfloat16}
            assert {check.arithmetic for check in found if check.arithmetic} == (
                {"bf16 arithmetic"} if name in in_16_bits else set()
            ), (name, list(map(str, found)))


def off(value, factor=1.01):
    """A result that is wrong by one part in a hundred."""
    if isinstance(value, torch.Tensor):
        return factor * value if value.is_floating_point() else value
    return type(value)(*(off(x, factor) for x in value)) if hasattr(value, "_fields") else tuple(map(off, value))


@pytest.mark.parametrize("op", [op for op in harness.ops() if op not in ("jump", "linear_jump", "rollout")])
def test_a_wrong_result_is_wrong(op):
    for case in cases_of(op):
        ours = case.functions["dam"]
        wrong = dataclasses.replace(ours, function=lambda f=ours.function, **given: off(f(**given)))
        found = case.checked(wrong)
        assert found and not any(check.passed for check in found), list(map(str, found))


@pytest.mark.parametrize("at", [0, 33, 69])
def test_one_wrong_row_of_a_gradient_is_wrong(at, monkeypatch):
    """Wherever it is among the parts that are compared after one another."""
    monkeypatch.setattr(correct, "ENTRIES", 20 * 500)
    case = cases_of("matching_loss")[1]

    def wrong(logits, **given):
        loss = dam.matching_loss(logits, **given)
        (gradient,) = torch.autograd.grad(loss, logits)
        gradient[at] *= 1.01
        return loss.detach(), gradient

    value, gradient = case.checked(case.inputs.call(wrong))
    assert value.passed and not gradient.passed and gradient.error == pytest.approx(0.01, rel=1e-3)


# By what a tensor [T, ...] is wrong: as little as each of these is refused, in 16 bits too.
FAULTS = {
    "another row": lambda x: x.index_copy(0, torch.tensor([33]), x[34:35]),
    "a row by a part in 8": lambda x: x.index_copy(0, torch.tensor([33]), x[33:34] * 1.125),
    "the largest number": lambda x: torch.where(x.abs() == x.abs().max(), 1.02 * x, x),
    "rows in another order": lambda x: x.flip(0),
}


def with_fault(call, at, fault):
    """The call, whose result has one of its tensors changed: values first, then the gradients."""
    result, gradients = call.with_gradients()
    found = [*harness.tensors(result), *gradients]
    found[at] = fault(found[at])
    made = found[0] if call.wrt else tuple(found)
    return dataclasses.replace(call, function=lambda **_: (made, *found[1:]) if call.wrt else made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [op for op in harness.ops() if op not in ("jump", "linear_jump", "rollout")])
def test_planted_faults_are_found_where_they_are(op, dtype):
    """In one tensor of what dam returns; all others stay right."""
    for case in cases_of(op, dtype):
        ours = case.functions["dam"]
        count = len(case.checked(ours))
        for at, (what, fault) in itertools.product(range(count), FAULTS.items()):
            result = harness.tensors(ours.with_gradients()[0])
            if at < len(result) and result[at].ndim == 0:
                fault = FAULTS["the largest number"]
            checks = case.checked(with_fault(ours, at, fault))
            assert [check.passed for check in checks] == [n != at for n in range(count)], (case.label, what, checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_transposed_is_wrong(dtype):
    """Where rows and columns are as many; else its shape is an error."""
    square = {"rows": 23, "vocabulary": 23}
    for op, sizes in (
        ("log_prob", square),
        ("entropy", square),
        ("matching_loss", square),
        ("linear_log_prob", {**square, "hidden": 23}),
        ("linear_matching_loss", {**square, "hidden": 23}),
    ):
        for case in cases_of(op, dtype, **sizes):
            ours = case.functions["dam"]
            for at in range(len(ours.wrt)):
                checks = case.checked(with_fault(ours, at + 1, lambda x: x.t()))
                assert [check.passed for check in checks] == [n != at + 1 for n in range(len(checks))], (op, checks)
    case = cases_of("matching_loss", dtype)[0]
    with pytest.raises(ValueError, match=r"must have a shape of \(70, 500\) where it has \(500, 70\)"):
        case.checked(with_fault(case.functions["dam"], 1, lambda x: x.t()))


def of_the_first_row(logits, target):
    """Every row divided by the sum of the first."""
    return logits.float().gather(1, target) - torch.logsumexp(logits.float(), dim=1)[:1]


def test_a_forward_of_wrong_rows_is_refused_in_16_bits():
    """Though it is off by less than 2^-3, which is what a bfloat16 result of another size may be."""
    case = cases_of("log_prob", torch.bfloat16, rows=4, vocabulary=4096)[0]
    (check,) = case.checked(case.inputs.call(of_the_first_row))
    assert 1e-2 < check.error < 0.125 and not check.passed
    (check,) = case.checked(case.functions["log_softmax + gather"])
    assert check.passed and not check.arithmetic


def test_who_is_right_in_16_bits_only_is_named():
    """Off by a rounding of a log-probability: wrong of dam, and of others not passed in silence."""
    case = cases_of("log_prob", torch.bfloat16)[0]
    rounded = case.inputs.call(lambda logits, target: dam.log_prob(logits, target).bfloat16().float())
    (check,) = case.checked(rounded)
    assert check.passed and check.arithmetic == "bf16 arithmetic" and str(check).endswith("allowed in bf16 arithmetic")
    (check,) = case.checked(dataclasses.replace(rounded, groups=("dam",)))
    assert not check.passed and not check.arithmetic


def test_what_dam_computes_is_held_to_float32():
    """A formula that is right in 16 bits, under dam's name."""
    case = cases_of("matching_loss", torch.bfloat16)[1]
    formula = case.functions["c-DTM's formula"]
    assert all(check.passed for check in case.checked(formula))
    assert not all(check.passed for check in case.checked(dataclasses.replace(formula, groups=("dam",))))


def test_a_head_is_multiplied_a_block_at_a_time(monkeypatch):
    """In pieces of rows and of the vocabulary the errors are those of the whole, and only some of a large head's rows
    are compared, both ends among them.
    """
    monkeypatch.setattr(correct, "COLUMNS", 64)
    errors = []
    for entries in (2**23, 7 * 500):
        monkeypatch.setattr(correct, "ENTRIES", entries)
        torch.manual_seed(0)
        case = cases_of("linear_matching_loss")[3]
        checks = case.checked(case.functions["dam"])
        errors.append({check.what: (check.error, check.share) for check in checks})
    assert errors[0].keys() == {"value", "gradient in hidden", "gradient in head_weight"}
    for what, error in errors[0].items():
        # Sums in float64 in another order.
        assert errors[1][what] == pytest.approx(error, rel=1e-3, abs=1e-12)
    columns = correct._Inputs(case.functions["dam"], ("", "base_")).columns
    assert 32 <= len(columns) <= 64 and {0, 7, 492, 499} <= set(columns.tolist())


def sampler(p):
    """Draws from softmax, after the logits went through p."""
    return lambda logits: torch.multinomial(torch.softmax(p(logits.double()), dim=1), 1)


@pytest.mark.parametrize(
    ("draws", "good"),
    [
        (sampler(lambda x: x), True),
        (sampler(lambda x: 1.2 * x), False),  # another temperature
        (sampler(lambda x: x[:, :400]), False),  # the end of the vocabulary left out
        (sampler(lambda x: x.flip(1)), False),
        (lambda logits: logits.argmax(dim=1), False),
        (lambda logits: dam.jump(logits, seed=3), True),  # the same at every call
    ],
    ids=["right", "temperature", "a part", "reversed", "the likeliest", "one seed"],
)
def test_draws_have_the_law_of_the_logits(draws, good):
    case = cases_of("jump")[0]
    found = case.checked(case.inputs.call(draws))
    assert len(found) == 2 and all(check.passed for check in found) == good, list(map(str, found))


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    """0.4 lies below two thirds of the values, and this is the farthest."""
    x = torch.tensor([0.9, 0.2, 0.4], dtype=torch.float64)
    assert correct._distance(x) == pytest.approx(3**0.5 * (2 / 3 - 0.4), rel=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits: torch.zeros(70), "must return tokens first, integers \\[70\\]; got torch.float32 \\(70,\\)"),
        (lambda logits: torch.full((70,), 500), "must return tokens of 0 to 499; got 500 to 500"),
    ],
)
def test_no_draws_are_an_error(function, message):
    case = cases_of("jump")[0]
    with pytest.raises(ValueError, match=message):
        case.checked(case.inputs.call(function))


@pytest.mark.parametrize("function", [lambda logits: logits.argmax(dim=1), lambda logits: dam.jump(logits, seed=3)])
def test_the_same_draws_of_few_rows_tell_nothing(function):
    """Eight values are within the bound of any law, so that the likeliest tokens would pass for draws."""
    case = cases_of("jump", rows=8)[0]
    with pytest.raises(ValueError, match=r"same tokens at every call, which 8 rows .* draw anew .* or measure 64 rows"):
        case.checked(case.inputs.call(function))
    assert all(check.passed for check in case.checked(case.functions["dam"]))


def test_another_shape_is_an_error():
    case = cases_of("entropy")[0]
    with pytest.raises(ValueError, match=r"must have a shape of \(70,\) where it has \(69,\)"):
        case.checked(case.inputs.call(lambda logits: dam.entropy(logits)[1:]))


# What is measured


def bench(*arguments):
    fast = ("--repeats", "1", "--threads", "1", "--no-memory")
    return cli.main(["bench", *arguments, *fast])


def test_a_function_of_ones_own_is_measured(mine):
    names = "mine:cross_entropy,mine.py:with_gradient,torch"
    sizes = ("--V", "50", "--T", "3,5", "--dtype", "bf16")
    assert bench("matching_loss", *sizes, "--against", names, "--json", "o.json", "--png", "o.png") == 0
    results = json.loads((mine / "o.json").read_text())["results"]
    assert [(r["dtype"], r["sizes"]["rows"]) for r in results] == [("bfloat16", 3), ("bfloat16", 5)]
    for result in results:
        plain, based = result["cases"]
        own = {"mine:cross_entropy", "mine.py:with_gradient"}
        assert plain["median_seconds"].keys() == own | {"plain read of the logits", "dam", "cross entropy"}
        assert plain["errors"].keys() == plain["median_seconds"].keys() - {"plain read of the logits"}
        assert all(plain["errors"][name].keys() == {"value", "gradient in logits"} for name in own)
        # It takes no base: that case is measured without it, and says so.
        assert "base_logits" in based["absent"]["mine:cross_entropy"] and not plain["absent"]
        assert based["median_seconds"].keys() == {"plain read of both logits", "dam", "c-DTM's formula"}
    assert (mine / "o.png").read_bytes().startswith(b"\x89PNG") and not (mine / "runs").exists()


def test_a_wrong_function_is_told_and_not_timed(mine, capsys):
    assert bench("matching_loss", "--V", "50", "--T", "3", "--against", "mine:unweighted", "--json", "o.json") == 1
    plain = json.loads((mine / "o.json").read_text())["results"][0]["cases"][0]
    assert plain["median_seconds"].keys() == {"plain read of the logits", "dam"}
    assert "WRONG: value: " in plain["wrong"]["mine:unweighted"]
    shown = capsys.readouterr()
    assert "mine:unweighted" in shown.out and "WRONG: gradient in logits: " in shown.out
    assert "mine:unweighted in matching_loss, forward and backward, T = 3, V = 50: WRONG" in shown.err


def test_a_function_that_fails_is_told_with_its_line(mine, capsys):
    assert bench("matching_loss", "--V", "50", "--T", "3", "--against", "mine:fails", "--json", "o.json") == 1
    line = next(n for n, text in enumerate(MINE.splitlines()) if "logits[len(logits)]" in text)
    told = f"mine.py:{line + 1} in fails: return logits[len(logits)].sum(): IndexError: index 3 is out of bounds"
    shown = capsys.readouterr()
    assert told in shown.out and told in shown.err


def test_a_function_that_writes_over_its_inputs_stops_the_run(mine, capsys):
    assert bench("matching_loss", "--V", "50", "--T", "3", "--against", "mine:overwrites", "--json", "o.json") == 1
    assert "mine:overwrites writes over logits, an input of all functions" in capsys.readouterr().err


def test_dam_itself_is_compared_first(monkeypatch, capsys):
    monkeypatch.setattr(dam, "entropy", lambda logits, f=dam.entropy: off(f(logits)))
    monkeypatch.setattr(
        correct, "Values", lambda reference, allowed, f=correct.Values: f(lambda logits: peers.entropy(logits), allowed)
    )
    assert bench("entropy", "--V", "50", "--T", "3", "--no-peers") == 1
    assert "entropy: dam is not measured: WRONG: value" in capsys.readouterr().err


def test_the_process_that_measures_memory_finds_a_function_of_ones_own(mine):
    case = cases_of("jump")[0]
    assert memory._function(case, "mine:draws")().shape == (70, 1)
    assert memory._function(case, "dam") is case.functions["dam"]
    assert memory.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jump", "--against", "lamda"), "--against lamda: no peers of that name; did you mean llada? There are torch"),
        (("jump", "--against", "zzz"), "no peers of that name. There are torch, compile, llada"),
        (("jump", "--against", "liger"), "--against liger: its kernels run on a GPU only"),
        (("tilt_to_ess", "--against", "llada"), "it has nothing for tilt_to_ess; there are torch, compile, dam"),
        (("linear_jump", "--against", "compile"), "it has nothing for linear_jump; there are torch, dam"),
        (("jump", "--against", "nowhere:f"), "there is no module 'nowhere', neither in this folder nor installed"),
        (("jump", "--against", "mine:drew"), "--against mine:drew: mine has no 'drew', but draws"),
        (("jump", "--against", "mine:number"), "number is a int, and cannot be called"),
        (("jump", "--against", "other.py:f"), "No such file or directory"),
        (
            ("entropy", "--against", "mine:cross_entropy"),
            "entropy gives logits (missing a required argument: 'target')",
        ),
        (("rollout", "--against", "mine:draws"), "rollout takes no function of yours"),
        (("jump", "--against", "broken:f"), "broken.py:2 in <module>: import nothing_of_that_name"),
        (("jump", "--json", "nowhere/o.json"), "there is no folder"),
        (("jump", "--device", "cuda"), "--device cuda: torch sees no GPU here"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(arguments, message, mine, monkeypatch, capsys):
    (mine / "broken.py").write_text("\nimport nothing_of_that_name\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness, "measure", lambda *arguments, **options: pytest.fail("measured"))
    assert bench(*arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("dam bench: ") and message in shown.err and shown.out == ""
    assert {path.name for path in mine.iterdir()} <= {"mine.py", "broken.py", "__pycache__"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--no-peers", "--against", "torch"), "--no-peers leaves out what --against asks for"),
        (("--no-compiled", "--against", "compile"), "--no-compiled leaves out what --against compile asks for"),
        (("--reference", "--output", "x"), "--reference is a folder of its own"),
    ],
)
def test_options_that_contradict_each_other(asked, message, capsys):
    with pytest.raises(SystemExit):
        bench("jump", *asked)
    assert message in capsys.readouterr().err


def test_what_a_group_needs(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert all(group in peers.GROUPS for case in cases_of("linear_matching_loss") for group in case.groups()["dam"])
    for op in harness.ops():
        for case in cases_of(op):
            for call in (case.functions | case.compiled | case.on_gpu).values():
                assert set(getattr(call, "groups", ())) <= peers.GROUPS.keys()
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.why_unavailable("torch", cpu) is None and peers.why_unavailable("llada", cpu) is None
    assert peers.why_unavailable("liger", gpu) == "it is not installed here: pip install liger-kernel"
    assert "pip install triton" in peers.why_unavailable("compile", gpu)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "no g++ and no clang++ on the PATH" in peers.why_unavailable("compile", cpu)
    monkeypatch.setattr(peers.shutil, "which", lambda name: "/usr/bin/g++")
    assert peers.why_unavailable("compile", cpu) is None


# Where results go


def test_results_go_to_a_new_folder(mine):
    """And what is committed stays as it is, unless it is asked for by name."""
    before = {path: path.stat().st_mtime_ns for path in report.RESULTS.rglob("*")}
    assert bench("tilt_to_ess", "--G", "3", "--K", "5", "--no-peers") == 0
    (folder,) = (mine / "runs").iterdir()
    assert folder.name.startswith("bench-") and {path.suffix for path in folder.iterdir()} == {".json", ".png"}
    assert {path: path.stat().st_mtime_ns for path in report.RESULTS.rglob("*")} == before


def test_the_reference_is_written_where_it_is_asked_for(mine, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", mine / "results")
    assert bench("tilt_to_ess", "--G", "3", "--K", "5", "--no-peers", "--reference") == 0
    (folder,) = (mine / "results").iterdir()
    assert folder.name == report.device() and len(list(folder.glob("tilt_to_ess-float32-groups-3-*.json"))) == 1
    monkeypatch.setattr(checkout, "ROOT", mine)  # as where dam is installed
    assert bench("tilt_to_ess", "--reference") == 1
    assert "--reference: the committed figures are in a checkout" in capsys.readouterr().err
    assert checkout.commit() is None


def test_the_commit_of_another_project_is_not_ours(tmp_path, monkeypatch):
    """As where a source distribution is unpacked within its repository."""
    ours = tmp_path / "vendored"
    (ours / "benchmarks" / "results").mkdir(parents=True)
    (ours / "setup.py").touch()
    monkeypatch.setattr(checkout, "ROOT", ours.resolve())
    monkeypatch.setattr(release, "CHECKOUT", ours)

    def commit(folder):
        by = ("-c", "user.name=dam", "-c", "user.email=dam@example.org")
        for command in (("init", "-q"), ("add", "."), (*by, "commit", "-q", "--allow-empty", "-m", "theirs")):
            subprocess.run(["git", "-C", str(folder), *command], check=True)

    commit(tmp_path)
    assert checkout.commit() is None and release.tracked() == set()
    commit(ours)
    assert len(checkout.commit()) == 40 and release.tracked() == {"setup.py"}


def test_a_folder_that_is_no_checkout_is_enough(tmp_path):
    """Of the packages as setup.py finds them, without the folder benchmarks/, from anywhere."""
    root = checkout.ROOT
    (tmp_path / "site" / "dam").mkdir(parents=True)
    for path in (root / "dam").iterdir():
        (tmp_path / "site" / "dam" / path.name).symlink_to(path.resolve())
    here = f"import sys; sys.path[0] = {str(tmp_path / 'site')!r}; from dam import cli"
    code = f"{here}; sys.exit(cli.main([*sys.argv[1:], '--json', 'o.json']))"
    command = (
        "bench",
        "jump",
        "--T",
        "2",
        "--V",
        "50",
        "--repeats",
        "1",
        "--no-memory",
        "--no-compiled",
        "--json",
        "o.json",
    )
    done = fresh.run(code, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "o.json").read_text())["results"][0]["cases"]
    assert case["median_seconds"].keys() >= case["errors"].keys() >= {"dam", "LLaDA's step"}


# Sizes


def test_a_sweep_has_every_combination_of_the_sizes_that_an_op_has():
    given = {"rows": [2, 3], "vocabulary": [5, 7], "hidden": [9]}
    assert options.sweep("jump", given) == [
        {"rows": rows, "vocabulary": vocabulary} for rows in (2, 3) for vocabulary in (5, 7)
    ]
    assert options.sweep("tilt_to_ess", given) == [{"groups": 1024, "trajectories": 64}]


def test_short_names_and_long_ones_are_the_same(mine):
    for asked in (("--T", "2", "--V", "50"), ("--rows", "2", "--vocabulary", "50")):
        assert bench("entropy", *asked, "--no-peers", "--dtype", "bf16", "--json", "o.json") == 0
        (result,) = json.loads((mine / "o.json").read_text())["results"]
        assert result["sizes"] == {"rows": 2, "vocabulary": 50} and result["dtype"] == "bfloat16"


def test_calls_form_gradients_or_have_them_formed():
    x = helpers.normal(3, 4, dtype=torch.float64)
    inputs = harness.Inputs({"x": x}, ("x",))
    for function in (lambda x: (x**2).sum(), lambda x: x**2, lambda x: ((x**2).sum().detach(), 2 * x.detach())):
        (gradient,) = inputs.call(function)()
        assert torch.equal(gradient, 2 * x)
    assert not x.requires_grad
    assert harness.Inputs({"x": x}).call(lambda x: x + 1)().equal(x + 1)


def test_what_writes_over_an_input_has_its_own():
    x = torch.ones(3)
    call = harness.Inputs({"x": x}).call(lambda x: x.mul_(2).clone(), overwrites="x")
    assert [float(call()[0]) for _ in range(2)] == [2.0, 4.0] and float(call.anew()()[0]) == 2.0
    assert torch.equal(x, torch.ones(3))


def test_the_errors_line_is_that_of_the_users_code(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text("import torch\n\ndef f():\n    return torch.ones(2) @ torch.ones(3)\n")
    function = against.load(f"{path}:f")
    with pytest.raises(RuntimeError) as caught:
        function()
    told = harness.explained(caught.value)
    assert told.startswith(f"{path}:4 in f: return torch.ones(2) @ torch.ones(3): RuntimeError: ")
