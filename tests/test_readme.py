"""The README's code runs as it stands, and its files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*inplace.*")  # pandas', of EvoTorch's PandasLogger
def test_evotorch_snippet(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    names = {}
    exec(code.replace("searcher.run(100)", "searcher.run(20)"), names)
    frame = names["logger"].to_dataframe()
    assert len(frame) == 20
    assert frame["mean_eval"].iloc[-1] < frame["mean_eval"].iloc[0]
    assert "certified" in capsys.readouterr().out


def test_links_lead_somewhere():
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/bounds.md",
        "docs/certificates.md",
        "docs/decisions.md",
        "docs/method.md",
        "docs/results.md",
        "docs/performance.md",
    ):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "problems").glob("*.py")), ids=lambda p: p.stem)
def test_problem_files_load_and_fit_a_screen(path):
    from evocert.problem_files import load_problem

    assert load_problem(path).experiment.problem == path.stem
    assert len(path.read_text().splitlines()) <= 60
