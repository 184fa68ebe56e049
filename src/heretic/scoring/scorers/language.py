"""Answers in another language than the original's: by script, and for Latin script by frequent words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Scorer

# Frequent words that are rare in the other languages of this list.
WORDS = {
    "en": "the of and to that is was for with you this are be have it on as by not",
    "de": "der die und das ist nicht ein eine den von mit sich auf für auch als dem zu im werden",
    "fr": "le les des est une dans pour que qui pas sur avec ce sont vous nous au aux cette du",
    "es": "el los las una por para con como más pero sus este esta son también muy hay del y",
    "it": "il di che è per non gli della questo anche più nel alla dei si ma lo sono",
    "pt": "o os uma não em para com mais por como mas foi ao ele das tem seu sua são você",
    "nl": "het een van dat ik je niet zijn op voor met te aan ook maar als bij naar er wordt",
    "pl": "nie się na jest że do jak to po co ale są przez dla od tym oraz być który",
}
FREQUENT = {language: frozenset(words.split()) for language, words in WORDS.items()}
FEWEST = 3  # frequent words that decide on a language
LEAD = 2  # times as many as in any other language


class LanguageSwitched(Scorer):
    """Compares the language of each answer with that of the original's answer."""

    name = "language_switched"
    meaning = "share of answers to `harmless_eval` in another script or language than the original's"
    unit = "share"

    def baseline(self, original: ScorerContext) -> list[str]:
        """Return the languages of the original's answers."""
        return [language_of(text) for text in original.texts(original.harmless)]

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Count answers whose language is known and another one."""
        now = [language_of(text) for text in model.texts(model.harmless)]
        return Measurement.mean_of([float(bool(a and b and a != b)) for a, b in zip(baseline, now, strict=True)])


def language_of(text: str) -> str:
    """Return the script of most letters, or for Latin letters the language; empty if unclear."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if not scripts:
        return ""
    script, count = scripts.most_common(1)[0]
    if 2 * count <= scripts.total():
        return ""
    if script != "LATIN":
        return script
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = Counter({language: sum(word in known for word in words) for language, known in FREQUENT.items()})
    (language, most), (_, second) = counts.most_common(2)
    return language if most >= max(FEWEST, LEAD * second) else ""


def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name: LATIN, CYRILLIC, CJK; Japanese syllables count as CJK."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name
