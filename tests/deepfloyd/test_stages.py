"""A stage: the UNet as a model, and what a folder says of its process. Whole walks: tests/test_cascade.py."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from minidiff import schedule
from minidiff.deepfloyd import stages
from minidiff.deepfloyd.unet import UNet, UNetConfig
from tests.reference.fill import fill, normal, read_json

UNETS = read_json("unet")["networks"]
COSINE = schedule.squaredcos_cap_v2()
TEXT = torch.cat([normal(f"stages.{name}", 2, 77, 32) for name in ("negative_prompt_embeds", "prompt_embeds")])


@functools.cache
def network(name: str) -> UNet:
    return fill(UNet(UNetConfig.from_dict(UNETS[name]["config"])))


# --- models -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_models_split_eps_from_variance():
    """Channels 0 to 2 are eps, 3 to 5 the variance; stage 2 reads x_t first and the low-resolution image second."""
    one, two = network("stage_1"), network("stage_2")
    x, t = normal("x", 4, 3, 8, 8), torch.tensor([5, 5, 700, 700])
    eps, pred_var = stages.base_model(one)(x, t, TEXT)
    assert torch.equal(torch.cat([eps, pred_var], 1), one(x, t, TEXT))
    low_res, model = normal("low", 4, 3, 8, 8), stages.super_resolution_model(two, 250)
    eps, pred_var = stages.beside(low_res, lambda x, t: model(x, t, TEXT))(x, t)
    whole = two(torch.cat([x, low_res], 1), t, TEXT, torch.full((4,), 250))
    assert torch.equal(torch.cat([eps, pred_var], 1), whole)


def test_upsample_keeps_corners():
    """0, 3 at twice the size: 0, 1, 2, 3, evenly from corner to corner."""
    enlarged = stages.upsample(torch.tensor([0.0, 3.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2), (4, 4))
    torch.testing.assert_close(enlarged[0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(4, 4))


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
    unet = network(name)
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(UNETS[name]["config"]))
    save_file(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    configs = {"scheduler": process, "image_noising_scheduler": noising}
    for part, config in configs.items():
        if config is not None:
            (folder / part).mkdir()
            (folder / part / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_a_stage_has_the_weights_and_the_process_of_its_folder(tmp_path):
    """What comes out of a folder draws what went in, and the scheduler's numbers are its own."""
    loaded = stages.plan_stage(write_folder(tmp_path / "m", "stage_1", RELEASED_SCHEDULER), torch.float32)[1]()
    assert (loaded.threshold_ratio, loaded.threshold_max) == (0.9, 1.25)
    assert torch.equal(loaded.schedule.betas, COSINE.betas)
    assert torch.equal(loaded.noising.betas, COSINE.betas)
    expected = network("stage_1").state_dict()
    assert all(torch.equal(x, expected[key]) for key, x in loaded.unet.state_dict().items())


def test_a_stage_has_defaults(tmp_path):
    """Left out, the ratio is 0.95 and the cap 1.5 in stage 1, 1.0 in stage 2; the noising process may be another."""
    process = {"beta_schedule": "squaredcos_cap_v2"}
    one = stages.plan_stage(write_folder(tmp_path / "1", "stage_1", process), torch.float16)[1]()
    two = stages.plan_stage(write_folder(tmp_path / "2", "stage_2", process, {"beta_schedule": "linear"}), None)[1]()
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
        with pytest.raises(ValueError, match="scheduler_config.json describes no process of IF"):
            stages.plan_stage(folder, None)
    path.write_text(json.dumps(RELEASED_SCHEDULER | {"variance_type": "fixed_small"}))
    with pytest.warns(UserWarning, match="variance_type is 'fixed_small'; IF's 'learned_range' is used"):
        stages.plan_stage(folder, None)
    path.write_text(json.dumps(RELEASED_SCHEDULER))
    (folder / "image_noising_scheduler").mkdir()
    (folder / "image_noising_scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "cubic"}')
    with pytest.raises(ValueError, match="image_noising_scheduler/scheduler_config.json describes no process"):
        stages.plan_stage(folder, None)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match="there is no .*scheduler_config.json"):
        stages.plan_stage(folder, None)


@pytest.mark.parametrize(
    "wrong",
    [{"block_out_channels": 5}, {"attention_head_dim": None}, {"attention_head_dim": 0}, {"encoder_hid_dim": None},
     {"norm_num_groups": 7}, {"time_embedding_act_fn": "silu"}, {"class_embed_type": "timestep"},
     {"layers_per_block": "two"}],
)  # fmt: skip
def test_configs_that_cannot_be_built_name_their_file(tmp_path, wrong):
    folder = write_folder(tmp_path / "m", "stage_1", RELEASED_SCHEDULER)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=r"unet/config.json cannot be built: \S|does not fit UNet"):
        stages.plan_stage(folder, None)
