"""Personal data is found in nearly every planted text, and hardly ever where there is none."""

import ipaddress
import json
import random
from collections import Counter

import phonenumbers
import pytest
import yaml
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from telco_nb import ROOT
from telco_nb.corpus import personal_data, text_measures

DATA = ROOT / "telco_nb" / "data"


def leaves(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)


def card_texts():
    """Every text of every card, what agents and customers say included: (file, "card", text)."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted((DATA / "cards").glob("*.yaml")):
        for text in leaves(yaml.load(path.read_text(encoding="utf-8"), Loader=loader)):
            yield path.name, "card", text


def gold_messages():
    """Every message of the gold conversations: (file and line, role, text)."""
    for path in sorted((DATA / "conversations").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for message in json.loads(line)["messages"]:
                yield f"{path.name}, line {number}", message["role"], message["content"]


CLEAN = [text for _, role, text in gold_messages() if role == "assistant"]
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


def test_no_text_of_a_card_and_no_message_trips_the_filter_except_a_secret_that_a_customer_posts():
    """In some gold conversations a customer posts a made-up PIN or password, so that the agent can have it changed."""
    texts = [*card_texts(), *gold_messages()]
    trips = [
        (place, kind, found, text)
        for place, role, text in texts
        for kind, found in personal_data.find_personal_data(text)
        if (role, kind) != ("user", "secret")
    ]
    assert len(CLEAN) > 1500 and len(texts) > 20_000
    assert trips == []


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
        # versions
        "firmware 4.0.11.2024-05-17", "4.0.11.2024-05-17", "10.15.7.21", "iOS 17.4.1", "macOS 14.4.1.2", "v2.14.0.1",
        "v. 2.14.0.1", "version 81.2.69.142", "Software: 9.12.3.4", "the software is 9.12.3.4", "build 19.4.10.1",
        "release 21.2.3.4", "Firmware 4.12.0.1-202405171200", "firmware 4.12.0.1 and 4.13.0.2", "126.0.6478.127",
        "Windows 10.0.22631.3007", "firmware update from 7.9.0.1 to 8.0.0.2", "version 14.6.0 (2018-09)",
        # clauses and sections
        "47 CFR 64.2010(h)", "47 CFR 101.1012", "section 9.3.1.2", "clause 12.4.10.1", "clauses 12.4.10.1 to 12.4.10.7",
        "sections 9.3.1.2, 9.3.1.3", "§ 64.12.3.1", "Annex 4.2.1.9",
        # standards and parts
        "EN 301 489-17", "EN 300 328 (2019-07)", "RFC 7042", "88 FR 85794", "ISO/IEC 7812-1", "ISO 13616-1:2020",
        "IEC 61076-2-101:2012", "IEEE 802.11-2020", "G.993.5", "ITU-T G.9960", "ETSI TS 123 167 V 14.6.0 (2018-09)",
        # dates and times
        "2026-11-26", "26/11/2026", "11/26/2026", "26.11.2026 14:30", "26. 11. 2026 14:30", "2026-11-26 14:30:00",
        "26/11/2026 (14:30)", "14:30 26/11/2026", "2023 and 2024", "2024 2025 2026", "01/02/2025-31/03/2025",
        "1.12.2024 - 31.12.2024", "2026-11-26/2026-12-01", "01.02.25 – 31.03.25", "01/2025-03/2025", "20261126",
        "20261126 1430", "14:30 12345678", "20261126143000", "20261126-20261201",
        # addresses that are nobody's
        "1.1.1.1", "8.8.8.8 and 8.8.4.4", "9.9.9.9", "2606:4700:4700::1111", "2001:4860:4860:0:0:0:0:8888",
        "192.0.2.44", "198.51.100.7", "203.0.113.9", "2001:db8:85a3::8a2e:370:7334", "192.168.178.1", "10.0.0.138",
        "172.16.0.1", "172.31.255.254", "100.64.0.1", "fe80::1", "::1", "::ffff:10.0.0.1", "0.0.0.0", "255.255.255.0",
        "239.255.255.250", "ff02::1", "the IP address 192.168.1.1",
        # ranges of amounts
        "5150-5350 MHz", "24250 - 27500 MHz", "16384-32767", "100000-200000 minutes", "100 000 - 200 000 homes",
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["{}", "It says {} here.", "Please note: {}."])
def test_technical_numbers_are_not_personal_data(frame, text):
    assert personal_data.find_personal_data(frame.format(text)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # a telephone number, card or customer number beside a technical number
        ("firmware 4.0.11.2024-05-17, call 0171 234 5678", "0171 234 5678"),
        ("v2.14.0.1 0171 234 5678", "0171 234 5678"), ("version 4.1.2.3 0171 234 5678", "0171 234 5678"),
        ("software 415.555.1100", "415.555.1100"), ("build 4111-1111-1111-1111", "4111-1111-1111-1111"),
        ("clause 12.4.10.1: +49 30 901820", "+49 30 901820"), ("EN 301 489-17, 0171 234 5678", "0171 234 5678"),
        ("TS 415.555.1100", "415.555.1100"), ("EN 301 489 1799", "301 489 1799"),
        ("FR 06 12 34 56 78", "06 12 34 56 78"), ("14:30:05 0171 234 5678", "0171 234 5678"),
        ("26/11/2026 0171 234 5678", "0171 234 5678"), ("0171 234 5678 26.11.2026", "0171 234 5678"),
        ("2026-11-26 14:30 0171 234 5678", "0171 234 5678"),
        # what only looks like a date, a version or a range
        ("06.12.34.56.78", "06.12.34.56.78"), ("06-12-34-56-78", "06-12-34-56-78"), ("20101231-1234", "20101231-1234"),
        ("201012311234", "201012311234"), ("2026-13-45-88412345", "2026-13-45-88412345"),
        ("01/2034 567", "01/2034 567"), ("2024 0011 2233", "2024 0011 2233"),
        ("31.02.2026-30.02.2026", "31.02.2026-30.02.2026"),
        ("61.2.9876.5432", "61.2.9876.5432"), ("+33.1.23.45.67.89", "+33.1.23.45.67.89"),
        ("33.1.23.45.67.89", "33.1.23.45.67.89"), ("123456-789012", "123456-789012"), ("123456789", "123456789"),
        ("200000-100000 minutes", "200000-100000"),
        # public addresses
        ("81.2.69.142", "81.2.69.142"), ("4.0.11.20", "4.0.11.20"), ("IP 4.0.11.20", "4.0.11.20"),
        ("IPv4: 12.4.10.1", "12.4.10.1"), ("the address is 12.4.10.1", "12.4.10.1"),
        ("the firmware's IP address 4.0.11.20", "4.0.11.20"), ("IP version 4: 81.2.69.142", "81.2.69.142"),
        ("firmware 4.1.2.3 and 81.2.69.142", "81.2.69.142"), ("firmware 4.1.2.3, IP 4.1.2.4", "4.1.2.4"),
        ("I updated the firmware. 81.2.69.142", "81.2.69.142"), ("my IP vs 81.2.69.142", "81.2.69.142"),
        ("81.2.69.142-81.2.69.150", "81.2.69.150"), ("::ffff:81.2.69.142", "81.2.69.142"), ("8.8.8.9", "8.8.8.9"),
        ("100.128.0.1", "100.128.0.1"), ("172.32.0.1", "172.32.0.1"), ("192.0.3.44", "192.0.3.44"),
        ("2606:4700:4700::1234", "2606:4700:4700::1234"), ("2001:db9::1", "2001:db9::1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["{}", "It says {} here.", "Please note: {}."])
def test_near_neighbours_of_technical_numbers_are_still_found(frame, text, found):
    assert found in {match for _, match in personal_data.find_personal_data(frame.format(text))}


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
