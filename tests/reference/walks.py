"""Record whole walks of diffusers' deterministic samplers. `make.py` imports this file; tests/test_solvers.py compares.

Every walk asks one smooth function in place of a network, and starts from one noise. The tests repeat both formulas.
Tables are float64, as in minidiff; `released` is the end of the same walk by the scheduler as diffusers ships it, with
tables that it multiplies up in float32.
"""

from unittest import mock

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from fill import normal
from torch import Tensor

SHAPE = (2, 1, 2, 2)
STEPS = (5, 10, 15, 25)
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
DPM = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
    "final_sigmas_type": "zero", "lambda_min_clipped": -5.1,
}  # fmt: skip

# name: eta, thresholding, eps computed again from the thresholded estimate
DDIM_WALKS = {
    "ddim": (0.0, False, False),
    "ddim_eta": (0.7, False, False),
    "ddim_threshold": (0.0, True, False),
    "ddim_eta_threshold": (0.7, True, False),
    "ddim_threshold_new_eps": (0.0, True, True),
    "ddim_eta_threshold_new_eps": (0.7, True, True),
}


def answer(x_t: Tensor, t: int, alpha_bar_t: float) -> Tensor:
    """eps of a model whose estimate is a smooth function of x_t and t, and leaves [-1, 1]: thresholding has work."""
    x_start = 1.8 * torch.tanh(0.7 * x_t + 0.3 * torch.cos(torch.tensor(t / 100, dtype=x_t.dtype)))
    return (x_t - alpha_bar_t**0.5 * x_start) / (1 - alpha_bar_t) ** 0.5


def ddim_walk(made: DDIMScheduler, alphas: Tensor, times: list[int], eta: float, new_eps: bool) -> list[Tensor]:
    """(x_prev, pred_x_start) of every step, stacked. The scheduler reads the step's length t - t_prev off two numbers,
    num_train_timesteps // num_inference_steps, and both are set here, so that any list of times can be walked."""
    x, rows = normal("solvers.x_T", *SHAPE).double(), []
    for i, (t, t_prev) in enumerate(zip(times, [*times[1:], -1])):
        made.register_to_config(num_train_timesteps=t - t_prev)
        made.num_inference_steps = 1
        z = normal(f"solvers.{i}.noise", *SHAPE).double()
        eps = answer(x, t, alphas[t].item())
        result = made.step(eps, t, x, eta=eta, use_clipped_model_output=new_eps, variance_noise=z)
        x = result.prev_sample
        rows.append(torch.stack([x, result.pred_original_sample]))
    return rows


def dpm_walk(made: DPMSolverMultistepScheduler, alphas: Tensor) -> list[Tensor]:
    """(x_prev, pred_x_start) of every step, stacked."""
    x, rows = normal("solvers.x_T", *SHAPE).double(), []
    for t in made.timesteps.tolist():
        x = made.step(answer(x, t, alphas[t].item()), t, x).prev_sample
        rows.append(torch.stack([x, made.model_outputs[-1]]))
    return rows


def inverse_walk(made: DDIMInverseScheduler, alphas: Tensor) -> list[Tensor]:
    """x after every step up, from an image of order 1. A step from t_prev to t asks the model at (x of t_prev, t)."""
    x, rows = normal("solvers.image", *SHAPE).double().tanh(), []
    for t in made.timesteps.tolist():
        x = made.step(answer(x, t, alphas[t].item()), t, x).prev_sample
        rows.append(x)
    return rows


def exact_dpm_walk(made: DPMSolverMultistepScheduler, alphas: Tensor) -> list[Tensor]:
    """The same from float64 tables. The scheduler casts sigmas and states to torch.float32, which is patched."""
    sigmas = ((1 - alphas) / alphas).sqrt()[made.timesteps]
    made.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    with mock.patch.object(torch, "float32", torch.float64):
        return dpm_walk(made, alphas)


def record(alphas: Tensor, respaced: dict[int, list[int]]) -> tuple[dict[str, Tensor], dict]:
    """All tensors, and what the schedulers decide by themselves: their lists of times.

    alphas: (1000,) float64, alpha-bar.  respaced: minidiff.schedule.respaced of each of STEPS.
    """
    out, about = {}, {"times": {}, "steps": "each walk: (S, 2, B, C, H, W), x_prev and pred_x_start of every step"}
    for n in STEPS:
        for name, (eta, thresholding, new_eps) in DDIM_WALKS.items():
            for table in ("float64", "released"):
                made = DDIMScheduler(**COSINE, clip_sample=False, **(THRESHOLD if thresholding else {}))
                if table == "float64":
                    made.alphas_cumprod, made.final_alpha_cumprod = alphas, alphas.new_ones(())
                rows = ddim_walk(made, alphas, respaced[n], eta, new_eps)
                keep(out, f"{name}.respaced.{n}", table, rows)
        for spacing in ("respaced", "default"):
            for thresholding in (False, True):
                name = f"dpm{'_threshold' if thresholding else ''}.{spacing}.{n}"
                for table, walk in (("float64", exact_dpm_walk), ("released", dpm_walk)):
                    made = DPMSolverMultistepScheduler(**COSINE, **DPM, **(THRESHOLD if thresholding else {}))
                    made.set_timesteps(timesteps=respaced[n]) if spacing == "respaced" else made.set_timesteps(n)
                    about["times"][f"dpm.{spacing}.{n}"] = made.timesteps.tolist()
                    keep(out, name, table, walk(made, alphas))
    made = DDIMInverseScheduler(**COSINE, clip_sample=False)
    made.alphas_cumprod, made.initial_alpha_cumprod = alphas, alphas.new_ones(())
    made.set_timesteps(10)
    about["times"]["inverse"] = made.timesteps.tolist()
    out["inverse"] = torch.stack(inverse_walk(made, alphas))
    return out, {**about, **decisions(alphas)}


def keep(out: dict[str, Tensor], name: str, table: str, rows: list[Tensor]) -> None:
    if table == "float64":
        out[name] = torch.stack(rows)
    else:
        out[f"{name}.released"] = rows[-1][0].float()


def decisions(alphas: Tensor) -> dict:
    """Where each scheduler starts and how DDIM ends; lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar))."""
    made, ddim = DPMSolverMultistepScheduler(**COSINE, **DPM), DDIMScheduler(**COSINE)
    made.set_timesteps(timesteps=[999, 500])
    sigma_999 = made.sigmas[0].item()
    made.set_timesteps(10)
    ddim.set_timesteps(15)
    return {
        "dpm_first_time": made.timesteps[0].item(),
        "dpm_lambda_at_994_to_999": (0.5 * (alphas / (1 - alphas)).log())[994:].tolist(),
        "dpm_sigma_of_a_custom_list_at_999": sigma_999,  # not clipped: clipping only shortens the scheduler's list
        "ddim_default_times_15": ddim.timesteps.tolist(),
        "ddim_final_alpha_bar": ddim.final_alpha_cumprod.item(),
    }
