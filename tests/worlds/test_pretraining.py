import json
from random import Random

import pytest

from polyground.answer import Answer, read_answer
from polyground.geometry import PER_MILLE, iou
from polyground.worlds.pretraining import Mix, find_question, sample_step
from polyground.worlds.scenes import describe, sample_scene


def test_a_found_object_is_answered_in_the_native_form_with_its_own_box() -> None:
    rng = Random(0)
    for _ in range(50):
        scene = sample_scene(rng)
        prompt, completion, item = find_question(rng, scene)
        answer = read_answer(completion, [PER_MILLE], native="qwen_json")
        assert isinstance(answer, Answer)
        assert describe(item, scene) in prompt
        assert iou(answer.boxes[0].box, item.box) > 0.95


def test_a_listing_names_every_object_of_its_image() -> None:
    scenes, samples = sample_step(Random(1), scenes=6, samples=20, mix=Mix(listing=1, finding=0, several=0, text=0))
    for sample in samples:
        [shown] = sample.images
        assert len(json.loads(sample.completion)) == len(scenes[shown].items)


@pytest.mark.parametrize(
    ("mix", "counts"),
    [
        (Mix(listing=1, finding=1, several=0, text=0), {1}),
        (Mix(listing=0, finding=0, several=1, text=0), {2, 3, 4}),
        (Mix(listing=0, finding=0, several=0, text=1), {0}),
    ],
)
def test_each_kind_shows_its_number_of_images(mix: Mix, counts: set[int]) -> None:
    _, samples = sample_step(Random(2), scenes=8, samples=40, mix=mix)
    assert {len(sample.images) for sample in samples} == counts


def test_nothing_held_out_is_ever_drawn() -> None:
    scenes, _ = sample_step(Random(3), scenes=200, samples=1, mix=Mix())
    assert not any(item.look.held_out for scene in scenes for item in scene.items)


def test_the_same_seed_gives_the_same_step() -> None:
    first, second = (sample_step(Random(4), scenes=4, samples=8, mix=Mix()) for _ in range(2))
    assert first == second
