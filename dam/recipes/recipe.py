"""A recipe: what `dam train` is to do, of one YAML file that is read strictly."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dam.kernels.environment import nearest
from dam.train import DAMConfig
from dam.train.pretrained import Source


class RecipeError(ValueError):
    """A recipe that cannot be right; names the file and the key."""


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The model: by name, or of random weights by type and config."""

    name: str | None = None  # a folder or a name on the hub; None: random weights
    type: str | None = None  # config.model_type, which the model must have
    # Of transformers: AutoModel, AutoModelForCausalLM or AutoModelForMaskedLM; the family's unless given.
    auto_class: str | None = dataclasses.field(default=None, metadata={"key": "class"})
    dtype: str = "float32"
    trust_remote_code: bool = False
    attn: str | None = None
    revision: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of random weights: arguments of the config
    denoiser: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of `dam.models.as_denoiser`

    def source(self) -> Source:
        """Where it is loaded from; only with a name."""
        assert self.name is not None
        return Source(self.name, self.auto_class, self.dtype, self.trust_remote_code, self.attn, self.revision)


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """The tokenizer: the model's, another one by name, or one of characters that is made without a file."""

    name: str | None = None
    characters: bool = False  # `dam.recipes.characters`
    chat_template: str | None = None
    mask_token: str | None = None
    pad_token: str | None = None
    eos_token: str | None = None


@dataclasses.dataclass(frozen=True)
class TaskSection:
    """The task, and the rows of it that are trained on."""

    name: str
    source: str | None = None  # a file, a folder or a name on the hub; the task's own dataset unless given
    split: str = "train"
    style: str = "d1"
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """What the trained model is evaluated on, and during the run with config.eval_strategy."""

    source: str | None = None
    split: str = "test"
    limit: int | None = None
    samples: int = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run."""

    model: ModelSection
    task: TaskSection
    tokenizer: TokenizerSection = TokenizerSection()
    eval: EvalSection | None = None
    peft: dict[str, Any] | None = None  # arguments of peft.LoraConfig
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `dam.train.DAMConfig`
    output: str | None = None  # folder of the results

    def as_dict(self) -> dict[str, Any]:
        """As `read` takes it."""
        return _as_dict(self)

    def training_config(self, output: str, **changes: Any) -> DAMConfig:
        """The arguments of the trainer.

        Raises:
            RecipeError: as `DAMConfig` refuses them.
        """
        try:
            return DAMConfig(output_dir=output, **{**self.config, **changes})
        except (ValueError, TypeError) as error:
            raise RecipeError(f"config: {error}") from error


def shipped() -> dict[str, Path]:
    """Files of the recipes that come with dam, by name."""
    folder = Path(str(resources.files("dam.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def title(path: Path) -> str:
    """What the comment at a recipe's top begins with."""
    return path.read_text(encoding="utf-8").removeprefix("#").strip().partition("\n")[0].partition(". ")[0].rstrip(".:")


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of a file, or one that comes with dam, by its name.

    Args:
        recipe: path of a file, or a name.
        overrides: "config.learning_rate=1e-5" and the like; what is behind = is read as YAML.

    Raises:
        RecipeError: there is no such recipe, or it cannot be right.
    """
    path, known = Path(recipe), shipped()
    if not path.is_file():
        if recipe not in known:
            raise RecipeError(
                f"no recipe {recipe}: it is no file, and those that come with dam are {', '.join(known)}"
                + nearest(recipe, known)
            )
        path = known[recipe]
    values = parsed(path.read_text(encoding="utf-8"), str(path))
    for override in overrides:
        _set(values, override)
    try:
        return _located(read(values), path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """Sources of rows that are files beside the recipe, by their path from here."""

    def path_of(source: str | None) -> str | None:
        beside = source is not None and not Path(source).exists() and (folder / source).exists()
        return str(folder / str(source)) if beside else source

    task = dataclasses.replace(recipe.task, source=path_of(recipe.task.source))
    if recipe.eval is None:
        return dataclasses.replace(recipe, task=task)
    return dataclasses.replace(
        recipe, task=task, eval=dataclasses.replace(recipe.eval, source=path_of(recipe.eval.source))
    )


def parsed(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping, by the rules of YAML 1.2: 1e-6 is a number, `no` and `on` are text, and no key comes twice.

    Raises:
        RecipeError: it is no YAML, or no mapping; `where` it came from.
    """
    values = _yaml(text, where)
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of {', '.join(_keys(Recipe))}; got {_kind(values)}")
    return values


def _yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's scalars; YAML 1.1's, which PyYAML reads, have 3e-6 as text and `no` as false."""

        yaml_implicit_resolvers: typing.ClassVar[dict[Any, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise RecipeError(f"{where}: the key {key!r} comes twice, at line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)", "-+.0123456789"),
        ("null", r"~|null|Null|NULL|", "~nN"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), [*first, ""])
    Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # 010 is 10, and no octal number
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: no YAML: {error}") from error


def _set(values: dict[str, Any], override: str) -> None:
    """Puts an override into what was read, in place."""
    path, given, value = override.partition("=")
    keys = path.split(".")
    if not given or not all(keys):
        raise RecipeError(f"--set takes section.key=value; got {override!r}")
    inside = values
    for key in keys[:-1]:
        if inside.get(key) is None:
            inside[key] = {}
        inside = inside[key]
        if not isinstance(inside, dict):
            raise RecipeError(f"--set {override}: {key} is no section")
    inside[keys[-1]] = _yaml(value, f"--set {override}")


def read(values: Mapping[str, Any]) -> Recipe:
    """A recipe of its values, each of which must be known and have the type of its place.

    Raises:
        RecipeError: names the key, and the nearest known one.
    """
    recipe: Recipe = _section(Recipe, values, "")
    if recipe.model.name is None and recipe.model.type is None:
        raise RecipeError("model.name is missing (or model.type, for random weights)")
    if recipe.model.name is not None and recipe.model.config:
        raise RecipeError("model.config is of random weights: it does not go with model.name")
    if recipe.model.name is not None:
        _checked_by("model", recipe.model.source)
    if recipe.model.name is None and not (recipe.tokenizer.characters or recipe.tokenizer.name):
        raise RecipeError("a model of random weights has no tokenizer: give tokenizer.name, or tokenizer.characters")
    if recipe.tokenizer.characters and recipe.tokenizer.name:
        raise RecipeError("tokenizer.name and tokenizer.characters exclude each other")
    for name, least in (("task.limit", 1), ("eval.limit", 1), ("eval.samples", 1)):
        section, _, key = name.partition(".")
        value = getattr(getattr(recipe, section), key, None)
        if value is not None and value < least:
            raise RecipeError(f"{name} must be at least {least}; got {value}")
    known = {field.name: field for field in dataclasses.fields(DAMConfig) if field.init}
    known.pop("output_dir")
    if "output_dir" in recipe.config:
        raise RecipeError("config.output_dir is the recipe's output")
    _known_keys(recipe.config, known, "config")
    _check_types(DAMConfig, recipe.config, "config")
    if recipe.peft is not None:
        lora = _lora_config()
        _known_keys(recipe.peft, [field.name for field in dataclasses.fields(lora) if field.init], "peft")
        _check_types(lora, recipe.peft, "peft")
        if not recipe.peft.get("target_modules"):
            raise RecipeError(
                "peft.target_modules is missing: an expression for the full names of modules, as r = "
                r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
            )
    if recipe.eval is not None and recipe.eval.samples > 1 and is_deterministic(recipe.config):
        raise RecipeError(
            f"eval.samples is {recipe.eval.samples}, but all samples of a prompt would be the same: set "
            "config.eval_temperature above 0"
        )
    return recipe


def is_deterministic(config: Mapping[str, Any]) -> bool:
    """Whether by arguments of `DAMConfig` evaluation always says the same: likeliest tokens, in no random order."""
    return not config.get("eval_temperature", 0.0) and config.get("eval_remasking", "random") != "random"


def _checked_by(where: str, make: Any) -> None:
    try:
        make()
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _lora_config() -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("peft in a recipe needs peft: pip install 'discrete-adjoint-matching[peft]'") from error
    return LoraConfig


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _keys(section: Any) -> list[str]:
    return [_key(field) for field in dataclasses.fields(section)]


def _known_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            place = f"{where}.{key}" if where else str(key)
            raise RecipeError(f"unknown key {place}{nearest(str(key), known)}")


def _section(kind: Any, values: Any, where: str) -> Any:
    """A dataclass of a mapping."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'a recipe'} must be a mapping of {', '.join(_keys(kind))}; got {_kind(values)}")
    _known_keys(values, _keys(kind), where)
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        key = _key(field)
        place = f"{where}.{key}" if where else key
        if key not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise RecipeError(f"{place} is missing")
            continue
        value, options = values[key], _options(hints[field.name])
        inner = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if inner is not None and not (value is None and type(None) in options):
            given[field.name] = _section(inner, value, place)
            continue
        if value is None and field.default_factory is dict:
            value = {}  # an empty section
        _check_type(value, hints[field.name], place)
        given[field.name] = copy.deepcopy(value)
    return kind(**given)


def _check_types(kind: Any, values: Mapping[str, Any], where: str) -> None:
    """Values against the annotations of a class, where these say plain types."""
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        field = kind.__dataclass_fields__[key]
        if value is None and field.default is None:
            continue  # some say int where None is the default
        _check_type(value, hints[key], f"{where}.{key}")


_PLAIN = {str: "text", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "a mapping"}


def _options(hint: Any) -> list[Any]:
    """The types that an annotation admits, without what they hold."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if origin is typing.Literal:
        return list({type(value) for value in typing.get_args(hint)})
    return [origin or hint]


def _check_type(value: Any, hint: Any, place: str) -> None:
    options = _options(hint)
    allowed = [option for option in options if option in _PLAIN]
    # Of an enumeration a recipe has its text; of a set a list; what else there is says itself what it takes.
    if any(isinstance(option, type) and issubclass(option, str) for option in options) and str not in allowed:
        allowed.append(str)
    if set in options and list not in allowed:
        allowed.append(list)
    if not allowed or (value is None and type(None) in options):
        return
    fits = [
        option
        for option in allowed
        if (isinstance(value, option) and (option is bool or not isinstance(value, bool)))
        or (option is float and isinstance(value, int) and not isinstance(value, bool))
    ]
    if not fits:
        wanted = " or ".join([_PLAIN[option] for option in allowed] + ["null"] * (type(None) in options))
        raise RecipeError(f"{place} must be {wanted}; got {_kind(value)} ({value!r})")


def _kind(value: Any) -> str:
    return "null" if value is None else _PLAIN.get(type(value), type(value).__name__)


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {_key(field): _as_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
