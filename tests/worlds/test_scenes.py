from random import Random

import numpy as np
import pytest

from polyground.geometry import Box
from polyground.worlds.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    TEXTURES,
    Item,
    Look,
    Pairs,
    Scene,
    arrange,
    boxes_are_seen,
    describe,
    name,
    render,
    sample_scene,
)

SOMEWHERE = Box(10 / CANVAS, 40 / CANVAS, 70 / CANVAS, 90 / CANVAS)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_is_tight_to_the_drawn_pixels(shape: str, texture: str) -> None:
    item = Item(shape, "red", "medium", texture, SOMEWHERE)
    drawn = np.asarray(render(Scene((item,)))) != np.asarray(render(Scene(())))
    rows, columns = np.nonzero(drawn.any(axis=-1))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (10, 40, 70, 90)


def test_every_colour_can_be_told_from_every_background() -> None:
    for background in BACKGROUNDS:
        for colour in COLOURS:
            image = np.asarray(render(Scene((Item("square", colour, "medium", "plain", SOMEWHERE),), background)), dtype=int)
            assert np.abs(image[60, 40] - image[200, 200]).max() > 30, (colour, background)


def test_the_same_seed_gives_the_same_scene_and_pixels() -> None:
    first, second = (sample_scene(Random(5)) for _ in range(2))
    assert first == second
    assert render(first).tobytes() == render(second).tobytes()


def apart(a: Box, b: Box) -> bool:
    return a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


def overlapping(items: tuple[Item, ...]) -> bool:
    return any(not apart(a.box, b.box) for i, a in enumerate(items) for b in items[:i])


def test_a_sampled_scene_has_up_to_eight_objects_that_look_different_and_sometimes_overlap() -> None:
    rng = Random(0)
    scenes = [sample_scene(rng).items for _ in range(300)]
    assert {len(items) for items in scenes} == set(range(1, 9))
    assert all(len({item.look for item in items}) == len(items) for items in scenes)
    assert 20 < sum(map(overlapping, scenes)) < 120


def test_objects_stand_apart_where_no_occlusion_is_asked_for() -> None:
    rng = Random(1)
    for _ in range(100):
        scene = arrange(rng, [Look("star", "red", "large"), Look("ring", "blue", "large"), RED_STAR], occlusion=0.0)
        assert not overlapping(scene.items)


def test_a_box_is_tight_to_what_can_be_seen_of_a_half_hidden_object() -> None:
    rng = Random(2)
    hidden = 0
    while hidden < 30:
        scene = sample_scene(rng, clutter=0)
        if not overlapping(scene.items):
            continue
        for number, item in enumerate(scene.items):
            without = Scene((*scene.items[:number], *scene.items[number + 1 :]), scene.background, (), scene.light)
            rows, columns = np.nonzero((np.asarray(render(scene)) != np.asarray(render(without))).any(axis=-1))
            seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert seen == tuple(round(edge) for edge in item.box.to_pixels(width=CANVAS, height=CANVAS))
        hidden += 1


def test_an_object_that_would_lose_an_edge_is_noticed() -> None:
    under = Item("square", "red", "medium", "plain", Box(0.25, 0.25, 0.5, 0.5))
    corner = Item("square", "blue", "medium", "plain", Box(0.4375, 0.4375, 0.75, 0.75))
    side = Item("square", "blue", "large", "plain", Box(0.4375, 0.1875, 0.75, 0.5625))
    assert boxes_are_seen([under, corner])
    assert not boxes_are_seen([under, side])
    assert boxes_are_seen([side, under])
    assert not boxes_are_seen([under, Item("star", "red", "medium", "plain", corner.box)])


@pytest.mark.parametrize(
    ("pairs", "fewest", "most"),
    [pytest.param("seen", 0, 0, id="seen"), pytest.param("held_out", 1, 8, id="held out"), pytest.param("any", 0, 8, id="any")],
)
def test_held_out_pairs_come_as_asked(pairs: Pairs, fewest: int, most: int) -> None:
    rng = Random(1)
    for _ in range(100):
        assert fewest <= sum(item.look.held_out for item in sample_scene(rng, pairs=pairs).items) <= most


def test_each_colour_and_each_shape_has_one_held_out_pair() -> None:
    assert sorted(colour for colour, _ in HELD_OUT_PAIRS) == sorted(COLOURS)
    assert sorted(shape for _, shape in HELD_OUT_PAIRS) == sorted(SHAPES)


def test_a_scene_shows_what_it_must_and_not_what_it_must_not() -> None:
    wanted, unwanted = Look("heart", "red"), Look("star", "blue")
    for seed in range(50):
        looks = [item.look for item in sample_scene(Random(seed), include=[wanted], avoid=[unwanted]).items]
        assert looks.count(wanted) == 1
        assert unwanted not in looks


def test_fixed_items_stay_where_they_are() -> None:
    item = Item("star", "red", "medium", "plain", SOMEWHERE)
    scene = arrange(Random(0), [Look("ring", "blue"), Look("ring", "pink", "large")], fixed=[item])
    assert item in scene.items
    assert len(scene.items) == 3


def _scene(*looks: Look) -> Scene:
    return arrange(Random(0), looks)


RED_STAR = Look("star", "red", "small")


@pytest.mark.parametrize(
    ("others", "phrase"),
    [
        pytest.param([Look("ring", "red")], "red star", id="alone of its pair"),
        pytest.param([Look("star", "red", "large")], "small red star", id="size tells"),
        pytest.param([Look("star", "red", "small", "striped")], "plain red star", id="texture tells"),
        pytest.param(
            [Look("star", "red", "large"), Look("star", "red", "small", "dotted")], "small plain red star", id="both are needed"
        ),
    ],
)
def test_a_phrase_is_as_short_as_it_can_be(others: list[Look], phrase: str) -> None:
    assert describe(RED_STAR, _scene(RED_STAR, *others)) == phrase


def test_the_phrase_of_a_sampled_object_fits_it_alone() -> None:
    rng = Random(3)
    for _ in range(100):
        scene = sample_scene(rng)
        assert len({describe(item, scene) for item in scene.items}) == len(scene.items)


@pytest.mark.parametrize(
    ("look", "words"),
    [(RED_STAR, "small red star"), (Look("star", "red", "small", "striped"), "small striped red star")],
)
def test_a_full_name_leaves_a_plain_texture_unsaid(look: Look, words: str) -> None:
    assert name(look) == words


def test_every_size_fits_its_own_range() -> None:
    spans = {size: [] for size in SIZES}
    rng = Random(4)
    for _ in range(200):
        for item in sample_scene(rng).items:
            spans[item.size].append(max(item.box.x1 - item.box.x0, item.box.y1 - item.box.y0))
    assert max(spans["small"]) < min(spans["medium"])
    assert max(spans["medium"]) < min(spans["large"])
