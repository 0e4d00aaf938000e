"""How hard a text is to read: the Flesch reading ease, with a simple count of syllables."""

from __future__ import annotations

import re

import pandas as pd

from telco_nb.corpus.glossary import Card, sentences

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?:[^laeiouy]es?|[^aeiouytd]ed)$")  # bite, takes, asked; but table, glasses, started


def syllables(word: str) -> int:
    """Syllables of an English word by its groups of vowels, a silent ending left out: a guess, right for most words.

    Abbreviations are read letter by letter (DNS: 3).
    """
    letters = re.sub(r"[^A-Za-z]", "", word)
    if letters.isupper() and len(letters) > 1:
        return len(letters) + 2 * letters.count("W")
    lower = letters.lower()
    groups = len(_VOWELS.findall(lower))
    hissing = re.search(r"(?:s|x|z|ch|sh|c|g)es$", lower)
    return max(1, groups - (1 if groups > 1 and _SILENT.search(lower) and not hissing else 0))


def flesch(text: str) -> float:
    """Reading ease (Flesch 1948): 206.835 - 1.015 words per sentence - 84.6 syllables per word.

    60 and more is plain English, below 30 is for specialists. Raises ValueError for a text without words.
    """
    spoken = [word for word in text.split() if re.search(r"[A-Za-z]", word)]
    if not spoken:
        raise ValueError("a text without words has no reading ease")
    return 206.835 - 1.015 * len(spoken) / len(sentences(text)) - 84.6 * sum(map(syllables, spoken)) / len(spoken)


def table(cards: list[Card]) -> pd.DataFrame:
    """One row per card: term_id, category, reading ease of all that an agent may say, words per sentence."""
    rows = []
    for card in cards:
        text = " ".join(text if text.endswith((".", "?", "!")) else f"{text}." for _, text in card.agent_texts())
        rows.append(
            {
                "term_id": card.id,
                "category": card.category,
                "reading_ease": round(flesch(text), 1),
                "words_per_sentence": round(len(text.split()) / len(sentences(text)), 1),
            }
        )
    return pd.DataFrame(rows)
