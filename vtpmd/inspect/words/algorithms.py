"""TPM_ALG_ID: the algorithms (TCG Algorithm Registry), with what states need to know of them."""

from __future__ import annotations

from typing import Final

ALGORITHMS: Final = {
    0x0000: "ERROR",
    0x0001: "RSA",
    0x0003: "TDES",
    0x0004: "SHA1",
    0x0005: "HMAC",
    0x0006: "AES",
    0x0007: "MGF1",
    0x0008: "KEYEDHASH",
    0x000A: "XOR",
    0x000B: "SHA256",
    0x000C: "SHA384",
    0x000D: "SHA512",
    0x0010: "NULL",
    0x0012: "SM3_256",
    0x0013: "SM4",
    0x0014: "RSASSA",
    0x0015: "RSAES",
    0x0016: "RSAPSS",
    0x0017: "OAEP",
    0x0018: "ECDSA",
    0x0019: "ECDH",
    0x001A: "ECDAA",
    0x001B: "SM2",
    0x001C: "ECSCHNORR",
    0x001D: "ECMQV",
    0x0020: "KDF1_SP800_56A",
    0x0021: "KDF2",
    0x0022: "KDF1_SP800_108",
    0x0023: "ECC",
    0x0025: "SYMCIPHER",
    0x0026: "CAMELLIA",
    0x0027: "SHA3_256",
    0x0028: "SHA3_384",
    0x0029: "SHA3_512",
    0x003F: "CMAC",
    0x0040: "CTR",
    0x0041: "OFB",
    0x0042: "CBC",
    0x0043: "CFB",
    0x0044: "ECB",
}

# The bytes of a digest.
DIGEST_BYTES: Final = {
    0x0004: 20,
    0x000B: 32,
    0x000C: 48,
    0x000D: 64,
    0x0012: 32,
    0x0027: 32,
    0x0028: 48,
    0x0029: 64,
}

# TPM_ECC_CURVE.
CURVES: Final = {
    0x0001: "NIST_P192",
    0x0002: "NIST_P224",
    0x0003: "NIST_P256",
    0x0004: "NIST_P384",
    0x0005: "NIST_P521",
    0x0010: "BN_P256",
    0x0011: "BN_P638",
    0x0020: "SM2_P256",
}
