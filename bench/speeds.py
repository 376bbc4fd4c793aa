"""Writes pyops/speeds.json, from which gradmill.convert warns, from committed results of what trains one linear layer or convolution.

    python bench/speeds.py bench/results/cpu-*.json
"""
from __future__ import annotations

import json
import pathlib
import re
import sys

from gradmill._files import replacing

OUT = pathlib.Path(__file__).resolve().parent.parent / "pyops/speeds.json"


def main(files):
    table = {}
    for file in files:
        data = json.loads(pathlib.Path(file).read_text())
        for result in data["results"]:
            layer = re.match(r"(?:linear|conv2d) forward \+ backward, .*?(\d+)->(\d+)(?:, (\d+x\d+))?", result["title"])
            if layer and not data["settings"]["tiny"]:
                inputs, outputs, window = layer.groups()
                shape = "x".join(filter(None, (inputs, window, outputs)))
                times = {e["label"]: e["median_s"] for e in result["entries"] if "median_s" in e}
                isa = table.setdefault(data["machine"]["isa"], {})
                for label, time in times.items():
                    if label.startswith("gradmill, recipe "):
                        isa.setdefault(label.removeprefix("gradmill, recipe "), {})[shape] = round(times["torch fp32"] / time, 2)
    if not table:  # an empty one would be written over the warnings that convert gives
        sys.exit(f"no layer forward and backward in {', '.join(files) or 'no file'}")
    with replacing(OUT) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
