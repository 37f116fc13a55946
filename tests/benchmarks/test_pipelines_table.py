"""The table of pipelines has a row for each that the tests lead, and says what they hold."""

import json

from benchmarks.pipelines_table import MAKES, RESULTS
from tests.integrations.diffusers.led import CALLS, NOISY


def test_each_pipeline_has_its_row() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [row["pipeline"] for row in rows] == list(MAKES) and MAKES.keys() == CALLS.keys()
    for row in rows:
        assert row["fitted"] < row["own"] and row["saved"] < 1e-3 and row["in_pipeline"] < 1e-5, row["pipeline"]
        assert (row["ddim"] is None) == (row["scheduler"] in NOISY) and (row["ddim"] or 0) < 1e-3
