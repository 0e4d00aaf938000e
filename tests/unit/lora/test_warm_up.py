"""Steps before the energy window: they cost nothing but time, and take what is slow about a first step with them."""

import pytest
import test_trainer
import torch
from test_trainer import train

from telco_nb.lora import energy, trainer
from telco_nb.lora.step import token_losses


class Late:
    """The step, whose first call takes 100 s by the clock of the meter."""

    def __init__(self, monkeypatch, slow_s=100.0):
        self.calls, self.slow_s, self.left_s, clock = 0, slow_s, 0.0, energy.time.perf_counter
        monkeypatch.setattr(trainer, "token_losses", self)
        monkeypatch.setattr(energy.time, "perf_counter", lambda: clock() + self.left_s)

    def __call__(self, model, row):
        self.calls, self.left_s = self.calls + 1, self.slow_s
        torch.rand(1)  # as dropout draws
        return token_losses(model, row)


@pytest.mark.parametrize("kill_at", [None, 5])
def test_a_warm_up_changes_no_bit_of_the_adapter_and_keeps_a_slow_first_step_out_of_the_window(
    tmp_path, monkeypatch, kill_at
):
    windows, adapters = {}, {}
    monkeypatch.setattr(test_trainer, "FakeMeter", lambda: energy.Meter((2.0, 5.0, 12.0), 0.3))
    for where in ("cuda", "cpu"):  # as on a processor, and with the condition forced
        monkeypatch.setattr(trainer, "WARMED_UP_ON", {where})
        if kill_at:
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / where, kill_at)
        with monkeypatch.context() as patched:
            late = Late(patched)
            adapters[where], made, watch, _ = train(tmp_path / where)
        windows[where] = watch.meter.total["window_s"]
        steps = made.state.max_steps - watch.first_step
        assert late.calls == steps + (trainer.WARM_UP_STEPS if where == "cpu" else 0)
    assert all(torch.equal(adapters["cuda"][name], adapters["cpu"][name]) for name in adapters["cpu"])
    assert windows["cpu"] < 100 <= windows["cuda"]


def test_a_warm_up_leaves_gradients_and_random_numbers_alone_and_survives_a_row_that_does_not_fit(
    tmp_path, monkeypatch
):
    _, made, _, _ = train(tmp_path)
    for parameter in made.trained:
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    late = Late(monkeypatch)
    made.warm_up()
    assert late.calls == trainer.WARM_UP_STEPS >= 5
    assert torch.equal(torch.get_rng_state(), state) and all((p.grad == 1).all() for p in made.trained)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "token_losses", full)
    made.warm_up()
    monkeypatch.setattr(trainer, "token_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.warm_up()
