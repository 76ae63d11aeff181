"""From YAML and flags to `Config`: a flag beats the file, and every mistake is one line that names the field."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from dppo_mcore.config import Config
from dppo_mcore.runtime.errors import SAYING_S, UserError


class ConfigError(UserError):
    """A wrong configuration; the message is one line that names the field."""


def load(arguments: Sequence[str], prog: str, description: str = "") -> Config:
    """Parse `--config FILE`, `--print-config` and the options' flags. Exits for --help and --print-config."""
    file, show, flags = _split(list(arguments))
    config = Config() if file is None else _from_file(Path(file))
    config = _from_flags(flags, config, prog, description)
    if show:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def load_or_exit(arguments: Sequence[str], prog: str, description: str = "") -> Config:
    """Like `load`, with mistakes printed as one line and exit code 2."""
    try:
        return load(arguments, prog, description)
    except ConfigError as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """End with one line on stderr: a node's first rank says it, and its launcher then ends the others."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(SAYING_S)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def to_yaml(config: Config) -> str:
    """The resolved configuration, by section, as a file that gives the same configuration again."""
    plain = {
        section.name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section in dataclasses.fields(config)
        for values in [dataclasses.asdict(getattr(config, section.name))]
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def override(config: Config, **values: Any) -> Config:
    """The configuration with some fields replaced, by their flat names."""
    unknown = set(values) - set(_field_names())
    if unknown:
        raise ConfigError(f"{sorted(unknown)[0]}: no such option")
    sections = {}
    for section in dataclasses.fields(config):
        current = getattr(config, section.name)
        own = {field.name: values[field.name] for field in dataclasses.fields(current) if field.name in values}
        sections[section.name] = dataclasses.replace(current, **own)
    return Config(**sections)


def _split(arguments: list[str]) -> tuple[str | None, bool, list[str]]:
    file, show, rest = None, False, []
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--config" or argument.startswith("--config="):
            file = argument.partition("=")[2] or next(iterator, None)
            if not file:
                raise ConfigError("--config: needs a file")
        elif argument in ("--print-config", "--print_config"):
            show = True
        elif argument == "--run-folder" or argument.startswith("--run-folder="):
            # torchrun on Python 3.11 takes `--run` for an abbreviation of its own `--run-path`.
            rest.append("--run" + argument.removeprefix("--run-folder"))
        else:
            rest.append(argument)
    return file, show, rest


def _fields() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for section in dataclasses.fields(Config()):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            yield section.name, field


def _field_names() -> list[str]:
    return [field.name for _, field in _fields()]


def nearest(name: str, known: Iterable[str] = ()) -> str:
    """', did you mean X?' for a misspelt option (or one of `known`), or nothing."""
    close = difflib.get_close_matches(name.replace("-", "_").lstrip("_"), list(known) or _field_names(), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _from_file(path: Path) -> Config:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_KeysOnce)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config {path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    if content is None:
        return Config()
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: a mapping of options is needed, not a {type(content).__name__}")
    try:
        return _from_flags(_file_flags(content), Config(), prog="config", description="")
    except ConfigError as error:
        # The file's values went through flags, its keys are what the user knows.
        line = re.sub(r"^--([\w-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise ConfigError(f"--config {path}: {line}") from None


class _KeysOnce(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not silently the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if keys[number] in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{keys[number]}: given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _file_flags(content: dict[str, Any]) -> list[str]:
    """A file's keys, flat or under their section, as the flags that say the same."""
    sections = {section.name for section in dataclasses.fields(Config())}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        is_section = name in sections and (value is None or isinstance(value, dict))
        if name in sections and not is_section and name not in _field_names():
            raise ConfigError(f"{key}: a section of options is needed, not {value!r}")
        for inner, inner_value in ((value or {}) if is_section else {key: value}).items():
            inner_name = str(inner).replace("-", "_")
            if inner_name not in _field_names():
                raise ConfigError(f"{inner}: no such option{nearest(inner_name)}")
            if inner_name in flat:
                raise ConfigError(f"{inner}: given twice")
            flat[inner_name] = inner_value
    types = {field.name: str(field.type) for _, field in _fields()}
    return [flag for name, value in flat.items() for flag in _flags_of(name, value, types[name])]


def _flags_of(name: str, value: Any, kind: str) -> list[str]:
    """One option of a file as flags."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, dict):
        raise ConfigError(f"{name}: a value is needed, not a mapping")
    if (
        isinstance(value, bool) != (kind == "bool")
        or (value is None and "None" not in kind)
        or (isinstance(value, list) and not kind.startswith("tuple"))
    ):
        raise ConfigError(f"{name}: {value!r} is not of type {kind}")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if not isinstance(value, list):
        return [f"{flag}={value}"]
    if strange := next((item for item in value if str(item).startswith("--")), None):
        raise ConfigError(f"{name}: {strange!r} reads as a flag; no value may begin with --")
    return [flag, *map(str, value)]


def _from_flags(flags: list[str], default: Config, prog: str, description: str) -> Config:
    if any(flag in ("-h", "--help") for flag in flags):
        description += "\n\n--config FILE reads options from YAML, --print-config shows the resolved ones."
        tyro.cli(Config, args=["--help"], prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            config, unknown = tyro.cli(
                Config, args=flags, default=default, return_unknown_args=True, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit:
        raise ConfigError(_one_line(complaint.getvalue())) from None
    if unknown and not unknown[0].startswith("-"):
        before = [flag for flag in flags[: flags.index(unknown[0])] if flag.startswith("--")]
        raise ConfigError(f"{before[-1] if before else 'command line'}: unexpected value {unknown[0]!r}")
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such option{nearest(unknown[0].partition('=')[0])}")
    return config


def _one_line(box: str) -> str:
    """The message inside tyro's box, without its frame, its title, its help text and its line breaks."""
    lines = [re.sub(r"[│╭╮╰╯|]", " ", line).strip() for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and set(line) <= set("─-+ ")]
    start = rules[0] + 1 if rules and rules[0] == 1 else 1
    end = next((number for number in rules if number > start), len(lines))
    text = " ".join(line for line in lines[start:end] if line)
    text = re.sub(r"^Error parsing (--[\w-]+):", r"\1:", text)
    argument = re.search(r"--[\w-]+", text)
    return text if argument is None or text.startswith("--") else f"{argument[0]}: {text}"
