"""A part of libsodium, through PyNaCl, which is loaded when a script first uses it."""

from __future__ import annotations

import binascii
from typing import Any, Final

from spawn_reaper.runner.bindings.calling import Calling, Misuse, exposed

_RANDOM_MAX: Final = 1 << 20

# Sizes in bytes (libsodium's crypto_*_PUBLICKEYBYTES and so on).
_BOX_KEY: Final = 32
_SIGN_PUBLIC_KEY: Final = 32
_SIGN_SECRET_KEY: Final = 64
_SIGNATURE: Final = 64


def _nacl() -> Any:
    from nacl import bindings

    return bindings


def _check_size(name: str, position: int, value: bytes, size: int) -> None:
    if len(value) != size:
        raise Misuse(
            f"bad argument #{position} to '{name}' ({size} bytes expected, got {len(value)})"
        )


@exposed("string")
def bin2hex(data: bytes) -> bytes:
    """Return DATA in hexadecimal digits."""
    return data.hex().encode()


@exposed("string")
def hex2bin(digits: bytes) -> bytes | None:
    """Return what hexadecimal digits stand for, or nil."""
    try:
        return binascii.unhexlify(digits)
    except binascii.Error:
        return None


@exposed("integer")
def randombytes(size: float) -> bytes:
    """Return random bytes."""
    if not 1 <= size <= _RANDOM_MAX:
        raise Misuse(f"bad argument #1 to 'randombytes' (not from 1 to {_RANDOM_MAX})")
    data: bytes = _nacl().randombytes(int(size))
    return data


@exposed()
def crypto_box_keypair() -> tuple[bytes, bytes]:
    """Return a new public and secret key."""
    pair: tuple[bytes, bytes] = _nacl().crypto_box_keypair()
    return pair


@exposed("string string")
def crypto_box_seal(message: bytes, public_key: bytes) -> bytes:
    """Encrypt for the owner of a key."""
    _check_size("crypto_box_seal", 2, public_key, _BOX_KEY)
    try:
        sealed: bytes = _nacl().crypto_box_seal(message, public_key)
    except _crypto_error():
        raise Misuse("bad argument #2 to 'crypto_box_seal' (not a public key)") from None
    return sealed


@exposed("string string string")
def crypto_box_seal_open(sealed: bytes, public_key: bytes, secret_key: bytes) -> bytes | None:
    """Decrypt, or return nil."""
    _check_size("crypto_box_seal_open", 2, public_key, _BOX_KEY)
    _check_size("crypto_box_seal_open", 3, secret_key, _BOX_KEY)
    try:
        message: bytes = _nacl().crypto_box_seal_open(sealed, public_key, secret_key)
    except (_crypto_error(), TypeError):  # TypeError: shorter than any sealed box
        return None
    return message


@exposed("string")
def crypto_scalarmult_base(secret_key: bytes) -> bytes:
    """Return the public key to a secret one."""
    _check_size("crypto_scalarmult_base", 1, secret_key, _BOX_KEY)
    public_key: bytes = _nacl().crypto_scalarmult_base(secret_key)
    return public_key


@exposed()
def crypto_sign_keypair() -> tuple[bytes, bytes]:
    """Return a new public and secret key for signatures."""
    pair: tuple[bytes, bytes] = _nacl().crypto_sign_keypair()
    return pair


@exposed("string string")
def crypto_sign_detached(message: bytes, secret_key: bytes) -> bytes:
    """Return the signature of MESSAGE."""
    _check_size("crypto_sign_detached", 2, secret_key, _SIGN_SECRET_KEY)
    signed: bytes = _nacl().crypto_sign(message, secret_key)
    return signed[:_SIGNATURE]


@exposed("string string string")
def crypto_sign_verify_detached(signature: bytes, message: bytes, public_key: bytes) -> bool:
    """Return whether the signature is that of MESSAGE."""
    _check_size("crypto_sign_verify_detached", 1, signature, _SIGNATURE)
    _check_size("crypto_sign_verify_detached", 3, public_key, _SIGN_PUBLIC_KEY)
    try:
        _nacl().crypto_sign_open(signature + message, public_key)
    except _crypto_error():
        return False
    return True


def _crypto_error() -> type[Exception]:
    from nacl.exceptions import CryptoError

    return CryptoError


FUNCTIONS: Final = {
    function.__name__: function
    for function in (
        bin2hex,
        hex2bin,
        randombytes,
        crypto_box_keypair,
        crypto_box_seal,
        crypto_box_seal_open,
        crypto_scalarmult_base,
        crypto_sign_keypair,
        crypto_sign_detached,
        crypto_sign_verify_detached,
    )
}


def install(calling: Calling) -> None:
    """Give scripts the table "sodium"."""
    calling.add_functions("sodium", FUNCTIONS)
