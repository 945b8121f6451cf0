from __future__ import annotations

import pytest
from builders import entries, model, normal

from edgecompress.errors import RecipeError
from edgecompress.recipe import (
    Recipe,
    Settings,
    check_recipe,
    check_settings,
    read_recipe,
    recipe_hash,
    resolve,
    with_overrides,
)

BODY = """g (float[N, 6] x, int64[N] i) => (float[N, 5] y, float[N, 6] z)
{ h = MatMul(x, fc_1)  k = MatMul(h, fc_2)  y = Gemm(k, head)  z = Gather(table, i) }"""
FOUND = entries(model(BODY, fc_1=normal(6, 6), fc_2=normal(6, 6, seed=1), head=normal(6, 5), table=normal(9, 6)))


def recipe_of(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def settled(tmp_path, text, name="fc_1"):
    return resolve(recipe_of(tmp_path, text), FOUND[name])


def test_an_empty_recipe_gives_the_defaults(tmp_path):
    assert settled(tmp_path, "") == Settings(factorize="none", cluster="kmeans", bits=5)


def test_the_more_specific_level_wins(tmp_path):
    text = """
    bits = 1
    [ops.MatMul]
    bits = 2
    [layers."fc_*"]
    bits = 3
    [layers."*_2"]
    bits = 4
    [layers.fc_1]
    bits = 6
    """
    assert settled(tmp_path, text, "fc_1").bits == 6  # its name, though patterns come before it
    assert settled(tmp_path, text, "fc_2").bits == 3  # the first pattern of two
    assert settled(tmp_path, text, "head").bits == 1
    assert settled(tmp_path, text.replace('"fc_*"', '"gone"'), "fc_2").bits == 4
    assert settled(tmp_path, "bits = 1\n[ops.MatMul]\nbits = 2", "fc_1").bits == 2


def test_levels_are_joined_setting_by_setting(tmp_path):
    text = 'factorize = "svd"\nkeep = 0.3\n[ops.MatMul]\nbits = 7\n[layers.fc_1]\ncluster = "none"'
    assert settled(tmp_path, text) == Settings(factorize="svd", keep=0.3, cluster="none")


def test_a_name_with_pattern_characters_is_first_of_all_a_name(tmp_path):
    found = entries(model("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=normal(6, 5)))["w"]
    odd = type(found)(**{**vars(found), "name": "w[0]"})
    recipe = recipe_of(tmp_path, '[layers."w[0]"]\nbits = 2\n[layers."*"]\nbits = 3')
    assert resolve(recipe, odd).bits == 2
    assert resolve(recipe, found).bits == 3


def test_patterns_are_case_sensitive(tmp_path):
    assert settled(tmp_path, '[layers."FC_*"]\nbits = 2').bits == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep = 0.3\n[layers.fc_1]\nrank = 2", {"rank": 2, "keep": None}),
        ("rank = 3\n[layers.fc_1]\nkeep = 0.2", {"rank": None, "keep": 0.2}),
        ("keep = 0.3\n[ops.MatMul]\nrank = 2\n[layers.fc_1]\nbits = 2", {"rank": 2, "keep": None}),
        ("[layers.fc_1]\nbits = 2", {"rank": None, "keep": 0.5}),
    ],
)
def test_a_rank_hides_a_keep_from_below_and_the_other_way_round(tmp_path, text, expected):
    found = settled(tmp_path, 'factorize = "svd"\n' + text)
    assert {"rank": found.rank, "keep": found.keep} == expected


@pytest.mark.parametrize("size", ["rank = 2", "keep = 0.4"])
def test_a_size_for_a_layer_or_an_operator_asks_for_svd(tmp_path, size):
    assert settled(tmp_path, f"[layers.fc_1]\n{size}").factorize == "svd"
    assert settled(tmp_path, f"[ops.MatMul]\n{size}").factorize == "svd"
    assert settled(tmp_path, f'[ops.MatMul]\n{size}\n[layers.fc_1]\nfactorize = "none"').factorize == "none"


def test_bits_for_a_layer_ask_for_kmeans(tmp_path):
    assert settled(tmp_path, 'cluster = "none"\n[layers.fc_1]\nbits = 3').cluster == "kmeans"
    assert settled(tmp_path, 'bits = 3\ncluster = "none"').cluster == "none"


# what is refused


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("bit = 5", "unknown option 'bit'", "did you mean 'bits'"),
        ("layer = 5", "unknown option 'layer'", "did you mean 'layers'"),
        (
            "[layers.fc_1]\nfactorise = 'svd'",
            r"\[layers.'fc_1'\]: unknown option 'factorise'",
            "did you mean 'factorize'",
        ),
        ("[ops.Matmul]\nbits = 2", "unknown operator 'Matmul'", "did you mean 'MatMul'"),
        ('factorize = "svdd"', "factorize must be one of none, svd.*, not 'svdd'", "did you mean 'svd'"),
        ("factorize = true", "factorize must be one of", ""),
        ('factorize = ["svd"]', "factorize must be one of", ""),
        ('cluster = "kmean"', "cluster must be one of none, kmeans", "did you mean 'kmeans'"),
        ("bits = 0", "bits must be a whole number from 1 to 8, not 0", ""),
        ("bits = 9", "bits must be a whole number from 1 to 8, not 9", ""),
        ("bits = 5.0", "bits must be a whole number from 1 to 8, not 5.0", ""),
        ("bits = true", "bits must be a whole number from 1 to 8, not True", ""),
        ('bits = "5"', "bits must be a whole number from 1 to 8, not '5'", ""),
        ("[ops.Conv]\nrank = 0", "rank must be a whole number of at least 1, not 0", ""),
        ("[ops.Conv]\nrank = true", "rank must be a whole number of at least 1, not True", ""),
        ("[ops.Conv]\nrank = 1.5", "rank must be a whole number of at least 1, not 1.5", ""),
        ("[ops.Conv]\nkeep = 0", "keep must be a share above 0 and at most 1, not 0", ""),
        ("[ops.Conv]\nkeep = 1.01", "keep must be a share", ""),
        ("[ops.Conv]\nkeep = true", "keep must be a share", ""),
        ("[ops.Conv]\nkeep = nan", "keep must be a share", ""),
        ("[ops.Conv]\nkeep = inf", "keep must be a share", ""),
        ('[ops.Conv]\nkeep = "half"', "keep must be a share", ""),
        ("[ops.Conv]\nkeep = 0.5\nrank = 2", "rank and keep exclude each other", "one of them"),
        ('[ops.Conv]\nkeep = 0.5\nfactorize = "none"', "keep needs factorize", "svd"),
        ("layers = 3", r"\[layers\] must hold tables", ""),
        ("[layers]\nfc_1 = 3", r"\[layers\] must hold tables", ""),
        ("ops = []", r"\[ops\] must hold tables", ""),
        ("bits = ", "not a TOML file", ""),
        ("bits = 5\nbits = 6", "not a TOML file", ""),
        ("a = " + "[" * 5000, "not a TOML file", ""),
    ],
)
def test_malformed_recipes_are_refused_by_key_and_value(tmp_path, text, message, hint):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_of(tmp_path, text)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not a TOML file"):
        read_recipe(tmp_path / "b.toml")


def test_a_layer_that_the_model_does_not_have_is_refused(tmp_path):
    check_recipe(recipe_of(tmp_path, "[layers.fc_1]\nbits = 2\n[layers.'*_2']\nbits = 2"), list(FOUND.values()))
    for pattern in ("fc_3", "conv*"):
        with pytest.raises(RecipeError, match="does not have") as caught:
            check_recipe(recipe_of(tmp_path, f"[layers.'{pattern}']\nbits = 2"), list(FOUND.values()))
        assert "fc_1" in caught.value.hint


def test_a_size_for_all_layers_needs_something_that_factorizes(tmp_path):
    names = list(FOUND.values())
    with pytest.raises(RecipeError, match="needs factorize"):
        check_recipe(recipe_of(tmp_path, "keep = 0.5"), names)
    check_recipe(recipe_of(tmp_path, 'keep = 0.5\nfactorize = "svd"'), names)
    text = 'keep = 0.3\n[ops.MatMul]\nfactorize = "svd"'
    check_recipe(recipe_of(tmp_path, text), names)
    assert settled(tmp_path, text).keep == 0.3


# the command line


def test_options_replace_what_holds_for_all_layers(tmp_path):
    recipe = recipe_of(tmp_path, 'factorize = "svd"\nkeep = 0.3\nbits = 4\n[layers.fc_1]\nbits = 2')
    found = with_overrides(recipe, {"rank": 3, "bits": 6, "keep": None})
    assert resolve(found, FOUND["fc_2"]) == Settings(factorize="svd", rank=3, cluster="kmeans", bits=6)
    assert resolve(found, FOUND["fc_1"]).bits == 2
    assert with_overrides(recipe, {"rank": None}) == recipe


def test_factorize_none_as_an_option_drops_the_size_of_the_recipe(tmp_path):
    recipe = recipe_of(tmp_path, 'factorize = "svd"\nkeep = 0.3')
    assert resolve(with_overrides(recipe, {"factorize": "none"}), FOUND["fc_1"]).factorize == "none"


def test_options_are_checked_as_recipes_are():
    with pytest.raises(RecipeError, match="options: rank and keep exclude each other"):
        with_overrides(Recipe(), {"factorize": "svd", "rank": 2, "keep": 0.5})
    with pytest.raises(RecipeError, match="options: bits"):
        with_overrides(Recipe(), {"bits": 9})
    with pytest.raises(RecipeError, match="needs factorize"):
        check_settings(Settings(factorize="none", rank=2), "here")


# the hash


def test_the_hash_is_that_of_what_is_asked_for(tmp_path):
    text = "bits = 4\n[layers.'a*']\nbits = 2\n[layers.'*b']\nbits = 3"
    same = "# said otherwise\nbits=0x4\n[layers.'a*']\nbits = 2\n[layers.'*b']\nbits = 3"
    other_order = "bits = 4\n[layers.'*b']\nbits = 3\n[layers.'a*']\nbits = 2"
    first, again, turned = (recipe_hash(recipe_of(tmp_path, each)) for each in (text, same, other_order))
    assert first == again
    assert first != turned  # the first pattern that fits wins
    assert recipe_hash(Recipe()) != first


def test_one_and_one_point_zero_are_the_same_share(tmp_path):
    hashes = {recipe_hash(recipe_of(tmp_path, f"factorize = 'svd'\nkeep = {keep}")) for keep in ("1", "1.0")}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('factorize = "svd"\nenergy = 1.5', "energy must be a share above 0 and at most 1, not 1.5"),
        ('factorize = "svd"\nevbmf = false', "evbmf must be true, not False"),
        ('factorize = "svd"\nenergy = 0.9\nkeep = 0.5', "keep and energy exclude each other"),
        ('factorize = "separable"\nevbmf = true', "evbmf chooses the ranks of svd and tucker2 only"),
    ],
)
def test_the_ways_to_choose_a_rank_exclude_each_other(tmp_path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, text)


# --- one budget for all


def test_a_recipe_may_ask_for_one_budget(tmp_path):
    recipe = recipe_of(tmp_path, 'factorize = "separable"\nkeep = 0.4\nallocate = true\nbudget_unit = "macs"')
    assert (recipe.allocate, recipe.budget_unit, recipe.everywhere.keep) == (True, "macs", 0.4)
    assert with_overrides(recipe, {"allocate": None, "budget_unit": "parameters"}).budget_unit == "parameters"
    assert with_overrides(Recipe(), {"allocate": True}).allocate


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("allocate = 1", "allocate must be true or false"),
        ('allocate = true\nbudget_unit = "bytes"', "budget_unit must be one of parameters, macs"),
        ("allocate = true\nrank = 3", "allocate and rank exclude each other"),
        ("average_bits = 2\ntarget_size = 1000", "average_bits and target_size exclude each other"),
        ("average_bits = 0", "average_bits must be a number above 0"),
        ('budget_unit = "macs"', "budget_unit is that of allocate"),
        ("target_size = 1.5", "target_size must be a whole number"),
        ('target_size = 1000\ncluster = "kmeans"', "a budget sizes the steps of grids"),
        ("average_bits = 2\nstep = 1", "a budget sizes the steps of grids"),
        ("shrink = 2", "shrink must be a share"),
        ('quantize = "int4"', "quantize must be one of none, int8"),
        ('quantize = "int8"\nbits = 4', "int8 runs on the codes of a grid"),
        ('quantize = "int8"\n[layers.fc_1]\ncluster = "kmeans"', "int8 runs on the codes of a grid"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(tmp_path, text, complaint):
    with pytest.raises(RecipeError, match=complaint):
        recipe_of(tmp_path, text)


# --- grids


def test_a_step_asks_for_a_grid_and_bits_for_kmeans(tmp_path):
    assert settled(tmp_path, "step = 2") == Settings(factorize="none", cluster="grid", step=2.0)
    assert settled(tmp_path, 'cluster = "grid"') == Settings(factorize="none", cluster="grid", step=1.0)
    assert settled(tmp_path, "bits = 4\n[layers.fc_1]\nstep = 0.5").cluster == "grid"
    found = settled(tmp_path, "step = 1.5\nprune = 0.25\n[layers.fc_1]\nbits = 4")
    assert found == Settings(factorize="none", cluster="kmeans", bits=4, prune=0.25)


def test_a_budget_puts_every_layer_on_a_grid(tmp_path):
    recipe = recipe_of(tmp_path, "average_bits = 1.5")
    assert (recipe.average_bits, recipe.everywhere.cluster) == (1.5, "grid")
    assert with_overrides(Recipe(), {"target_size": 5000}).everywhere.cluster == "grid"


def test_int8_puts_layers_on_grids_where_nothing_is_said(tmp_path):
    assert recipe_of(tmp_path, 'quantize = "int8"').everywhere.cluster == "grid"
    assert recipe_of(tmp_path, 'quantize = "int8"\ncluster = "none"').everywhere.cluster == "none"
    assert with_overrides(Recipe(), {"quantize": "int8", "step": 0.5}).everywhere.step == 0.5


def test_zeros_are_shared_by_all_layers_unless_the_recipe_or_the_command_line_says_otherwise(tmp_path):
    assert recipe_of(tmp_path, "prune = 0.5").prune_scope == "global"
    assert recipe_of(tmp_path, 'prune = 0.5\nprune_scope = "layer"').prune_scope == "layer"
    assert with_overrides(Recipe(), {"prune": 0.5, "prune_scope": "layer"}).prune_scope == "layer"


def test_the_command_line_replaces_a_grid_by_clusters(tmp_path):
    recipe = recipe_of(tmp_path, "step = 1.5")
    assert resolve(with_overrides(recipe, {"bits": 4}), FOUND["fc_1"]).cluster == "kmeans"
    assert resolve(with_overrides(recipe, {"cluster": "none"}), FOUND["fc_1"]).cluster == "none"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bits = 4\nstep = 1", "bits and step exclude each other"),
        ('cluster = "grid"\nbits = 4', "bits are those of kmeans"),
        ('cluster = "kmeans"\nstep = 1', "step is that of a grid"),
        ('cluster = "none"\nprune = 0.5', "prune needs clusters or a grid"),
        ("step = true", "step must be a number above 0"),
        ("step = 1e39", "step must be at most 1000"),
        ("step = 1\nprune = 1", "prune must be a share below 1"),
        ("step = inf", "step must be a number above 0"),
        ('prune = 0.5\nprune_scope = "model"', "prune_scope must be one of global, layer, not 'model'"),
        ('prune_scope = "layer"', "prune_scope is that of the prune of all layers"),
        ("rank_alignment = 0", "rank_alignment must be a whole number of at least 1"),
        ('rank_alignment = "arm64"', "rank_alignment must be a whole number of at least 1"),
        ("[layers.fc_1]\nrank_alignment = 4", "unknown option 'rank_alignment'"),
        ('prune_scope = "layer"\n[layers.fc_1]\nprune = 0.5', "prune_scope is that of the prune of all layers"),
        ('[layers.fc_1]\nprune_scope = "layer"', "unknown option 'prune_scope'"),
    ],
)
def test_settings_of_values_that_make_no_sense_are_refused(tmp_path, text, complaint):
    with pytest.raises(RecipeError, match=complaint):
        recipe_of(tmp_path, text)
