"""The one formula: what it is when views and components do nothing, and what anagrams and hybrids must obey."""

import pytest
import torch

from minidiff import components, toy, views
from minidiff.factorized import Part, alternating, averaged, factorized
from minidiff.guidance import guided
from minidiff.sampling import denoise, draw_noise, final, seeded
from minidiff.schedule import respaced, squaredcos_cap_v2
from tests.reference.fill import normal

SCHEDULE = squaredcos_cap_v2()
MIXTURE = toy.Mixture(SCHEDULE, normal("factorized.means", 3, 3, 8, 8).tanh().double(), 0.3)
EMPTY = MIXTURE.empty_prompt().double()
X, T = normal("factorized.x", 2, 3, 8, 8).double(), torch.tensor([300, 700])
TURN = views.named("rotate_cw")


def prompt(k):
    return MIXTURE.prompt(k).double()


def network(x_t, t, prompt_embeds):
    """Stands in for a network with no symmetry at all: position, time, text and input all matter, the variance too."""
    place = torch.linspace(-1, 1, x_t.shape[-1], dtype=x_t.dtype)
    text = prompt_embeds[:, 0, :1, None, None] + 2 * prompt_embeds[:, 0, 1:2, None, None]
    eps = (x_t * (1 + place) + place[:, None] * text + t.view(-1, 1, 1, 1) / 1000).sin()
    return eps, (eps * place + text).tanh()


def close(a, b, atol=1e-12):
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("model", [MIXTURE, network])
def test_one_part_or_the_same_part_often_is_plain_guidance(model):
    plain = guided(model, prompt(1), EMPTY, 4.0)(X, T)
    close(factorized(model, [Part(prompt(1))], EMPTY, 4.0)(X, T), plain)
    close(factorized(model, averaged(*[Part(prompt(1))] * 3), EMPTY, 4.0)(X, T), plain)


def test_components_of_one_prompt_are_plain_guidance():
    """The low, middle and high frequencies of one prompt add up to it; pred_var is the mean of equal ones."""
    x = normal("factorized.large", 1, 3, 64, 64).double()
    plain = guided(network, prompt(0), EMPTY, 3.0)(x, T[:1])
    for kind in ("frequency", "triple", "color", "motion"):
        parts = [Part(prompt(0), component=c) for c in components.of_kind(kind)]
        close(factorized(network, parts, EMPTY, 3.0)(x, T[:1]), plain, 1e-10)


def test_the_formula_term_by_term():
    """Two parts by hand: CFG of each view, turned back, cut to its component, summed; the variance turned, averaged."""
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64)  # a component that a turn does not leave alone
    parts = [Part(prompt(0), TURN, lambda x: ramp * x), Part(prompt(2), views.named("negate"), components.scaled(0.3))]
    eps, pred_var = factorized(network, parts, EMPTY, 2.5)(X, T)
    one, var_one = guided(network, prompt(0), EMPTY, 2.5)(X.rot90(-1, (-2, -1)), T)
    two, var_two = guided(network, prompt(2), EMPTY, 2.5)(-X, T)
    torch.testing.assert_close(eps, ramp * one.rot90(1, (-2, -1)) - 0.3 * two)
    torch.testing.assert_close(pred_var, (var_one.rot90(1, (-2, -1)) + var_two) / 2)


def test_one_batch_or_many_calls_and_the_size_of_the_batch():
    parts = [Part(prompt(0)), Part(prompt(1), TURN), Part(prompt(2), views.named("flip"))]
    sizes = []

    def counting(x, t, e):
        sizes.append(len(x))
        return network(x, t, e)

    together = factorized(counting, parts, EMPTY, 2.0)(X, T)
    assert sizes == [3 * 2 * 2]
    sizes.clear()
    close(factorized(counting, parts, EMPTY, 2.0, split_batch=True)(X, T), together)
    assert sizes == [2] * 6


def test_the_order_of_parts_does_not_matter():
    parts = [Part(prompt(0)), Part(prompt(1), TURN)]
    close(factorized(network, parts[::-1], EMPTY, 2.0)(X, T), factorized(network, parts, EMPTY, 2.0)(X, T))


def test_scaled_parts_are_guidance_itself():
    """(1 - g) "" + g p without guidance is CFG with g."""
    parts = [Part(EMPTY, component=components.scaled(1 - 6.0)), Part(prompt(1), component=components.scaled(6.0))]
    eps, _ = factorized(network, parts, EMPTY, 1.0)(X, T)
    torch.testing.assert_close(eps, guided(network, prompt(1), EMPTY, 6.0)(X, T)[0])


@pytest.mark.parametrize("name", ["rotate_cw", "flip", "patch_permute:4", "negate"])
def test_anagrams_turn_with_the_noise(name):
    """From noise z with views (id, v) and prompts (p, q) comes what v^-1 makes of the run from v(z) with views
    (id, v^-1) and prompts (q, p). No noise is added in the steps."""
    view = views.named(name)
    back = views.View("back", view.inverse_view, view.view, view.view if name != "negate" else lambda x: x)
    z = normal("factorized.z", 1, 3, 8, 8).double()

    def run(x_t, first, second, turned):
        parts = averaged(Part(prompt(first)), Part(prompt(second), turned))
        predict = factorized(MIXTURE, parts, EMPTY, 2.0)
        for t, t_prev in ((900, 600), (600, 300), (300, -1)):  # DDIM-like: keep eps, no new noise
            a, b = (SCHEDULE.alpha_bar(torch.tensor([s])) for s in (t, t_prev))
            eps, _ = predict(x_t, torch.tensor([t]))
            x_t = b.sqrt() * (x_t - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        return x_t

    torch.testing.assert_close(run(z, 0, 1, view), view.inverse_view(run(view.view(z), 1, 0, back)), rtol=0, atol=1e-8)


def test_a_perfect_anagram_satisfies_both_prompts():
    """If one prompt's only image is the other's turned, the anagram of the two is that image."""
    image = normal("factorized.picture", 3, 8, 8).tanh()
    mixture = toy.Mixture(SCHEDULE, torch.stack([image, image.rot90(-1, (-2, -1)), -image]), 0.0)
    parts = averaged(Part(mixture.prompt(0)), Part(mixture.prompt(1), TURN))
    predict = factorized(mixture, parts, mixture.empty_prompt(), 1.0)
    x = final(denoise(predict, draw_noise((1, 3, 8, 8), seeded([0])), respaced(20), SCHEDULE, seeded([1])))
    torch.testing.assert_close(x[0], image, rtol=0, atol=1e-4)


def test_a_perfect_hybrid_has_both_components():
    """With one image per prompt, the result has the low frequencies of one and the high ones of the other."""
    images = normal("factorized.pictures", 2, 3, 64, 64).tanh()
    mixture = toy.Mixture(SCHEDULE, images, 0.0)
    low, high = components.of_kind("frequency")
    parts = [Part(mixture.prompt(0), component=low), Part(mixture.prompt(1), component=high)]
    predict = factorized(mixture, parts, mixture.empty_prompt(), 1.0)
    x = final(denoise(predict, draw_noise((1, 3, 64, 64), seeded([0])), respaced(10), SCHEDULE, seeded([1])))
    torch.testing.assert_close(x, low(images[:1]) + high(images[1:]), rtol=0, atol=1e-3)


def test_taking_turns():
    """Step i asks prediction i modulo their number, and only that."""
    calls = []

    def one(name):
        return lambda x, t: calls.append((name, int(t[0]))) or (torch.zeros_like(x), None)

    timesteps = torch.tensor([900, 700, 500, 300, 100])
    predict = alternating([one("a"), one("b")], timesteps)
    final(denoise(predict, torch.zeros(1, 1, 2, 2), timesteps, SCHEDULE, seeded([0])))
    assert calls == [("a", 900), ("b", 700), ("a", 500), ("b", 300), ("a", 100)]
    with pytest.raises(ValueError, match="time 42 is not among the timesteps whose turns were given"):
        predict(torch.zeros(1, 1, 2, 2), torch.tensor([42]))


@pytest.mark.parametrize("split_batch", [False, True])
def test_at_guidance_0_the_prompts_have_no_say(split_batch):
    """Only the negative prompt goes into the network, and of two prompts the answers are equal, the variance too."""
    texts = []

    def recording(x, t, e):
        texts.append(e)
        return network(x, t, e)

    def run(*ks):
        parts = averaged(*(Part(prompt(k), view) for k, view in zip(ks, (views.IDENTITY, TURN))))
        return factorized(recording, parts, EMPTY, 0.0, split_batch)(X, T)

    for a, b in zip(run(0, 1), run(2, 0)):
        assert torch.equal(a, b)
    assert all((e == EMPTY).all() for e in texts) and sum(map(len, texts)) == 2 * 2 * 2


def test_stage_2_channels_are_viewed_together():
    """Six channels go in turned, the low-resolution image with the noisy one; three come out and are turned back."""
    inputs = []

    def model(x_t, t, prompt_embeds):
        inputs.append(x_t)
        return x_t[:, :3], None

    x = normal("factorized.six", 1, 6, 8, 8)
    eps, pred_var = factorized(model, [Part(prompt(0), TURN)], EMPTY, 1.0)(x, T[:1])
    assert torch.equal(inputs[0], x.rot90(-1, (-2, -1))) and torch.equal(eps, x[:, :3]) and pred_var is None


def test_no_parts():
    with pytest.raises(ValueError, match="no parts; pass at least one prompt"):
        factorized(network, [], EMPTY, 1.0)


def test_averaging_keeps_the_component():
    part = averaged(Part(prompt(0), component=components.grey), Part(prompt(1)))[0]
    torch.testing.assert_close(part.component(X), components.grey(X) / 2)
