"""What the control channel, state files and sessions say of a TPM: results, and types of state."""

from enum import IntEnum


class Result(IntEnum):
    """The results that responses carry: TPM 1.2's codes, as libtpms and swtpm use them."""

    SUCCESS = 0x000
    BAD_PARAMETER = 0x003
    FAIL = 0x009
    BAD_ORDINAL = 0x00A
    KEYNOTFOUND = 0x00D
    IOERROR = 0x01F
    DECRYPT_ERROR = 0x021
    BAD_KEY_PROPERTY = 0x028
    BAD_DATASIZE = 0x02B
    BAD_VERSION = 0x02E
    BAD_LOCALITY = 0x03D
    RETRY = 0x800


class StateType(IntEnum):
    """The types of state blob."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 3
