"""The curriculum: when it moves on, and when it ends a stage."""

from __future__ import annotations

from transformers import TrainerControl, TrainerState, TrainingArguments

from examples.train.curriculum import Curriculum
from examples.train.recipe import Stage
from tests.support.tiny_recipe import STAGE

ARGUMENTS = TrainingArguments(output_dir="/absent", use_cpu=True)


def curriculum(**given) -> Curriculum:
    return Curriculum(Stage(**STAGE | {"patience": 3, "advance": 0.8, "finish": 0.9} | given))


def step(one: Curriculum, number: int) -> TrainerControl:
    control = TrainerControl()
    one.on_step_end(ARGUMENTS, TrainerState(global_step=number), control)
    return control


def test_it_moves_on_after_enough_right_answers_and_steps() -> None:
    one = curriculum()
    for i in range(1, 4):
        assert one.level == 0
        one.count(0, right=9, answers=10)
        assert not step(one, i).should_training_stop
    assert (one.level, one.since, one.accuracy, one.step) == (1, 0, None, 3)


def test_it_waits_for_right_answers() -> None:
    one = curriculum()
    for i in range(20):
        one.count(0, right=7, answers=10)
        step(one, i)
    assert one.level == 0
    for i in range(200):
        one.count(0, right=10, answers=10)
        step(one, i)
        if one.level == 1:
            break
    # a running mean of 33 batches: from 0.7 to 0.8 takes some
    assert 10 < i < 20


def test_the_last_level_ends_the_stage_where_it_has_a_goal() -> None:
    for finish, stops in ((0.9, True), (None, False)):
        one = curriculum(finish=finish)
        one.level = 1
        for i in range(3):
            one.count(1, right=10, answers=10)
            control = step(one, i)
        assert (control.should_training_stop, control.should_save) == (stops, stops)
        assert one.level == 1


def test_other_levels_and_batches_without_answers_do_not_count() -> None:
    one = curriculum()
    one.count(1, right=1, answers=1)
    one.count(0, right=0, answers=0)
    assert (one.since, one.accuracy) == (0, None)


def test_it_goes_on_where_a_checkpoint_was() -> None:
    one = curriculum()
    one.count(0, right=9, answers=10)
    one.step, one.level = 40, 1
    other = curriculum()
    state = TrainerState(stateful_callbacks=[one])
    other.on_train_begin(ARGUMENTS, state, TrainerControl())
    assert (other.step, other.level, other.since, other.accuracy) == (40, 1, 1, 0.9)
