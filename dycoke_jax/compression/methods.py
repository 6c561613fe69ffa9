"""The methods of token compression by name, and their settings as text.

The text names a method, with settings in brackets where they differ from the defaults:
``dycoke(k=0.5, mode=official)``. Methods for different stages are joined by ``+``, and ``none`` is
the plain model. The grammar::

    compression = "none" | method { "+" method }
    method      = name [ "(" [ setting { "," setting } ] ")" ]
    setting     = name "=" ( number | "true" | "false" | "none" | word | quoted text )
"""

import re
from collections import deque
from dataclasses import MISSING, asdict, fields
from typing import Any, NamedTuple

from dycoke_jax import checks
from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.compression.dycoke import DyCoke, DyCokeKV
from dycoke_jax.compression.evs import EVS
from dycoke_jax.compression.fastv import FastV
from dycoke_jax.compression.holitom import HoliTom, HoliTomMerge
from dycoke_jax.compression.protocol import Compression, Compressor, combine
from dycoke_jax.compression.unicomp import UniComp
from dycoke_jax.compression.vidcom2 import VidCom2
from dycoke_jax.compression.visionzip import VisionZip
from dycoke_jax.errors import ConfigError

METHODS: dict[str, type[Any]] = {
    "dycoke": DyCoke,
    "dycoke-kv": DyCokeKV,
    "evs": EVS,
    "fastv": FastV,
    "frames": WholeFrames,
    "holitom": HoliTom,
    "holitom-merge": HoliTomMerge,
    "random": RandomTokens,
    "unicomp": UniComp,
    "vidcom2": VidCom2,
    "visionzip": VisionZip,
}
"""The dataclass with the settings of each method."""

_OF_PART = {
    "HoliTomTokens": "holitom(layer=0)",
    "TokenMerging": "dycoke(p=0)",
    "WorkingSet": "dycoke-kv",
    "OneShot": "dycoke-kv",
    "MaskedCache": "dycoke-kv",
}
"""What stands for the stages of a method that are classes of their own."""

PLAIN = "none"
"""The name that stands for the plain model."""

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number> -?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?![\w.]) )
      | (?P<word> [A-Za-z_][\w-]* )
      | (?P<quoted> "[^"]*" | '[^']*' )
      | (?P<mark> [()=,+] )
    )""",
    re.VERBOSE | re.ASCII,
)

_LONGEST_INT = 18
"""Characters of the longest number without a fraction that is read as a whole number."""


class _Token(NamedTuple):
    kind: str
    text: str


def parse_compression(text: str) -> Compressor | None:
    """Makes a compressor of a text such as ``random(k=0.5)``.

    Args:
        text: the text, in the grammar of this module.

    Returns:
        The compressor; None for ``none``.

    Raises:
        ConfigError: if the text does not follow the grammar, if there is no such method or setting,
            if a setting is out of its range, or if the methods cannot be combined.
    """
    tokens = _tokens(checks.text("compression", text))
    if tokens == deque([_Token("word", PLAIN)]):
        return None
    try:
        methods = [_method(tokens)]
        while tokens:
            _take_mark(tokens, "+")
            methods.append(_method(tokens))
    except _Fault as fault:
        raise ConfigError(f"compression {checks.shown(text)}: {fault}") from None
    return methods[0] if len(methods) == 1 else combine(*methods)


def described(compression: Any) -> dict[str, Any]:
    """The name of a compressor's method (``method``) and its settings, as values for JSON.

    A combination has the settings of its stages under ``tokens``, ``prompt`` and ``cache``.

    Args:
        compression: a compressor that is a dataclass.
    """
    kind = type(compression)
    if isinstance(compression, Compression):
        stages = {field.name: getattr(compression, field.name) for field in fields(compression)}
        found = {name: described(stage) for name, stage in stages.items() if stage is not None}
        names = [_OF_PART.get(one["method"], one["method"]) for one in found.values()]
        return {"method": "+".join(names)} | found
    names = [name for name, of_name in METHODS.items() if of_name is kind]
    return {"method": names[0] if names else kind.__name__} | asdict(compression)


class _Fault(Exception):
    """What is wrong with a text."""


def _tokens(text: str) -> deque[_Token]:
    """The tokens of a text; the last one is of the kind ``unknown`` if the text goes wrong."""
    tokens: deque[_Token] = deque()
    text = text.strip()
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            tokens.append(_Token("unknown", text[place:]))
            break
        kind = match.lastgroup or ""
        tokens.append(_Token(kind, match[kind]))
        place = match.end()
    return tokens


def _take(tokens: deque[_Token], *kinds: str, wanted: str) -> _Token:
    """Takes the next token, which must be of one of these kinds."""
    if not tokens:
        raise _Fault(f"{wanted} is missing at the end")
    if tokens[0].kind not in kinds:
        raise _Fault(f"{wanted} is missing before {checks.shown(tokens[0].text)}")
    return tokens.popleft()


def _take_mark(tokens: deque[_Token], *marks: str) -> str:
    """Takes the next token, which must be one of these marks."""
    kind = "mark" if tokens and tokens[0].text in marks else "no mark"
    return _take(tokens, kind, wanted=" or ".join(marks)).text


def _method(tokens: deque[_Token]) -> Compressor:
    """Reads a method with its settings."""
    name = _take(tokens, "word", wanted="the name of a method").text
    if name == PLAIN:
        raise _Fault(f"{PLAIN} has no settings, and cannot be combined")
    if name not in METHODS:
        known = ", ".join([PLAIN, *METHODS])
        raise _Fault(f"there is no method {checks.shown(name)}; there are {known}")
    settings: dict[str, Any] = {}
    if tokens and tokens[0].text == "(":
        tokens.popleft()
        if tokens and tokens[0].text == ")":
            tokens.popleft()
        else:
            _setting(tokens, name, settings)
            while _take_mark(tokens, ",", ")") == ",":
                _setting(tokens, name, settings)
    for field in fields(METHODS[name]):
        if field.name not in settings and field.default is field.default_factory is MISSING:
            raise _Fault(f"{name} needs the setting {field.name}")
    try:
        return METHODS[name](**settings)
    except ConfigError as error:
        raise _Fault(str(error)) from None


def _setting(tokens: deque[_Token], method: str, settings: dict[str, Any]) -> None:
    """Reads one setting of a method into ``settings``."""
    known = [field.name for field in fields(METHODS[method])]
    if tokens and tokens[0].kind in ("number", "quoted"):
        raise _Fault(f"settings are given by name, such as {known[0]}={tokens[0].text}")
    name = _take(tokens, "word", wanted="the name of a setting").text
    if name not in known:
        raise _Fault(f"{method} has no setting {checks.shown(name)}; it has {', '.join(known)}")
    if name in settings:
        raise _Fault(f"{name} is given twice")
    _take_mark(tokens, "=")
    settings[name] = _value(_take(tokens, "number", "word", "quoted", wanted=f"a value of {name}"))


def _value(token: _Token) -> int | float | bool | str | None:
    if token.kind == "quoted":
        return token.text[1:-1]
    if token.kind == "number":
        whole = token.text.lstrip("-").isdecimal() and len(token.text) <= _LONGEST_INT
        return int(token.text) if whole else float(token.text)
    return {"true": True, "false": False, "none": None}.get(token.text.lower(), token.text)
