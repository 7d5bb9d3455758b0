"""Every scheduler leads back to the image when the prediction is right."""

from __future__ import annotations

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
