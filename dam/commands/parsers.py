"""The command lines of dam train, generate, eval and sampler, and their exit codes; parsed with torch alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dam.decoding import ORDERS

COMMANDS = ("train", "generate", "eval", "sampler")


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the four commands."""
    _add_sampler(commands)
    _add_train(commands)
    generate = commands.add_parser(
        "generate",
        help="fill in completions of prompts, a JSON object a line",
        description="Writes completions of prompts. The same command goes on with a file that was interrupted.",
    )
    _add_model(generate)
    prompts = generate.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines with "prompt", text or messages, or a prompt a line; - is standard input',
    )
    prompts.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put text of --prompts through the chat template, as a user's message (default: where there is one)",
    )
    prompts.add_argument("--task", metavar="NAME", help="the prompts of a task, instead of --prompts")
    _add_rows(prompts)
    _add_law(generate)
    generate.add_argument("--out", metavar="FILE", required=True, help="JSON lines")
    evaluate = commands.add_parser(
        "eval",
        help="a task's metrics of a model's completions",
        description="Completions into a folder, and metrics of them as a table and as JSON. The same command goes on "
        "where it was interrupted.",
    )
    _add_model(evaluate)
    evaluate.add_argument("--task", metavar="NAME", required=True)
    _add_rows(evaluate)
    _add_law(evaluate)
    evaluate.add_argument("--out", metavar="DIR", required=True, help="folder of completions.jsonl and metrics.json")


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a language model by a recipe",
        description="Runs a recipe: a YAML file, or one that comes with dam, by its name (docs/recipes.md).",
    )
    option = train.add_argument
    option("recipe", nargs="?", help="file or name; with --resume that of the run in --output unless given")
    option("--set", metavar="KEY=VALUE", action="append", default=[], help="config.learning_rate=1e-5 and the like")
    option("--model", metavar="NAME", help="short for --set model.name=NAME")
    option("--output", metavar="DIR", type=Path, help="folder of the results (default: a new one in runs/)")
    option("--resume", action="store_true", help="continue the run in --output (default: the newest one)")
    option("--dry-run", action="store_true", help="two steps of a small random model of the same class, on a few rows")
    option("--list", action="store_true", help="the recipes that come with dam")


def _add_sampler(commands: argparse._SubParsersAction) -> None:
    sampler = commands.add_parser(
        "sampler",
        help="train a sampler of a density",
        description="Trains a sampler of a density e^(-E) from its energy alone (docs/samplers.md). The same command "
        "with --resume goes on with a run that was interrupted, to the same result.",
        argument_default=argparse.SUPPRESS,  # what is not given is the preset's
    )
    option = sampler.add_argument
    option("--target", metavar="NAME", default="many-well-5", help="default: many-well-5; another name lists all")
    option(
        "--learner",
        metavar="NAME",
        default=None,
        help="naas, adjoint-sampling or adjoint-matching (default: the first with settings for the target)",
    )
    option("--output", metavar="DIR", type=Path, default=None, help="default: a new folder in runs/")
    option("--resume", action="store_true", default=False, help="continue the run in --output (default: the newest)")
    option("--samples", metavar="N", type=int, default=500, help="of each look at it (default: 500)")
    option("--looks", metavar="N", type=int, default=10, help="at samples, each with a checkpoint (default: 10)")
    option("--rounds", metavar="N", type=int)
    option("--paths", metavar="N", type=int, help="of each round")
    option("--steps", metavar="N", type=int, help="of a path")
    option("--learning-rate", metavar="R", type=float)
    option("--seed", metavar="S", type=int)


def _add_model(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("model", help="folder or name of a model or an adapter, what dam train saved among them")
    option(
        "--class", dest="model_class", metavar="NAME", help="AutoModel, AutoModelForCausalLM or AutoModelForMaskedLM"
    )
    option("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    option("--trust-remote-code", action="store_true", help="run code that comes with the model")
    option("--attn", metavar="NAME", help="sdpa, eager, flash_attention_2")
    option("--revision", metavar="REV", help="of a name on the hub")
    option("--device", metavar="NAME", help="default: the first GPU, if there is one")
    option("--denoiser", metavar="JSON", type=_mapping, help='options of the family, {"block_length": 8} for one')


def _add_rows(parser: Any) -> None:
    option = parser.add_argument
    option("--source", metavar="NAME", help="file, folder or hub name of the task's rows (default: its own dataset)")
    option("--split", default="test", help="of the source (default: test)")
    option("--style", default="d1", help="of the task's prompts, d1 (default) or llada")
    option("--limit", metavar="N", type=int, help="the first rows only")


def _add_law(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("decoding (docs/decoding.md)").add_argument
    option("--samples", metavar="N", type=int, default=1, help="completions of each prompt (default: 1)")
    option("--seed", type=int, default=0, help="default: 0")
    option("--max-completion-length", metavar="L", type=int, default=128, help="default: 128")
    option("--steps", metavar="N", type=int, help="network calls per completion (default: one for each token)")
    option("--block-length", metavar="L", type=int, help="fill blocks from left to right")
    option("--order", choices=ORDERS, default="confidence", help="which position is next (default: confidence)")
    option("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    option("--threshold", type=float, help="a network call fills all positions beyond it")
    option("--top-k", metavar="K", type=int)
    option("--top-p", metavar="P", type=float)
    option("--guidance", metavar="W", type=float, default=0.0, help="scale of classifier-free guidance")
    option("--mask-token-id", metavar="ID", type=int, help="default: the tokenizer's or the model's")
    option("--stop-token-ids", metavar="ID", type=int, nargs="*", help="default: the tokenizer's end of text")
    option("--suppress-tokens", metavar="ID", type=int, nargs="*", help="never drawn")
    option("--chat-template-kwargs", metavar="JSON", type=_mapping, help="passed to the chat template")
    option("--batch-size", metavar="B", type=int, default=16, help="completions at once (default: 16)")


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"a JSON object, please: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object, please; got {text}")
    return value


def run(options: argparse.Namespace) -> int:
    """Runs one of the four; the exit status."""
    prog = f"dam {options.command}"
    if options.command == "sampler":
        from dam.commands import sampler  # needs nothing of transformers, as the others do

        return sampler.command(options)
    if getattr(options, "batch_size", 1) < 1:
        print(f"{prog}: --batch-size must be at least 1; got {options.batch_size}", file=sys.stderr)
        return 1
    try:
        from dam.tasks.finetune import Stopped
        from dam.train import RewardError
        from dam.train.terminal import no_bars_in_pipes

        try:
            with no_bars_in_pipes():
                text = {"train": _train, "generate": _generate, "eval": _eval}[options.command](options)
        except (ValueError, TypeError, OSError, RewardError) as error:
            print(f"{prog}: {error}", file=sys.stderr)
            return 1
        except Stopped as stop:
            print(f"{prog}: {stop}. Continue with the same command and --resume", file=sys.stderr)
            return 130
        except KeyboardInterrupt:
            more = " and --resume" if options.command == "train" else ""
            print(f"{prog}: interrupted. Continue with the same command{more}", file=sys.stderr)
            return 130
    except ImportError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    if text:
        from dam.train.terminal import show

        show(text)
    return 0


def _train(options: argparse.Namespace) -> str:
    from dam.commands.train import recorded, report, train
    from dam.recipes import recipe as recipes

    if options.list:
        return "\n".join(f"{name:24} {recipes.title(path)}" for name, path in recipes.shipped().items())
    overrides = [*options.set, *([f"model.name={options.model}"] if options.model else [])]
    if options.recipe is None:
        if not options.resume or options.output is None:
            raise ValueError("which recipe? A file, or a name of `dam train --list`")
        if overrides:
            raise ValueError("--set goes with a recipe: name it beside --resume")
        recipe, name = recorded(options.output), "train"
    else:
        recipe, name = recipes.load(options.recipe, overrides), Path(options.recipe).stem
    result = train(recipe, options.output, name=name, resume=options.resume, dry_run=options.dry_run)
    from accelerate import PartialState

    return report(result) if PartialState().is_main_process else ""


def _generate(options: argparse.Namespace) -> str:
    from dam.commands.generate import generate

    result = generate(options)
    return f"{result['completions']} completions: {result['out']}"


def _eval(options: argparse.Namespace) -> str:
    from dam.commands.evaluate import evaluate, table

    return f"{table(evaluate(options))}\n\ncompletions and metrics: {options.out}"
