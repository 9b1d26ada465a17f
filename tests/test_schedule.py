"""How much noise at which time: the tables against closed forms, the step lists against diffusers' own."""

import dataclasses
import math

import pytest
import torch

from minidiff import schedule
from minidiff.schedule import Schedule
from tests.reference.fill import read_json

REFERENCE = read_json("schedule")
T = 1000

# --- tables -----------------------------------------------------------------------------------------------------------


def close(x: torch.Tensor, expected: object, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(x, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ["alphas_cumprod", "linear_alphas_cumprod"])
def test_tables_against_diffusers(name):
    """diffusers multiplies float32 betas: 2e-5 relative in alpha-bar, and up to 1e-3 in 1 - alpha_bar at t = 0."""
    made = schedule.linear() if name.startswith("linear") else schedule.squaredcos_cap_v2()
    expected = torch.tensor(REFERENCE[name], dtype=torch.float64)
    close(made.alphas_cumprod[REFERENCE["at"]], expected, rtol=2e-5)
    close(1 - made.alphas_cumprod[REFERENCE["at"]], 1 - expected, rtol=2e-3)


def test_tables_are_float64_and_frozen():
    made = schedule.linear(4)
    assert made.betas.dtype == made.alphas_cumprod.dtype == torch.float64
    assert made.num_train_timesteps == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.betas = None


def test_alpha_bar_reads_the_table_and_minus_one_is_clean():
    made = Schedule.from_betas(torch.tensor([0.1, 0.2, 0.5]))
    alpha_bar = made.alpha_bar(torch.tensor([2, -1, 0]))
    assert alpha_bar.shape == (3, 1, 1, 1)
    assert alpha_bar.flatten().tolist() == [made.alphas_cumprod[2].item(), 1.0, made.alphas_cumprod[0].item()]


def test_from_config_reads_the_released_process():
    released = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "num_train_timesteps": 1000}
    assert torch.equal(Schedule.from_config(released).betas, schedule.squaredcos_cap_v2().betas)
    given = Schedule.from_config({"num_train_timesteps": 5, "beta_start": 0.1, "beta_end": 0.3})
    close(given.betas, [0.1, 0.15, 0.2, 0.25, 0.3])


# --- which times are visited ------------------------------------------------------------------------------------------


def test_strided_is_the_courses_walk():
    expected = [990, 960, 930, 900, 870, 840, 810, 780, 750, 720, 690, 660, 630, 600, 570, 540, 510, 480, 450, 420, 390]
    expected += [360, 330, 300, 270, 240, 210, 180, 150, 120, 90, 60, 30, 0]
    assert schedule.strided().tolist() == expected
    assert schedule.strided(7, 3, 2).tolist() == [7, 5, 3]
    assert schedule.strided(4, 4, 9).tolist() == [4]


@pytest.mark.parametrize("n", [int(n) for n in REFERENCE["leading"] if int(n) < 999])
def test_leading_against_diffusers(n):
    assert schedule.leading(n).tolist() == REFERENCE["leading"][str(n)]


@pytest.mark.parametrize("n", [999, 1000])
def test_leading_against_diffusers_both_ends_of_long_lists(n):
    made = schedule.leading(n).tolist()
    assert len(made) == n and made[:3] + made[-3:] == REFERENCE["leading"][str(n)]


@pytest.mark.parametrize("name", list(REFERENCE["named"]))
def test_respaced_names_against_diffusers(name):
    assert schedule.respaced(name).tolist() == REFERENCE["named"][name]


def test_respaced_sums_its_steps_up_as_the_original_does():
    """Seven times 99/14 is 49.5, which would round to 50; summed up it is a little less, so super40 visits 949."""
    assert schedule.respaced("super40").tolist()[7] == 949


def test_respaced_plain_counts_start_at_pure_noise():
    for steps, start in ((50, [999, 979, 958]), ("100", [999, 989, 979]), (150, [999, 992, 986])):
        made = schedule.respaced(steps).tolist()
        assert made[:3] == start and made[-1] == 0 and len(made) == int(steps)
    assert schedule.respaced(T).tolist() == schedule.leading(T).tolist() == list(range(T - 1, -1, -1))


def test_every_list_passes_the_check():
    for timesteps in (schedule.strided(), schedule.leading(20), schedule.respaced("smart185")):
        schedule.check_timesteps(timesteps, T)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [], [[0.1]], [math.nan]])
def test_betas_must_be_a_row_of_numbers_between_0_and_1(betas):
    with pytest.raises(ValueError, match=r"betas must be one non-empty row of numbers in \(0, 1\), got shape"):
        Schedule.from_betas(torch.tensor(betas))


def test_from_config_refuses_other_processes():
    with pytest.raises(ValueError, match="prediction_type must be 'epsilon', got 'v_prediction'"):
        Schedule.from_config({"prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="beta_schedule must be 'squaredcos_cap_v2' or 'linear', got 'sigmoid'"):
        Schedule.from_config({"beta_schedule": "sigmoid"})


@pytest.mark.parametrize("t", [-2, 3])
def test_alpha_bar_refuses_times_outside_the_table(t):
    with pytest.raises(ValueError, match=rf"timesteps must lie in -1\.\.2, got \[0, {t}\]"):
        schedule.linear(3).alpha_bar(torch.tensor([0, t]))


@pytest.mark.parametrize("walk", [(0, 10, 5), (990, 0, 0), (990, 0, 40), (10, -10, 5)])
def test_strided_refuses_walks_that_do_not_arrive(walk):
    with pytest.raises(ValueError, match="need start >= stop >= 0 and a stride dividing start - stop, got"):
        schedule.strided(*walk)


def test_respaced_refuses_unknown_names_and_crowded_sections():
    with pytest.raises(ValueError, match="steps must be a count, a list like .* or one of fast27, .*, got 'fast28'"):
        schedule.respaced("fast28")
    with pytest.raises(ValueError, match="cannot take 6 steps out of 5; choose 1 to 5"):
        schedule.respaced("2,6", 10)


@pytest.mark.parametrize("n", [0, 1001])
def test_leading_refuses_more_steps_than_there_are_times(n):
    with pytest.raises(ValueError, match=f"cannot take {n} steps out of 1000; choose 1 to 1000"):
        schedule.leading(n)


def test_check_timesteps_says_what_is_wrong():
    with pytest.raises(ValueError, match="timesteps are empty; pass for example"):
        schedule.check_timesteps(torch.tensor([], dtype=torch.int64), T)
    with pytest.raises(ValueError, match="timesteps must descend, got 10 before 20"):
        schedule.check_timesteps(torch.tensor([30, 10, 20]), T)
    with pytest.raises(ValueError, match="timesteps must descend, got 10 before 10"):
        schedule.check_timesteps(torch.tensor([10, 10]), T)
    for outside in ([1000, 5], [5, -1]):
        with pytest.raises(ValueError, match=rf"timesteps must lie in 0\.\.999, got {outside[0]} to {outside[1]}"):
            schedule.check_timesteps(torch.tensor(outside), T)
    for wrong in ([30, 10], 27, torch.tensor([2.5])):
        with pytest.raises(ValueError, match="timesteps are one row of whole numbers, got .*; a count of"):
            schedule.check_timesteps(wrong, T)
    with pytest.raises(ValueError, match=r"times are whole numbers, such as torch.tensor\(\[500\]\), got 5"):
        schedule.linear().alpha_bar(5)
