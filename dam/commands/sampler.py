"""`dam sampler`: one run of a sampler of a density into a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dam import files

_SETTINGS = ("rounds", "paths", "steps", "learning_rate", "seed")


def command(options: argparse.Namespace) -> int:
    """Runs what was parsed; the exit status."""
    prog = "dam sampler"
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in _SETTINGS}
    output: Path | None = options.output
    try:
        from dam.tasks import sampling

        for name in ("samples", "looks"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(options, name)}")
        if options.resume:
            output = output or files.last_output("sampler")
            if not (output / sampling.STATE).exists():
                raise ValueError(f"nothing to resume: {output} holds no checkpoint of dam sampler")
        else:
            output = files.unused(output or files.next_output("sampler"))
        learner = options.learner or next(iter(sampling.tried(options.target)), sampling.LEARNERS[0])
        result = sampling.run(
            output, options.target, learner, changes=given, samples=options.samples, looks=options.looks
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted. Continue with the same command, --resume and --output {output}", file=sys.stderr)
        return 130
    print(f"after {result['energy_calls']:,} energy calls in training: {output}")
    return 0
