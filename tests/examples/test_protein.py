"""examples/protein.py, on a tiny random model of ESM's class with ESM's tokens."""

import importlib

import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

from tests.architectures import small_sizes

# In the order of ESM-2's own vocabulary.
TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(TOKENS), encoding="utf-8")
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**small_sizes(len(TOKENS)), "hidden_size": 32}
    options = {"position_embedding_type": "rotary", "mask_token_id": TOKENS.index("<mask>"), "token_dropout": True}
    EsmForMaskedLM(EsmConfig(**sizes, **options)).save_pretrained(folder)
    return folder


def test_designs_keep_their_motif_and_get_better(folder, tmp_path, capsys):
    protein = importlib.import_module("examples.protein")
    options = ["--model", str(folder), "--output_dir", str(tmp_path / "out"), "--sequence", "GIGKFLHSAKKF"]
    options += ["--keep", "0", "4", "--charge", "5", "--max_steps", "10", "--learning_rate", "0.01", "--use_cpu"]
    after = protein.main([*options, "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"])
    assert all(len(one) == 12 and one[0] == "G" and one[4] == "F" for one in after)
    assert set("".join(after)) <= set(protein.AMINO_ACIDS)
    said = capsys.readouterr().out
    before, now = (float(said.split(f"{title}: score ")[1].split(",")[0]) for title in ("before", "after"))
    # Scores of designs have a standard deviation of about 0.7, so the difference of two means of 256 one of 0.06.
    assert now > before + 0.25
    assert (tmp_path / "out" / "designs.fasta").read_text().count(">") == protein.DESIGNS
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_scores_are_those_of_the_published_numbers():
    protein = importlib.import_module("examples.protein")
    assert sorted(protein.HYDROPATHY) == sorted(protein.AMINO_ACIDS)
    assert protein.properties("KRDE") == (0.0, (-3.9 - 4.5 - 3.5 - 3.5) / 4)
    # Magainin 2: four lysines and one glutamate among what is charged.
    assert protein.properties("GIGKFLHSAKKFGKAFVGEIMNS")[0] == 3.0
    assert protein.score("KKKKAAAA", 4.0, (4 * -3.9 + 4 * 1.8) / 8) == pytest.approx(0.0)
