"""The architectures that are computed exactly, on a GPU's path: attention by bounds, filled rows, recordings."""

import pytest
import torch
from architectures import CASES, adapted, refusal

from telco_nb.lora import step, step_graph
from telco_nb.lora.packing import IGNORE_INDEX, Example, PackedRows
from tests.unit.lora.test_step_graph import attend_within_bounds, record_as_a_graph_does, take_gpu_path

EXACT, REFUSED = [case for case in CASES if not case.why], [case for case in CASES if case.why]
RECORDED = {"Llama, SmolLM2", "Qwen2, Qwen2.5"}  # the fused ones of README's table
LENGTHS = (9, 17, 21, 5, 13, 30, 7, 11)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The longest conversation that each call of the attention by bounds was told."""
    take_gpu_path(monkeypatch)
    told = []
    monkeypatch.setattr(step, "varlen_attn", lambda *a, **k: told.append(a[5]) or attend_within_bounds(*a, **k))
    return told


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Example(f"e{i}", tokens, [IGNORE_INDEX] * 2 + tokens[2:]) for i, tokens in enumerate(ids)]


def gradients(tuned, losses: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(losses.sum(), [p for p in tuned.parameters() if p.requires_grad]))


def by_transformers(tuned, row: list[Example]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses and gradients of conversations, one by one, each with all its logits and the model's own attention."""
    losses, total = [], None
    for example in row:
        losses.append(step.plain_token_losses(tuned, example))
        found = gradients(tuned, losses[-1])
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return torch.cat(losses).detach(), total


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    apart = torch.stack([(a - b).double().norm() for a, b in zip(found, wanted, strict=True)]).norm()
    return (apart / torch.stack([b.double().norm() for b in wanted]).norm()).item()


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_the_step_on_a_gpu_s_path_has_the_losses_and_all_gradients_of_transformers(case, calls):
    _, tuned = adapted(case)
    rows = PackedRows(examples(), 60, 0)
    assert any(n % 32 for n in rows.tokens), "some rows are filled"
    for row, conversations in zip(rows, rows.rows, strict=True):
        calls.clear()
        losses = step.token_losses(tuned, row)
        assert len(calls) == tuned.config.num_hidden_layers, "all attention is by bounds"
        found, (wanted, wanted_gradients) = gradients(tuned, losses), by_transformers(tuned, conversations)
        assert relative([losses.detach()], [wanted]) < 1e-5 and relative(found, wanted_gradients) < 1e-4


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_a_recorded_step_has_the_losses_and_all_gradients_of_transformers_and_others_are_not_recorded(
    case, monkeypatch
):
    monkeypatch.setattr(step_graph, "record_cuda", record_as_a_graph_does)
    kind, tuned = adapted(case)
    rows = PackedRows(examples(), 60, 0)
    graph, fault = step_graph.record_step(tuned, [p for p in tuned.parameters() if p.requires_grad], rows)
    if case.name not in RECORDED:
        assert (graph, fault, kind) == (None, "not this kind of step", "plain")
        return
    assert fault is None and len({*rows.tokens}) > 1
    for row, conversations in zip(rows, rows.rows, strict=True):
        wanted, wanted_gradients = by_transformers(tuned, conversations)
        loss, found = graph.result(row)
        assert loss.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
        assert relative(list(found), wanted_gradients) < 1e-4


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused_on_a_processor_is_refused_on_a_gpu_s_path_as_well(case):
    assert case.message in refusal(case)
