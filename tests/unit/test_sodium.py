"""The functions of libsodium, against published vectors and against PyNaCl."""

from __future__ import annotations

import pytest
from nacl.public import PrivateKey, SealedBox
from nacl.signing import SigningKey, VerifyKey

from tests.tools.scripts import evaluated

EVERY_BYTE = bytes(range(256))

# RFC 7748, section 6.1; libsodium's own test (scalarmult.c) has them, too.
X25519 = [
    (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    ),
    (
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    ),
]

# RFC 8032, section 7.1, tests 1 to 3: seed, public key, message, signature.
ED25519 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9"
        "b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f1"
        "1d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984d"
        "c6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]

FIRST = ED25519[0]

# Some keys, messages and what became of them, for the tests of sizes and counts.
KEYS = """
local s = sodium
local box_pk, box_sk = s.crypto_box_keypair()
local sign_pk, sign_sk = s.crypto_sign_keypair()
local sealed = s.crypto_box_seal("secret", box_pk)
local signature = s.crypto_sign_detached("message", sign_sk)
"""


def quoted(data: bytes) -> str:
    """Return DATA as a Lua expression."""
    return '"' + "".join(f"\\{byte:03}" for byte in data) + '"'


def unhex(text: str) -> str:
    """Return the bytes that TEXT stands for as a Lua expression."""
    return quoted(bytes.fromhex(text))


def hex_of(expression: str) -> str:
    """Return the hexadecimal form of what a Lua expression gives."""
    return evaluated(f"sodium.bin2hex({expression})")


# Hexadecimal


@pytest.mark.parametrize("data", [b"", b"\0", b"abc", EVERY_BYTE], ids=["empty", "NUL", "abc", "*"])
def test_bin2hex_and_hex2bin_are_the_inverse_of_each_other(data: bytes) -> None:
    assert evaluated(f"sodium.bin2hex({quoted(data)})") == data.hex()
    assert evaluated(f'sodium.hex2bin("{data.hex()}") == {quoted(data)}') == "true"


def test_hex2bin_takes_capitals() -> None:
    assert evaluated('sodium.hex2bin("4A4b4C")') == "JKL"


@pytest.mark.parametrize(
    "text", ['"0"', '"012"', '"0g"', '"zz"', '" 01"', '"01 "', '"0 1"', '"0x01"', '"01\\0"', '"+1"']
)
def test_hex2bin_returns_nil_on_bad_input(text: str) -> None:
    assert evaluated(f"sodium.hex2bin({text})") == "nil"


def test_numbers_pass_as_strings_as_lua_formats_them() -> None:
    assert evaluated("sodium.bin2hex(12)") == b"12".hex()
    assert evaluated("sodium.bin2hex(0.5)") == b"0.5".hex()
    assert evaluated("sodium.hex2bin(414243)") == "ABC"


# Random bytes


@pytest.mark.parametrize("count", ["1", "32", "1048576", '"7"', "3.9"])
def test_randombytes_returns_as_many_as_asked_for(count: str) -> None:
    assert evaluated(f"#sodium.randombytes({count})") == str(int(float(count.strip('"'))))


def test_randombytes_are_different_each_time() -> None:
    assert evaluated("sodium.randombytes(16) ~= sodium.randombytes(16)") == "true"


@pytest.mark.parametrize("count", ["0", "-1", "0.9", "1048577", "2^53", "1e300", "1/0", "0/0"])
def test_randombytes_of_another_number_raises(count: str) -> None:
    outcome = evaluated(f"sodium.randombytes({count})")
    assert outcome.startswith("raises bad argument #1 to 'randombytes' (")


# Sealed boxes


@pytest.mark.parametrize(("secret", "public"), X25519, ids=["Alice", "Bob"])
def test_crypto_scalarmult_base_gives_the_public_key_of_rfc_7748(secret: str, public: str) -> None:
    assert hex_of(f"sodium.crypto_scalarmult_base({unhex(secret)})") == public


def test_crypto_box_keypair_is_a_pair_and_another_each_time() -> None:
    assert evaluated("#box_pk, #box_sk", KEYS) == "32, 32"
    assert evaluated("s.crypto_scalarmult_base(box_sk) == box_pk", KEYS) == "true"
    assert evaluated("s.crypto_box_keypair() ~= box_pk", KEYS) == "true"


@pytest.mark.parametrize("message", [b"", EVERY_BYTE, b"x" * 5000], ids=["empty", "*", "long"])
def test_pynacl_opens_what_crypto_box_seal_made(message: bytes) -> None:
    secret = PrivateKey.generate()
    sealed = hex_of(
        f"sodium.crypto_box_seal({quoted(message)}, {quoted(bytes(secret.public_key))})"
    )
    assert SealedBox(secret).decrypt(bytes.fromhex(sealed)) == message


@pytest.mark.parametrize("message", [b"", EVERY_BYTE, b"x" * 5000], ids=["empty", "*", "long"])
def test_crypto_box_seal_open_opens_what_pynacl_made(message: bytes) -> None:
    secret = PrivateKey.generate()
    sealed = SealedBox(secret.public_key).encrypt(message)
    opened = hex_of(
        f"sodium.crypto_box_seal_open({quoted(sealed)}, {quoted(bytes(secret.public_key))},"
        f" {quoted(bytes(secret))})"
    )
    assert bytes.fromhex(opened) == message


@pytest.mark.parametrize(
    "arguments",
    [
        'sealed .. "x", box_pk, box_sk',
        "sealed:sub(1, -2), box_pk, box_sk",
        "sealed:sub(1, -2) .. string.char((sealed:byte(-1) + 1) % 256), box_pk, box_sk",
        '"", box_pk, box_sk',
        '("x"):rep(47), box_pk, box_sk',
        '("x"):rep(48), box_pk, box_sk',
        "sealed, box_pk, sign_pk",
        "sealed, sign_pk, box_sk",
    ],
    ids=["longer", "shorter", "changed", "empty", "47", "48", "other secret", "other public"],
)
def test_crypto_box_seal_open_returns_nil_when_it_does_not_open(arguments: str) -> None:
    assert evaluated("s.crypto_box_seal_open(sealed, box_pk, box_sk)", KEYS) == "secret"
    assert evaluated(f"s.crypto_box_seal_open({arguments})", KEYS) == "nil"


# Signatures


@pytest.mark.parametrize(("seed", "public", "message", "signature"), ED25519, ids="123")
def test_signatures_are_those_of_rfc_8032(
    seed: str, public: str, message: str, signature: str
) -> None:
    secret = unhex(seed + public)  # libsodium's secret keys have the public one in them
    signed = hex_of(f"sodium.crypto_sign_detached({unhex(message)}, {secret})")
    assert signed == signature
    verify = f"{unhex(signature)}, {unhex(message)}, {unhex(public)}"
    assert evaluated(f"sodium.crypto_sign_verify_detached({verify})") == "true"


@pytest.mark.parametrize(
    "arguments",
    [
        'signature, "other", sign_pk',
        'signature, "message\\0", sign_pk',
        'signature, "message", box_pk',
        '("\\0"):rep(64), "message", sign_pk',
        'signature:sub(1, -2) .. string.char((signature:byte(-1) + 1) % 256), "message", sign_pk',
    ],
    ids=["message", "NUL", "key", "zeros", "changed"],
)
def test_a_signature_of_something_else_is_not_taken(arguments: str) -> None:
    verified = 's.crypto_sign_verify_detached(signature, "message", sign_pk)'
    assert evaluated(verified, KEYS) == "true"
    assert evaluated(f"s.crypto_sign_verify_detached({arguments})", KEYS) == "false"


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_signature_of_a_wrong_size_is_never_taken(size: int) -> None:
    outcome = evaluated(
        f's.crypto_sign_verify_detached(("x"):rep({size}), "message", sign_pk)', KEYS
    )
    assert outcome == "false" or outcome.startswith("raises ")


def test_crypto_sign_keypair_is_a_pair_for_pynacl() -> None:
    public, secret, signature = (
        bytes.fromhex(part)
        for part in evaluated(
            "s.bin2hex(sign_pk), s.bin2hex(sign_sk), s.bin2hex(signature)", KEYS
        ).split(", ")
    )
    assert bytes(SigningKey(secret[:32]).verify_key) == public == secret[32:]
    assert VerifyKey(public).verify(b"message", signature) == b"message"


def test_messages_to_be_signed_are_binary_safe() -> None:
    seed, public, *_ = FIRST
    signed = hex_of(f"sodium.crypto_sign_detached({quoted(EVERY_BYTE)}, {unhex(seed + public)})")
    VerifyKey(bytes.fromhex(public)).verify(EVERY_BYTE, bytes.fromhex(signed))


# Mistakes

WRONG_SIZES = {
    "crypto_box_seal": [('"m", {}', 2, 32)],
    "crypto_box_seal_open": [("sealed, {}, box_sk", 2, 32), ("sealed, box_pk, {}", 3, 32)],
    "crypto_scalarmult_base": [("{}", 1, 32)],
    "crypto_sign_detached": [('"m", {}', 2, 64)],
    "crypto_sign_verify_detached": [('signature, "message", {}', 3, 32)],
}


@pytest.mark.parametrize(
    ("call", "function", "position"),
    [
        (f"s.{function}({arguments.format(key)})", function, position)
        for function, cases in WRONG_SIZES.items()
        for arguments, position, size in cases
        for key in ('""', f'("x"):rep({size - 1})', f'("x"):rep({size + 1})', '("x"):rep(1048576)')
    ],
)
def test_a_key_of_a_wrong_size_raises(call: str, function: str, position: int) -> None:
    assert evaluated(call, KEYS).startswith(f"raises bad argument #{position} to '{function}' (")


ARGUMENTS = {
    "bin2hex": ['"x"'],
    "hex2bin": ['"00"'],
    "randombytes": ["1"],
    "crypto_box_keypair": [],
    "crypto_box_seal": ['"m"', "box_pk"],
    "crypto_box_seal_open": ["sealed", "box_pk", "box_sk"],
    "crypto_scalarmult_base": ["box_sk"],
    "crypto_sign_keypair": [],
    "crypto_sign_detached": ['"m"', "sign_sk"],
    "crypto_sign_verify_detached": ["signature", '"message"', "sign_pk"],
}


@pytest.mark.parametrize("function", ARGUMENTS)
@pytest.mark.parametrize("more", ["nil", '"x"', "nil, nil"])
def test_too_many_arguments_raise(function: str, more: str) -> None:
    arguments = ARGUMENTS[function]
    given = ", ".join([*arguments, more])
    count = len(arguments)
    assert evaluated(f"s.{function}({given})", KEYS) == (
        f"raises too many arguments to '{function}'"
        f" ({count} expected, got {count + more.count(',') + 1})"
    )


@pytest.mark.parametrize(
    ("function", "position"),
    [(function, i) for function, arguments in ARGUMENTS.items() for i in range(len(arguments))],
)
def test_missing_arguments_and_wrong_types_raise(function: str, position: int) -> None:
    arguments = ARGUMENTS[function]
    expected = "number" if function == "randombytes" else "string"
    start = f"raises bad argument #{position + 1} to '{function}' ({expected} expected, got "

    def outcome_with(*replaced: str) -> str:
        given = ", ".join(
            [*arguments[:position], *replaced, *arguments[position + len(replaced) :]]
        )
        return evaluated(f"s.{function}({given})", KEYS)

    missing = ", ".join(arguments[:position])
    assert evaluated(f"s.{function}({missing})", KEYS) == f"{start}no value)"
    for value, kind in [
        ("nil", "nil"),
        ("{}", "table"),
        ("true", "boolean"),
        ("print", "function"),
    ]:
        assert outcome_with(value) == f"{start}{kind})"
