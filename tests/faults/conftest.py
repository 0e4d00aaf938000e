"""The study in which a test plants its faults, once with ordinary processes and once with forked ones."""

import pytest
from fault_runs import Study, wait_for


@pytest.fixture(params=["0", "1"], ids=["plain", "warm"])
def study(tmp_path, request):
    study = Study(tmp_path, request.param)
    yield study
    wait_for(lambda: not [*study.temporary.glob("tnb-*")], 2.5)  # no temporary folder is left
