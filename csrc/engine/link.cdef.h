/* The engine link: the messages between vtpmd and its engine, on a stream socket between the two.
 *
 * Declared once: C includes this file by way of link_types.h, Python reads it through cffi, which
 * is why it holds nothing but declarations. Numbers are in the machine's own order: both ends are
 * one build on one machine.
 *
 * What the TPM starts from, and how it keeps it, is in the boot record: requests, one after
 * another, in a memfd that is sealed. The engine carries them out before it says LINK_READY, and
 * ends if one of them fails.
 *
 * A request is a header, then `payload_bytes` bytes of payload; so is its response, with the same
 * operation. One request is under way at a time. The engine answers in order and never speaks
 * unasked, but for the one LINK_READY that it sends when it can serve.
 */

enum link_operation {
    LINK_READY = 1,             /* engine → vtpmd; argument: enum link_locked; payload: uint32_t,
                                   TPMLIB_GetVersion() */
    LINK_LOAD_STATE = 2,        /* argument: state type; payload: what the checkpoint holds */
    LINK_SET_DATA_SOCKET = 3,   /* with one descriptor, a stream socket */
    LINK_INIT = 4,              /* power on; a volatile state is resumed from, and then removed;
                                   argument: enum link_init and, with LINK_INIT_HELD, enum
                                   link_shutdown, as the host says that it comes from; then there
                                   is an answer: payload, struct link_digests; with LINK_INIT_CAME
                                   alone there may be a payload: struct link_lineage, of what has
                                   come; without it the directory's vTPM is the same as before */
    LINK_STOP = 5,              /* TPM2_Shutdown as the guest needs it, then power off */
    LINK_GET_ESTABLISHED = 6,   /* answer: argument */
    LINK_RESET_ESTABLISHED = 7, /* argument: locality */
    LINK_SET_LOCALITY = 8,      /* argument: locality */
    LINK_HASH_START = 9,
    LINK_HASH_DATA = 10, /* payload: what to hash */
    LINK_HASH_END = 11,
    LINK_CANCEL = 12,          /* takes effect at the running command */
    LINK_STORE_VOLATILE = 13,  /* into the state directory */
    LINK_GET_STATE = 14,       /* argument: state type; answer: payload; who asks for the permanent
                                  state may take the vTPM elsewhere, so nothing is written until
                                  the guest runs on: a command, LINK_HASH_*,
                                  LINK_RESET_ESTABLISHED, LINK_INIT, LINK_STORE_VOLATILE or
                                  LINK_UNRETIRE */
    LINK_SET_STATE = 15,       /* argument: state type; payload; taken up by the next LINK_INIT */
    LINK_SET_BUFFER_SIZE = 16, /* argument: wanted, or 0 to ask; answer: argument, and payload of
                                  two uint32_t, smallest and largest */
    LINK_GET_INFO = 17, /* argument: TPMLIB_InfoFlags; answer: payload, text without its NUL */
    LINK_CAPTURE = 18,  /* into the store; answer: argument, enum link_capture and enum
                           link_shutdown */
    LINK_RETIRE = 19,   /* serve no more, and write nothing; argument: enum link_retire; refused if
                           that is broken */
    LINK_UNRETIRE = 20, /* serve and write again, also after LINK_GET_STATE */
    LINK_FORGET_STATE = 21,     /* what LINK_SET_STATE was given is not to be used */
    LINK_RAISE_GENERATION = 22, /* payload: two uint64_t, permanent and volatile: what another host
                                   has used */
    LINK_STORE_PERMANENT = 23, /* write the image, which LINK_LOAD_STATE has given, into its file */
    LINK_SET_BOTH_STATES = 24, /* LINK_SET_STATE for permanent, of argument bytes, and volatile: the
                                  payload has one after the other */
    LINK_ADMIT = 25,   /* the vTPM is this host's: commands are executed, its files may be written;
                          argument: enum link_admit; payload: struct link_lineage, of what has
                          come; may be asked again after it failed */
    LINK_SET_KEY = 26, /* payload: the key, of 16 or 32 bytes, to encrypt state files with;
                          before anything is written */
    LINK_SET_ANCHOR = 27,  /* after LINK_SET_JOURNAL; payload: struct link_anchor; with one
                              descriptor, the anchor's: LINK_FD_ANCHOR in a boot record */
    LINK_SET_JOURNAL = 28, /* keep journals from the next LINK_INIT on; payload: struct
                              link_journal */
    LINK_EXPECT = 29,      /* the guest may use the held TPM: its commands wait for LINK_ADMIT, a
                              moment at most, and are answered TPM_RC_RETRY then */
    LINK_AWAIT = 30,       /* argument 1: the retired TPM is asked back, and commands wait for
                              LINK_UNRETIRE in the same way; 0: not any more */
    LINK_GET_LINEAGE = 31, /* after LINK_SET_JOURNAL; answer: payload, struct link_lineage, of the
                              permanent state as it is durable */
};

/* What LINK_INIT starts from; may be added up. */
enum link_init {
    LINK_INIT_CAME = 1, /* the vTPM has come to this host: that ends a retirement */
    LINK_INIT_HELD = 2, /* from what LINK_SET_STATE gave, which is durable elsewhere, ahead of time:
                           write nothing, and serve as if it had not started, until LINK_EXPECT */
};

/* What LINK_ADMIT does. */
enum link_admit {
    LINK_ADMIT_SERVE = 0,
    LINK_ADMIT_GOES_BACK = 1, /* it is not to be served: only see that the directory has a whole
                                 state, if LINK_ADMIT has failed before */
};

/* What LINK_CAPTURE answers. */
enum link_capture {
    LINK_CAPTURE_CHANGED = 1, /* it may differ from the last one */
};

/* What must not have happened when the engine retires. */
enum link_retire {
    LINK_RETIRE_UNCHANGED = 0, /* nothing ran since the last LINK_CAPTURE */
    LINK_RETIRE_UNSERVED = 1,  /* nothing ran since the vTPM came to this host by LINK_ADMIT, or
                                  ever; so for a TPM that is held, or has not started */
};

/* The guest's last TPM2_Shutdown that libtpms accepted since its TPM2_Startup. */
enum link_shutdown {
    LINK_SHUTDOWN_NONE = 0,
    LINK_SHUTDOWN_CLEAR = 1,
    LINK_SHUTDOWN_STATE = 2, /* it sleeps: its next TPM2_Startup wants its PCRs back */
};

/* Where an argument has an enum link_shutdown. */
enum link_said {
    LINK_SAID_SHIFT = 8,
    LINK_SAID_MASK = 0x300,
};

/* What the engine could lock into memory. */
enum link_locked {
    LINK_LOCKED_NOTHING = 0,
    LINK_LOCKED_PRESENT = 1, /* what was mapped at the start, but not what comes later */
    LINK_LOCKED_ALL = 2,
};

/* State types, numbered as on the control channel. */
enum link_state_type {
    LINK_STATE_PERMANENT = 1,
    LINK_STATE_VOLATILE = 2,
    LINK_STATE_SAVESTATE = 3,
};

/* The descriptors that the engine is started with. */
enum link_descriptor {
    LINK_FD_INPUT = 0,       /* /dev/null */
    LINK_FD_LIBRARY_LOG = 1, /* /dev/null */
    LINK_FD_ERROR = 2,       /* one line for each thing that a person should know */
    LINK_FD_SOCKET = 3,      /* this link */
    LINK_FD_DIRECTORY = 4,   /* the state directory */
    LINK_FD_LOCK = 5,        /* .lock: held for as long as the engine lives */
    LINK_FD_STORE = 6,       /* the store's memfd (pages.h), to be mapped writable */
    LINK_FD_BOOT = 7,        /* the boot record */
    LINK_FD_ANCHOR = 8,      /* the anchor, if there is one */
};

enum link_limit {
    LINK_PAYLOAD_BYTES_MAX = 524288, /* a state blob on the control channel */
};

/* SHA-256 of what libtpms was given to start from. */
struct link_digests {
    uint8_t permanent_digest[32];
    uint8_t volatile_digest[32];
};

/* What LINK_SET_JOURNAL brings. */
struct link_journal {
    uint64_t generation;  /* none above it has been used */
    uint64_t loaded;      /* that of the state which LINK_LOAD_STATE gives; 0: it is not known */
    uint32_t is_sealed;   /* if not, there is no secret */
    uint8_t identity[16]; /* of the vTPM */
    uint8_t secret[32];   /* of its journals */
};

/* Which vTPM's state something is, and of which generation; 0: that is not known. */
struct link_lineage {
    uint64_t generation;
    uint8_t identity[16];
};

/* What the anchor says at the start (csrc/anchor.h). */
struct link_anchor {
    uint64_t serial;
    uint64_t generation;
    uint8_t identity[16];
    uint8_t digest[32];
};

struct link_header {
    uint32_t operation; /* enum link_operation */
    uint32_t result;    /* in a response: a TPM_RESULT, 0 is success */
    uint32_t argument;
    uint32_t payload_bytes;
};
