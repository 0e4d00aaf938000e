"""bench/gpu.py runs on a processor with tiny sizes, so that the run on a card is not its first."""

import pytest

from bench import gpu, gradients


def test_the_variants_compute_one_gradient_and_what_a_processor_cannot_tell_is_missing(capsys):
    found = gpu.main(("plain", "no-cast", "fused", "padded", "compiled", "TRL"), tiny=True)
    measured = {one["variant"]: one for one in found if "failed" not in one}
    assert list(measured) == ["plain", "no-cast", "fused", "padded", "TRL"]
    assert all(measured[name]["gradient_distance"] < 1e-4 for name in ("no-cast", "fused", "padded")), found
    assert all(one["tokens_per_second"] > 0 and one["tflops"] > 0 for one in measured.values())
    for name in ("watts", "mj_per_token", "peak_gb", "share_of_data_sheet"):
        assert {one[name] for one in measured.values()} == {None}
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(found) and "no figure of this table means anything" in table[0]


@pytest.mark.skipif(gpu.device.on_gpu(), reason="there is a GPU")
def test_on_a_processor_liger_is_left_out_with_the_reason_whether_or_not_it_is_installed(monkeypatch, capsys):
    for installed in (None, object()):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=installed: found)
        (one,) = gpu.main(("TRL+Liger",), tiny=True)
        assert one["failed"] == "Liger needs a GPU" and "TRL+Liger      Liger needs a GPU" in capsys.readouterr().out


def test_without_a_gpu_the_full_size_is_refused(monkeypatch):
    monkeypatch.setattr(gpu.device, "gpu_fault", lambda: "no card.")
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main()
    with pytest.raises(SystemExit, match="knows no fast"):
        gpu.main(("fast",))


def test_the_rows_have_the_tokens_and_labels_of_the_paper_profile():
    rows = gpu.make_rows(gpu.Sizes(rows=2))
    assert max(rows.tokens) <= 8192 and sum(rows.tokens) == pytest.approx(2 * 8192, rel=0.15)
    assert sum(rows.supervised) / sum(rows.tokens) == pytest.approx(0.54, abs=0.02)


def test_the_distances_from_float32_are_those_of_rounding_and_plain_is_0_from_itself(capsys):
    found = gradients.main(("plain", "no-cast", "fused", "compiled"), tiny=True)
    assert list(found)[:3] == ["plain", "no-cast", "fused"]
    assert all(0 < exact < 0.1 and 0 < first < 0.1 for exact, first, _, _ in found.values())
    assert found["plain"][2:] == (0, 0) and found["fused"][2] < 0.1
    assert len(capsys.readouterr().out.splitlines()) == 5
