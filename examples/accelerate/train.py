"""A masked language model learns to write without the letter e, on as many processes as `accelerate launch` starts.

    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/accelerate/train.py \
        --model answerdotai/ModernBERT-base --output_dir runs/without-e --max_steps 100

All options of `dam.train.DAMConfig` are options here.
"""

import dataclasses
import os

from transformers import AutoTokenizer, HfArgumentParser

from dam.train import DAMConfig, DAMTrainer, last_checkpoint

SUBJECTS = ("The sun", "A boy", "My dog", "Our town", "His book", "That night", "This song", "A ship")
VERBS = ("is", "was", "has", "had", "saw", "ran into", "thought about", "found")


@dataclasses.dataclass
class Script:
    model: str = dataclasses.field(metadata={"help": "A folder, or a name on the hub, of a masked language model."})
    resume: bool = dataclasses.field(default=False, metadata={"help": "From the last checkpoint in output_dir."})


def without_e(completions, **_):
    """Minus the number of e's of each completion."""
    return [-float(text.lower().count("e")) for text in completions]


def main():
    script, args = HfArgumentParser((Script, DAMConfig)).parse_args_into_dataclasses()
    prompts = [{"prompt": f"{subject} {verb}"} for subject in SUBJECTS for verb in VERBS]
    trainer = DAMTrainer(
        script.model,
        without_e,
        args,
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(script.model),
    )
    trainer.train(resume_from_checkpoint=script.resume and last_checkpoint(args.output_dir) is not None)
    trainer.save_model(os.path.join(args.output_dir, "model"))  # whole, for from_pretrained, however it is divided


if __name__ == "__main__":
    main()
