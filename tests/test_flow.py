"""Flow matching: path and target by hand, solvers by their orders, and Gaussians, whose flow can be written down."""

import math

import pytest
import torch

from minidiff import flow, toy
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.schedule import linear
from tests.reference.fill import bent, normal, read

MEAN, STD = 0.3, 0.4


def noise(n=8, seed=0):
    return torch.randn(n, 1, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(x, time):
    """E[x_1 - x_0 | x_t] for data N(MEAN, STD^2): x_t has variance v = (1-t)^2 + t^2 STD^2, and by Bayes
    E[x_1 | x_t] = MEAN + t STD^2 / v (x_t - t MEAN),  E[x_0 | x_t] = (1-t) / v (x_t - t MEAN)."""
    t = time.view(-1, 1, 1, 1)
    centred = (x - t * MEAN) / ((1 - t) ** 2 + t**2 * STD**2)
    return MEAN + t * STD**2 * centred - (1 - t) * centred


def test_fm_eq22_the_path_by_hand_and_at_its_ends():
    """FM Eq. 22: 0.25 of the way from 2 to 10 is 4, from -1 to 3 it is 0."""
    x_0, x_1 = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([10.0, 3.0]).view(2, 1, 1, 1)
    assert flow.path(x_0, x_1, torch.tensor([0.25, 0.25])).flatten().tolist() == [4.0, 0.0]
    assert torch.equal(flow.path(x_0, x_1, torch.zeros(2)), x_0)
    assert torch.equal(flow.path(x_0, x_1, torch.ones(2)), x_1)
    assert flow.path(x_0, x_1, torch.tensor([0.0, 1.0])).flatten().tolist() == [2.0, 3.0]  # each picture its own time
    with pytest.raises(ValueError, match=r"shapes must agree, got x_0 \(2, 1, 1, 1\), x_1 \(1, 1, 1, 1\)"):
        flow.path(x_0, x_1[:1], torch.zeros(2))


def test_fm_eq23_the_loss_by_hand():
    """FM Eq. 23: target 10 - 2 = 8 and 3 - (-1) = 4; answers 7 and 4 miss by 1 and 0, so 1 and 0 squared."""
    x_0, x_1 = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([10.0, 3.0]).view(2, 1, 1, 1)
    assert flow.loss(x_0, x_1, torch.tensor([7.0, 4.0]).view(2, 1, 1, 1)).tolist() == [1.0, 0.0]
    x_t = flow.path(x_0, x_1, torch.tensor([0.1, 0.7]))
    slope = (flow.path(x_0, x_1, torch.tensor([0.3, 0.9])) - x_t) / 0.2  # the target is the path's derivative
    assert flow.loss(x_0, x_1, slope).max() < 1e-10


@pytest.mark.parametrize("method", flow.METHODS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_followed_exactly_by_any_solver(method, steps):
    x_0, x_1 = noise(), noise(seed=1)
    found = flow.solve(lambda x, time: x_1 - x_0, x_0, flow.grid(steps), method)
    torch.testing.assert_close(found, x_1, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_the_error_falls_with_the_solvers_order(method, order):
    """dx/dt = (1 + t) x has x(1) = exp(1.5) x(0); halving the step divides the error by 2^order."""
    x_0 = noise()
    errors = [
        (flow.solve(lambda x, t: (1 + t.view(-1, 1, 1, 1)) * x, x_0, flow.grid(n), method) / x_0 - math.exp(1.5)).abs()
        for n in (40, 80)
    ]
    assert math.log2(errors[0].max() / errors[1].max()) == pytest.approx(order, abs=0.1)


def test_one_step_of_each_solver_by_hand():
    """dx/dt = t x, x = 2 at t = 1, h = 0.5. Euler: 2 + 0.5 * 2 = 3. Midpoint: x = 2.5 at 1.25, so 2 + 0.5 * 3.125.
    Heun: x = 3 at 1.5, slope 4.5, so 2 + 0.25 * (2 + 4.5) = 3.625. Runge and Kutta: slopes 2, 1.25 * 2.5 = 3.125,
    1.25 * (2 + 0.25 * 3.125) = 3.4765625, 1.5 * (2 + 0.5 * 3.4765625) = 5.607421875."""
    x, times = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64), torch.tensor([1.0, 1.5])
    found = {m: flow.solve(lambda x, t: t.view(-1, 1, 1, 1) * x, x, times, m).item() for m in flow.METHODS}
    fourth = 2 + (2 + 2 * 3.125 + 2 * 3.4765625 + 5.607421875) / 12
    assert found == {"euler": 3.0, "midpoint": 3.5625, "heun": 3.625, "rk4": pytest.approx(fourth, rel=1e-14)}


def test_dormand_prince_has_order_five_and_its_error_estimate_order_five_too():
    """One step of dx/dt = x is sum_{k<=5} h^k / k! and a part h^6 / 600, as the method's published polynomial has it;
    the rows of WEIGHTS sum to NODES, and ERROR to 0."""
    for node, row in zip(flow.NODES, flow.WEIGHTS):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    assert sum(flow.ERROR) == pytest.approx(0, abs=1e-16)
    stages = []
    for row in flow.WEIGHTS:  # as polynomials in h: stage = 1 + h sum w_j stage_j
        poly = [1.0] + [0.0] * 7
        for w, stage in zip(row, stages):
            for k in range(7):
                poly[k + 1] += w * stage[k]
        stages.append(poly)
    expected = [1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 600, 0]
    assert stages[-1] == pytest.approx(expected, abs=1e-14)
    estimate = [sum(e * stage[k] for e, stage in zip(flow.ERROR, stages)) for k in range(4)]
    assert estimate == pytest.approx([0] * 4, abs=1e-15)  # h * O(h^4)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_solvers_against_torchdiffeq(method):
    """Its "rk4" is another method of order 4, the rule of three eighths."""
    found = flow.solve(bent, normal("flow.x_0", 4, 1, 2, 3).double(), flow.grid(7), method)
    torch.testing.assert_close(found, read("flow")[method], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tolerance", "apart"), [(1e-3, 0.1), (1e-6, 5e-5), (1e-12, 1e-10)])
def test_dormand_prince_against_torchdiffeq(tolerance, apart):
    """Errors add up over the steps, and steps differ: torchdiffeq's follow the mean error, ours the worst picture's."""
    found, _ = flow.dormand_prince(bent, normal("flow.x_0", 4, 1, 2, 3).double(), tolerance, tolerance)
    torch.testing.assert_close(found, read("flow")[f"dormand_prince.{tolerance:g}"], rtol=0, atol=apart)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_dormand_prince_keeps_its_tolerance_and_counts_its_evaluations(tolerance):
    calls = []

    def velocity(x, time):
        calls.append(time[0].item())
        return gaussian(x, time)

    x_0 = noise(100)
    x_1, evaluations = flow.dormand_prince(velocity, x_0, rtol=tolerance, atol=tolerance)
    assert evaluations == len(calls) and evaluations % 6 == 1 and 0 <= min(calls) and max(calls) <= 1
    assert (x_1 - (MEAN + STD * x_0)).abs().max() < 20 * tolerance
    assert evaluations < {1e-3: 40, 1e-5: 80, 1e-8: 260}[tolerance]


def test_dormand_prince_may_end_with_a_very_short_step():
    """w cos(w t) integrates to sin w; for this w the last step is shorter than the shortest that is useful."""
    w = 5.326525115966798
    found, _ = flow.dormand_prince(
        lambda x, time: w * (w * time).cos().view(-1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.float64), 1e-4, 1e-4
    )
    assert found.item() == pytest.approx(math.sin(w), abs=1e-3)


def test_dormand_prince_takes_short_steps_only_where_they_are_needed():
    """A kink: dx/dt is 0 until t = 0.5, then 20 cos(20 t); more than half of the evaluations fall into the second half,
    rejected steps are made again, and the answer is sin(20) - sin(10)."""
    calls = []

    def velocity(x, time):
        calls.append(time[0].item())
        return torch.zeros_like(x) if calls[-1] < 0.5 else torch.full_like(x, 20 * math.cos(20 * calls[-1]))

    x, _ = flow.dormand_prince(velocity, torch.zeros(1, 1, 1, 1, dtype=torch.float64), 1e-6, 1e-6)
    assert x.item() == pytest.approx(math.sin(20) - math.sin(10), abs=1e-4)
    assert sum(c > 0.49 for c in calls) > 0.8 * len(calls)
    with pytest.raises(ValueError, match="stuck at time 0.0000: the velocity jumps there or is not finite"):
        flow.dormand_prince(lambda x, time: torch.full_like(x, torch.nan), torch.zeros(1, 1, 1, 1))


def test_dormand_princes_steps_are_short_enough_for_the_worst_picture():
    """Beside 99 pictures that stand still, the one that moves takes the steps it takes alone."""
    speed = torch.zeros(100, 1, 1, 1, dtype=torch.float64)
    speed[37] = 1

    def velocity(x, time):
        return speed[: len(x)] * (30 * (30 * time).cos()).view(-1, 1, 1, 1)

    x, evaluations = flow.dormand_prince(velocity, torch.zeros_like(speed))
    alone = flow.dormand_prince(lambda x, time: velocity(x, time) + 30 * (30 * time).cos().view(-1, 1, 1, 1), x[:1] * 0)
    assert evaluations == alone[1] > 60 and x[37].item() == pytest.approx(alone[0].item(), abs=1e-12)


def test_a_gaussian_flows_to_its_closed_form_and_back():
    """The flow of a Gaussian is x_1 = MEAN + STD x_0; the flipped grid leads back to the noise."""
    x_0 = noise(100)
    times = flow.grid(400)
    x_1 = flow.solve(gaussian, x_0, times, "midpoint")
    torch.testing.assert_close(x_1, MEAN + STD * x_0, rtol=0, atol=1e-4)
    torch.testing.assert_close(flow.solve(gaussian, x_1, times.flip(0), "midpoint"), x_0, rtol=0, atol=1e-4)


def test_a_diffusion_model_is_a_velocity_field_on_another_clock():
    """from_eps gives exactly the flow's velocity, and sampling by either leads to the same picture."""
    schedule = linear(1000)
    times = flow.clock(schedule)
    converted = flow.from_eps(toy.gaussian(schedule, MEAN, STD), schedule)
    x = noise(5)
    for t in (0, 300, 999):
        time = times[t].expand(5)
        torch.testing.assert_close(converted(x, time), gaussian(x, time), rtol=1e-9, atol=1e-9)
    walk = torch.cat([times.flip(0), torch.ones(1, dtype=torch.float64)])  # 0.006 (not quite noise), ..., 1
    start = flow.path(x, MEAN + STD * x, walk[:1].expand(5))
    here, there = (flow.solve(velocity, start, walk) for velocity in (converted, gaussian))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)
    torch.testing.assert_close(here, MEAN + STD * x, rtol=0, atol=2e-2)


def test_diffusion_can_be_inverted_better_with_more_steps():
    """Data to noise and back again: the error falls with the number of steps. Euler's, which are DDIM's, miss by 0.16
    in 50 steps and by less than 0.01 only in 1000; Heun's by less than 0.001 in 50."""
    schedule = linear(1000)
    velocity = flow.from_eps(toy.gaussian(schedule, MEAN, STD), schedule)
    x_1 = MEAN + STD * noise(20)
    errors = []
    for stride in (40, 10, 1):
        times = torch.cat([torch.ones(1, dtype=torch.float64), flow.clock(schedule)[::stride]])
        back = flow.solve(velocity, flow.solve(velocity, x_1, times), times.flip(0))
        errors.append((back - x_1).abs().max().item())
    assert errors[1] < 0.5 * errors[0] and errors[2] < 1e-2
    assert times[0] == 1 and times[-1] == flow.clock(schedule)[-1] < 0.01  # from the data to the noisiest time
    fifty = torch.cat([torch.ones(1, dtype=torch.float64), flow.clock(schedule)[::20]])
    back = flow.solve(velocity, flow.solve(velocity, x_1, fifty, "heun"), fifty.flip(0), "heun")
    assert (back - x_1).abs().max() < 1e-3


def test_euler_steps_on_the_clock_are_ddim_without_noise():
    """DDIM Eq. 12 with sigma = 0, written out over four times and the step to the end."""
    schedule, kept, x = linear(300), [299, 200, 90, 7], noise(5)

    def predict(x_t, t):
        return x_t.tanh() + t.view(-1, 1, 1, 1) / 300, None

    alpha_bar, y = [*schedule.alphas_cumprod.tolist(), 1.0], x
    for t, earlier in zip(kept, [*kept[1:], -1]):
        eps, a, b = predict(y, torch.full((5,), t))[0], alpha_bar[t], alpha_bar[earlier]
        y = b**0.5 * (y - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    times = torch.cat([flow.clock(schedule)[kept], torch.ones(1, dtype=torch.float64)])
    a = alpha_bar[299]
    found = flow.solve(flow.from_eps(predict, schedule), x / (a**0.5 + (1 - a) ** 0.5), times)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-9)


def test_straightness_is_zero_on_lines_and_known_on_a_circle():
    """Round a quarter circle v = pi/2 (-sin, cos)(pi t / 2): mean |v|^2 is pi^2 / 4, the chord's 2; 2 values."""
    x_0, x_1 = noise(4), noise(4, seed=1)
    assert flow.straightness(lambda x, time: x_1 - x_0, x_0).max() < 1e-12

    def circle(x, time):
        angle = math.pi / 2 * time
        return math.pi / 2 * torch.stack([-angle.sin(), angle.cos()], 1).view(-1, 1, 1, 2)

    found = flow.straightness(circle, torch.zeros(1, 1, 1, 2, dtype=torch.float64), 2000).item()
    assert found == pytest.approx((math.pi**2 / 4 - 2) / 2, rel=1e-3)


def test_the_likelihood_of_a_gaussian_is_its_closed_form():
    """Sampling turns noise into N(MEAN, STD^2), so log p = -sum((x - MEAN)^2 / 2 STD^2) - 6 log(...)."""
    x_1 = MEAN + 1.5 * STD * noise(20)
    expected = -0.5 * ((x_1 - MEAN) / STD).square().flatten(1).sum(1) - 6 * math.log(STD * math.sqrt(2 * math.pi))
    found = flow.log_likelihood(gaussian, x_1, flow.grid(200))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    sign = noise(20, seed=5).sign()  # this J is a multiple of 1, so that any probe is exact
    torch.testing.assert_close(flow.log_likelihood(gaussian, x_1, flow.grid(200), sign), found, rtol=0, atol=1e-9)


def test_the_likelihood_of_what_a_network_drew():
    """What `solve` returns cannot be differentiated; its likelihood is that of a copy, and changes no weight's grad."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, time=True)).eval()
    x_1 = flow.solve(unet, torch.randn(2, 1, 28, 28), flow.grid(2))
    probe = torch.randn(2, 1, 28, 28).sign()
    found = flow.log_likelihood(unet, x_1, flow.grid(2), probe)
    assert torch.equal(found, flow.log_likelihood(unet, x_1.clone(), flow.grid(2), probe)) and found.isfinite().all()
    assert flow.divergence(unet, x_1, torch.ones(2), probe)[1].isfinite().all()


def test_the_divergence_is_the_trace_and_probes_estimate_it_without_bias():
    """v = J x has divergence tr J everywhere; 20,000 probes agree in the mean, by 5 standard errors."""
    J = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def linear_field(x, time):
        return (x.flatten(1) @ J.T).view(x.shape)

    x = noise(4)
    v, exact = flow.divergence(linear_field, x, torch.zeros(4))
    torch.testing.assert_close(v, linear_field(x, None))
    torch.testing.assert_close(exact, torch.trace(J).expand(4))
    many = noise(20000)
    _, estimates = flow.divergence(linear_field, many, torch.zeros(20000), noise(20000, seed=1).sign())
    assert abs(estimates.mean() - torch.trace(J)) < 5 * estimates.std() / 20000**0.5
    assert estimates.std() > 0.1


def test_a_walk_shows_every_state_from_the_first_to_the_last():
    states = list(flow.walk(lambda x, time: 1 + 0 * x + time.view(-1, 1, 1, 1), torch.zeros(1, 1, 1, 1), flow.grid(4)))
    assert [x.item() for x in states] == [0.0, 0.25, 0.5625, 0.9375, 1.375]  # slopes 1, 1.25, 1.5, 1.75


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="method must be one of euler, midpoint, heun, rk4, got 'leapfrog'"):
        flow.solve(gaussian, noise(), flow.grid(2), "leapfrog")
    with pytest.raises(ValueError, match="steps must be a whole number of 1 or more, got 0"):
        flow.grid(0)
    for times in (5, [0.0, 1.0], torch.arange(3)):
        with pytest.raises(ValueError, match=r"times are a row of floats, such as grid\(50\), got "):
            flow.solve(gaussian, noise(), times)
    with pytest.raises(ValueError, match="shapes must agree, got x .*, moved"):  # would be broadcast
        flow.solve(lambda x, time: x[:, :, :1].repeat(1, 2, 1, 1), noise()[:, :1], flow.grid(2))
    with pytest.raises(ValueError, match=r"times must be \(B, 1, 1, 1\) for images \(1, 1, 8, 8\), got \(2, 1, 1, 1\)"):
        flow.path(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.tensor([0.2, 0.5]))
    with pytest.raises(ValueError, match=r"shapes must agree, got .* velocity \(2, 8, 8\)"):  # would be (2, 2, 8, 8)
        flow.loss(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match=r"times rise from 0, noise, to 1, data, such as"):
        flow.log_likelihood(gaussian, noise(), flow.grid(2).flip(0))
