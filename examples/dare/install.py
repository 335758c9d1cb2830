"""Puts this recipe into a checkout of DARE: copies three files and adds four branches for algorithm.name "dam".

    python install.py PATH_OF_DARE

Where a place is not found once, as in another version of DARE than commit 83ae8a3, nothing is changed and the message
says which; README.md here says what each branch does, to add it by hand.

Run here: on DARE at that commit, whose files compiled afterwards (tests/examples/dare_itself.py). Not run here: DARE.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FILES = {
    "dam_loss.py": "verl/trainer/ppo/dam_loss.py",
    "dam_actor.py": "verl/workers/actor/dam_actor.py",
    "dam_rollout.py": "verl/workers/rollout/dam_rollout.py",
    "run_dam_llada_8b_instruct.sh": "recipe/llada/run_dam_llada_8b_instruct.sh",
}
WORKERS, TRAINER = "verl/workers/dllm_fsdp_workers.py", "verl/trainer/ppo/dllm_ray_trainer.py"


class Edit(NamedTuple):
    """A place in a file, and what stands there afterwards."""

    what: str
    file: str
    before: str
    after: str


EDITS = (
    Edit(
        "init_model: the actor",
        WORKERS,
        "\n        if self.config.model.name == 'llada':\n",
        """
        if self.config.algorithm.name == "dam":
            from verl.workers.actor.dam_actor import DLLMDataParallelPPOActor
        elif self.config.model.name == 'llada':
""",
    ),
    Edit(
        "_build_rollout: the rollout",
        WORKERS,
        '\n        if rollout_name == "hf":\n',
        """
        if self.config.algorithm.name == "dam":
            from verl.workers.rollout.dam_rollout import DAMRollout
            from verl.workers.sharding_manager.base import BaseShardingManager

            if rollout_name != "hf":
                raise ValueError(f"dam draws in the actor's own model: set rollout.name=hf, not {rollout_name}")
            rollout = DAMRollout(module=self.actor_module_fsdp, config=self.config.rollout, tokenizer=self.tokenizer)
            rollout_sharding_manager = BaseShardingManager()
        elif rollout_name == "hf":
""",
    ),
    Edit(
        "fit: log-probabilities",
        TRAINER,
        'elif self.config.algorithm.name == "justgrpo":',
        'elif self.config.algorithm.name in ("justgrpo", "dam"):',
    ),
    Edit(
        "fit: the weights",
        TRAINER,
        """pf_ppo_weight_pow=self.config.algorithm.pf_ppo.weight_pow,
                            )
""",
        """pf_ppo_weight_pow=self.config.algorithm.pf_ppo.weight_pow,
                            )
                            if self.config.algorithm.name == "dam":
                                from verl.trainer.ppo.dam_loss import weigh

                                done = (self.global_steps - 1) / self.total_training_steps
                                metrics.update(weigh(batch, self.config.algorithm.get("dam"), done))
""",
    ),
)


def install(dare: Path) -> None:
    """Copies and edits, or changes nothing.

    Raises:
        ValueError: it is no checkout of DARE, has the recipe already, or is of another version.
    """
    texts = {}
    for name in (WORKERS, TRAINER):
        if not (dare / name).is_file():
            raise ValueError(f"{dare} has no {name}: give the folder of a checkout of https://github.com/yjyddq/DARE")
        texts[name] = (dare / name).read_text()
        if "dam_actor" in texts[name] or "dam_loss" in texts[name]:
            raise ValueError(f"{name} has the recipe already: git checkout it to put it in anew")
    for edit in EDITS:
        found = texts[edit.file].count(edit.before)
        if found != 1:
            raise ValueError(
                f"{edit.file}, {edit.what}: the place of the branch was found {found} times, not once, as in commit "
                "83ae8a3 of DARE; nothing was changed. Add the branches by hand (README.md, What a user must do)"
            )
        texts[edit.file] = texts[edit.file].replace(edit.before, edit.after)
    for name, text in texts.items():
        (dare / name).write_text(text)
    for name, place in FILES.items():
        (dare / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / name, dare / place)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    install(Path(sys.argv[1]))
    print("the recipe is in place: bash recipe/llada/run_dam_llada_8b_instruct.sh --task math")
