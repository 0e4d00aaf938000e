"""Find personal data in a text by patterns and check digits; what belongs to nobody is allowed.

A number with 9 or more digits, or one with + or 00 that has at least 7, counts as personal unless it lies in a range
that a regulator reserved for fiction, repeats one digit, or is technical: a date or time, a version, the number of a
clause or of a standard, an amount with its unit, or a range of amounts. An e-mail address counts unless its domain is
reserved. A network address counts if it is public and not a known resolver's; four numbers joined by points right
after a word such as "firmware" or "clause" are no address. Names are found only with a title, an introduction or a
signature.

Not found: a name alone in a sentence, and a telephone number of 8 digits or fewer without a prefix, unless it is
written as in North America (555-1234).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial

import phonenumbers

Finding = tuple[str, str]  # (kind, the matching text)

REGIONS = ("GB", "US")  # national formats; numbers of any country are found with + or 00
MIN_DIGITS = 9  # a run this long identifies a line, a card, a device or a customer
_CARD_LENGTHS = range(13, 20)
_RESERVED_DOMAINS = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid)$", re.I)  # RFC 2606
_MAC_EXAMPLES = ("00005e0053", "01005e9010")  # RFC 7042: five bytes, the last one is free

# Ofcom, numbers for drama: geographic, no area, mobile, freephone, premium, UK-wide; without the leading 0.
_UK_DRAMA = re.compile(
    r"(?:2079460\d{3}|11[3-8]4960\d{3}|1[2-6]14960\d{3}|1914980\d{3}|2896496\d{3}|2920180\d{3}|1632960\d{3}"
    r"|7700900\d{3}|8081570\d{3}|9098790\d{3}|3069990\d{3})$"
)
_NANP_FICTION = re.compile(r"1?(?:[2-9]\d\d)?55501\d\d$")  # 555-0100 to 555-0199, in any area

_EMAIL = re.compile(r"[\w.+\-]+(?:@|\s?[\[(]at[\])]\s?)((?:[\w\-]+\.)+[a-z]{2,})", re.I)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:]|\.\d)", re.I)
_MAC = re.compile(r"\b(?:[0-9a-f]{2}[:\-]){5}[0-9a-f]{2}\b|\b[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}\b", re.I)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{2,4}){3,8}\b")
_UNIT = r"\s?(?:%|[kMGT]?Hz|[kMGT]?bit|[kMGT]?B\b|dB|ms\b|m\b|km\b|bytes|packets|EUR|GBP|USD)"
_DIGITS = re.compile(rf"(?<![\w.,])[(+]{{0,2}}\d(?:[\d\s().\-/]*\d)?(?!\w)(?!{_UNIT})")
_RANGE = re.compile(r"(\d{1,5})\s?-\s?(\d{1,5})")
_LOCAL_US = re.compile(rf"(?<![\w.\-])\d{{3}}[\-.]\d{{4}}(?![\w\-])(?!{_UNIT})")

# Technical numbers, which identify nobody. What may stand before and after keeps them from cutting a telephone number.
_DATE = (
    r"(?:\d{1,4}(?:[/\-]|\.\s?)\d{1,2}(?:[/\-]|\.\s?)\d{1,4}|\d{1,2}[./\-]\d{4}"
    r"|(?:19|20)\d{6}(?:\d{6}|\s\d{4})?(?!\s?\d))"
)
_DATES = re.compile(rf"(?<![\w./+\-])({_DATE})(?:\s?[\-–/]\s?({_DATE}))?(?!\w|[./\-]\w)")
_TIME = re.compile(r"(?<![\w:.])(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?![\w:]|\.\d)")
_DAY_FORMATS = ("%d.%m.%Y", "%m.%d.%Y", "%Y.%m.%d", "%Y%m%d", "%Y%m%d.%H%M", "%Y%m%d%H%M%S")
_SHORT_FORMATS = ("%d.%m.%y", "%m.%d.%y", "%m.%Y")  # only in a range: alone they look like parts of telephone numbers
_YEARS = re.compile(r"(?:19|20)\d\d(?:\W+(?:19|20)\d\d)*")
_DOTTED = re.compile(r"(?<![\w.,/+])(?P<parts>\d+(?:\.\d+){2,})(?:[\-_+]\w+(?!\w|\.\d))*(?![\w/]|\.\w)")
_LABEL = re.compile(  # the words before a version or a clause, and perhaps a first one ("firmware 4.1.2.3 and 4.1.2.4")
    r"(?:\b(?:(?:version|firmware|software|build|release|(?:sub-?)?(?:section|clause)|article|annex|appendix|paragraph"
    r"|chapter|table|figure|step)s?|v\.?|(?:i|mac|ipad)?os)|§)"
    r"(?:\s+(?:version|number|no\.?|is|was|now|v|up(?:dat|grad)ed?(?:\s+(?:from|to))?))*[\s:=(\"“'‘]*v?"
    r"(?:(?P<first>\d+)(?:\.\d+)+\S*?\s*(?:and|or|to|[,\-–])\s*)?$",
    re.I,
)
_STANDARD = re.compile(
    r"\b(?:ISO|IEC|ITU(?:-[TR])?|ETSI|EN|ES|TS|TR|BS|DIN|IEEE|ANSI|TIA|RFC|FCC|CFR|FR|U\.?S\.?C\.?)[\s\-]"
    r"(?!(?<!CFR.)\d{3}[.\-]\d{4})(?:§\s?)?"  # 555-1234 is a telephone number, but 47 CFR 101.1012 is not
    r"(?:[1-9]\d\d \d{3}|[1-9]\d{1,4}(?:\.\d{1,4})?)(?:-\d{1,2}(?:-\d{1,3})?)?"  # number and parts
    r"(?:[:\-](?:19|20)\d\d)?(?![.\-/]?\d|\s\d)"  # year
)
_AMOUNT = r"([1-9]\d{0,2}(?:[ .]\d{3})+|[1-9]\d{0,8})"
_AMOUNTS = re.compile(
    rf"(?<![\w.,/+\-])(?<![\d)]\s){_AMOUNT}\s?[\-–]\s?{_AMOUNT}(?![.\-/]?\d|\s\d)"
    rf"({_UNIT}|\s?(?:bps|bits|seconds|minutes|hours|days|metres|euros|pounds)\b)?"
)
_SECRET = re.compile(
    r"\b(?:pin|puk|password|passcode|pass(?:word)? code|security code|one-time code|otp|cvv|cvc)\b"
    r"(?:\s+(?:code|number))?(?:\s*[:=]\s*|\s+(?:is|was)\s+(?:set to\s+)?)(?=\S*\d)[\"“']?[^\s.,;]{4,}",
    re.I,
)
_BORN = re.compile(
    r"\b(?:born(?: on)?|date of birth(?: is|:)?|birthday(?: is|:)?|DOB:?)\s+(?:the\s+)?"
    r"(?:\d{1,4}[./\-]\d{1,2}[./\-]\d{1,4}|\d{1,2}(?:st|nd|rd|th)?\s+(?:of\s+)?[A-Z][a-z]+\s+\d{4}|[A-Z][a-z]+\s+\d{1,2},?\s+\d{4})",
    re.I,
)  # fmt: skip
_POSTCODE = re.compile(r"\b[A-Z]{1,2}\d[A-Z\d]?\s\d[ABD-HJLNP-UW-Z]{2}\b")  # United Kingdom
_STREET = re.compile(
    r"\b\d{1,4}[a-z]?,?\s+(?:[A-Z][\w’'\-]+\s+){1,3}"
    r"(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Close|Court|Crescent|Square|Terrace|Gardens|Boulevard|Blvd)\b"
)
_GIVEN = r"[A-Z](?:[’'][A-Z])?[a-zà-ÿ]+(?:[\-’'][A-Z][a-zà-ÿ]+)?"
_NAME = re.compile(
    rf"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof)\.?\s+(?:{_GIVEN}|[A-Z]\.)"
    rf"|\b(?:[Mm]y (?:full )?name is|[Mm]y name’s|[Mm]y name's|account holder(?: is)?:?|in the name of)\s+{_GIVEN}"
    rf"|\b(?:[Rr]egards|[Ss]incerely|[Cc]heers|[Tt]hanks),\s+{_GIVEN}(?:\s+{_GIVEN})?\s*[.!]?\s*$"
)

_NAME_SIGNS = ("Mr", "Ms", "Miss", "Mx", "Dr", "Prof", "ame is", "name’s", "name's", "account holder", "the name of",
               "egards,", "incerely,", "heers,", "hanks,")  # fmt: skip
_SECRET_SIGNS = ("pin", "puk", "pass", "code", "otp", "cvv", "cvc")
_DIGIT = re.compile(r"\d")

_RESOLVERS = (
    "1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "149.112.112.112", "208.67.222.222", "208.67.220.220",
    "2606:4700:4700::1111", "2606:4700:4700::1001", "2001:4860:4860::8888", "2001:4860:4860::8844", "2620:fe::fe",
    "2620:fe::9",
)  # fmt: skip
_NOBODYS = frozenset(map(ipaddress.ip_address, (*_RESOLVERS, "64:ff9b::")))  # the last: prefix of NAT64, RFC 6052


def luhn_is_valid(digits: str) -> bool:
    """Return True if the check digit is right (ISO/IEC 7812-1): payment cards, IMEI, ICCID."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban_is_valid(text: str) -> bool:
    """Return True if the mod-97 check of an IBAN holds (ISO 13616)."""
    compact = re.sub(r"\s", "", text).upper()
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _national(raw: str) -> tuple[str, str]:
    """Return the digits as dialled in the United Kingdom (without 0) and in North America (with or without 1)."""
    digits = re.sub(r"\D", "", raw)
    international = digits[2:] if digits.startswith("00") else digits
    british = re.sub(r"^440?", "", international) if raw.strip("(").startswith(("+", "0044")) else digits.lstrip("0")
    return british, international


def is_reserved_number(raw: str) -> bool:
    """Return True if a telephone number is reserved for fiction: 555-01xx, or Ofcom's numbers for drama."""
    british, american = _national(raw)
    return bool(_UK_DRAMA.match(british) or _NANP_FICTION.match(american))


def _number_kind(raw: str) -> str | None:
    """Return the most specific kind of a run of digits; None if it is short or reserved or identifies nobody."""
    digits = re.sub(r"\D", "", raw)
    plus = "+" in raw or digits.startswith("00")
    if len(digits) < (7 if plus else MIN_DIGITS) or is_reserved_number(raw):
        return None
    bounds = _RANGE.fullmatch(raw)
    if len(set(digits)) == 1 or _YEARS.fullmatch(raw):
        return None
    if bounds and int(bounds[1]) < int(bounds[2]):
        return None  # such as ports 30000-40000
    if len(digits) in (19, 20) and digits.startswith("89"):
        return "iccid"
    if len(digits) == 15 and luhn_is_valid(digits):
        return "imei"
    if len(digits) in _CARD_LENGTHS and luhn_is_valid(digits):
        return "payment_card"
    return "telephone" if any(_is_telephone(raw, region) for region in REGIONS) else "long_number"


def _is_telephone(raw: str, region: str) -> bool:
    try:
        return phonenumbers.is_possible_number(phonenumbers.parse(raw, region))
    except phonenumbers.NumberParseException:
        return False


def _address(raw: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(raw)
    except ValueError:
        return None


def _is_somebodys_address(raw: str) -> bool:
    """Return True for a public IP address: not private, shared, multicast or for documentation, and no resolver's."""
    address = _address(raw)
    return address is not None and address.is_global and not address.is_multicast and address not in _NOBODYS


def _is_date(text: str, formats: tuple[str, ...]) -> bool:
    """Return True if the text is a day between 1900 and 2099 in one of the formats, whatever its separators."""
    plain = re.sub(r"\W+", ".", text)
    for form in formats:
        try:
            return 1900 <= datetime.strptime(plain, form).year <= 2099
        except ValueError:
            continue
    return False


def _are_dates(match: re.Match[str]) -> bool:
    """Return True for a date, or for a range of two dates, which may have short years or months only."""
    first, last = match.groups()
    if last is None:
        return _is_date(first, _DAY_FORMATS)
    return all(_is_date(day, _DAY_FORMATS + _SHORT_FORMATS) for day in (first, last))


def _is_version_or_clause(match: re.Match[str]) -> bool:
    """Return True for numbers with points that are no address.

    The words just before decide: "firmware 4.1.2.3" is a version, "IP 4.1.2.3" an address. Without such words they are
    a version if they cannot be an address and have a lone 0 or two single digits inside, as no telephone number has.
    """
    parts = match["parts"].split(".")
    label = _LABEL.search(match.string[max(0, match.start() - 60) : match.start()])
    if label and label["first"] and abs(int(label["first"]) - int(parts[0])) > 1:
        label = None  # "firmware 7.1.2.3 and 81.2.69.142": the second is not the next version
    if label and (len(parts) == 4 or (len(parts) == 3 and max(map(len, parts)) < 3)):
        return True
    single = [part for part in parts[1:] if len(part) == 1]
    return len(parts) > 3 and _address(match["parts"]) is None and ("0" in single or len(single) > 1)


def _is_range_of_amounts(match: re.Match[str]) -> bool:
    """Return True if the second amount is larger, and a unit follows or both are round."""
    low, high = (re.sub(r"\D", "", amount) for amount in match.groups()[:2])
    return int(low) < int(high) and (match[3] is not None or (low.endswith("000") and high.endswith("000")))


_TECHNICAL: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], bool]], ...] = (
    (_DATES, _are_dates),
    (_TIME, bool),
    (_STANDARD, bool),
    (_DOTTED, _is_version_or_clause),
    (_AMOUNTS, _is_range_of_amounts),
)


def _blank_if(is_technical: Callable[[re.Match[str]], bool], match: re.Match[str]) -> str:
    return " ; " if is_technical(match) else match[0]


def _without_technical_numbers(text: str) -> str:
    """Put a semicolon in the place of every technical number, so that it is not found and joins no other number."""
    for pattern, is_technical in _TECHNICAL:
        text = pattern.sub(partial(_blank_if, is_technical), text)
    return text


def _with_digits(text: str, digits: int) -> Iterator[Finding]:
    """Yield the kinds that hold digits; `digits` is their number in the text, and few digits exclude most kinds."""
    if digits >= 7 or (digits >= 4 and text.count(".") >= 3):
        yield from _numbers(text)
    if digits >= 5 and "b" in text.lower():
        yield from (("date_of_birth", match[0]) for match in _BORN.finditer(text))
    if any(sign in text.lower() for sign in _SECRET_SIGNS):
        yield from (("secret", match[0]) for match in _SECRET.finditer(text))
    yield from (("postcode", match[0]) for match in _POSTCODE.finditer(text))
    yield from (("street", match[0]) for match in _STREET.finditer(text))


def _numbers(text: str) -> Iterator[Finding]:
    yield from (("iban", match[0]) for match in _IBAN.finditer(text) if iban_is_valid(match[0]))
    text = _without_technical_numbers(text)
    yield from (("ip_address", match[0]) for match in _IPV4.finditer(text) if _is_somebodys_address(match[0]))
    text = _IPV4.sub(" ; ", text)  # so that an allowed address is not read as a number
    yield from ((kind, match[0]) for match in _DIGITS.finditer(text) if (kind := _number_kind(match[0])))
    yield from (("telephone", match[0]) for match in _LOCAL_US.finditer(text) if not is_reserved_number(match[0]))


def _with_colons(text: str) -> Iterator[Finding]:
    for match in _MAC.finditer(text):
        if not re.sub(r"\W", "", match[0]).lower().startswith(_MAC_EXAMPLES):
            yield "mac_address", match[0]
    yield from (("ip_address", match[0]) for match in _IPV6.finditer(text) if _is_somebodys_address(match[0]))


def find_personal_data(text: str) -> list[Finding]:
    """Return every (kind, text) of personal data in `text`, without allowed examples.

    One string may be returned under two kinds. Cheap tests come before the patterns: most texts hold none of the signs.
    """
    findings: list[Finding] = []
    if any(sign in text for sign in _NAME_SIGNS):
        findings += [("name", match[0]) for match in _NAME.finditer(text)]
    if "@" in text or "at]" in text or "at)" in text:
        findings += [("email", m[0]) for m in _EMAIL.finditer(text) if not _RESERVED_DOMAINS.search(m[1])]
    digits = len(_DIGIT.findall(text))
    if digits:
        findings += _with_digits(text, digits)
    if text.count(":") >= 2 or text.count("-") >= 5 or text.count(".") >= 2:
        findings += _with_colons(text)
    return findings
