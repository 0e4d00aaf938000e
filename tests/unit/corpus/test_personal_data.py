"""Personal data is found in nearly every planted text, and hardly ever where there is none."""

import ipaddress
import random
from collections import Counter

import phonenumbers
import pytest
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from telco_nb import ROOT
from telco_nb.corpus import cards, personal_data, scenarios, text_measures, variants

CARDS = cards.load_cards(ROOT / "telco_nb" / "data" / "glossary.yaml")
AXES = scenarios.load_axes(ROOT / "telco_nb" / "data" / "axes.yaml")
GRID = scenarios.build_scenarios(CARDS, AXES, seed=20260605)
CLEAN = [
    m["content"] for c in variants.generate_conversations(CARDS, GRID[::13], AXES, 10, seed=3) for m in c["messages"]
]
COUNTRIES = ("DE", "FR", "ES", "IT", "NL", "PL", "IN", "BR", "JP", "ZA", "AU", "CH", "SE", "MX")
GIVEN = ("Anna", "Peter", "Maria", "John", "Aisha", "Lukas", "Zoë", "Tomasz", "Priya", "Carlos")
FAMILY = ("Smith", "Müller", "Okafor", "Novak", "Rossi", "Patel", "Jansen", "O’Brien", "Silva", "Kowalska")


def digits(rng, n):
    return "".join(str(rng.randrange(10)) for _ in range(n))


def checked(rng, stem, length):
    """Digits that begin with `stem` and end with the check digit that ISO/IEC 7812 asks for."""
    body = stem + digits(rng, length - len(stem) - 1)
    doubled = sum(sum(divmod(2 * int(d), 10)) if i % 2 == 0 else int(d) for i, d in enumerate(reversed(body)))
    return body + str(-doubled % 10)


def grouped(rng, text, size=4):
    separator = rng.choice(["", " ", "-"])
    return separator.join(text[i : i + size] for i in range(0, len(text), size))


def telephone(rng, region, form):
    """The library's example of a line in a country with its last digits drawn again."""
    for _ in range(100):
        kind = rng.choice([PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE])
        number = phonenumbers.PhoneNumber()
        number.merge_from(phonenumbers.example_number_for_type(region, kind))
        number.national_number = number.national_number // 1000 * 1000 + rng.randrange(1000)
        text = phonenumbers.format_number(number, form)
        if phonenumbers.is_valid_number(number) and not personal_data.is_reserved_number(text):
            return text
    raise AssertionError(region)


def iban(rng):
    country, length = rng.choice([("DE", 18), ("NL", 14), ("GB", 18), ("FR", 23)])
    account = ("ABNA" if country in ("NL", "GB") else "") + digits(rng, length)
    account = account[:length]
    number = int("".join(str(int(c, 36)) for c in account + country + "00"))
    text = f"{country}{98 - number % 97:02d}{account}"
    return text if rng.random() < 0.5 else " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def public_address(rng, version):
    while True:
        if version == 4:
            address = ipaddress.ip_address(rng.getrandbits(32))
        else:
            address = ipaddress.ip_address((0x2A00 << 112) + rng.getrandbits(108))
        if address.is_global and not address.is_multicast:
            return str(address)


def name(rng):
    return f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"


PATTERNS = {
    "email": lambda r: f"{name(r).lower().replace(' ', '.')}{digits(r, 2)}@{r.choice(['mail.com', 'web.de'])}",
    "email, written out": lambda r: f"{r.choice(GIVEN).lower()}{digits(r, 2)} [at] mailbox.org",
    "telephone, international": lambda r: telephone(r, r.choice(COUNTRIES), PhoneNumberFormat.INTERNATIONAL),
    "telephone, E.164": lambda r: telephone(r, r.choice(COUNTRIES), PhoneNumberFormat.E164),
    "telephone, with 00": lambda r: "00" + telephone(r, r.choice(COUNTRIES), PhoneNumberFormat.E164)[1:],
    "telephone, United Kingdom": lambda r: telephone(r, "GB", PhoneNumberFormat.NATIONAL),
    "telephone, United States": lambda r: telephone(r, "US", PhoneNumberFormat.NATIONAL),
    "telephone, United States, local": lambda r: f"{r.choice(['345', '867', '742'])}-{digits(r, 4)}",
    "payment card": lambda r: grouped(r, checked(r, r.choice(["4", "51", "55"]), 16)),
    "payment card, 15 digits": lambda r: checked(r, "37", 15),
    "IMEI": lambda r: checked(r, "35", 15),
    "ICCID": lambda r: checked(r, "8944", 19),
    "IMSI": lambda r: "23410" + digits(r, 10),
    "customer number": lambda r: digits(r, r.choice([9, 10, 12])),
    "IBAN": iban,
    "IPv4 address": lambda r: public_address(r, 4),
    "IPv6 address": lambda r: public_address(r, 6),
    "MAC address": lambda r: ":".join(f"{r.randrange(256):02x}" for _ in range(6)),
    "PIN or PUK": lambda r: f"{r.choice(['my PIN is', 'the PUK:'])} {digits(r, r.choice([4, 8]))}",
    "date of birth": lambda r: f"born on {r.choice(['12 March 1980', '3/4/1975', 'May 7, 1999'])}",
    "postcode": lambda r: f"{r.choice(['SW', 'M', 'LS'])}{r.randrange(1, 20)} {r.randrange(1, 9)}AB",
    "street": lambda r: f"{r.randrange(1, 300)} {r.choice(['Mill', 'Quay'])} {r.choice(['Road', 'Street', 'Lane'])}",
    "name, introduced": lambda r: f"{r.choice(['my name is', 'the account is in the name of'])} {name(r)}",
    "name, with title": lambda r: f"{r.choice(['Mr', 'Mrs.', 'Ms', 'Dr'])} {r.choice(FAMILY)}",
}  # fmt: skip
FRAMES = ("It is {}.", "{}, in case you need it.", "You can use {} for this.", "On my side: {}.")


def planted(n=500, seed=1):
    """`n` texts, each a clean message with one pattern planted at a sentence boundary: (pattern, text)."""
    rng = random.Random(seed)
    for i in range(n):
        pattern = list(PATTERNS)[i % len(PATTERNS)]
        sentences = text_measures.sentences(rng.choice(CLEAN))
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(FRAMES).format(PATTERNS[pattern](rng)))
        yield pattern, " ".join(sentences)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_at_least_99_of_100_planted_texts_are_found(seed):
    missed = Counter(pattern for pattern, text in planted(seed=seed) if not personal_data.find_personal_data(text))
    assert sum(missed.values()) <= 5, missed


def test_fewer_than_1_in_100_clean_messages_are_refused():
    found = [text for text in CLEAN if personal_data.find_personal_data(text)]
    assert len(CLEAN) > 1500 and len(found) < 0.01 * len(CLEAN), found[:5]


def test_nothing_in_the_glossary_is_taken_for_personal_data():
    for card in CARDS:
        texts = [text for _, text in card.agent_texts()] + [figure.text for figure in card.figures]
        for text in [*texts, *card.fault_reports, *card.billing_disputes, *card.change_requests]:
            assert personal_data.find_personal_data(text) == [], (card.id, text)


@pytest.mark.parametrize(
    "text",
    [
        "LTE uses 800 MHz, 1800 MHz and 2600 MHz; a cell gives 150 Mbit/s.",
        "Send 200 pings of 1,472 bytes, then 50 more, and note the 99.9 % value.",
        "The band is 700-2600 MHz and the tariff runs 24/7 for 30 days from 1 May 2026.",
        "Error 0x8007232B at 12:45:30, code 651, firmware 10.2.16 and 7.57.1.",
        "Open UDP ports 500 and 4500 and TCP 5060, 5061 and 30000-40000.",
        "Text STOP to 60999 or call 150; the international prefix is 00.",
        "RSRP is -110 dBm, SINR 3 dB, and the speed fell from 67.5 to 12.3 Mbit/s.",
        "A PUK has 8 digits, a PIN is 4 digits long, and an IMEI has 15 digits.",
        "The router answers at 192.168.1.1 and the shared range is 100.64.0.0/10.",
        "It was dated 2026-11-22 and mentions ticket 20261122.",
        "Dr and Ms are titles. Thanks, that is clear.",
        "Between 09:00:00 and 17:30:00, speeds of 1 000 000 000 bit/s are rare.",
    ],
)
def test_technical_figures_are_not_personal_data(text):
    assert personal_data.find_personal_data(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "555-0123", "(212) 555-0199", "+1 415 555 0100", "1-800-555-0142",
        "020 7946 0958", "+44 20 7946 0018", "07700 900123", "+44 7700 900 987", "0044 161 496 0000", "01632 960999",
        "0808 157 0000", "03069 990123",
        "help@example.com", "anna@shop.example.org", "x@telco.example",
        "192.0.2.7", "198.51.100.23", "203.0.113.200", "2001:db8::1", "00:00:5e:00:53:af",
    ],
)  # fmt: skip
def test_what_is_reserved_for_examples_is_allowed(text):
    assert personal_data.find_personal_data(f"You can use {text} for that.") == []


@pytest.mark.parametrize(
    "text", ["555-0223", "+1 415 555 1100", "020 7947 0958", "07701 900123", "help@example.com.au", "192.0.3.7"]
)
def test_what_lies_just_outside_a_reserved_range_is_found(text):
    assert personal_data.find_personal_data(f"You can use {text} for that.")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("imei", "490154203237518"), ("iccid", "8991101200003204514"), ("payment_card", "4111 1111 1111 1111"),
        ("iban", "GB82 WEST 1234 5698 7654 32"), ("telephone", "+49 30 901820"),
        ("long_number", "123456789012345678901234"),
    ],
)  # fmt: skip
def test_check_digits_name_the_kind(kind, text):
    assert kind in {found for found, _ in personal_data.find_personal_data(f"Here: {text}.")}


@pytest.mark.parametrize(("number", "valid"), [("79927398713", True), ("79927398710", False), ("0", True)])
def test_luhn_agrees_with_the_published_example(number, valid):
    assert personal_data.luhn_is_valid(number) is valid


@pytest.mark.parametrize(
    ("text", "valid"), [("GB82 WEST 1234 5698 7654 32", True), ("GB83 WEST 1234 5698 7654 32", False), ("GB82", False)]
)
def test_iban_check_agrees_with_the_published_example(text, valid):
    assert personal_data.iban_is_valid(text) is valid
