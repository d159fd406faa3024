"""Every causal-LM family of transformers passes --verify or is refused in one line, and docs/models.md says which."""

import families
import pytest
import transformers


@pytest.mark.slow
def test_every_family():
    """No traceback, no failed check, no refusal of several lines; the page's table is what is found here."""
    page = families.PAGE.read_text("utf-8")
    if f"transformers {transformers.__version__}" not in page:
        pytest.skip("docs/models.md is of another version of transformers")
    results = families.all_outcomes(families.families())
    faults = {name: found for name, pair in results.items() for found in pair if found.verdict == "fault"}
    assert not faults, "\n".join(f"{name}: {found.reason}\n{found.output[-2000:]}" for name, found in faults.items())
    assert families.render(results) == page
