"""Flow matching: from noise to data along a velocity field, and the solvers that follow it.

Read `ddpm.py` and `sampling.py` first: this is the other way to make images from noise. There is no noise schedule and
no random step. Noise x_0 and data x_1 (the letters of this field; a clean image is `x_start` everywhere else) are
joined by straight lines, a network learns the mean direction of the lines through each point, and sampling follows it:

    path      x_t = (1 - t) x_0 + t x_1                    t from 0, noise, to 1, data
    target    velocity = x_1 - x_0                         constant along each line
    sample    dx / dt = velocity(x, t), from t = 0 to 1    solve, dormand_prince

Where lines cross, the mean direction is none of theirs, so the paths that sampling follows are curved. `straightness`
says how much, and training again, on lines from noises to where the model leads them, makes them straighter (rectified
flow, `mnist/train_flow.py`).
`log_likelihood` follows a path backwards and says how likely its end is.
`from_eps` shows that a noise-predicting diffusion model is a velocity field too, read off another clock.

A velocity is any callable velocity(x, time) -> tensor like x, with x: (B, C, H, W) and time: (B,) float.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minidiff import ddpm
from minidiff.checks import number, same_shape, short
from minidiff.sampling import Prediction
from minidiff.schedule import Schedule

Velocity = Callable[[Tensor, Tensor], Tensor]


def path(x_0: Tensor, x_1: Tensor, time: Tensor) -> Tensor:
    """Where the line from noise x_0 to data x_1 is at this time.

        x_t = (1 - t) x_0 + t x_1

    x_0, x_1: (B, C, H, W).  time: (B,) in [0, 1].  Raises ValueError if the shapes differ, or (not on a GPU) at
    another time.
    Source: FM Eq. 22 with sigma_min = 0.
    """
    same_shape(x_0=x_0, x_1=x_1)
    if not isinstance(time, Tensor) or not time.is_cuda and not ((time >= 0) & (time <= 1)).all():
        raise ValueError(f"times are a tensor (B,) in [0, 1], from noise to data, got {short(time)}")
    time = ddpm.cast(time.view(-1, 1, 1, 1), x_0)
    return (1 - time) * x_0 + time * x_1


def loss(x_0: Tensor, x_1: Tensor, velocity: Tensor) -> Tensor:
    """What training minimises, one number per image: (B,).

        L = mean |velocity - (x_1 - x_0)|^2

    x_0, x_1: (B, C, H, W).  velocity: the network's answer at a point of their `path`.
    Raises ValueError if the shapes differ.    Source: FM Eq. 23 with sigma_min = 0.
    """
    same_shape(x_0=x_0, x_1=x_1, velocity=velocity)
    return (velocity - (x_1 - x_0)).square().flatten(1).mean(1)


def euler(velocity: Velocity, x: Tensor, time: Tensor, h: float) -> Tensor:
    """One step of length h, from x (B, C, H, W) at time (B,), along the direction there: order 1, one evaluation."""
    return x + h * velocity(x, time)


def midpoint(velocity: Velocity, x: Tensor, time: Tensor, h: float) -> Tensor:
    """One step along the direction found half-way: order 2, two evaluations."""
    return x + h * velocity(x + h / 2 * velocity(x, time), time + h / 2)


def heun(velocity: Velocity, x: Tensor, time: Tensor, h: float) -> Tensor:
    """One step along the mean of the directions at its start and its end: order 2, two evaluations."""
    first = velocity(x, time)
    return x + h / 2 * (first + velocity(x + h * first, time + h))


def rk4(velocity: Velocity, x: Tensor, time: Tensor, h: float) -> Tensor:
    """One step along a mean of four directions, the classical method of Runge and Kutta: order 4, four evaluations."""
    first = velocity(x, time)
    second = velocity(x + h / 2 * first, time + h / 2)
    third = velocity(x + h / 2 * second, time + h / 2)
    fourth = velocity(x + h * third, time + h)
    return x + h / 6 * (first + 2 * second + 2 * third + fourth)


METHODS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}


@torch.inference_mode()
def walk(velocity: Velocity, x: Tensor, times: Tensor, method: str = "euler") -> Iterator[Tensor]:
    """Follow the velocity through these times, one step from each to the next: x at every time, the first included.
    x: (B, C, H, W), as it is at times[0].  times: (S + 1,), in either direction: `grid(50)` samples with 50 steps, its
    flip goes from data back to noise.  method: one of METHODS.
    Raises ValueError on an unknown method, times that are no floats, or a velocity that changes the shape of x."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(times, Tensor) or times.ndim != 1 or not times.is_floating_point():
        raise ValueError(f"times are a row of floats, such as grid(50), got {short(times)}")
    clock = times.tolist()
    yield x
    for now, later in zip(clock, clock[1:]):
        moved = METHODS[method](velocity, x, _all_at(now, x), later - now)
        same_shape(x=x, moved=moved)
        x = moved
        yield x


def solve(velocity: Velocity, x: Tensor, times: Tensor, method: str = "euler") -> Tensor:
    """Where the `walk` ends: x at the last time."""
    return deque(walk(velocity, x, times, method), maxlen=1).pop()


def grid(steps: int) -> Tensor:
    """0, 1/steps, ..., 1: (steps + 1,) float64. Raises ValueError if there is no step."""
    number("steps", steps, 1, whole=True)
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


# Dormand and Prince's coefficients: stage i looks at NODES[i] of the step, having walked there along WEIGHTS[i] of the
# stages before it. The last stage is the result, of order 5; ERROR is its difference to a result of order 4.
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
WEIGHTS = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@torch.inference_mode()
def dormand_prince(velocity: Velocity, x: Tensor, rtol: float = 1e-3, atol: float = 1e-3) -> tuple[Tensor, int]:
    """Follow the velocity from time 0 to 1 with steps as long as the tolerance allows: (x at 1, evaluations made).

        error = root of mean ((x of order 5 - x of order 4) / (atol + rtol max(|x|, |new x|)))^2, of the worst image
        step accepted if error <= 1;   next h = 0.9 h error^(-1/5), changed by at most 5 times

    Six evaluations per step tried, since the last of one step is the first of the next. The steps depend on the whole
    batch: an image is the same in another batch up to the tolerance only.
    Raises ValueError if a step would have to be shorter than 1e-6: the velocity jumps or is not finite.
    Source: Dormand and Prince, A family of embedded Runge-Kutta formulae, 1980.
    """
    now, h, evaluations = 0.0, 0.1, 1
    first = velocity(x, _all_at(now, x))
    same_shape(x=x, velocity=first)
    while now < 1:
        h = min(h, 1 - now)
        stages = [first]
        for node, weights in zip(NODES[1:], WEIGHTS[1:]):
            moved = x + h * sum(w * k for w, k in zip(weights, stages) if w)
            stages.append(velocity(moved, _all_at(now + node * h, x)))
        evaluations += 6
        error = h * sum(e * k for e, k in zip(ERROR, stages) if e)
        scaled = error / (atol + rtol * torch.maximum(x.abs(), moved.abs()))
        size = scaled.square().flatten(1).mean(1).sqrt().max().item()
        if size <= 1:
            now, x, first = (1.0 if h == 1 - now else now + h), moved, stages[-1]
        h *= min(5.0, max(0.2, 0.9 * max(size, 1e-10) ** -0.2)) if size < float("inf") else 0.2
        if now < 1 and h < 1e-6:
            raise ValueError(f"the solver is stuck at time {now:.4f}: the velocity jumps there or is not finite")
    return x, evaluations


def straightness(velocity: Velocity, x_0: Tensor, steps: int = 50) -> Tensor:
    """How far the paths from x_0 are from straight lines, one number per image: (B,); 0 on lines at constant speed.

        S = mean over t of |(x_1 - x_0) - velocity(x_t, t)|^2, per value

    With Euler steps x_1 - x_0 is the mean velocity of the path, so S is the variance of the velocity along it.
    Source: Rectified Flow Sec. 2.2.
    """
    points = torch.stack(list(walk(velocity, x_0, grid(steps))))  # (S + 1, B, C, H, W)
    return (points.diff(dim=0) * steps).var(0, unbiased=False).flatten(1).mean(1)


def divergence(velocity: Velocity, x: Tensor, time: Tensor, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The velocity at x (B, C, H, W), and how fast it spreads its neighbourhood there, sum_i dv_i / dx_i: (B,).
    probe: like x, of independent entries +1 and -1; then probe . J probe, with J = dv / dx, one derivative instead of
    one for each value, and in the mean over probes the same (Hutchinson's estimator)."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # a copy: the tensors of `walk` cannot be differentiated
        v = velocity(x, time)
        same_shape(x=x, velocity=v, probe=x if probe is None else probe)
        probes = torch.eye(x[0].numel()).to(x).view(-1, 1, *x.shape[1:]) if probe is None else [probe]
        total = torch.zeros(len(x)).to(x)
        for e in probes:
            (along,) = torch.autograd.grad((v * e).sum(), x, retain_graph=True)
            total += (along * e).flatten(1).sum(1)
    return v.detach(), total


def log_likelihood(velocity: Velocity, x_1: Tensor, times: Tensor, probe: Tensor | None = None) -> Tensor:
    """log of the density that sampling gives to each x_1 (B, C, H, W): (B,), in nats.

        log p(x_1) = log N(x_0; 0, I) - integral from 0 to 1 of the divergence along the path that ends in x_1

    Follows the path back by midpoint steps through times, such as `grid(100)`.  probe: as for `divergence`.
    Of images with 256 grey levels only differences mean something, unless noise as wide as a level was added to them.
    Source: Chen et al., Neural Ordinary Differential Equations, 2018; the estimator, Grathwohl et al., FFJORD, 2019.
    """
    if not (times.diff() > 0).all() or times[0] != 0 or times[-1] != 1:
        raise ValueError(f"times rise from 0, noise, to 1, data, such as grid(100), got {short(times.tolist())}")
    x, spread, back = x_1, torch.zeros(len(x_1)).to(x_1), times.flip(0).tolist()
    for now, earlier in zip(back, back[1:]):
        h = earlier - now
        with torch.no_grad():
            halfway = x + h / 2 * velocity(x, _all_at(now, x))
        v, rate = divergence(velocity, halfway, _all_at(now + h / 2, x), probe)
        x, spread = x + h * v, spread - h * rate
    log_normal = -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return log_normal - spread


def clock(schedule: Schedule) -> Tensor:
    """The flow's time at which signal and noise stand in the proportion of each diffusion time: (T,) descending.

    time / (1 - time) = sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)
    """
    signal, noise = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    return signal / (signal + noise)


def from_eps(predict: Prediction, schedule: Schedule) -> Velocity:
    """A noise-predicting model as a velocity field: one sampler, two clocks.

        x_t = (sqrt(alpha_bar_t) + sqrt(1 - alpha_bar_t)) x        the same mixture, scaled as diffusion has it
        velocity = x_start - eps                                   since eps is x_0 and x_start is x_1

    predict: as `sampling.denoise` wants it.  schedule: of the T times it was trained with. At a time between two of
    the `clock`, the velocity takes the nearer one. Euler steps through `clock(schedule).flip(0)`, then to 1, are
    those of DDIM with eta = 0, which draws no noise on the way; they begin at the clock's last time, not at 0.
    """
    times = clock(schedule)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        t = (times - time.cpu().double()[:, None]).abs().argmin(1)
        alpha_bar_t = schedule.alpha_bar(t)
        x_t = (alpha_bar_t.sqrt() + (1 - alpha_bar_t).sqrt()).to(x) * x
        eps, _ = predict(x_t, t.to(x.device))
        return ddpm.predict_x_start(x_t, eps, alpha_bar_t) - eps

    return velocity


def _all_at(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), time, dtype=x.dtype, device=x.device)
