"""Both stages from noise to picture, against diffusers' pipelines with the same tiny networks, texts and noise."""

import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from minidiff import ddpm, schedule
from minidiff.checkpoint import WeightsError
from minidiff.deepfloyd import stages
from minidiff.deepfloyd.stages import Stage, Walk
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.guidance import prompted
from minidiff.sampling import denoise, draw_noise
from tests.reference.fill import HERE, calm, fill, normal, read, read_json, relative_l2

REFERENCE, UNETS = read("stages"), read_json("unet")["networks"]
COSINE = schedule.squaredcos_cap_v2()
PROMPT, NEGATIVE = normal("stages.prompt_embeds", 2, 77, 32), normal("stages.negative_prompt_embeds", 2, 77, 32)
ONE = prompted(PROMPT[:1], NEGATIVE[:1])
WALKS = {"ten": schedule.leading(10), "fast27": schedule.respaced("fast27")}


@functools.cache
def stage(name: str) -> Stage:
    threshold_max = {"stage_1": 1.5, "stage_2": 1.0}[name]
    return Stage(calm(fill(UNet(UNetConfig.from_dict(UNETS[name]["config"])))), COSINE, 0.95, threshold_max, COSINE)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def base(walk: str = "ten", **more: object) -> torch.Tensor:
    condition = prompted(PROMPT, NEGATIVE, more.pop("split_batch", False))
    walk = Walk(WALKS[walk], **more.pop("walk_more", {}))
    return stages.sample_base(stage("stage_1"), condition, walk, generators(5, 6), **{"size": (8, 8), **more})


def super_resolution(**more: object) -> torch.Tensor:
    given = {"low_res": normal("stages.low_res", 2, 3, 4, 4).tanh(), "generators": generators(7, 8), **more}
    condition = prompted(PROMPT, NEGATIVE, given.pop("split_batch", False))
    walk = Walk(schedule.leading(5))
    return stages.sample_super_resolution(
        stage("stage_2"), given.pop("low_res"), condition, walk, given.pop("generators"), **given
    )


@functools.cache
def plain() -> tuple[torch.Tensor, torch.Tensor]:
    """What both stages draw with nothing but defaults."""
    return base(), super_resolution()


# --- against diffusers' pipelines -------------------------------------------------------------------------------------


def test_the_random_stream_is_the_recorded_one():
    """If this fails, torch draws other numbers than it did; the tests below then say nothing about the code."""
    torch.testing.assert_close(draw_noise((1, 3, 8, 8), generators(5)), REFERENCE["first_draw_of_seed_5"])


def test_order_of_draws_is_the_recorded_one():
    """diffusers draws x_T, in stage 2 then the noise on the low-resolution picture, then one per step but the last."""
    with safe_open(HERE / "stages.safetensors", "pt") as f:
        draws = json.loads(f.metadata()["provenance"])["draws"]
    assert draws["stage_1.ten"] == [[2, 3, 8, 8]] * (1 + 9)
    assert draws["stage_1.fast27"] == [[2, 3, 8, 8]] * (1 + 26)
    assert draws["stage_2"] == [[2, 3, 16, 16]] * (1 + 1 + 4)


def test_the_last_step_draws_nothing():
    """After a walk of three steps a generator stands where x_T and two noises leave it."""
    (used,), (fresh,) = generators(5), generators(5)
    stages.sample_base(stage("stage_1"), ONE, Walk(schedule.leading(3)), [used], size=(8, 8))
    draw_noise((1, 3, 8, 8), [fresh]), draw_noise((1, 3, 8, 8), [fresh]), draw_noise((1, 3, 8, 8), [fresh])
    assert torch.equal(torch.randn(4, generator=used), torch.randn(4, generator=fresh))


@pytest.mark.parametrize("walk", WALKS)
def test_stage_1_against_diffusers(walk):
    """Guidance 7, the default, and the steps magnify rounding a few times: 2e-5. With diffusers' own float32 tables
    the step into t = 0 differs by up to 1e-4 more."""
    images = plain()[0] if walk == "ten" else base(walk)
    assert images.dtype == torch.float32
    assert relative_l2(images, REFERENCE[f"stage_1.{walk}.float64"]) <= 2e-5
    assert relative_l2(images, REFERENCE[f"stage_1.{walk}.released"]) <= 2e-4


def test_stage_2_against_diffusers():
    """As stage 1, with guidance 4 and noise level 250, the defaults; the low-resolution picture is enlarged and noised
    once."""
    images = plain()[1]
    assert images.shape == (2, 3, 16, 16)
    assert relative_l2(images, REFERENCE["stage_2.float64"]) <= 2e-5
    assert relative_l2(images, REFERENCE["stage_2.released"]) <= 2e-4


# --- what must not depend on how it is asked for ----------------------------------------------------------------------


def test_a_picture_depends_on_its_own_seed_only():
    """The second picture of the batch, drawn alone: the same noise, and the same picture up to rounding."""
    condition = prompted(PROMPT[1:], NEGATIVE[1:])
    alone = stages.sample_base(stage("stage_1"), condition, Walk(WALKS["ten"]), generators(6), size=(8, 8))
    assert relative_l2(alone, plain()[0][1:]) <= 2e-5


def test_splitting_the_batch_changes_nothing():
    assert relative_l2(base(split_batch=True), plain()[0]) <= 2e-5
    assert relative_l2(super_resolution(split_batch=True), plain()[1]) <= 2e-5


def test_guidance_scale_and_noise_level_matter():
    assert relative_l2(base(guidance_scale=2.0), plain()[0]) > 1e-2
    assert relative_l2(super_resolution(noise_level=50), plain()[1]) > 1e-2


def test_without_thresholding_it_is_the_bare_loop():
    """As the course walks: nothing touches the estimate, which then leaves [-1, 1] and leads elsewhere."""
    bare = base(walk_more={"threshold": False})
    drawing = generators(5, 6)
    predict = prompted(PROMPT, NEGATIVE)(stages.base_model(stage("stage_1").unet), 7.0)
    x_t = draw_noise((2, 3, 8, 8), drawing)
    assert torch.equal(bare, denoise(predict, x_t, WALKS["ten"], COSINE, generators=drawing))
    assert relative_l2(bare, plain()[0]) > 1e-2


@torch.inference_mode()
def test_models_split_eps_from_variance():
    """Channels 0 to 2 are eps, 3 to 5 the variance; stage 2 sees x_t first and the low-resolution picture second."""
    one, two = stage("stage_1").unet, stage("stage_2").unet
    x, t = normal("x", 4, 3, 8, 8), torch.tensor([5, 5, 700, 700])
    embeds = torch.cat([NEGATIVE, PROMPT])
    eps, pred_var = stages.base_model(one)(x, t, embeds)
    assert torch.equal(torch.cat([eps, pred_var], 1), one(x, t, embeds))
    low_res, model = normal("low", 4, 3, 8, 8), stages.super_resolution_model(two, 250)
    eps, pred_var = stages.beside(low_res, lambda x, t: model(x, t, embeds))(x, t)
    whole = two(torch.cat([x, low_res], 1), t, embeds, torch.full((4,), 250))
    assert torch.equal(torch.cat([eps, pred_var], 1), whole)


def test_upsample_keeps_corners():
    """0, 3 at twice the size: 0, 1, 2, 3, evenly from corner to corner."""
    enlarged = stages.upsample(torch.tensor([0.0, 3.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2), (4, 4))
    torch.testing.assert_close(enlarged[0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(4, 4))


def test_stage_2_sees_the_low_resolution_picture_noised_to_its_level():
    """sqrt(alpha_bar_100) of the enlarged picture plus sqrt(1 - alpha_bar_100) of the second draw, in channels 3 to
    5, the same in every step."""
    seen = []
    made, low_res = stage("stage_2"), normal("stages.low_res", 1, 3, 4, 4).tanh()
    hook = made.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    stages.sample_super_resolution(made, low_res, ONE, Walk(schedule.leading(2)), generators(3), noise_level=100)
    hook.remove()
    (generator,) = generators(3)
    x_T, noise = (torch.randn((1, 3, 16, 16), generator=generator) for _ in range(2))
    enlarged = F.interpolate(low_res, (16, 16), mode="bilinear", align_corners=True)
    noised = ddpm.add_noise(enlarged, noise, COSINE.alpha_bar(torch.tensor([100])))
    torch.testing.assert_close(seen[0], torch.cat([x_T, noised], 1).expand(2, -1, -1, -1))
    torch.testing.assert_close(seen[1][:, 3:], noised.expand(2, -1, -1, -1))


# --- loading ----------------------------------------------------------------------------------------------------------

RELEASED_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.9,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.25,
    "thresholding": True,
    "variance_type": "learned_range",
}


def write_folder(folder, name: str, process: dict, noising: dict | None = None):
    """A model in the released layout with the tiny network of that name."""
    unet = stage(name).unet
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(UNETS[name]["config"]))
    save_file(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    configs = {"scheduler": process, "image_noising_scheduler": noising}
    for part, config in configs.items():
        if config is not None:
            (folder / part).mkdir()
            (folder / part / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_load_stage_reads_weights_and_process(tmp_path):
    """What comes out of a folder draws what went in, and the scheduler's numbers are its own."""
    loaded = stages.load_stage(write_folder(tmp_path / "m", "stage_1", RELEASED_SCHEDULER), None, "cpu")
    assert (loaded.threshold_ratio, loaded.threshold_max) == (0.9, 1.25)
    assert torch.equal(loaded.schedule.betas, COSINE.betas)
    assert torch.equal(loaded.noising.betas, COSINE.betas)
    ours = stage("stage_1").unet.state_dict()
    assert all(torch.equal(x, ours[key]) for key, x in loaded.unet.state_dict().items())


def test_load_stage_defaults(tmp_path):
    """Left out, the ratio is 0.95 and the cap 1.5 in stage 1, 1.0 in stage 2; the noising process may be another."""
    process = {"beta_schedule": "squaredcos_cap_v2"}
    one = stages.load_stage(write_folder(tmp_path / "1", "stage_1", process), torch.float16, "cpu")
    two = stages.load_stage(write_folder(tmp_path / "2", "stage_2", process, {"beta_schedule": "linear"}), None, "cpu")
    assert (one.threshold_ratio, one.threshold_max, two.threshold_ratio, two.threshold_max) == (0.95, 1.5, 0.95, 1.0)
    assert one.unet.conv_in.weight.dtype == torch.float16
    assert torch.equal(two.noising.betas, schedule.linear().betas)
    fixed = one.fix_x_start(torch.tensor([3.0, -0.75]).view(1, 1, 1, 2))
    torch.testing.assert_close(fixed.flatten(), torch.tensor([1.0, -0.5]))  # 95 % lies above the cap of 1.5: both / 1.5


# --- errors -----------------------------------------------------------------------------------------------------------


def test_scheduler_file_errors(tmp_path):
    folder = write_folder(tmp_path / "m", "stage_1", RELEASED_SCHEDULER)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json is not valid JSON"):
        stages.plan_stage(folder, None)
    path.write_text("[]")
    with pytest.raises(ValueError, match="scheduler_config.json must hold a JSON object, got list"):
        stages.plan_stage(folder, None)
    for wrong in ({"sample_max_value": None}, {"sample_max_value": 0.5}, {"dynamic_thresholding_ratio": 95},
                  {"num_train_timesteps": "many"}, {"beta_schedule": "cubic"},
                  {"beta_schedule": "linear", "num_train_timesteps": -3}):  # fmt: skip
        path.write_text(json.dumps(RELEASED_SCHEDULER | wrong))
        with pytest.raises(WeightsError, match="scheduler_config.json describes no process of IF"):
            stages.plan_stage(folder, None)
    path.write_text(json.dumps(RELEASED_SCHEDULER | {"variance_type": "fixed_small"}))
    with pytest.warns(UserWarning, match="variance_type is 'fixed_small'; IF's 'learned_range' is used"):
        stages.plan_stage(folder, None)
    path.write_text(json.dumps(RELEASED_SCHEDULER))
    (folder / "image_noising_scheduler").mkdir()
    (folder / "image_noising_scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "cubic"}')
    with pytest.raises(WeightsError, match="image_noising_scheduler/scheduler_config.json describes no process"):
        stages.plan_stage(folder, None)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match="there is no .*scheduler_config.json"):
        stages.plan_stage(folder, None)


@pytest.mark.parametrize(
    "wrong",
    [{"block_out_channels": 5}, {"attention_head_dim": None}, {"attention_head_dim": 0}, {"encoder_hid_dim": None},
     {"norm_num_groups": 7}, {"time_embedding_act_fn": "silu"}, {"class_embed_type": "projection"},
     {"layers_per_block": "two"}],
)  # fmt: skip
def test_configs_that_cannot_be_built_name_their_file(tmp_path, wrong):
    folder = write_folder(tmp_path / "m", "stage_1", RELEASED_SCHEDULER)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(WeightsError, match=r"unet/config.json cannot be built: \S|does not fit UNet"):
        stages.plan_stage(folder, None)


def test_super_resolution_input_errors():
    low_res = torch.zeros(2, 3, 4, 4)
    for wrong, count in ((low_res[0], 2), (low_res[:, :1], 2), (low_res, 1)):
        with pytest.raises(ValueError, match=rf"low_res must be \(B, 3, h, w\) with B = {count}, got \("):
            super_resolution(low_res=wrong, generators=generators(*range(count)))
    for level in (-1, 1000):
        with pytest.raises(ValueError, match=rf"noise_level must lie in 0\.\.999, got {level}"):
            super_resolution(noise_level=level)
