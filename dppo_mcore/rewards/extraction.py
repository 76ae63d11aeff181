"""What an answer says: the final answer within a text, and the numbers, letters, lists and shapes within that.

Order of the official scorers: drop everything up to `</think>` or `</thought>`; then `<answer>...</answer>`; else the
last `\\boxed{}`; else the whole text. Every function takes time linear in the text, whatever it holds.
"""

from __future__ import annotations

import math
import re
import unicodedata

MAX_CHARACTERS = 65536
"""Only the end of a longer text is looked at: a final answer stands last."""

THOUGHT_ENDS = ("</think>", "</thought>")
BOXED = "\\boxed"
MAX_BOXES = 16
"""Unclosed boxes tried, from the last, before giving up."""

NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|(?<![\w.])[-+]?\.\d+|"
    r"\d+(?:\.\d+)?"
)
POWER = re.compile(r"\s?(?:\\times|\\cdot|[x×*·])\s?10\s?(?:\^|\*\*)\s?\{?\s?([-+]?\d{1,3})")
OVER = re.compile(r"\s?[/⁄]\s?(\d{1,15}(?:\.\d{1,15})?)(?![\w/⁄])")
MIXED = re.compile(r"\s(\d{1,3})\s?[/⁄]\s?(\d{1,3})(?![\w/⁄.])")
AND_A_HALF = re.compile(r"\s{1,3}and\s{1,3}(?:a|one)\s{1,3}half\b", re.IGNORECASE)
FRACTION = re.compile(r"(-?)\s?\\[dt]?frac\s?\{\s?(\d{1,15}(?:\.\d{1,15})?)\s?\}\s?\{\s?(\d{1,15}(?:\.\d{1,15})?)\s?\}")

UNITS = {
    "zero": 0, "none": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "dozen": 12,
}  # fmt: skip
TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
SCALES = {"hundred": 100, "thousand": 1000, "million": 1000000}
WORD = re.compile(r"[A-Za-z]+")


def ascii_lower(text: str) -> str:
    """Lower case of the same length (`str.lower` may lengthen a text)."""
    return text.translate(_LOWER)


_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def normalise(text: str) -> str:
    """Full-width characters, fancy minus signs, spaces and dashes as plain ones; at most `MAX_CHARACTERS`."""
    # "2½" is two and a half, but its compatibility form is 21/2.
    text = _MIXED.sub(" ", text[-MAX_CHARACTERS:])
    text = unicodedata.normalize("NFKC", text)[-MAX_CHARACTERS:]
    return text.translate(_PLAIN)


_MIXED = re.compile("(?<=[0-9０-９])(?=[¼-¾⅐-⅞])")
_PLAIN = {ord(c): "-" for c in "−‐‑‒–﹣"} | {ord("’"): "'", ord("‘"): "'", ord("“"): '"', ord("”"): '"', 0: " "}


def final_answer(text: str) -> str:
    """The part of `text` that answers, stripped and normalised."""
    text = normalise(text)
    low = ascii_lower(text)
    start = max((at + len(tag) for tag in THOUGHT_ENDS if (at := low.rfind(tag)) >= 0), default=0)
    text, low = text[start:], low[start:]
    tagged = _tagged(text, low)
    if tagged is not None:
        # A box inside the tags is decoration of the answer.
        return (_boxed(tagged) or tagged).strip()
    boxed = _boxed(text)
    return (text if boxed is None else boxed).strip()


def _tagged(text: str, low: str) -> str | None:
    """Inside of the last complete `<answer>` pair (the innermost, if they nest); of an unclosed last one, its rest."""
    end = low.rfind("</answer>")
    start = low.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : low.find("</answer>", start)]
    start = low.rfind("<answer>")
    return text[start + len("<answer>") :] if start >= 0 else None


def _boxed(text: str) -> str | None:
    """Inside of the last closed `\\boxed{}`; None without one."""
    end = len(text)
    for _ in range(MAX_BOXES):
        at = text.rfind(BOXED, 0, end)
        if at < 0:
            return None
        end = at
        open_ = at + len(BOXED)
        while open_ < len(text) and text[open_] == " ":
            open_ += 1
        if open_ == len(text) or text[open_] != "{":
            continue
        depth = 0
        for match in _BRACE.finditer(text, open_):
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return text[open_ + 1 : match.start()]
    return None


_BRACE = re.compile(r"[{}]")
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox|operatorname)\s?\{([^{}]{0,1000})\}")
_MARKUP = re.compile(r"\\[,;:! ]|\\[()\[\]]|[$*`_~]|\\(?:left|right|quad|displaystyle)\b")


def plain(text: str) -> str:
    """Without LaTeX wrappers and Markdown emphasis."""
    return _MARKUP.sub(" ", _LATEX.sub(r" \1 ", text)).strip()


def first_number(answer: str) -> float | None:
    """First number of an answer, in digits (thousands' commas, fractions, mixed, powers of ten), else in words."""
    fraction = FRACTION.search(answer)
    number = NUMBER.search(answer)
    if fraction and (number is None or fraction.start() <= number.start()):
        sign, above, below = fraction.groups()
        value = float(above) / float(below) if float(below) else None
        return None if value is None else -value if sign else value
    if number is None:
        return _number_words(answer)
    value = float(number.group().replace(",", ""))
    power = POWER.match(answer, number.end())
    if power:
        value *= 10.0 ** int(power.group(1))
    else:
        over = OVER.match(answer, number.end())
        mixed = MIXED.match(answer, number.end())
        part = 0.0
        if over and float(over.group(1)):
            value /= float(over.group(1))
        elif mixed and int(mixed.group(1)) < int(mixed.group(2)) and abs(value) < 1e9 and value == int(value):
            part = int(mixed.group(1)) / int(mixed.group(2))
        elif AND_A_HALF.match(answer, number.end()):
            part = 0.5
        value += math.copysign(part, value)
    return value if abs(value) < 1e300 else None


def _number_words(answer: str) -> float | None:
    """First run of number words as a number: "twenty-one", "two hundred and five", "a dozen"."""
    total, current, end, said = 0, 0, 0, 0
    last = ""
    for match in WORD.finditer(ascii_lower(answer)):
        word = match.group()
        if last and answer[end : match.start()].strip(" -"):
            break
        if word == "dozen" and last == "unit":
            current, last = current * 12, "dozen"
        elif word in UNITS and (last in ("", "scale") or (last == "ten" and UNITS[word] < 10)):
            current, last = current + UNITS[word], "unit"
        elif word in TENS and last in ("", "scale"):
            current, last = current + TENS[word], "ten"
        elif word in SCALES and current < 10**12:
            current, last = max(1, current) * SCALES[word], "scale"
            if word != "hundred":
                total, current = total + current, 0
        elif last and word != "and":
            break
        end = match.end()
        said = said if word == "and" else end
    half = 0.5 if AND_A_HALF.match(answer, said) else 0.0
    return total + current + half if last else None


_MARKED = re.compile(r"[\s(\[{\"'#-]{0,8}(?:([A-Z])[.):\]}]|([a-z])\))")
_ARTICLE_A = r"A (?!is\b|was\b|because\b|since\b|and\b|or\b|not\b|as\b|happen|come|came)[a-z]"
_ALONE = re.compile(rf"(?<![A-Za-z0-9'])(?!{_ARTICLE_A})([A-Z])(?![A-Za-z0-9'])")
_CAPITAL = re.compile(r"[A-Z]")


def choice_letter(answer: str, letters: str = "ABCDEFGH") -> str | None:
    """Letter of the chosen option: marked as one ("B.", "(c)"), or alone among `letters`, else the first capital.

    A lower-case letter counts only where it is the whole answer or stands before ")".
    """
    text = plain(answer)
    words = _WORDS.findall(text[:64])
    if len(words) == 1 and words[0].upper() in letters and len(text) < 64:
        return words[0].upper()
    marked = _MARKED.match(text)
    if marked and (letter := (marked.group(1) or marked.group(2)).upper()) in letters:
        return letter
    alone = next((m.group(1) for m in _ALONE.finditer(text) if m.group(1) in letters), None)
    if alone:
        return alone
    capital = _CAPITAL.search(text)
    return capital.group() if capital else None


_WORDS = re.compile(r"[A-Za-z0-9]+")
_SPACES = re.compile(r"\s+")
_ARTICLES = re.compile(r"\b(?:the|an?)\b ?")


def canonical(answer: str) -> str:
    """For exact comparison: lower case, no articles, no outer punctuation, single spaces."""
    text = _SPACES.sub(" ", plain(answer)).lower()
    bare = _ARTICLES.sub("", text).strip(OUTER)
    return bare or text.strip(OUTER)


OUTER = " .,;:!?\"'()[]{}<>"
_WHOLE_NUMBER = re.compile(
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?|\.\d{1,300})(?:[eE][-+]?\d{1,3})?"
)


def comparable(answer: str) -> str:
    """Equal for answers that say the same: a number and nothing else by its value, anything else `canonical`."""
    text = plain(answer[:4096]).rstrip(" .")
    return repr(float(text.replace(",", ""))) if _WHOLE_NUMBER.fullmatch(text) else canonical(answer)
