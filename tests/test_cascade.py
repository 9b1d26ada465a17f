"""The door: both stages from noise to image, against diffusers' pipelines with the same tiny networks, texts and
noise; and what Python users rely on: the same result by every way in, settings, what is read when, errors."""

import functools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import minidiff.cascade
from minidiff import anagram, ddpm, images, schedule, solvers, views
from minidiff.cascade import DEFAULTS, EDIT_LARGE, EDIT_SMALL, KEPT, Cascade, Settings, last_start
from minidiff.deepfloyd import stages
from minidiff.deepfloyd.stages import base_model
from minidiff.factorized import InTurns, Part, averaged, factorized
from minidiff.guidance import guided
from minidiff.hybrid import hybrid
from minidiff.inpaint import inpaint
from minidiff.sampling import denoise, draw_noise, final, network_calls, noised, other_stream, seeded, visits
from minidiff.sdedit import sdedit
from minidiff.views import IDENTITY
from tests.reference.fill import HERE, normal, read, relative_l2
from tests.tiny import recorded_cascade, write_cascade

REFERENCE = read("stages")
COSINE = schedule.squaredcos_cap_v2()
LOW_RES = normal("stages.low_res", 2, 3, 4, 4).tanh()
WALKS = {"ten": schedule.leading(10), "fast27": schedule.respaced("fast27")}
FEW = schedule.leading(3)
recorded = functools.cache(recorded_cascade)


@pytest.fixture
def cascade():
    """The recorded networks behind a cascade of the test's own."""
    return recorded_cascade()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def tiny(folders):
    """The tiny cascade as its folders give it, at 64 and 256 pixels, with few steps."""
    cascade = Cascade.load(*map(str, folders), dtype=torch.float32)
    cascade.settings[:] = Settings(3, 5.0), Settings(1, 1.0)
    return cascade


def parts_of(cascade: Cascade, *prompts: str) -> list[Part]:
    return [Part(states) for states in cascade.encode(*prompts)]


def with_text(i: int) -> Cascade:
    """The recorded cascade with the i-th negative prompt."""
    cascade = recorded()
    cascade.settings[:] = (s.but(negative_prompt=f"negative {i}") for s in cascade.settings)
    return cascade


def base(i: int = 0, **options: object) -> Tensor:
    """The i-th image of the recorded stage 1."""
    cascade = with_text(i)
    return cascade.draw(parts_of(cascade, f"prompt {i}"), [5 + i], **options)


def enlarged(i: int = 0, **options: object) -> Tensor:
    """The i-th image of the recorded stage 2."""
    cascade = with_text(i)
    return cascade.enlarge(LOW_RES[i : i + 1], parts_of(cascade, f"prompt {i}"), [7 + i], **options)


@functools.cache
def plain() -> tuple[Tensor, Tensor]:
    """What both stages draw with nothing but their settings."""
    return torch.cat([base(0), base(1)]), torch.cat([enlarged(0), enlarged(1)])


# --- against diffusers' pipelines -------------------------------------------------------------------------------------


def test_the_random_stream_is_the_recorded_one():
    """If this fails, torch draws other numbers than it did; the tests below then say nothing about the code."""
    torch.testing.assert_close(draw_noise((1, 3, 8, 8), seeded([5])), REFERENCE["first_draw_of_seed_5"])


def test_order_of_draws_is_the_recorded_one():
    """diffusers draws x_T, in stage 2 then the noise on the low-resolution image, then one per step but the last."""
    with safe_open(HERE / "stages.safetensors", "pt") as f:
        draws = json.loads(f.metadata()["provenance"])["draws"]
    assert draws["stage_1.ten"] == [[2, 3, 8, 8]] * (1 + 9)
    assert draws["stage_1.fast27"] == [[2, 3, 8, 8]] * (1 + 26)
    assert draws["stage_2"] == [[2, 3, 16, 16]] * (1 + 1 + 4)


def test_the_last_step_draws_nothing(cascade):
    """After a walk of three steps a generator stands where x_T and two noises leave it."""
    (used,), (fresh,) = seeded([5]), seeded([5])
    cascade.draw(parts_of(cascade, "prompt 0"), [used], steps=FEW)
    for _ in range(3):
        draw_noise((1, 3, 8, 8), [fresh])
    assert torch.equal(torch.randn(4, generator=used), torch.randn(4, generator=fresh))


@pytest.mark.parametrize("walk", WALKS)
def test_stage_1_against_diffusers(walk):
    """Guidance 7 and the steps magnify rounding a few times: 2e-5. With diffusers' own float32 tables the step into
    t = 0 differs by up to 1e-4 more."""
    x = plain()[0] if walk == "ten" else torch.cat([base(i, steps=WALKS[walk]) for i in (0, 1)])
    assert x.dtype == torch.float32
    assert relative_l2(x, REFERENCE[f"stage_1.{walk}.float64"]) <= 2e-5
    assert relative_l2(x, REFERENCE[f"stage_1.{walk}.released"]) <= 2e-4


def test_stage_2_against_diffusers():
    """As stage 1, with guidance 4 and noise level 250; the low-resolution image is enlarged and noised once."""
    x = plain()[1]
    assert x.shape == (2, 3, 16, 16)
    assert relative_l2(x, REFERENCE["stage_2.float64"]) <= 2e-5
    assert relative_l2(x, REFERENCE["stage_2.released"]) <= 2e-4


# --- what must not depend on the way in -------------------------------------------------------------------------------


def test_an_image_depends_on_its_seed_only():
    """Two images in one batch, each with its prompt, are the two drawn alone, up to rounding."""
    cascade = with_text(0)
    both = [Part(torch.cat(cascade.encode("prompt 0", "prompt 1")))]
    x = cascade.draw(both, [5, 6], steps=FEW)
    alone = [cascade.draw(parts_of(cascade, f"prompt {i}"), [5 + i], steps=FEW) for i in (0, 1)]
    assert relative_l2(x, torch.cat(alone)) <= 2e-5
    assert torch.equal(cascade.draw(parts_of(cascade, "prompt 0"), seeded([5]), steps=FEW), alone[0])
    x = cascade.enlarge(LOW_RES, both, [7, 8], steps=FEW)
    alone = [cascade.enlarge(LOW_RES[i : i + 1], parts_of(cascade, f"prompt {i}"), [7 + i], steps=FEW) for i in (0, 1)]
    assert relative_l2(x, torch.cat(alone)) <= 2e-5


def test_splitting_the_batch_changes_nothing(cascade):
    parts = averaged(*parts_of(cascade, "prompt 0", "prompt 1"))
    whole = cascade.draw(parts, [5], steps=FEW)
    large = cascade.enlarge(LOW_RES, parts, [7, 8], steps=FEW)
    cascade.split_batch = True
    sizes = batch_sizes(cascade, 1)
    assert relative_l2(cascade.draw(parts, [5], steps=FEW), whole) <= 2e-5
    assert relative_l2(cascade.enlarge(LOW_RES, parts, [7, 8], steps=FEW), large) <= 2e-5
    assert sizes == [1] * 3 * 2 * 2  # three steps, two prompts, with and without


def batch_sizes(cascade: Cascade, number: int) -> list[int]:
    """A list that grows with the batch of every network call."""
    sizes: list[int] = []
    cascade.stage(number).unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_guidance_scale_and_noise_level_matter():
    assert relative_l2(base(guidance_scale=2.0), plain()[0][:1]) > 1e-2
    assert relative_l2(enlarged(noise_level=50), plain()[1][:1]) > 1e-2


def test_the_course_walk_is_the_bare_loop(cascade):
    """As the course walks: nothing touches the estimate, which then leaves [-1, 1] and leads elsewhere; and the walk
    stops at t = 0, one step before clean."""
    parts, image = parts_of(cascade, "prompt 0"), torch.zeros(1, 3, 8, 8)
    bare = cascade.draw(parts, [5], steps="course", image=image, i_start=25)
    (generator,) = other_stream(seeded([5]), EDIT_SMALL)
    predict = guided(base_model(cascade.stage(1).unet), *cascade.encode("prompt 0", ""), 7.0)
    x_t, timesteps = noised(image, 240, COSINE, [generator]), torch.arange(990, -1, -30)[25:]
    assert torch.equal(bare, final(denoise(predict, x_t, timesteps, COSINE, [generator], final_step=False)))
    assert relative_l2(bare, cascade.draw(parts, [5], steps=timesteps, image=image)) > 1e-3


def test_upsampled_and_noised_to_its_level_stage_2_reads_the_small_image(cascade):
    """sqrt(alpha_bar_100) of the enlarged image plus sqrt(1 - alpha_bar_100) of the second draw, in channels 3 to 5,
    the same in every step."""
    inputs, low_res = [], normal("stages.low_res", 1, 3, 4, 4).tanh()
    cascade.stage(2).unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    cascade.enlarge(low_res, parts_of(cascade, "prompt 0"), [3], steps=schedule.leading(2), noise_level=100)
    (generator,) = seeded([3])
    x_T, noise = (torch.randn((1, 3, 16, 16), generator=generator) for _ in range(2))
    large = F.interpolate(low_res, (16, 16), mode="bilinear", align_corners=True)
    noisy = ddpm.add_noise(large, noise, COSINE.alpha_bar(torch.tensor([100])))
    torch.testing.assert_close(inputs[0], torch.cat([x_T, noisy], 1).expand(2, -1, -1, -1))
    torch.testing.assert_close(inputs[1][:, 3:], noisy.expand(2, -1, -1, -1))


def test_the_cascade_called_is_draw_and_enlarge_with_the_same_generators(tiny):
    image = tiny("a castle", seed=4)
    (states,) = tiny.encode("a castle")
    generators = seeded([4])
    small = tiny.draw([Part(states)], generators)
    large = tiny.enlarge(small, [Part(states)], generators)
    assert image.shape == (1, 3, 256, 256) and torch.equal(image, large)
    made = tiny.make([Part(states)], [4])
    assert torch.equal(made[0], small) and torch.equal(made[1], large)
    anew = tiny.enlarge(small, [Part(states)], [4])  # begins the seed's random numbers again, as its docstring says
    assert torch.equal(anew, tiny.enlarge(small, [Part(states)], seeded([4]))) and not torch.equal(anew, large)


@pytest.mark.parametrize("name", solvers.STEPS)
def test_the_samplers_names_are_the_steps(cascade, name):
    """--sampler's three names, as an argument and as a setting, against the loop with that step."""
    step = {"ddpm": ddpm.step, "ddim": solvers.ddim_step, "dpm++": solvers.dpm_step}[name]
    parts, stage, (generator,) = parts_of(cascade, "prompt 0"), cascade.stage(1), seeded([5])
    predict = factorized(base_model(stage.unet), parts, *cascade.encode(""), 7.0)
    x_t = draw_noise((1, 3, 8, 8), [generator])
    steps = denoise(predict, x_t, FEW, COSINE, [generator], step=step, fix_x_start=stage.fix_x_start)
    x = cascade.draw(parts, [5], steps=FEW, sampler=name)
    assert torch.equal(x, final(steps))
    cascade.settings[0] = cascade.settings[0].but(sampler=name, steps=FEW)
    assert torch.equal(cascade.draw(parts, [5]), x)
    others = [cascade.draw(parts, [5], sampler=other) for other in solvers.STEPS if other != name]
    assert all(relative_l2(x, other) > 1e-3 for other in others)


def test_parts_in_turns_are_one_prompt_at_each_step(cascade):
    parts = InTurns(parts_of(cascade, "prompt 0", "prompt 1"))
    predictions = [guided(base_model(cascade.stage(1).unet), part.prompt, *cascade.encode(""), 7.0)
                   for part in parts]  # fmt: skip
    (generator,) = seeded([5])
    x_t = draw_noise((1, 3, 8, 8), [generator])
    turns = {int(t): predictions[i % 2] for i, t in enumerate(FEW)}
    steps = denoise(lambda x, t: turns[int(t[0])](x, t), x_t, FEW, COSINE, [generator],
                    fix_x_start=cascade.stage(1).fix_x_start)  # fmt: skip
    expected, sizes = final(steps), batch_sizes(cascade, 1)
    assert relative_l2(cascade.draw(parts, [5], steps=FEW), expected) <= 2e-5
    assert sizes == [2, 2, 2]


def test_the_first_examples_of_the_docstring_run(folders, monkeypatch):
    """With the tiny cascade in place of mini and few steps. The second block draws what make draws, at both stages."""
    load = Cascade.load

    def tiny(model: str) -> Cascade:
        assert model == "mini"
        cascade = load(*map(str, folders), dtype=torch.float32)
        cascade.settings[:] = Settings(3, 5.0), Settings(1, 1.0)
        return cascade

    monkeypatch.setattr(Cascade, "load", tiny)
    first, _, last = re.findall(r"(?:^    .*\n|^\n(?=    ))+", minidiff.cascade.__doc__, re.MULTILINE)[:3]
    names: dict[str, object] = {}
    exec(re.sub(r"^    ", "", f"{first}{last}", flags=re.MULTILINE), names)
    assert names["image"].shape == names["large"].shape == (1, 3, 256, 256)
    assert torch.equal(names["image"], names["cascade"]("a snowy mountain village", seed=0))
    small, large = names["cascade"].make(names["parts"], [2])
    assert torch.equal(names["small"], small) and torch.equal(names["large"], large)


# --- settings, and what is read when ----------------------------------------------------------------------------------


def test_prompts_are_remembered_and_the_empty_one_goes_along():
    texts = []

    def encode(prompts):
        texts.append(prompts)
        return torch.arange(float(len(prompts))).view(-1, 1, 1)

    cascade = Cascade(None, None, encode, [])
    (a,) = cascade.encode("a")
    assert texts == [["a", ""]] and a.shape == (1, 1, 1) and a.item() == 0
    assert torch.equal(cascade.encode("a", "", "a")[2], a) and cascade.encode("")[0].item() == 1
    cascade.encode("b", "b", "a")
    assert texts == [["a", ""], ["b"]]


def test_a_part_may_hold_a_text_and_all_texts_are_encoded_together(cascade):
    asked, encode = [], cascade._encode
    cascade._encode = lambda texts: asked.append(texts) or encode(texts)
    texts = averaged(Part("prompt 0"), Part("prompt 1", views.named("flip")))
    drawn = cascade.draw(texts, [5], steps=FEW)
    assert asked == [["prompt 0", "prompt 1", ""]]
    states = [replace(part, prompt=x) for part, x in zip(texts, cascade.encode("prompt 0", "prompt 1"))]
    assert torch.equal(drawn, cascade.draw(states, [5], steps=FEW)) and len(asked) == 1
    mixed = cascade.draw([texts[0], states[1]], [5], steps=FEW)
    assert torch.equal(drawn, mixed)


def test_nothing_is_encoded_before_the_rest_fits(cascade):
    cascade._encode = lambda texts: pytest.fail("the text encoder, which is slow, was asked first")
    part, image = Part("a prompt"), torch.zeros(1, 3, 8, 8)
    for parts, options in (
        ([Part("a prompt", views.named("patch_permute:3"))], {}), ([part], {"i_start": 2}), ([part], {"steps": 0}),
        ([part], {"sampler": "euler"}), ([part], {"image": image[..., :4], "i_start": 1}),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            cascade.draw(parts, [0], **options)
    for options in ({"mask": (0, 0, 9, 9)}, {"image": image}, {"image": image, "mask": (9, 0, 0, 9)}):
        with pytest.raises(ValueError):
            cascade.make([part], [0], **options)


def test_settings_hold_for_every_later_call_and_an_argument_for_one(cascade):
    parts = parts_of(cascade, "prompt 0")
    recordings = [cascade.draw(parts, [5]), cascade.draw(parts, [5], steps=FEW, guidance_scale=2.0)]
    assert torch.equal(recordings[0], cascade.draw(parts, [5]))
    cascade.settings[0] = cascade.settings[0].but(steps=FEW, guidance_scale=2.0)
    assert torch.equal(cascade.draw(parts, [5]), recordings[1])
    cascade.settings[0] = cascade.settings[0].but(negative_prompt="negative 1")
    assert relative_l2(cascade.draw(parts, [5]), recordings[1]) > 1e-3


def test_a_loaded_cascade_has_the_settings_of_its_models(folders):
    """mini 27 and 20 steps with guidance 3 and 1, every other model IF's 100 and 50 with 7 and 4."""
    one, two = map(str, folders)
    assert DEFAULTS["mini"] == (Settings(27, 3.0, "ddpm", ""), Settings(20, 1.0, "ddpm", ""))
    assert DEFAULTS["released"] == (Settings(100, 7.0, "ddpm", ""), Settings(50, 4.0, "ddpm", ""))
    assert Cascade.load().settings == list(DEFAULTS["mini"])
    assert Cascade.load(one, two).settings == list(DEFAULTS["released"])
    assert Cascade.load("none", "mini", text_model="mini").settings[1] == DEFAULTS["mini"][1]


def test_settings_take_a_rule_of_guidance_in_place_of_its_scale(tiny):
    by_scale = tiny.draw(parts_of(tiny, "a castle"), [0])
    tiny.settings[0] = tiny.settings[0].but(guidance_scale=lambda uncond, cond: uncond + 5.0 * (cond - uncond))
    assert torch.equal(tiny.draw(parts_of(tiny, "a castle"), [0]), by_scale)
    other = tiny.draw(parts_of(tiny, "a castle"), [0], guidance_scale=lambda uncond, cond: cond)
    torch.testing.assert_close(other, tiny.draw(parts_of(tiny, "a castle"), [0], guidance_scale=1))
    assert (other - by_scale).abs().max() > 0.01


def test_a_call_may_change_the_settings_of_stage_1_for_itself(tiny):
    """cascade(...), make, draw and every experiment; stage 2 and later calls keep theirs."""
    changes, before = {"steps": 2, "guidance_scale": 2.0, "negative_prompt": "fog"}, list(tiny.settings)
    image, mask = torch.zeros(1, 3, 64, 64), (16, 16, 48, 48)
    calls = [
        lambda **c: tiny("a castle", 3, **c),
        lambda **c: tiny.draw([Part("a castle")], [3], **c),
        lambda **c: anagram.anagram(tiny, ["a castle", "a dog"], **c)[1],
        lambda **c: hybrid(tiny, ["a castle", "a dog"], **c)[1],
        lambda **c: hybrid(tiny, ["a castle"], reference=image, **c)[1],
        lambda **c: inpaint(tiny, image, mask, "a castle", **c)[1],
        lambda **c: sdedit(tiny, image, "a castle", 0, **c)[1],
    ]
    for call in calls:
        found, plain = call(**changes), call()
        tiny.settings[0] = tiny.settings[0].but(**changes)
        assert torch.equal(found, call()) and (found - plain).abs().max() > 1e-3
        tiny.settings[:] = before
        with pytest.raises(ValueError, match="no setting 'guidance'; choose from steps, "):
            call(guidance=7.0)
        with pytest.raises(ValueError, match="cannot take 0 steps"):
            call(steps=0)


def test_nothing_large_is_read_before_it_is_needed(folders, monkeypatch):
    """load reads no network; draw reads stage 1 and not stage 2; each is read once."""
    reads = []
    real = stages.fill

    def fill(module, checkpoint, *rest):
        reads.append(checkpoint.folder.parent.name)
        return real(module, checkpoint, *rest)

    monkeypatch.setattr(stages, "fill", fill)
    cascade = Cascade.load(*map(str, folders), dtype=torch.float32)
    assert cascade.has_upper and reads == []
    parts = parts_of(cascade, "a castle")
    assert reads == []
    small = cascade.draw(parts, [0], steps=1)
    cascade.draw(parts, [1], steps=1)
    assert reads == ["one"]
    cascade.enlarge(small, parts, [0], steps=1)
    assert reads == ["one", "two"]


def test_a_cascade_of_one_stage(folders):
    """A folder alone has no stage 2, and a call ends at 64 pixels; without stage 1 there is nothing to draw with."""
    one, two = map(str, folders)
    cascade = Cascade.load(one, dtype=torch.float32)
    cascade.settings[0] = Settings(2, 1.0)
    assert not cascade.has_upper and cascade("a castle", seed=3).shape == (1, 3, 64, 64)
    small, large = cascade.make(parts_of(cascade, "a castle"), [3])
    assert large is None and torch.equal(small, cascade("a castle", seed=3))
    with pytest.raises(ValueError, match="this cascade has no stage 2; load it with one"):
        cascade.enlarge(small, parts_of(cascade, "a castle"), [3])
    upper = Cascade.load("none", two, text_model=one)
    assert upper.has_upper
    with pytest.raises(ValueError, match="this cascade has no stage 1; load it with one"):
        upper("a castle")


def test_a_cascade_is_loaded_from_paths_too_and_needs_a_stage(folders):
    one, two = folders
    by_path, by_name = (Cascade.load(*ways, text_model=ways[0]) for ways in ((one, two), (str(one), str(two))))
    assert by_path.settings == by_name.settings and by_path.has_upper
    assert torch.equal(*(c.encode("a castle")[0] for c in (by_path, by_name)))
    for stage2 in ("auto", "none"):
        with pytest.raises(ValueError, match="a cascade needs a stage; pass a model of stage 1, or of stage 2"):
            Cascade.load("none", stage2)


def test_names_are_those_of_the_flags_and_others_are_refused(cascade, folders):
    one, two = map(str, folders)
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        assert Cascade.load(one, dtype=name).stage(1).unet.conv_in.weight.dtype == dtype
    for wrong in ({"dtype": "half"}, {"text_encoder": "stream"}):
        ((what, name),) = wrong.items()
        with pytest.raises(ValueError, match=f"no {what} '{name}'; choose from auto, "):
            Cascade.load(one, two, **wrong)
    with pytest.raises(ValueError, match=r"no sampler 'DDIM'; choose from ddpm, ddim, dpm\+\+"):
        cascade.draw(parts_of(cascade, "prompt 0"), [0], steps=FEW, sampler="DDIM")


def test_watching_passes_every_step_and_a_bar_counts_them(cascade, capsys):
    """`through` gets the records of stage 1; with progress a bar names the size and the calls of the network."""
    record, parts = [], parts_of(cascade, "prompt 0")

    def through(steps):
        for step in steps:
            record.append(step)
            yield step

    cascade.progress = True
    x = cascade.draw(parts, [5], steps=FEW, jumps=(1, 2), through=through)
    times = [(step.t, step.t_prev) for step in record]
    assert times == [(666, 333), (666, 333), (333, 0), (333, 0), (0, -1)]
    assert torch.equal(record[-1].x_prev, x)
    bar = capsys.readouterr().err
    assert "8 px" in bar and "5/5" in bar
    cascade.progress = False
    assert torch.equal(cascade.draw(parts, [5], steps=FEW, jumps=(1, 2)), x) and capsys.readouterr().err == ""


# --- editing through the door -----------------------------------------------------------------------------------------


def test_the_random_numbers_of_edits_are_streams_of_their_own():
    """Walks that edit small and large images, and what each keeps, never share a stream with each other or with a walk
    from pure noise."""
    streams = [0, EDIT_SMALL, EDIT_LARGE, KEPT, EDIT_SMALL + KEPT, EDIT_LARGE + KEPT]
    assert len(set(streams)) == len(streams)


def test_an_edit_draws_from_its_stream(cascade):
    """SDEdit's start is the image noised with stream EDIT_SMALL of the seed; at stage 2 EDIT_LARGE. The caller's
    generators stay where they are."""
    inputs, parts, generators = [], parts_of(cascade, "prompt 0"), seeded([5])
    for number, size, stream in ((1, 8, EDIT_SMALL), (2, 16, EDIT_LARGE)):
        image = normal("image", 1, 3, size, size).tanh()
        cascade.stage(number).unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        if number == 1:
            cascade.draw(parts, generators, steps=torch.tensor([700]), image=image)
        else:
            cascade.enlarge(LOW_RES[:1], parts, generators, steps=torch.tensor([700]), image=image)
        torch.testing.assert_close(inputs[-1][:1, :3], noised(image, 700, COSINE, seeded([5], stream)))
    assert torch.equal(torch.randn(4, generator=generators[0]), torch.randn(4, generator=seeded([5])[0]))


def test_an_image_edited_with_its_seed_does_not_find_itself(tiny):
    """SDEdit from i_start 1 of an image that seed 0 made: the distance is that of another seed, not a tenth of it."""
    settings = Settings("course", 1.0)
    tiny.settings[0] = settings
    parts = parts_of(tiny, "a castle")
    network_of_noise(tiny)
    image = tiny.draw(parts, [0])

    def distance(generators):
        x = tiny.draw(parts, generators, image=image, i_start=1)
        return (x - image).square().mean().item()

    same, other = distance([0]), distance([1])
    assert 0.8 < same / other < 1.25
    assert distance(other_stream(seeded([0]), -EDIT_SMALL)) < 0.1 * other  # what it was with the image's noise


def network_of_noise(cascade: Cascade, std: float = 0.7) -> None:
    """Give stage 1 the answers of a perfect network for Gaussian data: what the noise decides, the image shows."""
    process = cascade.stage(1).schedule

    def forward(x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar(t).float()
        eps = x_t * (1 - alpha_bar).sqrt() / (alpha_bar * std**2 + 1 - alpha_bar)
        return torch.cat([eps, -torch.ones_like(eps)], 1)

    cascade.stage(1).unet.forward = forward


def test_make_edits_at_both_sizes_and_keeps_the_rest_exactly(tiny):
    """An image with a mask: outside it both results are the image at their size; a start needs no mask."""
    image = Image.effect_mandelbrot((90, 70), (-2, -1.2, 1, 1.2), 30)
    parts = parts_of(tiny, "a castle")
    small, large = tiny.make(parts, [0], image=image, mask=(0, 0, 32, 64))
    for x, half in ((small, 32), (large, 128)):
        kept = images.load(image, x.shape[-1])
        assert torch.equal(x[..., half:], kept[..., half:])
        assert (x - kept)[..., :half].abs().mean() > 0.05
    started, _ = tiny.make(parts, [0], image=image, i_start=2)
    alone = tiny.draw(parts, [0], image=images.load(image, 64), i_start=2)
    assert torch.equal(started, alone)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"image": True}, "what is to happen to the image\\? pass a mask, a box or i_start"),
        ({"i_start": 1}, "i_start needs an image to start from"),
        ({"mask": (0, 0, 9, 9)}, "a mask needs an image, of which the rest is kept"),
        ({"image": True, "i_start": 1, "feather": 2.0}, "feather softens a mask; pass a mask"),
    ],
)
def test_half_an_edit_is_refused(tiny, edit, message):
    """By the experiments, too: all that edit go through `make`."""
    edit |= {"image": torch.zeros(1, 3, 64, 64)} if "image" in edit else {}
    for ask in (lambda: tiny.make(parts_of(tiny, "a"), [0], **edit), lambda: anagram.anagram(tiny, ["a", "b"], **edit)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_jumps_are_repaints_alone(folders):
    cascade = Cascade.load(str(folders[0]), dtype=torch.float32)
    cascade.settings[0] = Settings(3, 1.0)
    image, parts, sizes = torch.zeros(1, 3, 64, 64), parts_of(cascade, "a castle"), batch_sizes(cascade, 1)
    for method, calls in (("renoise", 3), ("clean", 3), ("repaint", 3 + 2)):
        sizes.clear()
        jumps = (1, 2) if method == "repaint" else None
        cascade.make(parts, [0], image=image, mask=(0, 0, 32, 64), method=method, jumps=jumps)
        assert len(sizes) == calls, method
    with pytest.raises(ValueError, match="of method repaint, got .1, 2. with clean"):
        cascade.make(parts, [0], image=image, mask=(0, 0, 32, 64), method="clean", jumps=(1, 2))
    sizes.clear()  # by themselves they are as long as half the walk, and three passes
    cascade.make(parts, [0], image=image, mask=(0, 0, 32, 64), method="repaint")
    assert len(sizes) == network_calls(visits(torch.arange(3).flip(0), True, (1, 3))) == 3 + 2 * 2


# --- steps and errors -------------------------------------------------------------------------------------------------


def test_the_last_start_is_the_last_time_at_which_the_network_is_asked():
    assert (last_start("course"), last_start(4), last_start(torch.tensor([5, 3]))) == (32, 3, 1)


def test_times_that_are_none_are_refused(cascade):
    parts = parts_of(cascade, "prompt 0")
    for steps in (torch.tensor(5), torch.tensor([900.0, 100.0]), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="timesteps are one row of whole numbers, got .*; a count of steps is"):
            cascade.draw(parts, [0], steps=steps)
    with pytest.raises(ValueError, match="timesteps are empty"):
        cascade.draw(parts, [0], steps=torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="steps must be a count, a list like '10,10,3' or one of"):
        cascade.draw(parts, [0], steps=np.array([900, 100]))
    with pytest.raises(ValueError, match="noise_level must be a whole number from 0 to 999, got 2.5"):
        cascade.enlarge(LOW_RES, parts, [0, 1], noise_level=2.5)


def test_input_errors_of_the_door(cascade):
    parts = parts_of(cascade, "prompt 0")
    with pytest.raises(ValueError, match="i_start on these steps must be a whole number from 0 to 2, got 3"):
        cascade.draw(parts, [0], steps=FEW, image=torch.zeros(1, 3, 8, 8), i_start=3)
    with pytest.raises(ValueError, match="i_start on these steps must be a whole number from 0 to 32, got 33"):
        cascade.draw(parts, [0], steps="course", image=torch.zeros(1, 3, 8, 8), i_start=33)
    with pytest.raises(ValueError, match="i_start needs an image to start from"):
        cascade.draw(parts, [0], steps=FEW, i_start=1)
    for scale in (math.nan, math.inf, "7"):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number, got "):
            cascade.draw(parts, [0], steps=FEW, guidance_scale=scale)
    for x in (torch.full((1, 3, 8, 8), 200.0), torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8).byte()):
        with pytest.raises(ValueError, match=r"an image (is floats|lies) in \[-1, 1\], got "):
            cascade.draw(parts, [0], image=x, i_start=1)
        with pytest.raises(ValueError, match=r"an image (is floats|lies) in \[-1, 1\], got "):
            cascade.enlarge(x, parts, [0])
    for width in (16, 32):  # of a text encoder of another family; of another length
        with pytest.raises(ValueError, match="of the negative prompt .*; encode all prompts with one text encoder"):
            cascade.draw([Part(torch.zeros(1, 77 if width == 16 else 5, width))], [0], guidance_scale=1.0)
    for part in ((parts[0].prompt, "flip"), (parts[0].prompt, IDENTITY, "low")):
        with pytest.raises(ValueError, match=r"a Part is a prompt, a view and a component, such as Part\('a vol"):
            Part(*part)
    with pytest.raises(ValueError, match=r"image to start from must be \(B, 3, 8, 8\), got \(1, 3, 4, 4\); B is"):
        cascade.draw(parts, [0], image=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\), got \(2, 3, 8, 8\); B is 1 or the number of seeds"):
        cascade.draw(parts, [0, 1, 2], image=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got str; B is 1 or the number of seeds, and images.load reads a file"):
        cascade.draw(parts, [0], image="a.png")
    for none in ([], InTurns([])):
        with pytest.raises(ValueError, match="no parts; pass at least one prompt"):
            cascade.draw(none, [0], steps=FEW)
    for wrong in (parts[0], "prompt 0", cascade.encode("prompt 0"), None):
        with pytest.raises(ValueError, match=r"parts are a list of Part, such as \[Part\('a volcano'"):
            cascade.draw(wrong, [0], steps=FEW)
    for states in (torch.zeros(2, 77, 32), torch.zeros(77, 32)):
        with pytest.raises(ValueError, match=r"states must be \(B, L, D\), got \(.*\); B is 1 or the number of seeds"):
            cascade.draw([Part(states)], [0, 1, 2], steps=FEW)
    with pytest.raises(ValueError, match=r"a seed must lie in 0\.\.2\^32 - 1, got -1"):
        cascade.draw(parts, [-1])
    for ask in (lambda: cascade.draw(parts, 1.5), lambda: cascade.make(parts, "a"),
                lambda: cascade("prompt 0", seed="a"), lambda: cascade.enlarge(LOW_RES, parts, 2)):  # fmt: skip
        with pytest.raises(ValueError, match=r"seeds must be a list of whole numbers, such as \[0, 1\], got "):
            ask()
    with pytest.raises(ValueError, match=r"no seeds; pass one for each image, such as \[0, 1\]"):
        cascade.draw(parts, [])
    for wrong in (["prompt 0"], None, 5, b"prompt 0"):
        with pytest.raises(ValueError, match="a prompt is a text, or its states, got .*; each has a Part of its own"):
            cascade(wrong)
        with pytest.raises(ValueError, match="a prompt is a text, got .*; pass several one by one"):
            cascade.encode(wrong)
    for small, seeds in ((LOW_RES[0], [0, 1]), (LOW_RES[:, :1], [0, 1]), (LOW_RES, [0])):
        with pytest.raises(ValueError, match=rf"small must be \(B, 3, h, w\) with B = {len(seeds)} seeds, got \("):
            cascade.enlarge(small, parts, seeds)
    for level in (-1, 1000):
        with pytest.raises(ValueError, match=f"noise_level must be a whole number from 0 to 999, got {level}"):
            cascade.enlarge(LOW_RES, parts, [0, 1], noise_level=level)


def test_stages_and_texts_of_different_families_are_refused(folders, tmp_path):
    """Before the work where the widths of the stages differ; where the texts differ, when they are encoded."""
    one, two = map(str, folders)
    with pytest.raises(ValueError, match="the stages read text states one of width 32, mini-IF-II of width"):
        Cascade.load(one, "mini")
    mixed = Cascade.load(one, two, text_model="mini")
    with pytest.raises(ValueError, match="the stages read text states of width 32, these have width 192"):
        mixed.encode("a castle")
