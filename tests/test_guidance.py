"""Guidance as a wrapper, and what dynamic thresholding leaves alone. Their equations: test_equations.py."""

import pytest
import torch

from minidiff import toy
from minidiff.guidance import combine, dynamic_threshold, guided, quantile
from minidiff.sampling import denoise, draw_noise, final, seeded
from minidiff.schedule import respaced, squaredcos_cap_v2

SCHEDULE = squaredcos_cap_v2()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(x_t, t, prompt_embeds):
    """A stand-in network: eps and variance depend on the image, the time and the text, row by row."""
    text = prompt_embeds.sum((1, 2)).view(-1, 1, 1, 1)
    return x_t * text + t.view(-1, 1, 1, 1) / 1000, text.expand_as(x_t) * 0.1


def test_one_batch_equals_two_calls_and_takes_the_conditional_variance():
    x_t, t = noise(3, 3, 4, 4), torch.tensor([10, 500, 900])
    cond, uncond = noise(3, 5, 7, seed=2), noise(1, 5, 7, seed=3)
    eps, pred_var = guided(model, cond, uncond, 7.0)(x_t, t)
    split = guided(model, cond, uncond, 7.0, split_batch=True)(x_t, t)
    assert torch.equal(eps, split[0]) and torch.equal(pred_var, split[1])
    by_hand = combine(model(x_t, t, uncond.expand(3, -1, -1))[0], model(x_t, t, cond)[0], 7.0)
    torch.testing.assert_close(eps, by_hand, rtol=1e-10, atol=1e-12)
    assert torch.equal(pred_var, model(x_t, t, cond)[1])


@pytest.mark.parametrize("split_batch", [False, True])
def test_a_function_in_place_of_the_scale_mixes_the_branches(split_batch):
    x_t, t, cond, uncond = noise(2, 3, 4, 4), torch.tensor([1, 2]), noise(2, 5, 7), noise(1, 5, 7, seed=3)
    eps, pred_var = guided(model, cond, uncond, lambda u, c: u - 3 * c, split_batch)(x_t, t)
    of_uncond, of_cond = model(x_t, t, uncond.expand(2, -1, -1)), model(x_t, t, cond)
    assert torch.equal(eps, of_uncond[0] - 3 * of_cond[0]) and torch.equal(pred_var, of_cond[1])
    by_scale, by_rule = (guided(model, cond, uncond, s)(x_t, t)[0] for s in (7, lambda u, c: combine(u, c, 7)))
    assert torch.equal(by_scale, by_rule)


def test_scale_1_is_conditional_in_one_call():
    sizes = []

    def counting(x_t, t, prompt_embeds):
        sizes.append(len(x_t))
        return model(x_t, t, prompt_embeds)

    x_t, t, cond = noise(2, 3, 4, 4), torch.tensor([1, 2]), noise(2, 5, 7)
    eps, pred_var = guided(counting, cond, torch.zeros_like(cond), 1.0)(x_t, t)
    assert sizes == [2] and torch.equal(eps, model(x_t, t, cond)[0]) and torch.equal(pred_var, model(x_t, t, cond)[1])


@pytest.mark.parametrize("split_batch", [False, True])
def test_scale_0_is_unconditional_in_one_call_without_the_prompt(split_batch):
    """Imagen Eq. 2 at 0: neither eps nor the variance depends on the prompt, which the network does not read."""
    texts = []

    def recording(x_t, t, prompt_embeds):
        texts.append(prompt_embeds)
        return model(x_t, t, prompt_embeds)

    x_t, t, uncond = noise(2, 3, 4, 4), torch.tensor([1, 2]), noise(1, 5, 7, seed=3)
    eps, pred_var = guided(recording, noise(2, 5, 7), uncond, 0.0, split_batch)(x_t, t)
    expected = model(x_t, t, uncond.expand(2, -1, -1))
    assert torch.equal(eps, expected[0]) and torch.equal(pred_var, expected[1])
    assert len(texts) == 1 and torch.equal(texts[0], uncond.expand(2, -1, -1))


def test_equal_prompts_make_the_scale_irrelevant():
    x_t, t, cond = noise(2, 3, 4, 4), torch.tensor([1, 2]), noise(2, 5, 7)
    for scale in (0.0, 3.0, 15.0):
        torch.testing.assert_close(guided(model, cond, cond, scale)(x_t, t)[0], model(x_t, t, cond)[0])


def test_a_model_without_learned_variance_stays_without():
    eps, pred_var = guided(lambda x, t, e: (x, None), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 5.0)(
        noise(2, 3, 4, 4), torch.tensor([1, 2])
    )
    assert pred_var is None and eps.shape == (2, 3, 4, 4)


def test_guidance_moves_samples_to_the_prompt_and_narrows_them():
    """A mixture with known answers: more guidance lands further on the prompt's side, and spreads less."""
    mixture = toy.Mixture(SCHEDULE, torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1), 0.4)
    means, stds = [], []
    for scale in (0.0, 1.0, 2.0, 4.0):
        generators = seeded(range(600))
        predict = guided(mixture, mixture.prompt(1), mixture.empty_prompt(), scale)
        x = final(denoise(predict, draw_noise((600, 1, 1, 1), generators), respaced(30), SCHEDULE, generators))
        means.append(x.mean().item())
        stds.append(x.std().item())
    assert means == sorted(means) and abs(means[1] - 0.5) < 5 * 0.4 / 600**0.5 + 0.02
    assert stds == sorted(stds, reverse=True)


def test_dynamic_threshold_leaves_what_is_in_range_and_treats_each_image_alone():
    small, large = torch.linspace(-0.9, 0.9, 12).view(1, 3, 2, 2), torch.linspace(-4, 4, 12).view(1, 3, 2, 2)
    fixed = dynamic_threshold()(torch.cat([small, large]))
    assert torch.equal(fixed[:1], small)
    assert torch.equal(fixed[1:], dynamic_threshold()(large)) and fixed.abs().max() == 1


def test_dynamic_threshold_with_cap_1_is_a_clamp():
    x = 3 * noise(2, 3, 8, 8)
    assert torch.equal(dynamic_threshold(0.95, 1.0)(x.float()), x.float().clamp(-1, 1))


def test_quantile_equals_torch():
    x = noise(3, 1001).float()
    for ratio in (0.01, 0.5, 0.95, 1.0):
        torch.testing.assert_close(quantile(x, ratio), torch.quantile(x, ratio, dim=1))


def test_a_threshold_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="0 < ratio <= 1 and max_value >= 1, got 1.5 and 1.0"):
        dynamic_threshold(1.5, 1.0)
    with pytest.raises(ValueError, match="got 0.95 and 0.5"):
        dynamic_threshold(0.95, 0.5)
