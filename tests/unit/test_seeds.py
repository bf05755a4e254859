from student_trainer.seeds import (
    FURTHER,
    PROBLEMS,
    ROLLOUTS,
    derive_seed,
    further_seed,
    pick,
    pick_at,
    rollout_seeds,
    seeds_at,
)


def test_each_epoch_holds_every_item_once_across_steps():
    items = list(range(10))
    drawn = [item for step in range(5) for item in pick(items, 4, step, seed=1)]  # 20 draws = 2 epochs
    assert sorted(drawn[:10]) == items
    assert sorted(drawn[10:]) == items
    assert drawn[:10] != drawn[10:]


def test_a_step_is_drawn_without_drawing_the_steps_before_it():
    items = list("abcdefg")
    assert [pick(items, 3, step, seed=2) for step in range(6)][5] == pick(items, 3, 5, seed=2)


def test_more_items_a_step_than_there_are_go_round():
    assert sorted(pick([1, 2, 3], 6, 0, seed=0)) == [1, 1, 2, 2, 3, 3]


def test_streams_differ_by_seed_purpose_and_index():
    seeds = {derive_seed(s, p, i) for s in range(3) for p in (PROBLEMS, ROLLOUTS, FURTHER) for i in range(5)}
    assert len(seeds) == 3 * 3 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_drawn_beyond_a_step_s_own_is_one_stream_for_each_step():
    items, seed = list(range(100)), further_seed(1, 4)
    assert pick_at(items, range(2), seed) + pick_at(items, range(2, 5), seed) == pick_at(items, range(5), seed)
    streams = [pick_at(items, range(5), further_seed(1, step)) for step in range(3)] + [pick(items, 5, 0, seed=1)]
    assert len({tuple(stream) for stream in streams}) == 4
    assert not set(seeds_at(range(50), seed)) & set(rollout_seeds(1, 4, 50))
