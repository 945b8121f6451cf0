from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from builders import entries, if_model, model, normal

from edgecompress.errors import RecipeError
from edgecompress.plan import FactorizePlan, WeightsPlan, budget_forms, make_plan, pays_off, plan_to_json
from edgecompress.plan_file import check_plan, read_plan
from edgecompress.recipe import Recipe, Settings

BODY = """g (float[N, 40] x, int64[N] i, float[20, 2] given) => (float[N, 20] y, float[N, 30] z)
{ h = MatMul(x, fc)  k = Gemm(h, head)  s = MatMul(k, tiny)  t = Conv(k, given)
  y = Identity(k)  z = Gather(table, i) }"""
ENTRIES = list(
    entries(
        model(
            BODY,
            fc=normal(40, 40),
            head=normal(40, 20),
            tiny=normal(20, 2),
            table=normal(9, 30),
        )
    ).values()
)
SHA = "a" * 64

KMEANS = WeightsPlan(scheme="kmeans", bits=5, step=None, prune=0.0, calibrated=False)


def planned(*, calibrated=False, **settings):
    plan = make_plan(Recipe(everywhere=Settings(**settings)), ENTRIES, model_sha256=SHA, calibrated=calibrated)
    return plan, {each.layer: each for each in plan.layers}


def read(tmp_path, content, entries_=ENTRIES, sha=SHA):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return check_plan(read_plan(path, model_sha256=sha), entries_)


def test_every_entry_has_a_plan_in_order():
    plan, _ = planned()
    assert [each.layer for each in plan.layers] == ["fc", "head", "tiny", "given", "table"]


def test_defaults_cluster_what_pays_off_and_say_why_not():
    _, by_name = planned()
    assert by_name["fc"].weights == KMEANS
    assert by_name["fc"].factorize is None
    assert by_name["fc"].reason is None
    assert by_name["tiny"].weights is None
    assert by_name["tiny"].reason == "40 values are too few for a codebook of 32"
    assert by_name["given"].reason == "it is computed while the model runs"


def test_keep_becomes_the_largest_rank_within_the_share():
    _, by_name = planned(factorize="svd", keep=0.5)
    assert by_name["fc"].factorize == FactorizePlan(scheme="svd", rank=10, calibrated=False)  # 10 * 80 = 1600 / 2
    assert by_name["head"].factorize.rank == 6  # 6 * 60 = 360 <= 400 < 420
    assert by_name["table"].factorize is None
    assert "never factorized" in by_name["table"].reason
    assert by_name["table"].weights is not None


def test_a_rank_that_saves_nothing_leaves_the_layer_alone():
    _, by_name = planned(factorize="svd", rank=20, cluster="none")
    assert by_name["fc"].factorize is None  # 20 * 80 is all of it
    assert by_name["fc"].reason == "rank 20 would not lower its 1600 parameters"
    assert planned(factorize="svd", rank=19)[1]["fc"].factorize.rank == 19
    assert planned(factorize="svd", rank=10**9)[1]["fc"].factorize is None


def test_nothing_asked_for_is_a_reason():
    assert planned(cluster="none")[1]["fc"].reason == "not asked for"


def test_only_layers_that_take_moments_are_calibrated():
    _, by_name = planned(calibrated=True, factorize="svd")
    assert by_name["fc"].factorize.calibrated
    assert by_name["fc"].weights.calibrated
    assert not by_name["table"].weights.calibrated


def test_a_codebook_must_pay_for_itself():
    def pays(count, item_bytes, bits):
        return pays_off(replace(KMEANS, bits=bits), count, item_bytes)

    assert not pays(40, 4, 5)
    assert pays(400, 4, 5)
    assert not pays(256, 4, 8)
    assert not pays(0, 4, 1)
    assert pays(300, 2, 1)


def test_a_step_takes_less_room_than_a_codebook():
    grid = WeightsPlan(scheme="grid", bits=None, step=1.0, prune=0.0, calibrated=False)
    assert not pays_off(grid, 40, 4)
    assert pays_off(grid, 60, 4)
    assert not pays_off(KMEANS, 60, 4)


# reading


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"factorize": "svd"}, {"cluster": "none"}, {"factorize": "svd", "rank": 3, "bits": 8}),
        *({"cluster": "grid"}, {"step": 1.5}, {"cluster": "grid", "prune": 0.5}),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_plan_comes_back_as_it_was(tmp_path, settings, calibrated):
    plan, _ = planned(calibrated=calibrated, **settings)
    assert read(tmp_path, plan_to_json(plan)) == plan


def edited(change, **settings):
    content = json.loads(plan_to_json(planned(**settings)[0]))
    change(content)
    return content


def test_an_edited_plan_is_applied_as_edited(tmp_path):
    def change(content):
        content["layers"][0]["factorize"] = {"scheme": "svd", "rank": 3, "calibrated": False}
        content["layers"][0]["weights"]["bits"] = 2
        content["layers"][1]["weights"] = None
        content["layers"][2]["weights"] = asdict(replace(KMEANS, bits=1))  # against advice
        del content["layers"][4]
        del content["layers"][1]["reason"]

    by_name = {each.layer: each for each in read(tmp_path, edited(change)).layers}
    assert by_name["fc"].factorize.rank == 3
    assert by_name["fc"].weights.bits == 2
    assert by_name["head"].weights is None
    assert by_name["head"].reason == "the plan leaves it alone"
    assert by_name["tiny"].weights.bits == 1
    assert (by_name["table"].weights, by_name["table"].reason) == (None, "not in the plan")


def test_an_edited_rank_that_saves_nothing_leaves_the_layer_alone(tmp_path):
    def change(content):
        content["layers"][0]["factorize"] = {"scheme": "svd", "rank": 40, "calibrated": False}

    found = read(tmp_path, edited(change)).layers[0]
    assert found.factorize is None
    assert "rank 40 would not lower" in found.reason


LAYER = "layers"
GRID = {"scheme": "grid", "bits": None, "step": 1.0, "prune": 0.0, "calibrated": False}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema_version",), 2, "schema_version 2 is not 1"),
        (("schema_version",), True, "schema_version True is not 1"),
        (("schema_version",), "1", "schema_version '1' is not 1"),
        (("model_sha256",), "b" * 64, "made for another model"),
        (("model_sha256",), None, "made for another model"),
        (("layers",), {}, "layers must be a list"),
        (("layers", 0), 3, "expected an object"),
        (("extra",), 3, "unknown key 'extra'"),
        (("layers", 0, "weight"), None, "unknown key 'weight'"),
        (("layers", 0, "layer"), "fd", "no layer 'fd'"),
        (("layers", 0, "layer"), ["fc"], "no layer"),
        (("layers", 0, "layer"), None, "no layer None"),
        (("layers", 1, "layer"), "fc", "layer 'fc' is there twice"),
        (("layers", 0, "reason"), 3, "reason must be text or null"),
        (("layers", 0, "weights"), "kmeans", "expected an object"),
        (("layers", 0, "weights", "bits"), 0, "bits must be a whole number from 1 to 8, not 0"),
        (("layers", 0, "weights", "bits"), 9, "bits must be a whole number from 1 to 8, not 9"),
        (("layers", 0, "weights", "bits"), True, "bits must be a whole number from 1 to 8, not True"),
        (("layers", 0, "weights", "bits"), 5.0, "bits must be a whole number from 1 to 8, not 5.0"),
        (("layers", 0, "weights", "scheme"), "none", "scheme must be one of kmeans, grid, not 'none'"),
        (("layers", 0, "weights", "scheme"), ["kmeans"], "scheme must be one of kmeans"),
        (("layers", 0, "weights", "step"), 1.0, "kmeans has bits, not step"),
        (("layers", 0, "weights", "prune"), 1.0, "prune must be a share of 0 or more, below 1, not 1.0"),
        (("layers", 0, "weights", "prune"), -0.1, "prune must be a share of 0 or more"),
        (("layers", 0, "weights", "prune"), None, "prune must be a share of 0 or more"),
        (("layers", 0, "weights"), GRID | {"step": 0.0}, "step must be a number above 0, below 1000, not 0.0"),
        (("layers", 0, "weights"), GRID | {"step": None}, "step must be a number above 0, below 1000, not None"),
        (("layers", 0, "weights"), GRID | {"bits": 3}, "grid has step, not bits"),
        (("shrink",), [], "shrink must be an object"),
        (("quantize",), "int4", "quantize must be one of none, int8, not 'int4'"),
        (("shrink",), {"fc": 0}, "shrink: 'fc' must be a whole number"),
        (("layers", 0, "weights", "calibrated"), 1, "calibrated must be true or false, not 1"),
        (("layers", 0, "weights", "clusters"), 4, "unknown key 'clusters'"),
        (("layers", 4, "weights", "calibrated"), True, "Gather layer such as this one is never calibrated"),
        (("layers", 0, "factorize", "rank"), 0, "rank must be a whole number from 1 to 40, not 0"),
        (("layers", 0, "factorize", "rank"), 41, "rank must be a whole number from 1 to 40, not 41"),
        (("layers", 0, "factorize", "rank"), True, "rank must be a whole number from 1 to 40, not True"),
        (("layers", 0, "factorize", "scheme"), "none", "scheme must be one of svd.*, not 'none'"),
        (("layers", 0, "factorize", "calibrated"), None, "calibrated must be true or false"),
        (
            ("layers", 4, "factorize"),
            {"scheme": "svd", "rank": 1, "calibrated": False},
            "'table': factorize cannot be done",
        ),
        (
            ("layers", 3, "weights"),
            {"scheme": "kmeans", "bits": 5, "calibrated": False},
            "'given' cannot be compressed",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, place, value, message):
    def change(content):
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    with pytest.raises(RecipeError, match=message) as caught:
        read(tmp_path, edited(change, factorize="svd"))
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("place", [("schema_version",), ("layers", 0, "factorize"), ("layers", 0, "weights", "bits")])
def test_missing_keys_are_named(tmp_path, place):
    def change(content):
        for key in place[:-1]:
            content = content[key]
        del content[place[-1]]

    with pytest.raises(RecipeError, match=f"missing {place[-1]}"):
        read(tmp_path, edited(change))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "not json"])
def test_a_file_that_is_not_json_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match="not JSON"):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_that_is_no_plan_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match="expected an object with schema_version"):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_plan(tmp_path / "none.json", model_sha256=SHA)


def test_layers_of_bodies_come_back_as_skips(tmp_path):
    found = list(entries(model(if_model(normal(4, 2), normal(4, 3)))).values())
    plan = make_plan(Recipe(), found, model_sha256=SHA, calibrated=True)
    assert read(tmp_path, plan_to_json(plan), found) == plan
    assert all("body" in each.reason for each in plan.layers)


def test_names_are_written_as_they_are(tmp_path):
    proto = model("g (float[N, 40] x) => (float[N, 40] y) { y = MatMul(x, w) }", w=normal(40, 40)).proto
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = 'größe/"1"\n'
    found = list(entries(model(proto)).values())
    plan = make_plan(Recipe(), found, model_sha256=SHA, calibrated=False)
    assert "größe" in plan_to_json(plan)
    assert read(tmp_path, plan_to_json(plan), found) == plan


# a budget that layers share


def forms_in_budget(found=ENTRIES, **changes):
    base = {"everywhere": Settings(factorize="svd", keep=0.5), "allocate": True}
    return budget_forms(Recipe(**{**base, **changes}), found)


def test_the_layers_that_would_be_factorized_share_the_budget():
    assert forms_in_budget() == {"fc": ("svd",), "head": ("svd",), "tiny": ("svd",)}
    assert forms_in_budget(everywhere=Settings(factorize="auto")) == dict.fromkeys(("fc", "head", "tiny"), ("svd",))
    assert forms_in_budget(everywhere=Settings(factorize="separable")) == {}  # none has a kernel
    assert forms_in_budget(everywhere=Settings()) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": {"fc": Settings(rank=3)}},
        {"layers": {"f*": Settings(keep=0.9)}},
        {"layers": {"fc": Settings(energy=0.9)}},
        {"layers": {"fc": Settings(factorize="none")}},
    ],
)
def test_a_layer_with_a_size_of_its_own_stays_out_of_the_budget(changes):
    assert list(forms_in_budget(**changes)) == ["head", "tiny"]
    assert forms_in_budget(ops={"MatMul": Settings(rank=1)}) == {"head": ("svd",)}


CONVS = list(
    entries(
        model(
            """g (float[N, 4, 9, 9] x) => (float[N, 5, 9, 9] y)
            { a = Conv<pads = [1, 1, 1, 1]>(x, first)  b = Conv<pads = [1, 1, 1, 1]>(a, inner)
              c = Conv(b, thin)  d = Conv(c, back)  y = Conv<pads = [1, 1, 1, 1]>(d, last) }""",
            first=normal(16, 4, 3, 3),
            inner=normal(16, 16, 3, 3),
            thin=normal(1, 16, 1, 1),
            back=normal(16, 1, 1, 1),
            last=normal(5, 16, 3, 3),
        )
    ).values()
)


def test_layers_that_are_factorized_only_when_named_share_the_budget_only_then():
    everywhere = Settings(factorize="auto", keep=0.5)
    every = ("svd", "svd_in", "separable", "tucker2")
    assert forms_in_budget(CONVS, everywhere=everywhere) == {"inner": every, "last": every}
    named = forms_in_budget(CONVS, everywhere=everywhere, layers={"first": Settings(cluster="none")})
    assert list(named) == ["first", "inner", "last"]


def test_the_plan_has_what_the_budget_gave_and_says_where_a_layer_stays_whole():
    recipe = Recipe(everywhere=Settings(factorize="auto", keep=0.5, cluster="none"), allocate=True)
    allocation = {"inner": ("tucker2", (7, 5)), "last": None}
    plan = make_plan(recipe, CONVS, model_sha256=SHA, calibrated=True, allocation=allocation)
    by_name = {each.layer: each for each in plan.layers}
    assert by_name["inner"].factorize == FactorizePlan(scheme="tucker2", rank=(7, 5), calibrated=True)
    assert by_name["last"].factorize is None
    assert by_name["last"].reason == "the budget does more for the output when this layer stays whole"
    assert "first convolution" in by_name["first"].reason
    assert "too few" in by_name["thin"].reason


def test_a_form_that_the_opset_does_not_know_is_refused(tmp_path):
    recipe = Recipe(everywhere=Settings(factorize="spectral", keep=0.5))
    old = make_plan(recipe, ENTRIES, model_sha256=SHA, calibrated=False, opset=10).layers[0]
    assert old.factorize is None
    assert old.reason == "spectral needs opset 11 (Range); the model has 10"
    plan = make_plan(recipe, ENTRIES, model_sha256=SHA, calibrated=False)
    assert plan.layers[0].factorize.scheme == "spectral"
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(plan), encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be done: spectral needs opset 11"):
        check_plan(read_plan(path, model_sha256=SHA), ENTRIES, opset=10)


def test_ranks_are_multiples_of_the_alignment_but_for_those_given_as_numbers():
    def rank_of(alignment, **settings):
        recipe = Recipe(everywhere=Settings(factorize="svd", **settings), rank_alignment=alignment)
        return make_plan(recipe, ENTRIES, model_sha256=SHA, calibrated=False).layers[0].factorize.rank

    assert [rank_of(alignment, keep=0.5) for alignment in (1, 3, 4, 8, 16)] == [10, 9, 8, 8, 16]
    assert rank_of(16, keep=0.1) == 16
    assert rank_of(32, keep=0.5) == 10  # 32 would save nothing
    assert rank_of(4, rank=10) == 10


def test_the_share_of_a_budget_is_aligned_too():
    recipe = Recipe(everywhere=Settings(factorize="svd"), allocate=True, rank_alignment=4)
    found = make_plan(recipe, ENTRIES, model_sha256=SHA, calibrated=False, allocation={"fc": ("svd", (11,))})
    assert found.layers[0].factorize.rank == 8
