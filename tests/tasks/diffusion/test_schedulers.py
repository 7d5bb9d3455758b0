"""Every scheduler leads back to the image when the prediction is right."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from gspn._errors import UsageError
from gspn.diffusers.class_conditional import takes_variance
from gspn.diffusers.timesteps import set_timesteps
from gspn.tasks.class_conditional import DiffusionConfig
from gspn.tasks.diffusion.schedulers import PREDICTIONS, SCHEDULERS, check_chain, named_scheduler, training_scheduler

FLOW = ("flow", "flow-heun")


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("name", [*SCHEDULERS, "auto"])
def test_a_right_prediction_leads_to_the_image(name, objective):
    torch.manual_seed(0)  # for schedulers that add noise
    config = DiffusionConfig(objective=objective, learned_sigma=objective == "epsilon")
    trained = training_scheduler(config, pixels=True)
    if name != "auto" and (name in FLOW) != (objective == "flow"):
        with pytest.raises(UsageError, match="does not fit a model"):
            named_scheduler(name, trained)
        return
    scheduler = named_scheduler(name, trained)
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(1, 1, 4, 4, generator=generator) - 0.5
    scheduler.set_timesteps(40)
    x = torch.randn(1, 1, 4, 4, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    alphas = getattr(trained, "alphas_cumprod", None)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if alphas is None:
            predicted = (scaled - start) / (t / 1000)
        else:
            a = alphas[round(t.item())]
            noise = (scaled - a.sqrt() * start) / (1 - a).sqrt()
            predicted = noise if objective == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * start
            if takes_variance(scheduler):
                predicted = torch.cat([predicted, torch.zeros_like(predicted)], dim=1)
        x = scheduler.step(predicted, t, x).prev_sample
    torch.testing.assert_close(x, start, atol=0.02, rtol=0)


def test_a_name_that_does_not_exist():
    with pytest.raises(UsageError, match="did you mean 'ddim'"):
        named_scheduler("dim", training_scheduler(DiffusionConfig(), pixels=True))


def test_auto_is_the_models_own_unless_that_needs_hundreds_of_steps():
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    for own in (EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(), sde):
        found = named_scheduler("auto", own)
        assert type(found) is type(own) and found is not own
    assert named_scheduler("auto", sde).config.algorithm_type == "sde-dpmsolver++"
    assert named_scheduler("dpm++", sde).config.algorithm_type == "dpmsolver++"
    for slow in (DDPMScheduler(), PNDMScheduler()):
        assert type(named_scheduler("auto", slow)).__name__ == "DDIMScheduler"
        assert type(named_scheduler("auto", slow, auto="unipc")).__name__ == "UniPCMultistepScheduler"


def test_models_that_a_scheduler_cannot_run():
    with pytest.raises(UsageError, match="'euler_a' does not run models that predict the sample"):
        named_scheduler("euler_a", DDIMScheduler(prediction_type="sample"))
    assert check_chain(DDIMScheduler(prediction_type="sample")) == "sample"
    for trained, predictions in (
        (DDIMScheduler(prediction_type="sample"), ("epsilon",)),
        (EDMEulerScheduler(), PREDICTIONS),
    ):
        with pytest.raises(UsageError, match=type(trained).__name__):
            check_chain(trained, predictions)


SPACINGS = [("trailing", 0), ("leading", 0), ("leading", 1), ("linspace", 0)]


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_number_of_steps_ends_or_is_refused(name, prediction):
    is_flow = prediction == "flow"
    if is_flow != (name in FLOW) or (name, prediction) == ("euler_a", "sample"):
        pytest.skip("refused by name")
    spacings = SPACINGS if prediction == "epsilon" else SPACINGS[:1]
    for levels, (spacing, offset) in itertools.product((1, 1000), spacings):
        trained: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels)
        if not is_flow:
            trained = DDIMScheduler(
                num_train_timesteps=levels, timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction,
                clip_sample=False,
            )  # fmt: skip
        # At 61 and 223 of 1,000 the trailing spacing of diffusers has a step too many.
        for steps in (1, 2, 3, 10, 61, 223, 999, 1000, 1001, 5000):
            _take(named_scheduler(name, trained), steps, levels, is_flow)


def _take(scheduler, steps, levels, is_flow):
    refusal = _refusal(scheduler, steps)
    if refusal is not None:  # the spacing may keep the last level of a chain out of reach
        assert re.search(rf"^{steps} steps: this \w+ takes \d+ or fewer|takes no number of steps", refusal)
        assert steps >= levels - 1
        return
    times = scheduler.timesteps
    assert len(times) == steps or type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler"
    assert len(times.unique()) == steps and times.min() >= 0 and times.max() <= levels - (not is_flow)
    # The first step and the last ones, where the ends of the chain are met.
    x, begin = torch.ones(1, 1, 1, 1) * getattr(scheduler, "init_noise_sigma", 1.0), max(len(times) - 4, 0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler":
        begin -= begin % 2  # a step of two calls
        scheduler.set_begin_index(begin)
    for t in times[begin:]:
        x = scheduler.step(torch.full_like(x, 0.5), t, x).prev_sample
    assert torch.isfinite(x).all()


def _refusal(scheduler, steps):
    try:
        set_timesteps(scheduler, steps)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("steps", [0, -1, True, 1.0, "3", None])
def test_steps_that_are_no_number(steps):
    with pytest.raises(UsageError, match="pass an integer of at least 1"):
        set_timesteps(DDIMScheduler(), steps)


def test_a_pipeline_that_sets_the_steps_itself():
    trained = DDIMScheduler(timestep_spacing="trailing")
    set_timesteps(named_scheduler("dpm++", trained), 60, as_it_is=True)
    with pytest.raises(UsageError, match="61 steps: this DPMSolverMultistepScheduler takes 60 or fewer"):
        set_timesteps(named_scheduler("dpm++", trained), 61, as_it_is=True)
