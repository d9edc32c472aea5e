/* The control channel without its I/O: bytes and descriptors in, events out; answers in, bytes out.
 *
 * A request is a u32 command and its body, a response a u32 result and its body, big-endian. There
 * is no length field: what one read brings is one command. What it brings beyond that is in excess
 * and never taken as the next command, as a client waits for its answer before it sends again.
 * docs/control-channel.md has the rules and the tables; one table in control.c has them for the
 * code. Sources: swtpm's tpm_ioctl.h and ctrlchannel.c, QEMU's tpm_emulator.c.
 *
 *     RECEIVING ──control_next: a request──────────────────────► ASKED
 *     RECEIVING ──control_next: what is refused────────────────► ANSWERING
 *     ASKED     ──control_answer_…─────────────────────────────► ANSWERING
 *     ANSWERING ──control_sent: the last byte──────────────────► RECEIVING
 *     ANSWERING ──control_sent: the last byte, if it closes────► CLOSED
 *     ASKED, ANSWERING ──control_receive: excess without end───► CLOSED
 *
 * From CLOSED there is no way back: where the next command would begin is not known, or the client
 * does not keep to the protocol. An answer that is given then is not sent.
 *
 * One struct control is one client's connection. Nothing here blocks or knows the time; the only
 * system call is close(), of descriptors that came and that no command takes.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    CONTROL_BLOB_BYTES_MAX = 512 << 10,     /* swtpm's; libtpms' largest state has 143 KB */
    CONTROL_HASH_DATA_BYTES_MAX = 64 << 10, /* sixteen times what swtpm_ioctl sends at once */
    CONTROL_INFO_BYTES_MAX = 3 << 10,       /* PTM_GETINFO_SIZE of QEMU's tpm_ioctl.h */
    CONTROL_EXCESS_BYTES_MAX = 1 << 20,     /* more than a command may have */
    CONTROL_DESCRIPTORS_MAX = 2, /* SET_DATAFD has one; the second is there to be noticed */

    CONTROL_NUMBER_BYTES = 4,
    CONTROL_FIELDS_MAX = 3,
    CONTROL_BODY_BYTES_MAX = 16,   /* GET_INFO's; without data */
    CONTROL_ANSWER_BYTES_MAX = 16, /* GET_STATEBLOB's; without data */
    CONTROL_PIECES_MAX = 3,        /* that a state blob may be in */
};

/* The commands, by number. */
enum control_number {
    CONTROL_GET_CAPABILITY = 1,
    CONTROL_INIT = 2,
    CONTROL_SHUTDOWN = 3,
    CONTROL_GET_TPMESTABLISHED = 4,
    CONTROL_SET_LOCALITY = 5,
    CONTROL_HASH_START = 6,
    CONTROL_HASH_DATA = 7,
    CONTROL_HASH_END = 8,
    CONTROL_CANCEL_TPM_CMD = 9,
    CONTROL_STORE_VOLATILE = 10,
    CONTROL_RESET_TPMESTABLISHED = 11,
    CONTROL_GET_STATEBLOB = 12,
    CONTROL_SET_STATEBLOB = 13,
    CONTROL_STOP = 14,
    CONTROL_GET_CONFIG = 15,
    CONTROL_SET_DATAFD = 16,
    CONTROL_SET_BUFFERSIZE = 17,
    CONTROL_GET_INFO = 18,
    CONTROL_LOCK_STORAGE = 19,
    CONTROL_N_NUMBERS, /* one more than the last */
};

/* Flags that requests and answers carry. */
enum control_flag {
    CONTROL_INIT_DELETE_VOLATILE = 0x1,
    CONTROL_STATE_DECRYPTED = 0x1, /* GET_STATEBLOB: asks for it in the clear */
    CONTROL_STATE_ENCRYPTED = 0x2, /* what is in a blob */
    CONTROL_CONFIG_FILE_KEY = 0x1,
    CONTROL_CONFIG_MIGRATION_KEY = 0x2,
};

/* Flags of GET_CAPABILITY's answer. */
enum control_capability {
    CONTROL_CAN_INIT = 1 << 0,
    CONTROL_CAN_SHUTDOWN = 1 << 1,
    CONTROL_CAN_GET_TPMESTABLISHED = 1 << 2,
    CONTROL_CAN_SET_LOCALITY = 1 << 3,
    CONTROL_CAN_HASHING = 1 << 4,
    CONTROL_CAN_CANCEL_TPM_CMD = 1 << 5,
    CONTROL_CAN_STORE_VOLATILE = 1 << 6,
    CONTROL_CAN_RESET_TPMESTABLISHED = 1 << 7,
    CONTROL_CAN_GET_STATEBLOB = 1 << 8,
    CONTROL_CAN_SET_STATEBLOB = 1 << 9,
    CONTROL_CAN_STOP = 1 << 10,
    CONTROL_CAN_GET_CONFIG = 1 << 11,
    CONTROL_CAN_SET_DATAFD = 1 << 12,
    CONTROL_CAN_SET_BUFFERSIZE = 1 << 13,
    CONTROL_CAN_GET_INFO = 1 << 14,
    CONTROL_CAN_SEND_COMMAND_HEADER = 1 << 15, /* of the data channel: by the TPM's version */
    CONTROL_CAN_LOCK_STORAGE = 1 << 16,
};

/* What the TPM's power is; a command's row has those in which it is carried out, added up. */
enum control_power {
    CONTROL_STOPPED = 1,
    CONTROL_RUNNING = 2,
    CONTROL_ANY_POWER = CONTROL_STOPPED | CONTROL_RUNNING,
};

/* A number in a request's body, and where struct control_event has it. */
struct control_field {
    uint8_t n_bytes; /* 1, 4 or 8; 0: no more fields */
    uint8_t at;
};

/* A command: all that its requests and responses have in common. */
struct control_command {
    const char *name;
    struct control_field fields[CONTROL_FIELDS_MAX];
    uint32_t data_bytes_max; /* of the data that `data_bytes` announces; 0: none is announced */
    bool drops_excess;       /* else it is refused */
    uint8_t n_descriptors;   /* that have to come with it; if 0, what comes is closed */
    uint8_t powers;          /* enum control_power: when it is carried out */
    uint8_t powers_to_ask;   /* the same with 0 `wanted_bytes`; 0: that makes no difference */
    uint8_t answer_bytes;    /* of a success, without data; 0: the result alone */
    uint8_t error_bytes;     /* of an error, zeros after the result; 0: the result alone */
    uint32_t capability;     /* enum control_capability */
};

/* Return a command's row, or NULL: there is none. */
const struct control_command *control_command_of(uint32_t number);

/* How long a request is without its data, the command's number included. */
size_t control_request_bytes(const struct control_command *command);

/* What has come, whole. Fields that the command does not have are 0. */
struct control_event {
    uint32_t number;                       /* enum control_number, but for an unknown command */
    const struct control_command *command; /* NULL if it is unknown */
    uint64_t flags;                        /* of INIT, GET_STATEBLOB, SET_STATEBLOB, GET_INFO */
    uint64_t type;                         /* of a state; may be one that there is none of */
    uint64_t offset;                       /* the answer functions heed it */
    uint64_t locality;                     /* 0 to 255, as it was sent */
    uint64_t wanted_bytes;                 /* SET_BUFFERSIZE; 0 asks */
    uint64_t retries;                      /* LOCK_STORAGE, of 10 ms each */
    uint64_t data_bytes;
    const uint8_t *data; /* until the answer; NULL without data */
    int descriptor;      /* SET_DATAFD's, until the answer: see control_take_descriptor() */
    uint32_t result;     /* CONTROL_REFUSED: a TPM_RESULT, */
    const char *reason;  /* and why, for the log */
};

struct control {
    uint8_t state; /* enum state in control.c */
    bool closes;   /* when the answer is out */
    uint8_t request[CONTROL_NUMBER_BYTES + CONTROL_BODY_BYTES_MAX];
    size_t request_bytes; /* how much of it has come */
    bool is_parsed;       /* all of it, into `event` */
    struct control_event event;
    uint8_t *data;     /* `event.data_bytes` bytes, on the heap, or NULL */
    size_t data_bytes; /* how much of it has come */
    size_t excess_bytes;
    int descriptors[CONTROL_DESCRIPTORS_MAX];
    size_t n_descriptors;
    uint8_t answer[CONTROL_ANSWER_BYTES_MAX];
    struct iovec output[1 + CONTROL_PIECES_MAX]; /* what is still to be sent */
    size_t n_output;
};

/* Begin with a client's connection. */
void control_init(struct control *control);

/* End with it: overwrite and free what has come, and close its descriptors. */
void control_deinit(struct control *control);

/* Take what one read has brought. The bytes are copied; the descriptors, any number of them, are
 * the codec's from now on. What comes while an answer is due, or is being sent, is dropped. */
void control_receive(struct control *control, const uint8_t *bytes, size_t n_bytes,
                     const int *descriptors, size_t n_descriptors);

enum control_verdict {
    CONTROL_NEED_DATA = 0,
    CONTROL_REQUEST = 1, /* the next call has to be that of a control_answer_…() */
    CONTROL_REFUSED = 2, /* the answer is already there to be sent */
    CONTROL_CLOSED = 3,  /* nothing more can be made of this connection */
};

/* Make an event of what has come, for a TPM whose power is this. Call it after each
 * control_receive(), when all is sent. Returns an enum control_verdict. */
int control_next(struct control *control, enum control_power power, struct control_event *event);

/* Whether a command is under way that is not complete: it has a time limit. */
bool control_is_partial(const struct control *control);

/* Keep the descriptor of the SET_DATAFD that is to be answered: it is the caller's then. */
int control_take_descriptor(struct control *control);

/* Answer the request with a TPM_RESULT: an error, or the success of a command without an answer's
 * body. As all of these it ends the event's `data` and `descriptor`; none may be called twice. */
void control_answer_result(struct control *control, uint32_t result);

/* Answer it with success, and what the command is there for. */
void control_answer_capability(struct control *control, bool takes_prefix);
void control_answer_established(struct control *control, bool established);
void control_answer_config(struct control *control, uint32_t flags);
void control_answer_buffer_size(struct control *control, uint32_t bytes, uint32_t bytes_min,
                                uint32_t bytes_max);

/* GET_STATEBLOB: all of a blob from the request's offset on. The blob is in at most
 * CONTROL_PIECES_MAX pieces, and has to stay until it is sent or the connection ends. */
void control_answer_state_blob(struct control *control, const struct iovec *pieces, size_t n_pieces,
                               bool is_encrypted);

/* GET_INFO: as much as an answer has room for of a text and its NUL, from the request's offset on.
 * An offset past the text is answered with an error. The text has to stay, as a blob has. */
void control_answer_info(struct control *control, const char *text);

/* What is to be sent, in order; changed by control_sent(). Returns how many vectors, 0: nothing. */
size_t control_output(struct control *control, struct iovec **vectors);

/* So many bytes of it have been sent. */
void control_sent(struct control *control, size_t n_bytes);
