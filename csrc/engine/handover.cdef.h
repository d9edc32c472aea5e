/* The hand-over's table (handover.h), for C and, by way of cffi, for Python. */

enum handover_state {
    HANDOVER_NONE,     /* QEMU has no tail, and none is expected of it */
    HANDOVER_PREPARED, /* source: QEMU gets the tail when it asks; it is not known yet that the
                          record says offered, durably: nothing is granted before that */
    HANDOVER_OFFERED,  /* source: as PREPARED, and it does */
    HANDOVER_GIVEN,    /* source: as FROZEN, but that is not known yet */
    HANDOVER_WANTED,   /* source: as GIVEN, and the destination has asked for the vTPM */
    HANDOVER_FROZEN,   /* source: the tail is QEMU's; the destination has not asked for the vTPM */
    HANDOVER_RETIRING, /* source: it has; the TPM is fenced if nothing ran since */
    HANDOVER_GRANTED,  /* source: fenced; the vTPM is the destination's, or may be */
    HANDOVER_STARTING, /* destination: QEMU has brought the tail, and the source is asked for the
                          vTPM; the TPM is not on standby from it yet */
    HANDOVER_TAKING,   /* destination: it is; the source has not granted the vTPM, or that is not
                          heard yet */
    HANDOVER_WAITING,  /* destination: as TAKING, and QEMU's INIT waits */
    HANDOVER_ENTITLED, /* destination: granted; QEMU has not sent INIT yet */
    HANDOVER_STARTED,  /* destination: granted, and INIT is answered; vtpmd is to admit the TPM */
};

enum handover_event {
    /* Of vtpmd. */
    HANDOVER_OFFER,    /* there is a tail */
    HANDOVER_RECORDED, /* the record says offered, durably */
    HANDOVER_DETACHED, /* it is gone: nobody says that any more */
    HANDOVER_LET_GO,   /* what was offered has changed, and the session goes on */
    HANDOVER_WITHDRAW, /* the session is to end without a Grant */
    HANDOVER_OWNED,    /* whose the vTPM is, is settled: admitted, given back, or taken back */
    /* Of QEMU. */
    HANDOVER_ASKED, /* it asks for the permanent state; nothing ran since the tail was made */
    HANDOVER_RUNS,  /* its guest runs here, or something ran since */
    HANDOVER_TAIL,  /* it has brought the session's tail, which continues what has come */
    HANDOVER_INIT,  /* it starts the TPM of a guest that came */
    /* Of the lane. */
    HANDOVER_TAKE,       /* the destination starts from what was offered */
    HANDOVER_TAKE_OTHER, /* it starts from something else */
    HANDOVER_GRANT,
    HANDOVER_END,  /* the other side has ended the session */
    HANDOVER_LOST, /* the lane broke, or said what it must not */
    /* Of what was done. */
    HANDOVER_RETIRED,
    HANDOVER_NOT_RETIRED, /* something ran */
    HANDOVER_READY,       /* the TPM is on standby from the tail */
    HANDOVER_NOT_READY,   /* libtpms refuses it */
    HANDOVER_TIMED_OUT,   /* INIT has waited long enough */
};

/* What is to be done, in this order. */
enum handover_action {
    HANDOVER_DO_GIVE_TAIL = 1, /* answer QEMU with it */
    HANDOVER_DO_RETIRE = 2,    /* then RETIRED or NOT_RETIRED */
    HANDOVER_DO_EXPECT = 4,    /* QEMU is told that the TPM is on: the guest's commands wait */
    HANDOVER_DO_SEND_TAKE = 8, /* over the lane */
    HANDOVER_DO_SEND_GRANT = 16,
    HANDOVER_DO_SEND_END = 32,
    HANDOVER_DO_CLOSE = 64, /* the lane is of no more use */
    HANDOVER_DO_TELL = 128, /* vtpmd hears of the new state */
};

/* What follows from an event. */
struct handover_step {
    bool is_possible; /* if not: nothing changes, and who asked is refused */
    enum handover_state state;
    uint32_t actions; /* enum handover_action */
};

struct handover_step handover_step(enum handover_state state, enum handover_event event);
