"""Print the oldest version that pyproject.toml allows of each dependency, as constraints for pip."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
# `quant` has floors of its own, above the others'; `bench` and `dev` are for developers.
run_time = re.sub(r"^quant = .*$", "", text[: text.index("\nbench = ")], flags=re.MULTILINE)
for name, floor in re.findall(r'"(\w[\w-]+)>=([\d.]+)"', run_time):
    print(f"{name}=={floor}")
