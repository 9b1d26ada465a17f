"""How much noise at which time, and which times a sampler visits.

Diffusion destroys an image in T small steps. `betas[t]` is the variance added in step t, and `alphas_cumprod[t]`
(alpha-bar) is the share of the image's own variance that is left after it: 1 is clean, 0 is pure noise. Everything
else that diffuses is written in alpha-bar. Timesteps run from 0 (nearly clean) to T-1 (noise), and -1 stands for
"clean", where alpha-bar is exactly 1.

A sampler need not visit all T times. `leading`, `strided` and `respaced` choose a few of them, in descending order.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """The two tables of a diffusion process, in float64: float32 tables move posterior coefficients by up to 1e-3.

        alphas_cumprod[t] = (1 - betas[0]) (1 - betas[1]) ... (1 - betas[t])

    betas, alphas_cumprod: (T,) float64.    Source: DDPM Sec. 2.
    """

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> "Schedule":
        """Both tables from betas (T,). Raises ValueError unless every beta lies in (0, 1)."""
        betas = betas.to(torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas must be one non-empty row of numbers in (0, 1), got shape {tuple(betas.shape)}")
        return cls(betas, torch.cumprod(1 - betas, dim=0))

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """The process named in a released `scheduler/scheduler_config.json`. Raises ValueError on any other process."""
        fixed = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}
        for key, expected in fixed.items():
            if config.get(key, expected) != expected:
                raise ValueError(f"{key} must be {expected!r}, got {config[key]!r:.60}")
        T = config.get("num_train_timesteps", 1000)
        if type(T) is not int or not 0 < T <= 100_000:
            raise ValueError(f"num_train_timesteps must be a whole number from 1 to 100000, got {T!r:.60}")
        name = config.get("beta_schedule", "linear")
        if name == "squaredcos_cap_v2":
            return squaredcos_cap_v2(T)
        if name == "linear":
            return linear(T, config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
        raise ValueError(f"beta_schedule must be 'squaredcos_cap_v2' or 'linear', got {name!r}")

    @property
    def num_train_timesteps(self) -> int:
        return len(self.betas)

    def alpha_bar(self, t: torch.Tensor) -> torch.Tensor:
        """alpha-bar at each time of t: (B,) int64 in -1..T-1, where -1 is clean. Returns (B, 1, 1, 1) float64.
        Raises ValueError if a time lies outside the table, or is no whole number."""
        if not isinstance(t, torch.Tensor) or t.is_floating_point():
            raise ValueError(f"times are whole numbers, such as torch.tensor([500]), got {t}")
        t = t.cpu()  # once: reading from a GPU waits for all that it still has to do
        if t.numel() and not (-1 <= int(t.min()) and int(t.max()) < self.num_train_timesteps):
            raise ValueError(f"timesteps must lie in -1..{self.num_train_timesteps - 1}, got {t.tolist()}")
        table = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)])  # index -1 reads the last entry: 1
        return table[t].view(-1, 1, 1, 1)


def squaredcos_cap_v2(num_train_timesteps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """The cosine schedule of DeepFloyd IF: alpha-bar falls like a squared cosine, gently at both ends.

        f(u) = cos((u + 0.008) / 1.008 * pi / 2)^2
        beta_t = min(1 - f((t + 1) / T) / f(t / T), max_beta)

    Only the last beta is clipped; without the clip it would be 1 and alpha-bar 0.    Source: iDDPM Eq. 17.
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    T = num_train_timesteps
    betas = [min(1 - f((t + 1) / T) / f(t / T), max_beta) for t in range(T)]
    return Schedule.from_betas(torch.tensor(betas, dtype=torch.float64))


def linear(num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas that rise linearly from beta_start to beta_end, both included.

        beta_t = beta_start + t / (T - 1) * (beta_end - beta_start)

    Source: DDPM Sec. 4.
    """
    return Schedule.from_betas(torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64))


def strided(start: int = 990, stop: int = 0, stride: int = 30) -> torch.Tensor:
    """start, start - stride, ... down to stop, both included: the course's 990, 960, ..., 0. (S,) int64."""
    if not (start >= stop >= 0 and stride > 0 and (start - stop) % stride == 0):
        raise ValueError(f"need start >= stop >= 0 and a stride dividing start - stop, got {start}, {stop}, {stride}")
    return torch.arange(start, stop - 1, -stride)


def leading(num_inference_steps: int, num_train_timesteps: int = 1000) -> torch.Tensor:
    """Evenly spaced from 0 upwards, as diffusers does by default: t_i = (N - 1 - i) * (T // N). (N,) int64.
    Starts below T - 1 (at 950 for N = 20): there the network expects a little of an image, and gets pure noise."""
    _check_count(num_inference_steps, num_train_timesteps)
    return torch.arange(num_inference_steps - 1, -1, -1) * (num_train_timesteps // num_inference_steps)


# The step lists that DeepFloyd IF names: how many steps to take in each equal section of 0..999, lowest times first.
RESPACINGS = {
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}


def respaced(steps: int | str, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The times the original DeepFloyd IF visits: a name of RESPACINGS, a list "10,10,3,2,2", or a plain count.

        t_k = begin + round(k (n - 1) / (m - 1)),    k = 0 ... m - 1,    in a section of n times with m steps

    0..T-1 is cut into equal sections, the first with the lowest times. A section is visited at both its ends, and one
    with a single step at its first time. A plain count N is one section: the walk starts at T - 1, where the input is
    pure noise; N = 1 is T - 1 alone (the original visits 0 there, and so takes pure noise for a clean image).
    Returns (S,) int64, descending.
    Raises ValueError on unknown names and on sections too small for their steps.    Source: iDDPM Sec. 4 (striding).
    """
    text = RESPACINGS.get(str(steps), str(steps))
    try:
        counts = [int(c) for c in text.split(",")]
    except ValueError:
        known = ", ".join(RESPACINGS)
        raise ValueError(f"steps must be a count, a list like '10,10,3' or one of {known}, got {steps!r}") from None
    if counts == [1]:
        return torch.tensor([num_train_timesteps - 1])
    size, larger = divmod(num_train_timesteps, len(counts))
    times, begin = [], 0
    for i, count in enumerate(counts):
        n = size + (i < larger)
        _check_count(count, n)
        spacing, position = (n - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            times.append(begin + round(position))
            position += spacing  # summed up, as in the original: rounding decides ties (super40 visits 949, not 950)
        begin += n
    return torch.tensor(times[::-1])


def check_timesteps(timesteps: torch.Tensor, num_train_timesteps: int) -> None:
    """Raise ValueError unless timesteps is a non-empty descending row of whole numbers inside 0..T-1."""
    if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or timesteps.is_floating_point():
        is_tensor = isinstance(timesteps, torch.Tensor)
        kind = f"{tuple(timesteps.shape)} of {timesteps.dtype}" if is_tensor else f"{timesteps!r:.60}"
        raise ValueError(f"timesteps are one row of whole numbers, got {kind}; a count of steps is a plain number")
    ts = timesteps.tolist()
    if not ts:
        raise ValueError("timesteps are empty; pass for example schedule.respaced(27)")
    for a, b in zip(ts, ts[1:]):
        if a <= b:
            raise ValueError(f"timesteps must descend, got {a} before {b}; pass schedule.strided(990, 0, 30), for one")
    if ts[-1] < 0 or ts[0] >= num_train_timesteps:
        raise ValueError(f"timesteps must lie in 0..{num_train_timesteps - 1}, got {ts[0]} to {ts[-1]}")


def _check_count(steps: int, available: int) -> None:
    if not 1 <= steps <= available:
        raise ValueError(f"cannot take {steps} steps out of {available}; choose 1 to {available}")
