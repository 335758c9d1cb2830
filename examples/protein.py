"""A masked model of proteins redesigns a sequence toward a property that is counted, its motif kept.

    python examples/protein.py --output_dir runs/protein
    python examples/protein.py --model facebook/esm2_t12_35M_UR50D --output_dir runs/protein --max_steps 400

The designed positions are masked, the others are clues. The reward counts charges and weighs hydropathy, by numbers
that anyone can check; put a predictor of your own in its place. Prints designs before and after, and writes model
and designs to the folder. All options of `dam.train.DAMConfig` are options here.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser

from dam.train import DAMConfig, DAMTrainer

DESIGNS = 256  # of the model before and after
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
# Kyte and Doolittle, A simple method for displaying the hydropathic character of a protein, 1982.
HYDROPATHY = dict(zip("ARNDCQEGHILKMFPSTWYV", (
    1.8, -4.5, -3.5, -3.5, 2.5, -3.5, -3.5, -0.4, -3.2, 4.5, 3.8, -3.9, 1.9, 2.8, -1.6, -0.8, -0.7, -0.9, -1.3, 4.2,
), strict=True))  # fmt: skip
CHARGE = {"K": 1, "R": 1, "D": -1, "E": -1}  # at pH 7, without histidine's tenth


@dataclasses.dataclass
class Script:
    model: str = dataclasses.field(
        default="facebook/esm2_t6_8M_UR50D",
        metadata={"help": "A folder, or a name on the hub, of a masked language model of amino acids."},
    )
    sequence: str = dataclasses.field(
        default="GIGKFLHSAKKFGKAFVGEIMNS",  # magainin 2, an antimicrobial peptide
        metadata={"help": "What is redesigned, in one-letter codes."},
    )
    keep: list[int] = dataclasses.field(
        default_factory=lambda: [0, 4, 11, 15], metadata={"help": "Positions, from 0, that stay as they are."}
    )
    charge: float = dataclasses.field(default=6.0, metadata={"help": "The net charge to come to."})
    hydropathy: float = dataclasses.field(default=0.0, metadata={"help": "The mean hydropathy to come to."})


def properties(sequence: str) -> tuple[float, float]:
    """Net charge, and mean hydropathy."""
    charge = sum(CHARGE.get(letter, 0) for letter in sequence)
    return float(charge), sum(HYDROPATHY[letter] for letter in sequence) / len(sequence)


def score(sequence: str, charge: float, hydropathy: float) -> float:
    """0 where both are met, less by how far they are missed."""
    found = properties(sequence)
    return -abs(found[0] - charge) / 4 - abs(found[1] - hydropathy)


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Trains; returns the designs at the end."""
    parser = HfArgumentParser((Script, DAMConfig))
    parser.set_defaults(
        beta=0.2, max_steps=120, learning_rate=1e-3, per_device_train_batch_size=256, replay_batch_size=32,
        num_iterations=2, logging_steps=10, diffusion_steps=None, eval_temperature=1.0,  # designs are draws
    )  # fmt: skip
    script, args = parser.parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    letters = tokenizer.convert_tokens_to_ids(list(AMINO_ACIDS))
    # A tokenizer of amino acids has signs for what is rare, unknown or a gap: none of them is a design.
    args.suppress_tokens = sorted(set(range(len(tokenizer))) - {*letters, tokenizer.mask_token_id})
    args.stop_token_ids = []

    clues = [letter if n in script.keep else tokenizer.mask_token for n, letter in enumerate(script.sequence)]
    row = {"input_ids": tokenizer(" ".join(clues))["input_ids"]}

    def sequences(completion_ids: Sequence[Sequence[int]]) -> list[str]:
        known = set(letters)
        return ["".join(tokenizer.convert_ids_to_tokens([n for n in ids if n in known])) for ids in completion_ids]

    def reward(completion_ids, **_):
        return [score(found, script.charge, script.hydropathy) for found in sequences(completion_ids)]

    trainer = DAMTrainer(
        script.model,
        reward,
        args,
        train_dataset=[row] * 4096,
        eval_dataset=[row] * DESIGNS,
        processing_class=tokenizer,
    )

    def designs() -> list[str]:
        return sequences(trainer.predict([row] * DESIGNS).predictions.tolist())

    before = designs()
    trainer.train()
    after = designs()
    for title, found in (("before", before), ("after", after)):
        scores = torch.tensor([score(one, script.charge, script.hydropathy) for one in found])
        print(f"{title}: score {scores.mean():.2f}, {len(set(found))} of {len(found)} differ")
        for one in found[:4]:
            charge, hydropathy = properties(one)
            print(f"  {one}  charge {charge:+.0f}  hydropathy {hydropathy:+.2f}")
    trainer.save_model(args.output_dir)
    fasta = "".join(f">design_{n}\n{one}\n" for n, one in enumerate(after))
    (Path(args.output_dir) / "designs.fasta").write_text(fasta, encoding="utf-8")
    return after


if __name__ == "__main__":
    main()
