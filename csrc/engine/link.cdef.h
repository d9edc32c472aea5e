/* The engine link: the messages between vtpmd and its engine, on a stream socket between the two.
 *
 * The engine listens in the state directory, and serves one vtpmd at a time, which may come and go:
 * the end of the connection ends nothing but what was asked. LINK_END ends the engine.
 *
 * Declared once: C includes this file by way of link_types.h, Python reads it through cffi, which
 * is why it holds nothing but declarations. Numbers are in the machine's own order: both ends are
 * on one machine.
 *
 * They may be two versions: an engine runs for as long as its guest, and vtpmd is upgraded. So what
 * is here once is never changed, nor is its number used again. What is new has a new number, and
 * begins the next enum link_version, which the engine says; vtpmd asks no engine what that does not
 * know, and attaches to none of a later version than its own. The boot record is of one build.
 *
 * What the TPM starts from, and how it keeps it, is in the boot record: requests, one after
 * another, in a memfd that is sealed. The engine carries them out before it serves anybody, and
 * ends if one of them fails.
 *
 * A request is a header, then `payload_bytes` bytes of payload; so is its response, with the same
 * operation. One request of vtpmd's is under way at a time, and answered in order.
 *
 * The engine asks, too, from LINK_READY on: a question of enum link_question, whose answer has the
 * same number. It asks one at a time, and serves requests until it is answered. What is news needs
 * no answer.
 */

enum link_version {
    LINK_VERSION_FIRST = 0,  /* of engines that say none */
    LINK_VERSION_COPIES = 1, /* LINK_COPY; the epoch in LINK_TELL_RESTORED */
    LINK_VERSION = LINK_VERSION_COPIES,
};

enum link_operation {
    LINK_READY = 1, /* engine → vtpmd, which has connected: it is served; argument: enum
                       link_version; payload: struct link_ready, and JSON without a NUL: the
                       profiles that TPMLIB_GetInfo() knows; with descriptors, enum link_shared,
                       and, if that is wanted (SO_PASSCRED), the engine's process number */

    /* Of the boot record alone. */
    LINK_SERVE_CONTROL = 2, /* there has to be one; payload: struct link_serving */
    LINK_SET_JOURNAL = 3,   /* number what is written, and keep journals from the next LINK_INIT
                               on; payload: struct link_journal; argument 1: without journals, as
                               there is room for state files alone */
    LINK_SET_KEY = 4,       /* argument: enum link_key; payload: the key, of 16 or 32 bytes; before
                               anything is written */
    LINK_SET_ANCHOR = 5,    /* after LINK_SET_JOURNAL; payload: struct link_anchor; LINK_FD_ANCHOR
                               is its descriptor */
    LINK_LOAD_STATE = 6,    /* argument: state type; payload: what the checkpoint holds */
    LINK_EXECUTE = 7,       /* after LINK_INIT; payload: a TPM command, of whose failure it tells */
    LINK_SET_VERSION = 10,  /* before all that is about the TPM; argument: enum version_number
                              (version.h); without it, a TPM 2.0 */
    LINK_SERVE_DATA = 8,    /* serve the data channel on LINK_FD_DATA; argument: enum link_data,
                               added up */

    LINK_EXPECT_HEADER = 9, /* of a linear file (linear.h): its header as it was when what
                               LINK_LOAD_STATE gives was read; payload: its bytes */
    LINK_SET_PROFILE = 11,  /* of a TPM that is made; payload: JSON that ends with a NUL */
    LINK_SET_HOLDER = 12,   /* of storage that hosts share: what LINK_FD_LOCK's file says while this
                               has the lock (holder.h), its payload; argument 1: it has, and does
                               say so; 0: not yet */

    /* The control channel. */
    LINK_GET_CONDITION = 16, /* answer: argument, enum link_condition and enum link_custody */
    LINK_TAKE_BLOB = 17,     /* while LINK_ASK_BLOB is asked: give the stopped TPM that state */
    LINK_END_CONTROL = 18,   /* take no more of QEMU's commands; one that is carried out goes on */
    LINK_END = 19,           /* stop in order; LINK_TELL_END follows */
    LINK_BE_ASKED = 20, /* argument 0: there is no session; what unasked.h has go on need not be
                           asked; 1: it is to be, as it is from LINK_READY on */

    /* Power. */
    LINK_INIT = 24, /* power on, from what QEMU has brought, or else what the directory holds; a
                       volatile state is resumed from, and then removed */
    LINK_STOP = 25, /* TPM2_Shutdown as the guest needs it, then power off; argument 1: and then the
                       vTPM is another host's */

    /* The state. */
    LINK_CAPTURE = 32,         /* into the store; argument: enum link_capturing, added up; payload:
                                  none, or the owner record's first sector as it is to be written
                                  meanwhile, by a descriptor that comes with it;
                                  answer: argument, enum link_capture and enum link_shutdown, and
                                  of what is offered: payload, struct link_digests */
    LINK_KEEP_BASE = 39,       /* the destination has what was captured last; payload: two uint64_t,
                                  the generations of that, permanent and volatile: refused if they
                                  are not, or the lane is gone */
    LINK_STAGE = 33,           /* have the states that a session brings be what these records make
                                  of them, and libtpms, whose TPM is off, take them for the next
                                  start; payload: uint32_t, the bytes of the permanent state's
                                  record, both records, of which each may be empty; argument: 0, or
                                  LINK_STAGE_HELD with enum link_shutdown, as the host says that
                                  they come from; answer, of a refusal: argument, enum
                                  handover_state: QEMU may have brought the tail */
    LINK_FORGET_STATE = 34,    /* what LINK_STAGE has given is not to be used, and no more records
                                  come; argument 1: they do */
    LINK_GET_STAGED = 38,      /* answer: payload, uint64_t, the generation of the permanent state
                                  that LINK_STAGE has made, and that state */
    LINK_STORE_PERMANENT = 35, /* write the image into its file, if it is durable elsewhere */
    LINK_RAISE_GENERATION = 36, /* payload: two uint64_t, permanent and volatile: what another host
                                   has used */
    LINK_GET_LINEAGE = 37,      /* answer: payload, struct link_lineage, of the permanent state as
                                   it is durable */
    LINK_GET_INFO = 40,         /* argument: enum TPMLIB_InfoFlags, added up; answer: payload, JSON
                                   without a NUL */
    LINK_COPY = 41,             /* answer: payload, struct link_copy and the states that it says, of
                                   one moment; a session notices nothing of it; TPM_IOERROR: the
                                   TPM has stopped, as its state could not be stored */

    /* Custody (custody.h). */
    LINK_RETIRE = 48,   /* serve no more, and write nothing; refused if a command was executed since
                           the vTPM came to this host by LINK_ADMIT, or ever; not so for a TPM that
                           is held, or has not started */
    LINK_UNRETIRE = 49, /* serve and write again, also what was given away as blobs; argument 1: and
                           what was granted, as the owner record says that it is ours again */
    LINK_AWAIT = 50,    /* argument 1: the retired TPM is asked back, and commands wait for
                           LINK_UNRETIRE as they do for LINK_ADMIT; 0: not any more */
    LINK_ADMIT = 52,    /* the vTPM is this host's: commands are executed, its files may be written;
                           argument: enum link_admit; payload: struct link_lineage, of what has
                           come; may be asked again after it failed */
    LINK_ARM = 53, /* argument 1: it is said when the guest stops (LINK_CAPTURE); 0: it is not */

    /* The hand-over (handover.h), after LINK_SET_LANE. Refused where its table does not have it. */
    LINK_SET_LANE = 57, /* payload: struct link_lane; with a connected socket, which both sides have
                           greeted each other on */
    LINK_RECORD = 58,   /* have the owner record say offered, as LINK_CAPTURE does, before there is
                           a tail; payload, descriptor and news as there */
    LINK_LET_GO = 60,   /* what was offered has changed, unless QEMU has got the tail */
    LINK_WITHDRAW = 61, /* the session ends, unless it was granted; answer, also of a refusal:
                           argument, enum handover_state, as it was */
    LINK_RECORDED = 62, /* the owner record says offered, durably: the vTPM may be granted; where
                           the engine wrote it, it knows, unless there was no tail yet */
};

/* What is encrypted with a key. */
enum link_key {
    LINK_KEY_FILE = 0,      /* the state's files, and blobs as the client wants them */
    LINK_KEY_MIGRATION = 1, /* blobs, on their way */
};

/* What the engine asks, and says unasked, of QEMU's commands. An answer's result is a TPM_RESULT:
 * the command fails with it, and else the engine goes on with the command. */
enum link_question {
    LINK_ASK_INIT = 64,      /* argument: enum link_asked_init; the answer has started the TPM */
    LINK_ASK_STOP = 65,      /* argument 1: of SHUTDOWN; answer: argument 1: the TPM stays on */
    LINK_ASK_STATE = 66,     /* the permanent one, while a session may give a tail for it; the
                                answer has done so, by LINK_CAPTURING_OFFERS, or has not. With that
                                the engine goes on: the answer counts no more */
    LINK_ASK_BLOB = 67,      /* a state that is no tail has come; argument: state type; the answer
                                has taken it, by LINK_TAKE_BLOB */
    LINK_ASK_TAIL = 68,      /* a tail has come that is of no use; argument: enum link_tail; the
                                answer says with what it is refused */
    LINK_ASK_CONNECTED = 69, /* there is a new data socket, of another QEMU */
    LINK_ASK_RUNS = 70,      /* LOCK_STORAGE: QEMU's guest runs on here */
    LINK_TELL_INIT = 71,     /* news: the answer of an INIT is out */
    LINK_TELL_SHUTDOWN = 72, /* news: QEMU has ended, with SHUTDOWN */
    LINK_TELL_RESTORED = 73, /* news: an older state runs; argument: the restore epoch that begins
                                with it, or 0; payload: struct link_restored */
    LINK_TELL_RUNNING = 74,  /* news: the TPM runs now, argument 1, or does not */
    LINK_TELL_SIGNAL = 75,   /* news: a signal is to stop the vTPM; without LINK_END in
                                LINK_END_TIMEOUT_MS the engine stops */
    LINK_TELL_END = 76,      /* news, the last: it exits now; argument: its exit status */
    LINK_TELL_HANDOVER =
        77,               /* news: argument, enum handover_state; payload: struct link_handover */
    LINK_TELL_GIVEN = 78, /* news: QEMU has got the TPM's own permanent state */
    LINK_TELL_RECORDED = 79, /* news: the owner record is written, or was to be; payload: struct
                                link_recorded */
};

enum link_asked_init {
    LINK_ASKED_INCOMING = 1, /* QEMU says that its guest came with a stream */
    LINK_ASKED_BLOBS = 2,    /* it has brought its TPM's whole state */
    LINK_ASKED_TAIL = 4,     /* it has brought a tail */
};

enum link_condition {
    LINK_CONDITION_RUNNING = 1, /* from an INIT to the STOP */
    LINK_CONDITION_BLOBS = 2,   /* the next INIT starts from what QEMU has brought */
    LINK_CONDITION_ON = 4,      /* also one that is on ahead of time */
    LINK_CONDITION_STARTED = 8, /* it was started for the QEMU that is connected, on or off now */
};

/* Whose the vTPM is: custody.h. */
enum tpm_custody {
    TPM_ACTIVE = 0,
    TPM_GIVEN = 1,
    TPM_FENCED = 2,
    TPM_RECLAIMING = 3,
    TPM_STANDBY = 4,
    TPM_PENDING = 5,
};

/* Where an argument has an enum tpm_custody. */
enum link_custody {
    LINK_CUSTODY_SHIFT = 8,
    LINK_CUSTODY_MASK = 0x700,
};

/* LINK_STAGE starts the TPM ahead of time, from what is durable elsewhere. The vTPM has come to
 * this host: that ends a retirement. It writes nothing, and serves as if it had not started, until
 * it is granted. */
enum link_stage {
    LINK_STAGE_HELD = 1,
};

/* What LINK_ADMIT does. */
enum link_admit {
    LINK_ADMIT_SERVE = 0,
    LINK_ADMIT_GOES_BACK = 1, /* it is not to be served: only see that the directory has a whole
                                 state, if LINK_ADMIT has failed before */
};

/* Why a tail is of no use (tail.h). */
enum link_tail {
    LINK_TAIL_CUT = 1,           /* shorter, or longer, than any tail */
    LINK_TAIL_FORMAT = 2,        /* another version, or flags that nobody knows */
    LINK_TAIL_OTHER_SESSION = 3, /* an old one, or another vTPM's */
    LINK_TAIL_FORGED = 4,        /* altered on its way, or for another VM */
    LINK_TAIL_IMPOSSIBLE = 5,    /* sealed by the source, and not as a tail is made */
    LINK_TAIL_NOT_NEXT = 6,   /* it does not continue what has come, or libtpms does not take it */
    LINK_TAIL_UNEXPECTED = 7, /* no session is there to bring one */
};

/* What LINK_CAPTURE is told. */
enum link_capturing {
    LINK_CAPTURING_STOPPED = 1, /* the guest has stopped: a long command that runs has not happened,
                                 and is answered TPM_RC_RETRY, unless it commits already */
    LINK_CAPTURING_OFFERS = 2,  /* QEMU gets the tail that makes it of the base (LINK_KEEP_BASE),
                                   for a second without a question, while nothing runs; if there is
                                   a base, and that may be */
    LINK_CAPTURING_RECORDED = 4, /* the owner record says offered, durably, since before: the vTPM
                                    may be granted of what is offered now */
};

/* What it answers. */
enum link_capture {
    LINK_CAPTURE_CHANGED = 1,   /* it may differ from the last one */
    LINK_CAPTURE_ABANDONED = 2, /* a long command has not happened */
    LINK_CAPTURE_OFFERED = 4,
    LINK_CAPTURE_RECORDS = 8, /* the owner record is written; LINK_TELL_RECORDED says of that */
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

/* State types, numbered as on the control channel. */
enum link_state_type {
    LINK_STATE_PERMANENT = 1,
    LINK_STATE_VOLATILE = 2,
    LINK_STATE_SAVESTATE = 3,
};

/* The descriptors that the engine is started with. */
enum link_descriptor {
    LINK_FD_INPUT = 0,              /* /dev/null */
    LINK_FD_LIBRARY_LOG = 1,        /* /dev/null */
    LINK_FD_ERROR = 2,              /* one line for each thing that a person should know */
    LINK_FD_SOCKET = 3,             /* where this link is listened on; /dev/null: nowhere */
    LINK_FD_DIRECTORY = 4,          /* the state directory, or a linear file (linear.h) */
    LINK_FD_LOCK = 5,               /* .lock, or the same: held for as long as the engine lives */
    LINK_FD_STORE = 6,              /* the store's memfd (pages.h), to be mapped writable;
                                       /dev/null: none can be shared */
    LINK_FD_BOOT = 7,               /* the boot record */
    LINK_FD_ANCHOR = 8,             /* the anchor, if there is one */
    LINK_FD_CONTROL = 9,            /* the control channel's listening socket */
    LINK_FD_CONTROL_DIRECTORY = 10, /* where the engine removes that socket's file */
    LINK_FD_DATA = 11,              /* the data channel's socket, if there is one from the start */
    LINK_FD_DATA_DIRECTORY = 12,    /* where the engine removes that socket's file */
    LINK_FD_PID_DIRECTORY = 13,     /* and the one with its process number */
    LINK_FD_ROOT = 14,              /* what the engine has as its root directory, if it is told */
    LINK_FD_STARTED = 15,           /* a pipe, if it is told: somebody waits until it serves */
};

/* Those that a vtpmd gets with LINK_READY, in this order: it shares the very lock. */
enum link_shared {
    LINK_SHARED_DIRECTORY = 0,
    LINK_SHARED_LOCK = 1,
    LINK_SHARED_STORE = 2,
    LINK_SHARED = 3,
};

enum link_limit {
    LINK_SECTOR_BYTES = 512,         /* the owner record's first sector */
    LINK_PAYLOAD_BYTES_MAX = 528384, /* both states, a tail of both, or a blob of the control
                                        channel, and a page for what is said of them */
    LINK_MESSAGE_TIMEOUT_MS = 5000,  /* for the rest of a message that has begun */
    LINK_END_TIMEOUT_MS = 10000,     /* for vtpmd to stop its engine in order: sessions end first */
};

/* What an engine says of itself. */
struct link_ready {
    uint32_t libtpms_version; /* TPMLIB_GetVersion() */
    uint32_t tpm_version;     /* enum version_number */
};

/* SHA-256 of what libtpms was given to start from. */
struct link_digests {
    uint8_t permanent_digest[32];
    uint8_t volatile_digest[32];
};

/* The exit statuses of an engine that is only asked (inquiry.h). */
enum link_inquiry {
    LINK_INQUIRY_ANSWERED = 0,
    LINK_INQUIRY_FAILED = 1,
    LINK_INQUIRY_REFUSED = 8, /* libtpms does not take a profile or a state */
};

/* What LINK_SET_LANE brings (lane.h). */
struct link_lane {
    uint8_t session[16];
    uint8_t key[32];
    uint8_t uuid[16];
    uint8_t lineage[16];
    uint8_t is_greeted;
    uint8_t is_source;
};

/* How a hand-over came to the state that it is in. */
struct link_handover {
    uint8_t session[16];
    uint32_t is_source;
    uint32_t event;      /* enum handover_event */
    uint32_t tail_bytes; /* source: given to QEMU */
    uint32_t retire_us;  /* source */
    uint32_t apply_us;   /* on both sides: until the destination had done what the tail says */
    uint32_t start_us;
    uint32_t wait_us;              /* destination: from the tail to the Grant */
    uint64_t permanent_generation; /* destination: what the tail ends at; else 0 */
    uint64_t volatile_generation;
};

/* What became of the owner record that came with a LINK_CAPTURE. */
struct link_recorded {
    uint32_t error; /* an errno; 0: it is durable */
    uint32_t took_us;
};

/* What LINK_SET_JOURNAL brings. */
struct link_journal {
    uint64_t generation;  /* none above it has been used */
    uint64_t loaded;      /* that of the state which LINK_LOAD_STATE gives; 0: it is not known */
    uint32_t is_sealed;   /* if not, there is no secret */
    uint32_t is_known;    /* whose the state is: if not, the identity was made for it */
    uint8_t identity[16]; /* of the vTPM */
    uint8_t secret[32];   /* of its journals */
};

/* Which vTPM's state something is, and of which generation; 0: that is not known. */
struct link_lineage {
    uint64_t generation;
    uint8_t identity[16];
};

/* What LINK_COPY answers, before the states: in the order of their types, with no bytes where there
 * is none. */
struct link_copy {
    struct link_lineage lineage; /* of the permanent state; all 0: it is not known whose it is */
    uint32_t permanent_bytes;
    uint32_t volatile_bytes;
    uint32_t savestate_bytes;
    uint32_t unused;
};

/* A state that runs, and the newest that there was of the same vTPM. */
struct link_restored {
    uint64_t generation;
    uint64_t newest;
};

/* How LINK_FD_DATA is served. */
enum link_data {
    LINK_DATA_CONNECTED = 1,   /* it does not listen: its other end is the client */
    LINK_DATA_DISCONNECTS = 2, /* a connection is for one command */
};

/* What the control channel's socket is. */
enum link_control {
    LINK_CONTROL_LISTENS = 0,
    LINK_CONTROL_CONNECTED = 1, /* its other end is the only client */
    LINK_CONTROL_NONE = 2,
};

/* What ends the vTPM, beside SHUTDOWN and a signal. */
enum link_end {
    LINK_END_WITH_CONTROL = 1, /* the end of a connection to the control channel */
    LINK_END_WITH_DATA = 2,    /* to the data channel */
};

/* The state is on storage that hosts share, and moves by QEMU's own migration. */
enum link_sharing {
    LINK_SHARING_INCOMING = 1, /* it is to come, and another host's: LINK_FD_LOCK is not locked */
    LINK_SHARING_RELEASES = 2, /* that lock is let go of once QEMU has been given all of it */
};

/* What is done once the boot record is carried out. */
enum link_starting {
    LINK_STARTING_TOLD = 1,   /* a NUL is written to LINK_FD_STARTED, once it serves */
    LINK_STARTING_SILENT = 2, /* and before it lines; standard error is /dev/null then */
};

/* How to serve the control channel. Texts end with a NUL; an empty name is of no file. */
struct link_serving {
    uint32_t is_verbose;   /* a line for each command */
    uint32_t is_alone;     /* there is to be no vtpmd, unless one is attached later */
    uint32_t control;      /* enum link_control */
    uint32_t ends;         /* enum link_end, added up */
    uint32_t locality_max; /* that SET_LOCALITY may set */
    uint32_t file_mode;    /* of the state's files; 0: swtpm's */
    uint32_t sharing;      /* enum link_sharing, added up */
    uint32_t stays;        /* SHUTDOWN ends nothing: another QEMU is waited for */
    uint32_t starting;     /* enum link_starting, added up */
    char program[80];      /* what lines on standard error begin with */
    char socket_name[108]; /* the file to remove at the end, in LINK_FD_CONTROL_DIRECTORY */
    char link_name[32];    /* the same of this link, in the state directory */
    char data_name[108];   /* of the data channel, in LINK_FD_DATA_DIRECTORY */
    char pid_name[256];    /* of the process number, in LINK_FD_PID_DIRECTORY */
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
