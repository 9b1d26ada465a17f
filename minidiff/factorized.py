"""The one formula behind anagrams, hybrids and compositions: a sum over prompts, each with a view and a component.

    eps(x_t) = sum_k  C_k( V_k^-1( CFG( V_k x_t, prompt_k ) ) )

Read `guidance.py` first; `views.py` and `components.py` hold functions of an image. With one part, the identity view
and the whole image this is plain guidance. With views and C_k(x) = x / K it is an anagram, with components that add up
to the whole a hybrid image. A part may have both a view and a component. All K parts and both branches of guidance are
one batch for the network, unless split_batch.

Source: the papers Visual Anagrams and Factorized Diffusion; checked against dangeng/visual_anagrams
visual_anagrams/samplers.py@14582c0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minidiff.checks import short
from minidiff.components import Component, scaled, whole
from minidiff.guidance import Model, Scale, guided
from minidiff.sampling import Prediction
from minidiff.views import IDENTITY, View, named


@dataclass(frozen=True)
class Part:
    """One prompt, with its view and its component.

    prompt: a text, which a `Cascade` encodes, or its states, (1, L, D), or (B, L, D) for B images.
    """

    prompt: str | Tensor
    view: View = IDENTITY
    component: Component = whole

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str | Tensor):
            raise ValueError(f"a prompt is a text, or its states, got {short(self.prompt)}; each has a Part of its own")
        if not (isinstance(self.view, View) and callable(self.component)):
            raise ValueError("a Part is a prompt, a view and a component, such as Part('a volcano', "
                             f"views.named('flip')), got {short(self.view)} and {short(self.component)}")  # fmt: skip


def check_parts(parts: Sequence[Part]) -> None:
    """Raises ValueError unless these are parts, one at least."""
    if not isinstance(parts, Sequence) or not all(isinstance(part, Part) for part in parts):
        raise ValueError(f"parts are a list of Part, such as [Part('a volcano')], got {short(parts)}")
    if not parts:
        raise ValueError("no parts; pass at least one prompt")


def factorized(
    model: Model, parts: Sequence[Part], negative_prompt_embeds: Tensor, guidance_scale: Scale,
    split_batch: bool = False,
) -> Prediction:  # fmt: skip
    """The prediction of several parts together, each with states as its prompt.

        eps = sum_k C_k( V_k^-1( CFG( V_k x_t, prompt_k ) ) )

    negative_prompt_embeds: (1, L, D), shared by all parts.
    In stage 2 x_t has 6 channels, 3 of the noisy image and 3 of the low-resolution one; a view moves all of them.
    pred_var is the mean of those that `guided` gives, moved back by the view; components do not touch it.
    split_batch: one network call per part and branch, with a fraction of the memory.
    Raises ValueError without parts, or if their states differ in length or width.    Source: Factorized Diffusion.
    """
    check_parts(parts)
    (*_, L, D), shapes = negative_prompt_embeds.shape, [tuple(part.prompt.shape[-2:]) for part in parts]
    if set(shapes) != {(L, D)}:
        raise ValueError(f"the parts' states are {shapes}, those of the negative prompt {(L, D)}; encode all prompts "
                         "with one text encoder")  # fmt: skip

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = [part.view.view(x_t) for part in parts]
        embeds = [part.prompt.expand(len(x_t), -1, -1) for part in parts]
        if split_batch:
            each = [guided(model, e, negative_prompt_embeds, guidance_scale, True) for e in embeds]
            answers = [ask(x, t) for ask, x in zip(each, inputs)]
        else:
            ask = guided(model, torch.cat(embeds), negative_prompt_embeds, guidance_scale)
            eps, pred_var = ask(torch.cat(inputs), t.repeat(len(parts)))
            variances = [None] * len(parts) if pred_var is None else pred_var.chunk(len(parts))
            answers = list(zip(eps.chunk(len(parts)), variances))
        eps = sum(part.component(part.view.inverse_view(eps)) for part, (eps, _) in zip(parts, answers))
        if answers[0][1] is None:
            return eps, None
        pred_var = sum(part.view.inverse_variance(var) for part, (_, var) in zip(parts, answers)) / len(parts)
        return eps, pred_var

    return predict


def listed(texts: str | Sequence[str]) -> list[str]:
    """Prompts or names as a list: a single text becomes a list of one. Raises ValueError on None."""
    if texts is None:
        raise ValueError("pass a text, or a list of texts, got None")
    return [texts] if isinstance(texts, str) else list(texts)


def through_views(prompts: str | Sequence[str | Tensor], view_names: str | Sequence[str | View]) -> list[Part]:
    """A part for each prompt, seen through its view. Raises ValueError unless there is one view for each prompt."""
    prompts, view_names = listed(prompts), listed(view_names)
    if len(prompts) != len(view_names):
        raise ValueError(f"{len(prompts)} prompts need as many views, got {len(view_names)}")
    return [Part(prompt, named(name)) for prompt, name in zip(prompts, view_names)]


def averaged(*parts: Part) -> list[Part]:
    """The same parts, the component of each multiplied by 1/K: what an anagram is made of.

        eps = 1/K sum_k V_k^-1( CFG( V_k x_t, prompt_k ) )

    A part with a component of its own keeps it: C_k( ) / K.    Raises ValueError as `check_parts`.
    Source: Visual Anagrams.
    """
    check_parts(parts)

    def share(component: Component) -> Component:
        return lambda x: scaled(1 / len(parts))(component(x))

    return [replace(part, component=share(part.component)) for part in parts]


class InTurns(tuple[Part, ...]):
    """Parts that take turns: step i asks the i-th alone, and begins anew after the last. Cheaper than a mean, noisier.

    They are not `averaged`: each decides its step alone.
    """


def alternating(predictions: Sequence[Prediction], timesteps: Tensor) -> Prediction:
    """Take turns: at each of the timesteps one prediction is asked, the first, then the second, and so on round.

    Raises ValueError at a time that is not among timesteps.
    """
    turn = {t: i % len(predictions) for i, t in enumerate(timesteps.tolist())}

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        now = int(t[0])
        if now not in turn:
            raise ValueError(f"time {now} is not among the timesteps whose turns were given")
        return predictions[turn[now]](x_t, t)

    return predict
